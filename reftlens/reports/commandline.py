"""`reftlens report DIR`, or of several to compare: what the command line takes."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_report(commands: Any, run: Callable[[argparse.Namespace], int]) -> None:
    """Add `report` to the commands."""
    about = commands.add_parser("report", help="write one HTML file about a saved intervention, or compare several")
    wrote = "what `save` or `demo` wrote; several are compared"
    about.add_argument("folders", type=Path, metavar="DIR", nargs="+", help=wrote)
    about.add_argument("--model", help="folder or hub id (default: the one it was trained on)")
    out = "where to write (default: report.html, or comparison.html, in the first DIR)"
    about.add_argument("--out", type=Path, metavar="FILE", help=out)
    measured = "what it was trained on, JSONL with prompt and completion (default: the demo's examples); of several, "
    measured += "what their effects are measured on"
    about.add_argument("--data", type=Path, metavar="FILE", help=measured)
    words = "prompts go into the chat template, as they do where one edit is reported that was trained on chats"
    about.add_argument("--chat", action="store_true", help=words)
    about.add_argument("--prompts", nargs="+", metavar="TEXT", help="what texts are written from")
    seeded = "of resampling tests, of which a comparison has none (default: 0)"
    about.add_argument("--seed", type=int, default=0, help=seeded)
    about.add_argument("--quiet", action="store_true", help="no progress bars")
    about.set_defaults(run=run)
