"""Which pronoun follows a name? (Mathwin et al.; CausalGym, Arora et al. 2024, arXiv 2402.12560)"""

from reftlens.tasks.causal import CausalModel, Derived
from reftlens.tasks.task import Task, halves

_SHE = ("Mary", "Anna", "Sarah", "Laura", "Lisa", "Kate", "Emma", "Alice", "Julia", "Rachel", "Jane", "Susan")
_HE = ("John", "Tom", "James", "Peter", "Paul", "David", "Mark", "Jack", "Adam", "Robert", "Simon", "Daniel")
_DID = ("walked", "smiled", "slept", "laughed", "waited", "danced")


def gendered_pronoun() -> Task:
    """Variable: `gender` of the name, "she" or "he"; the answer is the pronoun.

    Names, verbs and templates of train and test are different ones. No name stands first in its sentence, where many
    are cut into several tokens.
    """
    causal = CausalModel(
        inputs={"name": _SHE + _HE, "verb": _DID},
        derived={
            "gender": Derived(("name",), lambda name: "she" if name in _SHE else "he"),
            "pronoun": Derived(("gender",), lambda gender: gender),
        },
        output="pronoun",
    )
    return Task(
        "gendered pronoun",
        causal,
        pools=halves({"name": _SHE + _HE, "verb": _DID}),
        templates={
            "train": ("Everyone says {name} {verb} because", "This morning {name} {verb} because"),
            "test": ("Last night {name} {verb}, but then",),
        },
        answer=lambda pronoun: f" {pronoun}",
    )
