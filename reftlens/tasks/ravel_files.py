"""RAVEL's cities and prompts as they are stored: in three files, or on the Hugging Face hub."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reftlens.errors import reason_of
from reftlens.text.loading import records

_FILES = ("city_entities.jsonl", "city_prompts.jsonl", "city_wikipedia_prompts.jsonl")
_HUB = "hij/ravel"
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class City:
    """A city, the split it belongs to (or none) and its attributes as the data set writes them."""

    name: str
    split: str | None
    attributes: Mapping[str, str]
    known: frozenset[str]
    """Attributes that a pair may ask for; all of them, until `Known.keep` leaves what a model knows."""

    def answer(self, attribute: str) -> str:
        """The attribute's value; of several ("Chinese,English") the first."""
        if attribute not in self.attributes:
            raise ValueError(f"{self.name} has no {attribute!r}, it has: {', '.join(self.attributes)}")
        return self.attributes[attribute].split(",")[0].strip()


@dataclass(frozen=True)
class Template:
    """A prompt with `%s` where the city's name goes."""

    text: str
    split: str | None
    attribute: str | None
    """What it asks for; None for a sentence from Wikipedia, which asks for nothing."""
    city: str | None = None
    """The one city it was written about, where there is one."""


def from_files(folder: Path) -> tuple[tuple[City, ...], tuple[Template, ...]]:
    """Cities and templates from a folder with the three files."""
    for name in _FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is not there: expected {', '.join(_FILES)} in the folder")
    cities, prompts, sentences = (list(records(folder / name)) for name in _FILES)
    return _cities_of(cities, name="entity"), _templates_of([*prompts, *sentences], text="prompt")


def from_hub() -> tuple[tuple[City, ...], tuple[Template, ...]]:
    """The same from the hub's `hij/ravel`, whose columns begin with capitals and whose splits are the data's."""
    try:
        import datasets
    except ImportError:
        raise ImportError("reading RAVEL from the hub needs datasets: pip install 'reftlens[datasets]'") from None
    try:
        entities, prompts = (datasets.load_dataset(_HUB, name) for name in ("city_entity", "city_prompt"))
    except Exception as error:  # whatever kept it from being read, the way out is the same
        raise OSError(f"cannot read {_HUB} from the hub ({reason_of(error)}): pass a folder with its files") from error
    cities = _cities_of(_hub_records(entities, "city_entity"), name="City")
    return cities, _templates_of(_hub_records(prompts, "city_prompt"), text="Template")


def _hub_records(splits: Any, name: str) -> Iterable[tuple[str, Any]]:
    for split, rows in splits.items():
        for i, row in enumerate(rows):
            lowered = {"attribute": row.get("Attribute"), "entity": row.get("Entity")} if "Template" in row else {}
            dropped = {k: v for k, v in row.items() if k not in ("ID", "URL")}
            yield f"{_HUB} {name}, {split} row {i}", {**dropped, **lowered, "split": str(split)}


def _cities_of(records: Iterable[tuple[str, Any]], *, name: str) -> tuple[City, ...]:
    cities = []
    for place, row in records:
        _check(place, row, name)
        values = {k: str(v) for k, v in row.items() if k not in (name, "split") and v not in (None, "")}
        cities.append(City(row[name], row["split"], values, frozenset(values)))
    return tuple(cities)


def _templates_of(records: Iterable[tuple[str, Any]], *, text: str) -> tuple[Template, ...]:
    templates = []
    for place, row in records:
        _check(place, row, text)
        if row[text].count("%s") != 1:
            raise ValueError(f"{place}: {row[text]!r} has %s {row[text].count('%s')} times, expected once")
        city, attribute = row.get("entity") or None, row.get("attribute") or None
        templates.append(Template(row[text], row["split"], attribute, city))
    return tuple(templates)


def _check(place: str, row: Any, field: str) -> None:
    missing = [f for f in (field, "split") if not isinstance(row, Mapping) or f not in row]
    if missing:
        raise ValueError(f"{place} has no field {missing[0]!r}, it has: {', '.join(row)}")
    if row["split"] not in (None, *_SPLITS):
        raise ValueError(f"{place}: split is {row['split']!r}, expected one of {', '.join(_SPLITS)}, or null")
