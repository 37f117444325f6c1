"""The numbers of notebooks/09_your_own.ipynb, computed from its tables and weights without reftlens."""

from collections.abc import Iterator
from typing import Any

from guide_numbers import Checks, Number
from plain_rows import Edit, at
from torch import Tensor

PLACES = {"subject": "subject", "last token": "last"}


class NotebookChecks(Checks):
    """The numbers, from what its cells left in `names`."""

    @property
    def block(self) -> str:
        return f"model.layers.{self.LAYER}"

    def rows(self) -> list[dict[str, Any]]:
        """The test table: tokens, place of the subject, and verbs by their number."""
        rows = []
        for row in self.test.to_dict("records"):
            ids = {side: self.plain.ids(row[side]) for side in ("base", "source")}
            subject = {side: len(self.plain.ids(row[side][: row[side].index(" near")])) - 1 for side in ids}
            verbs = {name: (" is", " are").index(row[name]) for name in ("own", "answer", "turned")}
            rows.append({"ids": ids, "subject": subject, **verbs})
        return rows

    def exchanges(self) -> Iterator[Number]:
        """Of the map and of DAS."""
        rows = self.rows()
        cells = [cell for cell in self.where.cells if cell.position in PLACES]
        places = [(f"model.layers.{c.layer}", False, PLACES[c.position], slice(None)) for c in cells]
        hits, _ = self.table(rows[1::2], places)
        yield Number("map: unedited", self.where.unedited, hits[0].mean().item())
        for cell, share in zip(cells, hits[1:].mean(dim=1).tolist(), strict=True):
            yield Number(f"map: {cell.position}, {cell.layer}", sum(cell.report) / len(cell.report), share)
        (frame,) = self.das.interventions.state_dict().values()
        hits, gains = self.table(
            rows, [(self.block, False, "subject", frame), (self.block, False, "subject", slice(None))]
        )
        controls = {control.name: control for control in self.claim.rows}
        yield Number("DAS: interchange accuracy", self.scores.accuracy.value, hits[1].mean().item())
        for name, accuracy, gain in zip(("no edit", "trained", "full vector"), hits, gains, strict=True):
            yield Number(f"{name}: accuracy", controls[name].accuracy.value, accuracy.mean().item())
            yield Number(f"{name}: log p gained", controls[name].log_prob.value, gain.mean().item())

    def reflected(self, row: dict[str, Any], state: dict[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
        """Log-probabilities of all tokens, unedited and with the reflection `h + 2 (c - h·v) v` at the subject."""
        v, c = state[f"{prefix}frame.matrix"][:, 0], state[f"{prefix}centre"]
        change = at(row["subject"]["base"], lambda x: x + 2 * (c - x @ v)[:, None] * v)
        ids = row["ids"]["base"]
        return self.plain.log_probs(ids), self.plain.log_probs(ids, [Edit(self.block, False, change)])

    def reflections(self) -> Iterator[Number]:
        """Of both objectives."""
        rows = self.rows()
        for result in self.results:
            state = self.trained[result["objective"]].interventions.state_dict()
            turned, kl, swap = [], [], []
            for row in rows:
                before, after = self.reflected(row, state, "0.")
                own, other = self.verbs[row["own"]], self.verbs[row["turned"]]
                turned.append(float(after[other] > after[own]))
                kl.append((after.exp() * (after - before)).sum().item())
                swap.append(((after[other] - before[own]) ** 2 + (after[own] - before[other]) ** 2).item())
            for name, values in (("turned", turned), ("KL", kl), ("swap", swap)):
                yield Number(f"{result['objective']}: {name}", result[name], sum(values) / len(values))

    def gate_numbers(self) -> Iterator[Number]:
        """Of the gate, and of the edit behind it."""
        state, above = self.gated.interventions.state_dict(), self.gate.gate.above
        opens: dict[str, list[float]] = {"singular": [], "plural": []}
        right: dict[str, list[float]] = {"singular": [], "plural": []}
        for row in self.rows():
            x = self.plain.states(row["ids"]["base"], self.block, enters=False)[row["subject"]["base"]]
            is_open = bool(x @ state["0.gate.direction"] > above)
            after = self.reflected(row, state, "0.inner.")[is_open][self.verbs]
            number = ("singular", "plural")[row["own"]]
            opens[number].append(float(is_open))
            right[number].append(float(after.argmax() == row["turned"]))
        shares = {name: (sum(opens[name]) / len(opens[name]), sum(right[name]) / len(right[name])) for name in opens}
        yield Number("opens for plurals", self.opened.true().value, shares["plural"][0])
        yield Number("opens for singulars", self.opened.false().value, shares["singular"][0])
        means = self.change.groupby(["subject", "strength"])["accuracy"].mean()
        for name, (_, share) in shares.items():
            yield Number(f"{name} verbs turned", means[name, 1.0], share)

    def numbers(self) -> Iterator[Number]:
        """All of them."""
        yield from self.exchanges()
        yield from self.reflections()
        yield from self.gate_numbers()
