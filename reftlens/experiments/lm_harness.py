"""Any task of lm-evaluation-harness on an edited model: its own `HFLM`, over a model that `attach` edits."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from reftlens.attachment.attaching import attach
from reftlens.attachment.generating import Generating
from reftlens.bridge.protocol import is_bridge
from reftlens.editing.reft import ReFT
from reftlens.editing.variant import Variant
from reftlens.files import digest

_BOUNDARY = "white space that ends a context is scored with the continuation"
_CACHED = "answers are of"
"""Under this name a file of `use_cache` tells the record."""
_Request = tuple[Any, list[int], list[int]]
_Row = tuple[int, ...]


def harness(
    reft: ReFT | None,
    hf_model: nn.Module,
    tokenizer: Any,
    variant: Variant = Variant(),
    *,
    batch_size: int | str = 8,
    max_length: int | None = None,
    add_bos_token: bool | None = None,
) -> Any:
    """An `lm_eval` model: `lm_eval.simple_evaluate(rl.experiments.harness(reft, model, tokenizer), tasks=[…])`.

    It is lm-evaluation-harness' own `HFLM`, which batches and orders requests as always, and the edit acts in each
    call of the model: in log-likelihoods the context is the prompt and the continuation its response, in texts that are
    generated the context is the prompt. Between calls the model is as it was. `.record`, which is in the results too
    (`model_info`), says what was edited, and how lm-eval reads texts: it moves white space that ends a context into the
    continuation, and puts BOS in front as `add_bos_token` says.

    Args:
        reft: None for the model as it is.
        hf_model: a plain transformers model, in eval mode.
        batch_size: of `HFLM`; "auto" for the largest that fits.
        max_length: most tokens of a row; longer ones are cut on the left, before the edit; None: those of the model.
        add_bos_token: whether BOS is put in front; None for what the tokenizer does. An edit that was trained on rows
            of `encode` had it: give the tokenizer of the bridge, or one that was loaded with `add_bos_token=True`.

    Raises:
        TypeError: for a bridge, or what else is no transformers model.
        ValueError: for a model in train mode, or one that `attach` edits, here or in a call; for a tokenizer that does
            not do as `add_bos_token` says; for a `use_cache` of lm-eval with the answers of another edit in it.
        ModuleNotFoundError: without the extra `eval`.
    """
    if is_bridge(hf_model) or not isinstance(hf_model, nn.Module):
        raise TypeError(
            f"got a {type(hf_model).__name__}, expected a plain transformers model: AutoModelForCausalLM."
            "from_pretrained(…), with the edit loaded on it by rl.load(folder, model)"
        )
    if hf_model.training:
        raise ValueError("the model is in train mode: call model.eval()")
    _check_unedited(hf_model)
    settings = {"batch_size": batch_size, "max_length": max_length, "add_bos_token": add_bos_token}
    lm = _class()(pretrained=hf_model, tokenizer=tokenizer, **settings)
    lm.reft, lm.variant = reft, variant
    if add_bos_token not in (None, lm.record["add_bos_token"]):
        does = "puts" if lm.record["add_bos_token"] else "does not put"
        raise ValueError(
            f"add_bos_token={add_bos_token}, and the tokenizer {does} BOS in front: load it with "
            f"AutoTokenizer.from_pretrained(…, add_bos_token={add_bos_token})"
        )
    return lm


def _check_unedited(model: Any) -> None:
    """Raise for a model with an edit that no record names, and that takes whole rows for the prompt."""
    if Generating.edits(model.get_base_model() if hasattr(model, "get_base_model") else model):
        raise ValueError(
            "the model is edited by rl.attach, which is not told what of a row is context: call detach(), and give the "
            "ReFT to harness"
        )


@cache
def _class() -> type:
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise ModuleNotFoundError('lm-evaluation-harness is not installed: pip install "reftlens[eval]"') from None
    return type("EditedHFLM", (EditedCalls, HFLM), {})


class EditedCalls:
    """What an `HFLM` calls its model with, edited; which of the tokens are context is told to the attachment."""

    model: Any
    tokenizer: Any
    max_length: int
    reft: ReFT | None = None
    variant: Variant = Variant()
    told: dict[_Row, int] | None = None
    """Of rows without the zeros that end them: how many tokens are context."""

    @property
    def record(self) -> dict[str, Any]:
        """What is edited now, and how texts are read."""
        inner: Any = self
        sites = {} if self.reft is None else self.reft
        return {
            "edited": [f"{site}: {module.label}" for site, module in sites.items()],
            "weights": "" if self.reft is None else digest(self.reft.state_dict()),
            "variant": str(self.variant),
            "boundary": _BOUNDARY,
            "add_bos_token": inner.tok_encode("a")[:1] == [self.tokenizer.bos_token_id],
            "lm_eval": version("lm_eval"),
        }

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        inner: Any = super()
        answers: dict[int, tuple[float, bool]] = {}
        _check_continuations(requests, self.max_length)
        for numbers, told in _rounds(requests, self.max_length):
            self.told = told
            try:
                some = [requests[i] for i in numbers]
                found = inner._loglikelihood_tokens(some, disable_tqdm=disable_tqdm, override_bs=override_bs)
            finally:
                self.told = None
            answers.update(zip(numbers, found, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """With rows of no request, and so without the edit."""
        inner: Any = super()
        reft, self.reft = self.reft, None
        try:
            return inner._detect_batch_size(requests, pos)
        finally:
            self.reft = reft

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        inner: Any = super()
        _check_unedited(self.model)
        if self.reft is None:
            return inner._model_call(inps, attn_mask, labels)
        with attach(self.reft, self.model, self.variant, tokenizer=self.tokenizer) as attachment:
            if self.told is None:  # nobody said what is context: all of it
                return inner._model_call(inps, attn_mask, labels)
            with attachment.prompts([self.told[_key(row)] for row in inps.tolist()]):
                return inner._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        inner: Any = super()
        _check_unedited(self.model)
        edited = nullcontext()
        if self.reft is not None:
            edited = attach(self.reft, self.model, self.variant, tokenizer=self.tokenizer)
        with edited:
            return inner._model_generate(context, max_length, stop, **generation_kwargs)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse a file with answers of another edit: it knows them by their requests alone."""
        inner: Any = super()
        stored, own = cache_hook.dbdict, json.dumps(self.record, sort_keys=True)
        known = stored.get(_CACHED, None if len(stored) else own)
        if known != own:
            raise ValueError(
                f"the answers in this file of use_cache are of {known or 'a model that it does not name'}, and this "
                f"model is {own}: give each edit, and the model as it is, a file of its own"
            )
        stored[_CACHED] = own
        inner.set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        inner: Any = super()
        return {**inner.get_model_info(), "reftlens": self.record}


