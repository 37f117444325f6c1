"""What an edited model writes: how likely the unedited model finds it, and how much it repeats itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from reftlens.bridge.protocol import Bridge, check_deterministic, device_of
from reftlens.editing.engine import forward
from reftlens.editing.reft import ReFT
from reftlens.editing.variant import Variant
from reftlens.generation.decoding import Decoding
from reftlens.generation.prompt_cache import encoded, prefill
from reftlens.generation.site_edits import check_writes
from reftlens.generation.writing import generate
from reftlens.scoring.comparison import per_example, pieces
from reftlens.scoring.objectives import cross_entropy
from reftlens.text.batch import Batch
from reftlens.text.template import Prompt


@torch.no_grad()
def perplexity(model: Bridge, data: Batch, *, batch_size: int = 16) -> Float[Tensor, " example"]:
    """`exp` of the mean negative log-likelihood of each row's targets, under the model as it is.

    For generated text (`generation.batch()`) the targets are the generated tokens, given the prompt.

    Raises:
        ValueError: where a row has no target.
    """
    check_deterministic(model)
    data.require_targets()
    found: list[float] = []
    for rows in pieces(len(data), batch_size):
        batch = data[list(rows)].to(device_of(model))
        logits = forward(model, batch.tokens, batch.attention_mask).logits[batch.predicting]
        found += per_example(cross_entropy(logits, batch).double(), batch)
    return torch.tensor(found, dtype=torch.float64).exp()


def repetition(ids: Sequence[int], *, n: int = 3) -> float:
    """Share of the n-grams of tokens that occurred before: 0 where none repeats, near 1 for a loop.

    0 for a text of fewer than `n` tokens.
    """
    if n < 1:
        raise ValueError(f"n={n}, expected 1 or more")
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True, eq=False)
class Written:
    """Continuations of the same prompts at several doses, and what they are like."""

    prompts: tuple[Prompt, ...]
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
    progress: bool = True,
) -> Written:
    """Continue the prompts under each variant, `batch_size` prompts with all variants in one batch.

    Variants differ in strength only; what no edit can change of the prompts is read once for all of them.

    Raises:
        ValueError: for an intervention that exchanges, as generation has no source to take from.
    """
    check_writes(reft)
    batch = encoded(model, prompts, chat=chat, system=None)
    tables = torch.zeros(3, len(variants), len(batch), dtype=torch.float64)
    texts, said = [[""] * len(batch) for _ in variants], ""
    with tqdm(total=len(batch) * len(variants), desc="texts", unit="text", disable=not progress) as bar:
        for rows in pieces(len(batch), batch_size):
            prefilled = prefill(reft, model, batch[list(rows)])
            said = said or prefilled.computation
            settings = replace(decoding, seed=decoding.seed + rows[0])
            for v, made in enumerate(generate(reft, model, prefilled, settings, variant=variants)):
                texts[v][rows[0] : rows[-1] + 1] = made.texts
                tables[0, v, list(rows)] = perplexity(model, made.batch(), batch_size=len(rows))
                tables[1, v, list(rows)] = torch.tensor([repetition(ids) for ids in made.ids], dtype=torch.float64)
                if score is not None:
                    tables[2, v, list(rows)] = torch.tensor([float(score(t)) for t in made.texts], dtype=torch.float64)
                bar.update(len(rows))
    asked = tuple(example.prompt for example in batch.examples)
    return Written(asked, tuple(map(tuple, texts)), tables[0], tables[1], tables[2] if score else None, said)
