"""Positions that the data itself suggests, and rows that belong together."""

import re
from collections import Counter
from collections.abc import Hashable

import torch

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


def groups_of(data: Batch) -> list[int]:
    """The number of the group of each row: rows that share a prompt, or are exchanged with the same source.

    Where pairs are made of so few texts that they all hang together (a group of more than a fifth of the rows), those
    that share a prompt alone.
    """
    prompts = [(t[m].tolist(),) for t, m in zip(data.tokens, data.prompt_mask, strict=True)]
    keys: list[list[Hashable]] = [[str(p)] for p in prompts]
    alone = _joined(keys)
    for source in data.sources.values():
        rows = [str(t[m].tolist()) for t, m in zip(source.batch.tokens, source.batch.prompt_mask, strict=True)]
        for own, row in zip(keys, source.rows.tolist(), strict=True):
            own += [rows[row]] if row >= 0 else []
    joined = _joined(keys)
    return alone if max(Counter(joined).values()) > len(data) / 5 else joined


def row_keys(data: Batch) -> list[str]:
    """Of each row its tokens, which of them are targets, and what it is exchanged with."""
    real = zip(data.tokens, data.attention_mask, data.target_mask, strict=True)
    keys = [f"{t[m].tolist()} {x[m].int().tolist()}" for t, m, x in real]
    for name, source in sorted(data.sources.items()):
        rows = [str(t[m].tolist()) for t, m in zip(source.batch.tokens, source.batch.prompt_mask, strict=True)]
        keys = [f"{key} {name} {rows[r] if r >= 0 else ''}" for key, r in zip(keys, source.rows.tolist(), strict=True)]
    return keys


def _joined(keys: list[list[Hashable]]) -> list[int]:
    """Rows that share a key, or share one with a row that does, have one number."""
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            row = parent[row]
        return row

    first = dict[Hashable, int]()
    for row, own in enumerate(keys):
        for key in own:
            a, b = sorted((root(first.setdefault(key, row)), root(row)))
            parent[b] = a
    numbers = {r: n for n, r in enumerate(dict.fromkeys(root(row) for row in range(len(keys))))}
    return [numbers[root(row)] for row in range(len(keys))]


def split_groups(groups: list[int], shares: tuple[float, ...], seed: int) -> list[list[int]]:
    """Rows in so many parts of about these shares, no group in two of them, each part in ascending order."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    every = list(members.values())
    parts: list[list[int]] = [[] for _ in shares]
    for number in sorted(order, key=lambda n: -len(every[n])) if len(members) < len(groups) else order:
        short = [share * len(groups) - len(part) for share, part in zip(shares, parts, strict=True)]
        parts[short.index(max(short))] += every[number]
    return [sorted(part) for part in parts]
