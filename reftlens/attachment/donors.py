"""What exchanges put in: hidden states of source rows, read in a pass of the plain model over each source."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from reftlens.attachment.acting import Acting
from reftlens.bridge.protocol import device_of
from reftlens.editing.bound import exchanges_of
from reftlens.editing.sources import Donor, Exchanged, donors_of
from reftlens.editing.variant import Variant
from reftlens.text.batch import Batch


def donors(hf_model: nn.Module, batch: Batch | None, every: Sequence[Acting], variant: Variant) -> dict[int, Donor]:
    """What the sources of the batch hold, by the place among `every` that takes it.

    Raises:
        ValueError: for an exchange without its source in the batch, or with one that has sources itself.
    """
    exchanges = exchanges_of(tuple(acting.place for acting in every), replace(variant, sites=None))
    if exchanges and batch is None:
        one = every[next(iter(exchanges))]
        raise ValueError(
            f"{one.place.intervention.kind} at {one.site} copies from a source: give the rows that the model will be "
            "called on, with their sources, rl.attach(reft, model, batch=data.with_sources(…))"
        )
    if batch is None:
        return {}
    streams = {exchange: every[i].stream for i, exchange in exchanges.items()}

    def read(source: Batch, here: Sequence[Exchanged], rows: Sequence[int]) -> list[Tensor]:
        if source.sources:
            raise ValueError("a source has sources itself: load the model as a TransformerBridge for such an exchange")
        some, seen = source[list(rows)].to(device_of(hf_model)), dict[int, Tensor]()
        with torch.no_grad(), ExitStack() as handles:
            for i, exchange in enumerate(here):
                handles.callback(streams[exchange].register(partial(_kept, seen, i)).remove)
            hf_model(input_ids=some.tokens, attention_mask=some.attention_mask.long())
        return [seen[i][exchange.site.positions.mask(some.view)] for i, exchange in enumerate(here)]

    return donors_of(batch, exchanges, read)


def _kept(seen: dict[int, Tensor], i: int, h: Tensor) -> Tensor:
    seen[i] = h
    return h
