"""The emoji chatbot: a few thousand numbers, learned from forty examples, make a model answer in emoji.

The tutorial of pyreft, rebuilt for SmolLM2-135M-Instruct on data of its own. `emoji_reft` and `SETTINGS` were chosen
by the answers to `emoji_dev.jsonl`, among the small and quick ones; `tutorial_reft` and `TUTORIAL` are the tutorial's.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from reftlens.bridge.protocol import Bridge
from reftlens.editing.reft import ReFT, Variant
from reftlens.editing.site import resid_post
from reftlens.generation.result import Generation
from reftlens.generation.writing import generate
from reftlens.interventions import LoReFT
from reftlens.text.encoding import encode, load_examples
from reftlens.training.config import FitConfig
from reftlens.training.fitting import run_fit
from reftlens.training.result import FitResult

SETTINGS = FitConfig(steps=40, lr=1e-2, batch_size=8)
"""How `run` trains `emoji_reft`."""

TUTORIAL = FitConfig(steps=100, lr=4e-3, batch_size=10, schedule="linear", clip=1.0)
"""The tutorial's training settings; the schedule and the clipping are the Hugging Face Trainer's defaults."""

DECODING: dict[str, Any] = {"max_new_tokens": 32, "no_repeat_ngram": 3}
"""How `answers` generates: greedily, at most 32 tokens, no three tokens twice (an emoji is about three tokens)."""


def emoji_reft(d_model: int, seed: int = 0) -> ReFT:
    """The demo's intervention, untrained."""
    generator = torch.Generator().manual_seed(seed)
    sites = [resid_post(layer, "l3") for layer in (8, 16, 24)]
    return ReFT({site: LoReFT(d_model, rank=4, init="identity", generator=generator) for site in sites})


def tutorial_reft(d_model: int, seed: int = 0) -> ReFT:
    """The tutorial's own intervention, untrained: rank-4 LoReFT after block 8, on the last token of the prompt."""
    return ReFT({resid_post(8, "last"): LoReFT(d_model, rank=4, generator=torch.Generator().manual_seed(seed))})


def run(
    model: Bridge,
    seed: int = 0,
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
    return reft, run_fit(reft, model, data, replace(config, seed=seed), progress=progress)


def answers(reft: ReFT | None, model: Bridge, questions: Sequence[str], strength: float = 1.0) -> Generation:
    """The chatbot's answers, by greedy decoding; strength 0 or no `reft` is the model as it was."""
    return generate(reft, model, questions, chat=True, variant=Variant(strength=strength), **DECODING)


def questions(name: str = "emoji_test.jsonl") -> list[str]:
    """The questions of a data file, by default those that nothing was tuned on."""
    lines = data_file(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines if line.strip()]


def data_file(name: str) -> Path:
    """Where a file of the project's `data/` folder is: in an installed package, else in the checkout around it.

    Raises:
        FileNotFoundError: naming both folders.
    """
    package = Path(__file__).parents[1]
    folders = (package / "data_files", package.parent / "data")
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"no data file {name!r} in {folders[0]} or {folders[1]}")
    return found


# -- emoji in a text ---------------------------------------------------------------------------------------------

# Code points with the Unicode property Emoji (version 17), less ASCII and flags, in two groups.
_PICTURES = """231A-231B 2328 23CF 23E9-23F3 23F8-23FA 24C2 25AA-25AB 25B6 25C0 25FB-25FE 2600-2604 260E 2611
2614-2615 2618 261D 2620 2622-2623 2626 262A 262E-262F 2638-263A 2640 2642 2648-2653 265F-2660 2663 2665-2666 2668
267B 267E-267F 2692-2697 2699 269B-269C 26A0-26A1 26A7 26AA-26AB 26B0-26B1 26BD-26BE 26C4-26C5 26C8 26CE-26CF 26D1
26D3-26D4 26E9-26EA 26F0-26F5 26F7-26FA 26FD 2702 2705 2708-270D 270F 2712 2714 2716 271D 2721 2728 2733-2734 2744
2747 274C 274E 2753-2755 2757 2763-2764 2795-2797 27B0 27BF 2B1B-2B1C 2B50 2B55 3030 303D 3297 3299 1F004 1F0CF
1F170-1F171 1F17E-1F17F 1F18E 1F191-1F19A 1F201-1F202 1F21A 1F22F 1F232-1F23A 1F250-1F251 1F300-1F321 1F324-1F393
1F396-1F397 1F399-1F39B 1F39E-1F3F0 1F3F3-1F3F5 1F3F7-1F4FD 1F4FF-1F53D 1F549-1F54E 1F550-1F567 1F56F-1F570
1F573-1F57A 1F587 1F58A-1F58D 1F590 1F595-1F596 1F5A4-1F5A5 1F5A8 1F5B1-1F5B2 1F5BC 1F5C2-1F5C4 1F5D1-1F5D3
1F5DC-1F5DE 1F5E1 1F5E3 1F5E8 1F5EF 1F5F3 1F5FA-1F64F 1F680-1F6C5 1F6CB-1F6D2 1F6D5-1F6D9 1F6DC-1F6E5 1F6E9
1F6EB-1F6EC 1F6F0 1F6F3-1F6FC 1F7E0-1F7EB 1F7F0 1F90C-1F93A 1F93C-1F945 1F947-1F9FF 1FA70-1FA7C 1FA80-1FAC6 1FAC8
1FACC-1FADD 1FADF-1FAEB 1FAEF-1FAFA"""
_SIGNS = "A9 AE 203C 2049 2122 2139 2194-2199 21A9-21AA 27A1 2934-2935 2B05-2B07"


def _of(ranges: str) -> str:
    """A regular expression's character class."""
    return "[" + "".join(re.sub(r"[0-9A-F]+", lambda m: chr(int(m[0], 16)), part) for part in ranges.split()) + "]"


_ONE = rf"(?:{_of(_PICTURES)}(?!\uFE0E)|{_of(_SIGNS)}\uFE0F)\uFE0F?[\U0001F3FB-\U0001F3FF]?[\U000E0020-\U000E007F]*"
_EMOJI = re.compile(rf"[\U0001F1E6-\U0001F1FF]{{2}}|[0-9#*]\uFE0F?\u20E3|{_ONE}(?:\u200D{_ONE})*")


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
