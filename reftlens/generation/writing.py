"""Generation with edits: greedy, sampled, by beams, or streamed, always on the key/value cache.

Positions are absolute. The prompt is run once with the edits that act on it; each later token is run alone, with
the edits whose positions choose it. Hooks are attached for the length of one forward pass and no longer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT, Variant, check_asked
from reftlens.generation.beams import beam_search
from reftlens.generation.decoding import Decoding
from reftlens.generation.prompt_cache import PromptCache
from reftlens.generation.result import Generation, TextStream
from reftlens.generation.session import Session
from reftlens.text.batch import Batch
from reftlens.text.encoding import encode_prompts
from reftlens.text.template import Prompt


@torch.no_grad()
def generate(
    reft: ReFT | None,
    model: Bridge,
    prompts: Sequence[Prompt] | Batch | PromptCache,
    *,
    chat: bool = False,
    system: str | None = None,
    variant: Variant = Variant(),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    seed: int = 0,
    keep_logits: bool = False,
    progress: bool = False,
) -> Generation:
    """Continue each prompt with the edited model (`reft=None`: the model as it is).

    Which tokens are edited follows from the sites' positions and `variant`: `First`, `Last`, `Nth`, `Tokens` and
    `Prompt` act on the prompt, `Response` and `Generated` on what is generated, `All` on both.

    Args:
        prompts: texts, lists of chat messages (with `chat=True`), an encoded `Batch` of prompts, or what `prefill`
            made of them.
        seed: of the sampling; the global random state is neither read nor changed.
        keep_logits: also return the logits that each token was chosen from (not with beams).
    """
    decoding = Decoding(
        max_new_tokens, temperature, top_k, top_p, beams, repetition_penalty, no_repeat_ngram, seed
    )  # fmt: skip
    if keep_logits and beams > 1:
        raise ValueError("keep_logits needs beams=1: hypotheses change places between steps")
    session = _session(reft, model, prompts, chat, system, [variant], decoding)
    return _written(session, keep_logits, progress)


@torch.no_grad()
def generate_each(
    reft: ReFT,
    model: Bridge,
    prompts: Batch | PromptCache,
    variants: Sequence[Variant],
    *,
    chat: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    no_repeat_ngram: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> list[Generation]:
    """Continue each prompt under each variant, all in one batch: what `generate` gives for each, up to rounding.

    Args:
        variants: that differ in strength only.
        seed: of the sampling; the same random numbers for every variant.
    """
    if not variants or any(replace(v, strength=1.0) != replace(variants[0], strength=1.0) for v in variants):
        raise ValueError(f"{len(variants)} variant(s), expected one or more that differ in strength only")
    decoding = Decoding(max_new_tokens, temperature, no_repeat_ngram=no_repeat_ngram, seed=seed)
    session = _session(reft, model, prompts, chat, None, variants, decoding)
    return _written(session, False, progress).split(len(variants))


@torch.no_grad()
def stream(
    reft: ReFT | None,
    model: Bridge,
    prompt: Prompt | PromptCache,
    *,
    chat: bool = False,
    system: str | None = None,
    variant: Variant = Variant(),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    seed: int = 0,
) -> Iterator[str]:
    """The text of `generate`, piece by piece as it is written. A stream that is not read on edits nothing else."""
    decoding = Decoding(
        max_new_tokens, temperature, top_k, top_p, 1, repetition_penalty, no_repeat_ngram, seed
    )  # fmt: skip
    if not isinstance(prompt, PromptCache | str) and prompt and not isinstance(prompt[0], Mapping):
        raise TypeError(f"a stream is of one prompt, got a list: {prompt!r}")
    prompts = prompt if isinstance(prompt, PromptCache) else [prompt]
    session = _session(reft, model, prompts, chat, system, [variant], decoding)
    if len(session.rows) != 1:
        raise ValueError(f"a stream is of one prompt, and {len(session.rows)} were prefilled: use generate")
    text = TextStream(model.tokenizer)
    for _ in session.greedy_or_sampled():
        piece = text.push(session.rows.ids(0)[-1], last=session.finished)
        if piece:
            yield piece
    session.warn_of_unused_sites()


def _session(
    reft: ReFT | None, model: Bridge, prompts: Sequence[Prompt] | Batch | PromptCache, chat: bool, system: str | None,
    variants: Sequence[Variant], decoding: Decoding,
) -> Session:  # fmt: skip
    if reft is not None:
        check_asked(reft, model)
    if not all(isinstance(variant, Variant) for variant in variants):
        raise TypeError(f"variant={variants[0]!r}, expected a Variant: Variant({variants[0]!r}) for that strength")
    if isinstance(prompts, PromptCache):
        if chat or system is not None:
            raise ValueError("prefilled prompts come with their template: drop chat and system")
        prompts.check(reft, model)
    else:
        batch = prompts if isinstance(prompts, Batch) else encode_prompts(model, prompts, chat=chat, system=system)
        prompts = PromptCache(batch, chat, () if reft is None else reft.sites, "nothing was read before")
    return Session(reft, model, prompts, variants, decoding)


def _written(session: Session, keep_logits: bool, progress: bool) -> Generation:
    """Run the session to its end."""
    steps: list[Tensor] = []
    with tqdm(total=session.decoding.max_new_tokens, desc="generate", unit="token", disable=not progress) as bar:
        if session.decoding.beams > 1:
            rows = beam_search(session, bar)
        else:
            for logits in session.greedy_or_sampled():
                bar.update()
                steps += [logits] if keep_logits else []
            rows = session.rows
    session.warn_of_unused_sites()
    return Generation.of(rows, steps)
