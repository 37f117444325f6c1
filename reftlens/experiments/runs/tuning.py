"""Settings of a recipe's methods, chosen on dev rows before any seed is run: the same budget for every method."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from reftlens.errors import NotFinite, StoreMismatch, TrainingDiverged
from reftlens.experiments.methods.adapters import Lora
from reftlens.experiments.methods.method import Method
from reftlens.experiments.methods.refts import Reft
from reftlens.experiments.methods.spaces import Space, lora_space, reft_space
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.runs.alike import differences, plain
from reftlens.experiments.runs.recipe import Recipe, Scope, Trial
from reftlens.experiments.runs.records import RunFolder

SEARCH_FILE, STEPS = "search.json", 60
_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 3e-5, 1e-5, 1e-1)


def space_of(method: Method | None, name: str, depth: int) -> Space:
    """Nine settings: of LoRA with ranks, of ReFTs with positions, ranks and layers, of others nine learning rates.

    Raises:
        ValueError: for a head alone or the model as it is, which have no settings of their own.
    """
    if method is None or not method.stored:
        raise ValueError(f"{name} is no method with settings to search: leave it out of the search")
    if isinstance(method, Lora):
        return lora_space(method)
    return reft_space(method, depth) if isinstance(method, Reft) else Space(method, {"lr": _RATES})


def search_cost(recipe: Recipe, part: str, name: str, subject: Subject, scope: Scope) -> Mapping[str, int]:
    """Settings that a search tries, tokens that it trains on, and tokens that it scores: about, by the mean row."""
    space = recipe.space(name) or space_of(recipe.methods[name], name, subject.bridge.cfg.n_layers)
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
) -> Mapping[str, Any]:
    """The setting of a method that scores most on the dev rows of a part, after 60 steps with seed 0.

    It is written to `search.json` with all that were tried, and read from there the next time; a search that was killed
    goes on behind the last setting that was scored. A setting whose training diverges is the worst.

    Raises:
        StoreMismatch: where the file is of other rows, another model or a method with other settings.
        NotFinite: where no setting has a finite score.
    """
    space = recipe.space(name) or space_of(recipe.methods[name], name, subject.bridge.cfg.n_layers)
    within = replace(scope, steps=STEPS)
    search = _Search(RunFolder(folder), recipe.trial(part, name, 0, subject, within).config)
    with tqdm(total=space.trials, desc=f"search {part}/{name}", unit="trial", disable=not progress) as bar:
        for setting in space.settings(search.best):
            if _key(setting) not in search.scores:
                search.score(setting, recipe.trial(part, name, 0, subject, within, setting))
            bar.update()
    if not any(score is not None for score in search.scores.values()):
        raise NotFinite(f"none of {space.trials} settings of {name} has a finite score: look at its data and rates")
    return search.best([each["setting"] for each in search.told["tried"]])


class _Search:
    """The settings that were tried, and the file that tells them."""

    def __init__(self, folder: RunFolder, config: Mapping[str, Any]) -> None:
        wanted = plain({k: v for k, v in config.items() if k not in _NO_PART})
        self.folder, self.told = folder, folder.read(SEARCH_FILE) or {"tried": []}
        if seen := differences(self.told.setdefault("of", wanted), wanted):
            file = folder.path / SEARCH_FILE
            raise StoreMismatch(f"{file} is of another search ({seen}): take it away, or choose another folder")
        self.scores: dict[str, float | None] = {_key(each["setting"]): each["score"] for each in self.told["tried"]}

    def best(self, some: Iterable[dict[str, Any]]) -> dict[str, Any]:
        return max(some, key=lambda setting: _worth(self.scores[_key(setting)]))

    def score(self, setting: dict[str, Any], trial: Trial) -> None:
        """Train a setting and write down how well it does; nothing, where that is no finite number."""
        try:
            trial.fit(None, progress=False)
            score = trial.dev_score()
        except (TrainingDiverged, NotFinite):
            score = math.nan
        self.scores[_key(setting)] = known = score if math.isfinite(score) else None
        self.told["tried"].append({"setting": setting, "score": known})
        updates = len(self.told["tried"]) * trial.row_updates
        self.told |= {"rows": trial.dev_rows, "row_updates": updates, "steps": STEPS}
        self.folder.path.mkdir(parents=True, exist_ok=True)
        self.folder.write(SEARCH_FILE, self.told)


_NO_PART = ("seed", "test", "asked", "choices")
"""Of the configuration of a run what no search depends on."""


def budgets(folder: Path) -> Sequence[str]:
    """What each search below a folder tried and took, a sentence for each."""
    lines = []
    for file in sorted(folder.rglob(SEARCH_FILE)):
        told = json.loads(file.read_text(encoding="utf-8"))
        best = max(told["tried"], key=lambda each: _worth(each["score"]))
        words = ", ".join(f"{k} {v}" for k, v in best["setting"].items())
        without = sum(each["score"] is None for each in told["tried"])
        lines.append(
            f"{file.parent.relative_to(folder)}: {len(told['tried'])} settings of {told['steps']} steps, "
            f"{told['row_updates']:,} row-updates, one seed, chosen on {told['rows']} dev rows: {words}"
            + (f"; {without} without a finite score" if without else "")
        )
    return lines


def _worth(score: float | None) -> float:
    return -math.inf if score is None else score


def _key(setting: Mapping[str, Any]) -> str:
    return json.dumps(setting, sort_keys=True)
