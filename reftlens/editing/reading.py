"""Hidden states at sites: what mean ablation, fixed directions, exchanges and many analyses start from."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from reftlens.bridge.foreign import foreign_hook, hook_points, modules
from reftlens.bridge.lengths import changes_with_length
from reftlens.bridge.protocol import Bridge, check_deterministic, check_model, device_of, resolve_hook
from reftlens.bridge.trial import check_agrees, last_trial, trial
from reftlens.editing.begun import read_begun
from reftlens.editing.edits import token_vectors
from reftlens.editing.engine import Stop, forward, forward_cached, hooked
from reftlens.editing.site import Site, check_site
from reftlens.errors import check_finite
from reftlens.text.batch import Batch
from reftlens.text.view import Mask
from reftlens.text.vocabulary import check_vocabulary

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

    def chosen(self, site: Site, mask: Mask) -> Sequence[Float[Tensor, "tokens d"]]:
        """What was read at the positions of `site`, of each row."""
        if len(self.states) != 1:
            raise ValueError(f"{site.hook} fired {len(self.states)} times in one forward pass, expected once")
        vectors = token_vectors(self.states[0], site.heads, site.hook)[mask]
        return vectors.split(mask.sum(dim=1).tolist())


@torch.no_grad()
def read_sites(
    model: Bridge,
    data: Batch,
    places: Sequence[tuple[Site, HookPoint]],
    *,
    batch_size: int = 16,
    progress: bool = False,
    edited: Editing | None = None,
    rows: Iterable[int] | None = None,
) -> list[Float[Tensor, "tokens d"]]:
    """Hidden states at the positions of each site, row by row, in the model's dtype; of all rows, or only of `rows`.

    Of the unedited model, or inside the context that `edited` makes. Rows that are the same are read once, beside
    others of their length, to the last chosen token; what rows begin with alike before the first chosen one is computed
    once; and a pass ends at the deepest site. Edited rows are read as they come; and where hooks of the user wait, all
    are, and to the end.
    """
    device, ends, sites = device_of(model), not foreign_hook(hook_points(model), modules(model)), [s for s, _ in places]
    short = ends and edited is None and not trial(model).looks_ahead
    short = short and not changes_with_length(model, int(data.attention_mask.sum(dim=1).max()))
    order = alike = list(range(len(data)) if rows is None else rows)
    if edited is None and ends:
        alike, lengths = _alike(data, alike), data.attention_mask.sum(dim=1).tolist()
        order = sorted(dict.fromkeys(alike), key=lengths.__getitem__)
    read, states = partial(_read, model, places, ends), dict[int, Sequence[Tensor]]()
    with tqdm(total=len(order), desc="activations", unit="example", disable=not progress) as bar:
        if short and not last_trial(model).minds_padding:
            begun = read_begun(read, data[order].to(device), sites, batch_size)
            states.update((order[n], vectors) for n, vectors in begun.items())
            bar.update(len(states))
        left = [row for row in order if row not in states]
        for some in (left[start : start + batch_size] for start in range(0, len(left), batch_size)):
            batch = data[some].to(device)
            context = edited(batch, some) if edited else nullcontext()
            masks = [site.positions.mask(batch.view) for site in sites]
            stop = batch.tokens.shape[1]
            if short:  # up to the last column that is chosen in some row
                stop = max(1, int((torch.stack(masks).any(dim=0).cpu() * torch.arange(1, stop + 1)).max()))
            with context:
                vectors = read(batch.tokens[:, :stop], batch.attention_mask[:, :stop], [m[:, :stop] for m in masks])
            states.update(zip(some, zip(*vectors, strict=True), strict=True))
            bar.update(len(batch))
    at_sites = [torch.cat([states[row][i] for row in alike]) for i in range(len(places))]
    for site, held in zip(sites, at_sites, strict=True):
        check_finite(held, f"the activations at {site}", "load the model in a wider dtype, or look at its weights")
    return at_sites


def _read(
    model: Bridge,
    places: Sequence[tuple[Site, HookPoint]],
    ends: bool,
    tokens: Int[Tensor, "batch seq"],
    real: Bool[Tensor, "batch keys"],
    masks: Sequence[Mask],
    cache: Any = None,
) -> list[Sequence[Float[Tensor, "tokens d"]]]:
    """Of each place what its mask chooses in each row of one pass, after the tokens in `cache`."""
    readers: list[_Reader] = []
    readers += [_Reader(readers, ends) for _ in places]
    hooks = [(point, reader) for (_, point), reader in zip(places, readers, strict=True)]
    with hooked(model, hooks), suppress(Stop):
        if cache is None:
            forward(model, tokens, real)
        else:
            forward_cached(model, tokens, real, cache)
    return [reader.chosen(site, mask) for (site, _), mask, reader in zip(places, masks, readers, strict=True)]


def _alike(data: Batch, rows: Sequence[int]) -> list[int]:
    """For each of `rows` the first that has its tokens in its roles."""
    first: dict[tuple[Any, ...], int] = {}
    real, tokens, role = (x.cpu() for x in (data.attention_mask, data.tokens, data.role))
    keys = ((row, real[row]) for row in rows)
    return [first.setdefault((*tokens[row, mask].tolist(), *role[row, mask].tolist()), row) for row, mask in keys]


@torch.no_grad()
def activations(
    model: Bridge, data: Batch, site: Site, *, batch_size: int = 16, progress: bool = True
) -> Float[Tensor, "tokens d"]:
    """Hidden states of the unedited model at the positions of `site`, row by row, on the CPU in float32 or wider.

    Chosen heads of one token are joined to one vector, as an intervention at the site would see them.

    Raises:
        ValueError: where `site` chooses no token in any row, or the model is in train mode with active dropout.
        HookNotFound: where the model has no such hook.
        NotFinite: for activations that hold NaN or infinity.
    """
    check_site(site)
    check_model(model)
    check_vocabulary(model, data)
    check_deterministic(model)
    check_agrees(model)
    place = (site, resolve_hook(model, site.hook))
    (states,) = read_sites(model, data, [place], batch_size=batch_size, progress=progress)
    if not len(states):
        raise ValueError(f"{site} chooses no token in any of {len(data)} row(s)")
    return states.to("cpu", torch.promote_types(states.dtype, torch.float32))
