"""What interchange interventions put in: hidden states of source rows, read once and handed out token by token."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from reftlens.bridge.foreign import has_foreign_hook
from reftlens.bridge.protocol import Bridge, device_of
from reftlens.editing.edits import token_vectors
from reftlens.editing.engine import Stop, forward, hooked
from reftlens.editing.site import Site
from reftlens.text.batch import Batch

Editing = Callable[[Batch, Sequence[int]], AbstractContextManager[None]]
"""Makes the context in which a batch is read, given which rows of the data set it has."""


@dataclass
class _Reader:
    """Stores the hidden states that pass through a hook, and may end the pass once all of `readers` have theirs."""

    readers: list["_Reader"] = field(repr=False)
    ends: bool
    states: list[Tensor] = field(default_factory=list)

    def __call__(self, h: Tensor, hook: HookPoint) -> None:
        self.states.append(h)
        if self.ends and all(reader.states for reader in self.readers):
            raise Stop


@torch.no_grad()
def read_sites(
    model: Bridge,
    data: Batch,
    places: Sequence[tuple[Site, HookPoint]],
    *,
    batch_size: int = 16,
    progress: bool = False,
    edited: Editing | None = None,
) -> list[Float[Tensor, "tokens d"]]:
    """Hidden states at the positions of each site, row by row, in the model's dtype.

    Of the unedited model, or inside the context that `edited` makes. A pass ends at the deepest site, unless hooks of
    the user wait above it.
    """
    vectors: list[list[Tensor]] = [[] for _ in places]
    device, ends = device_of(model), not has_foreign_hook(model)
    with tqdm(total=len(data), desc="activations", unit="example", disable=not progress) as bar:
        for start in range(0, len(data), batch_size):
            batch = data[start : start + batch_size].to(device)
            readers: list[_Reader] = []
            readers += [_Reader(readers, ends) for _ in places]
            context = edited(batch, range(start, start + len(batch))) if edited else nullcontext()
            hooks = [(point, reader) for (_, point), reader in zip(places, readers, strict=True)]
            with context, hooked(hooks), suppress(Stop):
                forward(model, batch.tokens, batch.attention_mask)
            for (site, _), reader, read in zip(places, readers, vectors, strict=True):
                if len(reader.states) != 1:
                    raise ValueError(f"{site.hook} fired {len(reader.states)} times in one forward pass, expected once")
                read.append(token_vectors(reader.states[0], site.heads, site.hook)[site.positions.mask(batch.view)])
            bar.update(len(batch))
    return [torch.cat(read) for read in vectors]


class Exchanged(NamedTuple):
    """A site on a model, and the variables that are exchanged there."""

    site: Site
    point: HookPoint
    variables: tuple[str, ...]


@dataclass(frozen=True)
class Donor:
    """For the tokens that one site chooses in each row of a data set: what each variable's source holds there."""

    vectors: tuple[Float[Tensor, "tokens d"], ...]
    """One tensor for each variable of the intervention."""
    begins: tuple[Int[Tensor, " rows"], ...]
    """Where the tokens of a row's source begin among `vectors`; -1 where that variable is not exchanged."""
    order: Int[Tensor, "rows width"]
    """Of the tokens of each row, padding not counted: which of the tokens that the site chooses, from 0."""

    def of(self, rows: Int[Tensor, " n"], tokens: Int[Tensor, " n"]) -> Float[Tensor, "n variables d"]:
        """Source vectors of tokens: their row, and their number in it, padding not counted; NaN for no exchange."""
        columns, places = [], self.order[rows, tokens]
        for vectors, begins in zip(self.vectors, self.begins, strict=True):
            start = begins[rows]
            source = vectors[(start + places).clamp(min=0)]
            columns.append(torch.where((start >= 0)[:, None], source, torch.nan))
        return torch.stack(columns, dim=1)


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
        ValueError: if `data` has no source for a variable, or a row's source has another number of tokens at the
            site than the row itself.
    """
    if not exchanges:
        return {}
    names = check_sources(data, exchanges.values(), nested=nested)
    device = device_of(model)
    sources: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for name in sorted(names & set(data.sources)):
        source = data.sources[name]
        places = {i: (site, point) for i, (site, point, variables) in exchanges.items() if name in variables}
        edited = editing(source.batch) if editing and source.batch.sources else None
        vectors = read_sites(model, source.batch, list(places.values()), edited=edited)
        for (i, (site, _)), read in zip(places.items(), vectors, strict=True):
            sources[i, name] = read, _begins(site, data, name).to(device)
    nowhere = torch.full((len(data),), -1, device=device)
    donors = {}
    for i, (site, _, variables) in exchanges.items():
        known = [sources[i, name] for name in variables if (i, name) in sources]
        if known:  # the vectors of a variable that is not exchanged are never looked at
            vectors, begins = zip(*(sources.get((i, name), (known[0][0], nowhere)) for name in variables), strict=True)
            donors[i] = Donor(vectors, begins, _order(site, data).to(device))
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


def _order(site: Site, data: Batch) -> Int[Tensor, "rows width"]:
    """Of the tokens of each row, padding not counted: which of those that `site` chooses (0 for the others)."""
    mask, order = site.positions.mask(data.view), torch.zeros_like(data.tokens)
    rows, columns = mask.nonzero().unbind(dim=1)
    order[rows, data.view.index[rows, columns]] = (mask.long().cumsum(dim=1) - 1)[rows, columns]
    return order


def _begins(site: Site, data: Batch, name: str) -> Int[Tensor, " rows"]:
    """Where each row's source tokens begin; -1 for rows without."""
    source = data.sources[name]
    own = site.positions.mask(data.view).sum(dim=1).cpu()
    theirs = site.positions.mask(source.batch.view).sum(dim=1).cpu()
    index = source.rows.cpu()
    differ = ((index >= 0) & (own > 0) & (own != theirs[index.clamp(min=0)])).nonzero().flatten().tolist()
    if differ:
        row = differ[0]
        raise ValueError(
            f"row {row}: {site} chooses {int(own[row])} token(s), and {int(theirs[index[row]])} in its source "
            f"{name!r} (row {int(index[row])} there); choose positions that both have equally many of"
        )
    begins = theirs.cumsum(dim=0) - theirs
    return torch.where(index >= 0, begins[index.clamp(min=0)], -1)
