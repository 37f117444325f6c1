"""The first screen: what was edited and where, what it does at strength 1, and what to be careful about."""

from reftlens.analysis.statistics import Estimate
from reftlens.reports.markup import escape, listed, paragraph
from reftlens.reports.subject import Measured, Subject, few
from reftlens.widgets.grid import prompt_text

_SMALL, _FAR, _DRIFT, _WRONG = 50, 1.0, 0.1, 0.05


def title_of(subject: Subject) -> str:
    kinds = ", ".join(sorted({module.kind for _, module in subject.reft.items()}))
    return f"{kinds} on {subject.model.cfg.model_name}"


def summary(subject: Subject, found: Measured, warnings: list[str]) -> str:
    """HTML of what a reader needs who reads no more."""
    count = subject.reft.parameter_count(subject.model)
    ranks = sorted({module.rank for _, module in subject.reft.items()})
    many = len(subject.reft)
    said = (
        f"An edit of rank {', '.join(map(str, ranks))} at {many} site{'s' * (many > 1)} of the model: "
        f"{_places(subject)}. "
        f"It has {count.stored:,} trained numbers, {count.percent:.2g} % of the model's {count.model:,}."
    )
    warned = f"<h2>Read with care</h2>{listed(warnings, 'warnings')}" if warnings else ""
    return f'{paragraph(said, "lead")}<dl class="cards">{_cards(subject, found)}</dl>{_example(found)}{warned}'


def _places(subject: Subject) -> str:
    """Hooks with their positions, those of the same positions together."""
    hooks: dict[str, list[str]] = {}
    for site in subject.reft.sites:
        heads = "" if site.heads is None else f" heads {list(site.heads)}"
        hooks.setdefault(str(site.positions), []).append(site.hook + heads)
    return "; ".join(f"{few(names)} at {positions}" for positions, names in hooks.items())


def _cards(subject: Subject, found: Measured) -> str:
    dose = found.dose
    at, base = dose.strengths.index(1.0), dose.strengths.index(0.0)
    effect, kl = dose.estimate("effect")[at], dose.estimate("kl")[at]
    before, after = (dose.estimate("accuracy")[i].value for i in (base, at))
    cards = [
        ("log-probability gained", _with(effect), "nats per target token, strength 1 against 0"),
        ("target tokens that are most likely", f"{before:.0%} → {after:.0%}", "strength 0 → 1"),
        ("distance from the unedited model", _with(kl), "KL at strength 1, nats per token"),
        ("size of the edit", f"{dose.estimate('edit_size')[at].value:.2f}", "‖edit‖ / ‖activation‖, mean over sites"),
    ]
    if dose.text is not None and dose.text.score is not None:
        scores = [e.value for e in dose.estimate("score")]
        cards.append(("score of what is written", f"{scores[base]:.2f} → {scores[at]:.2f}", "strength 0 → 1"))
    if found.grid is not None:
        changed = sum(a != b for a, b in zip(found.grid.at(1.0).texts, found.grid.at(0.0).texts, strict=True))
        cards.append(("texts that change", f"{changed} of {len(found.grid.prompts)}", "strength 1 against 0"))
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(unit)}</small></dd></div>"
        for name, value, unit in cards
    )


def _with(one: Estimate) -> str:
    return f"{one.value:.2f} [{one.low:.2f}, {one.high:.2f}]"


def _example(found: Measured) -> str:
    """The first prompt at strength 0 and 1."""
    grid = found.grid
    if grid is None:
        return ""
    cells = "".join(
        f'<div><p class="label">{name}</p><pre>{grid.cell(0, strength)}</pre></div>'
        for name, strength in (("Strength 0", 0.0), ("Strength 1", 1.0))
    )
    asked = f'<p class="asked">{escape(prompt_text(grid.prompts[0]))}</p>'
    return f'<div class="example reftlens-grid">{asked}<div class="reftlens-pair">{cells}</div></div>'


def warnings_of(subject: Subject, found: Measured) -> list[str]:
    """What speaks against trusting the numbers, in plain words."""
    return [*_of_data(subject), *_of_effect(found), *_of_texts(found)]


def _of_data(subject: Subject) -> list[str]:
    said, run, count = [], subject.run, len(subject.data)
    if run is None:
        said.append("No record of the training was given, so it is not known what the edit was trained on.")
    elif run.data_hash != subject.trained_on.fingerprint:
        said.append("The data given here is not the data of the training record: their hashes differ.")
    elif subject.heldout is None:
        said.append(
            "Effects were measured on the data that the edit was trained on: they say how well it was learned, not "
            "how well it carries over to other prompts."
        )
    if count < _SMALL:
        said.append(f"Only {count} example{'s were' if count != 1 else ' was'} measured: the intervals are rough.")
    return said


def _of_effect(found: Measured) -> list[str]:
    said, dose = [], found.dose
    at = dose.strengths.index(1.0)
    effect, kl, wrong = dose.estimate("effect")[at], dose.estimate("kl")[at].value, dose.slopes.wrong.value
    if effect.low <= 0 <= effect.high:
        said.append("At strength 1 the interval of the effect includes 0: this data shows no effect.")
    elif effect.high < 0:
        said.append("At strength 1 the edit makes the targets less likely.")
    if wrong > _WRONG:
        said.append(f"{wrong:.0%} of the examples move the wrong way as the strength grows.")
    if kl > _FAR:
        said.append(f"At strength 1 predictions here are far from the unedited model's: {kl:.2f} nats per token.")
    if dose.unrelated is None:
        said.append("What the edit does to unrelated text was not measured (unrelated=).")
    elif (drift := dose.estimate("drift")[at].value) > _DRIFT:
        said.append(f"Predictions on unrelated text move as well, by {drift:.2f} nats per token at strength 1.")
    return said


def _of_texts(found: Measured) -> list[str]:
    said, grid, dose = [], found.grid, found.dose
    if grid is None:
        return []
    at, base, texts = dose.strengths.index(1.0), dose.strengths.index(0.0), grid.at(1.0).texts
    loops, unlikely = ([e.value for e in dose.estimate(name)] for name in ("repetition", "perplexity"))
    if loops[at] > loops[base] + 0.1:
        said.append(f"Texts at strength 1 repeat {loops[at]:.0%} of their 3-grams; at strength 0, {loops[base]:.0%}.")
    if unlikely[at] > 10 * unlikely[base]:
        said.append(
            f"The unedited model finds the texts at strength 1 unlikely (perplexity {unlikely[at]:.0f}, at 0 "
            f"{unlikely[base]:.0f}): look at them, whether that is the style that was wanted or broken text."
        )
    if len(texts) > 1 and len(set(texts)) == 1:
        said.append(f"All {len(texts)} prompts are answered by one and the same text at strength 1.")
    return said
