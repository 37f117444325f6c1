"""One generation in progress, on the key/value cache."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from reftlens.bridge.exclusive import exclusive
from reftlens.bridge.lengths import length_limit
from reftlens.bridge.protocol import Bridge, check_deterministic, device_of
from reftlens.bridge.trial import check_predicts, last_trial
from reftlens.editing.edits import Edit
from reftlens.editing.engine import attached, check_fired, forward
from reftlens.editing.reft import ReFT, training_mode
from reftlens.editing.variant import Variant
from reftlens.errors import check_finite
from reftlens.generation.decoding import Decoding, stop_tokens
from reftlens.generation.prompt_cache import PromptCache
from reftlens.generation.rows import Rows
from reftlens.generation.runner import PromptStates, Runner
from reftlens.generation.site_edits import SiteEdits
from reftlens.generation.stages import Stage, stages


class Session:
    """One generation in progress: all prompts under the first variant, then under the next, in one batch.

    Args:
        variants: that differ in strength only.

    Raises:
        ValueError: for a model in train mode with active dropout, prompts that leave no room in its context, and
            where `SiteEdits` cannot be.
    """

    def __init__(
        self, reft: ReFT | None, model: Bridge, prompts: PromptCache, variants: Sequence[Variant], decoding: Decoding
    ) -> None:
        check_deterministic(model)
        check_predicts(model)
        device = device_of(model)
        self.reft, self.model, self.decoding, self.variants = reft, model, decoding, variants
        self.prompts = prompts
        self.rows = Rows.of(prompts.prompts[list(range(len(prompts))) * len(variants)], device)
        limit, longest = length_limit(model), self.rows.tokens.shape[1] + decoding.max_new_tokens
        self.in_full = last_trial(model).minds_padding or (limit is not None and longest > limit[1])
        """Whether every row is computed alone and from its first token, at each step."""
        if self.in_full:
            warnings.warn(
                "texts are written in full, one row at a time, which is slow: on this model padding, or the length "
                "that a row will reach, changes what is computed of its tokens",
                stacklevel=4,
            )
        self.length = 0
        """Tokens written so far."""
        self.cache: Any = None
        self._going: tuple[Tensor, Tensor] | None = None
        """Rows that the cache still holds, where some have left it, and for each of all rows its place among them."""
        self._check_room()
        self.edits = None if reft is None else SiteEdits(reft, model, variants, self.rows)
        self.runner = Runner(model)
        self.stops = torch.tensor(sorted(stop_tokens(model, prompts.prompts)), dtype=torch.long, device=device)
        self.whole = Stage(self.prompts.states.start if self.prompts.states else 0, self.rows.tokens.shape[1])
        self.stages = [self.whole]
        """How the prompts are read."""
        self.generators = [torch.Generator(device).manual_seed(decoding.seed) for _ in variants]
        """Of random numbers, the same for every variant."""

    def _check_room(self) -> None:
        longest, limit = self.rows.tokens.shape[1], self.model.cfg.n_ctx
        if longest + self.decoding.max_new_tokens > limit:
            raise ValueError(
                f"the longest prompt has {longest} tokens, and with max_new_tokens={self.decoding.max_new_tokens} that "
                f"is more than the model's context of {limit}"
            )

    def share(self, overhead: float) -> None:
        """Read what prompts begin alike once, where that pays at this `overhead` of a pass, in tokens."""
        if len(self.rows) == 1 or self.in_full or self.runner.obstacle():
            return
        computations, limit = self.rows.tokens, self.whole.stop
        if self.edits is not None:
            computations, limit = self.edits.computations(self.rows)
        start = self.whole.start
        self.stages = stages(computations, self.rows.real, start=start, limit=limit, overhead=overhead)

    @property
    def finished(self) -> bool:
        return bool(self.rows.done.all()) or self.length >= self.decoding.max_new_tokens

    def next_logits(self) -> Float[Tensor, "row vocab"]:
        """Run what is not in the cache yet (the prompt, or the newest token) and return the last logits."""
        if self.in_full:
            logits = torch.stack([self.logits_alone(row)[-1] for row in range(len(self.rows))])
        else:
            with exclusive(self.model):
                logits = self._newest()
        where = f"the logits of token {self.length + 1} at {'; '.join(dict.fromkeys(map(str, self.variants)))}"
        hint = "lower the strength, or load the model in a wider dtype"
        check_finite(logits.amax(), where, hint)  # a model may forbid a token by a logit of minus infinity
        return logits

    def _newest(self) -> Float[Tensor, "row vocab"]:
        width, cache, states = self.rows.tokens.shape[1], self.cache, None
        steps = [Stage(0 if cache is None else width - 1, width, *(self._going or ()))]
        if cache is None and not self.runner.obstacle():
            steps, states = self.stages, self.prompts.states
        edited = None
        with nullcontext() if self.reft is None else training_mode(self.reft, training=False):
            for stage in steps:
                rows = stage.of(self.rows)
                if edited is not None:
                    rows.edited[:, : stage.start] |= edited
                logits, cache = self._computed(stage, rows, cache, states)
                if self.cache is None:
                    stage.hand_on(cache)
                    edited = stage.columns(rows.edited[:, : stage.stop])
        if edited is not None:
            self.rows.edited[:, : stage.stop] |= edited & self.rows.real
        if states is not None:
            states.fill(cache, self._prompts())
        self.cache = cache
        return stage.to_all(logits).to(torch.promote_types(logits.dtype, torch.float32))

    def _computed(self, stage: Stage, rows: Rows, cache: Any, states: PromptStates | None) -> tuple[Tensor, Any]:
        """The logits after the last column of a stage, for its rows, and the cache with its columns."""
        edits, below = list[Edit](), []
        here = self.edits if self.edits is None or stage.rows is None else self.edits.of(stage.rows)
        if here is not None:
            edits = here.at(rows, stage.start, stage.stop)
        if states is not None and self.runner.body is not None:
            some = self._prompts() if stage.rows is None else self._prompts()[stage.rows]
            cache, below = states.enter(self.runner.body, some, stage.start, stage.stop, cache)
        computed = self.runner.step(rows.until(stage.stop), stage.stop - stage.start, edits, cache, below)
        check_fired(edits)
        if self.edits is not None and here is not None and stage.stop == self.rows.tokens.shape[1]:
            self.edits.decided = {i: stage.to_all(decided) for i, decided in here.decided.items()}
        if self._going is not None:
            self.rows.edited[self._going[0], stage.start : stage.stop] = rows.edited[:, stage.start : stage.stop]
        return computed

    def _leave(self) -> None:
        """Take rows that have ended out of the cache, once a quarter of what it holds has."""
        if self.cache is None or self.runner.obstacle():  # hooks of the user see every row
            return
        every = torch.arange(len(self.rows), device=self.rows.tokens.device)
        held, places = self._going or (every, every)
        going = (~self.rows.done).nonzero()[:, 0]
        if 0 < len(going) <= 0.75 * len(held) and all(isinstance(layer, DynamicLayer) for layer in self.cache.layers):
            self.cache.reorder_cache(places[going])
            self._going = going, torch.zeros_like(every).scatter(0, going, every[: len(going)])

    def _prompts(self) -> Int[Tensor, " row"]:
        """Of each row, at the first step, the number of its prompt."""
        return torch.arange(len(self.rows), device=self.rows.tokens.device) % len(self.prompts)

    def logits_alone(self, row: int) -> Float[Tensor, "column vocab"]:
        """Of all tokens of one row, computed without a cache, padding or other rows."""
        rows, number = self.rows.alone(row), self.stops.new_tensor([row])
        edits = [] if self.edits is None else self.edits.of(number).at(rows, 0, rows.tokens.shape[1])
        mode = nullcontext() if self.reft is None else training_mode(self.reft, training=False)
        with attached(self.model, edits), mode:
            logits = forward(self.model, rows.tokens, rows.real)[0]
        check_fired(edits)
        self.rows.edited[row, self.rows.real[row]] = rows.edited[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def scores(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        """What the next tokens are chosen by; a penalty for repetition sees the tokens of the row, never padding."""
        processors = self.decoding.processors()
        if self.decoding.repetition_penalty == 1.0 and not self.decoding.no_repeat_ngram:
            return processors(cast(torch.LongTensor, self.rows.tokens), cast(torch.FloatTensor, logits.clone()))
        rows = [
            processors(cast(torch.LongTensor, tokens[real][None]), cast(torch.FloatTensor, row[None].clone()))
            for tokens, real, row in zip(self.rows.tokens, self.rows.real, logits, strict=True)
        ]
        return torch.cat(rows)

    def take(self, rows: Int[Tensor, " rows"]) -> None:
        """Go on with the rows of these numbers, some of them left out or there several times."""
        self.rows = self.rows.take(rows)
        if self.edits is not None:
            self.edits.take(rows)
        if self.cache is not None:  # a model that checkpoints gradients in train mode keeps none
            self.cache.reorder_cache(rows)

    def append(self, tokens: Int[Tensor, " row"]) -> None:
        """Take one more token in every row that is not done."""
        self.rows, self.length = self.rows.append(tokens, self.stops), self.length + 1

    def greedy_or_sampled(self) -> Iterator[Float[Tensor, "row vocab"]]:
        """Generate step by step; each step yields the logits that its tokens were chosen from."""
        while not self.finished:
            logits = self.next_logits()
            scores = self.scores(logits)
            if self.decoding.temperature > 0:
                parts = zip(scores.softmax(dim=-1).chunk(len(self.generators)), self.generators, strict=True)
                tokens = torch.cat([torch.multinomial(p, 1, generator=g)[:, 0] for p, g in parts])
            else:
                tokens = scores.argmax(dim=-1)
            self.append(tokens)
            self._leave()
            yield logits

    def warn_of_unused_sites(self) -> None:
        """Warn of sites whose turn never came."""
        for site in [] if self.edits is None else self.edits.unused_sites():
            warnings.warn(f"{site} chose no token: the continuations ended before it could", stacklevel=4)
