"""DAS beside pyvene and TransformerLens' `fit_das`, interleaved in one run; writes docs/performance_das.*

    python benchmarks/das.py                    # everything: an hour or two, most of it the peers' time and the map
    python benchmarks/das.py --map-layers 3 9 15 21 27      # of the map only so many, and the time of all from them
    python benchmarks/das.py --repeats 3 --no-map

A step: layer 15, last token, rank 4, 16 pairs of 64 + 64 tokens, one target token. A map: 30 layers x the last 5
positions, rank 4. Every contender runs in a process of its own that waits for its turn, round after round, so that a
slow moment of the machine meets all of them; CPU seconds of one thread are compared. The map is one call; it takes its
turn in the middle, and pyvene's sites theirs in the rounds before and after. Peers get the environment of
`step_time.py`, built on the first run.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import das_report
import das_shapes as shape
from step_time import HERE, Worker, build_peers

STEPS = ("pyvene", "fit_das", "reftlens")
MAPS = ("pyvene-map", "reftlens-map")


class Contender(Worker):
    """One of `das_worker.py`."""

    def __init__(self, name: str, peers: Path, model: Path, basis: Path, layers: list[int]) -> None:
        python = peers if name.startswith("pyvene") else sys.executable
        command = [str(part) for part in (python, HERE / "das_worker.py", name, model, basis, *layers)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=HERE,
        )
        self.loss = self._answer("ready")["loss"]

    def leave(self) -> None:
        self._say("quit")
        self.process.wait()


def write_basis(path: Path) -> None:
    """The basis that `fit_das` starts from with its seed 0; the others are given it."""
    import torch
    from transformer_lens.tools.analysis.interchange import LearnedSubspace

    torch.manual_seed(0)
    path.write_text(json.dumps(LearnedSubspace(576, shape.RANK).basis.tolist()), encoding="utf-8")


def same_loss(workers: dict[str, Contender]) -> dict[str, float]:
    """The first loss of each contender of the step, which must be one."""
    losses = {name: workers[name].loss for name in STEPS}
    if max(losses.values()) - min(losses.values()) > 1e-4 * min(losses.values()):
        raise RuntimeError(f"the contenders do not compute the same: first losses {losses}")
    return losses


def turns(name: str, repeats: int) -> set[int]:
    """The rounds that a contender takes part in."""
    middle = repeats // 2
    around = {"pyvene-map": {middle - 1, middle + 1} & set(range(repeats)), "reftlens-map": {middle}}
    return around.get(name) or set(range(repeats))


def measure(workers: dict[str, Contender], repeats: int) -> dict:
    """`{contender: [answer of each of its rounds]}`."""
    found: dict[str, list] = {name: [] for name in workers}
    for turn in range(repeats):
        for name, worker in workers.items():
            if turn in turns(name, repeats):
                found[name].append(worker.step(1))
                print(f"round {turn + 1}: {name} {found[name][-1]['cpu']:.2f} CPU seconds", flush=True)
    return found


def _said(arguments: list[str]) -> list[str]:
    """The arguments that change what is measured: none with a path."""
    paths = {i + n for i, word in enumerate(arguments) if word in ("--peers", "--out") for n in (0, 1)}
    return [word for i, word in enumerate(arguments) if i not in paths]


def setting() -> dict:
    import torch

    names = ("torch", "transformers", "transformer-lens")
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": 1,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names} | {"torch": torch.__version__},
        "command": " ".join(["python", "benchmarks/das.py", *_said(sys.argv[1:])]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-map", action="store_true", help="steps only; a map measured before stays in the page")
    parser.add_argument("--map-layers", type=int, nargs="+", default=[*shape.MAP_LAYERS])
    parser.add_argument("--peers", type=Path, help="python of the peers' environment (built where not given)")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    options = parser.parse_args()
    peers = options.peers or build_peers(HERE / ".peers")

    from reftlens.bridge.pretrained import DEFAULT_MODEL, find_model

    path = options.out / "performance_das.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        basis = Path(scratch) / "basis.json"
        write_basis(basis)
        names = STEPS if options.no_map else STEPS + MAPS
        model = find_model(DEFAULT_MODEL)
        workers = {name: Contender(name, peers, model, basis, options.map_layers) for name in names}
        results |= {"setting": setting(), "losses": same_loss(workers)}
        results |= measure(workers, options.repeats)
        if not options.no_map:
            results["map_layers"] = options.map_layers
        for worker in workers.values():
            worker.leave()
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    das_report.write(results, options.out)


if __name__ == "__main__":
    main()
