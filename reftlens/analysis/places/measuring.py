"""What the parts of an edit do: its positions, its sites, its cells, its pairs of sites, or any variants of it."""

from collections.abc import Mapping, Sequence
from typing import overload

from reftlens.analysis.places.questions import (
    Effects,
    Kind,
    Question,
    Variants,
    edited_rows,
    narrowed,
    of_variants,
    questions_of,
)
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import plans_of
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT, check_types
from reftlens.editing.site import Where
from reftlens.scoring.responses import Responses, swept
from reftlens.text.batch import Batch


@overload
def effects(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    of: Kind | Variants = ...,
    *,
    positions: Mapping[str, Where] | None = ...,
    strength: float = ...,
    seed: int = ...,
    batch_size: int = ...,
    reuse: bool | Reuse = ...,
    progress: bool = ...,
) -> Effects: ...
@overload
def effects(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    of: Sequence[Kind],
    *,
    positions: Mapping[str, Where] | None = ...,
    strength: float = ...,
    seed: int = ...,
    batch_size: int = ...,
    reuse: bool | Reuse = ...,
    progress: bool = ...,
) -> dict[str, Effects]: ...
def effects(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    of: str | Variants | Sequence[str] = "positions",
    *,
    positions: Mapping[str, Where] | None = None,
    strength: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> Effects | dict[str, Effects]:
    """What the parts of an edit do to the log-probability of the targets, all scored in one sweep.

    - `"positions"`, `"sites"`: each alone, and the edit with it left out, beside the whole edit → `PartEffects`.
    - `"cells"`: each hook (all its sites) at each position alone → `CellEffects`.
    - `"pairs"`: each two sites together, less the sum of each alone → `PairEffects`.
    - `{label: Variant}`: each of these variants → `VariantEffects`.
    - a list of the names above: all of them in one sweep, each variant once → `{name: what it gives alone}`.

    Args:
        positions: `{label: positions}`, for positions and cells. None: every edited prompt token, counted from the end
            of the prompt ("-1" is the last), and "response" for all edited tokens after it.
        strength: of the edit; `{label: Variant}` say their own.
        seed: of the permutation tests.

    Raises:
        ValueError: if a row has no target, nothing is edited at a position or by a variant in any row, there is one
            site and pairs are asked for, or a setting is given that `of` does not use.
    """
    check_types(reft, model, data)
    if isinstance(of, Mapping):
        if positions is not None or strength != 1.0:
            setting = f"strength={strength:g}" if positions is None else "positions="
            raise ValueError(f"{setting} is for the names of parts: a variant says its own, as in Variant(0.5)")
        questions = {"variants": of_variants(reft, data, of)}
    else:
        kinds = (of,) if isinstance(of, str) else tuple(of)
        questions = questions_of(reft, data, kinds, positions=positions, strength=strength)
    settings = {"seed": seed, "batch_size": batch_size, "reuse": Reuse.of(reuse), "progress": progress}
    results, _ = answered(reft, model, data, questions, {}, **settings)
    return next(iter(results.values())) if isinstance(of, str | Mapping) else results


def answered(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    questions: Mapping[str, Question],
    beside: Variants,
    *,
    seed: int = 0,
    batch_size: int = 16,
    reuse: Reuse | None = Reuse(),
    progress: bool = True,
) -> tuple[dict[str, Effects], Responses]:
    """What each question gives, and the responses to variants that are scored `beside` them, in one sweep."""
    plans = {"beside": plans_of(reft, beside)}
    for name, (variants, _) in questions.items():
        plans[name] = plans_of(reft, {label: narrowed(reft, data, variant) for label, variant in variants.items()})
    each = swept(model, data, plans, batch_size=batch_size, reuse=reuse, progress=progress)
    results = {
        name: result(each[name], edited_rows(reft, data, variants), seed)
        for name, (variants, result) in questions.items()
    }
    return results, each["beside"]
