"""`reftlens judge RUN_A RUN_B`: what the command line takes, and what is said of it."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reftlens.experiments.judges.duels import finished_run, judged, pairs_of
from reftlens.experiments.judges.judging import Endpoint
from reftlens.experiments.runs.records import RunFolder

_NO_KEY = "none"
"""What stands for a key where none is named: servers of one's own take any, and no other key goes to them."""


def add_judge(commands: Any, run: Callable[[argparse.Namespace], int]) -> None:
    """Add `judge` to the commands."""
    command = commands.add_parser("judge", help="compare the texts of two finished runs of `run instruct` by a judge")
    command.add_argument("ours", type=Path, metavar="RUN_A", help="folder of a run, whose wins are counted")
    command.add_argument("theirs", type=Path, metavar="RUN_B", help="folder of a run on the same rows")
    where = "OpenAI-compatible endpoint, such as http://localhost:8000/v1"
    command.add_argument("--endpoint", required=True, metavar="URL", help=where)
    command.add_argument("--model", required=True, metavar="NAME", help="name of the judge there")
    command.add_argument("--key-env", metavar="VAR", help="variable that holds the key (default: no key is sent)")
    command.add_argument("--limit", type=int, metavar="N", help="pairs to compare (default: all)")
    command.add_argument("--workers", type=int, default=1, metavar="N", help="questions asked at a time (default: 1)")
    words = "where replies are stored; what is there is not asked again (default: runs/judged.jsonl)"
    command.add_argument("--out", type=Path, default=Path("runs/judged.jsonl"), metavar="FILE", help=words)
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    command.set_defaults(run=run)


def verdict(options: argparse.Namespace) -> str:
    """Ask the judge what it was not asked yet; what is to be said of it."""
    judge = Endpoint(options.model, options.endpoint, _key(options.key_env))
    ours, theirs = finished_run(options.ours), finished_run(options.theirs)
    pairs, left_out = pairs_of(ours, theirs)
    name = f"{judge.model}, temperature {judge.temperature:g}, at most {judge.max_tokens} tokens"
    asking: dict[str, Any] = {"limit": options.limit, "workers": options.workers, "progress": not options.quiet}
    rate = judged(judge, name, pairs, options.out, **asking)
    left = [f"left out, without a text of both: {left_out}"] if left_out else []
    heading = f"{_named(ours)} against {_named(theirs)}, judged by {name}"
    return "\n".join([heading, str(rate), *left, "", f"replies   {options.out}"])


def _key(variable: str | None) -> str:
    if variable is None:
        return _NO_KEY
    if not (key := os.environ.get(variable)):
        raise ValueError(f"--key-env {variable}: there is no such variable, or nothing in it, expected the key")
    return key


def _named(run: RunFolder) -> str:
    config = run.config()
    return f"{config['method']} (seed {config['seed']})"
