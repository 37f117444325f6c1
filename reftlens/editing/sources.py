"""What interchange interventions put in: hidden states of source rows, read once and handed out token by token.

Of a source only those rows are read that a row of the data takes from, and those that are the same once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformer_lens.hook_points import HookPoint

from reftlens.bridge.protocol import Bridge
from reftlens.editing.reading import Editing, read_sites
from reftlens.editing.site import Site
from reftlens.text.batch import Batch


class Exchanged(NamedTuple):
    """A site on a model, and the variables that are exchanged there."""

    site: Site
    point: HookPoint
    variables: tuple[str, ...]


Read = Callable[[Batch, Sequence[Exchanged], Sequence[int]], Sequence[Float[Tensor, "tokens d"]]]
"""What rows of a source hold at each of some places, row after row."""


@dataclass(frozen=True)
class Donor:
    """For the tokens that one site chooses in each row of a data set: what each variable's source holds there."""

    vectors: tuple[Float[Tensor, "tokens d"], ...]
    """One tensor for each variable of the intervention; the last vector is NaN."""
    lookups: tuple[Int[Tensor, "rows width"], ...]
    """For each token of a row, padding not counted, which of `vectors` it takes; -1 where nothing is exchanged. They
    are on the host, where it is known which tokens are edited."""

    def of(self, rows: Int[Tensor, " n"], tokens: Int[Tensor, " n"]) -> Float[Tensor, "n variables d"]:
        """Source vectors of tokens: their row, and their number in it, padding not counted; NaN for no exchange."""
        rows, tokens, device = rows.to("cpu"), tokens.to("cpu"), self.vectors[0].device
        numbers = [lookup[rows, tokens].to(device) for lookup in self.lookups]
        return torch.stack([vectors[n] for vectors, n in zip(self.vectors, numbers, strict=True)], dim=1)


def read_donors(
    model: Bridge,
    data: Batch,
    exchanges: Mapping[int, Exchanged],
    editing: Callable[[Batch], Editing] | None = None,
    *,
    nested: bool = False,
) -> dict[int, Donor]:
    """Read the sources of `data` at the places of one intervention, by their index.

    A source that has sources of its own is read with those exchanged in it first, as `editing` does. Such a `nested`
    source need not have one for every variable: the others are left in it.

    Raises:
        ValueError: as `donors_of`.
    """

    def read(source: Batch, here: Sequence[Exchanged], rows: Sequence[int]) -> list[Tensor]:
        edited = editing(source) if editing and source.sources else None
        return read_sites(model, source, [(each.site, each.point) for each in here], edited=edited, rows=rows)

    return donors_of(data, exchanges, read, nested=nested)


def donors_of(data: Batch, exchanges: Mapping[int, Exchanged], read: Read, *, nested: bool = False) -> dict[int, Donor]:
    """What the sources of `data` hold, as `read` gives it.

    Raises:
        ValueError: if `data` has no source for a variable, or a row's source has another number of tokens at the
            site than the row itself.
    """
    if not exchanges:
        return {}
    names = check_sources(data, exchanges.values(), nested=nested)
    sources: dict[int, dict[str, tuple[Tensor, Tensor]]] = {i: {} for i in exchanges}
    for name in sorted(names & set(data.sources)):
        source = data.sources[name]
        here = {i: exchange for i, exchange in exchanges.items() if name in exchange.variables}
        used = sorted({*source.rows.tolist()} - {-1}) or [0]  # of the right width, where nothing is taken
        for i, states in zip(here, read(source.batch, list(here.values()), used), strict=True):
            vectors = pad(states, (0, 0, 0, 1), value=torch.nan)
            sources[i][name] = vectors, _lookup(here[i].site, data, name)
    donors = {}
    for i, known in sources.items():
        if known:
            vectors, lookup = next(iter(known.values()))
            nothing = vectors, torch.full_like(lookup, -1)
            donors[i] = Donor(*zip(*(known.get(name, nothing) for name in exchanges[i].variables), strict=True))
    return donors


