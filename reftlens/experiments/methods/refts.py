"""Methods that edit hidden states through a bridge: the ReFT family, a steering vector, and no edit at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site, resid_post
from reftlens.errors import check_one_of
from reftlens.experiments.methods.acting import Acting, OnBridge
from reftlens.experiments.methods.costs import measured, measures
from reftlens.experiments.methods.method import Method, Trained
from reftlens.experiments.methods.subjects import Subject
from reftlens.interventions import KINDS, RED, Intervention, SteeringVector
from reftlens.interventions.family import Init
from reftlens.numbers import whole
from reftlens.storage.folder import load
from reftlens.text.batch import Batch
from reftlens.text.positions import First, Positions, Response
from reftlens.text.positions.spelling import parse
from reftlens.training.config import FitConfig
from reftlens.training.fitting import fit
from reftlens.training.run import History, Step

FAMILY = ("LoReFT", "DiReFT", "OrthoDiReFT", "NoReFT", "ConsReFT", "LobiReFT", "RED", "SteeringVector")
"""Kinds that are trained on rows alone, without sources."""


@dataclass(frozen=True)
class OnHooks(Method):
    """A `ReFT` trained by `rl.fit`."""

    def edit(self, subject: Subject, seed: int) -> ReFT:
        """The untrained `ReFT`, its start drawn from `seed`."""
        raise NotImplementedError

    def size(self, subject: Subject) -> int:
        return self.edit(subject, 0).parameter_count(subject.bridge).stored

    def _fitted(self, subject: Subject, data: Batch, config: FitConfig, settings: Mapping[str, Any]) -> Trained:
        """What `rl.fit` does with `edit(subject, seed)`."""
        reft, steps = self.edit(subject, config.seed), list[Step]()
        with measured(subject.device) as cost:
            run = fit(reft, subject.bridge, data, config, on_step=steps.append, **settings)
        history = History(losses=list(run.losses), evaluations=list(run.validation), seconds=run.seconds)
        count = reft.parameter_count(subject.bridge).stored
        reft.eval()
        return Trained(
            self, subject, OnBridge(subject.bridge, reft), measures(subject, count, history, cost, len(steps))
        )

    def read(self, folder: Path, subject: Subject) -> Acting:
        return OnBridge(subject.bridge, load(folder / "reft", subject.bridge))


@dataclass(frozen=True)
class Reft(OnHooks):
    """An intervention of the ReFT family on the residual stream after blocks.

    Args:
        kind: one of `FAMILY`, by its name.
        positions: of the prompt, as `Site` reads them; "f7+l7" are its first and last seven tokens.
        layers: numbers of blocks, or "all".
        response: how many of the tokens that follow the prompt are edited too, in training and writing, or "all".
        tied: one intervention for all positions of a layer; else one each for the parts of "f7+l7", with twice the
            parameters.
        init: "identity" begins with the unedited model; kinds that set a constant begin as in the paper, "paper".
    """

    kind: str = "LoReFT"
    rank: int = 8
    positions: str = "f7+l7"
    layers: Sequence[int] | Literal["all"] = "all"
    tied: bool = True
    dropout: float = 0.0
    init: Init = "identity"
    response: int | Literal["all"] = 0

    def __post_init__(self) -> None:
        check_one_of("kind", self.kind, FAMILY)
        if self.response != "all":
            whole(self.response, "response", 0)
        whole(self.rank, "rank", 1)
        if self.layers != "all":
            object.__setattr__(self, "layers", tuple(whole(i, "layer") for i in self.layers))
            if not self.layers:
                raise ValueError("layers=(), expected numbers of blocks, or 'all'")

    @property
    def name(self) -> str:
        after = f", {self.response} of the response" if self.response else ""
        return f"{self.kind}{after}"

    def sites(self, depth: int) -> list[Site]:
        """The sites on a model of so many blocks."""
        layers = range(depth) if self.layers == "all" else self.layers
        parts: list[Positions] = [parse(p) for p in ([self.positions] if self.tied else self.positions.split("+"))]
        if self.response:
            further = Response() if self.response == "all" else Response() >> First(self.response)
            parts = [parts[0] | further] if self.tied else [*parts, further]
        return [resid_post(int(layer), part) for layer in layers for part in parts]

    def intervention(self, d: int) -> Intervention:
        """One intervention on hidden states of width `d`."""
        if self.kind == "SteeringVector":
            return SteeringVector(d)
        if self.kind == "RED":
            return RED(d, dropout=self.dropout)
        make: Any = KINDS[self.kind]
        return make(d, self.rank, dropout=self.dropout, init=self.init)

    def edit(self, subject: Subject, seed: int) -> ReFT:
        config = subject.bridge.cfg
        reft = ReFT({site: self.intervention(config.d_model) for site in self.sites(config.n_layers)})
        reft = reft.to(dtype=subject.dtype) if subject.dtype.itemsize > 4 else reft
        reft.reset(seed)
        return reft


@dataclass(frozen=True)
class Steering(OnHooks):
    """One vector added to the residual stream after one block, the middle one by default, at every token; trained.

    A difference of means needs texts with and without what is steered to, which a task's rows are not; so the vector is
    learned from the rows by their loss, as the trained baselines of AxBench are (Wu et al. 2025, arXiv 2501.17148).
    """

    layer: int | None = None
    positions: str = "all"

    def edit(self, subject: Subject, seed: int) -> ReFT:
        config = subject.bridge.cfg
        layer = config.n_layers // 2 if self.layer is None else self.layer
        return Reft("SteeringVector", positions=self.positions, layers=(layer,)).edit(subject, seed)


@dataclass(frozen=True)
class Unedited(Method):
    """The model as it is, and its prompt: nothing is trained."""

    stored: ClassVar[bool] = False

    def _fitted(self, subject: Subject, data: Batch | None, config: FitConfig, settings: Mapping[str, Any]) -> Trained:
        """Nothing is done with any of the arguments but `subject`."""
        return Trained(self, subject, OnBridge(subject.bridge, None))

    def read(self, folder: Path, subject: Subject) -> Acting:
        return OnBridge(subject.bridge, None)
