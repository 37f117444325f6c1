"""Counterfactual pairs out of a table: one row for each base and source, with the answer to each."""

from collections.abc import Iterator
from typing import Any

from reftlens.tasks.pairs import Pairs
from reftlens.text.loading import Source, load_examples


def pairs_from_records(
    table: Source,
    *,
    base: str = "base",
    source: str = "source",
    base_answer: str = "base_answer",
    source_answer: str = "source_answer",
    counterfactual: str | None = None,
) -> Pairs:
    """Pairs of one variable, from a `DataFrame`, a file or records as `load_examples` takes them.

    `pairs.encode(model)` is what DAS is trained on and `pairs.encode_base(model)` the same rows with the base's own
    answers, both with `first_token=True` for `controls`, which wants one target token in each row; `pairs.values` are
    the sources' answers. Rows are in the order of the table, so `pairs[:80]` and `pairs[80:]` are train and test.

    Args:
        base, source: the fields that hold the two prompts.
        base_answer, source_answer: the fields that hold the answer to each, with the space that it begins with.
        counterfactual: the field with the answer after the exchange; the source's own, if None.

    Raises:
        ValueError: as `load_examples`, naming the row.
    """
    rows: Any = list(table) if isinstance(table, Iterator) else table
    bases = load_examples(rows, prompt=base, completion=base_answer)
    sources = load_examples(rows, prompt=source, completion=source_answer)
    after = [e.completion for e in load_examples(rows, prompt=base, completion=counterfactual or source_answer)]
    answers = tuple(example.completion for example in sources)
    return Pairs(tuple(bases), {"source": tuple(sources)}, tuple(after), {"source": answers})
