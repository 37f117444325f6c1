"""The first screen: what was edited and where, what it does at strength 1, and what to be careful about."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from markupsafe import Markup

from reftlens.reports.parts import Section, few_measured
from reftlens.reports.subject import Measured, Subject
from reftlens.widgets.grid import prompt_text

_FAR, _DRIFT, _WRONG = 1.0, 0.1, 0.05
_GAINED = "nats per target token, strength 1 against 0"
_DISTANCE = "KL at strength 1, nats per token"


def title_of(subject: Subject) -> str:
    kinds = ", ".join(sorted({module.label for _, module in subject.reft.items()}))
    return f"{kinds} on {subject.model.cfg.model_name}"


def summary_section(subject: Subject, warnings: list[str]) -> Section:
    """What a reader needs who reads no more."""
    values = {
        "ranks": ", ".join(map(str, sorted({module.rank for _, module in subject.reft.items()}))),
        "sites": len(subject.reft),
        "places": _places(subject),
        "count": subject.reft.parameter_count(subject.model),
        "cards": _cards(subject.results),
        "example": _example(subject.results),
        "warnings": warnings,
    }
    return Section("summary", "Summary", values)


def _places(subject: Subject) -> str:
    """Hooks with their positions, those of the same positions together."""
    hooks: dict[str, list[str]] = {}
    for site in subject.reft.sites:
        hooks.setdefault(str(site.positions), []).append(site.vectors)
    shown = {where: ", ".join(names[:8]) + ", …" * (len(names) > 8) for where, names in hooks.items()}
    return "; ".join(f"{names} at {where}" for where, names in shown.items())


class Card(NamedTuple):
    """A number that stands out."""

    name: str
    value: str
    unit: str


def _cards(results: Measured) -> list[Card]:
    dose, grid = results.dose, results.grid
    edited, base = dose.strengths.index(1.0), dose.strengths.index(0.0)

    def change(measure: str, form: str) -> str:
        estimates = dose.estimate(measure)
        return f"{estimates[base].value:{form}} → {estimates[edited].value:{form}}"

    size = dose.estimate("edit_size")[edited].value
    cards = [
        Card("log-probability gained", str(dose.estimate("effect")[edited]), _GAINED),
        Card("target tokens that are most likely", change("accuracy", ".0%"), "strength 0 → 1"),
        Card("distance from the unedited model", str(dose.estimate("kl")[edited]), _DISTANCE),
        Card("size of the edit", f"{size:.2f}", "‖edit‖ / ‖activation‖, mean over sites"),
    ]
    if dose.text is not None and dose.text.score is not None:
        cards.append(Card("score of what is written", change("score", ".2f"), "strength 0 → 1"))
    if grid is not None:
        changed = sum(a != b for a, b in zip(grid.at(1.0).texts, grid.at(0.0).texts, strict=True))
        cards.append(Card("texts that change", f"{changed} of {len(grid.prompts)}", "strength 1 against 0"))
    return cards


def _example(results: Measured) -> dict[str, Any] | None:
    """The first prompt at strength 0 and 1."""
    grid = results.grid
    if grid is None:
        return None
    texts = {int(strength): Markup(grid.cell(0, strength)) for strength in (0.0, 1.0)}
    return {"prompt": prompt_text(grid.prompts[0]), "texts": texts}


def warnings_of(subject: Subject, results: Measured) -> list[str]:
    """What speaks against trusting the numbers, in plain words."""
    return [*_of_data(subject), *_of_effect(results), *_of_texts(results)]


def _of_data(subject: Subject) -> Iterator[str]:
    run = subject.run
    if run is None:
        yield "No record of a training was given (run=), so it is not known what the edit was made from."
    elif run.data_hash != subject.trained_on.fingerprint:
        yield "The data given here is not the data of the training record: their hashes differ."
    elif subject.heldout is None:
        yield (
            "Effects were measured on the data that the edit was trained on: they say how well it was learned, not "
            "how well it carries over to other prompts."
        )
    yield from few_measured(len(subject.data))


def _of_effect(results: Measured) -> Iterator[str]:
    dose = results.dose
    at = dose.strengths.index(1.0)
    effect, kl, wrong = dose.estimate("effect")[at], dose.estimate("kl")[at].value, dose.slopes.wrong.value
    if effect.low <= 0 <= effect.high:
        yield "At strength 1 the interval of the effect includes 0: this data shows no effect."
    elif effect.high < 0:
        yield "At strength 1 the edit makes the targets less likely."
    if wrong > _WRONG:
        yield f"{wrong:.0%} of the examples move the wrong way as the strength grows."
    if kl > _FAR:
        yield f"At strength 1 predictions here are far from the unedited model's: {kl:.2f} nats per token."
    if dose.unrelated is None:
        yield "What the edit does to unrelated text was not measured (unrelated=)."
    elif (drift := dose.estimate("drift")[at].value) > _DRIFT:
        yield f"Predictions on unrelated text move as well, by {drift:.2f} nats per token at strength 1."


def _of_texts(results: Measured) -> Iterator[str]:
    grid, dose = results.grid, results.dose
    if grid is None:
        return
    at, base, texts = dose.strengths.index(1.0), dose.strengths.index(0.0), grid.at(1.0).texts
    loops, unlikely = ([e.value for e in dose.estimate(name)] for name in ("repetition", "perplexity"))
    if loops[at] > loops[base] + 0.1:
        yield f"Texts at strength 1 repeat {loops[at]:.0%} of their 3-grams; at strength 0, {loops[base]:.0%}."
    if unlikely[at] > 10 * unlikely[base]:
        yield (
            f"The unedited model finds the texts at strength 1 unlikely (perplexity {unlikely[at]:.0f}; at strength 0, "
            f"{unlikely[base]:.0f}): look at them, whether that is the style that was wanted or broken text."
        )
    if len(texts) > 1 and len(set(texts)) == 1:
        yield f"All {len(texts)} prompts are answered by one and the same text at strength 1."
