"""Do a model and a batch mean the same tokens by the same ids, and is the model run on those of the batch?"""

from typing import Any

from jaxtyping import Int
from torch import Tensor

from reftlens.bridge.classes import check_reads_text
from reftlens.bridge.protocol import Bridge, underlying
from reftlens.text.batch import Batch
from reftlens.text.view import token_text


def check_vocabulary(model: Bridge, batch: Batch, name: str = "data") -> None:
    """Raise where ids of `batch`, or of its sources, have no embedding in `model`, or are another tokenizer's.

    Raises:
        TypeError: for what is no batch.
        ValueError: where there is no row; naming the row and the token, or a token that the two tokenizers number
            differently; a row with more tokens than there are learned positions.
    """
    if not isinstance(batch, Batch):
        makers = "encode_prompts(model, texts) makes one, encode(model, examples) one with completions"
        raise TypeError(f"{name} is a {type(batch).__name__}, expected a Batch: {makers}")
    if not len(batch):
        raise ValueError(f"there is no row in {name}: expected one or more")
    if batch.tokenizer is not None and model.tokenizer is not None and batch.tokenizer is not model.tokenizer:
        _compare(batch.tokenizer.get_vocab(), model.tokenizer.get_vocab(), name)
    root: Any = underlying(model)
    check_reads_text(getattr(root, "config", None), type(root), type(root).__name__)
    rows = root.get_input_embeddings().weight.shape[0]
    if wrong := [token for token in batch.answers if not 0 <= token < rows]:
        raise ValueError(f"answer {wrong[0]} of {name} is no token of the model, which has 0 to {rows - 1}")
    beyond = batch.attention_mask & ((batch.tokens >= rows) | (batch.tokens < 0))
    if beyond.any():
        row, column = beyond.nonzero()[0].tolist()
        token = int(batch.tokens[row, column])
        raise ValueError(
            f"row {row} of {name} holds token {token} ({_shown(batch, token)}), and the model has embeddings for 0 to "
            f"{rows - 1}: where the tokenizer got new tokens, call resize_token_embeddings(len(tokenizer)) before the "
            "bridge is booted"
        )
    length, row = (int(x) for x in batch.attention_mask.sum(dim=1).max(dim=0))
    if getattr(model.cfg, "positional_embedding_type", None) == "standard" and length > model.cfg.n_ctx:
        raise ValueError(f"row {row} of {name} has {length} tokens, and the model has positions for {model.cfg.n_ctx}")
    for variable, source in batch.sources.items():
        check_vocabulary(model, source.batch, f"source {variable!r}")


def _compare(theirs: dict[str, int], ours: dict[str, int], name: str) -> None:
    """Tokens that only one of them has are no obstacle: a batch that holds one is refused by its id."""
    other = [token for token, number in theirs.items() if ours.get(token, number) != number]
    missing = [token for token in theirs if token not in ours]
    if other or len(missing) * 2 > len(theirs):
        token = (other or missing)[0]
        raise ValueError(
            f"{name} was encoded with another tokenizer than the model's: {token!r} is {theirs[token]} there, and "
            f"{ours.get(token, 'unknown')} here: encode the texts with this model"
        )


def check_tokens(batch: Batch, tokens: Int[Tensor, "_ _"]) -> None:
    """Raise where a model is called on `tokens` that are not those of `batch`, each in its own place; padding is free.

    Raises:
        ValueError: naming the shapes, or the first place where they differ.
    """
    advice = "run it on batch.tokens with batch.attention_mask, or encode what it is to be run on"
    if tokens.shape != batch.tokens.shape:
        shapes = f"tokens of shape {list(tokens.shape)}, and the batch has {list(batch.tokens.shape)}"
        raise ValueError(f"the model was called on {shapes}: {advice}")
    differ = batch.attention_mask.to(tokens.device) & (tokens != batch.tokens.to(tokens.device))
    if differ.any():
        row, column = differ.nonzero()[0].tolist()
        here, there = (_shown(batch, int(ids[row, column])) for ids in (tokens, batch.tokens))
        raise ValueError(
            f"the model was called on other tokens than those of the batch: row {row} has {here} at column {column}, "
            f"and the batch {there} (it is padded on the right): {advice}"
        )


def _shown(batch: Batch, token: int) -> str:
    known = batch.tokenizer is not None and 0 <= token < len(batch.tokenizer)
    return repr(token_text(batch.tokenizer, token)) if known else str(token)
