"""Generation with edits: greedy, sampled, by beams, or streamed, always on the key/value cache.

Positions are absolute. Prompts are run once with the edits that act on them, and what they begin with alike once for
all; each later token is run alone, with the edits whose positions choose it. Hooks are attached for the length of one
forward pass and no longer.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, SupportsFloat, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from reftlens.bridge.protocol import Bridge, check_model
from reftlens.editing.reft import ReFT, check_types
from reftlens.editing.variant import Variant
from reftlens.generation.beams import beam_search
from reftlens.generation.decoding import Decoding, check_decoding
from reftlens.generation.probe import checked
from reftlens.generation.prompt_cache import PromptCache, Prompts, encoded
from reftlens.generation.result import Generation, TextStream
from reftlens.generation.session import Session
from reftlens.text.batch import Batch
from reftlens.text.template import Prompt


@overload
def generate(
    reft: ReFT | None,
    model: Bridge,
    prompts: Prompts,
    decoding: Decoding = ...,
    *,
    chat: bool = ...,
    system: str | None = ...,
    variant: Variant | float = ...,
    keep_logits: bool = ...,
    progress: bool = ...,
) -> Generation: ...
@overload
def generate(
    reft: ReFT | None,
    model: Bridge,
    prompts: Prompts,
    decoding: Decoding = ...,
    *,
    chat: bool = ...,
    system: str | None = ...,
    variant: Iterable[Variant | SupportsFloat],
    keep_logits: bool = ...,
    progress: bool = ...,
) -> list[Generation]: ...
@torch.no_grad()
def generate(
    reft: ReFT | None,
    model: Bridge,
    prompts: Prompts,
    decoding: Decoding = Decoding(),
    *,
    chat: bool = False,
    system: str | None = None,
    variant: Variant | SupportsFloat | Iterable[Variant | SupportsFloat] = Variant(),
    keep_logits: bool = False,
    progress: bool = False,
) -> Generation | list[Generation]:
    """Continue each prompt with the edited model (`reft=None`: the model as it is).

    Which tokens are edited follows from the sites' positions and `variant`: `First`, `Last`, `Nth`, `Tokens` and
    `Prompt` act on the prompt, `Response` and `Generated` on what is generated, `All` on both. What rows begin with
    alike, in tokens and in how they are edited, is read once where that pays: a system prompt, or a prompt that is
    continued at several strengths up to its first edited token.

    Args:
        prompts: texts, lists of chat messages (with `chat=True`), an encoded `Batch` of prompts, or what `prefill`
            made of them.
        chat: put the prompts into the tokenizer's chat template; `system` then adds a system message. A batch, and
            what `prefill` made, come with the template they were encoded with.
        variant: a `Variant`, or a number for that strength. Of a list of them, every prompt is continued under each,
            with the same random numbers, and a list of `Generation` comes back; those that differ in strength only
            are written in one batch.
        keep_logits: also return the logits that each token was chosen from (not with beams).

    Raises:
        ValueError: for an intervention that exchanges, as generation has no source to take from; prompts that leave
            no room in the model's context; a site that can act on prompts only and chooses no token there.
    """
    check_decoding(decoding)
    if keep_logits and decoding.beams > 1:
        raise ValueError("keep_logits needs beams=1: hypotheses change places between steps")
    variants = _variants(reft, variant)
    prompts = _checked(reft, model, prompts, chat, system)
    alike: dict[Variant, list[int]] = {}
    for i, each in enumerate(variants):
        alike.setdefault(replace(each, strength=1.0), []).append(i)
    generations: dict[int, Generation] = {}
    steps = decoding.max_new_tokens * len(alike)
    with tqdm(total=steps, desc="generate", unit="token", disable=not progress) as bar:
        for group in alike.values():
            session = checked(Session(reft, model, prompts, [variants[i] for i in group], decoding))
            generations |= dict(zip(group, _finish(session, keep_logits, bar).split(len(group)), strict=True))
            session.warn_of_unused_sites()
    return [generations[i] for i in range(len(variants))] if isinstance(variant, Iterable) else generations[0]


@torch.no_grad()
def stream(
    reft: ReFT | None,
    model: Bridge,
    prompt: Prompt | PromptCache,
    decoding: Decoding = Decoding(),
    *,
    chat: bool = False,
    system: str | None = None,
    variant: Variant | SupportsFloat = Variant(),
) -> Iterator[str]:
    """The text of `generate`, piece by piece as it is written. A stream that is not read on edits nothing else.

    Raises:
        ValueError: as `generate`, and for beams, or more than one prompt.
    """
    check_decoding(decoding)
    if decoding.beams > 1:
        raise ValueError("a stream needs beams=1: text of a beam can still be given up")
    if not isinstance(prompt, PromptCache | str) and prompt and not isinstance(prompt[0], Mapping):
        raise TypeError(f"a stream is of one prompt, got a list: {prompt!r}")
    prompts = _checked(reft, model, prompt if isinstance(prompt, PromptCache) else [prompt], chat, system)
    if len(prompts) != 1:
        raise ValueError(f"a stream is of one prompt, and {len(prompts)} were prefilled: use generate")
    session = checked(Session(reft, model, prompts, _variants(reft, [variant]), decoding))
    text = TextStream(model.tokenizer)
    for _ in session.greedy_or_sampled():
        piece = text.push(session.rows.ids(0)[-1], last=session.finished)
        if piece:
            yield piece
    session.warn_of_unused_sites()


def _checked(reft: ReFT | None, model: Bridge, prompts: Prompts, chat: bool, system: str | None) -> PromptCache:
    """The prompts, encoded, and in part read where they were read before."""
    check_model(model)
    if reft is not None:
        check_types(reft, model)
    batch = encoded(model, prompts, chat=chat, system=system)
    _warn_of_another_form(reft, batch)
    if not isinstance(prompts, PromptCache):
        return PromptCache(batch, () if reft is None else reft.sites, "nothing was read before")
    prompts.check(reft, model)
    return prompts


def _warn_of_another_form(reft: ReFT | None, batch: Batch) -> None:
    """Warn of chats under an edit that was trained on plain text, and the other way round."""
    if reft is None or reft.chat is None or batch.template is None or batch.template.chat is reft.chat:
        return
    forms = ("as they are", "in the chat template")
    warnings.warn(
        f"the edit was trained on prompts {forms[reft.chat]}, and these stand {forms[not reft.chat]}: "
        f"pass chat={reft.chat}, or encode them so, unless this is meant",
        stacklevel=5,
    )


def _variants(reft: ReFT | None, variant: Any) -> list[Variant]:
    every: list[Any] = list(variant) if isinstance(variant, Iterable) and not isinstance(variant, str) else [variant]
    for each in every:
        if not isinstance(each, Variant | SupportsFloat):
            raise TypeError(f"variant={each!r}, expected a Variant, a number for that strength, or a list of them")
    if not every:
        raise ValueError("variant=[], expected one or more")
    variants = [each if isinstance(each, Variant) else Variant(each) for each in every]
    if reft is None and variants != [Variant()]:
        raise ValueError("variant= says how an edit acts, and reft=None edits nothing: drop it")
    return variants


def _finish(session: Session, keep_logits: bool, bar: Any) -> Generation:
    """Run a session to its end."""
    if session.decoding.beams > 1:
        return Generation.of(beam_search(session, bar))
    steps: list[Tensor] = []
    for logits in session.greedy_or_sampled():
        bar.update()
        steps += [logits] if keep_logits else []
    return Generation.of(session.rows, steps)
