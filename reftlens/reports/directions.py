"""What was learned: how the edit spreads over directions, how they lie, and the tokens and examples of each."""

from functools import partial
from typing import Any

from torch import Tensor

from reftlens.analysis.subspaces.directions import pca
from reftlens.analysis.subspaces.examples import DirectionExample, DirectionExamples, direction_examples
from reftlens.analysis.subspaces.geometry import columns_of, overlap
from reftlens.analysis.subspaces.tokens import DirectionTokens, direction_tokens
from reftlens.reports.parts import Section, figure, or_reason
from reftlens.reports.subject import Subject

_MOST_SITES, _MOST_DIRECTIONS, _TOP = 6, 4, 8


def geometry_section(subject: Subject) -> Section:
    """The spectrum of the edit, and overlaps beside the chance level."""
    frame = subject.frame
    if isinstance(frame, str):
        return Section("geometry", "Geometry", absent=frame)
    frames = {"spectrum": frame.to_frame()}
    caption = "How much of the edit lies along each direction; dashed: the same along all."
    figures = [figure(frame.plot, "spectrum", caption, frames["spectrum"])]
    overlaps = or_reason("Overlaps", lambda: overlap(_subspaces(subject)))
    if not isinstance(overlaps, str):
        frames["overlap"] = overlaps.to_frame()
        wide = min(len(subject.reft), _MOST_SITES) > 2
        figures.append(figure(overlaps.plot, "overlap", _overlap_caption(subject), frames["overlap"], wide=wide))
    values = {"sites": frame.sites, "figures": figures, "absent": overlaps if isinstance(overlaps, str) else ""}
    return Section("geometry", "Geometry", values, frames)


def _subspaces(subject: Subject) -> dict[str, Tensor]:
    """The edits of all sites and the principal components of what they edit."""
    subspaces: dict[str, Tensor] = {}
    for i, site in enumerate(subject.reft.sites[:_MOST_SITES]):
        columns = columns_of(subject.reft[i])
        hidden = subject.states[i].cpu()
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
    s, sites, frames = subject, [], {}
    data = s.data if isinstance(s.frame, str) else s.frame
    for i, site in enumerate(s.reft.sites[:_MOST_SITES]):
        columns = or_reason("Directions", partial(columns_of, s.reft[i]))
        if isinstance(columns, str):  # no gate is open
            sites.append({"index": i, "name": str(site), "tokens": columns, "examples": columns})
            continue
        shown = range(min(_MOST_DIRECTIONS, columns.shape[1]))
        read = {"site": i, "directions": shown, "progress": s.progress}
        tokens = or_reason("Tokens", partial(direction_tokens, s.reft, s.model, data, **read, top=_TOP, seed=s.seed))
        examples = or_reason("Examples", partial(direction_examples, s.reft, s.model, data, **read, top=3))
        for name, result in {"tokens": tokens, "examples": examples}.items():
            if not isinstance(result, str):
                frames[f"{name} of site {i}"] = result.to_frame()
        sites.append(
            {
                "index": i,
                "name": str(site),
                "tokens": tokens if isinstance(tokens, str) else _token_table(tokens, i),
                "examples": examples if isinstance(examples, str) else _example_rows(examples),
            }
        )
    values = {"sites": sites, "left": len(s.reft) - _MOST_SITES}
    return Section("directions", "Tokens and examples of each direction", values, frames)


def _example_rows(examples: DirectionExamples) -> tuple[DirectionExample, ...] | str:
    """The tokens that are moved most, or a sentence where all are moved alike, as by a steering vector."""
    low, high = examples.codes.aminmax()
    if high - low > 1e-4 * examples.codes.abs().max() or examples.codes.shape[1] > 1:
        return examples.rows
    return f"The edit moves every token alike, by {high.item():.3g}: none of them stands out."


def _token_table(tokens: DirectionTokens, i: int) -> dict[str, Any]:
    """What each direction promotes and suppresses; a share of random directions beside it."""
    directions = sorted({row.direction for row in tokens.rows})
    caption = f"Direction 0 of site {i}: logits of its strongest tokens; dashed: random directions, 95 %."
    return {
        "caption": f"Tokens of each direction through the {tokens.lens}. p: share of random directions whose "
        "strongest token is as strong.",
        "test": _size_test(tokens, directions),
        "rows": [_token_row(tokens, direction) for direction in directions],
        "figure": figure(lambda: tokens.plot(direction=0), f"tokens-{i}", caption),
    }


def _size_test(tokens: DirectionTokens, directions: list[int]) -> str:
    """What is compared with random directions and what is not: the size of the strongest logit, not whose it is."""
    strongest = {i: max(abs(row.logit) for row in tokens.rows if row.direction == i) for i in directions}
    reached = ", ".join(f"direction {i} reaches {logit:.2f} (p = {tokens.p(i):.2g})" for i, logit in strongest.items())
    return (
        f"Tested is the size of the strongest logit: 95 % of random directions stay within ±{tokens.chance:.2f}; "
        f"{reached}. Not tested is which tokens these are, and what they have in common."
    )


def _token_row(tokens: DirectionTokens, direction: int) -> dict[str, Any]:
    promotes, suppresses = (list(map(repr, tokens.top(direction, e))) for e in ("promotes", "suppresses"))
    return {"direction": direction, "promotes": promotes, "suppresses": suppresses, "p": tokens.p(direction)}
