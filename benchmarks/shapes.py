"""The shapes that step times are measured on, as plain data: read by workers of every environment."""

import random

DEPTH = 30  # blocks of SmolLM2-135M
TINY_RATE = 1e-12  # steps on real text learn nothing, so that the losses of all contenders can be compared at each


def llama(blocks, d, heads, key_value_heads, hidden, vocabulary):
    """Fields of a `LlamaConfig`."""
    return dict(
        num_hidden_layers=blocks,
        hidden_size=d,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=d // heads,
        intermediate_size=hidden,
        vocab_size=vocabulary,
    )


SMOL, LLAMA = llama(DEPTH, 576, 9, 3, 1536, 49152), llama(32, 4096, 32, 8, 14336, 128256)
# models with random weights, by name, in place of a folder
RANDOM = {"llama-8b": LLAMA, "llama-tiny": llama(DEPTH, 64, 4, 2, 96, 49152)}

# layers, positions, rank, and the length of prompt and completion of each row
SHAPES = {
    "a": dict(
        layers=[8],
        positions="last",
        rank=4,
        rows=[(40, 20)] * 10,
        what="layer 8, last token, 10 rows of 40 + 20",
    ),
    "b": dict(
        layers=[20],
        positions="last",
        rank=4,
        rows=[(40, 20)] * 10,
        what="layer 20, last token, 10 rows of 40 + 20",
    ),
    "c": dict(
        layers=list(range(DEPTH)),
        positions="f7+l7",
        rank=8,
        rows=[(128, 8)] * 8,
        what="all layers, first and last 7 tokens, rank 8, 8 rows of 128 + 8",
    ),
    "d": dict(
        layers=[15],
        positions="last",
        rank=4,
        rows=[(512, 8)] * 8,
        what="layer 15, last token, 8 rows of 512 + 8",
    ),
    "e": dict(
        layers=[8],
        positions="last",
        rank=4,
        rows=[
            (36, 9),
            (37, 12),
            (38, 14),
            (39, 17),
            (40, 20),
            (42, 24),
            (44, 30),
            (47, 36),
            (50, 90),
            (54, 200),
        ],
        what="layer 8, last token, 10 rows with completions of 9 to 200 tokens",
    ),
}


WHOLE = 20  # steps of (h2) that are measured with capture and check
# on real text: seed of the batches (of 0 to 3 the one whose share of padding is nearest to that of all rows), layers,
# positions, rank, rows of a batch, whether completions end in the EOS token, and the most tokens they may have
TEXTS = {
    "f": dict(
        seed=2,
        layers=list(range(DEPTH)),
        positions="f7+l7",
        rank=8,
        batch=32,
        ends=True,
        most=512,
        what="commonsense mix, all layers, first and last 7 tokens, rank 8, batches of 32",
    ),
    "h1": dict(
        seed=3,
        layers=list(range(DEPTH)),
        positions="f7+l7",
        rank=8,
        batch=16,
        ends=False,
        most=512,
        what="eight-shot SST-2, all layers, first and last 7 tokens, rank 8, batches of 16",
    ),
    "h2": dict(
        seed=3,
        layers=[15],
        positions="last",
        rank=4,
        batch=16,
        ends=False,
        most=512,
        what="eight-shot SST-2, layer 15, last token, rank 4, batches of 16",
    ),
    "i": dict(
        seed=3,
        layers=[8, 16, 24],
        positions="f5+l5",
        rank=4,
        batch=16,
        ends=True,
        most=128,
        what="UltraFeedback (completions cut at 128), layers 8, 16, 24, first and last 5 tokens, batches of 16",
    ),
}

# beside (d), what `dispatches.py` counts
MANY = dict(
    layers=[15],
    positions="last",
    rank=4,
    rows=[(64, 8)] * 64,
    what="layer 15, last token, 64 rows of 64 + 8",
)
DISPATCHED = ("d", "rows64")


def spec_of(name: str, prompt: int | None = None) -> dict:
    """A shape; with prompts of another length where that is given."""
    spec = MANY if name == "rows64" else SHAPES[name]
    if prompt is None:
        return spec
    return {**spec, "rows": [(prompt, c) for _, c in spec["rows"]], "what": f"{spec['what']}, prompts of {prompt}"}


def rows_of(name: str, prompt: int | None = None) -> list[list[int]]:
    """Random token ids, the same in every environment."""
    dice = random.Random(0)
    return [[dice.randrange(10, 40000) for _ in range(sum(lengths))] for lengths in spec_of(name, prompt)["rows"]]


def edited_places(name: str) -> list[list[int]]:
    """Per row the places that are edited; f7+l7 of prompts of 14 tokens or more."""
    return [edited_of(SHAPES[name]["positions"], prompt) for prompt, _ in SHAPES[name]["rows"]]


def edited_of(positions: str, prompt: int) -> list[int]:
    """The places of `last` or of `fN+lM` in a prompt that is longer than N + M."""
    if positions == "last":
        return [prompt - 1]
    first, last = (int(part[1:]) for part in positions.split("+"))
    return [*range(first), *range(prompt - last, prompt)]


def start_of(layer: int, d: int, rank: int):
    """Where every contender starts on real text: the frame `R` `[d, rank]`, `W` and `b` of LoReFT at a layer."""
    import torch

    dice = torch.Generator().manual_seed(layer)
    R = torch.linalg.qr(torch.randn(d, rank, generator=dice, dtype=torch.float64))[0].float()
    W, b = ((torch.rand(*shape, generator=dice) * 2 - 1) / d**0.5 for shape in ((rank, d), (rank,)))
    return R, W, b