def check_sources(data: Batch, exchanges: Iterable[Exchanged], *, nested: bool = False) -> set[str]:
    """The variables that are exchanged; raises where `data` lacks a source for one, or has one that none uses."""
    names = {name for exchange in exchanges for name in exchange.variables}
    missing, unused = sorted(names - set(data.sources)), sorted(set(data.sources) - names)
    if missing and not nested:
        available = ", ".join(map(repr, data.sources)) or "none"
        raise ValueError(
            f"an intervention exchanges {missing[0]!r}, and the data has no such source (it has: {available}): pass "
            f"data.with_sources({{{missing[0]!r}: …}}), a batch with the rows to take it from"
        )
    if unused:
        raise ValueError(
            f"the data has a source {unused[0]!r} that no intervention exchanges (they exchange: "
            f"{', '.join(sorted(names))})"
        )
    return names


def check_differs(sites: Iterable[Site], data: Batch) -> None:
    """Raise `ValueError` where each row reads, up to the tokens that `sites` choose in it, as its source does.

    The hidden states are then equal, and an exchange of them changes nothing. Sources of sources are not looked at.
    """
    sites = tuple(sites)
    if not data.sources or next(differing(sites, data), None) is not None:
        return
    first = int(data.tokens[0][data.attention_mask[0]][0])  # easily taken for the first of the text, where it is a BOS
    beginning = first if data.tokenizer is None else data.tokenizer.decode([first])
    raise ValueError(
        f"in every row the text up to what {sites[0]} chooses is that of its source, so that an exchange changes "
        f"nothing: choose tokens at or after the first that differs (row 0 begins with {beginning!r})"
    )


def differing(sites: Iterable[Site], data: Batch) -> Iterator[int]:
    """Rows that read otherwise than a source of theirs, up to the tokens that `sites` choose; a row may come twice."""
    positions = dict.fromkeys(site.positions for site in sites)
    for source in data.sources.values():
        if source.batch.sources:
            yield from (source.rows >= 0).nonzero().flatten().tolist()
            continue
        for place in positions:
            own, theirs = place.mask(data.view), place.mask(source.batch.view)
            for row, other in enumerate(source.rows.tolist()):
                if other >= 0 and _text(data, own, row) != _text(source.batch, theirs, other):
                    yield row


def _text(data: Batch, mask: Tensor, row: int) -> tuple[list[int], list[int]]:
    """The chosen places of a row, padding not counted, and its tokens up to the last of them."""
    real = data.attention_mask[row]
    places = mask[row][real].nonzero().flatten().tolist()
    return places, data.tokens[row][real][: places[-1] + 1].tolist() if places else []


def _lookup(site: Site, data: Batch, name: str) -> Int[Tensor, "rows width"]:
    """For each token of a row, padding not counted, which of the states of its source it takes; -1 for none."""
    source, mask = data.sources[name], site.positions.mask(data.view).cpu()
    own, theirs = mask.sum(dim=1), site.positions.mask(source.batch.view).sum(dim=1).cpu()
    index = source.rows.cpu()
    differ = ((index >= 0) & (own > 0) & (own != theirs[index.clamp(min=0)])).nonzero().flatten().tolist()
    if differ:
        row = differ[0]
        raise ValueError(
            f"row {row}: {site} chooses {int(own[row])} token(s), and {int(theirs[index[row]])} in its source "
            f"{name!r} (row {int(index[row])} there); choose positions that both have equally many of, "
            f"such as the last of each: {site.positions} >> Last(1)"
        )
    rows, columns = mask.nonzero().unbind(dim=1)
    used = torch.isin(torch.arange(len(theirs)), index)
    begins, order = (theirs * used).cumsum(dim=0) - theirs, (mask.long().cumsum(dim=1) - 1)[rows, columns]
    lookup = torch.full(mask.shape, -1)
    taken = torch.where(index >= 0, begins[index.clamp(min=0)], -1)[rows]
    lookup[rows, data.view.index.cpu()[rows, columns]] = torch.where(taken >= 0, taken + order, -1)
    return lookup
