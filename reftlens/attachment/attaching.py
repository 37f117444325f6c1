"""`attach`: a plain transformers model whose forward passes are edited until the edit is detached."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from reftlens.attachment.acting import Acting, Current, Pass
from reftlens.attachment.blocks import Stream, blocks_of, watch
from reftlens.attachment.calls import Call, filled_cache, read_call
from reftlens.attachment.donors import donors
from reftlens.attachment.generating import Generating, Uncopied
from reftlens.attachment.history import History
from reftlens.attachment.reading import Known, begun, continued
from reftlens.bridge.protocol import is_bridge
from reftlens.editing.reft import ReFT
from reftlens.editing.variant import Variant, check_variant
from reftlens.interventions.base import Intervention
from reftlens.numbers import Integers, whole_numbers
from reftlens.text.batch import Batch
from reftlens.text.positions import Positions, Tokens, Written


def attach(
    reft: ReFT, hf_model: nn.Module, variant: Variant = Variant(), *, tokenizer: Any = None, batch: Batch | None = None
) -> "Attachment":
    """Edit every forward pass of a plain transformers model until `.detach()`, or the end of a `with`.

    `pipeline`, `generate` (greedy, sampled, beams, several texts for a prompt, assisted), `Trainer` evaluation and a
    loop of one's own see an ordinary model; any rows, padded on either side as the attention mask says. Sites are the
    residual stream that enters or leaves a block. A token is of the prompt, or was written after it:

    - inside `attachment.prompts(lengths)`, so many tokens of each row are its prompt;
    - inside `hf_model.generate`, the prompt is what that was given, and what it writes is generated, with a cache or
      without;
    - in a call with `labels` of a causal language model, the tokens before the first that has one are the prompt, and
      the others its response; else every token of a call is of the prompt;
    - in a call that goes on from the cache of an earlier one, its token was generated.

    The edit is in eval mode where the model is. Two attachments act in the order in which they were made. Copying or
    pickling the model is refused while one is attached; `save_pretrained` and `state_dict` hold its own weights.

    Args:
        tokenizer: for positions that are chosen by text, `Tokens` and `Written`.
        batch: the rows that the model is called on, each of them once or equally often, one after the other: their
            roles, chats (`Role`) and sources. Only `DAS`, `Interchange` and `Role` need it; sources are read now.

    Raises:
        ValueError: for a site that is no residual stream or needs a tokenizer or a batch; for an exchange without its
            source. In a call: where it is not clear which tokens are of the prompt, which were read before (a cache of
            another kind, or filled elsewhere) or which are padding; where a site of the prompt alone chooses none.
    """
    return Attachment(reft, hf_model, variant, tokenizer, batch)


class Attachment(Uncopied):
    """A `ReFT` on a plain transformers model, made by `attach`."""

    def __init__(self, reft: ReFT, hf_model: nn.Module, variant: Variant, tokenizer: Any, batch: Batch | None) -> None:
        _check(reft, hf_model, variant)
        self.reft, self.model, self.variant, self.batch = reft, hf_model, variant, batch
        self.tokenizer = tokenizer if tokenizer is not None or batch is None else batch.tokenizer
        given: Any = hf_model
        base: Any = given.get_base_model() if hasattr(given, "get_base_model") else given
        blocks, sites = blocks_of(base), [(i, reft.sites[i], reft[i]) for i in variant.active(reft.sites)]
        self.current, self.calls = Current(), 0
        self.acting = [Acting(i, s, module, Stream(s, blocks), variant, self.current) for i, s, module in sites]
        self._check_places()
        self.causal = bool(getattr(base, "can_generate", bool)())
        for i, donor in donors(hf_model, batch, self.acting, variant).items():
            self.acting[i].donor = donor
        self.entries = list(dict.fromkeys([hf_model, base]))
        self.histories: WeakKeyDictionary[Any, History] = WeakKeyDictionary()
        self.generating = Generating.of(base) if hasattr(base, "generate") else None
        self.handles = [handle for module in self.entries for handle in watch(module, self._before, self._after)]
        self.handles += [acting.stream.register(acting.edited) for acting in self.acting]

    def _check_places(self) -> None:
        seen = set()
        for acting in self.acting:
            site, module = acting.site, acting.place.intervention
            if module.pools and not module.remembers and site.positions.reaches_response:
                raise ValueError(f"{module.kind} pools over a prompt, and {site} chooses tokens after it: use Prompt()")
            among = [] if self.variant.among is None else [self.variant.among]
            if self.tokenizer is None and any(map(_reads_text, [site.positions, *among])):
                raise ValueError(f"{site} chooses tokens by their text: rl.attach(…, tokenizer=tokenizer)")
            if acting.place.spot in seen:
                raise ValueError(f"two sites are one and the same place: {site} and one before it")
            seen.add(acting.place.spot)

    @contextmanager
    def prompts(self, lengths: Integers) -> Iterator[None]:
        """Inside the block each call is on rows whose prompts have so many tokens, padding not counted."""
        before, self.current.lengths = self.current.lengths, whole_numbers(lengths, "prompt length")
        try:
            yield
        finally:
            self.current.lengths = before

    def detach(self) -> None:
        """Leave the model as it was before; warns of a site that has chosen no token. Calling it again does nothing."""
        if not self.handles:
            return
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if self.generating is not None:
            self.generating.leave()
        for acting in self.acting if self.calls else ():
            if not acting.chosen:
                warnings.warn(f"{acting.site} chose no token in {self.calls} call(s)", stacklevel=2)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.detach()
        if kind is None and not self.calls:
            raise RuntimeError(f"no hidden state passed through {self.acting[0].stream.name} inside this block")

    def __repr__(self) -> str:
        state = "attached to" if self.handles else "detached from"
        return f"Attachment({', '.join(map(str, self.reft.sites))}; {state} {type(self.model).__name__})"

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the model begins."""
        if not any(module is entry for entry in self.entries):
            raise ValueError(
                "this is a copy of the model that rl.attach edits, and a copy is edited in part: attach to it"
            )
        models, current = self.entries[self.entries.index(module) :], self.current
        call = read_call(models, args, kwargs, causal=self.causal)
        inner = current.call is not None and module is not current.outer and call.tokens is current.call[0].tokens
        if inner:
            return  # a PeftModel calls the model inside it
        current.call, current.outer = None, module
        here = self._pass(call)
        if here.start == 0:
            self._require(here)
        here.masks.update({acting.i: acting.mask(here.texts.view, here.start) for acting in self.acting})
        current.call, self.calls = (call, here), self.calls + 1

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        """A call of the model has ended, or raised: `output` is None then."""
        current = self.current
        if module is not current.outer:
            return
        now, current.call = current.call, None
        if now is None or output is None:
            return
        call, here = now
        for acting in self.acting:
            if acting.i not in here.fired:
                raise RuntimeError(f"the model was called, and no hidden state passed through {acting.stream.name}")
        if (cache := filled_cache(output, call.cache)) is not None:
            self.histories[cache] = History.of(cache, here.texts, here.decided, self._known().writing)

    def _known(self) -> Known:
        writing = None if self.generating is None else self.generating.current
        return Known(self.tokenizer, self.batch, self.current.lengths, writing)

    def _pass(self, call: Call) -> Pass:
        known, remembering = self._known(), [a.i for a in self.acting if a.place.intervention.remembers]
        if call.past == 0:
            texts = begun(call, known)
            nothing = torch.full((len(call.tokens),), torch.nan)
            return Pass(texts, 0, {i: nothing for i in remembering}, training=self.model.training)
        history = self.histories.get(call.cache)
        if history is None or (known.writing is not None and history.writing is not known.writing):
            raise ValueError(
                "the model was called with a cache that was filled before, elsewhere or in another generate, and what "
                "of it is prompt is not known: give the whole text as the prompt, without past_key_values"
            )
        history = history.now(call.cache, call.past)
        texts = continued(call, history.texts, known)
        return Pass(texts, call.past, dict(history.decided), training=self.model.training)

    def _require(self, here: Pass) -> None:
        """Raise where a site that acts on prompts alone chooses none of their tokens, as `generate` does."""
        on_prompts = [acting.i for acting in self.acting if not acting.reaches_response]
        if on_prompts:
            replace(self.variant, sites=on_prompts).require(self.reft.sites, here.texts.view)


def _check(reft: Any, hf_model: Any, variant: Any) -> None:
    if is_bridge(hf_model):
        raise ValueError("this is a TransformerBridge: use reft.on(model, batch), or rl.generate")
    if not isinstance(reft, ReFT):
        hint = ": put it at a site, ReFT({site: …})" if isinstance(reft, Intervention) else ""
        raise TypeError(f"expected a ReFT, got {type(reft).__name__}{hint}")
    if not isinstance(hf_model, nn.Module):
        raise TypeError(f"expected a transformers model, got {type(hf_model).__name__}")
    if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in hf_model.modules()):
        raise ValueError(
            "torch.compile runs past hooks that come or go after it has seen a model: attach to the original"
        )
    check_variant(variant)


def _reads_text(positions: Positions) -> bool:
    parts = [part for part in vars(positions).values() if isinstance(part, Positions)]
    return isinstance(positions, Tokens | Written) or any(map(_reads_text, parts))
