"""Edits of what leaves a block, or its MLP: training, scores, generation and storage, each beside the oracle."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import zoo
from architecture_checks import TEXT, TOLERANCE, Checked, Wrong
from row_oracle import Oracle, Row
from torch import Tensor

import reftlens as rl

EXAMPLES = [  # of 2 to 50 tokens: within and beyond a window of 16 and an original context of 24, in one batch
    ("the cat sat on the mat", " over the green hill"),
    (f"{TEXT} the mat and the moon looked over the hill", " while a cat ran by the mat"),
    ("a dog ran by", " and looked"),
    (f"over the hill {TEXT}", " and the dog sat on the green mat"),
    ("green", " moon"),
    (f"{TEXT} the mat and the dog {TEXT}", " ran"),
    (f"{TEXT} the mat and the moon looked at a cat", " on the mat"),
    ("at the green moon a cat looked over the dog and", " the hill"),
    (f"while {TEXT}", " the cat looked"),
]
PROMPTS = ["the cat sat", f"{TEXT} and the green hill", "a dog", "the moon looked at the hill while a cat sat on it"]
PLACES: dict[str, Callable[[int, int], Sequence[int]]] = {
    "last": lambda prompt, length: [prompt - 1],
    "f1+l2": lambda prompt, length: sorted({0, max(0, prompt - 2), prompt - 1}),
    "all": lambda prompt, length: range(length),
}
DECODING = rl.Decoding(max_new_tokens=6)
TIE = 1e-4
"""A lead of one logit over the next that rounding may turn round."""


class Seen(NamedTuple):
    """One optimizer step: the weights it began with, its batch, and what the library computed of it."""

    weights: dict[str, Tensor]
    batch: Any
    logits: Tensor
    loss: float
    gradients: list[Tensor]


class BrokenOff(Exception):
    """Raised by the check itself, to let a run go on from its checkpoint."""


def check_edits(checked: Checked, bridge: Any, model: Any, folder: Path) -> None:
    """The last prompt token in the middle, a few at the bottom, all at the top, and the last at an MLP."""
    stacks = {name: part.name for name, part in bridge.adapter.component_mapping.items() if name.endswith("blocks")}
    stack = "blocks" if "blocks" in stacks else list(stacks)[-1]  # of an encoder and a decoder, the decoder's
    path, top = stacks[stack], len(model.get_submodule(stacks[stack])) - 1
    for layer, where in ((1, "last"), (0, "f1+l2"), (top, "all")):
        hook = f"{stack}.{layer}.hook_resid_post"
        Edit(checked, bridge, model, hook, f"{path}.{layer}", where, folder, f"block {layer}, {where}").check()
    mlp = module_of(bridge, model, f"{stack}.1.hook_mlp_out", f"{path}.1")
    if mlp:
        Edit(checked, bridge, model, f"{stack}.1.hook_mlp_out", mlp, "last", folder, "MLP 1, last").check()


def module_of(bridge: Any, model: Any, hook: str, block: str) -> str:
    """The plain model's module that puts out what passes `hook` inside `block`, or "" where none does."""
    point = bridge.hook_dict.get(hook)
    name = (getattr(point, "name", None) or "").split(".")[2:-1]
    component = getattr(bridge, hook.split(".")[0])[1] if name else None
    for part in name:
        component = getattr(component, part, None)
    path = f"{block}.{getattr(component, 'name', None)}"
    if point is None or component is None or path not in dict(model.named_modules()):
        return ""
    seen: list[Any] = []
    ids = torch.tensor([zoo.tokenizer()(TEXT).input_ids])
    handles = [m.register_forward_hook(lambda *call: seen.append(call[2])) for m in (model.get_submodule(path), point)]
    with torch.no_grad(), suppress(Exception):  # of a model that does not read tokens alone
        model(input_ids=ids, use_cache=False)
        bridge(ids, return_type="logits")
    for handle in handles:
        handle.remove()
    if len(seen) != 2:
        return ""
    first, second = (out[0] if isinstance(out, tuple) else out for out in seen)
    return path if first.shape == second.shape and torch.allclose(first, second, atol=1e-4) else ""


