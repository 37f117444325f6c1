"""`reftlens report DIR`: what the command line takes."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_report(commands: Any, run: Callable[[argparse.Namespace], int]) -> None:
    """Add `report` to the commands."""
    about = commands.add_parser("report", help="write one HTML file about a saved intervention")
    about.add_argument("folder", type=Path, metavar="DIR", help="what `save` or `demo` wrote")
    about.add_argument("--model", help="folder or hub id (default: the one it was trained on)")
    about.add_argument("--out", type=Path, metavar="FILE", help="where to write (default: DIR/report.html)")
    trained_on = "what it was trained on, JSONL with prompt and completion (default: the demo's examples)"
    about.add_argument("--data", type=Path, metavar="FILE", help=trained_on)
    about.add_argument("--chat", action="store_true", help="the prompts of FILE go into the chat template")
    about.add_argument("--prompts", nargs="+", metavar="TEXT", help="what texts are written from")
    about.add_argument("--seed", type=int, default=0, help="of resampling tests (default: 0)")
    about.add_argument("--quiet", action="store_true", help="no progress bars")
    about.set_defaults(run=run)
