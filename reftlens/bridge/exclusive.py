"""One thread at a time on a model, and no interrupt in the middle of a change to it.

An edit is a hook on a model that others may be using, and the light cone puts other modules into it for one pass. Both
are undone before anybody else sees the model: other threads' calls to reftlens wait for the lock of the model, and an
interrupt (Ctrl-C) waits for the end of the pass.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_making = threading.Lock()


@contextmanager
def exclusive(model: Any) -> Iterator[None]:
    """Inside the block no other thread is in such a block with `model`, and the main thread is not interrupted.

    Blocks of one thread may lie within each other. An interrupt is raised where an inner block has ended, or this one.
    """
    with _interrupts.held():
        with _making:
            lock = _locks.setdefault(model.original_model, threading.RLock())
        while not lock.acquire(timeout=0.1):
            _interrupts.raise_waiting()  # while another thread has the model
        try:
            yield
        finally:
            lock.release()


class _Interrupts:
    """SIGINT of the main thread, put off while a block is open."""

    def __init__(self) -> None:
        self.blocks, self.waiting = 0, False
        self.before: Callable[..., Any] | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are handled in the main thread only
            return
        if self.blocks == 0:
            self.before = before if callable(before := signal.getsignal(signal.SIGINT)) else None
            if self.before is not None:
                signal.signal(signal.SIGINT, self._note)
        self.blocks += 1
        try:
            yield
            self.raise_waiting()
        finally:
            self.blocks -= 1
            if self.blocks == 0:
                if self.before is not None:
                    signal.signal(signal.SIGINT, self.before)
                self.raise_waiting()

    def _note(self, number: int, frame: Any) -> None:
        self.waiting = True

    def raise_waiting(self) -> None:
        """Let the handler that stood there before have an interrupt that came meanwhile."""
        if self.waiting and self.before is not None and threading.current_thread() is threading.main_thread():
            self.waiting = False
            self.before(signal.SIGINT, None)


_interrupts = _Interrupts()
