"""Step times of reftlens beside pyreft and beside the floor, interleaved in one run; writes docs/performance.*

    python benchmarks/step_time.py                    # everything: about an hour on two cores
    python benchmarks/step_time.py --shapes a d --repeats 5
    python benchmarks/step_time.py --shapes a d --before CHECKOUT   # beside another checkout; writes nothing

Every contender runs in a process of its own that waits for its turn: one optimizer step each, round after round, so
that a slow moment of the machine meets all of them. CPU seconds of one thread are compared (two busy threads on a
shared machine time their waiting for each other); wall seconds on two threads stand beside them. The peers get an
environment of their own, built on the first run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from shapes import SHAPES

HERE = Path(__file__).parent
TRAINING = ("pyreft-loreft", "pyreft-nodireft", "floor", "floor-reuse", "reftlens")
GENERATION = ("pyreft-loreft", "floor", "reftlens")
PEERS = (
    ["torch==2.13.0", "transformers==4.57.6", "datasets", "matplotlib", "accelerate", "protobuf", "sentencepiece"],
    ["--no-deps", "pyreft==0.1.0", "pyvene==0.1.8"],
)


def build_peers(folder: Path) -> Path:
    """An environment with pyreft and pyvene; their own pins cannot be met together, so they come without them."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for packages in PEERS:
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


class Worker:
    """A contender in its own process, ready for its turn."""

    def __init__(self, contender: str, shape: str, options: argparse.Namespace) -> None:
        python = options.peers if contender.startswith("pyreft") else sys.executable
        checkout = options.before if contender == "before" else HERE.parent
        name = "reftlens" if contender == "before" else contender
        command = [python, checkout / "benchmarks" / "worker.py", name, shape, options.model]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = str(checkout)
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=checkout / "benchmarks",
        )
        self._answer("ready")

    def step(self, threads: int) -> dict[str, float]:
        self._say(f"step {threads}")
        return self._answer("cpu")

    def finish(self) -> int:
        """End the process; how much memory it grew by at most, model loaded, in bytes."""
        self._say("quit")
        growth = self._answer("growth")["growth"]
        self.process.wait()
        return growth

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _answer(self, key: str) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{") and key in (found := json.loads(line)):
                return found
        raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}")


def measure(shape: str, contenders: tuple[str, ...], options: argparse.Namespace) -> dict:
    workers = {name: Worker(name, shape, options) for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.repeats):
        for name, worker in workers.items():
            cpu[name].append(worker.step(1)["cpu"])
    for _ in range(options.wall_repeats):
        for name, worker in workers.items():
            wall[name].append(worker.step(2)["wall"])
    return {"cpu": cpu, "wall": wall, "growth": {name: worker.finish() for name, worker in workers.items()}}


def compare(shape: str, options: argparse.Namespace) -> None:
    """Print the median over rounds of our CPU seconds over those of another checkout, each round on its own."""
    times = measure(shape, ("before", "reftlens"), options)["cpu"]
    ratios = [now / before for before, now in zip(times["before"], times["reftlens"], strict=True)]
    medians = "  ".join(f"{name} {statistics.median(seconds):.4f}" for name, seconds in times.items())
    print(f"({shape}) median CPU seconds: {medians}; after / before {statistics.median(ratios):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES, "g1", "g8"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--wall-repeats", type=int, default=2)
    parser.add_argument("--peers", type=Path, help="python of the peers' environment (built where not given)")
    parser.add_argument("--before", type=Path, help="another checkout: only its steps and ours, nothing is written")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    options = parser.parse_args()

    from reftlens.bridge.pretrained import DEFAULT_MODEL, find_model

    options.model = find_model(DEFAULT_MODEL)
    if options.before:
        options.before = options.before.resolve()
        for shape in options.shapes:
            compare(shape, options)
        return
    options.peers = options.peers or build_peers(HERE / ".peers")
    path = options.out / "performance.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for shape in options.shapes:
        results[shape] = measure(shape, TRAINING if shape in SHAPES else GENERATION, options)
        path.write_text(json.dumps(results, indent=1) + "\n")
        medians = {name: statistics.median(times) for name, times in results[shape]["cpu"].items()}
        line = "  ".join(f"{name} {seconds:.3f}" for name, seconds in medians.items())
        ratio = medians["pyreft-loreft"] / medians["reftlens"]
        print(f"({shape}) median CPU seconds: {line}; pyreft / reftlens {ratio:.2f}", flush=True)

    import performance_report

    performance_report.write(results, options.out)


if __name__ == "__main__":
    main()
