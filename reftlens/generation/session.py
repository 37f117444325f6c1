"""One generation in progress, on the key/value cache: which tokens are edited, and how the next one is chosen."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as lp

from reftlens.bridge.protocol import Bridge, check_deterministic, device_of
from reftlens.editing.engine import Edit, check_fired
from reftlens.editing.reft import ReFT, Variant, check_asked, mode
from reftlens.generation.prefilled import Prefilled, Runner, left_padded
from reftlens.generation.result import Generation, stack_logits
from reftlens.text.batch import Batch
from reftlens.text.template import Template
from reftlens.text.view import Mask, Role, TokenView


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen. Temperature 0 is greedy; more than one beam needs temperature 0."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.beams < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}, beams={self.beams}: both must be 1 or more")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}, expected 0 (greedy) or more")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p choose what to sample from, and temperature=0 does not sample")
        if self.beams > 1 and self.temperature > 0:
            raise ValueError("beams and sampling do not go together: use temperature=0 or beams=1")

    def processors(self) -> LogitsProcessorList:
        """transformers' own logits processors for these settings."""
        chain = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            chain.append(lp.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.no_repeat_ngram:
            chain.append(lp.NoRepeatNGramLogitsProcessor(self.no_repeat_ngram))
        if self.temperature > 0:
            chain.append(lp.TemperatureLogitsWarper(self.temperature))
        if self.top_k is not None:
            chain.append(lp.TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            chain.append(lp.TopPLogitsWarper(self.top_p))
        return chain


def check_writes(reft: ReFT) -> None:
    """Raise for an intervention that exchanges: generation has no source to take from."""
    for site, module in reft.items():
        if module.variables:
            raise ValueError(f"{module.kind} at {site} copies from a source, and generation has none to copy from")


def stop_ids(model: Bridge, chat: bool) -> set[int]:
    """Tokens that end a continuation: EOS, those of the model's generation settings, the end of a chat turn."""
    config = getattr(model.original_model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    ids = set(eos) if isinstance(eos, list | tuple) else {eos}
    if model.tokenizer is not None:
        ids.add(model.tokenizer.eos_token_id)
        if chat:
            ids.add(Template(chat=True).end_of_turn(model.tokenizer)[-1])
    return {int(i) for i in ids if i is not None}


@dataclass
class Session:
    """One generation in progress: left-padded tokens so far, the cache, and which tokens were edited."""

    reft: ReFT | None
    model: Bridge
    prompts: Batch
    variant: Variant
    decoding: Decoding
    stops: set[int]
    ids: list[list[int]] = field(default_factory=list)
    """Tokens generated so far, per row."""
    cache: Any = None
    prefilled: Prefilled | None = None

    def __post_init__(self) -> None:
        if self.reft is not None:
            check_asked(self.reft, self.model)
            check_writes(self.reft)
        if not isinstance(self.variant, Variant):
            raise TypeError(
                f"variant={self.variant!r}, expected a Variant: Variant({self.variant!r}) for that strength"
            )
        check_deterministic(self.model)
        batch, device = self.prompts, device_of(self.model)
        self.tokens, self.role = left_padded(batch, device)
        rows = [t[r != Role.PAD].tolist() for t, r in zip(self.tokens, self.role, strict=True)]
        self.prompt_ids = rows
        longest = self.tokens.shape[1]
        limit = self.model.cfg.n_ctx
        if longest + self.decoding.max_new_tokens > limit:
            raise ValueError(
                f"the longest prompt has {longest} tokens, and with max_new_tokens={self.decoding.max_new_tokens} that "
                f"is more than the model's context of {limit}"
            )
        self.edited: Bool[Tensor, "batch seq"] = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.ids = [[] for _ in rows]
        self.bound = None if self.reft is None else self.reft.to(device).bind(self.model)
        self.sites = [] if self.bound is None else self.bound.active(self.variant)
        self.unused = set(self.sites)
        self.done = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self._require_prompt_sites()
        with torch.no_grad():
            self.bases = {} if self.reft is None else {i: self.reft[i].basis() for i in self.sites}
        self.runner = Runner(self.model)
        self.generators = [torch.Generator(device).manual_seed(self.decoding.seed)]
        self.strengths: dict[int, Float[Tensor, "batch _"]] = {}
        """Of each row at a site, where rows differ; on the CPU."""

    def vary(self, variants: Sequence[Variant]) -> None:
        """Let equal parts of the rows, in order, have the strengths of `variants`, and the same random numbers."""
        assert self.bound is not None
        rows, device = len(self.ids) // len(variants), device_of(self.model)
        for i in self.sites:
            given = [torch.as_tensor(self.bound.strength(v, i), dtype=torch.float64) for v in variants]
            wide = max(one.numel() for one in given)
            self.strengths[i] = torch.stack([one.expand(wide) for one in given]).repeat_interleave(rows, 0)
        self.generators = [torch.Generator(device).manual_seed(self.decoding.seed) for _ in variants]

    def _require_prompt_sites(self) -> None:
        """Raise if a site that can act on the prompt only chooses nothing there."""
        if self.bound is None:
            return
        prompt_sites = [i for i in self.sites if not self.variant.reaches_response(self.bound.reft.sites[i])]
        if prompt_sites:
            view = TokenView(self.tokens, self.role, self.prompts.tokenizer)
            self.bound.require(view, replace(self.variant, sites=prompt_sites))

    @property
    def finished(self) -> bool:
        return bool(self.done.all()) or max(map(len, self.ids)) >= self.decoding.max_new_tokens

    # -- one forward pass --------------------------------------------------------------------------------

    def next_logits(self) -> Float[Tensor, "batch vocab"]:
        """Run what is not in the cache yet (the prompt, or the newest token) and return the last logits."""
        reused = self.runner.ready(self.prefilled) if self.cache is None else None
        new = self.tokens.shape[1] - (reused.start if reused is not None else 0) if self.cache is None else 1
        edits = []
        view = TokenView(self.tokens, self.role, self.prompts.tokenizer)
        for i in self.sites:
            mask = self._mask(i, view)[:, -new:].clone()
            mask[self.done, -1] = False  # a row's stop token goes in only because others go on
            if not mask.any():
                continue
            self.unused.discard(i)
            self.edited[:, -new:] |= mask
            edits += self._edit(i, mask)
        with mode(self.reft, training=False) if self.reft is not None else nullcontext():
            last, self.cache = self.runner.step(
                self.tokens[:, -new:], self.role != Role.PAD, edits, self.cache, reused
            )  # fmt: skip
        check_fired(edits)
        return last.to(torch.promote_types(last.dtype, torch.float32))

    def _edit(self, i: int, mask: Mask) -> list[Edit]:
        """The edit of site `i` at the tokens of `mask`; none at strength 0, so that the model computes bit for bit."""
        assert self.bound is not None
        if i in self.strengths:
            mask = mask & (self.strengths[i] != 0).any(dim=1).to(mask.device)[:, None]
        edit = self.bound.edit(i, mask, self.variant)
        part = edit.parts[0]
        part.basis = self.bases[i]
        if i in self.strengths:
            part.strength = self.strengths[i][edit.rows.cpu()]
            return [edit] if len(edit.rows) else []
        return [] if part.idle else [edit]

    def scores(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        """What the next tokens are chosen by; a penalty for repetition sees the tokens of the row, never padding."""
        processors = self.decoding.processors()
        if self.decoding.repetition_penalty == 1.0 and not self.decoding.no_repeat_ngram:
            return processors(cast(torch.LongTensor, self.tokens), cast(torch.FloatTensor, logits.clone()))
        real = self.role != Role.PAD
        rows = [
            processors(cast(torch.LongTensor, t[keep][None]), cast(torch.FloatTensor, row[None].clone()))
            for t, keep, row in zip(self.tokens, real, logits, strict=True)
        ]
        return torch.cat(rows)

    def _mask(self, i: int, view: TokenView) -> Mask:
        assert self.bound is not None
        site = self.bound.reft.sites[i]
        if self.cache is not None and not self.variant.reaches_response(site):
            return torch.zeros_like(self.edited)
        return self.variant.mask(site, view)

    def append(self, tokens: Int[Tensor, " batch"]) -> None:
        """Take one more token in every row that is not done."""
        going = ~self.done
        pad = torch.full_like(tokens, self.tokens[0, 0].item())
        self.tokens = torch.cat([self.tokens, torch.where(going, tokens, pad)[:, None]], dim=1)
        new_role = torch.where(going, int(Role.GENERATED), int(Role.PAD))
        self.role = torch.cat([self.role, new_role[:, None].to(self.role)], dim=1)
        self.edited = torch.cat([self.edited, torch.zeros_like(going)[:, None]], dim=1)
        for row, token in enumerate(tokens.tolist()):
            if going[row]:
                self.ids[row].append(token)
        stops = torch.tensor(sorted(self.stops), device=tokens.device, dtype=tokens.dtype)
        self.done = self.done | torch.isin(tokens, stops)

    def greedy_or_sampled(self) -> Iterator[Float[Tensor, "batch vocab"]]:
        """Generate step by step; each step yields the logits that its tokens were chosen from."""
        while not self.finished:
            logits = self.next_logits()
            scores = self.scores(logits)
            if self.decoding.temperature > 0:
                parts = zip(scores.softmax(dim=-1).chunk(len(self.generators)), self.generators, strict=True)
                chosen = torch.cat([torch.multinomial(p, 1, generator=g)[:, 0] for p, g in parts])
            else:
                chosen = scores.argmax(dim=-1)
            self.append(chosen)
            yield logits

    # -- the end -----------------------------------------------------------------------------------------

    def warn_of_unused_sites(self) -> None:
        for i in self.unused:
            assert self.reft is not None
            warnings.warn(f"{self.reft.sites[i]} chose no token: the continuations ended before it could", stacklevel=3)

    def result(self, steps: list[Tensor] | None) -> Generation:
        tokenizer = self.prompts.tokenizer
        texts = [] if tokenizer is None else [tokenizer.decode(ids, skip_special_tokens=True) for ids in self.ids]
        kept = [self.edited[i][self.role[i] != Role.PAD].tolist() for i in range(len(self.ids))]
        logits = () if steps is None else tuple(stack_logits(steps, i, len(ids)) for i, ids in enumerate(self.ids))
        return Generation(
            texts=tuple(texts) if texts else tuple("" for _ in self.ids),
            prompt_ids=tuple(tuple(row) for row in self.prompt_ids),
            ids=tuple(tuple(row) for row in self.ids),
            edited=tuple(tuple(row) for row in kept),
            tokenizer=tokenizer,
            logits=logits,
        )
