"""What is raised where no built-in error says it; each message says what was seen, what was expected and what to do."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class CheckpointMismatch(ValueError):
    """The checkpoint on disk belongs to another run."""


class HookNotFound(KeyError):
    """No hook of that name; the message suggests near ones."""

    def __str__(self) -> str:
        return str(self.args[0])


class ModelNotAvailable(OSError):
    """No source had the model; the message says what each of them answered."""


class NotFinite(FloatingPointError):
    """A number became NaN or infinite; the message names where, and under which edit."""


class ProcessLost(RuntimeError):
    """One of several processes that train together has ended."""


class SiteNeverFired(RuntimeError):
    """A site was to be edited and no hidden state passed through it."""


class StoreMismatch(ValueError):
    """What is on disk does not fit: another model, width, kind or format; the message names it."""


class TrainingDiverged(FloatingPointError):
    """A loss or gradient became NaN or infinite; the message names the step and the likely cause."""


def reason_of(error: BaseException) -> str:
    """The beginning of what an error says, in one line; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def in_brief(error: BaseException) -> str:
    """The class of an error, and the beginning of what it says, in one line."""
    text = f"{type(error).__name__}: {reason_of(error)}"
    return text if len(text) <= 160 else f"{text[:160]}…"


def check_one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise `ValueError` where the argument `name` has a value that is none of those allowed."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name}={value!r}, expected one of {', '.join(map(repr, allowed))}")


def check_finite(values: Any, what: str, hint: str = "look where they come from") -> None:
    """Raise `NotFinite` where a tensor holds NaN or an infinite number."""
    if not values.isfinite().all():
        dtype = str(values.dtype).removeprefix("torch.")
        raise NotFinite(f"{what}: NaN or infinite numbers ({dtype}); {hint}")


def check_each_once(values: Mapping[str, Sequence[float] | Sequence[str]]) -> None:
    """Raise `ValueError` for an argument without values, or with one that is given twice."""
    for name, numbers in values.items():
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"{name}={list(numbers)}, expected one or more, each of them once")


def index_of(names: Sequence[Any], name: Any, kind: str) -> int:
    """Where `name` stands among `names`, each of them a `kind`.

    Raises:
        ValueError: if it is not among them; the message says which there are.
    """
    if name not in names:
        near = difflib.get_close_matches(str(name), list(map(str, names)), n=4, cutoff=0.5)
        close = f"; close: {', '.join(near)}" if near else ""
        listed = ", ".join(repr(n) if isinstance(n, str) else str(n) for n in names[:12])
        more = f", and {len(names) - 12} more{close}" if len(names) > 12 else ""
        raise ValueError(f"no {kind} {name!r}, there are: {listed}{more}")
    return names.index(name)
