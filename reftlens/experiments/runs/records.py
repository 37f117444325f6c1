"""What a run leaves in its folder, so that a reader can score it again and a killed run goes on.

`config.json` says what was run, `predictions.jsonl` what was answered to each row, `metrics.json`, written last, what
it cost; the method itself lies in `method/`.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from zipfile import BadZipFile, ZipFile, is_zipfile

from reftlens.errors import StoreMismatch
from reftlens.experiments.runs.alike import differences, plain
from reftlens.files import located, write_atomically

T = TypeVar("T")
CONFIG_FILE, PREDICTIONS_FILE, METRICS_FILE, METHOD_FOLDER = (
    "config.json",
    "predictions.jsonl",
    "metrics.json",
    "method",
)


@dataclass(frozen=True)
class Prediction:
    """What was answered to one row."""

    task: str
    index: int
    """Number of the row in the data set."""
    answer: str
    """The right one."""
    given: Mapping[str, str | None]
    """The answer by each way of answering, such as "written" or "likelihood"; None where a text holds none."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """Numbers of this row whose mean is reported."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What a reader needs to score again: the text, log-probabilities in nats, outputs of a head."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one method and seed."""

    path: Path

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write down what is run here.

        Raises:
            StoreMismatch: where something else was; naming what differs.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        wanted, stored = plain(config), self.config()
        if stored and (odd := differences(stored, wanted)):
            raise StoreMismatch(f"{self.path} holds another run ({odd}): choose another folder, or take this one away")
        if not stored and (left := sorted(p.name for p in self.path.iterdir() if p.name[0] != ".")):
            raise StoreMismatch(
                f"{self.path} has no {CONFIG_FILE}, so that nothing says what run its {', '.join(left)} are of: choose "
                "another folder, or take this one away"
            )
        self.write(CONFIG_FILE, wanted)

    def config(self) -> dict[str, Any]:
        return self.read(CONFIG_FILE)

    def metrics(self) -> dict[str, Any]:
        """What a finished run cost; empty for one that is not."""
        return self.read(METRICS_FILE)

    def predictions(self) -> list[Prediction]:
        """All that are there; the tasks of a run are written whole, one after the other.

        Raises:
            StoreMismatch: for a line that is none, rows that are there twice, or test rows of a task that are missing.
        """
        path = self.path / PREDICTIONS_FILE
        found = [_prediction(line, f"{path}, line {number}") for number, line in enumerate(lines_of(path), 1)]
        _check_rows(found, self.config(), path)
        return found

    def answered(self) -> list[Prediction]:
        """The predictions of a finished run; `StoreMismatch` where there are none."""
        if not (found := self.predictions()):
            path = self.path / PREDICTIONS_FILE
            raise StoreMismatch(
                f"{path} holds nothing, though the run is finished: run it again, and it is scored again"
            )
        return found

    def add(self, predictions: Iterable[Prediction]) -> None:
        """Put the predictions of a task behind those that are there."""
        every = [*self.predictions(), *predictions]
        lines = "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in every)
        write_atomically(self.path / PREDICTIONS_FILE, lines.encode())

    def finish(self, metrics: Mapping[str, Any]) -> None:
        self.write(METRICS_FILE, metrics)

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """A file of values, whole or not at all."""
        write_atomically(self.path / name, json.dumps(values, indent=1, ensure_ascii=False, default=str).encode())

    def read(self, name: str) -> dict[str, Any]:
        """What `write` wrote; nothing where it has not yet."""
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreMismatch(f"{path} is damaged ({error}): take its folder away, and run it again") from None
        if not isinstance(told, dict):
            raise StoreMismatch(f"{path} is damaged (no table, but {told!r}): take its folder away, and run it again")
        return told


@contextmanager
def unpacked(folders: Iterable[str | Path]) -> Iterator[list[Path]]:
    """The folders; in place of a zip file of one, one with what is in it, for as long as the block lasts."""
    with ExitStack() as stack:
        paths = []
        for path in map(located, folders):
            paths.append(path if path.is_dir() else _extracted(path, stack))
        yield paths


def _extracted(path: Path, stack: ExitStack) -> Path:
    """A folder with what is in a zip file, below its name, by which messages tell it from others."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such folder or zip file")
    if not is_zipfile(path):
        raise ValueError(
            f"{path} is neither a folder nor a whole zip file: expected the folder of a run, or a zip file of it"
        )
    folder = Path(stack.enter_context(TemporaryDirectory())) / path.name
    try:
        stack.enter_context(ZipFile(path)).extractall(folder)
    except (BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged zip file ({error}): make or fetch it again") from None
    return folder


def finished_runs(folders: Iterable[Path]) -> list[RunFolder]:
    """The finished runs in these folders and below them, in the order of their names.

    Raises:
        FileNotFoundError: where a folder holds none.
        StoreMismatch: where nothing says what a run is of.
    """
    runs: list[RunFolder] = []
    for folder in folders:
        found = [RunFolder(path.parent) for path in sorted(folder.rglob(METRICS_FILE))]
        if not found:
            raise FileNotFoundError(f"{folder} holds no {METRICS_FILE}: no finished run of an experiment is there")
        if bare := [run for run in found if not run.config()]:
            raise StoreMismatch(
                f"{bare[0].path} has no {CONFIG_FILE}, so that nothing says what run it is: take it away"
            )
        runs += found
    return runs


def add_seed(by_seed: dict[int, T], seed: int, found: T, run: RunFolder) -> None:
    """Put what a run holds among that of the method's other seeds.

    Raises:
        ValueError: where a run with this seed is there.
    """
    if by_seed.setdefault(seed, found) is not found:
        method = run.config()["method"]
        raise ValueError(f"{run.path} is a second run of {method} with seed {seed}: make a table of each folder")


def lines_of(path: Path) -> list[str]:
    """The lines of a file, none where there is no file; separators that Unicode has besides are part of a line."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="\n") as lines:
        return list(lines)


def _check_rows(predictions: Iterable[Prediction], config: Mapping[str, Any], path: Path) -> None:
    """Refuse a file that has lost rows, or has some twice. Of a held-out task, whose rows have no answers that are
    given, those that are too long were not measured."""
    answered: dict[tuple[str, bool], list[int]] = {}
    for p in predictions:
        answered.setdefault((p.task, bool(p.given)), []).append(p.index)
    test = config.get("test", {})
    for (task, given), rows in answered.items():
        asked = test.get(task, rows) if isinstance(test, Mapping) else test
        twice, missing = len(rows) - len(set(rows)), len({*asked} - {*rows}) if given else 0
        if twice or missing:
            words = f"{twice} rows of {task} twice" if twice else f"{missing} of {len(asked)} rows of {task} not"
            raise StoreMismatch(f"{path} has {words}: take the file away, and the run is scored again")


def _prediction(line: str, place: str) -> Prediction:
    try:
        return Prediction(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise StoreMismatch(
            f"{place} is no prediction ({error}): take the file away, and the run is scored again"
        ) from None
