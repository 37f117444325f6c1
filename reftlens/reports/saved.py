"""Saved edits that are compared: what each is, and what all of them are asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from reftlens.bridge.protocol import Bridge
from reftlens.editing.bound import Place, Places
from reftlens.editing.reft import ReFT
from reftlens.errors import StoreMismatch
from reftlens.files import digest, located
from reftlens.generation.decoding import Decoding
from reftlens.storage.folder import RUN_FILE, load, load_run, model_of
from reftlens.text.batch import Batch
from reftlens.training.result import FitResult

COLUMNS = ("hook", "positions", "prompt", "setting", "unedited")
"""Of tables in which each edit has a column, too: no edit has one of these names."""


@dataclass(frozen=True, eq=False)
class SavedEdit:
    """An edit, with what its folder says of its training."""

    name: str
    folder: Path
    reft: ReFT
    run: FitResult | None
    places: Places

    @property
    def weights(self) -> str:
        """SHA-256 of its numbers."""
        return digest(self.reft.interventions.state_dict())

    def at(self, spot: tuple[object, ...]) -> Place | None:
        """What it has at a hook, positions and heads, if anything."""
        return next((place for place in self.places if place.spot == spot), None)


@dataclass(frozen=True, eq=False)
class Compared:
    """Edits of one model, and what they are compared on."""

    edits: tuple[SavedEdit, ...]
    model: Bridge
    data: Batch | None
    prompts: Batch | None
    strengths: tuple[float, ...]
    decoding: Decoding
    progress: bool

    @property
    def names(self) -> list[str]:
        return [edit.name for edit in self.edits]

    def pairs(self) -> list[tuple[SavedEdit, Place, SavedEdit, Place]]:
        """Sites of two edits that edit the same vectors: one hook, the same heads; at whatever positions."""

        def vectors(place: Place) -> tuple[object, ...]:
            return place.point.name, place.carry is None, place.site.heads

        return [
            (a, here, b, there)
            for a, b in combinations(self.edits, 2)
            for here in a.places
            for there in b.places
            if vectors(here) == vectors(there)
        ]


def named(folders: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, Path]:
    """Folders by name; where none are given by their own, or by their paths where two have the same or one is taken.

    Raises:
        TypeError: for one folder, or a name that is no text.
        ValueError: for fewer than two, one that is there twice, or a name that stands for something else.
    """
    if isinstance(folders, str | Path):
        raise TypeError(f"folders={folders!r} is one folder, expected two or more that save() wrote")
    given = list(folders.values() if isinstance(folders, Mapping) else folders)
    paths = [located(folder) for folder in given]
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        raise ValueError(f"folders={[str(path) for path in paths]}, expected two or more, each of them once")
    if isinstance(folders, Mapping):
        for name in folders:
            _check_name(name)
        return dict(zip(folders, paths, strict=True))
    whole = [path.resolve() for path in paths]
    choices = [[path.name for path in whole], list(map(str, paths)), list(map(str, whole))]
    names = next(some for some in choices if len({*some, *COLUMNS}) == len(some) + len(COLUMNS))
    return dict(zip(names, paths, strict=True))


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"folders={{{name!r}: …}}, expected a text as the name of an edit")
    if not name or name in COLUMNS:
        raise ValueError(f"folders={{{name!r}: …}}: an edit needs a name, other than {', '.join(COLUMNS)}")


def run_of(folder: Path) -> FitResult | None:
    """The record of the training in a folder, if there is one."""
    return load_run(folder) if (folder / RUN_FILE).is_file() else None


def check_one_model(folders: Mapping[str, Path]) -> None:
    """Raise where the edits in these folders are of different models; no model is needed for it.

    Raises:
        FileNotFoundError: for a folder that holds no edit.
        StoreMismatch: saying what differs.
    """
    (name, first), *others = ((name, model_of(folder)) for name, folder in folders.items())
    for other_name, other in others:
        if differences := first.differences(other):
            raise StoreMismatch(
                f"edits of one model are compared, and {name!r} was trained on {first.name}, {other_name!r} on "
                f"{other.name}: {'; '.join(differences)} (the first word of each is {name!r}'s)"
            )


def opened(folders: Mapping[str, Path], model: Bridge) -> tuple[SavedEdit, ...]:
    """The edits in these folders, on their model.

    Raises:
        StoreMismatch: where this is not the model that they were trained on.
    """
    edits = []
    for name, folder in folders.items():
        reft = load(folder, model)
        edits.append(SavedEdit(name, folder, reft, run_of(folder), reft.bind(model)))
    return tuple(edits)
