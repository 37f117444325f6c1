"""A reward model: an edit and a head of one output, trained on pairs of answers of which one was preferred."""

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT
from reftlens.editing.variant import Variant
from reftlens.scoring.heads import head_of, head_scores
from reftlens.scoring.objectives import Objective, Predictions
from reftlens.scoring.statistics import Estimate, share_of
from reftlens.text.batch import Batch
from reftlens.text.encoding import encode_prompts
from reftlens.text.template import Prompt


def reward_rows(
    model: Bridge, pairs: Sequence[tuple[str, str, str]], *, chat: bool = False, system: str | None = None
) -> Batch:
    """Encode triples `(prompt, chosen, rejected)`: two rows each, in order, of the prompt with one of the answers.

    All of a row is prompt, so that `"l1"` is the last token of the answer, where the head reads. A chat ends with the
    answer, before what ends its turn.

    Raises:
        TypeError: for a pair that is no triple of texts.
    """
    if wrong := [i for i, pair in enumerate(pairs) if len(pair) != 3 or not all(isinstance(t, str) for t in pair)]:
        raise TypeError(f"pair {wrong[0]} is {pairs[wrong[0]]!r:.80}, expected three texts: prompt, chosen, rejected")
    rows: list[Prompt] = []
    for prompt, *answers in pairs:
        for answer in answers:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            rows.append(turns if chat else prompt + answer)
    return encode_prompts(model, rows, chat=chat, system=system, continue_last=chat)


class BradleyTerry(Objective):
    """`-log σ(r(x, y⁺) - r(x, y⁻))` of each pair, `r` the output of the head of the `ReFT` (Bradley and Terry 1952).

    Raises:
        ValueError: for a `ReFT` without a head of one output, or with several heads.
    """

    logits: ClassVar[bool] = False
    group: ClassVar[int] = 2

    def __init__(self, reft: ReFT) -> None:
        site, head = head_of(reft)
        if head.outputs != 1:
            raise ValueError(f"a reward is one number, and the head has {head.outputs} outputs: Head(d, outputs=1)")
        self.sites = {"head": site}

    def losses(self, predictions: Predictions) -> Float[Tensor, " pairs"]:
        assert predictions.reft is not None
        rewards = head_of(predictions.reft)[1].scores(predictions.activations["head"])[:, 0]
        return -logsigmoid(rewards[::2] - rewards[1::2])

    def check(self, data: Batch, name: str) -> None:
        """Raise `ValueError` for an odd number of rows, or where the head does not read one token of each."""
        super().check(data, name)
        counts = self.sites["head"].positions.mask(data.view).sum(dim=1)
        if (counts != 1).any():
            row = int((counts != 1).nonzero()[0])
            raise ValueError(
                f"the head at {self.sites['head']} reads {int(counts[row])} tokens of row {row} of {name}, expected 1"
            )


def preferred(reft: ReFT, model: Bridge, rows: Batch, variant: Variant = Variant()) -> Estimate:
    """The share of pairs whose chosen answer has the larger reward, with its exact 95 % interval."""
    rewards = head_scores(reft, model, rows, variant)[:, 0]
    return share_of(rewards[::2] > rewards[1::2])


def rewards(reft: ReFT, model: Bridge, texts: Sequence[Prompt], *, chat: bool = False) -> Float[Tensor, " rows"]:
    """The reward of texts, or of chats that end with an answer."""
    return head_scores(reft, model, encode_prompts(model, texts, chat=chat, continue_last=chat))[:, 0]