def examples(bridge: Any) -> tuple[rl.Batch, list[Row]]:
    """The examples as a batch, and each as a row of the oracle; in two of them not every answer token is a target."""
    data = rl.encode(bridge, [rl.Example(*pair) for pair in EXAMPLES])
    targets = data.target_mask.clone()
    for row, hidden in ((1, slice(2, None)), (3, slice(0, 3))):
        targets[row, data.target_mask[row].nonzero().flatten()[hidden]] = False
    data = replace(data, target_mask=targets)
    parts = zip(data.tokens, data.attention_mask, data.prompt_mask, targets, strict=True)
    return data, [Row(i[r].tolist(), int(p.sum()), t.nonzero().flatten().tolist()) for i, r, p, t in parts]


@dataclass
class Edit:
    """One LoReFT at one place."""

    checked: Checked
    bridge: Any
    model: Any
    hook: str
    module: str
    """Of the plain model, what puts out what the hook sees."""
    where: str
    folder: Path
    place: str
    texts: dict[tuple[int, ...], tuple[list[int], list[float]]] = field(default_factory=dict)
    """What the oracle writes after a prompt."""

    def check(self) -> None:
        place, part = self.place, self.checked.part
        self.reft = rl.ReFT({rl.Site(self.hook, self.where): rl.LoReFT(self.bridge.cfg.d_model, rank=2)})
        self.reft.reset(0)
        run = part(f"fit ({place})", self.fit)
        if run is not None:
            self.checked.computation[place] = run.computation
        if self.where != "f1+l2":
            part(f"generate batch ({place})", lambda: self.generate(PROMPTS))
            part(f"generate alone ({place})", lambda: [self.generate([prompt]) for prompt in PROMPTS])
        if self.whole:
            part("generate prefilled", lambda: self.generate(rl.generation.prefill(self.reft, self.bridge, PROMPTS)))
            part("evaluate", self.evaluate)
            part("save and load", lambda: self.store(run))

    @property
    def whole(self) -> bool:
        """Whether everything is checked of this place."""
        return self.place == "block 1, last"

    def oracle(self, strength: float = 1.0) -> Oracle:
        module = self.model.get_submodule(self.module)
        return Oracle(self.model, module, deepcopy(self.reft[0]), PLACES[self.where], strength)

    def fit(self) -> Any:
        """Logits, loss and gradients of every step, at the weights that it began with; and the loss falls."""
        data, rows = examples(self.bridge)
        run, steps = self.train(data)
        oracle = self.oracle()
        for number, step in enumerate(steps, start=1):
            oracle.module.load_state_dict(step.weights)
            batch = [rows[data.examples.index(e)] for e in step.batch.examples]
            logits, loss, gradients = oracle.step(batch)
            floor = 1e-3 * max(g.abs().max().item() for g in gradients)  # what is 0 in theory is mere rounding
            self.checked.equal(f"step {number}: logits", step.logits, logits)
            self.checked.equal(f"step {number}: loss", torch.tensor(step.loss), loss)
            pairs = list(zip(step.gradients, gradients, strict=True))
            if any((a - b).abs().max() > TOLERANCE * max(b.abs().max().item(), floor) for a, b in pairs):
                floor = max(floor, self.rounding(oracle, batch, gradients) / TOLERANCE)
            for ours, expected in pairs:
                self.checked.equal(f"step {number}: gradients", ours, expected, floor)
        if len(run.losses) > 3 and not run.losses[-1] < run.losses[0]:  # the same rows in both
            raise Wrong(f"the loss went from {run.losses[0]:.4f} to {run.losses[-1]:.4f}")
        return run

    def rounding(self, oracle: Oracle, batch: list[Row], gradients: list[Tensor]) -> float:
        """By how much the oracle's own gradients move when each weight moves by 1e-6, as sums in another order do."""
        noisy = deepcopy(self.model)
        for number, weight in enumerate(noisy.parameters()):
            signs = torch.randint(0, 2, weight.shape, generator=torch.Generator().manual_seed(number)) * 2 - 1
            weight.data.mul_(1 + 1e-6 * signs)
        moved = replace(oracle, model=noisy, block=noisy.get_submodule(self.module)).step(batch)[2]
        return max((a - b).abs().max().item() for a, b in zip(moved, gradients, strict=True))

    def train(self, data: rl.Batch) -> tuple[Any, list[Seen]]:
        """A few steps; in the middle, the run is broken off: it goes on with a batch of one row, then mixed ones."""
        scored: list[tuple[Tensor, Any]] = []
        steps: list[Seen] = []
        weights = [deepcopy(self.reft[0].state_dict())]

        def objective(logits: Tensor, batch: rl.Batch) -> Tensor:
            scored.append((logits.detach().clone(), batch))
            return rl.training.cross_entropy(logits, batch)

        def on_step(step: Any) -> None:
            logits, batch = scored[-1]
            gradients = [p.grad.clone() for p in step.reft.parameters()]
            steps.append(Seen(weights[-1], batch, logits, step.loss, gradients))
            weights.append(deepcopy(step.reft[0].state_dict()))

        def until_second(step: Any) -> None:
            if step.step == 2:
                raise BrokenOff
            on_step(step)

        settings: dict[str, Any] = {"objective": objective, "lr": 0.02, "clip": None, "progress": False}
        if self.whole:
            settings |= {"steps": 7, "batch_size": 8, "shuffle": False}
            settings |= {"checkpoint": self.folder / "run", "checkpoint_every": 1}
            with suppress(BrokenOff):
                rl.fit(self.reft, self.bridge, data, on_step=until_second, **settings)
        else:
            settings |= {"steps": 3, "batch_size": 4}
        return rl.fit(self.reft, self.bridge, data, on_step=on_step, **settings), steps

    def evaluate(self) -> None:
        """Losses of each row, unedited and at half strength."""
        data, rows = examples(self.bridge)
        strengths = (0.0, 0.5)
        evaluation = rl.evaluate(self.reft, self.bridge, data, strengths, batch_size=4, progress=False)
        for strength, losses in zip(strengths, evaluation.loss, strict=True):
            oracle = self.oracle(strength)
            expected = torch.stack([oracle.scores(row)[1].mean() for row in rows]).detach()
            self.checked.equal(f"losses at strength {strength:g}", losses, expected)

    def generate(self, prompts: Any) -> None:
        """Greedy tokens; where the oracle's two best tokens are equal but for rounding, the rest is not compared."""
        generation = rl.generate(self.reft, self.bridge, prompts, DECODING)
        oracle, stops = self.oracle(), {self.bridge.tokenizer.eos_token_id}
        for prompt, ids in zip(generation.prompt_ids, generation.ids, strict=True):
            if prompt not in self.texts:
                self.texts[prompt] = oracle.greedy(list(prompt), DECODING.max_new_tokens, stops)
            expected, leads = self.texts[prompt]
            sure = next((n for n, lead in enumerate(leads) if lead < TIE), len(leads))
            if list(ids[:sure]) != expected[:sure]:
                raise Wrong(f"tokens {list(ids)} after {len(prompt)} of a prompt, the oracle's {expected}")

    def store(self, run: Any) -> None:
        rl.save(self.reft, self.folder / "reft", self.bridge, run=run)
        loaded = rl.load(self.folder / "reft", self.bridge)
        if loaded.sites != self.reft.sites:
            raise Wrong("the sites that were loaded are others")
        for key, tensor in self.reft.state_dict().items():
            self.checked.equal(key, loaded.state_dict()[key], tensor)
