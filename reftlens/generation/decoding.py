"""How the next token is chosen, and which tokens end a text."""

from dataclasses import dataclass

from transformers import LogitsProcessorList
from transformers.generation import logits_process

from reftlens.bridge.protocol import Bridge
from reftlens.numbers import real, whole
from reftlens.text.batch import Batch

COLDEST = 1e-30
"""A temperature above 0 is no lower: logits divided by it would not all be finite in float32."""


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Args:
        max_new_tokens: most tokens written after each prompt; a stop token ends a text before that.
        temperature: 0 is greedy; above 0, tokens are sampled from `softmax(logits / temperature)`.
        top_k: sample from the so many most likely tokens only.
        top_p: sample from the fewest tokens whose probabilities sum to at least this.
        beams: of beam search; more than one needs temperature 0.
        repetition_penalty: divides positive logits of tokens that are there already, and multiplies negative ones.
        no_repeat_ngram: no so many tokens in a row occur twice; 0 allows it.
        seed: of the sampling; the global random state is neither read nor changed.
        verify: compare each way of generating with the full computation on a prompt or two of a few tokens before it
            is first used on a model, and go on in full where they differ.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    seed: int = 0
    verify: bool = True

    def __post_init__(self) -> None:
        for name, least in {"max_new_tokens": 1, "beams": 1, "top_k": 1, "no_repeat_ngram": 0, "seed": None}.items():
            if (value := getattr(self, name)) is not None or name != "top_k":
                object.__setattr__(self, name, whole(value, name, least))
        for name in ("temperature", "top_p", "repetition_penalty"):
            if (value := getattr(self, name)) is not None or name != "top_p":
                object.__setattr__(self, name, float(real(value, name)))  # transformers refuses an int
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}, expected a finite number, 0 (greedy) or more")
        if 0 < self.temperature < COLDEST:
            raise ValueError(f"temperature={self.temperature}, by which logits overflow: 0 is greedy")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}, expected a share above 0, up to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty={self.repetition_penalty}, expected a finite number above 0")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p choose what to sample from, and temperature=0 does not sample")
        if self.beams > 1 and self.temperature > 0:
            raise ValueError("beams and sampling do not go together: use temperature=0 or beams=1")

    def processors(self) -> LogitsProcessorList:
        """transformers' own logits processors for these settings."""
        chain = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            chain.append(logits_process.RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.no_repeat_ngram:
            chain.append(logits_process.NoRepeatNGramLogitsProcessor(self.no_repeat_ngram))
        if self.temperature > 0:
            chain.append(logits_process.TemperatureLogitsWarper(self.temperature))
        if self.top_k is not None:
            chain.append(logits_process.TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            chain.append(logits_process.TopPLogitsWarper(self.top_p))
        return chain


def check_decoding(decoding: object) -> None:
    """Raise `TypeError` where `decoding` is none."""
    if not isinstance(decoding, Decoding):
        raise TypeError(f"decoding={decoding!r}, expected how to choose tokens, such as Decoding(max_new_tokens=64)")


def stop_tokens(model: Bridge, prompts: Batch) -> set[int]:
    """Tokens that end a text: EOS, those of the model's generation settings, the end of a turn after a chat."""
    config = getattr(model.original_model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    ids = set(eos) if isinstance(eos, list | tuple) else {eos}
    if model.tokenizer is not None:
        ids.add(model.tokenizer.eos_token_id)
        if prompts.template is not None and prompts.template.chat:
            ids.add(prompts.template.end_of_turn(model.tokenizer)[-1])
    return {int(i) for i in ids if i is not None}
