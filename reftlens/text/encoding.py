"""Examples of text, and the batches of tokens made of them.

The prompt is tokenised exactly as it will be at generation time, the completion continues it, and the boundary
between them is checked. Templates are applied once, a BOS token appears once, and nothing is cut unless asked.
"""

import warnings
from collections.abc import Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from reftlens.bridge.protocol import Bridge
from reftlens.errors import check_one_of
from reftlens.text.batch import Batch, batch_from_rows
from reftlens.text.template import Example, Prompt, Template
from reftlens.text.tokenising import plain_text, split_row, tokenise
from reftlens.text.turns import turn_marks
from reftlens.text.view import TokenRole
from reftlens.text.vocabulary import check_vocabulary


def encode(
    model: Bridge,
    examples: Sequence[Example],
    *,
    chat: bool = False,
    system: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    end: bool = True,
    max_length: int | None = None,
    truncate: Literal["prompt", "completion"] | None = None,
    boundary: Literal["check", "split"] = "check",
    continue_last: bool = False,
    among_answers: Sequence[str | int] | None = None,
) -> Batch:
    """Tokenise prompts with their completions; the completions, and an end token after each, are the targets.

    Nothing is put between the two: a completion begins with the space that it needs, `" she"`.

    An answer of one token thus has two targets: with `end=False` the answer alone is learned and scored.

    Text outside a chat template begins with the BOS token, if the bridge's tokenizer uses one: TransformerLens has it
    put there, also where `AutoTokenizer` of the same model does not. A chat template puts it where it wants it.

    Args:
        chat: apply the tokenizer's chat template; `system` then adds a system message.
        template_arguments: what the chat template takes beside the messages, such as `{"enable_thinking": False}`.
        end: learn to stop, too: the end-of-turn token of the template, or the EOS token, is a target.
        max_length: longest row in tokens, by default the model's context.
        truncate: what a longer row loses: the start of the prompt or the end of the completion. Without it a
            longer row is an error. Of a chat the oldest messages are cut, never what the template writes, nor a system
            message. `Batch.truncated` and a warning report which rows were cut.
        boundary: "check" refuses a row in which prompt and completion merge into one token at the boundary;
            "split" tokenises them apart.
        continue_last: the prompts are chats that end in a turn of the assistant, and the completions continue it.
        among_answers: labels of one token each, such as `[" yes", " no"]`, which alone are scored among, with
            `end=False`; see `Batch.among_answers`.

    Warns where a message or a completion of a chat holds a control token, such as an end of turn, as it acts as one.

    Raises:
        ValueError: naming the row (from 0), for an empty prompt, an empty completion, a row that is too long, a
            merged boundary, or a template that changes the completion.
    """
    tokenizer = _tokenizer(model)
    check_one_of("truncate", truncate, (None, "prompt", "completion"))
    check_one_of("boundary", boundary, ("check", "split"))
    template = Template(chat, system, dict(template_arguments or {}), continue_last)
    limit = model.cfg.n_ctx if max_length is None else max_length
    ids, roles, cut, prompts, heads = [], [], [], [], []
    for i, example in enumerate(_some(examples)):
        _check_example(example, i)
        head, tail = split_row(tokenizer, example.prompt, example.completion, i, template, end, boundary)
        if len(head) + len(tail) > limit:
            cut.append(i)
            if chat and truncate == "prompt":
                short = _shortened(tokenizer, example, i, template, len(head) + len(tail), limit, end, boundary)
                head, tail = split_row(tokenizer, short.prompt, short.completion, i, template, end, boundary)
                example = short  # as its tokens are
            else:
                head, tail = _cut(head, tail, limit, truncate, i, tokenizer)
        ids.append(head + tail)
        prompts.append(example.prompt)
        heads.append(head)
        roles.append([int(TokenRole.PROMPT)] * len(head) + [int(TokenRole.RESPONSE)] * len(tail))
    if cut:
        warnings.warn(f"{len(cut)} row(s) were cut to {limit} tokens at the {truncate}: {cut[:10]}", stacklevel=2)
    _warn_of_control_tokens(tokenizer, template, examples)
    turns = turn_marks(tokenizer, template, prompts, heads)
    batch = batch_from_rows(ids, roles, examples=examples, tokenizer=tokenizer, turns=turns)
    check_vocabulary(model, batch, "the examples")
    batch = replace(batch, truncated=tuple(cut), template=template)
    return batch if among_answers is None else batch.among_answers(among_answers)


