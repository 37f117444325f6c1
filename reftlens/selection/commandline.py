"""`reftlens search FILE`: what the command line takes."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reftlens.selection.searching import SEARCH


def add_search(commands: Any, run: Callable[[argparse.Namespace], int]) -> None:
    """Add `search` to the commands."""
    look = commands.add_parser("search", help="find where to edit and how strongly, and save the edit")
    look.add_argument("data", type=Path, metavar="FILE", help="JSONL with prompt and completion; split 60/20/20")
    look.add_argument("--out", type=Path, default=Path("runs/search"), help="folder to write to (default: runs/search)")
    look.add_argument("--chat", action="store_true", help="the prompts of FILE go into the chat template")
    look.add_argument(
        "--among", nargs="+", metavar="ANSWER", help="answers of one token each, which alone are scored among"
    )
    look.add_argument("--metric", choices=("loss", "accuracy"), default="loss", help="to choose by (default: loss)")
    look.add_argument("--kl", type=float, metavar="NATS", help="budget of KL from the unedited model, per token")
    look.add_argument("--budget", type=int, metavar="STEPS", help="optimizer steps of single candidates, in all")
    look.add_argument("--steps", type=int, default=SEARCH.steps, help="of a whole training (default: 60)")
    look.add_argument("--seed", type=int, default=0, help="of the split, initialisation and data order (default: 0)")
    look.add_argument("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    look.add_argument("--quiet", action="store_true", help="no progress bars")
    look.set_defaults(run=run)


def script_of(options: argparse.Namespace, reading: dict[str, Any], code: str) -> str:
    """What trains the recommended edit anew, with the model and the data that it was found with."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in reading.items())
    lines = [
        f"model = rl.load_model({options.model!r})",
        f"data = rl.encode(model, rl.load_examples({str(options.data.resolve())!r}), {arguments})",
    ]
    return code.replace("import reftlens as rl\n", "\n".join(["import reftlens as rl", "", *lines, ""]), 1) + "\n"
