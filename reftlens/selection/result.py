"""What a search gives: a recommendation, its score on rows that nothing saw, and all that was tried."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from reftlens import figures
from reftlens.editing.reft import ReFT
from reftlens.editing.variant import Variant
from reftlens.errors import check_one_of
from reftlens.figures import Axes, DataFrame
from reftlens.scoring.objectives import Objective
from reftlens.scoring.statistics import Estimate
from reftlens.selection import pictures
from reftlens.selection.choice import Optimism
from reftlens.selection.metrics import NAMES, Metric
from reftlens.selection.space import Candidate, Space
from reftlens.selection.splitting import Split
from reftlens.selection.trials import Setting, Trial, importance
from reftlens.selection.written import code_of
from reftlens.training.config import FitConfig


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search recommends, and what it is based on."""

    space: Space
    """With what was derived from model and data."""
    metric: Metric
    trials: tuple[Trial, ...]
    """Every candidate at every rung that it reached, on the first half of the dev rows."""
    settings: tuple[Setting, ...]
    """The best settings at every strength, on the second half of the dev rows."""
    recommended: ReFT = field(repr=False)
    """Trained, with the first of the seeds."""
    candidate: Candidate
    variant: Variant
    """How strongly the recommended edit is to be applied."""
    dev: Estimate
    """Score of the recommended edit where it was chosen: `optimism.expected` too high."""
    test: Estimate
    """The same on the test rows, by which nothing was chosen; 95 % interval."""
    unedited_dev: Estimate
    unedited_test: Estimate
    gained: Estimate
    """Test score of the recommended edit less that of the unedited model, row by row; where the interval holds 0, the
    search has found nothing that these rows show."""
    rows: Mapping[str, int]
    """How many `"dev"` rows the recommended edit was chosen by at the end, and how many `"test"` rows there are."""
    optimism: Optimism
    config: FitConfig
    """Of the training of the recommended edit."""
    objective: Objective = field(repr=False)
    """That it minimised."""
    split: Split | None
    """Which rows are train, dev and test, where the search has split them."""
    steps: int
    """Optimizer steps taken, of single candidates."""
    budget: int
    scored_tokens: int
    """Tokens of rows times edits that were scored, shared pass or not."""

    @property
    def code(self) -> str:
        """Python that trains the recommended edit again; `data` is what the search was given, `model` as well.

        An `objective` other than cross-entropy is named, to be made anew; tensors that a kind was given and does not
        train are read from `result`, what the search gave.
        """
        return code_of(self.recommended, self.config, self.variant, self.split, self.objective)

    @property
    def equals(self) -> list[Setting]:
        """Settings at another place that score no less than the recommended one, where it was chosen."""
        chosen = next(setting for setting in self.settings if setting.chosen)
        return [s for s in self.settings if s.score >= chosen.score and s.candidate.sites != chosen.candidate.sites]

    @property
    def cannot_tell(self) -> str:
        """What the search cannot tell, in a sentence."""
        tried, places = len({t.candidate for t in self.trials}), len({t.candidate.sites for t in self.trials})
        others = len({s.candidate.sites for s in self.equals})
        more = f", {others} of which did as well" if others else ""
        return (
            f"Best of {tried} candidates at {places} places{more}, for these rows and this metric: the search says "
            "where an edit works, not where the model itself computes what is edited (rl.controls asks that), and "
            "nothing of places, kinds and data that it was not given."
        )

    def to_frame(self) -> DataFrame:
        """One row per candidate and rung, then one per setting and strength of the finals."""
        return figures.table([trial.to_row() for trial in self.trials] + [s.to_row() for s in self.settings])

    def importance(self) -> DataFrame:
        """How much each axis matters for the score, at the first rung, where all candidates stand at equal steps.

        `explained` is the share of the variance of the scores that lies between the values of the axis (η²; without any
        effect it is expected to be `by_chance`, the number of values less one over that of candidates less one). `lost`
        is by how much the best candidate with another value than the recommended one stays behind the best of all.
        """
        first = min(trial.steps for trial in self.trials)
        every = [trial for trial in self.trials if trial.look == "first" and trial.steps == first]
        return importance(every, self.candidate)

    def plot(self, ax: Axes | None = None, *, of: str = "frontier") -> Axes:
        """`"frontier"`: score over KL of the finals, the undominated ones joined; `"map"`: best at each place."""
        check_one_of("of", of, ("frontier", "map"))
        if of == "map":
            label = NAMES["loss" if self.metric.score else self.metric.name]
            return pictures.place_map(self.trials, self.candidate, label, ax)
        return pictures.frontier(self.settings, self.unedited_dev.value, NAMES[self.metric.name], ax)

    def __repr__(self) -> str:
        chosen = next(setting for setting in self.settings if setting.chosen)
        seeds, over = chosen.seeds, f"nothing keeps the budget: this is what costs least, {self._cost(chosen):.3g}"
        nothing = f"nothing was found: on the test rows {self.gained:+.3f} is gained, which may be 0"
        spread = f"; seeds {min(seeds):.3f} to {max(seeds):.3f}" if len(seeds) > 1 else ""
        lines = [
            f"{self.candidate}, {self.variant}",
            f"{NAMES[self.metric.name]}, higher is better{self._budget}",
            *([] if chosen.within else [over]),
            f"test {self.test:.3f}, unedited {self.unedited_test:.3f} ({self._counted('test')}, not chosen by)",
            *([nothing] if self.gained.low <= 0 else []),
            f"dev {self.dev:.3f}, unedited {self.unedited_dev:.3f} ({self._counted('dev')}{spread})",
            str(self.optimism),
            f"{self.steps:,} of {self.budget:,} optimizer steps; {self.scored_tokens:,} tokens scored"
            + (f"; {self.split}" if self.split else ""),
            *(f"  {setting}" for setting in sorted(self.settings, key=lambda s: -s.score)[:8]),
            self.cannot_tell,
        ]
        return figures.screenful(lines)

    def _counted(self, part: Literal["dev", "test"]) -> str:
        """Rows, and what intervals are of, where several rows share a prompt or a source."""
        rows, groups = self.rows[part], (self.dev if part == "dev" else self.test).count
        return f"{rows} rows" + (f" in {groups} groups" if groups < rows else "")

    def _cost(self, setting: Setting) -> float:
        """What the budget is spent on, in its own unit."""
        return math.exp(setting.cost) if "perplexity" in self.metric.within else setting.cost

    @property
    def _budget(self) -> str:
        names = {
            "kl": "KL from the unedited model at most {:g} nats per token",
            "perplexity": "perplexity at most {:g}",
        }
        return "".join("; " + names[name].format(limit) for name, limit in self.metric.within.items())
