"""Runs the guides, or notebook 09, and computes their numbers again, with transformers' own forward hooks alone.

What was trained there (vectors, frames, masks) is taken as it is; tokens, positions, sources, edits and scores are made
anew from the texts, without reftlens and one row at a time. Exits with 1 where a number differs.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from guide_numbers import Checks, Number
from notebook_numbers import NotebookChecks
from plain_rows import PlainRows

ROOT = Path(__file__).parent.parent
DOCS, NOTEBOOK = ROOT / "docs", ROOT / "notebooks" / "09_your_own.ipynb"
NAMES = ("train", "das", "strength", "positions", "subspaces", "your_own", "large_models", "outside", "moving")
PAGES = {"start": DOCS / "index.md"} | {name: DOCS / "guide" / f"{name}.md" for name in NAMES}
"""In the order in which they run; `outside` loads what `train` saves."""
CHECKED = {
    ("train", "Chats of several turns"): Checks.of_chats,
    ("das", "From a table, with a map and controls"): Checks.of_exchanges,
    ("das", "Heads, keys and neurons"): Checks.of_heads_and_neurons,
    ("das", "A report of a DAS"): Checks.of_report,
    ("strength", "Sentiment at equal KL"): Checks.of_equal_kl,
    ("strength", "A dose study over three seeds"): Checks.of_doses,
    ("your_own", "A gate"): Checks.of_preferences,
    ("outside", "Without reftlens"): Checks.of_outside,
}
"""The sections whose numbers are computed twice, from what all blocks up to their end have left."""


def sections(page: str) -> dict[str, list[str]]:
    """The blocks of each section of a page, by its title; what stands before the first, by the page's own."""
    parts = re.split(r"^##? ", PAGES[page].read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {part.splitlines()[0]: re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL) for part in parts}


def check(page: str, *, numbers: bool = True, write: bool = False) -> bool:
    """Run the blocks of a page in a session of its own, print each number beside its second; whether all agree."""
    names: dict[str, Any] = {}
    agree, printed = True, []
    for title, blocks in sections(page).items():
        print(f"\n## {page}: {title}", flush=True)
        for block in blocks:
            with redirect_stdout(StringIO()) as out:
                exec(compile(block, str(PAGES[page]), "exec"), names)
            printed.append("".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines()))
            print(printed[-1], end="", flush=True)
        if numbers and (made := CHECKED.get((page, title))):
            agree &= compared(made(Checks(names, PlainRows(names["model"].original_model.config.name_or_path))))
    if write:
        PAGES[page].write_text(with_outputs(PAGES[page].read_text(encoding="utf-8"), iter(printed)), encoding="utf-8")
    return agree


def with_outputs(text: str, printed: Iterator[str]) -> str:
    """A page in which the text that stands right below a block is what that block printed."""

    def filled(found: re.Match[str]) -> str:
        output = next(printed)
        return found[1] + (f"\n\n```text\n{output}```" if found[2] else "")

    return re.sub(r"(```python\n.*?```)(\n\n```text\n.*?```)?", filled, text, flags=re.DOTALL)


def check_notebook() -> bool:
    """Run the cells of the notebook as it is committed, and print its numbers likewise."""
    import matplotlib.pyplot as plt

    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    plt.close("all")
    return compared(NotebookChecks(names, PlainRows(names["model"].original_model.config.name_or_path)).numbers())


def compared(numbers: Iterator[Number]) -> bool:
    """Print each number beside its second computation; whether all agree."""
    print(f"{'':60} {'reftlens':>10} {'plain':>10}")
    agree = True
    for found in numbers:
        agree &= found.agrees
        wrong = "" if found.agrees else "  DIFFERS"
        print(f"{found.name:60} {found.reftlens:10.4f} {found.plain:10.4f}{wrong}", flush=True)
    return agree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", choices=PAGES, nargs="+", default=list(PAGES), help="which (default: all)")
    parser.add_argument("--notebook", action="store_true", help="notebook 09 in place of the guides")
    parser.add_argument("--write", action="store_true", help="put what blocks print below them")
    args, begin = parser.parse_args(), time.process_time()
    agree = check_notebook() if args.notebook else all([check(page, write=args.write) for page in args.pages])
    print(
        f"\n{'all numbers agree' if agree else 'some numbers differ'}; {time.process_time() - begin:.0f} s of CPU time"
    )
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
