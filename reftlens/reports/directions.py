"""What was learned: how the edit spreads over directions, how they lie, and the tokens and examples of each."""

from typing import Any

from torch import Tensor

from reftlens.analysis.subspaces.directions import pca
from reftlens.analysis.subspaces.examples import DirectionExamples, direction_examples
from reftlens.analysis.subspaces.frame import PrincipalFrame, principal_frame
from reftlens.analysis.subspaces.geometry import columns_of, overlap
from reftlens.analysis.subspaces.tokens import DirectionTokens, direction_tokens
from reftlens.editing.reading import activations
from reftlens.reports.parts import Section, figure
from reftlens.reports.subject import Subject
from reftlens.text.batch import Batch

_MOST_SITES, _MOST_DIRECTIONS, _TOP = 6, 4, 8


def geometry_section(subject: Subject) -> Section:
    """The spectrum of the edit, and overlaps beside the chance level."""
    try:
        frame = principal_frame(subject.reft, subject.model, subject.data, progress=subject.progress)
    except ValueError as error:
        return Section("geometry", "Geometry", absent=absent("The directions of the edit", error))
    frames = {"spectrum": frame.to_frame()}
    caption = "How much of the edit lies along each direction; dashed: the same along all."
    figures = [figure(frame.plot, "spectrum", caption, frames["spectrum"])]
    values = {"sites": frame.sites, "figures": figures, "absent": ""}
    try:
        overlaps = overlap(_subspaces(subject))
    except ValueError as error:
        values["absent"] = absent("Overlaps", error)
    else:
        frames["overlap"] = overlaps.to_frame()
        wide = min(len(subject.reft), _MOST_SITES) > 2
        figures.append(figure(overlaps.plot, "overlap", _overlap_caption(subject), frames["overlap"], wide=wide))
    return Section("geometry", "Geometry", values, frames)


def _subspaces(subject: Subject) -> dict[str, Tensor]:
    """The edits of all sites and the principal components of what they edit."""
    subspaces: dict[str, Tensor] = {}
    for i, site in enumerate(subject.reft.sites[:_MOST_SITES]):
        columns = columns_of(subject.reft[i])
        hidden = activations(subject.model, subject.data, site, progress=subject.progress)
        rank = min(columns.shape[1], len(hidden) - 1)
        if not 0 < rank <= 32:
            raise ValueError(f"{site} has rank {columns.shape[1]} and {len(hidden)} tokens, expected 1 to 32")
        subspaces |= {f"edit {i}": columns, f"PCA {i}": pca(hidden, rank).basis}
    return subspaces


def _overlap_caption(subject: Subject) -> str:
    sites = ", ".join(f"{i}: {site}" for i, site in enumerate(subject.reft.sites[:_MOST_SITES]))
    return (
        "Overlap of the edits with one another and with as many principal components (PCA) of the hidden states; "
        f"small print: chance, mean ± standard deviation of random subspaces. Site {sites}."
    )


def directions_section(subject: Subject) -> Section:
    """Tokens and examples of the strongest directions of each site."""
    sites, frames = [], {}
    data = _read(subject)
    for i, site in enumerate(subject.reft.sites[:_MOST_SITES]):
        tokens, examples = _tokens(subject, data, i), _examples(subject, data, i)
        if not isinstance(tokens, str):
            frames[f"tokens of site {i}"] = tokens.to_frame()
        if not isinstance(examples, str):
            frames[f"examples of site {i}"] = examples.to_frame()
        sites.append(
            {
                "index": i,
                "name": str(site),
                "tokens": tokens if isinstance(tokens, str) else _token_table(tokens, i),
                "examples": examples if isinstance(examples, str) else examples.rows,
            }
        )
    values = {"sites": sites, "left": len(subject.reft) - _MOST_SITES}
    return Section("directions", "Tokens and examples of each direction", values, frames)


def _read(subject: Subject) -> PrincipalFrame | Batch:
    """The edits of all sites, read once; the data, where some site edits nothing."""
    try:
        return principal_frame(subject.reft, subject.model, subject.data, progress=subject.progress)
    except ValueError:
        return subject.data


def _tokens(subject: Subject, data: PrincipalFrame | Batch, i: int) -> DirectionTokens | str:
    """The tokens of the directions of a site, or why there are none."""
    s, directions = subject, _shown(subject, i)
    settings = {"site": i, "directions": directions, "top": _TOP, "seed": s.seed, "progress": s.progress}
    try:
        return direction_tokens(s.reft, s.model, data, **settings)
    except ValueError as error:
        return absent("Tokens", error)


def _examples(subject: Subject, data: PrincipalFrame | Batch, i: int) -> DirectionExamples | str:
    """The tokens of the data that a site moves most, or why there are none."""
    s, directions = subject, _shown(subject, i)
    try:
        return direction_examples(s.reft, s.model, data, site=i, directions=directions, top=3, progress=s.progress)
    except ValueError as error:
        return absent("Examples", error)


def _shown(subject: Subject, i: int) -> range:
    """The strongest directions of a site."""
    return range(min(_MOST_DIRECTIONS, columns_of(subject.reft[i]).shape[1]))


def _token_table(tokens: DirectionTokens, i: int) -> dict[str, Any]:
    """What each direction promotes and suppresses; a share of random directions beside it."""
    directions = sorted({row.direction for row in tokens.rows})
    caption = f"Direction 0 of site {i}: logits of its strongest tokens; dashed: random directions, 95 %."
    return {
        "caption": f"Tokens of each direction through the {tokens.lens}. p: share of random directions whose "
        f"strongest token is as strong; 95 % of them stay within ±{tokens.chance:.2f}.",
        "weak": all(tokens.p(direction) > 0.05 for direction in directions),
        "rows": [_token_row(tokens, direction) for direction in directions],
        "figure": figure(lambda: tokens.plot(direction=0), f"tokens-{i}", caption),
    }


def _token_row(tokens: DirectionTokens, direction: int) -> dict[str, Any]:
    promotes, suppresses = (list(map(repr, tokens.top(direction, e))) for e in ("promotes", "suppresses"))
    return {"direction": direction, "promotes": promotes, "suppresses": suppresses, "p": tokens.p(direction)}


def absent(what: str, why: object) -> str:
    """A sentence in the place of what does not apply here."""
    return f"{what}: not shown, because {why}."
