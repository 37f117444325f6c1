"""The part of docs/performance.md on real text, of what `step_time.py` measured."""

from collections.abc import Sequence
from statistics import median

from shapes import TEXTS, WHOLE

HEAD = """

## Training on real text: CPU seconds of one step on each of up to five fixed batches

Medians of interleaved rounds, in which the contenders take turns at every batch; ratios are medians of the ratios of
each round. *Rounds* are those of reftlens and of pyreft. All contenders have the same parameters, and their losses
agree at every step (the learning rate is 1e-12). pyreft has its own padding and collator and runs in micro-batches of
up to 2048 tokens, as wide as the whole batch: in one pass it needs up to 30 GB. The *floor* is written by hand for the
shape (`benchmarks/text_floor.py`): the cone alone, rows in groups of similar length, beginnings computed once, the last
block at the targets only. *Padding* is the tokens of the padded batches over their own. (f): commonsense mix of six
tasks in the paper's template; (h1), (h2): SST-2 after eight examples; (i): UltraFeedback in the Alpaca
template.{before}

"""
BEFORE = " *Before* is reftlens at an earlier commit, measured in the same rounds."
ONCE = """

(i), whose batch of pyreft takes eight minutes, once, on one batch of 16, at a load of 5 to 7 (`python
benchmarks/step_time.py --shapes i --batches 1 --repeats 1 --peer-repeats 1 --before CHECKOUT`): pyreft 486.7, floor
63.9, before 89.2, reftlens 60.5 CPU seconds; 8.0 of pyreft, 1.47 of before, 0.95 of the floor."""
COLUMNS = ("shape", "batches", "rounds", "padding", "pyreft LoReFT", "floor", "before", "**reftlens**")
RATIOS = ("LoReFT / reftlens", "before / reftlens", "reftlens / floor", "counted")


def head(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table of numbers, whose first column holds words."""
    return [f"| {' | '.join(columns)} |", "|---" + "|--:" * (len(columns) - 1) + "|"]


def section(results: dict) -> str:
    shapes = [shape for shape in TEXTS if shape in results]
    if not shapes:
        return ""
    before = BEFORE if any("before" in results[s]["cpu"] for s in shapes) else ""
    text = HEAD.format(before=before)
    columns = (*COLUMNS, *RATIOS)
    rows = [*head(columns), *(line(shape, results[shape]) for shape in shapes)]
    return text + "\n".join(rows) + whole(results) + ("" if "i" in results else ONCE) + memory(results, shapes)


def line(shape: str, result: dict) -> str:
    lengths = [[length for length, _ in batch] for batch in result["rows"]]
    padding = sum(len(b) * max(b) for b in lengths) / sum(map(sum, lengths))
    cells = [
        f"({shape}) {TEXTS[shape]['what']}",
        str(len(lengths)),
        " / ".join(str(len(result["cpu"].get(name, ()))) for name in ("reftlens", "pyreft-loreft")),
        f"{padding:.2f}",
        *(seconds(result, name) for name in ("pyreft-loreft", "floor", "before")),
        f"**{seconds(result, 'reftlens')}**",
        f"**{ratio(result, 'pyreft-loreft', 'reftlens')}**",
        ratio(result, "before", "reftlens"),
        ratio(result, "reftlens", "floor"),
        f"{result['counted']['SmolLM2-135M']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def seconds(result: dict, name: str) -> str:
    return f"{median(result['cpu'][name]):.2f}" if name in result["cpu"] else ""


def ratio(result: dict, name: str, other: str) -> str:
    """The median over rounds."""
    if name not in result["cpu"]:
        return ""
    return f"{median(a / b for a, b in zip(result['cpu'][name], result['cpu'][other], strict=False)):.2f}"


def whole(results: dict) -> str:
    """Capture, check and the first steps as one figure."""
    if "h2" not in results:
        return ""
    cpu = results["h2"]["cpu"]
    turns = WHOLE // len(results["h2"]["rows"])
    pairs = list(zip(cpu["pyreft-loreft"], cpu["reftlens-whole"], strict=False))
    text = (
        f"\n\n(h2) from the call of `fit` in a fresh process, capture, check and {WHOLE} steps: "
        f"{median(cpu['reftlens-whole']):.1f} CPU seconds; pyreft's {WHOLE} steps "
        f"{median(turns * theirs for theirs, _ in pairs):.0f} ({turns} times its five measured steps), "
        f"**{median(turns * theirs / ours for theirs, ours in pairs):.0f}** times as much."
    )
    if "before-whole" in cpu:
        text += f" Before: {median(cpu['before-whole']):.1f}."
    return text


def memory(results: dict, shapes: list[str]) -> str:
    """Peak memory, model loaded."""
    grown = {shape: results[shape]["growth"] for shape in shapes}
    each = (
        f"({shape}) " + ", ".join(f"{name} {size / 1e6:.0f}" for name, size in sizes.items())
        for shape, sizes in grown.items()
    )
    return "\n\nPeak memory in MB, growth over the process with its model loaded: " + "; ".join(each) + "."


def load(results: dict) -> str:
    """The range of the machine's load averages, one thread of it our own."""
    loads = [value for result in results.values() for value in result.get("load", ())]
    return f"{min(loads):.1f} to {max(loads):.1f}, one of it our own" if loads else "not noted"
