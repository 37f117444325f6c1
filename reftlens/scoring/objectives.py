"""What training minimises: a function from the logits at the targets to one loss per target.

Any callable `(logits, batch) -> losses` will do. `logits` is `[targets, vocab]`, one row for each target token in
the order of `batch.target_ids` and `batch.target_rows`; `batch` is a whole micro-batch, its rows in the order of the
step, so that they can be paired; `losses` is one-dimensional, and its mean over the whole optimizer step is what is
minimised, so that accumulation does not change the result.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from reftlens.text.batch import Batch

Objective = Callable[[Tensor, Batch], Tensor]


def cross_entropy(logits: Float[Tensor, "targets vocab"], batch: Batch) -> Float[Tensor, " targets"]:
    """Negative log-likelihood of each target token, in nats."""
    return F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, batch.target_ids, reduction="none")
