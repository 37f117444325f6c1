"""Who is given something? Indirect object identification (Wang et al. 2022, arXiv 2211.00593)."""

from reftlens.tasks.causal import CausalModel, Derived
from reftlens.tasks.task import Task, halves

_NAMES = (
    *("Mary", "John", "Tom", "James", "Anna", "Peter", "Paul", "Sarah", "David", "Laura", "Mark", "Lisa", "Kate"),
    *("Jack", "Emma", "Adam", "Alice", "Robert", "Simon", "Julia", "Daniel", "Martin", "Rachel", "Michael"),
)
_PLACES, _THINGS = ("store", "park", "school", "office", "station", "garden"), ("book", "ring", "ball", "kiss", "drink")


def indirect_object() -> Task:
    """Variables: `position` (0 or 1: which of the two names is given something) and `name` (who that is).

    Two names come first and one of them again (`again`, 0 or 1): the other one is the answer. Names, places and
    templates of train and test are different ones.
    """
    causal = CausalModel(
        inputs={"first": _NAMES, "second": _NAMES, "again": (0, 1), "place": _PLACES, "thing": _THINGS},
        derived={
            "position": Derived(("again",), lambda again: 1 - again),
            "name": Derived(("first", "second", "position"), lambda a, b, position: (a, b)[position]),
            "answer": Derived(("name",), lambda name: name),
        },
        output="answer",
    )
    return Task(
        "indirect object identification",
        causal,
        pools=halves({"first": _NAMES, "second": _NAMES, "place": _PLACES}),
        templates={
            "train": (
                _told("When {first} and {second} went to the {place}, {giver} gave a {thing} to"),
                _told("Then, {first} and {second} were at the {place}, and {giver} handed a {thing} to"),
            ),
            "test": (_told("After {first} and {second} got to the {place}, {giver} decided to give a {thing} to"),),
        },
        answer=lambda name: f" {name}",
        fits=lambda setting: setting["first"] != setting["second"],
    )


def _told(template: str):
    """A function from a setting to the template, `{giver}` being the name that comes again."""
    return lambda s: template.format(**s, giver=(s["first"], s["second"])[s["again"]])
