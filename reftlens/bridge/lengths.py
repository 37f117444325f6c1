"""Rotary positions that depend on how long a row is: no row is then what it is in a batch of longer ones."""

from typing import Any

from reftlens.bridge.protocol import Bridge


def text_config(model: Bridge) -> Any:
    """The part of a model's configuration that is about text; the whole where there is nothing else, None for none."""
    config: Any = getattr(model.original_model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def length_limit(model: Bridge) -> tuple[str, int] | None:
    """The kind of rotary positions that change beyond so many tokens, or None.

    "longrope" takes one of two tables for all rows of a pass, "dynamic" one that depends on the passes before it.
    """
    config = text_config(model)
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in ropes.values() if ropes and all(isinstance(x, dict) for x in ropes.values()) else [ropes]:
        kind = rope.get("rope_type", "")
        if kind == "longrope":
            usual = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
            return kind, int(rope.get("original_max_position_embeddings") or usual)
        if kind == "dynamic":
            return kind, int(config.max_position_embeddings)
    return None


def changes_with_length(model: Bridge, longest: int) -> str:
    """Why rows of up to `longest` tokens are not what parts of them were in other passes, or ""."""
    limit = length_limit(model)
    if limit is None or longest <= limit[1]:
        return ""
    return f"its rotary positions ({limit[0]}) are others in rows of more than {limit[1]} tokens"


def check_lengths(model: Bridge, shortest: int, longest: int) -> None:
    """Raise where rows of these lengths cannot be computed in one pass.

    Raises:
        ValueError: saying at which length the rotary positions change.
    """
    limit = length_limit(model)
    if limit is None or longest <= limit[1] or (limit[0] == "longrope" and shortest > limit[1]):
        return
    name, beyond = type(model.original_model).__name__, f"the rotary positions ({limit[0]}) of rows of up to {longest}"
    if limit[0] == "longrope":
        raise ValueError(
            f"{beyond} tokens change those of shorter rows in the same pass on this {name}: give rows that are all at "
            f"most, or all more than, {limit[1]} tokens long, or one at a time"
        )
    raise ValueError(
        f"{beyond} tokens depend on the passes before on this {name}: shorten rows to {limit[1]} tokens (max_length)"
    )
