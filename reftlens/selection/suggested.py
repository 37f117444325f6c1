"""Positions that the data itself suggests."""

import re
from collections import Counter

from reftlens.text.batch import Batch
from reftlens.text.positions import Last, Nth, Positions, Prompt, Tokens
from reftlens.text.template import Messages

_ALIGNED, _WORDS = 16, 3


def positions_of(data: Batch) -> list[Positions]:
    """Each token of the prompt where all prompts are of one short length; else places, and words that all share."""
    lengths = data.prompt_mask.sum(dim=1).unique().tolist()
    if len(lengths) == 1 and lengths[0] <= _ALIGNED:
        return [Nth(k) for k in range(int(lengths[0]))]
    return [Last(), Last(3), Prompt(), *(Tokens(word) >> Last() for word in shared_words(data))]


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
