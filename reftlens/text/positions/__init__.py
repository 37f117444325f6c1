"""Which tokens an intervention edits: pure functions from a batch of tokens to a mask.

A `Positions` sees a `TokenView` (ids, role of each token, token text) and returns a boolean mask
`[batch, seq]`. It never sees padding, never depends on which side the padding is, and never depends on tokens
to the right of the one it decides about, so that a mask means the same in training, in a full forward pass and
while generating with a key/value cache.

`a | b` is the union, `a - b` the difference, and `a >> b` lets `b` choose among the tokens that `a` chose.
"""

from reftlens.text.positions.base import Positions
from reftlens.text.positions.choosers import All, At, First, Generated, Last, Nth, Prompt, Response, Tokens
from reftlens.text.positions.spelling import KINDS, parse
from reftlens.text.positions.turns import Role
from reftlens.text.positions.written import Written

__all__ = [
    "KINDS",
    "All",
    "At",
    "First",
    "Generated",
    "Last",
    "Nth",
    "Positions",
    "Prompt",
    "Response",
    "Role",
    "Tokens",
    "Written",
    "parse",
]
