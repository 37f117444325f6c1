"""What an edited model writes: how likely the unedited model finds it, and how much it repeats itself."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT
from reftlens.editing.site import resid_post
from reftlens.editing.variant import Variant
from reftlens.generation.decoding import Decoding
from reftlens.generation.prompt_cache import encoded, prefill
from reftlens.generation.result import Generation
from reftlens.generation.writing import generate
from reftlens.interventions import SteeringVector
from reftlens.numbers import whole
from reftlens.scoring.comparison import pieces
from reftlens.scoring.evaluation import losses_of
from reftlens.scoring.objectives import cross_entropy
from reftlens.text.batch import Batch
from reftlens.text.template import Prompt


def perplexity(
    model: Bridge, data: Batch, *, batch_size: int = 16, reuse: Reuse | None = Reuse()
) -> Float[Tensor, " example"]:
    """`exp` of the mean negative log-likelihood of each row's targets, under the model as it is.

    For generated text (`generation.batch()`) the targets are the generated tokens, given the prompt; what rows begin
    with alike is read once.

    Raises:
        ValueError: where a row has no target.
    """
    nothing = ReFT({resid_post(0, "response"): SteeringVector(int(model.cfg.d_model))})
    plans = [Plan(nothing, Variant(0.0))]
    losses, *_ = losses_of(
        model, data, plans, cross_entropy, reuse, batch_size=batch_size, describe="perplexity", progress=False
    )
    return losses[0].exp()


def repetition(ids: Sequence[int], *, n: int = 3) -> float:
    """Share of the n-grams of tokens that occurred before: 0 where none repeats, near 1 for a loop.

    0 for a text of fewer than `n` tokens.
    """
    n = whole(n, "n", 1)
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True, eq=False)
class Written:
    """Continuations of the same prompts at several doses, and what they are like."""

    texts: tuple[tuple[str, ...], ...]
    """For each dose the continuation of every prompt."""
    perplexity: Float[Tensor, "dose prompt"]
    """Of the continuation under the unedited model, given the prompt; the token that ends it counts."""
    repetition: Float[Tensor, "dose prompt"]
    """Share of 3-grams of tokens that occurred before in the continuation."""
    score: Float[Tensor, "dose prompt"] | None
    """What the caller's own function says of each text."""
    computation: str
    """What of the prompts was read once for all doses; or why nothing was."""


def fluency(
    model: Bridge,
    generations: Sequence[Generation],
    score: Callable[[str], float] | None,
    computation: str,
    *,
    batch_size: int = 16,
    reuse: Reuse | None = Reuse(),
) -> Written:
    """What continuations of the same prompts are like, one `Generation` for each dose."""
    every = Batch.join([generation.batch() for generation in generations])
    texts = tuple(generation.texts for generation in generations)
    repeated = [[repetition(ids) for ids in generation.ids] for generation in generations]
    scores = None
    if score is not None:
        scores = torch.tensor([[_score(score, text) for text in row] for row in texts], dtype=torch.float64)
    return Written(
        texts,
        perplexity(model, every, batch_size=batch_size, reuse=reuse).view(len(generations), -1),
        torch.tensor(repeated, dtype=torch.float64),
        scores,
        computation,
    )


def _score(score: Callable[[str], float], text: str) -> float:
    """Of a text: a finite number, or `ValueError`, which says what came and of which text."""
    value = score(text)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"the score of {text[:80]!r} is {value!r}, expected a finite number, also of an empty text")
    return number


def written(
    reft: ReFT,
    model: Bridge,
    prompts: Sequence[Prompt] | Batch,
    variants: Sequence[Variant],
    decoding: Decoding = Decoding(),
    *,
    score: Callable[[str], float] | None = None,
    chat: bool = False,
    batch_size: int = 16,
    reuse: Reuse | None = Reuse(),
    progress: bool = True,
) -> Written:
    """Continue the prompts under each variant, `batch_size` prompts with all variants in one batch.

    Variants differ in strength only; what no edit can change of the prompts is read once for all of them.

    Raises:
        ValueError: for an intervention that exchanges, as generation has no source to take from.
    """
    batch = encoded(model, prompts, chat=chat, system=None)
    parts: list[list[Generation]] = []
    computation = ""
    with tqdm(total=len(batch) * len(variants), desc="texts", unit="text", disable=not progress) as bar:
        for rows in pieces(len(batch), batch_size):
            cache = prefill(reft, model, batch[list(rows)])
            computation = computation or cache.computation
            settings = replace(decoding, seed=decoding.seed + rows[0])
            parts.append(generate(reft, model, cache, settings, variant=variants))
            bar.update(len(rows) * len(variants))
    generations = [Generation.join(doses) for doses in zip(*parts, strict=True)]
    return fluency(model, generations, score, computation, batch_size=batch_size, reuse=reuse)
