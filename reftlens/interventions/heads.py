"""A head: it reads hidden states and scores a row, and leaves the hidden states as they are."""

from typing import Any, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from reftlens.interventions.base import Intervention, Origin, Strength
from reftlens.numbers import whole


class Head(Intervention):
    """`h' = h`, and for whoever asks the scores `W2 drop(tanh(W1 drop(h) + b1)) + b2` of a row, or `W2 drop(h) + b2`.

    One that stands in a `ReFT` is trained, counted, drawn from the seed and stored with it;
    `fit(…, objective=rl.training.HeadLoss(reft))` trains it on the labels of the rows. The first form is the head of
    RoBERTa's classifiers (Liu et al. 2019), which the ReFT paper trains on GLUE.

    Args:
        outputs: one for each label; one alone is a regression.
        hidden: width of the layer in between; 0 for none, None for `d`.
        dropout: on what the two maps read, in training.
    """

    kind = "Head"
    stacks = False

    def __init__(
        self,
        d: SupportsIndex,
        outputs: SupportsIndex,
        *,
        hidden: SupportsIndex | None = None,
        dropout: SupportsFloat = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(d, 0, dropout)
        self.outputs = whole(outputs, "outputs", 1)
        self.hidden = self.d if hidden is None else whole(hidden, "hidden", 0)
        self.W1 = nn.Parameter(torch.empty(self.hidden, self.d, dtype=torch.float32)) if self.hidden else None
        self.b1 = nn.Parameter(torch.empty(self.hidden, dtype=torch.float32)) if self.hidden else None
        self.W2 = nn.Parameter(torch.empty(self.outputs, self.hidden or self.d, dtype=torch.float32))
        self.b2 = nn.Parameter(torch.empty(self.outputs, dtype=torch.float32))
        self.reset(generator)

    def scores(self, h: Float[Tensor, "rows {self.d}"]) -> Float[Tensor, "rows {self.outputs}"]:
        """Of hidden states, one a row; in float32, or wider where they are."""
        with torch.autocast(h.device.type, enabled=False):
            x = self.dropout(h.to(self.working_dtype(h.dtype)))
            if self.W1 is not None and self.b1 is not None:
                x = self.dropout(F.linear(x, self.W1.to(x.dtype), self.b1.to(x.dtype)).tanh())
            return F.linear(x, self.W2.to(x.dtype), self.b2.to(x.dtype))

    def forward(
        self,
        h: Float[Tensor, "*units {self.d}"],
        strength: Strength = 1.0,
        basis: Tensor | None = None,
        source: Tensor | None = None,
        origin: Origin | None = None,
    ) -> Float[Tensor, "*units {self.d}"]:
        """`h` itself."""
        return h

    def code(self, h: Float[Tensor, "*units {self.d}"], basis: Tensor | None) -> Float[Tensor, "*units {self.rank}"]:
        return h[..., :0]

    def basis(self) -> Float[Tensor, "{self.d} {self.rank}"]:
        return self.W2.new_zeros(self.d, 0)

    def settings(self) -> dict[str, Any]:
        return {"d": self.d, "outputs": self.outputs, "hidden": self.hidden, "dropout": self.dropout.p}

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Weights normal with a deviation of 0.02, as BERT's and RoBERTa's, biases 0."""
        for weight in (self.W1, self.W2):
            if weight is not None:
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
        for bias in (self.b1, self.b2):
            if bias is not None:
                bias.zero_()
