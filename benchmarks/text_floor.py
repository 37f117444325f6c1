"""A step on real text written by hand: the cone alone, rows in groups of similar length, beginnings computed once.

Plain transformers, no hooks: blocks are called one after the other, a bare low-rank edit between them. What lies below
the first edit is stored, and keys and values of what lies before it, as one tensor per block and group; the last block
computes queries at the targets only. Rows that share a beginning go forward and backward together, and one such family
after the other. Which rows share one, and which are of similar length, is chosen at least cost.
"""

from dataclasses import dataclass

import torch
from floors import WIDTH, LowRank, Stored, plain_model
from shapes import TEXTS, TINY_RATE, edited_of, start_of
from torch.nn import functional as F

OVERHEADS = (65.0, 200.0, 1e9)  # tokens that a beginning has to save: the cheapest of the plans is taken
PASS = 65.0  # what one more pass through edited blocks costs, in tokens
KEY_HEADS, HEAD = 3, 64


class Noted:
    """A cache of transformers that notes the keys and values of one pass."""

    def __init__(self):
        self.pairs = {}

    def update(self, keys, values, block, *args, **_):
        self.pairs[block] = keys, values
        return keys, values

    def before(self, rows):
        """The same in front of each of several rows."""
        keys, values = ({n: pair[i].expand(rows, -1, -1, -1) for n, pair in self.pairs.items()} for i in (0, 1))
        return Stored(keys, values)


@dataclass
class Pass:
    """Rows that are computed together, after what was stored of them or after a beginning."""

    stream: torch.Tensor
    rotary: tuple
    place: torch.Tensor
    allowed: torch.Tensor | None
    stored: Stored | None
    edited: tuple
    """Row and column of each edited token."""
    scored: torch.Tensor
    """`[rows, most targets of a row]`: the columns that the targets are predicted from, the last one repeated."""
    real: tuple
    """Which of these are not repetitions."""
    wanted: torch.Tensor


def plan(ids, limits, lengths):
    """`[(tokens of the beginning, [rows of each pass])]` of a batch, at the least cost."""
    from reftlens.cone.spans import buckets
    from reftlens.text.beginnings import shared_beginnings

    longest, plans = max(map(len, ids)), []
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
    for overhead in OVERHEADS:
        shared = shared_beginnings(tokens, limits, overhead=overhead)
        alone = [r for r in range(len(ids)) if not any(r in b.rows for b in shared)]
        families = [*((b.length, list(b.rows)) for b in shared), *([(0, alone)] if alone else [])]
        parts, cost = [], 0.0
        for before, rows in families:
            left = [lengths[r] - before for r in rows]
            groups = buckets(left, [before] * len(rows), 99, PASS)
            parts.append((before, [[rows[n] for n in group] for group in groups]))
            cost += (before + PASS if before else 0) + sum(len(g) * max(left[n] for n in g) + PASS for g in groups)
        plans.append((cost, parts))
    return min(plans, key=lambda each: each[0])[1]


