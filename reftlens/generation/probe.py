"""Each way of generating is compared with the full computation before it is first used on a model.

The full computation of a text runs it alone and from its first token: no cache, no padding, no other rows. Where
transformers itself gives something else with a cache or in a batch, texts are written in full, and that is said.
"""

import math
import warnings
from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from reftlens.bridge.exclusive import exclusive
from reftlens.bridge.foreign import muted
from reftlens.cone.probe import difference, verdicts_of
from reftlens.cone.spans import within_block
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.errors import NotFinite, in_brief
from reftlens.generation.decoding import Decoding
from reftlens.generation.prompt_cache import PromptCache, read_prompts
from reftlens.generation.session import Session
from reftlens.generation.stages import OVERHEAD, shared
from reftlens.text.batch import Batch, batch_from_rows
from reftlens.text.positions import All, First, Last, Positions
from reftlens.text.view import TokenRole

_LENGTHS, _ALIKE, _WRITTEN = (7, 4), 3, 2
"""Tokens of the short prompts, those that both begin with where beginnings are shared, and those that are written."""


def checked(session: Session) -> Session:
    """The session, made to compute in full where its own way of computing gives something else."""
    with exclusive(session.model):
        session.share(OVERHEAD[session.rows.tokens.device.type])
        problem = _verdict(session) if session.decoding.verify else ""
        if problem and shared(session.stages):
            warnings.warn(f"prompts that begin alike are read one by one: {problem}", stacklevel=4)
            session.stages = [session.whole]
            problem = _verdict(session)
    if problem:
        warnings.warn(f"texts are written in full, one row at a time, which is slow: {problem}", stacklevel=4)
        session.in_full = True
    return session


def _verdict(session: Session) -> str:
    """What is wrong with the way in which the session computes, or ""."""
    verdicts, way = verdicts_of(session.model), _way(session)
    if way not in verdicts:
        obstacle = session.runner.obstacle()
        try:
            with muted(session.model):
                verdicts[way] = _problem(session, obstacle)
        except NotFinite:  # nothing to compare with; the session itself will say where they are
            return ""
    return verdicts[way]


def _way(session: Session) -> Hashable:
    """How the session computes, as far as one way may be wrong where another is right."""
    states, config = session.prompts.states, getattr(session.model.original_model, "config", None)
    places = () if session.edits is None else [session.edits.places[i] for i in session.edits.sites]
    edited = frozenset((within_block(p.point.name or ""), p.intervention.label, _reaches(p.site)) for p in places)
    entry = None if states is None else (states.first > 0, states.start > 0, states.distinct is not None)
    attention = getattr(config, "_attn_implementation", None)
    several = len(session.prompts) > 1, len(session.variants) > 1
    shares = shared(session.stages), _early(session)
    return "generate", edited, entry, several, shares, session.runner.obstacle(), attention


def _problem(session: Session, obstacle: str) -> str:
    """What is wrong with that way on short prompts, or ""."""
    room = session.model.cfg.n_ctx - _WRITTEN - 1
    if room < 2:
        return ""
    (short, written), problem = _short(session, room, obstacle), ""
    logits: list[Tensor] = []
    try:
        logits.append(short.next_logits())
        back = torch.arange(len(short.rows), device=logits[0].device).flip(0)
        for tokens in written:
            short.append(tokens)
            short.take(back)  # as beams change places
            logits = [*(step[back] for step in logits), short.next_logits()]
    except NotFinite:
        raise
    except Exception as error:  # whatever a model's own code says to a cache
        problem = f"writing with stored keys and values failed: {in_brief(error)}"
    alone = [short.logits_alone(row)[-max(1, len(logits)) :] for row in range(len(short.rows))]  # the edit's own errors
    if problem:
        return problem
    dtype = next(session.model.original_model.parameters()).dtype
    return difference([torch.stack(logits, dim=1)], [torch.stack(alone)], narrow=dtype.itemsize < 4)


def _short(session: Session, room: int, obstacle: str) -> tuple[Session, Int[Tensor, "step row"]]:
    """The same on one prompt, or two of different lengths, and the tokens that are to be written after each."""
    model = session.model
    variants = [replace(v, among=None) for v in session.variants[:2]]  # of the session's prompts, not of these
    stops, pool = set(session.stops.tolist()), session.rows.tokens[session.rows.real].tolist()
    pool = [token for token in pool if token not in stops] or pool
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.tensor(pool)[torch.randint(len(pool), shape, generator=generator)]

    states = session.prompts.states
    alike = shared(session.stages) or (states is not None and states.distinct is not None)
    count = len(_LENGTHS) if alike else min(len(_LENGTHS), len(session.prompts))
    config: Any = getattr(model.original_model, "config", None)
    window = getattr(config, "sliding_window", None) or 0
    lengths = [min(n, room) for n in (window + 1 if _LENGTHS[0] <= window < 30 else _LENGTHS[0], *_LENGTHS[1:])][:count]
    ids = [drawn(n).tolist() for n in lengths]
    if alike:
        ids[1:] = [ids[0][: (n := min(_ALIKE, len(row) - 1))] + row[n:] for row in ids[1:]]
    roles = [[TokenRole.PROMPT] * n for n in lengths]
    prompts = batch_from_rows(ids, roles, tokenizer=session.rows.tokenizer)
    reft = None if session.reft is None else _on_short_prompts(session.reft, _early(session))
    decoding = Decoding(max_new_tokens=_WRITTEN + 1, verify=False)
    short = Session(reft, model, _cache(reft, session, prompts), variants, decoding)
    if obstacle:
        short.runner.body, short.runner.problem = None, obstacle
    if shared(session.stages):
        short.share(0.0)
    return short, drawn(_WRITTEN, len(short.rows)).to(short.rows.tokens.device)


def _cache(reft: ReFT | None, session: Session, prompts: Batch) -> PromptCache:
    """The short prompts, read before where those of the session were."""
    if reft is None or session.prompts.states is None:
        return PromptCache(prompts, () if reft is None else reft.sites, "nothing was read before")
    overhead = math.inf if session.prompts.states.distinct is None else 0.0
    return read_prompts(reft, session.model, prompts, overhead=overhead)


def _early(session: Session) -> int | None:
    """After how many tokens of a short prompt edits are to act; None for at its last ones.

    Early where they act in what is shared, or in the first column of prompts that were read before.
    """
    states, last = session.prompts.states, session.stages[-1].start
    acts = session.edits is not None and session.edits.act_before(session.rows, last)
    if acts or (states is not None and states.start == 0):
        return int(states is not None and states.start > 0)
    return None


def _on_short_prompts(reft: ReFT, early: int | None) -> ReFT:
    """The same interventions at tokens that a short prompt has, and at all that is written where theirs reach there.

    At the last tokens; or at the first after so many.
    """
    sites, before = {}, Counter[tuple[Any, ...]]()
    for site, module in reft.items():
        hook = site.hook, site.heads
        size = 2 + before[hook]  # sites at one hook differ in their positions
        positions: Positions = Last(size)
        if early is not None:
            positions = First(size + early) - First(early) if early else First(size)
        if _reaches(site):
            positions = All() - First(before[hook]) if before[hook] else All()
        sites[Site(site.hook, positions, site.heads)] = module
        before[hook] += 1
    return ReFT(sites)


def _reaches(site: Site) -> bool:
    return site.positions.reaches_response
