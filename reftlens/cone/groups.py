"""Which rows are computed together: after a beginning that they share, and with others of similar length."""

from collections.abc import Sequence
from dataclasses import dataclass

from reftlens.cone.spans import buckets, cost_of
from reftlens.text.beginnings import Beginning


@dataclass(frozen=True)
class Section:
    """Rows after a beginning that all of them share, in groups of similar length."""

    shared: int
    """Tokens of the beginning, within the cone; 0 for rows that share none."""
    groups: list[list[int]]


def sections(
    lengths: Sequence[int], keys: Sequence[int], beginnings: Sequence[Beginning], most: int | None, overhead: float
) -> list[Section]:
    """The cheapest division of rows with these lengths, and so many `keys` before them, that was looked at.

    All of `beginnings` are shared, or none where that is cheaper; within a section, groups are the cheapest.
    """
    plain = [Section(0, buckets(lengths, keys, most, overhead))]
    if not beginnings:
        return plain
    alone = sorted(set(range(len(lengths))) - {row for beginning in beginnings for row in beginning.rows})
    shared = []
    for length, rows in [*((b.length, b.rows) for b in beginnings), (0, alone)]:
        left, before = [lengths[row] - length for row in rows], [keys[row] + length for row in rows]
        groups = buckets(left, before, most, overhead) if rows else []
        if groups:
            shared.append(Section(length, [[rows[n] for n in group] for group in groups]))
    return min((plain, shared), key=lambda division: _cost(division, lengths, keys, overhead))


def _cost(division: Sequence[Section], lengths: Sequence[int], keys: Sequence[int], overhead: float) -> float:
    total = 0.0
    for section in division:
        shared = section.shared
        total += cost_of(1, shared, keys[section.groups[0][0]], overhead) if shared else 0.0
        for group in section.groups:
            longest, before = max(lengths[n] for n in group) - shared, max(keys[n] for n in group) + shared
            total += cost_of(len(group), longest, before, overhead)
    return total
