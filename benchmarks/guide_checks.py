"""Runs the guide, or notebook 09, and computes its numbers a second time, with transformers' own forward hooks alone.

What was trained there (vectors, frames, masks) is taken as it is; tokens, positions, sources, edits and scores are made
anew from the texts, without reftlens and one row at a time. Exits with 1 where a number differs.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guide_numbers import Checks, Number
from notebook_numbers import NotebookChecks
from plain_rows import PlainRows

ROOT = Path(__file__).parent.parent
GUIDE, NOTEBOOK = ROOT / "docs" / "guide.md", ROOT / "notebooks" / "09_your_own.ipynb"


def sections() -> dict[str, list[str]]:
    """The blocks of each section of the guide, by its title; what stands before the first belongs to it."""
    parts = re.split(r"^## ", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    blocks = {part.splitlines()[0]: re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL) for part in parts}
    (_, setup), *rest = blocks.items()
    return {title: [*(setup if i == 0 else []), *own] for i, (title, own) in enumerate(rest)}


def check(wanted: list[int]) -> bool:
    """Run sections by their number, print each number beside its second computation; whether all agree."""
    names: dict[str, Any] = {}
    plain, agree = None, True
    for number, (title, blocks) in enumerate(sections().items(), start=1):
        print(f"\n## {title}", flush=True)
        for block in blocks:
            exec(compile(block, str(GUIDE), "exec"), names)
        plain = plain or PlainRows(names["model"].original_model.config.name_or_path)
        if number in wanted:
            agree &= compared(getattr(Checks(names, plain), f"section_{number}")())
    return agree


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
    parser.add_argument("--sections", type=int, nargs="+", default=list(range(1, 9)), help="whose numbers are checked")
    parser.add_argument("--notebook", action="store_true", help="notebook 09 in place of the guide")
    args, begin = parser.parse_args(), time.process_time()
    agree = check_notebook() if args.notebook else check(args.sections)
    print(
        f"\n{'all numbers agree' if agree else 'some numbers differ'}; {time.process_time() - begin:.0f} s of CPU time"
    )
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
