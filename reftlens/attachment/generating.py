"""`generate` of a model while it is edited: what that was given is the prompt, with a cache or without."""

import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

from torch import Tensor, nn

_NAME = "generate"


class Uncopied:
    """Belongs to one model: neither copied nor pickled with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise ValueError(
            "this model is edited by rl.attach, and a copy would be edited in part: call detach() first "
            "(save_pretrained and state_dict hold the model's own weights and work as they are)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__({})


@dataclass(eq=False)
class Writing:
    """One call of `generate` that is going on."""

    width: int | None
    """Columns of the prompts; None where they begin with BOS alone."""


class Generating(Uncopied):
    """Stands in the place of `generate` of one model while it is edited, and knows what it was called with."""

    def __init__(self, model: Any) -> None:
        self.model, self.users = model, 0
        self.before: dict[str, Any] = {name: model.__dict__[name] for name in [_NAME] if name in model.__dict__}
        self.function = getattr(model, _NAME)
        self.local = threading.local()
        update_wrapper(self, self.function, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._check(kwargs)
        with self._going_on(Writing(_width(args, kwargs))):
            return self.function(*args, **kwargs)

    def _check(self, settings: dict[str, Any]) -> None:
        """Raise where prompts are read that `generate` was not given as such."""
        config = settings.get("generation_config") or getattr(self.model, "generation_config", None)
        for name in ("guidance_scale", "token_healing"):
            if self.users and settings.get(name, getattr(config, name, None)) not in (None, False, 1):
                raise ValueError(
                    f"{name} reads other prompts than generate is given, and those are edited: leave it out"
                )

    @property
    def current(self) -> Writing | None:
        """The innermost call of `generate` in this thread.

        Raises:
            ValueError: for one that went past this object, `type(model).generate(model, …)` or a method that was kept
                from before: what its prompt is would not be known.
        """
        if every := getattr(self.local, "every", []):
            return every[-1]
        frame, code = sys._getframe(1), getattr(inspect.unwrap(self.function), "__code__", None)
        while frame is not None:
            if frame.f_code is code and frame.f_locals.get("self") is self.model:
                raise ValueError(
                    "generate was called past rl.attach, by the class of the model or by a method kept from before it: "
                    "call model.generate(…), so that its prompt is known"
                )
            frame = frame.f_back
        return None

    @contextmanager
    def _going_on(self, writing: Writing) -> Iterator[None]:
        if not self.users:  # somebody has kept the function
            yield
            return
        self.local.every = [*getattr(self.local, "every", []), writing]
        try:
            yield
        finally:
            self.local.every = self.local.every[:-1]

    @classmethod
    def of(cls, model: nn.Module) -> "Generating":
        """That of a model, put there for the first who uses it."""
        there = model.__dict__.get(_NAME)
        if not isinstance(there, cls):
            there = model.__dict__[_NAME] = cls(model)
        there.users += 1
        return there

    @classmethod
    def edits(cls, model: nn.Module) -> bool:
        """Whether a model is edited now."""
        return isinstance(model.__dict__.get(_NAME), cls)

    def leave(self) -> None:
        """Put back what was there before the first, once nobody uses it."""
        self.users -= 1
        if not self.users and self.model.__dict__.get(_NAME) is self:
            del self.model.__dict__[_NAME]
            self.model.__dict__.update(self.before)


def _width(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    given = [*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")]
    return next((tokens.shape[1] for tokens in given if isinstance(tokens, Tensor) and tokens.ndim == 2), None)
