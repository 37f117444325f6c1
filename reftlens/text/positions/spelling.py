"""How positions are written: as text such as `"f7+l7"`, as a list of places, and as JSON values for the store."""

import re
from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Any, SupportsIndex

from reftlens.numbers import Integers
from reftlens.text.positions.base import Chain, Difference, Positions, Union
from reftlens.text.positions.choosers import All, At, First, Generated, Last, Nth, Prompt, Response, Tokens
from reftlens.text.positions.turns import Role
from reftlens.text.positions.written import Written

_CLASSES = (First, Last, Nth, At, Tokens, Role, All, Prompt, Response, Generated, Written, Union, Difference, Chain)
KINDS: dict[str, type[Positions]] = {c.kind: c for c in _CLASSES}
_WORDS: dict[str, Positions] = {c.kind: c() for c in (First, Last, All, Prompt, Response, Generated)}


def parse(text: str) -> Positions:
    """`"f7+l7"` → `First(7) | Last(7)`; also `first last all prompt response generated`, joined by `+`."""
    choices: list[Positions] = []
    for part in text.replace(" ", "").split("+"):
        if counted := re.fullmatch(r"([fl])([1-9]\d*)", part):
            choices.append((First if counted[1] == "f" else Last)(int(counted[2])))
        elif part in _WORDS:
            choices.append(_WORDS[part])
        else:
            raise ValueError(
                f"cannot read positions {text!r}: {part!r} is none of f<n>, l<n>, {', '.join(_WORDS)}; "
                'join them with +, as in "f7+l7"'
            )
    return reduce(or_, choices)


def as_positions(value: "Positions | str | SupportsIndex | Integers") -> Positions:
    """`value` itself, or what it spells: `"f7+l7"` is parsed, `[0, 3]` means `At(0, 3)`."""
    if isinstance(value, str):
        return parse(value)
    if not isinstance(value, Positions | SupportsIndex | Iterable):
        raise TypeError(f"positions={value!r}, expected positions such as 'last', Last(3) or [0, 3]")
    return value if isinstance(value, Positions) else At(value)


def positions_from_dict(spec: dict[str, Any]) -> Positions:
    """The inverse of `Positions.to_dict`."""
    fields: dict[str, Any] = dict(spec)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"unknown kind of positions {kind!r}, expected one of {', '.join(KINDS)}")
    fields = {k: positions_from_dict(v) if isinstance(v, dict) else v for k, v in fields.items()}
    return At(*fields.pop("indices"), **fields) if kind == "at" else KINDS[kind](**fields)
