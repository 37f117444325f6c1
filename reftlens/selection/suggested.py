"""Positions that the data itself suggests."""

import re
from collections import Counter

from reftlens.editing.site import resid_post
from reftlens.editing.sources import differing
from reftlens.text.batch import Batch
from reftlens.text.positions import Last, Nth, Positions, Prompt, Tokens
from reftlens.text.template import Messages

_ALIGNED, _WORDS = 16, 3


def positions_of(data: Batch) -> list[Positions]:
    """Each token of the prompt where all prompts are of one short length; else places, and words that all share.

    Where rows have sources, those of them that can be exchanged, and where it is seen that something was.
    """
    lengths = data.prompt_mask.sum(dim=1).unique().tolist()
    if len(lengths) == 1 and lengths[0] <= _ALIGNED:
        every: list[Positions] = [Nth(k) for k in range(int(lengths[0]))]
    else:
        every = [Last(), Last(3), Prompt(), *(Tokens(word) >> Last() for word in shared_words(data))]
    if not data.sources:
        return every
    sites = [resid_post(0, positions) for positions in every if _equally_many(positions, data)]
    return [site.positions for site in sites if next(differing([site], data), None) is not None]


def _equally_many(positions: Positions, data: Batch) -> bool:
    """Whether as many tokens are chosen in each row as in its sources."""
    own = positions.mask(data.view).sum(dim=1).cpu()
    for source in data.sources.values():
        rows, theirs = source.rows.cpu(), positions.mask(source.batch.view).sum(dim=1).cpu()
        if bool(((own != theirs[rows]) & (rows >= 0)).any()):
            return False
    return True


def shared_words(data: Batch) -> list[str]:
    """Up to three words that stand once in every prompt, the last of them first; none where rows have no text."""
    if data.tokenizer is None:
        return []
    texts = [text for text, _ in data.view.prompt_text]
    words = [re.findall(r"\w{3,}", _written(example.prompt)) for example in data.examples]
    counts = [Counter(some) for some in words]
    rows = list(zip(counts, texts, strict=True))
    once = [word for word in words[0] if all(c[word] == 1 and text.count(word) == 1 for c, text in rows)]
    return once[::-1][:_WORDS]


def _written(prompt: str | Messages) -> str:
    """What a prompt says, without what a template writes around it."""
    return prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