def encode_prompts(
    model: Bridge,
    prompts: Sequence[Prompt],
    *,
    chat: bool = False,
    system: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    continue_last: bool = False,
) -> Batch:
    """Tokenise prompts to generate for; there are no targets. Arguments and errors: see `encode`."""
    tokenizer = _tokenizer(model)
    template = Template(chat, system, dict(template_arguments or {}), continue_last)
    ids = []
    for i, prompt in enumerate(_some(prompts)):
        row = tokenise(tokenizer, plain_text(template.prompt(tokenizer, prompt, i), i), bos=not chat)
        if len(row) > model.cfg.n_ctx:
            raise ValueError(f"row {i} has {len(row)} tokens, and the model's context is {model.cfg.n_ctx}")
        ids.append(row)
    roles = [[int(TokenRole.PROMPT)] * len(row) for row in ids]
    examples = [Example(prompt) for prompt in prompts]
    _warn_of_control_tokens(tokenizer, template, examples)
    turns = turn_marks(tokenizer, template, prompts, ids)
    batch = batch_from_rows(ids, roles, examples=examples, tokenizer=tokenizer, turns=turns)
    check_vocabulary(model, batch, "the prompts")
    return replace(batch, template=template)


def _some(rows: Sequence[Any]) -> Sequence[Any]:
    if isinstance(rows, str | Example):
        file = f", or load_examples({rows!r}) for the rows of a file" if isinstance(rows, str) else ""
        raise TypeError(f"expected a list, got one {type(rows).__name__}: write [{rows!r}]{file}")
    if hasattr(rows, "columns") or isinstance(rows, Mapping):  # its rows would be the names of its columns
        raise TypeError(
            f"expected rows, got a {type(rows).__name__}: one column of it is prompts, encode_prompts(model, "
            "table['prompt']), two are examples, encode(model, load_examples(table, prompt=…, completion=…))"
        )
    if isinstance(rows, Tensor) or not isinstance(rows, Sized):
        raise TypeError(
            f"expected a list of texts or rows, got a {type(rows).__name__}: of a generator list(…) is one, token ids "
            "are decoded first, tokenizer.batch_decode(ids)"
        )
    if not len(rows):
        raise ValueError(f"expected a list with at least one row, got {rows!r}")
    return rows


def _check_example(example: Any, row: int) -> None:
    if not isinstance(example, Example):
        maker = "encode_prompts takes prompts alone" if isinstance(example, str) else "load_examples makes them"
        raise TypeError(f"row {row} is a {type(example).__name__}, expected an Example(prompt, completion); {maker}")
    if not isinstance(example.completion, str):
        raise TypeError(f"row {row}: the completion is {example.completion!r}, expected text")
    if not example.completion:
        raise ValueError(f"row {row} has an empty completion, so there is nothing to learn or score in it")


def _tokenizer(model: Bridge) -> Any:
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer: boot the bridge with tokenizer=…")
    return model.tokenizer


def _warn_of_control_tokens(tokenizer: Any, template: Template, examples: Sequence[Example]) -> None:
    """Warn of rows of a chat in which people wrote what the tokenizer reads as its own marks."""
    marks = {
        i: token
        for i, example in enumerate(examples)
        for token in template.control_tokens(tokenizer, [*template.texts(example.prompt), example.completion])
    }
    if marks:
        row, token = next(iter(marks.items()))
        warnings.warn(
            f"{len(marks)} row(s) hold control tokens in their messages, which act as such (row {row}: {token!r}): "
            f"{list(marks)[:10]}; take them out where they are not meant so",
            stacklevel=3,
        )


def _shortened(
    tokenizer: Any, example: Example, row: int, template: Template, length: int, limit: int, end: bool, boundary: str
) -> Example:
    """The example with as much less in its messages as brings its row from `length` tokens to `limit`."""
    while length > limit:
        prompt = template.shortened(tokenizer, example.prompt, length - limit)
        if prompt is None:
            raise ValueError(
                f"row {row}: with all that may be cut of its messages gone, {length} tokens are left, more than {limit}"
            )
        example = replace(example, prompt=prompt)
        length = sum(map(len, split_row(tokenizer, example.prompt, example.completion, row, template, end, boundary)))
    return example


def _cut(
    head: list[int], tail: list[int], limit: int, truncate: str | None, row: int, tokenizer: Any
) -> tuple[list[int], list[int]]:
    if truncate is None:
        raise ValueError(
            f'row {row} has {len(head) + len(tail)} tokens, more than {limit}: pass truncate="prompt" or "completion"'
        )
    if truncate == "completion":
        room = limit - len(head)
        if room < 1:
            raise ValueError(
                f"row {row}: the prompt alone has {len(head)} tokens, so nothing of the completion is left"
            )
        return head, tail[:room]
    bos = head[:1] if head[0] == tokenizer.bos_token_id else []
    room = limit - len(tail) - len(bos)
    if room < 1:
        raise ValueError(f"row {row}: the completion alone has {len(tail)} tokens, so nothing of the prompt is left")
    return bos + head[len(head) - room :], tail
