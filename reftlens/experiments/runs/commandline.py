"""`reftlens run RECIPE`: what the command line takes, and what is said of it."""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from reftlens.bridge.pretrained import DTYPES
from reftlens.editing.engine import forward
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.recipes import RECIPES
from reftlens.experiments.runs.recipe import Recipe, Scope
from reftlens.experiments.runs.rotating import Rotations, rotating_cost
from reftlens.experiments.runs.runner import methods_of, run_recipe, trains
from reftlens.experiments.runs.tables import table
from reftlens.experiments.runs.tuning import search_cost

_OF_TABLES = ("table", "against", "quiet", "dtype", "out", "run")
"""Options that a table heeds, or that are set where nobody gave them."""


def add_run(commands: Any, run: Callable[[argparse.Namespace], int]) -> None:
    """Add `run` to the commands."""
    command = commands.add_parser("run", help="run an experiment of the ReFT paper: each method with each seed")
    several: Any = {"nargs": "+", "action": "extend"}  # an option that is given twice adds to the first
    command.add_argument("recipe", nargs="?", metavar="RECIPE", choices=tuple(RECIPES), help=", ".join(RECIPES))
    command.add_argument("--model", help="folder or hub id (default: the recipe's own)")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    command.add_argument("--data", type=Path, metavar="DIR", help="folder of the data sets (default: the hub)")
    command.add_argument("--tasks", **several, metavar="TASK", help="those that are tested (default: the recipe's)")
    command.add_argument("--method", **several, default=[], metavar="NAME", help="default: all of the recipe's")
    command.add_argument("--seeds", **several, type=int, metavar="SEED", help="default: the recipe's")
    command.add_argument("--limit", type=int, metavar="ROWS", help="test rows of each task (default: the recipe's)")
    command.add_argument("--train-limit", type=int, metavar="ROWS", help="training rows of each task")
    command.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    words = "choose settings of these methods on dev rows first, nine settings of 60 steps each"
    command.add_argument("--search", **several, default=[], metavar="NAME", help=words)
    words = "ask the test rows of these tasks once for each rotation of their options"
    command.add_argument("--rotate", **several, default=[], metavar="TASK", help=words)
    command.add_argument("--rotate-limit", type=int, metavar="ROWS", help="rows of each task to rotate (default: all)")
    words = "ways of answering to rotated rows (default: those of the recipe)"
    command.add_argument("--rotate-ways", **several, default=[], metavar="WAY", help=words)
    command.add_argument("--out", type=Path, default=Path("runs"), help="folder to write to (default: runs)")
    command.add_argument("--dry-run", action="store_true", help="say what it would take, and run nothing")
    words = "make the table of finished runs alone; DIR may be a zip file"
    command.add_argument("--table", **several, type=Path, metavar="DIR", help=words)
    command.add_argument("--against", metavar="NAME", help="what every other method has more than this one, paired")
    command.add_argument("--quiet", action="store_true", help="no progress bars")
    command.set_defaults(run=run)


def outcome(options: argparse.Namespace) -> str:
    """Run a recipe, or find out what it would take, or make a table of what is there; what is to be said of it."""
    if options.table:
        if given := [name for name, value in vars(options).items() if value and name not in _OF_TABLES]:
            raise ValueError(f"--table makes a table of runs as they are, and nothing else: drop {', '.join(given)}")
        return table(options.table).to_markdown(options.against)
    if options.recipe is None:
        raise ValueError(f"run needs a recipe, one of {', '.join(RECIPES)}, or --table DIR")
    recipe = RECIPES[options.recipe]
    scope = Scope(options.data, options.tasks, options.limit, options.train_limit, options.steps)
    subject = recipe.subject(options.model, options.dtype)
    rotate = Rotations(tuple(options.rotate), options.rotate_limit, tuple(options.rotate_ways))
    if options.dry_run:
        named, seeds = methods_of(recipe, options.method), options.seeds or recipe.seeds
        searched = methods_of(recipe, options.search) if options.search else ()
        return forecast(recipe, subject, scope, named, seeds, rotate, searched)
    settings: dict[str, Any] = {"subject": subject, "seeds": options.seeds, "scope": scope, "out": options.out}
    settings |= {"search": options.search, "rotate": rotate}
    found = run_recipe(recipe, options.method, **settings, progress=not options.quiet).to_markdown(options.against)
    return f"{found}\n\nconfigurations, predictions and methods   {options.out / recipe.name}"


def forecast(
    recipe: Recipe,
    subject: Subject,
    scope: Scope,
    methods: Sequence[str],
    seeds: Sequence[int],
    rotate: Rotations,
    search: Sequence[str] = (),
) -> str:
    """Tokens, steps and time of each run and search, by the speed of a forward pass of this model on this machine."""
    seconds, lines = _seconds_per_token(subject), []
    for part in recipe.parts(scope):
        for name in methods:
            trial = recipe.trial(part, name, seeds[0], subject, scope)
            cost, more = dict(trial.cost()), dict(rotating_cost(trial, rotate)) if rotate.tasks else {}
            tokens = 3 * cost["tokens of training"] + cost["tokens of scoring"] + cost["tokens written at most"]
            cost, tokens = cost | more, tokens + sum(more.values())
            words = ", ".join(f"{value:,} {key}" for key, value in cost.items())
            often = "a seed" if trains(recipe, name) else "once"
            lines.append(f"{part}/{name}: {words}; at most {tokens * seconds / 60:.0f} minutes {often}, in full")
        for name in search:
            cost = search_cost(recipe, part, name, subject, scope)
            tokens = 3 * cost["tokens of training"] + cost["tokens of scoring"]
            words = ", ".join(f"{value:,} {key}" for key, value in cost.items())
            lines.append(
                f"{part}/{name}, its search: {words}; about {tokens * seconds / 60:.0f} minutes, once, in full"
            )
    speed = f"{1e3 * seconds:.2f} ms for a token of a forward pass here, a backward pass taken for two"
    return "\n".join([*lines, f"{len(seeds)} seeds, {speed}"])


@torch.no_grad()
def _seconds_per_token(subject: Subject) -> float:
    """Of a forward pass of a few rows, the median of three."""
    tokens = torch.randint(0, 100, (4, 64), device=subject.device)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        forward(subject.bridge, tokens, torch.ones_like(tokens).bool()).sum().item()
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[1] / tokens.numel()