def rotated(x, cos, sin):
    half = torch.cat([-x[..., HEAD // 2 :], x[..., : HEAD // 2]], dim=-1)
    return x * cos[:, None] + half * sin[:, None]


class Floor:
    """The floor of a shape: `step(batch)` is one optimizer step, and gives the mean loss of its targets."""

    def __init__(self, shape, batches, folder):
        self.model, self.spec = plain_model(folder), TEXTS[shape]
        self.blocks, self.first = self.model.model.layers, min(self.spec["layers"])
        self.edits = {layer: LowRank(WIDTH, self.spec["rank"]) for layer in self.spec["layers"]}
        with torch.no_grad():
            for layer, edit in self.edits.items():
                R, W, b = start_of(layer, WIDTH, self.spec["rank"])
                for parameter, value in ((edit.A, W.T - R), (edit.B, R.T), (edit.b, b)):
                    parameter.copy_(value)
            self.batches = [self._prepared(batch) for batch in batches]
        self.parameters = [p for edit in self.edits.values() for p in edit.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=TINY_RATE)

    # -- what no edit changes ----------------------------------------------------------------------------

    def _prepared(self, batch):
        """Families of a batch: what the beginning is computed from, and the passes of its rows."""
        ids, places = [row[:-1] for row, _ in batch], [edited_of(self.spec["positions"], p) for _, p in batch]
        starts = [at[0] for at in places]
        limits = [0 if at[0] else next(p for n, p in enumerate(at) if p > n) for at in places]
        rows = [self._captured(row, start) for row, start in zip(ids, starts, strict=True)]
        families = []
        for before, groups in plan(ids, limits, [len(stream) for stream, _ in rows]):
            first, head = groups[0][0], None
            if before:
                place = torch.arange(before)[None]
                stream = rows[first][0][None, :before]
                at = torch.tensor([p for p in places[first] if p < before])
                head = stream, self.model.model.rotary_emb(stream, place), place, (torch.zeros_like(at), at)
            passes = [
                self._pass([(batch[r], places[r], starts[r] + before, *rows[r]) for r in group], before)
                for group in groups
            ]
            families.append((head, passes))
        return families

    def _captured(self, row, start):
        """The stream that the first edit changes, from token `start` on; keys and values of the tokens before."""
        from transformers import DynamicCache

        h, cache, place = (
            self.model.model.embed_tokens(torch.tensor([row])),
            DynamicCache(),
            torch.arange(len(row))[None],
        )
        rotary, stream = self.model.model.rotary_emb(h, place), None
        for n, block in enumerate(self.blocks):
            h = run(block, h, None, rotary, place, cache)
            stream = h[0, start:] if n == self.first else stream
            if n == self.first and not start:
                return stream, {}
        above = range(self.first + 1, len(self.blocks))
        return stream, {n: (cache.layers[n].keys[0, :, :start], cache.layers[n].values[0, :, :start]) for n in above}

    def _pass(self, rows, before):
        """Of each row: ids and length of the prompt, edited places, its first token here, stream, keys and values."""
        stream = pad([captured[before:] for _, _, _, captured, _ in rows])
        width = stream.shape[1]
        begins = torch.tensor([begin for _, _, begin, _, _ in rows])
        longest = before or int(begins.max())
        place = begins[:, None] + torch.arange(width)
        slots = torch.arange(longest + width) - longest  # the tokens of the pass from 0 on
        scored = pad([torch.arange(p - 1 - b, len(i) - 1 - b) for (i, p), _, b, _, _ in rows], repeat=True)
        real = [(n, t) for n, ((i, p), *_) in enumerate(rows) for t in range(len(i) - p)]
        edited = [(n, p - b) for n, (_, at, b, _, _) in enumerate(rows) for p in at if p >= b]
        present = slots[None] >= -(begins[:, None] if not before else longest)
        allowed = (slots <= torch.arange(width)[:, None])[None] & present[:, None]
        stored = None
        if rows[0][4]:
            pairs = {
                n: [pad([r[4][n][i].transpose(0, 1) for r in rows], left=True) for i in (0, 1)] for n in rows[0][4]
            }
            stored = Stored(*({n: pair[i].transpose(1, 2).contiguous() for n, pair in pairs.items()} for i in (0, 1)))
        return Pass(
            stream,
            self.model.model.rotary_emb(stream, place),
            place,
            allowed[:, None],
            stored,
            tuple(torch.tensor(edited).unbind(dim=1)),
            scored,
            tuple(torch.tensor(real).unbind(dim=1)),
            torch.tensor([token for (i, p), *_ in rows for token in i[p:]]),
        )

    # -- a step ------------------------------------------------------------------------------------------

    def step(self, batch, only_first=False):
        self.optimizer.zero_grad(set_to_none=True)
        families, total = self.batches[batch][: 1 if only_first else None], 0.0
        count = sum(len(each.wanted) for _, passes in families for each in passes)
        for head, passes in families:
            noted = None if head is None else self._beginning(*head)
            losses = [self._loss(each, noted) for each in passes]
            loss = torch.stack(losses).sum() / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return total

    def _beginning(self, stream, rotary, place, at):
        """Its keys and values in every block above the first edit."""
        noted, h = Noted(), self.edits[self.first](stream[at])
        h = stream.index_put(at, h)
        for n in range(self.first + 1, len(self.blocks) - 1):
            h = run(self.blocks[n], h, None, rotary, place, noted)
            if n in self.edits:
                h[at] = self.edits[n](h[at])
        noted.update(*keys_of(self.blocks[-1], h, rotary), len(self.blocks) - 1)
        return noted

    def _loss(self, each, noted):
        """The sum over the targets of a pass."""
        cache = each.stored if noted is None else noted.before(len(each.stream))
        allowed = None if cache is None else each.allowed  # causal attention by itself has its own fast way
        h = each.stream.index_put(each.edited, self.edits[self.first](each.stream[each.edited]))
        last = len(self.blocks) - 1
        for n in range(self.first + 1, last):
            h = run(self.blocks[n], h, allowed, each.rotary, each.place, cache)
            if n in self.edits:
                h[each.edited] = self.edits[n](h[each.edited])
        keys, values = keys_of(self.blocks[last], h, each.rotary)
        if cache is not None:
            keys, values = cache.update(keys, values, last)
        h = self._last(self.blocks[last], h, each, keys, values)
        if last in self.edits:  # of the edited tokens, only the last of the prompt is scored
            h = torch.cat([self.edits[last](h[:, :1]), h[:, 1:]], dim=1)
        logits = self.model.lm_head(self.model.model.norm(h[each.real]))
        return F.cross_entropy(logits, each.wanted, reduction="sum")

    def _last(self, block, h, each, keys, values):
        """The last block at the scored tokens."""
        attention, rows = block.self_attn, torch.arange(len(h))[:, None]
        h = h[rows, each.scored]
        queries = attention.q_proj(block.input_layernorm(h)).unflatten(-1, (-1, HEAD)).transpose(1, 2)
        queries = rotated(queries, *(x.expand(len(h), -1, -1)[rows, each.scored] for x in each.rotary))
        allowed = each.allowed.expand(len(h), -1, -1, -1)[rows, 0, each.scored][:, None]
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed, enable_gqa=True)
        h = h + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        return h + block.mlp(block.post_attention_layernorm(h))


def run(block, h, allowed, rotary, place, cache):
    h = block(h, attention_mask=allowed, position_embeddings=rotary, position_ids=place, past_key_values=cache)
    return h[0] if isinstance(h, tuple) else h


def keys_of(block, h, rotary):
    x, attention = block.input_layernorm(h), block.self_attn
    keys, values = (p(x).unflatten(-1, (KEY_HEADS, HEAD)).transpose(1, 2) for p in (attention.k_proj, attention.v_proj))
    return rotated(keys, *rotary), values


def pad(rows, left=False, repeat=False):
    """Rows `[n, …]` of several lengths as one tensor, with zeros (or the last entry again)."""
    longest = max(map(len, rows))
    out = rows[0].new_zeros(len(rows), longest, *rows[0].shape[1:])
    for n, row in enumerate(rows):
        out[n, slice(longest - len(row), None) if left else slice(len(row))] = row
        if repeat:
            out[n, len(row) :] = row[-1]
    return out
