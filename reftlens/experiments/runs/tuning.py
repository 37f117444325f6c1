"""The settings of a recipe's methods: what is tried of each, what that takes, and the search itself."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from reftlens.experiments.methods.adapters import Lora
from reftlens.experiments.methods.method import Method
from reftlens.experiments.methods.refts import Reft
from reftlens.experiments.methods.spaces import Space, lora_space, reft_space
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.runs.recipe import Recipe, Scope
from reftlens.experiments.runs.searching import MethodSearch, search

STEPS = 60
_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 3e-5, 1e-5, 1e-1)
_NO_PART = ("seed", "test", "asked", "choices")
"""Of the configuration of a run what no search depends on."""


def space_of(recipe: Recipe, name: str, subject: Subject) -> Space:
    """The recipe's own; else nine settings: of LoRA with ranks, of ReFTs with positions, ranks and layers, of others
    nine learning rates.

    Raises:
        ValueError: for a head alone or the model as it is, which have no settings of their own.
    """
    method: Method | None = recipe.methods[name]
    if method is None or not method.stored:
        raise ValueError(f"{name} is no method with settings to search: leave it out of the search")
    if own := recipe.space(name):
        return own
    if isinstance(method, Lora):
        return lora_space(method)
    return (
        reft_space(method, subject.bridge.cfg.n_layers) if isinstance(method, Reft) else Space(method, {"lr": _RATES})
    )


def search_cost(recipe: Recipe, part: str, name: str, subject: Subject, scope: Scope) -> Mapping[str, int]:
    """Settings that a search tries, tokens that it trains on, and tokens that it scores: about, by the mean row."""
    space = space_of(recipe, name, subject)
    trial = recipe.trial(part, name, 0, subject, replace(scope, steps=STEPS))
    trained = trial.cost()["tokens of training"]
    scored = round(trained / trial.row_updates * trial.dev_rows)
    return {
        "settings": space.trials,
        "tokens of training": space.trials * trained,
        "tokens of scoring": space.trials * scored,
    }


def tuned(
    recipe: Recipe, part: str, name: str, subject: Subject, scope: Scope, folder: Path, *, progress: bool
) -> MethodSearch:
    """Which setting of a method scores most on the dev rows of a part, after 60 steps with seed 0.

    It is written to `search.json` with all that were tried, and read from there the next time; a search that was killed
    goes on behind the last setting that was scored. A setting whose training diverges is the worst.

    Raises:
        StoreMismatch: where the file is of other rows, another model or a method with other settings.
        NotFinite: where no setting has a finite score.
    """
    within = replace(scope, steps=STEPS)
    config = recipe.trial(part, name, 0, subject, within).config
    of = {key: value for key, value in config.items() if key not in _NO_PART}
    return search(
        space_of(recipe, name, subject),
        lambda setting: recipe.trial(part, name, 0, subject, within, setting),
        of=of,
        steps=STEPS,
        folder=folder,
        desc=f"search {part}/{name}",
        progress=progress,
    )
