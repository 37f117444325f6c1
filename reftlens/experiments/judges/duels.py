"""The texts of two finished runs compared by a judge; its replies are stored, and nothing is asked twice."""

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from tqdm.auto import tqdm

from reftlens.errors import StoreMismatch
from reftlens.experiments.judges.judging import PAIRWISE, Duel, Judge, WinRate, filled, rate_of, reply_to
from reftlens.experiments.runs.records import RunFolder, finished_runs
from reftlens.files import destination, located, write_atomically
from reftlens.numbers import whole

Key = tuple[str, int, bool]
"""Task, number of the row, and whether the second run's text is answer A."""


@dataclass(frozen=True)
class Pair:
    """What two runs wrote to one instruction."""

    task: str
    index: int
    """Number of the row in the data set."""
    instruction: str
    texts: tuple[str, str]

    def questions(self) -> dict[Key, str]:
        """What a judge is asked, in both orders."""
        first, second = self.texts
        return {
            (self.task, self.index, swapped): filled(PAIRWISE, {"instruction": self.instruction, "a": a, "b": b})
            for swapped, a, b in ((False, first, second), (True, second, first))
        }


def finished_run(folder: str | Path) -> RunFolder:
    """The one finished run in a folder or below it.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where there are several.
    """
    runs = finished_runs([located(folder)])
    if len(runs) > 1:
        raise ValueError(f"{folder} holds {len(runs)} finished runs, expected one: {runs[0].path}, for example")
    return runs[0]


def pairs_of(ours: RunFolder, theirs: RunFolder) -> tuple[list[Pair], int]:
    """The texts of two runs by row, and how many rows have no text in one of them, as they did not fit.

    Raises:
        ValueError: for a run without texts and their instructions, or runs of other rows.
    """
    first, second = _texts(ours), _texts(theirs)
    if other := sorted(first.keys() ^ second.keys()):
        (task, index), where = other[0], (theirs if other[0] in first else ours).path
        raise ValueError(
            f"{ours.path} answered {len(first)} rows and {theirs.path} {len(second)}, row {index} of {task} is not in "
            f"{where}: expected the same rows, of runs with the same data and limit"
        )
    pairs = []
    for key in first:
        (asked, a), (again, b) = first[key], second[key]
        if a is None or b is None:
            continue
        if asked != again:
            raise ValueError(
                f"row {key[1]} of {key[0]} is {asked[:60]!r} in {ours.path}, and {again[:60]!r} in {theirs.path}: "
                "expected runs on the same data"
            )
        pairs.append(Pair(*key, asked, (a, b)))
    return pairs, len(first) - len(pairs)


def judged(
    judge: Judge,
    name: str,
    pairs: Sequence[Pair],
    file: str | Path,
    *,
    limit: int | None = None,
    workers: int = 1,
    progress: bool = True,
) -> WinRate:
    """How often the first texts win over the second, each pair in both orders.

    Every reply is a line of the file as soon as it is there. What is there is not asked again: a comparison that was
    killed goes on.

    Args:
        name: of the judge and its settings: replies of another one in the file are refused.
        limit: so many pairs, the first ones.
        workers: questions that are asked at a time.

    Raises:
        ValueError: where there is no pair, or no reply at all could be read.
        StoreMismatch: where the file holds the replies of another judge, or replies about other texts.
    """
    some = pairs[: None if limit is None else whole(limit, "limit", 1)]
    if not some:
        raise ValueError("no pair of texts to compare: in each one of the two is missing")
    stored = _stored(destination(file), name, {k: q for pair in pairs for k, q in pair.questions().items()})
    missing = [(pair, k, q) for pair in some for k, q in pair.questions().items() if k not in stored]
    lock = Lock()

    def ask(one: tuple[Pair, Key, str]) -> None:
        pair, key, question = one
        reply = reply_to(judge, question)
        # Half a character, where a reply was cut, is no UTF-8; backslashreplace writes it as JSON does.
        with lock, located(file).open("a", encoding="utf-8", errors="backslashreplace") as lines:
            told = dict(zip(_KEY, key, strict=True)) | {"instruction": pair.instruction, "judge": name}
            lines.write(json.dumps(told | {"question": question, "reply": reply}, ensure_ascii=False) + "\n")

    with ThreadPoolExecutor(whole(workers, "workers", 1)) as pool:
        asked = pool.map(ask, missing) if workers > 1 else map(ask, missing)
        list(tqdm(asked, total=len(missing), desc="judge", unit="reply", disable=not progress))
    wanted = {(pair.task, pair.index) for pair in some}
    return rate_of(_duels(told for told in _lines(located(file)) if (told["task"], told["index"]) in wanted))


