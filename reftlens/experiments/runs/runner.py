"""Run recipes: every method with every seed, each in a folder of its own, which a killed run goes on from."""

from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from reftlens import figures
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.runs.alike import check_alike, plain
from reftlens.experiments.runs.recipe import Recipe, Scope, Setting, Trial
from reftlens.experiments.runs.records import CONFIG_FILE, METHOD_FOLDER, RunFolder
from reftlens.experiments.runs.rotating import Rotations, ask_rotated, rotating_cost
from reftlens.experiments.runs.searching import SEARCH_FILE
from reftlens.experiments.runs.tables import Table, table
from reftlens.experiments.runs.tuning import tuned
from reftlens.files import exclusive, located, write_atomically
from reftlens.numbers import Integers, whole_numbers
from reftlens.training.result import library_versions

COST_FILE, CHECKPOINT_FILE = "cost.json", "train.ckpt"


def run_recipe(
    recipe: Recipe,
    methods: Sequence[str] = (),
    *,
    subject: Subject | None = None,
    seeds: Integers | None = None,
    scope: Scope | None = None,
    search: Sequence[str] = (),
    rotate: Sequence[str] | Rotations = (),
    out: str | Path = "runs",
    progress: bool = True,
) -> Table:
    """Train and score each method with each seed, and return the table of what is in the folder of the recipe.

    A run lies in `out/RECIPE/PART/METHOD/seed-S`: `config.json`, `predictions.jsonl`, `metrics.json` and the method
    itself. One that is finished is not repeated, one that was killed goes on, from the last checkpoint of its training
    or behind the last task that was scored.

    Args:
        methods: names of the recipe's methods; all of them by default.
        subject: the model under study; the recipe's own by default.
        seeds: of initialisation and data order; the recipe's own by default. What trains nothing runs with the first.
        scope: data, tasks and limits.
        search: methods whose settings are chosen on dev rows first, each with the same number of row-updates.
        rotate: tasks whose test rows every finished run is asked once for each rotation of their options, in the ways
            of the recipe; `Rotations` limits rows and ways. The answers lie in `rotated.jsonl`, the first rotation's in
            `predictions.jsonl`; the table's `letters` says what they show.

    Raises:
        ValueError: for a method that the recipe does not have, data that are not of its family, or rows to rotate that
            have no options.
        StoreMismatch: where the folder holds a run with other settings, or runs of another model; or where another
            process is at work on the same run.
    """
    named, scope = methods_of(recipe, methods), scope or Scope()
    subject = recipe.subject(None) if subject is None else subject
    numbers = recipe.seeds if seeds is None else tuple(whole_numbers(seeds, "seed"))
    parts, folder, request = recipe.parts(scope), located(out) / recipe.name, Rotations.of(rotate)
    every = [(p, m, s) for p in parts for s in numbers for m in named if s == numbers[0] or trains(recipe, m)]
    chosen = dict[tuple[str, str], Setting]()
    for part in parts if request.tasks else ():  # before any work
        rotating_cost(recipe.trial(part, named[0], numbers[0], subject, scope), request)
    searched = set(methods_of(recipe, search)) if search else set()
    if odd := sorted(searched - set(named)):
        raise ValueError(f"search={list(search)} names {', '.join(odd)}, which is not run: methods={list(named)}")
    for part, method, seed in tqdm(every, desc=recipe.name, unit="run", disable=not progress):
        own = folder / part / method
        if (part, method) not in chosen and (method in searched or (own / SEARCH_FILE).is_file()):
            with exclusive(own):
                found = tuned(recipe, part, method, subject, scope, own, progress=progress)
                chosen[part, method] = found.best.setting
        setting = chosen.get((part, method), {})
        trial, run = recipe.trial(part, method, seed, subject, scope, setting), RunFolder(own / f"seed-{seed}")
        if not run.config():  # before any work
            others = [RunFolder(file.parent) for file in sorted(folder.glob(f"*/*/seed-*/{CONFIG_FILE}"))]
            check_alike([*((each.path, each.config()) for each in others), (run.path, plain(trial.config))])
        with exclusive(run.path):
            complete(trial, run, progress=progress)
            if request.tasks:
                ask_rotated(trial, run, request, progress=progress)
    made = table([folder])
    write_report(made, folder)
    return made


def write_report(found: Table, folder: Path) -> None:
    """`report.md`, the table, with a picture of its scores."""
    text = f"{found.to_markdown()}\n\n![Scores with 95 % intervals.](scores.png)\n"
    write_atomically(folder / "report.md", text.encode())
    figures.write(found.plot(), folder / "scores.png")


def methods_of(recipe: Recipe, methods: Sequence[str]) -> tuple[str, ...]:
    """The names that were asked for, or all; `ValueError` for one that there is not."""
    methods = (methods,) if isinstance(methods, str) else methods
    for name in methods:
        if name not in recipe.methods:
            raise ValueError(f"{recipe.name} has no method {name!r}, expected some of {', '.join(recipe.methods)}")
    return tuple(methods) or tuple(recipe.methods)


def trains(recipe: Recipe, name: str) -> bool:
    """Whether a method of a recipe trains anything, so that its seed makes a difference."""
    method = recipe.methods[name]
    return method is None or method.stored


def complete(trial: Trial, folder: RunFolder, *, progress: bool) -> None:
    """Do what is left of a trial."""
    folder.begin(trial.config)
    done = {prediction.task for prediction in folder.predictions()}
    if folder.metrics() and done.issuperset(trial.tasks):
        return
    method, cost = folder.path / METHOD_FOLDER, folder.read(COST_FILE)
    if cost:
        trial.load(method)
    else:
        figures = trial.fit(folder.path / CHECKPOINT_FILE, progress=progress)
        cost = {**figures, "bytes_on_disk": trial.save(method), "versions": library_versions()}
        folder.write(COST_FILE, cost)
        (folder.path / CHECKPOINT_FILE).unlink(missing_ok=True)
    for task in trial.tasks:
        if task not in done:
            folder.add(trial.predict(task, progress=progress))
    folder.finish(cost)
