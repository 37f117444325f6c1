"""The sweep over doses: everything that is measured at every strength, for every kind of intervention."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import SupportsFloat

from reftlens.analysis.strength.doses import DoseResponse
from reftlens.analysis.strength.sizes import edit_size
from reftlens.analysis.strength.texts import written
from reftlens.bridge.protocol import Bridge
from reftlens.cone.plans import plans_of
from reftlens.cone.reuse import Reuse
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Where
from reftlens.editing.variant import Variant
from reftlens.errors import check_each_once
from reftlens.generation.decoding import Decoding
from reftlens.generation.site_edits import check_writes
from reftlens.numbers import reals
from reftlens.scoring.openness import openness_of
from reftlens.scoring.responses import responses
from reftlens.text.batch import Batch
from reftlens.text.template import Prompt


def dose_response(
    reft: ReFT,
    model: Bridge,
    data: Batch,
    strengths: SupportsFloat | Sequence[SupportsFloat],
    *,
    prompts: Sequence[Prompt] | Batch | None = None,
    unrelated: Batch | None = None,
    score: Callable[[str], float] | None = None,
    among: Where | None = None,
    sites: Sequence[int] | None = None,
    chat: bool = False,
    decoding: Decoding = Decoding(),
    batch_size: int = 16,
    reuse: bool | Reuse = True,
    progress: bool = True,
) -> DoseResponse:
    """Effect, KL(edited ‖ unedited), size, drift and fluency at every strength.

    The effect is what the targets of `data` gain; one sweep scores all strengths, and only what an edit can reach.

    Args:
        strengths: relative to the edit as trained; with sources in `data` also for an exchange.
        prompts: texts are continued from them at every strength, for perplexity under the unedited model,
            repetition and `score`; an exchange has no source there, so leave them out for one.
        unrelated: prompts with completions that the edit should leave alone (with sources, for an exchange): their
            per-token KL is the drift.
        score: what a text is worth, such as the share of emoji in it.
        among: of the edited tokens only these, as in `Variant`.
        sites: of the sites only these, likewise.
        chat: put the prompts into the tokenizer's chat template; a batch comes with the one it was encoded with.
        decoding: how texts are written.

    Raises:
        ValueError: for no strength, a row without target, or a site that chooses no token.
    """
    check_each_once({"strengths": (doses := reals(strengths, "strengths"))})
    if score is not None and prompts is None:
        raise ValueError("score is of what is written: pass prompts= too")
    if prompts is not None:
        check_writes(reft)
    variants = [Variant(s, among, sites) for s in doses]
    plans = plans_of(reft, dict(zip(map(str, doses), variants, strict=True)))
    settings = {"batch_size": batch_size, "reuse": Reuse.of(reuse), "progress": progress}
    score_on = partial(responses, model, **settings)
    trained = Variant(1.0, among, sites)
    size = edit_size(reft, model, data, variant=trained, batch_size=batch_size)
    gates = openness_of(reft, model, data, trained, batch_size=batch_size)
    on_data = score_on(data, plans, describe="dose response")
    off_target = None if unrelated is None else score_on(unrelated, plans, describe="unrelated prompts")
    text = None
    if prompts is not None:
        text = written(reft, model, prompts, variants, decoding, score=score, chat=chat, **settings)
    return DoseResponse(doses, on_data, size, off_target, text, tuple(gates))
