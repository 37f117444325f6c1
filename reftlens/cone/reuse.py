"""What of the frozen computation is reused: settings, each of which can be switched off alone."""

from dataclasses import dataclass

from reftlens.numbers import whole


@dataclass(frozen=True)
class Reuse:
    """What of the frozen computation is reused. The default is all of it; each part can be switched off alone.

    Args:
        depth: skip the blocks below the first edit.
        tokens: skip the tokens before the first edit and after the last target.
        scored_only: run the unembedding at the targets only.
        beginnings: compute what rows begin with alike (a template, a system prompt, few-shot examples) once for all.
        buckets: compute rows in up to so many groups of similar length; by default as many as pay.
        plain: let components of the bridge whose hooks nobody uses step aside for the original ones, with the
            fast attention function.
        memory: bytes that may be kept on the device (on a CPU, in memory), by default half of what is free.
        remember: keep what was captured, and what rows scored, for later calls on this model, in the same bytes as
            `memory` or an eighth of what is free; `rl.training.forget()` drops it.
        disk: bytes that may be kept in a temporary file where memory does not do, by default half of what is free.
        half: keep captured numbers in bfloat16: half the space, and no longer exact.
        verify: compare each way of computing with the full computation on a few short rows before it is first used,
            and go on in full where they differ.
    """

    depth: bool = True
    tokens: bool = True
    scored_only: bool = True
    beginnings: bool = True
    buckets: int | None = None
    plain: bool = True
    memory: int | None = None
    disk: int | None = None
    half: bool = False
    remember: bool = True
    verify: bool = True

    def __post_init__(self) -> None:
        if self.buckets is not None:
            object.__setattr__(self, "buckets", whole(self.buckets, "buckets", 1))
        for name in ("memory", "disk"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value}, expected a number of bytes, 0 or more")

    @staticmethod
    def of(choice: "bool | Reuse") -> "Reuse | None":
        """`True` is everything, `False` (None here) the full computation."""
        return choice if isinstance(choice, Reuse) else Reuse() if choice else None
