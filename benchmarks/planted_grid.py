"""Every cell of a planted network trained in plain torch, many at a time: what a search is measured against.

It shares nothing with the library but the first weights of an intervention: own forward pass, own Adam, own scores.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

RANKS, RATES, SIGNS, STEPS, BATCH = (1, 2, 4, 8), (3e-3, 1e-2, 3e-2), (1, -1), 60, 8
LAYERS, TOKENS, HOOKS = 6, 8, ("attn_out", "mlp_out")
LARGEST = max(RANKS)


class Cell(NamedTuple):
    hook: str
    layer: int
    token: int
    rank: int
    lr: float


class Rows(NamedTuple):
    """Prompts `[row, token]` and answers."""

    ids: Tensor
    answer: Tensor


def norm(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


class Network:
    """A GPT-2 with one head and trivial norms, as functions of a residual stream `[…, token, d]`."""

    def __init__(self, hf_model: Any) -> None:
        body = hf_model.transformer
        self.wte, self.wpe = body.wte.weight.detach(), body.wpe.weight.detach()[:TOKENS]
        self.head = hf_model.lm_head.weight.detach()
        self.blocks = [
            tuple(t.detach() for part in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj)
                  for t in (part.weight, part.bias))
            for b in body.h
        ]  # fmt: skip
        self.mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)

    def attention(self, layer: int, x: Tensor) -> Tensor:
        w, b, o, c = self.blocks[layer][:4]
        q, k, v = (norm(x) @ w + b).chunk(3, dim=-1)
        weights = (
            q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + self.mask[-q.shape[-2] :, -k.shape[-2] :]
        ).softmax(-1)
        return weights @ v @ o + c

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        w, b, o, c = self.blocks[layer][4:]
        return torch.nn.functional.gelu(norm(x) @ w + b, approximate="tanh") @ o + c

    def entering(self, ids: Tensor) -> list[Tensor]:
        """The stream before each attention and each MLP."""
        x, streams = self.wte[ids] + self.wpe, []
        for layer in range(LAYERS):
            streams.append(x)
            x = x + self.attention(layer, x)
            streams.append(x)
            x = x + self.mlp(layer, x)
        return streams

    def after(self, place: int, stream: Tensor, added: Tensor) -> Tensor:
        """Logits of the last token from the stream before half-block `place`, and what that adds (edited)."""
        x = stream + added
        for half in range(place + 1, 2 * LAYERS):
            x = x + (self.mlp if half % 2 else self.attention)(half // 2, x)
        return norm(x[..., -1, :]) @ self.head.T


class Cells:
    """LoReFT at one half-block, one for each token, rank and rate, trained side by side."""

    def __init__(self, network: Network, place: int, weights: Any) -> None:
        self.network, self.place = network, place
        hook, layer = HOOKS[place % 2], place // 2
        self.cells = [Cell(hook, layer, t, r, lr) for t in range(TOKENS) for r in RANKS for lr in RATES]
        first = {rank: weights(rank) for rank in RANKS}
        self.frame = torch.stack([_wide(first[c.rank][0], 1) for c in self.cells])
        self.weight = torch.stack([_wide(first[c.rank][1], 0) for c in self.cells])
        self.bias = torch.stack([_wide(first[c.rank][2], 0) for c in self.cells])
        self.used = torch.stack([(torch.arange(LARGEST) < c.rank).float() for c in self.cells])
        self.tokens = torch.tensor([c.token for c in self.cells])
        self.rate = torch.tensor([c.lr for c in self.cells])

    def logits(self, streams: list[Tensor], strength: float, cells: slice = slice(None)) -> Tensor:
        """`[cell, row, vocabulary]`."""
        stream = streams[self.place]
        half = self.network.mlp if self.place % 2 else self.network.attention
        with torch.no_grad():
            added = half(self.place // 2, stream)
        q, r = torch.linalg.qr(self.frame[cells])
        basis = q * torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)[:, None] * self.used[cells][:, None]
        h = added[:, self.tokens[cells]].transpose(0, 1)
        weight = self.weight[cells] * self.used[cells][:, :, None]
        code = h @ weight.transpose(1, 2) + (self.bias[cells] * self.used[cells])[:, None] - h @ basis
        edit = strength * code @ basis.transpose(1, 2)
        where = torch.nn.functional.one_hot(self.tokens[cells], TOKENS).float()
        return self.network.after(self.place, stream, added + edit[:, :, None] * where[:, None, :, None])

    def train(self, rows: Rows, order: list[list[int]], dev: Rows, rungs: Sequence[int]) -> Tensor:
        """AdamW as the library sets it: rate falling linearly to 0, gradients clipped to norm 1 for each cell.

        Returns:
            The log-probability of each dev answer at both signs after so many steps, `[rung, cell, sign, row]`.
        """
        scores = list[Tensor]()
        parts = [self.frame, self.weight, self.bias]
        moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parts]
        with torch.no_grad():
            streams = self.network.entering(rows.ids)
        for step, some in enumerate(order):
            for part in parts:
                part.requires_grad_()
            logits = self.logits([s[some] for s in streams], 1.0)
            loss = (
                -logits.log_softmax(-1).gather(2, rows.answer[some].expand(len(logits), -1)[..., None])[..., 0].mean(1)
            )
            grads = torch.autograd.grad(loss.sum(), parts)
            norms = sum(g.flatten(1).square().sum(1) for g in grads).sqrt()
            scale = (1 / (norms + 1e-6)).clamp(max=1)
            rate = self.rate * (1 - step / len(order))
            with torch.no_grad():
                for part, grad, (m, v) in zip(parts, grads, moments, strict=True):
                    shape = (-1, *[1] * (part.ndim - 1))
                    g = grad * scale.view(shape)
                    m.mul_(0.9).add_(g, alpha=0.1)
                    v.mul_(0.999).addcmul_(g, g, value=0.001)
                    to = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                    part.requires_grad_(False).sub_(to * rate.view(shape))
            if step + 1 in rungs:
                scores.append(torch.stack([self.scores(dev, float(sign)) for sign in SIGNS], dim=1))
        return torch.stack(scores)

    @torch.no_grad()
    def scores(self, rows: Rows, strength: float) -> Tensor:
        """Log-probability of each answer, `[cell, row]`."""
        streams, out = self.network.entering(rows.ids), []
        for begin in range(0, len(self.cells), 24):
            logits = self.logits(streams, strength, slice(begin, begin + 24))
            out.append(logits.log_softmax(-1).gather(2, rows.answer.expand(len(logits), -1)[..., None])[..., 0])
        return torch.cat(out)


def _wide(x: Tensor, dim: int) -> Tensor:
    """Rank up to the largest; what is added is never used."""
    more = LARGEST - x.shape[dim]
    if x.ndim == 1:
        return torch.cat([x, torch.zeros(more)])
    filler = torch.randn((x.shape[0], more) if dim else (more, x.shape[1]), generator=torch.Generator().manual_seed(9))
    return torch.cat([x, filler], dim=dim)


def grid(
    network: Network, first: Any, train: Rows, dev: Rows, order: list[list[int]], rungs: Sequence[int]
) -> tuple[list[Cell], Tensor]:
    """All cells, and the log-probability of each dev answer after so many steps, `[rung, cell, sign, row]`."""
    cells, scores = [], []
    for place in range(2 * LAYERS):
        some = Cells(network, place, first)
        scores.append(some.train(train, order, dev, rungs))
        cells += some.cells
    return cells, torch.cat(scores, dim=1)
