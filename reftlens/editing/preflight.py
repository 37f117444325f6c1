"""Before anything is trained: which sites of a model can be edited, and does an edit there change anything?

One forward pass adds a zero to every activation; the gradient of a random readout of the logits with respect to
that zero is the effect an edit would have. A hook that no activation passes, that fires twice, or whose edit
changes nothing is refused.
"""

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from reftlens import figures
from reftlens.bridge.protocol import Bridge, check_model, frozen, gradients_on, other_site, resolve_hook
from reftlens.bridge.trial import check_agrees, few_tokens
from reftlens.editing.edits import token_width
from reftlens.editing.engine import forward, hooked
from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.errors import HookNotFound, in_brief
from reftlens.figures import DataFrame

_ROWS, _LENGTH = 2, 11  # two rows, and a length that is no usual number of heads


@dataclass(frozen=True)
class SiteInfo:
    """What one hook is."""

    hook: str
    """Canonical name."""
    aliases: tuple[str, ...]
    shape: str
    """Its axes: `batch seq 576`, or `batch seq 9 64` with heads; where there is a problem, the sizes seen."""
    width: int
    """Of the vector that an intervention there edits, all heads joined."""
    heads: int | None
    problem: str
    """Why it cannot be a site; empty where it can."""


@dataclass(frozen=True)
class Sites:
    """Hooks of a model with their shapes; `usable` ones first among equals."""

    rows: tuple[SiteInfo, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, hook: str) -> SiteInfo:
        """The row of a hook, by its name or alias."""
        for row in self.rows:
            if hook == row.hook or hook in row.aliases:
                return row
        raise HookNotFound(f"no row for {hook!r}; hooks(model, unusable=True) lists the unusable hooks too")

    def width(self, site: Site) -> int:
        """Of the vector that an intervention at `site` sees."""
        info = self[site.hook]
        return info.width if site.heads is None or info.heads is None else info.width // info.heads * len(site.heads)

    def to_frame(self) -> DataFrame:
        return figures.table([asdict(row) | {"aliases": ", ".join(row.aliases)} for row in self.rows])

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False)

    def __str__(self) -> str:
        return self.to_frame().to_string(index=False)


@dataclass(eq=False, repr=False)
class _Probe:
    """Adds a zero at a hook, and records what passed through."""

    point: HookPoint
    fired: int = 0
    shape: tuple[int, ...] = ()
    zero: Tensor | None = None

    def __call__(self, h: Tensor, hook: HookPoint) -> Tensor | None:
        self.fired += 1
        self.shape = tuple(h.shape) if isinstance(h, Tensor) else ()
        if not isinstance(h, Tensor) or not h.is_floating_point() or self.zero is not None:
            return None
        self.zero = torch.zeros_like(h, requires_grad=True)
        return h + self.zero

    def problem(self, grad: Tensor | None, tokens: tuple[int, int]) -> str:
        if self.fired == 0:
            return "never fires"
        if self.fired > 1:
            return f"fires {self.fired} times in one forward pass"
        if self.zero is None:
            return "does not hold real numbers"
        if self.shape[:2] != tokens or len(self.shape) not in (3, 4):
            return "has no token axis"
        if grad is None or not bool(grad.abs().max() > 0):
            return "an edit there changes nothing"
        return ""


def hooks(model: Bridge, *, unusable: bool = False) -> Sites:
    """The hooks of `model` that can be sites, with their shapes; with `unusable`, the others too and why not."""
    check_model(model)
    check_agrees(model)
    every, names = model.hook_dict, dict[HookPoint, list[str]]()
    for name, point in every.items():
        names.setdefault(point, []).append(name)
    gates = {point: _gate(model, point.name or "", every) for point in names}
    probes = _probe(model, [point for point, gate in gates.items() if not gate])
    rows = []
    for point, aliases in names.items():
        shape, problem = probes.get(point, ((), gates[point]))
        if unusable or not problem:
            heads = shape[2] if len(shape) == 4 and not problem else None
            width = 0 if problem else math.prod(shape[2:])
            axes = str(list(shape)) if problem else " ".join(["batch", "seq", *map(str, shape[2:])])
            others = tuple(name for name in aliases if name != point.name and not other_site(name, point, every))
            rows.append(SiteInfo(point.name or "?", others, axes, width, heads, problem))
    return Sites(tuple(rows))


