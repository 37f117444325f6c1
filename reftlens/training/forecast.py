"""`Forecast`: what a training run would compute and store, in numbers and in words."""

from dataclasses import dataclass

from reftlens import figures
from reftlens.cone.work import Work
from reftlens.figures import Axes, DataFrame
from reftlens.training.config import FitConfig

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


@dataclass(frozen=True)
class Forecast:
    """What a run of `fit` would compute and store; index `i` of the tuples is optimizer step `i`."""

    model: str
    """Which model, on which device."""
    computation: str
    """As `FitResult.computation` will say it; memory that rows take in it is an estimate."""
    config: FitConfig
    capture: Work
    """What is captured, for all steps together."""
    steps: tuple[Work, ...]
    """What each step computes."""
    full_steps: tuple[Work, ...]
    """What each step would compute without reuse."""
    stored: int
    """Bytes of what was captured, about."""
    tier: str
    """Where: "on the device", "in host memory", "on disk", or "nowhere, recomputed"."""

    @property
    def step(self) -> Work:
        """All steps in one; its memory is that of the largest."""
        return sum(self.steps, Work())

    @property
    def full_step(self) -> Work:
        return sum(self.full_steps, Work())

    @property
    def ratio(self) -> float:
        """Operations of the steps in full over those of the steps, capture left out: 1 without reuse."""
        return self.full_step.operations / self.step.operations

    @property
    def run_ratio(self) -> float:
        """The same of the whole run, capture included."""
        return self.full_step.operations / (self.step + self.capture).operations

    def to_frame(self) -> DataFrame:
        """Tokens without and with padding, FLOPs forward and backward, bytes (estimates): of capture, of all steps, and
        of all steps in full."""
        rows = {"capture": self.capture, "steps": self.step, "steps in full": self.full_step}
        columns = ("tokens", "padded", "forward", "backward", "memory")
        table = [{"what": name} | {c: getattr(work, c) for c in columns} for name, work in rows.items()]
        table[0]["memory"] = self.stored
        return figures.table(table, "what")

    def plot(self, ax: Axes | None = None) -> Axes:
        """TFLOP of the run as planned, capture, forward and backward one after the other, beside the run in full."""
        ax, begins = figures.axes(ax, width=6.4, height=1.8), [0.0, 0.0]
        runs = {"as planned": (self.capture, self.step), "in full": (Work(), self.full_step)}
        shares = {
            "capture": [capture.operations for capture, _ in runs.values()],
            "forward": [steps.forward for _, steps in runs.values()],
            "backward": [steps.backward for _, steps in runs.values()],
        }
        colours = (figures.GREY, figures.BLUE, figures.ORANGE)
        for (name, operations), colour in zip(shares.items(), colours, strict=True):
            widths = [n / 1e12 for n in operations]
            ax.barh(list(runs), widths, left=begins, color=colour, label=name)
            begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
        ax.invert_yaxis()
        ax.set_xlabel(f"TFLOP of {len(self.steps):,} steps")
        ax.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return ax

    def __repr__(self) -> str:
        steps, config = len(self.steps), self.config
        often = f"{config.accumulate} times " if config.accumulate > 1 else ""
        stored, peak, full_peak = (in_units(n, "B") for n in (self.stored, self.step.memory, self.full_step.memory))
        lines = [
            f"{steps:,} steps of up to {often}{config.batch_size} rows through {self.model}",
            self.computation,
            "",
            f"{'':22}{'tokens':>12}{'with padding':>14}{'forward':>14}{'backward':>14}  memory, about",
            _line("capture, in all", self.capture, 1, f"{stored} {self.tier}" if self.stored else ""),
            _line("a step, on average", self.step, steps, f"{peak} at its peak, weights apart"),
            _line("a step in full", self.full_step, steps, f"{full_peak} at its peak"),
            "",
            f"In full a step takes {self.ratio:.3g} times the operations, and the run {self.run_ratio:.3g} times.",
        ]
        return "\n".join(lines if self.steps != self.full_steps else [*lines[:4], lines[5]])


def _line(name: str, work: Work, parts: int, memory: str) -> str:
    tokens = "".join(f"{round(n / parts):>{width},}" for n, width in ((work.tokens, 12), (work.padded, 14)))
    flops = "".join(f"{in_units(n / parts, 'FLOP'):>14}" for n in (work.forward, work.backward))
    return f"{name:22}{tokens}{flops}  {memory}".rstrip()


def in_units(number: float, unit: str) -> str:
    """Three digits of it: 1.23 TFLOP."""
    if not number:
        return "-"
    scale, prefix = next(each for each in _PREFIXES if number >= each[0] or each[0] == 1)
    return f"{float(f'{number / scale:.3g}'):g} {prefix}{unit}"