_KEY = ("task", "index", "swapped")
_BEGINNING = b'{"task": '
"""Of each line of a file of replies."""


def duels_in(file: str | Path) -> list[Duel]:
    """What a judge replied to each pair that it saw in both orders: `rate_of` makes the win rate of it."""
    return _duels(_lines(located(file)))


def _duels(lines: Iterable[Mapping[str, Any]]) -> list[Duel]:
    found: dict[tuple[str, int], dict[bool, Mapping[str, Any]]] = {}
    for told in lines:
        found.setdefault((told["task"], told["index"]), {})[told["swapped"]] = told
    both = [replies for _, replies in sorted(found.items()) if len(replies) == 2]
    return [Duel(each[False]["instruction"], (each[False]["reply"], each[True]["reply"])) for each in both]


def _stored(file: Path, name: str, questions: Mapping[Key, str]) -> set[Key]:
    """What was replied to already; a line that a kill cut off is taken away."""
    if not file.is_file():
        return set()
    stored = set[Key]()
    for told in _lines(file):
        key = told["task"], told["index"], told["swapped"]
        if told["judge"] != name:
            raise StoreMismatch(f"{file} holds replies of {told['judge']}, not of {name}: choose another file")
        if questions.get(key) != told["question"]:
            raise StoreMismatch(
                f"{file} holds a reply about other texts to row {key[1]} of {key[0]}: choose another file"
            )
        stored.add(key)
    _cut(file)
    return stored


def _cut(file: Path) -> None:
    """Take the beginning of a reply away in which a file ends; `StoreMismatch` where that is none."""
    content = file.read_bytes()
    whole_lines = content[: content.rfind(b"\n") + 1]
    if last := content[len(whole_lines) :]:
        if not (last.startswith(_BEGINNING) or _BEGINNING.startswith(last)):
            raise StoreMismatch(f"{file} ends in {last[:60]!r}, which is no reply of a judge: choose another file")
        write_atomically(file, whole_lines)


def _lines(file: Path) -> list[dict[str, Any]]:
    """The replies in a file, of which the last may be cut off."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            told = json.loads(line)
            found.append({name: told[name] for name in (*_KEY, "instruction", "judge", "question", "reply")})
        except (ValueError, TypeError, KeyError) as error:
            raise StoreMismatch(f"{file}, line {number} is no reply of a judge ({error!r}): take it away") from None
    return found


def _texts(run: RunFolder) -> dict[tuple[str, int], tuple[str, str | None]]:
    """By row the instruction and the text; none for one that did not fit."""
    rows = [p for p in run.predictions() if not p.given and not p.measures]
    if not any("text" in p.details for p in rows):
        config = run.config()
        raise ValueError(
            f"{run.path} holds no texts that a judge could compare: it is a run of {config.get('recipe')}, expected "
            "one of a recipe whose answers have no rule that scores them, such as instruct"
        )
    if any("instruction" not in p.details for p in rows if "text" in p.details):
        raise ValueError(
            f"{run.path} holds texts without their instructions: take its predictions.jsonl and metrics.json away and "
            "run it again, what was trained stays"
        )
    return {(p.task, p.index): (p.details.get("instruction", ""), p.details.get("text")) for p in rows}
