"""How an intervention is applied: how strongly, at which of its tokens, at which of its sites."""

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any, SupportsFloat

from reftlens.editing.site import Site, Where
from reftlens.numbers import Integers, is_one, reals, whole_numbers
from reftlens.text.positions import Positions
from reftlens.text.positions.spelling import as_positions
from reftlens.text.view import Mask, TokenView


@dataclass(frozen=True)
class Variant:
    """How an intervention is applied: how strongly, at which of its tokens, at which of its sites.

    Args:
        strength: 1 is the edit as trained, 0 the unedited model, negative its opposite; a sequence gives one
            strength per direction of the basis.
        among: of the positions that the sites choose, edit only these as well chosen by `among`.
        sites: indices of the sites that act; None means all.
    """

    strength: float | tuple[float, ...]
    among: Positions | None
    sites: tuple[int, ...] | None

    def __init__(
        self, strength: SupportsFloat | Sequence[float] = 1.0, among: Where | None = None, sites: Integers | None = None
    ) -> None:
        numbers = reals(strength, "strength")
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"strength={strength!r}, expected finite numbers")
        if sites is not None and is_one(sites):
            raise TypeError(f"sites={sites!r}, expected a list of indices of the ReFT's sites, such as [0, 2]")
        object.__setattr__(self, "strength", numbers[0] if is_one(strength) else numbers)
        object.__setattr__(self, "among", None if among is None else as_positions(among))
        object.__setattr__(self, "sites", None if sites is None else whole_numbers(sites, "site"))

    def __str__(self) -> str:
        among = f" among {self.among}" if self.among is not None else ""
        sites = f" at sites {list(self.sites)}" if self.sites is not None else ""
        strength = self.strength if isinstance(self.strength, tuple) else f"{self.strength:g}"
        return "unedited" if self.strength == 0.0 else f"strength {strength}{among}{sites}"

    def active(self, sites: Sized) -> list[int]:
        """Indices of those of the `sites` of a ReFT that act."""
        count = len(sites)
        active = tuple(range(count)) if self.sites is None else self.sites
        if not active or any(not 0 <= i < count for i in active) or len(set(active)) < len(active):
            raise ValueError(f"sites={list(active)}, expected one or more of 0 to {count - 1}, each of them once")
        return sorted(active)

    def mask(self, site: Site, view: TokenView) -> Mask:
        """The tokens edited at `site`."""
        mask = site.positions.mask(view)
        return mask & self.among.mask(view) if self.among is not None else mask

    def require(self, sites: Sequence[Site], view: TokenView) -> None:
        """Raise `ValueError` if one of `sites` that acts chooses no token in any row of `view`."""
        for i in self.active(sites):
            if not self.mask(sites[i], view).any():
                among = f" among {self.among}" if self.among is not None else ""
                raise ValueError(f"{sites[i]}{among} chooses no token in any of {len(view.ids)} row(s)")

    def reaches_response(self, site: Site) -> bool:
        """Whether a token after the prompt can be edited at `site`."""
        among = self.among is None or self.among.reaches_response
        return among and site.positions.reaches_response


def check_variant(variant: Any) -> None:
    """Raise `TypeError` for what is no `Variant`."""
    if not isinstance(variant, Variant):
        raise TypeError(f"variant={variant!r}, expected a Variant, such as Variant(strength=0.5)")
