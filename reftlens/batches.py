"""Batches made of batches: several joined into one, and one that is its own source."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from reftlens.data import Batch, Source
from reftlens.positions import Role


def join(batches: Sequence[Batch]) -> Batch:
    """All rows of several batches, with their sources; a variable that one of them does not exchange stays there.

    Cause pairs and isolate pairs joined are the data of multi-task DAS (Huang et al. 2024, arXiv 2402.17700): the
    answer follows the source in the first, and stays the base's in the second.
    """
    if not batches:
        raise ValueError("no batches to join")
    first = batches[0]
    if any(b.tokenizer is not first.tokenizer for b in batches):
        raise ValueError("the batches were encoded by different tokenizers")
    width = max(b.tokens.shape[1] for b in batches)
    offsets = [sum(len(b) for b in batches[:i]) for i in range(len(batches))]
    return Batch(
        tokens=torch.cat([_wide(b.tokens, width, 0) for b in batches]),
        role=torch.cat([_wide(b.role, width, int(Role.PAD)) for b in batches]),
        target_mask=torch.cat([_wide(b.target_mask, width, 0) for b in batches]),
        examples=tuple(example for b in batches for example in b.examples),
        tokenizer=first.tokenizer,
        truncated=tuple(offset + i for b, offset in zip(batches, offsets, strict=True) for i in b.truncated),
        sources={name: _joined_source(batches, name) for name in dict.fromkeys(n for b in batches for n in b.sources)},
    )


def resampled(data: Batch, *, seed: int = 0) -> Batch:
    """The same rows, each with another of them as source: resample ablation, once `Interchange` is applied.

    No row is its own source: rows are shuffled, and each takes the one after it.
    """
    if len(data) < 2:
        raise ValueError(f"{len(data)} row(s): resampling needs another row to take from")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    rows = torch.empty_like(order).scatter(0, order, order.roll(-1))
    return data.with_sources(Source(replace(data, sources={}), rows))


def _joined_source(batches: Sequence[Batch], name: str) -> Source:
    """The sources of one variable; rows that have none count as -1."""
    rows, parts, begins = [], [], 0
    for batch in batches:
        if name not in batch.sources:
            rows.append(torch.full((len(batch),), -1))
            continue
        source = batch.sources[name]
        rows.append(torch.where(source.rows >= 0, source.rows + begins, -1))
        parts.append(source.batch)
        begins += len(source.batch)
    return Source(join(parts), torch.cat(rows))


def _wide(tensor: Tensor, width: int, fill: int) -> Tensor:
    """Padded on the right to `width` columns."""
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill)
