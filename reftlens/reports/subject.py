"""What a report is about: everything that its sections are computed from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from reftlens.analysis.causal.control_table import Controls
from reftlens.analysis.places.measuring import answered
from reftlens.analysis.places.questions import Effects, Kind, edited_positions, questions_of
from reftlens.analysis.strength.doses import DoseResponse
from reftlens.analysis.strength.sizes import edit_size
from reftlens.analysis.strength.texts import fluency
from reftlens.analysis.subspaces.frame import PrincipalFrame, principal_frame
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import plans_of
from reftlens.editing.reading import read_sites
from reftlens.editing.reft import ReFT
from reftlens.editing.variant import Variant
from reftlens.generation.decoding import Decoding
from reftlens.reports.parts import or_reason
from reftlens.scoring.responses import Responses, responses
from reftlens.text.batch import Batch
from reftlens.text.positions import Positions
from reftlens.training.result import FitResult
from reftlens.widgets.grid import Grid, strength_grid

_MOST_POSITIONS = 16


@dataclass(frozen=True, eq=False)
class Measured:
    """What several sections look at."""

    dose: DoseResponse
    grid: Grid | None
    no_grid: str
    """Why there are no texts, or ""."""


class Sweep(NamedTuple):
    """What was scored on the data in one sweep."""

    doses: Responses
    """To the edit at each strength."""
    effects: Mapping[str, Effects]
    """Of positions, sites and cells."""


@dataclass(frozen=True, eq=False)
class Subject:
    """An intervention, the model and data it is reported on, and how."""

    reft: ReFT
    model: Bridge
    trained_on: Batch
    heldout: Batch | None
    prompts: Batch | None
    """What texts are written from; without a tokenizer, none."""
    strengths: tuple[float, ...]
    run: FitResult | None
    controls: Controls | None
    unrelated: Batch | None
    score: Callable[[str], float] | None
    decoding: Decoding
    seed: int
    """Of resampling tests."""
    progress: bool

    @property
    def data(self) -> Batch:
        """What effects are measured on: the held-out data where there is some."""
        return self.trained_on if self.heldout is None else self.heldout

    @cached_property
    def exchanges(self) -> bool:
        """Whether it copies from a source, so that it can write no text."""
        return any(module.variables for _, module in self.reft.items())

    @cached_property
    def frame(self) -> PrincipalFrame | str:
        """The principal axes of the edit over the data, or why it has none."""
        read = partial(principal_frame, self.reft, self.model, self.data, progress=self.progress)
        return or_reason("The directions of the edit", read)

    @cached_property
    def states(self) -> list[Float[Tensor, "_ _"]]:
        """Hidden states of the unedited model that each site edits."""
        places = [(place.site, place.point) for place in self.reft.bind(self.model)]
        return read_sites(self.model, self.data, places, progress=self.progress)

    @cached_property
    def positions(self) -> dict[str, Positions]:
        """Every edited position."""
        return edited_positions(self.reft, self.data)

    @property
    def shown_positions(self) -> dict[str, Positions]:
        """The last of them."""
        return dict(list(self.positions.items())[-_MOST_POSITIONS:])

    @property
    def _doses(self) -> dict[str, Variant]:
        """The edit at each strength."""
        return {str(strength): Variant(strength) for strength in self.strengths}

    @cached_property
    def sweep(self) -> Sweep:
        """Every strength, position, site and cell, scored in one sweep."""
        s = self
        kinds: tuple[Kind, ...] = ("positions", "sites", "cells") if len(s.reft) > 1 else ("positions", "cells")
        questions = questions_of(s.reft, s.data, kinds, positions=s.shown_positions)
        effects, doses = answered(s.reft, s.model, s.data, questions, s._doses, seed=s.seed, progress=s.progress)
        return Sweep(doses, effects)

    @cached_property
    def results(self) -> Measured:
        """The strength curve, and texts at every strength, on which fluency is then measured."""
        s = self
        size, off_target = edit_size(s.reft, s.model, s.data, states=s.states), None
        if s.unrelated is not None:
            off_target = responses(s.model, s.unrelated, plans_of(s.reft, self._doses), progress=s.progress)
        dose = DoseResponse(s.strengths, s.sweep.doses, size, off_target, None)
        if kinds := ", ".join(sorted({module.label for _, module in s.reft.items() if module.variables})):
            return Measured(dose, None, f"{kinds} copies from a source, and writing has none to copy.")
        if s.prompts is None:
            return Measured(dose, None, "There are no prompts to write from.")
        grid = strength_grid(s.reft, s.model, s.prompts, s.strengths, s.decoding, progress=s.progress)
        return Measured(replace(dose, text=fluency(s.model, grid.generations, s.score, grid.computation)), grid, "")
