"""What a run leaves in its folder, so that a reader can score it again and a killed run goes on.

`config.json` says what was run, `predictions.jsonl` what was answered to each row, `metrics.json`, written last, what
it cost; the method itself lies in `method/`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from zipfile import ZipFile, is_zipfile

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
        """All that are there; the tasks of a run are written whole, one after the other."""
        path = self.path / PREDICTIONS_FILE
        return [_prediction(line, f"{path}, line {number}") for number, line in enumerate(lines_of(path), 1)]

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
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreMismatch(f"{path} is damaged ({error}): take its folder away, and run it again") from None


@contextmanager
def unpacked(folders: Iterable[str | Path]) -> Iterator[list[Path]]:
    """The folders; in place of a zip file of one, one with what is in it, for as long as the block lasts."""
    with ExitStack() as stack:
        paths = []
        for path in map(located, folders):
            paths.append(Path(stack.enter_context(TemporaryDirectory())) if is_zipfile(path) else path)
            if paths[-1] != path:
                stack.enter_context(ZipFile(path)).extractall(paths[-1])
        yield paths


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


def _prediction(line: str, place: str) -> Prediction:
    try:
        return Prediction(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise StoreMismatch(
            f"{place} is no prediction ({error}): take the file away, and the run is scored again"
        ) from None
