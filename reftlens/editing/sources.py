"""What interchange interventions put in: hidden states of source rows, read once and handed out token by token."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from reftlens.bridge.foreign import has_foreign_hook
from reftlens.bridge.protocol import Bridge, device_of
from reftlens.editing.engine import Stop, forward, hooked, token_vectors
from reftlens.editing.site import Site
from reftlens.text.batch import Batch
from reftlens.text.view import Mask


@dataclass
class _Reader:
    """Keeps the hidden states that pass through a hook, and may end the pass once all of `readers` have theirs."""

    readers: list["_Reader"] = field(repr=False)
    ends: bool
    kept: list[Tensor] = field(default_factory=list)

    def __call__(self, h: Tensor, hook: HookPoint) -> None:
        self.kept.append(h)
        if self.ends and all(reader.kept for reader in self.readers):
            raise Stop


@torch.no_grad()
def read_sites(
    model: Bridge,
    data: Batch,
    places: Sequence[tuple[Site, HookPoint]],
    *,
    batch_size: int = 16,
    progress: bool = False,
    edited: Callable[[Batch, Sequence[int]], AbstractContextManager[None]] | None = None,
) -> list[Float[Tensor, "tokens d"]]:
    """Hidden states at the positions of each site, row by row, in the model's dtype.

    Of the unedited model; or inside the context that `edited` makes for a batch, given which rows of `data` it has.
    A pass ends at the deepest site, unless hooks of the user wait above it.
    """
    collected: list[list[Tensor]] = [[] for _ in places]
    device, ends = device_of(model), not has_foreign_hook(model)
    with tqdm(total=len(data), desc="activations", unit="example", disable=not progress) as bar:
        for start in range(0, len(data), batch_size):
            batch = data[start : start + batch_size].to(device)
            readers: list[_Reader] = []
            readers += [_Reader(readers, ends) for _ in places]
            rows = range(start, start + len(batch))
            with (
                edited(batch, rows) if edited else nullcontext(),
                hooked([(point, reader) for (_, point), reader in zip(places, readers, strict=True)]),
                suppress(Stop),
            ):
                forward(model, batch.tokens, batch.attention_mask)
            for (site, _), reader, kept in zip(places, readers, collected, strict=True):
                if len(reader.kept) != 1:
                    raise ValueError(f"{site.hook} fired {len(reader.kept)} times in one forward pass, expected once")
                kept.append(token_vectors(reader.kept[0], site.heads, site.hook)[site.positions.mask(batch.view)])
            bar.update(len(batch))
    return [torch.cat(kept) for kept in collected]


@dataclass(frozen=True)
class Donor:
    """For the tokens that one site chooses in each row of a data set: what each variable's source holds there."""

    vectors: tuple[Float[Tensor, "tokens d"], ...]
    """One tensor for each variable of the intervention."""
    begins: tuple[Int[Tensor, " rows"], ...]
    """Where the tokens of a row's source begin among `vectors`; -1 where that variable is not exchanged."""

    def of(self, rows: Int[Tensor, " n"], places: Int[Tensor, " n"]) -> Float[Tensor, "n variables d"]:
        """Source vectors of tokens: their row, and which of the row's chosen tokens each is; NaN for no exchange."""
        columns = []
        for vectors, begins in zip(self.vectors, self.begins, strict=True):
            start = begins[rows]
            found = vectors[(start + places).clamp(min=0)]
            columns.append(torch.where((start >= 0)[:, None], found, torch.nan))
        return torch.stack(columns, dim=1)


def places_of(mask: Mask) -> Int[Tensor, "batch seq"]:
    """For each chosen token, which of its row's chosen tokens it is, from 0."""
    return mask.long().cumsum(dim=1) - 1


Place = tuple[Site, HookPoint, tuple[str, ...]]
"""A site, its hook, and the variables that are exchanged there."""


def read_donors(
    model: Bridge,
    data: Batch,
    wanted: Mapping[int, Place],
    edited_source: Callable[[Batch], Callable[[Batch, Sequence[int]], AbstractContextManager[None]]] | None = None,
    *,
    nested: bool = False,
) -> dict[int, Donor]:
    """Read the sources of `data` at the places of one intervention, by their index.

    A source that has sources of its own is read with those exchanged in it first, as `edited_source` does. Such a
    `nested` source need not have one for every variable: the others are left in it.

    Raises:
        ValueError: if `data` has no source for a variable, or a row's source has another number of tokens at the
            site than the row itself.
    """
    if not wanted:
        return {}
    named = check_sources(data, wanted.values(), nested=nested)
    found: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for name in sorted(named & set(data.sources)):
        source = data.sources[name]
        mine = {i: (site, point) for i, (site, point, variables) in wanted.items() if name in variables}
        edited = edited_source(source.batch) if edited_source and source.batch.sources else None
        vectors = read_sites(model, source.batch, list(mine.values()), edited=edited)
        for (i, (site, _)), read in zip(mine.items(), vectors, strict=True):
            found[i, name] = read, _begins(site, data, name)
    left = torch.full((len(data),), -1, device=data.tokens.device)
    donors = {}
    for i, (_, _, variables) in wanted.items():
        known = {name: found[i, name] for name in variables if (i, name) in found}
        for vectors, _ in list(known.values())[:1]:
            donors[i] = Donor(*zip(*(known.get(name, (vectors, left)) for name in variables), strict=True))
    return donors


def check_sources(data: Batch, places: Iterable[Place], *, nested: bool = False) -> set[str]:
    """The variables that are exchanged; raises where `data` lacks a source for one, or has one that none uses."""
    named = {v for _, _, variables in places for v in variables}
    for name in sorted(named - set(data.sources)) if not nested else ():
        given = ", ".join(map(repr, data.sources)) or "none"
        raise ValueError(
            f"an intervention exchanges {name!r}, and the data has no such source (it has: {given}): pass "
            f"data.with_sources({{{name!r}: …}}), a batch with the rows to take it from"
        )
    for name in sorted(set(data.sources) - named):
        raise ValueError(
            f"the data has a source {name!r} that no intervention exchanges (they exchange: {', '.join(sorted(named))})"
        )
    return named


def _begins(site: Site, data: Batch, name: str) -> Int[Tensor, " rows"]:
    """Where each row's source tokens begin; -1 for rows without."""
    source = data.sources[name]
    own = site.positions.mask(data.view).sum(dim=1).cpu()
    theirs = site.positions.mask(source.batch.view).sum(dim=1).cpu()
    index = source.rows.cpu()
    for row in ((index >= 0) & (own > 0) & (own != theirs[index.clamp(min=0)])).nonzero().flatten().tolist():
        raise ValueError(
            f"row {row}: {site} chooses {int(own[row])} token(s), and {int(theirs[index[row]])} in its source "
            f"{name!r} (row {int(index[row])} there); choose positions that both have equally many of"
        )
    begins = theirs.cumsum(dim=0) - theirs
    return torch.where(index >= 0, begins[index.clamp(min=0)], -1).to(data.tokens.device)