def _check_continuations(requests: Sequence[_Request], most: int) -> None:
    """Raise where `HFLM` would only assert; a request is `(context, continuation)` as texts, or None, and as tokens."""
    for text, _, continuation in requests:
        if not 0 < len(continuation) <= most:
            shown = "" if text is None else f" {text[1][:60]!r} after {text[0][-60:]!r}"
            raise ValueError(
                f"the continuation{shown} has {len(continuation)} tokens, expected 1 to max_length={most}: see the "
                "answers of the task, or raise max_length"
            )


def _key(row: Sequence[int]) -> _Row:
    """A row without the zeros that end it, as padding does."""
    stop = len(row)
    while stop and row[stop - 1] == 0:
        stop -= 1
    return tuple(row[:stop])


def _rounds(requests: Sequence[_Request], most: int) -> list[tuple[list[int], dict[_Row, int]]]:
    """The numbers of requests, in as few rounds as it takes for equal rows to have contexts of equal length in each.

    Rows are what `HFLM` calls its model with: context and continuation, cut on the left, without the last token.
    """
    rounds: list[tuple[list[int], dict[_Row, int]]] = []
    for i, (_, context, continuation) in enumerate(requests):
        row = (context + continuation)[-(most + 1) :][:-1]
        key, length = _key(row), len(row) - len(continuation) + 1
        numbers, told = next((r for r in rounds if r[1].get(key, length) == length), ([], {}))
        if not numbers:
            rounds.append((numbers, told))
        numbers.append(i)
        told[key] = length
    return rounds
