"""Step times of reftlens beside pyreft and beside the floor, interleaved in one run; writes docs/performance.*

    python benchmarks/step_time.py                    # everything: hours on two cores
    python benchmarks/step_time.py --shapes a d --repeats 5
    python benchmarks/step_time.py --shapes f h1 h2 i --before CHECKOUT
    python benchmarks/step_time.py --shapes a d --before CHECKOUT --only before reftlens   # writes nothing

Every contender runs in a process of its own that waits for its turn: one optimizer step each, round after round, so
that a slow moment of the machine meets all of them. On real text a round is five steps, one of each of five fixed
batches, and the contenders take turns at every batch; all have the same parameters there, and losses that differ end
the run. CPU seconds of one thread are compared (two busy threads on a shared machine time their waiting for each
other); wall seconds on two threads stand beside them. The peers get an environment of their own, built on the first
run. `--before` is another checkout of this project: its steps too, as one more contender.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import counted
from shapes import SHAPES, TEXTS
from texts import BATCHES, NEEDED, batches_of

HERE = Path(__file__).resolve().parent
TRAINING = ("pyreft-loreft", "pyreft-nodireft", "floor", "floor-reuse", "reftlens")
GENERATION = ("pyreft-loreft", "floor", "reftlens")
ON_TEXT = ("pyreft-loreft", "floor", "reftlens")
NEAR = 1e-3  # losses in float32, of a model with streams of very different sizes
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
    """A contender in its own process, which waits for its turn once it is ready."""

    def __init__(self, contender: str, shape: str, options: argparse.Namespace, *texts: str) -> None:
        python = options.peers if contender.startswith("pyreft") else sys.executable
        checkout = options.before if contender.startswith("before") else HERE.parent
        name = contender.replace("before", "reftlens")
        command = [python, HERE / "worker.py", name, shape, options.model, *texts]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        paths = [options.peers_path] if contender.startswith("pyreft") else [checkout, os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.errors else subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=HERE,
        )

    def ready(self) -> "Worker":
        self._answer("ready")
        return self

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
            if line.startswith("{") and key in (answer := json.loads(line)):
                return answer
        raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}; --errors shows why")


def measure(shape: str, contenders: list[str], options: argparse.Namespace) -> dict:
    workers = {name: Worker(name, shape, options).ready() for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    load = [os.getloadavg()[0]]
    for _ in range(options.repeats):
        for name, worker in workers.items():
            cpu[name].append(worker.step(1)["cpu"])
        load.append(os.getloadavg()[0])
    for _ in range(options.wall_repeats):
        for name, worker in workers.items():
            wall[name].append(worker.step(2)["wall"])
    growth = {name: worker.finish() for name, worker in workers.items()}
    return {"cpu": cpu, "wall": wall, "growth": growth, "load": load}


def measure_texts(shape: str, contenders: list[str], options: argparse.Namespace) -> dict:
    """Sums over the fixed batches; of `-whole`, capture, check and the first steps in a process of their own."""
    batches, load = batches_of(shape, options.data, options.model, options.batches), [os.getloadavg()[0]]
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, list[float]] = {}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(batches, file)
        file.flush()
        whole = [name for name in contenders if name.endswith("-whole")]
        workers = {name: Worker(name, shape, options, file.name).ready() for name in contenders if name not in whole}
        for turn in range(options.repeats):
            going = {n: w for n, w in workers.items() if turn < options.peer_repeats or not n.startswith("pyreft")}
            answers = [{name: worker.step(1) for name, worker in going.items()} for _ in batches]
            for name in going:
                cpu[name].append(sum(answer[name]["cpu"] for answer in answers))
                losses[name] = [answer[name]["loss"] for answer in answers]
            for name in whole:
                worker = Worker(name, shape, options, file.name).ready()
                cpu[name].append(worker.step(1)["cpu"])
                worker.finish()
            load.append(os.getloadavg()[0])
        growth = {name: worker.finish() for name, worker in workers.items()}
    check_losses(shape, losses)
    rows = [[(len(ids), prompt) for ids, prompt in batch] for batch in batches]
    bounds = {size.name: counted.text_ratio(size, shape, batches) for size in (counted.SMOL, counted.LLAMA)}
    return {"cpu": cpu, "growth": growth, "load": load, "losses": losses, "rows": rows, "counted": bounds}


def check_losses(shape: str, losses: dict[str, list[float]]) -> None:
    """All contenders have the same parameters, so the same losses."""
    ours = losses["reftlens"]
    for name, theirs in losses.items():
        far = max(abs(a - b) / b for a, b in zip(theirs, ours, strict=True))
        if far > NEAR:
            raise RuntimeError(f"({shape}) losses of {name}: {theirs}, of reftlens: {ours}")


def contenders_of(shape: str, options: argparse.Namespace) -> list[str]:
    names = list(TRAINING if shape in SHAPES else ON_TEXT if shape in TEXTS else GENERATION)
    names += ["before"] if options.before else []
    if shape == "h2":
        names += [f"{name}-whole" for name in ("reftlens", "before") if name in names]
    return [name for name in names if options.only is None or name.removesuffix("-whole") in options.only]


def show(shape: str, times: dict[str, list[float]]) -> None:
    """Medians, and the median over rounds of each contender's seconds over ours of the same round."""
    medians = "  ".join(f"{name} {statistics.median(seconds):.4f}" for name, seconds in times.items())
    ratios = {
        name: statistics.median(theirs / ours for theirs, ours in zip(seconds, times["reftlens"], strict=False))
        for name, seconds in times.items()
        if name != "reftlens" and not name.endswith("-whole")
    }
    line = "  ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
    print(f"({shape}) median CPU seconds: {medians}; over those of reftlens: {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES, *TEXTS, "g1", "g8"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer-repeats", type=int, default=10**6, help="rounds on real text that pyreft takes part in")
    parser.add_argument("--batches", type=int, default=BATCHES, help="how many of the fixed batches of real text")
    parser.add_argument("--wall-repeats", type=int, default=2)
    parser.add_argument("--peers", type=Path, help="python of the peers' environment (built where not given)")
    parser.add_argument("--peers-path", type=Path, help="a folder that is put before the packages of the peers")
    parser.add_argument("--before", type=Path, help="another checkout, as one more contender")
    parser.add_argument("--only", nargs="+", help="only these contenders; nothing is written")
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data", help="folder of real texts")
    parser.add_argument("--errors", action="store_true", help="show what the contenders write to stderr")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    options = parser.parse_args()

    from reftlens.bridge.pretrained import DEFAULT_MODEL, find_model

    options.model = find_model(DEFAULT_MODEL)
    options.before = options.before and options.before.resolve()
    if options.only is None or any(name.startswith("pyreft") for name in options.only):
        options.peers = options.peers or build_peers(HERE / ".peers")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "performance.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for shape in options.shapes:
        if shape in TEXTS and not (options.data / NEEDED[shape]).exists():
            print(f"({shape}) is left out: {options.data} has no {NEEDED[shape]}; --data names another folder")
            continue
        contenders = contenders_of(shape, options)
        results[shape] = (measure_texts if shape in TEXTS else measure)(shape, contenders, options)
        show(shape, results[shape]["cpu"])
        if options.only is None:
            path.write_text(json.dumps(results, indent=1) + "\n")
    if options.only is None:
        import performance_report

        performance_report.write(results, options.out)


if __name__ == "__main__":
    main()