def _gate(model: Bridge, name: str, every: dict[str, HookPoint]) -> str:
    """Which switch of the model has to be on before anything passes through a hook; empty where it does already."""
    try:
        resolve_hook(model, name, every)
    except (KeyError, ValueError) as error:
        return str(error)
    return ""


def preflight(reft: ReFT, model: Bridge, *more: ReFT) -> None:
    """Raise where a site of `reft` cannot do anything on `model`, or has another width than its intervention.

    The sites of `more` are looked at in the same pass.

    Raises:
        ValueError: naming the site and what is wrong: the hook never fires, fires twice, has no token axis, an
            edit there changes nothing, heads that do not exist, or the width differs.
    """
    check_model(model)
    places = [place for each in (reft, *more) for place in each.bind(model)]
    probes = _probe(model, list(dict.fromkeys(place.point for place in places)))
    sums = dict[tuple[HookPoint, HookPoint], bool]()
    for place in places:
        (shape, problem), site, module, carry = probes[place.point], place.site, place.intervention, place.carry
        if not problem and carry is not None:
            spot = place.point, carry
            sums[spot] = sums[spot] if spot in sums else _adds_up(model, *spot)
        if not problem and carry is not None and not sums[place.point, carry]:
            problem = f"{carry.name} is not what passed there plus a function of it, so it is no residual stream"
        if problem:
            raise ValueError(f"{site.hook} cannot be a site on {model.cfg.model_name}: {problem}")
        width = token_width(shape, site.heads, site.hook)
        if module.d != width:
            raise ValueError(f"{site} has vectors of width {width}, and its {module.kind} was made for d={module.d}")


_Seen = dict[HookPoint, tuple[tuple[int, ...], str]]
"""Of each hook the shape of what passes, and its problem or ""."""


def _probe(model: Bridge, points: Sequence[HookPoint]) -> _Seen:
    """All hooks in one pass; where an edit breaks the bridge's own code, those of each kind in a pass of their own."""
    try:
        return _probe_together(model, points)
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        kinds: dict[str, list[HookPoint]] = {}
        for point in points:
            kinds.setdefault(re.sub(r"\d+", "", point.name or ""), []).append(point)
        if len(kinds) == 1:
            return dict.fromkeys(points, ((), f"an edit there breaks the bridge ({in_brief(error)})"))
        return {p: seen for kind in kinds.values() for p, seen in _probe(model, kind).items()}


def _probe_together(model: Bridge, points: Sequence[HookPoint]) -> _Seen:
    """From one forward and one backward pass on a few tokens."""
    probes = {point: _Probe(point) for point in points}
    with frozen(model), gradients_on(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the bridge warns of edits at norms, which add zero here
        with hooked(model, list(probes.items())):
            logits = _run(model)
        zeros = {point: probe.zero for point, probe in probes.items() if probe.zero is not None}
        readout = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(logits)
        gradients = dict(zip(zeros, _gradients((logits * readout).sum(), list(zeros.values())), strict=True))
    return {p: (probe.shape, probe.problem(gradients.get(p), (_ROWS, _LENGTH))) for p, probe in probes.items()}


def _run(model: Bridge) -> Tensor:
    """Logits of a few random tokens, always the same."""
    tokens = few_tokens(model, _ROWS, _LENGTH)
    return forward(model, tokens, torch.ones_like(tokens, dtype=torch.bool))


def _gradients(value: Tensor, zeros: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(zeros)
    try:
        return torch.autograd.grad(value, list(zeros), allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "the model uses reentrant gradient checkpointing, through which gradients do not reach every site: enable "
            'it with gradient_checkpointing_kwargs={"use_reentrant": False}'
        ) from None


@torch.no_grad()
def _adds_up(model: Bridge, point: HookPoint, carry: HookPoint) -> bool:
    """Whether `carry` holds what passes `point` plus a function of it.

    Give every token the same vector to compute that function from, but leave the skip connection alone: what is
    added to the stream is then the same for all tokens.
    """
    seen: dict[str, Tensor] = {}

    def same_for_all(h: Tensor, hook: HookPoint) -> Tensor:
        seen["in"] = h.clone()
        return h[:1, :1].expand_as(h).contiguous()

    def keep(h: Tensor, hook: HookPoint) -> None:
        seen["out"] = h.clone()

    with hooked(model, [(point, same_for_all), (carry, keep)]):
        _run(model)
    if "out" not in seen:
        return False
    added = (seen["out"] - seen["in"]).float()
    return bool((added - added[:1, :1]).abs().max() <= 0.02 * seen["in"].float().abs().max())
