"""Which rows score the same under several plans, and what they scored in earlier calls: neither is computed twice."""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.bridge.lengths import text_config
from reftlens.bridge.protocol import Bridge, device_of
from reftlens.cone.memory import MEMORY, Scores
from reftlens.cone.plans import Plan
from reftlens.cone.reuse import Reuse
from reftlens.cone.scorer import Scorer, body_of
from reftlens.editing.bound import Places
from reftlens.files import digest
from reftlens.interventions import KINDS
from reftlens.interventions.base import Intervention
from reftlens.text.batch import Batch

_PLAIN = (bool, int, float, str, type(None))
_CODE = ("reftlens.interventions.", "torch.nn.modules.", "transformers.activations")


class ScoreTable:
    """What each row scores under each plan: equal computations are one, and those of earlier calls are read.

    One computation are rows with the same tokens, targets, answers and edited tokens, where what acts has the same
    parameters and strength. What the library's own interventions score is kept for later calls with equal weights and
    settings. Nothing is kept of other classes, of exchanges, and where nothing of the frozen computation may be reused.

    Args:
        measure: names what is scored; "" where rows are scored in each other's company, so that none is left out.
    """

    def __init__(self, model: Bridge, data: Batch, plans: Sequence[Plan], reuse: Reuse | None, measure: str) -> None:
        self.reuse, self.recalled = reuse, 0
        self._shape = len(plans), len(data)
        self._scores: dict[Hashable, Scores] = {}
        self._lasting = set[Hashable]()
        self._keys: list[list[Hashable]] = [[(p, row) for row in range(len(data))] for p in range(len(plans))]
        if not measure:
            return
        bound = {id(plan.reft): plan.reft.bind(model) for plan in plans}
        every = [bound[id(plan.reft)] for plan in plans]
        self._keys = _computations(data, plans, every)
        if reuse is not None and MEMORY.budget(reuse) and body_of(model, every, reuse)[0] is not None:
            self._recall(MEMORY.state(model), _setting(model, reuse, measure))

    def _recall(self, model: object, setting: str) -> None:
        """Name computations for good, and read what earlier calls scored."""
        self._keys = [[(model, setting, key) if isinstance(key, bytes) else key for key in keys] for keys in self._keys]
        every = [key for keys in self._keys for key in keys]
        self._lasting = {key for key in every if isinstance(key, tuple) and key[0] is model}
        known = {key: MEMORY.scores(key) for key in self._lasting}
        self._scores = {key: scores for key, scores in known.items() if scores is not None}
        self.recalled = sum(key in self._scores for key in every)

    def missing(self) -> list[list[int]]:
        """For each plan the rows that are to be computed."""
        known, rows = set(self._scores), list[list[int]]()
        for keys in self._keys:
            rows.append([])
            for row, key in enumerate(keys):
                if key not in known:
                    rows[-1].append(row)
                    known.add(key)
        return rows

    def put(self, plan: int, rows: Sequence[int], values: Float[Tensor, "measures row"]) -> None:
        """What some rows scored; what is known of a computation already stays."""
        for row, scores in zip(rows, values.T.tolist(), strict=True):
            self._scores.setdefault(self._keys[plan][row], tuple(scores))

    def keep(self, scorer: Scorer) -> None:
        """Leave what was scored to later calls, where the frozen computation was reused."""
        if self.reuse is None or not scorer.reuses:
            return
        for key in self._lasting & self._scores.keys():
            MEMORY.put_scores(key, self._scores[key], MEMORY.budget(self.reuse))

    def table(self) -> Float[Tensor, "measures plan example"]:
        """All of them, in float64."""
        values = [self._scores[key] for keys in self._keys for key in keys]
        return torch.tensor(values, dtype=torch.float64).view(*self._shape, -1).movedim(-1, 0)

    def computation(self, scorer: Scorer | None) -> str:
        """How the missing were computed, if there were any, and how many were not."""
        recalled = f"{self.recalled} of {self._shape[0] * self._shape[1]} scores from earlier calls"
        return recalled if scorer is None else scorer.computation + f"; {recalled}" * bool(self.recalled)


def _computations(data: Batch, plans: Sequence[Plan], every: Sequence[Places]) -> list[list[Hashable]]:
    """For each plan and row what is equal for equal computations: bytes that hold for good, or what holds now alone."""
    at = [real.nonzero()[:, 0] for real in data.attention_mask.cpu()]
    tokens, targets = data.tokens.cpu(), data.target_mask.cpu()
    among = repr(data.answers).encode()
    rows = [_digest(_bytes(tokens[r, here]), _bytes(targets[r, here]), among) for r, here in enumerate(at)]
    names = {id(m): _name_of(m) for plan in plans for m in plan.reft.distinct}
    result: list[list[Hashable]] = []
    for plan, places in zip(plans, every, strict=True):
        edits, lasting = [[row] for row in rows], [True] * len(rows)
        for i in plan.variant.active(places) if plan.variant.strength != 0.0 else ():
            place, name = places[i], names[id(places[i].intervention)]
            spot = place.point.name, place.carry is None, place.site.heads, plan.variant.strength, name
            masks, header = plan.variant.mask(place.site, data.view).cpu(), repr(spot).encode()
            where = torch.where(masks, data.view.steps.cpu() + 1, -1) if place.looks_around else masks
            for row in masks.any(dim=1).nonzero()[:, 0].tolist():
                edits[row] += (_digest(header, _bytes(where[row, at[row]])),)
                lasting[row] &= isinstance(name, bytes)
        digests = [_digest(*some) for some in edits]
        result.append(
            [key if lasts else (row, key) for row, (key, lasts) in enumerate(zip(digests, lasting, strict=True))]
        )
    return result


def _setting(model: Bridge, reuse: Reuse, measure: str) -> str:
    """What decides beside the weights, the rows and the edits."""
    device, config = device_of(model), text_config(model)
    narrow = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    settings = measure, str(device), replace(reuse, memory=None, disk=None), narrow
    settings = *settings, torch.get_float32_matmul_precision(), getattr(config, "__dict__", None)
    return _digest(repr(settings).encode()).hex()


def _name_of(module: Intervention) -> bytes | int:
    """Stands for what an intervention computes: for good, or as long as it lives where its code may be anyone's."""
    pieces = [type(module).__qualname__.encode()]
    if type(module) not in KINDS.values() or module.variables:
        return id(module)
    for name, part in module.named_modules():
        settings = {k: v for k, v in vars(part).items() if not k.startswith("_") and k != "training"}
        code, hooks = f"{type(part).__module__}.", (part._forward_hooks, part._forward_pre_hooks)
        if any(hooks) or not code.startswith(_CODE) or not all(map(_plain, settings.values())):
            return id(module)
        pieces.append(repr((name, code, type(part).__qualname__, sorted(settings.items()))).encode())
    return _digest(*pieces, digest(dict((*module.named_parameters(), *module.named_buffers()))).encode())


def _plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (type(value) is tuple and all(map(_plain, value)))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _digest(*pieces: bytes) -> bytes:
    sha = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        sha.update(len(piece).to_bytes(8, "little") + piece)
    return sha.digest()
