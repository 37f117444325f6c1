"""Which option is right? The pointer of a multiple-choice question (MIB, Mueller et al. 2025, arXiv 2504.13151)."""

from itertools import permutations

from reftlens.tasks.causal import CausalModel, Derived, Setting
from reftlens.tasks.task import Task, halves

_COLOURS = ("red", "blue", "green", "black", "white", "yellow")
_THINGS = ("ball", "car", "box", "hat", "door", "cup", "chair", "book")
_LETTERS, _OPTIONS = tuple(permutations("ABCD", 3)), tuple(permutations(_COLOURS, 3))


def multiple_choice() -> Task:
    """Variables: `pointer` (0 to 2: where the right option stands) and `answer` (the letter that stands there).

    Three colours in any order under three of the letters A to D in any order. Things, letters and templates of train
    and test are different ones.
    """
    causal = CausalModel(
        inputs={"thing": _THINGS, "colour": _COLOURS, "options": _OPTIONS, "letters": _LETTERS},
        derived={
            "pointer": Derived(("colour", "options"), lambda colour, options: options.index(colour)),
            "answer": Derived(("pointer", "letters"), lambda pointer, letters: letters[pointer]),
        },
        output="answer",
    )
    return Task(
        "multiple choice",
        causal,
        pools=halves({"thing": _THINGS, "letters": _LETTERS}),
        templates={
            "train": (
                _with_options("The {thing} is {colour}. What color is the {thing}?"),
                _with_options("Here is a {colour} {thing}. Which color does the {thing} have?"),
            ),
            "test": (_with_options("Someone painted the {thing} {colour}. What color is it now?"),),
        },
        answer=lambda letter: f" {letter}",
        fits=lambda setting: setting["colour"] in setting["options"],
    )


def _with_options(question: str):
    """A function from a setting to the question with its options."""

    def prompt(setting: Setting) -> str:
        options = zip(setting["letters"], setting["options"], strict=True)
        lines = [question.format(**setting), *(f"{letter}. {option}" for letter, option in options), "Answer:"]
        return "\n".join(lines)

    return prompt
