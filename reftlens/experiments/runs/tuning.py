"""Settings of a recipe's methods, chosen on dev rows before any seed is run: the same budget for every method."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from reftlens.experiments.methods.adapters import Lora
from reftlens.experiments.methods.method import Method
from reftlens.experiments.methods.refts import Reft
from reftlens.experiments.methods.spaces import Space, lora_space, reft_space
from reftlens.experiments.methods.subjects import Subject
from reftlens.experiments.runs.recipe import Recipe, Scope
from reftlens.files import write_atomically

SEARCH_FILE, STEPS = "search.json", 60
_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 3e-5, 1e-5, 1e-1)


def space_of(method: Method | None, name: str, depth: int) -> Space:
    """Nine settings: of LoRA with ranks, of ReFTs with positions, ranks and layers, of others nine learning rates.

    Raises:
        ValueError: for a head alone, which has no settings of its own.
    """
    if method is None:
        raise ValueError(f"{name} is no method with settings to search: leave it out of the search")
    if isinstance(method, Lora):
        return lora_space(method)
    return reft_space(method, depth) if isinstance(method, Reft) else Space(method, {"lr": _RATES})


def tuned(
    recipe: Recipe, part: str, name: str, subject: Subject, scope: Scope, folder: Path, *, progress: bool
) -> Mapping[str, Any]:
    """The setting of a method that scores most on the dev rows of a part, after 60 steps with seed 0.

    It is written to `search.json` with all that were tried, and read from there the next time; a search that was killed
    goes on behind the last setting that was scored.
    """
    file = folder / SEARCH_FILE
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"tried": []}
    space = recipe.space(name) or space_of(recipe.methods[name], name, subject.bridge.cfg.n_layers)
    within = replace(scope, steps=STEPS)
    scores = {_key(each["setting"]): each["score"] for each in told["tried"]}

    def best(some: Iterable[dict[str, Any]]) -> dict[str, Any]:
        return max(some, key=lambda setting: scores[_key(setting)])

    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=space.trials, desc=f"search {part}/{name}", unit="trial", disable=not progress) as bar:
        for setting in space.settings(best):
            if _key(setting) not in scores:
                trial = recipe.trial(part, name, 0, subject, within, setting)
                trial.fit(None, progress=False)
                scores[_key(setting)] = trial.dev_score()
                told |= {"rows": trial.dev_rows, "row_updates": space.trials * trial.row_updates, "steps": STEPS}
                told["tried"].append({"setting": setting, "score": scores[_key(setting)]})
                write_atomically(file, json.dumps(told, indent=1).encode())
            bar.update()
    return best([each["setting"] for each in told["tried"]])


def budgets(folder: Path) -> Sequence[str]:
    """What each search below a folder tried and took, a sentence for each."""
    lines = []
    for file in sorted(folder.rglob(SEARCH_FILE)):
        told = json.loads(file.read_text(encoding="utf-8"))
        best = max(told["tried"], key=lambda each: each["score"])
        words = ", ".join(f"{k} {v}" for k, v in best["setting"].items())
        lines.append(
            f"{file.parent.relative_to(folder)}: {len(told['tried'])} settings of {told['steps']} steps, "
            f"{told['row_updates']:,} row-updates, one seed, chosen on {told['rows']} dev rows: {words}"
        )
    return lines


def _key(setting: Mapping[str, Any]) -> str:
    return json.dumps(setting, sort_keys=True)
