"""What the runs of one table have in common: runs that differ in more than their seed are not seeds of one method."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from reftlens.errors import StoreMismatch

_OF_ALL = ("model", "dtype")
_OWN = ("seed", "train")
"""Of each seed its own; the labels of training rows may be dealt out by it."""

Configs = Iterable[tuple[Any, Mapping[str, Any]]]
"""Configurations of runs, behind their places."""


def check_alike(configs: Configs) -> None:
    """Refuse runs that do not belong in one table.

    Raises:
        StoreMismatch: where two runs of a recipe have other models or dtypes, or two seeds of a method other settings.
    """
    known: dict[tuple[Any, ...], tuple[Any, Mapping[str, Any]]] = {}
    for place, config in configs:
        recipe, part, method = (config.get(name) for name in ("recipe", "part", "method"))
        common = {name: config[name] for name in _OF_ALL if name in config}
        for key, values in (((recipe,), common), ((recipe, part, method), _shared(config))):
            first, other = known.setdefault(key, (place, values))
            if odd := differences({name: value for name, value in other.items() if name in values}, values):
                raise StoreMismatch(
                    f"{place} and {first} differ in {odd}: one table is of one model, and of one setting for all seeds "
                    "of a method; give them folders of their own"
                )


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What a stored configuration says otherwise, in words; empty where it agrees in all that was written down then."""
    names = sorted(k for k in stored if stored[k] != wanted.get(k))
    return "; ".join(f"{k}: {_short(stored.get(k))} there, {_short(wanted.get(k))} now" for k in names)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it is read from a file."""
    return json.loads(json.dumps(config, default=str))


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """What all seeds of a method have in common; the rows of the test are compared where their answers are."""
    fit = {name: value for name, value in config.get("fit", {}).items() if name != "seed"}
    return {name: value for name, value in config.items() if name not in (*_OWN, "test")} | {"fit": fit}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
