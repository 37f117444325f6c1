"""One text read twice, unedited and edited: what an edit changes in the residual stream at each layer and token."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.tools.analysis.logit_lens import logit_readout

from reftlens.analysis.places.stream_results import StreamEffects
from reftlens.bridge.protocol import Bridge, check_deterministic, device_of, resolve_hook
from reftlens.bridge.trial import check_predicts
from reftlens.editing.bound import Bound
from reftlens.editing.edits import Edit
from reftlens.editing.engine import attached, check_fired, forward, hooked
from reftlens.editing.reft import ReFT, check_types, training_mode
from reftlens.editing.variant import Variant
from reftlens.errors import check_finite
from reftlens.numbers import whole
from reftlens.scoring.divergence import Softmax, softmax_and_divergence, softmax_of
from reftlens.text.batch import Batch
from reftlens.text.view import token_text


@torch.no_grad()
def stream_effects(
    reft: ReFT, model: Bridge, data: Batch, row: SupportsIndex = 0, *, variant: Variant = Variant(), top: int = 3
) -> StreamEffects:
    """What an edit does to one text, at each layer `l` and token `t`: to the stream, and to what is read from it.

    `change[l, t] = ‖h'[l, t] - h[l, t]‖ / ‖h[l, t]‖`, with `h` and `h'` the residual stream without and with the edit,
    and `divergence[l, t] = KL(p'[l, t] ‖ p[l, t])`, with `p = softmax(unembed(ln_final(h)))` and any soft-cap after it
    (`logit_readout` of TransformerLens; logit lens, nostalgebraist 2020). At the last layer `p` is the model's own
    prediction of the next token. What a middle layer reads is what the unembedding would make of it, had the later
    blocks nothing to add: it says where a change shows, not what it causes. Both are exactly 0 outside the edit's light
    cone, and at strength 0; a change of `h = 0` is infinite. Two forward passes; what is read of an unchanged stream is
    not computed again.

    Args:
        data: a text: `encode_prompts(model, [prompt])`; with a given continuation, `encode(model, examples)`; with what
            the edited model wrote, `generate(reft, model, [prompt]).batch()`.
        row: which of its rows.
        top: how many of the likeliest tokens are kept.

    Raises:
        ValueError: if a site chooses no token of the row, what is exchanged has no source, or the unembedding does not
            read the stream of this model.
        NotFinite: for logits that hold NaN or infinity.
    """
    check_types(reft, model, data)
    check_deterministic(model)
    check_predicts(model)
    top = whole(top, "top", 1)
    text = data[[whole(row, "row")]]
    bound, here = reft.bound_to(model, text, variant), text.to(device_of(model))
    points = _stream(model)
    with training_mode(reft, training=False):
        runs = [_run(model, here, points, edits) for edits in ([], bound.edits(here.view))]
    check_finite(runs[1].logits.amax(), f"the logits at {variant}", "lower the strength, or load a wider dtype")
    reads = [_compared(layer, top) for layer in _layers(model, *runs)]
    change, divergence, ids, probability = (torch.stack(part).cpu() for part in zip(*reads, strict=True))
    tokenizer = text.tokenizer
    tokens = (f"#{i}" if tokenizer is None else token_text(tokenizer, i) for i in text.tokens[0].tolist())
    ids, probability = (part.permute(2, 0, 1, 3) for part in (ids, probability))
    layers, acts = ("embed", *map(str, range(len(points) - 1))), _acts(bound, here, points)
    return StreamEffects(tuple(tokens), layers, acts, change, divergence, ids, probability, tokenizer)


def _stream(model: Bridge) -> list[HookPoint]:
    """What the first block reads, and what each block leaves."""
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(int(model.cfg.n_layers)))]
    hooks = model.hook_dict
    return [resolve_hook(model, name, hooks) for name in names]


class _Run(NamedTuple):
    """One pass over the text."""

    states: list[Float[Tensor, "position d"]]
    """Of each layer, after the edits there."""
    logits: Float[Tensor, "position vocab"]


@dataclass(eq=False, repr=False)
class _Reader:
    """Keeps what passes through a hook."""

    passed: list[Float[Tensor, "position d"]] = field(default_factory=list)

    def __call__(self, h: Tensor, hook: HookPoint) -> None:
        self.passed.append(h[0])


def _run(model: Bridge, text: Batch, points: Sequence[HookPoint], edits: list[Edit]) -> _Run:
    readers = [_Reader() for _ in points]
    hooks = list(zip(points, readers, strict=True))
    with attached(model, edits), hooked(model, hooks):  # hooks are called in the order they came
        logits = forward(model, text.tokens, text.attention_mask)[0]
    check_fired(edits)
    for point, reader in hooks:
        if len(reader.passed) != 1:
            raise ValueError(f"{point.name} fired {len(reader.passed)} times in one forward pass, expected once")
    return _Run([reader.passed[0].to(logits.device) for reader in readers], logits)


class _Layer(NamedTuple):
    """A layer in both runs."""

    before: Float[Tensor, "position d"]
    after: Float[Tensor, "position d"]
    moved: Int[Tensor, " moved"]
    """Positions at which what is read is another one."""
    logits: Float[Tensor, "position vocab"]
    """What is read of the unedited run."""
    moved_logits: Float[Tensor, "moved vocab"]


def _layers(model: Bridge, before: _Run, after: _Run) -> Iterator[_Layer]:
    """One at a time, as each holds logits of every token."""
    for h, edited in zip(before.states[:-1], after.states[:-1], strict=True):
        moved = (edited != h).any(dim=1).nonzero()[:, 0]
        logits = logit_readout(model, h).values
        yield _Layer(h, edited, moved, logits, logit_readout(model, edited[moved]).values if len(moved) else logits[:0])
    moved = (after.logits != before.logits).any(dim=1).nonzero()[:, 0]
    yield _Layer(before.states[-1], after.states[-1], moved, before.logits, after.logits[moved])


class _Read(NamedTuple):
    """What is kept of a layer."""

    change: Float[Tensor, " position"]
    divergence: Float[Tensor, " position"]
    top: Int[Tensor, "position run rank"]
    probability: Float[Tensor, "position run rank"]


def _compared(layer: _Layer, top: int) -> _Read:
    h, moved = layer.before.double(), layer.moved
    size = (layer.after.double() - h).norm(dim=1)
    change = torch.where(size == 0, size, size / h.norm(dim=1))
    unedited = softmax_of(layer.logits)
    divergence, likeliest = torch.zeros_like(change), _likeliest(unedited, top)
    ids, probability = (part[:, None].repeat(1, 2, 1) for part in likeliest)
    if len(moved):
        edited, kl = softmax_and_divergence(layer.moved_logits, unedited, moved)
        divergence[moved] = kl.clamp_min(0)  # below 0 by rounding
        ids[moved, 1], probability[moved, 1] = _likeliest(edited, top)
    return _Read(change, divergence, ids, probability)


def _likeliest(p: Softmax, top: int) -> tuple[Int[Tensor, "position rank"], Float[Tensor, "position rank"]]:
    """Tokens and their probabilities."""
    logits, ids = p.logits.topk(min(top, p.logits.shape[1]), dim=1)
    return ids, (logits.double() - p.top).exp() / p.total


def _acts(bound: Bound, text: Batch, points: Sequence[HookPoint]) -> Bool[Tensor, "layer position"]:
    """Where the sites act: before the first block in the first row, inside a block in that block's, else in the last.

    At strength 0 none does.
    """
    acts = torch.zeros(len(points), text.tokens.shape[1], dtype=torch.bool)
    for i in bound.active if bound.variant.strength != 0.0 else ():
        site, point = bound.places[i].site, bound.places[i].point
        block = re.match(r"blocks\.(\d+)\.", point.name or "")
        early = point is points[0] or "embed" in (point.name or "").replace("unembed", "")
        row = 0 if early else int(block[1]) + 1 if block else -1
        acts[row] |= bound.variant.mask(site, text.view)[0].cpu()
    return acts
