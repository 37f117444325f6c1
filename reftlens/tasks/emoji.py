"""The emoji chatbot: a few thousand numbers, learned from forty examples, make a model answer in emoji.

The tutorial of pyreft, rebuilt for SmolLM2-135M-Instruct on data of its own. `emoji_reft` and `SETTINGS` were chosen
by the answers to `emoji_dev.jsonl`, among the small and quick ones; `tutorial_reft` and `TUTORIAL` are the tutorial's.
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

import regex

from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT
from reftlens.editing.site import resid_post
from reftlens.generation.decoding import Decoding
from reftlens.generation.result import Generation
from reftlens.generation.writing import generate
from reftlens.interventions import LoReFT
from reftlens.numbers import seeded
from reftlens.text.encoding import encode
from reftlens.text.loading import load_examples, records
from reftlens.training.config import FitConfig
from reftlens.training.fitting import fit
from reftlens.training.result import FitResult

SETTINGS = FitConfig(steps=40, lr=1e-2, batch_size=8)
"""How `run` trains `emoji_reft`."""

TUTORIAL = FitConfig(steps=100, lr=4e-3, batch_size=10, schedule="linear", clip=1.0)
"""The tutorial's training settings; the schedule and the clipping are the Hugging Face Trainer's defaults."""

DECODING = Decoding(max_new_tokens=32, no_repeat_ngram=3)
"""How `answers` generates: greedily, at most 32 tokens, no three tokens twice (an emoji is about three tokens)."""


def emoji_reft(d_model: int, seed: SupportsIndex = 0) -> ReFT:
    """The demo's intervention, untrained."""
    generator = seeded(seed)
    sites = [resid_post(layer, "l3") for layer in (8, 16, 24)]
    return ReFT({site: LoReFT(d_model, rank=4, init="identity", generator=generator) for site in sites})


def tutorial_reft(d_model: int, seed: SupportsIndex = 0) -> ReFT:
    """The tutorial's own intervention, untrained: rank-4 LoReFT after block 8, on the last token of the prompt."""
    return ReFT({resid_post(8, "last"): LoReFT(d_model, rank=4, generator=seeded(seed))})


def run(
    model: Bridge,
    seed: SupportsIndex = 0,
    *,
    reft: ReFT | None = None,
    config: FitConfig = SETTINGS,
    progress: bool = True,
) -> tuple[ReFT, FitResult]:
    """A trained chatbot and the record of its training on `emoji.jsonl`; `seed` sets weights and data order.

    For the tutorial's own: `run(model, reft=tutorial_reft(model.cfg.d_model), config=TUTORIAL)`. A `reft` that is
    given is trained in place.
    """
    reft = emoji_reft(model.cfg.d_model, seed) if reft is None else reft
    data = encode(model, load_examples(data_file("emoji.jsonl")), chat=True)
    return reft, fit(reft, model, data, config, seed=seed, progress=progress)


def answers(reft: ReFT | None, model: Bridge, questions: Sequence[str], strength: float = 1.0) -> Generation:
    """The chatbot's answers, by greedy decoding; strength 0 or no `reft` is the model as it was."""
    return generate(reft, model, questions, DECODING, chat=True, variant=strength)


def questions(name: str = "emoji_test.jsonl") -> list[str]:
    """The questions of a data file, by default those that nothing was tuned on."""
    return [record["prompt"] for _, record in records(data_file(name))]


def data_file(name: str) -> Path:
    """Where a file of the project's `data/` folder is: in an installed package, else in the checkout around it.

    Raises:
        FileNotFoundError: naming both folders.
    """
    package = Path(__file__).parents[1]
    folders = (package / "data_files", package.parent / "data")
    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no data file {name!r} in {folders[0]} or {folders[1]}")
    return path


# -- emoji in a text ---------------------------------------------------------------------------------------------

_SIGNS = "[©®‼⁉™ℹ↔-↙↩↪➡⤴⤵⬅-⬇]"
"""Signs that are text unless U+FE0F follows."""
_PICTURES = rf"[\p{{Emoji}}--\p{{ASCII}}--\p{{Regional_Indicator}}--{_SIGNS}]"
_SINGLE = rf"(?:{_PICTURES}(?!\uFE0E)|{_SIGNS}\uFE0F)\uFE0F?\p{{Emoji_Modifier}}?[\U000E0020-\U000E007F]*"
_EMOJI = regex.compile(rf"\p{{RI}}{{2}}|[0-9#*]\uFE0F?\u20E3|{_SINGLE}(?:\u200D{_SINGLE})*", regex.VERSION1)


def emoji_share(text: str) -> float:
    """Share of the visible characters of `text`, as a reader would count them, that are emoji; 0.0 for no text.

    An emoji with its skin tone, variation selector, tags or joined partners counts as one, and so do a flag and
    a keycap. A symbol that is both text and emoji (a heart, a star) counts as emoji unless U+FE0E asks for text;
    arrows, ©, ®, ™, ℹ, ‼ and ⁉ only where U+FE0F asks for emoji. White space, control characters and combining
    marks are not counted; half an emoji (U+FFFD, or half a flag) counts as a character that is none.
    """
    rest, emoji = _EMOJI.subn("", text)
    other = sum(unicodedata.category(character)[0] not in "ZCM" for character in rest)
    return emoji / (emoji + other) if emoji else 0.0
