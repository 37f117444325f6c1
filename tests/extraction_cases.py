"""What people read in texts that models write: hand-worked cases, written before the rules, the awkward ones first.

A case of the commonsense family is `(choices, text, strict, stated)`: what the rule of the paper takes (all that
follows the trigger, stripped, and exactly one of the choices), and which choice a reader finds stated. None is "no
answer".
"""

TF = ("true", "false")
S2 = ("solution1", "solution2")
O2 = ("option1", "option2")
A3 = ("answer1", "answer2", "answer3")
A4 = ("answer1", "answer2", "answer3", "answer4")
E4 = ("ending1", "ending2", "ending3", "ending4")

COMMONSENSE = [
    # one answer denied, another given
    (S2, "the correct answer is not solution2 but solution1", None, "solution1"),
    (S2, "the correct answer is solution1, not solution2", None, "solution1"),
    (S2, "The answer isn't solution1. It is solution2.", None, "solution2"),
    (E4, "the correct answer is ending2 rather than ending3", None, "ending2"),
    (TF, "the correct answer is not true", None, None),
    # two answers
    (S2, "the correct answer is solution1 or solution2", None, None),
    (TF, "the correct answer is true/false", None, None),
    (A4, "answer2 and answer3 are both right.", None, None),
    (O2, "the correct answer is option1. No, wait: the correct answer is option2", None, "option2"),
    (O2, "the correct answer is option1. Therefore the correct answer is option1.", None, "option1"),
    # the answer restated, explained, or followed by another question
    (TF, "the correct answer is true. It is true because people feel it.", None, "true"),
    (S2, "the correct answer is solution2 because solution1 would break the glass.", None, "solution2"),
    (
        A4,
        "the correct answer is answer3\n\nPlease choose the correct answer to the question: Why?\n\n"
        "the correct answer is answer1",
        None,
        "answer3",
    ),
    (TF, "the correct answer is false\n\nQuestion: is it so?\nthe correct answer is true", None, "false"),
    (TF, "Answer format: true/false\n\nthe correct answer is false", "false", "false"),
    # letters and numbers in the place of names
    (A4, "answer: (b)", None, "answer2"),
    (A4, "Answer: C", None, "answer3"),
    (A4, "The answer is D) the moon.", None, "answer4"),
    (E4, "the correct answer is 2", None, "ending2"),
    (S2, "the correct answer is a mixture of oil and water", None, None),
    (S2, "the correct answer is solution 2", None, "solution2"),
    (O2, "Option 1", None, "option1"),
    # outside the set
    (A3, "the correct answer is answer4", None, None),
    (S2, "the correct answer is solution3", None, None),
    (A4, "the correct answer is answer12", None, None),
    (S2, "the correct answer is solution11", None, None),
    (TF, "the correct answer is yes", None, "true"),
    (TF, "No, it will not.", None, "false"),
    # no answer
    (TF, "", None, None),
    (TF, "the correct answer is ", None, None),
    (TF, "I do not know.", None, None),
    (O2, "the correct answer is the trophy", None, None),
    # marks, case and space
    (TF, "the correct answer is true.", None, "true"),
    (TF, "the correct answer is True", None, "true"),
    (TF, "The correct answer is true", None, "true"),
    (S2, "the correct answer is **solution1**", None, "solution1"),
    (S2, "the correct answer is: solution1", None, "solution1"),
    (S2, "solution1", None, "solution1"),
    (TF, "\nthe correct answer is  false \n", "false", "false"),
    (E4, "the correct answer is ending4", "ending4", "ending4"),
    (A3, "the correct answer is answer3", "answer3", "answer3"),
    (TF, "Untrue: the correct answer is falsehood", None, None),
]
