"""Is a price between two bounds? (Wu et al. 2023, arXiv 2305.08809)"""

from reftlens.tasks.causal import CausalModel, Derived
from reftlens.tasks.task import Task, halves

_LOWER, _UPPER = tuple(range(100, 500, 7)), tuple(range(500, 900, 7))
_PRICES = tuple(range(5, 1000, 5))


def price_tagging() -> Task:
    """Variables: `above` (price ≥ lower bound), `below` (price ≤ upper bound); the answer is " Yes" where both hold.

    Prices and bounds are in cents, shown as dollars. Bounds of train and test are different ones.
    """
    causal = CausalModel(
        inputs={"price": _PRICES, "lower": _LOWER, "upper": _UPPER},
        derived={
            "above": Derived(("price", "lower"), lambda price, lower: price >= lower),
            "below": Derived(("price", "upper"), lambda price, upper: price <= upper),
            "between": Derived(("above", "below"), lambda above, below: above and below),
        },
        output="between",
    )
    return Task(
        "price tagging",
        causal,
        pools=halves({"lower": _LOWER, "upper": _UPPER}),
        templates={
            "train": (
                _shown("Say Yes if the price is between {lower} and {upper} dollars, otherwise No.\n{price} dollars:"),
                _shown("Does {price} dollars lie between {lower} and {upper} dollars? Answer Yes or No:"),
            ),
            "test": (_shown("Is a price of {price} dollars within {lower} to {upper} dollars? Yes or No:"),),
        },
        answer=lambda between: " Yes" if between else " No",
    )


def _shown(template: str):
    """A function from a setting in cents to the template filled in dollars."""
    return lambda setting: template.format(**{name: f"{cents / 100:.2f}" for name, cents in setting.items()})
