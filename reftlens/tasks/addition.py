"""Two-digit addition: ones, carry, tens."""

from reftlens.tasks.causal import CausalModel, Derived
from reftlens.tasks.task import Task, halves

_NUMBERS = tuple(range(10, 90))


def addition() -> Task:
    """Variables: `ones` (last digit of the sum), `carry` (0 or 1), `tens` (the digits before the last), and the sum.

    `tens` stands before `ones`, so that the first token of the answer is about `tens` and `carry` where a tokenizer
    has one token per digit. Sums stay below 100. The first numbers of train and test are different ones.
    """
    causal = CausalModel(
        inputs={"a": _NUMBERS, "b": _NUMBERS},
        derived={
            "ones": Derived(("a", "b"), lambda a, b: (a + b) % 10),
            "carry": Derived(("a", "b"), lambda a, b: (a % 10 + b % 10) // 10),
            "tens": Derived(("a", "b", "carry"), lambda a, b, carry: a // 10 + b // 10 + carry),
            "sum": Derived(("tens", "ones"), lambda tens, ones: 10 * tens + ones),
        },
        output="sum",
    )
    return Task(
        "two-digit addition",
        causal,
        pools=halves({"a": _NUMBERS}),
        templates={
            "train": ("12 + 15 = 27\n31 + 46 = 77\n{a} + {b} = ", "Sum: 12 + 15 = 27. Sum: {a} + {b} = "),
            "test": ("23 + 14 = 37\n52 + 29 = 81\n{a} + {b} = ",),
        },
        answer=str,
        fits=lambda setting: setting["a"] + setting["b"] < 100,
    )
