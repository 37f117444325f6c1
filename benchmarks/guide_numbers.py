"""The numbers of docs/guide, computed from its texts and weights without reftlens."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from plain_rows import Edit, PlainRows, at
from torch import Tensor

TOLERANCE = 2e-3
"""Absolute and relative: float32 logits in another order differ by some 1e-4; every fault would be larger."""


class Number(NamedTuple):
    """One number of the guide."""

    name: str
    reftlens: float
    plain: float

    @property
    def agrees(self) -> bool:
        return abs(self.reftlens - self.plain) <= TOLERANCE * max(1.0, abs(self.plain))


class Checks:
    """The numbers of each section, from what its blocks left in `names`."""

    def __init__(self, names: dict[str, Any], plain: PlainRows) -> None:
        self.names, self.plain = names, plain
        self.verbs = [plain.ids(verb, bos=False)[0] for verb in (" is", " are")]

    def __getattr__(self, name: str) -> Any:
        return self.names[name]

    def sentences(self, nouns: slice, count: int, seed: int) -> list[dict[str, Any]]:
        """Rows of the table: tokens, place of the subject, and verbs by their number among `verbs`."""
        rows = []
        for row in self.agreement(self.NOUNS[nouns], count, seed).to_dict("records"):
            ids = {side: self.plain.ids(row[side]) for side in ("base", "source")}
            subject = {side: len(self.plain.ids(row[side][: row[side].index(" near")])) - 1 for side in ids}
            verb = {name: (" is", " are").index(row[name]) for name in ("answer", "base_answer")}
            rows.append({"ids": ids, "subject": subject, **verb})
        return rows

    # -- 1, 3, 6: what is said of things ---------------------------------------------------------------------

    def opinions_on(self, things: list[str]) -> list[list[int]]:
        return [self.plain.ids(f"I think the {thing} was") for thing in things]

    def moved(self, edits: list[Edit], things: list[str], words: list[str]) -> tuple[float, float]:
        """Mean KL(edited | unedited) after each prompt, and the log-probability that the words gain."""
        targets, kl, gained = [self.plain.ids(f" {word}", bos=False)[0] for word in words], [], []
        for ids in self.opinions_on(things):
            before, after = (self.plain.log_probs(ids, each) for each in ((), edits))
            kl.append((after.exp() * (after - before)).sum())
            gained.append((after - before)[targets].mean())
        return torch.stack(kl).mean().item(), torch.stack(gained).mean().item()

    def of_equal_kl(self) -> Iterator[Number]:
        last = {good: [] for good in (True, False)}
        for text, good in self.said:
            last[good].append(self.plain.states(self.plain.ids(text), "model.layers.20", enters=False)[-1])
        means = torch.stack(last[True]).double().mean(dim=0) - torch.stack(last[False]).double().mean(dim=0)
        yield Number("distance of the means", self.means.scale.item(), means.norm().item())
        (trained,) = self.vector.interventions.state_dict().values()
        for name, vector in (("difference of means", means.float()), ("trained vector", trained)):
            dose = self.equal[name]
            edit = Edit("model.layers.20", False, lambda x, v=dose.strength * vector: x + v)
            kl, effect = self.moved([edit], self.FILMS[4:] + self.FOODS[4:], self.GOOD[2:])
            yield Number(f"{name}: KL", dose.kl.mean().item(), kl)
            yield Number(f"{name}: effect", dose.effect.mean().item(), effect)

    def of_preferences(self) -> Iterator[Number]:
        good, bad = ([self.plain.ids(f" {w}", bos=False)[0] for w in words] for words in (self.GOOD, self.BAD))
        prompts = self.opinions_on(self.FILMS[4:] + self.FOODS[4:])
        before = [self.plain.log_probs(ids) for ids in prompts]
        for name, reft in self.opinions.items():
            (vector,) = reft.interventions.state_dict().values()
            for place, strength in enumerate((-1, 0, 1)):
                edit = Edit("model.layers.20", False, lambda x, v=strength * vector: x + v)
                gains = [self.plain.log_probs(ids, [edit]) - b for ids, b in zip(prompts, before, strict=True)]
                margins = torch.stack([g[good] - g[bad] for g in gains])
                loss = torch.nn.functional.softplus(-0.1 * margins).mean().item()
                yield Number(f"{name} at {strength:+d}: loss", self.judgements[name].loss[place].mean().item(), loss)
        states = [self.plain.states(ids, "model.layers.20", enters=False) for ids in prompts]
        over = torch.tensor([(x @ self.gate.direction).mean() > self.gate.above for x in states]).double()
        yield Number("true openings", self.opened.true().value, over[4:].mean().item())
        yield Number("false openings", self.opened.false().value, over[:4].mean().item())

    def of_doses(self) -> Iterator[Number]:
        found: dict[str, list[list[float]]] = {"kl": [], "effect": []}
        things, words = self.FILMS[4:] + self.FOODS[4:], self.GOOD[2:]
        for dose in self.doses:
            both = []
            for reft in self.trained.values():
                weights = low_rank(reft)
                change = at(-1, lambda x, w=weights, s=dose: x + s * changed(x, w))
                both.append(self.moved([Edit("model.layers.20", False, change)], things, words))
            for name, values in zip(found, zip(*both, strict=True), strict=True):
                found[name].append(list(values))
        for name, values in found.items():
            means = torch.tensor(values).mean(dim=1).tolist()
            for dose, estimate, mean in zip(self.doses, self.study.estimate(name), means, strict=True):
                yield Number(f"{name} at strength {dose}", estimate.value, mean)
        spread = torch.tensor(found["effect"]).std(dim=1)[2].item()
        yield Number("effect at strength 1: ±", self.study.spread("effect")[2].item(), spread)

    # -- 2, 4, 8: exchanges between sentences ----------------------------------------------------------------

    def exchanged(self, row: dict[str, Any], places: list[tuple[str, bool, str, Any]]) -> list[Tensor]:
        """Log-probabilities of both verbs, unedited and for each place (module, enters, token, columns or basis)."""
        every = [self.plain.log_probs(row["ids"]["base"], among=self.verbs)]
        for module, enters, token, part in places:
            here, there = (row["subject"][side] if token == "subject" else -1 for side in ("base", "source"))
            source = self.plain.states(row["ids"]["source"], module, enters=enters)[there : there + 1 or None]
            if isinstance(part, slice):
                change = at(here, lambda x, s=source[:, part]: s, part)
            elif part.ndim == 1:
                change = at(here, lambda x, s=source, g=part: x + g * (s - x))
            else:
                change = at(here, lambda x, s=source, b=part: x + (s - x) @ b @ b.T)
            every.append(self.plain.log_probs(row["ids"]["base"], [Edit(module, enters, change)], self.verbs))
        return every

    def table(self, rows: list[dict[str, Any]], places: list[Any]) -> tuple[Tensor, Tensor]:
        """Of each place (the first: unedited) and row whether the answer is first, and how much it gains."""
        answers = torch.tensor([row["answer"] for row in rows])
        values = torch.stack([torch.stack(self.exchanged(row, places)) for row in rows], dim=1)
        given = values[:, torch.arange(len(rows)), answers]
        return (values.argmax(dim=2) == answers).double(), given - given[:1]

    def of_exchanges(self) -> Iterator[Number]:
        rows = self.sentences(slice(10, None), 48, 1)
        cells = [(f"model.layers.{c.layer}", False, c.position, slice(None)) for c in self.where.cells]
        hits, _ = self.table(rows[1::2], cells)
        yield Number("map: unedited", self.where.unedited, hits[0].mean().item())
        for cell, share in zip(self.where.cells, hits[1:].mean(dim=1).tolist(), strict=True):
            yield Number(f"map: {cell.position}, {cell.layer}", sum(cell.report) / len(cell.report), share)
        trained, answers, states = self.sentences(slice(10), 64, 0), [], []
        for row in trained:
            x = self.plain.states(row["ids"]["source"], "model.layers.16", enters=False)
            states.append(x[row["subject"]["source"]].double())
            answers.append(row["answer"])
        x, plural = torch.stack(states), torch.tensor(answers) == 1
        means = x[plural].mean(dim=0) - x[~plural].mean(dim=0)
        component = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False).Vh[:1].T
        (frame,) = self.das.interventions.state_dict().values()
        bases = [frame, slice(None), (means / means.norm())[:, None].float(), component.float()]
        hits, gains = self.table(rows, [("model.layers.16", False, "subject", basis) for basis in bases])
        controls = {control.name: control for control in self.claim.rows}
        names = ("no edit", "trained", "full vector", "difference of means", "PCA")
        for name, accuracy, gain in zip(names, hits.mean(dim=1).tolist(), gains.mean(dim=1).tolist(), strict=True):
            yield Number(f"{name}: accuracy", controls[name].accuracy.value, accuracy)
            yield Number(f"{name}: log p gained", controls[name].log_prob.value, gain)

    def of_heads_and_neurons(self) -> Iterator[Number]:
        rows, width = self.sentences(slice(10, None), 48, 1), self.model.cfg.d_head
        for name, row in [*self.does_table.head(6).iterrows(), *self.does_table.filter(like="keys", axis=0).iterrows()]:
            kind, place = name.split(" ")
            block, _, head = place.partition(".")
            part = slice(int(head) * width, int(head) * width + width) if head else slice(None)
            module, enters, token = {
                "head": ("self_attn.o_proj", True, "last"),
                "keys": ("self_attn.k_proj", False, "subject"),
                "values": ("self_attn.v_proj", False, "subject"),
                "neurons": ("mlp.down_proj", True, "last"),
            }[kind]
            hits, gains = self.table(rows, [(f"model.layers.{block}.{module}", enters, token, part)])
            yield Number(f"{name}: effect", row["effect"], gains[1].mean().item())
            yield Number(f"{name}: accuracy", row["accuracy"], hits[1].mean().item())
        state = self.mask.interventions.state_dict()
        gate = torch.sigmoid(state["0.logits"] / state["0.temperature_now"])
        yield Number("open neurons", len(self.ranked.open), int((gate > 0.5).sum()))
        hits, gains = self.table(rows, [("model.layers.27.mlp.down_proj", True, "last", gate)])
        yield Number("their interchange accuracy", self.by_neurons.accuracy.value, hits[1].mean().item())

    def of_report(self) -> Iterator[Number]:
        text, rows = self.page.read_text(), self.sentences(slice(10, None), 48, 1)
        (frame,) = self.das.interventions.state_dict().values()
        hits, gains = self.table(rows, [("model.layers.16", False, "subject", frame)])
        yield Number("report: log-probability gained", card(text, "log-probability gained"), gains[1].mean().item())
        before, after = (round(100 * share, 0) for share in hits.mean(dim=1).tolist())
        told = re.search(r"(\d+)% → (\d+)%", text)
        yield Number("report: right before, in %", float(told[1]), before)
        yield Number("report: right after, in %", float(told[2]), after)

    # -- 5, 7: chats -----------------------------------------------------------------------------------------

    def of_chats(self) -> Iterator[Number]:
        losses: list[list[float]] = [[], []]
        hits: list[list[float]] = [[], []]
        weights = low_rank(self.sailor)
        for thing in self.FOODS[4:]:
            for word, answer in self.ANSWERS.items():
                messages = self.chat(thing, word, answer)["messages"]
                text, whole = (
                    self.plain.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
                    for turns, ask in ((messages[:-1], True), (messages, False))
                )
                encoded = self.plain.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
                begin = text.rindex(messages[2]["content"])
                end = begin + len(messages[2]["content"])
                places = [i for i, (a, b) in enumerate(encoded.offset_mapping) if a < end and b > begin]
                target = self.plain.ids(whole[len(text) :], bos=False)
                special = [i for i, token in enumerate(target) if token in self.plain.tokenizer.all_special_ids]
                target = target[: special[0] + 1]
                for side, strength in enumerate((0, 1)):
                    change = at(slice(places[0], places[-1] + 1), lambda x, s=strength: x + s * changed(x, weights))
                    logits = self.plain.logits([*encoded.input_ids, *target], [Edit("model.layers.12", False, change)])
                    there = logits[-len(target) - 1 : -1].log_softmax(dim=1)
                    losses[side].append(-there[torch.arange(len(target)), target].mean().item())
                    hits[side].append((there.argmax(dim=1) == torch.tensor(target)).double().mean().item())
        for side, strength in enumerate((0, 1)):
            yield Number(f"loss at {strength}", self.marks.loss[side].mean().item(), mean(losses[side]))
            yield Number(f"accuracy at {strength}", self.marks.accuracy[side].mean().item(), mean(hits[side]))

    def of_outside(self) -> Iterator[Number]:
        record = json.loads((self.folder / "reft.json").read_text())
        yield Number("interventions in the folder", 1, len(record["interventions"]))
        same = (self.same == self.written).double().mean().item()
        yield Number("tokens written without reftlens that are the same", 1.0, same)


def low_rank(reft: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Frame `R`, `W` and `b` of a LoReFT."""
    state = reft.interventions.state_dict()
    return state["0.frame.matrix"], state["0.W"], state["0.b"]


def changed(x: Tensor, weights: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """`Rᵀ (W h + b - R h)`, with the columns of `R` orthonormal here."""
    R, W, b = weights
    return (x @ W.T + b - x @ R) @ R.T


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def card(text: str, name: str) -> float:
    """The number on a card of a report."""
    found = re.search(rf"{name}.*?(-?\d+\.\d+)", text, flags=re.DOTALL)
    return float(found[1])
