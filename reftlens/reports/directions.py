"""What was learned: how the edit spreads over directions, how they lie, and the tokens and examples of each."""

from typing import TYPE_CHECKING

from torch import Tensor

from reftlens.analysis.subspaces.directions import pca
from reftlens.analysis.subspaces.examples import DirectionExample, DirectionExamples, direction_examples
from reftlens.analysis.subspaces.frame import principal_frame
from reftlens.analysis.subspaces.geometry import columns_of, overlap
from reftlens.analysis.subspaces.tokens import DirectionTokens, direction_tokens
from reftlens.editing.reading import activations
from reftlens.reports.markup import Section, escape, figure, number, paragraph
from reftlens.reports.subject import Subject

if TYPE_CHECKING:
    from pandas import DataFrame

_MOST_SITES, _MOST_DIRECTIONS, _TOP = 6, 4, 8


def geometry_section(subject: Subject) -> Section:
    """The spectrum of the edit, and overlaps beside the chance level."""
    frames: dict[str, DataFrame] = {}
    try:
        found = principal_frame(subject.reft, subject.model, subject.data, progress=subject.progress)
    except ValueError as error:
        return Section("geometry", "Geometry", absent("The directions of the edit", error))
    frames["spectrum"] = found.to_frame()
    caption = "How much of the edit lies along each direction; dashed: the same along all."
    html = figure(found.plot, "spectrum", caption, frames["spectrum"])
    said = "Directions are the principal axes of the edit over the data, the strongest first."
    for one in found.sites:
        said += f" {one.site}: effective rank {one.effective_rank:.2f} of {len(one.shares)}."
    html += _overlaps(subject, frames)
    said += (
        " This is one training: whether another seed finds the same directions is not known from it "
        "(fit_many and overlap tell)."
    )
    return Section("geometry", "Geometry", paragraph(said) + f'<div class="figures">{html}</div>', frames)


def _overlaps(subject: Subject, frames: "dict[str, DataFrame]") -> str:
    """The edits of all sites and the principal components of what they edit, each with each."""
    subspaces: dict[str, Tensor] = {}
    legend = []
    for i, (site, module) in enumerate(subject.reft.items()):
        if i == _MOST_SITES:
            break
        columns = columns_of(module)
        hidden = activations(subject.model, subject.data, site, progress=subject.progress)
        rank = min(columns.shape[1], len(hidden) - 1)
        if not 0 < rank <= 32:
            return absent("Overlaps", f"{site} has rank {columns.shape[1]} and {len(hidden)} tokens, expected 1 to 32")
        subspaces |= {f"edit {i}": columns, f"PCA {i}": pca(hidden, rank).basis}
        legend.append(f"{i}: {site}")
    try:
        found = overlap(subspaces)
    except ValueError as error:
        return absent("Overlaps", error)
    frames["overlap"] = found.to_frame()
    caption = (
        "Overlap of the edits with one another and with as many principal components (PCA) of the hidden states; "
        f"small print: chance, mean ± standard deviation of random subspaces. Site {', '.join(legend)}."
    )
    return figure(found.plot, "overlap", caption, frames["overlap"], wide=len(subspaces) > 4)


def directions_section(subject: Subject) -> Section:
    """Tokens and examples of the strongest directions of each site."""
    html, frames = "", {}
    for i, site in enumerate(subject.reft.sites[:_MOST_SITES]):
        html += f"<h3>{escape(f'Site {i}: {site}')}</h3>"
        shown = range(min(_MOST_DIRECTIONS, columns_of(subject.reft[i]).shape[1]))
        try:
            tokens = direction_tokens(
                subject.reft, subject.model, data=subject.data, site=i, directions=shown, top=_TOP, seed=subject.seed,
                progress=subject.progress,
            )  # fmt: skip
        except ValueError as error:
            html += absent("Tokens", error)
        else:
            frames[f"tokens of site {i}"] = tokens.to_frame()
            html += _tokens(tokens, i)
        try:
            examples = direction_examples(
                subject.reft, subject.model, subject.data, site=i, directions=shown, top=3, progress=subject.progress
            )
        except ValueError as error:
            html += absent("Examples", error)
        else:
            frames[f"examples of site {i}"] = examples.to_frame()
            html += _examples(examples, i)
    left = len(subject.reft) - _MOST_SITES
    html += paragraph(f"{left} more site(s) are not shown.") if left > 0 else ""
    return Section("directions", "Tokens and examples of each direction", html, frames)


def _tokens(found: DirectionTokens, i: int) -> str:
    """What each direction promotes and suppresses; a share of random directions beside it."""
    rows, shown = "", sorted({r.direction for r in found.rows})
    for direction in shown:
        cells = "".join(
            f"<td>{' '.join(f'<code>{escape(repr(t))}</code>' for t in found.top(direction, effect))}</td>"
            for effect in ("promotes", "suppresses")
        )
        rows += f'<tr><th scope="row">{direction}</th>{cells}<td class="number">{number(found.p(direction))}</td></tr>'
    said = (
        f"Tokens of each direction through the {found.lens}. p: share of random directions whose strongest token is "
        f"as strong; 95 % of them stay within ±{found.chance:.2f}."
    )
    weak = all(found.p(direction) > 0.05 for direction in shown)
    note = paragraph("No direction here stands out from random ones: read nothing into its tokens.") if weak else ""
    columns = ("direction", "promotes", "suppresses", "p")
    caption = f"Direction 0 of site {i}: logits of its strongest tokens; dashed: random directions, 95 %."
    return note + _table(said, columns, rows) + figure(lambda: found.plot(direction=0), f"tokens-{i}", caption)


def _examples(found: DirectionExamples, i: int) -> str:
    rows = "".join(_example(r) for r in found.rows)
    said = f"Tokens of the data that site {i} moves most, both ways along each direction"
    html = _table(said, ("direction", "end", "moved by", "example", "token in its text"), rows)
    return f"<details><summary>Tokens of the data that are moved most</summary>{html}</details>"


def _example(r: DirectionExample) -> str:
    text = f"{escape(r.before)}<mark>{escape(r.token)}</mark>{escape(r.after)}"
    return (
        f'<tr><th scope="row">{r.direction}</th><td>{r.end}</td><td class="number">{number(r.code)}</td>'
        f'<td class="number">{r.row}</td><td class="text">{text}</td></tr>'
    )


def _table(caption: str, columns: tuple[str, ...], rows: str) -> str:
    head = "".join(f'<th scope="col">{c}</th>' for c in columns)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table><caption>'
        f"{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def absent(what: str, why: object) -> str:
    """A sentence in the place of what does not apply here."""
    return paragraph(f"{what}: not shown, because {why}.", "absent")
