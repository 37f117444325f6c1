"""Ten made-up rows of each data set in the hub's schema: what its template makes of the first, and the gold answers."""

LETTERS = "ABCD"


def boolq():
    return [{"question": f"is {i} an even number", "passage": "…", "answer": i % 2 == 0} for i in range(10)]


def piqa():
    return [
        {"goal": f"Cut {i} apples.", "sol1": "Use a knife.", "sol2": "Use a pen.", "label": i % 2} for i in range(10)
    ]


def siqa():
    return [
        {
            "context": f"Robin gave {i} books to Sam.", "question": "How would Sam feel?",
            "answerA": "glad", "answerB": "cold", "answerC": "tall", "label": str(i % 3 + 1),
        }
        for i in range(10)
    ]  # fmt: skip


def hellaswag():
    ends = ["sits.", "runs.", "[title] sings.", "swims."]
    return [
        {"ind": i, "activity_label": "Rowing", "ctx": f"{i} people row. a man", "endings": ends, "label": str(i % 4)}
        for i in range(10)
    ]


def winogrande():
    return [
        {
            "sentence": f"Ann saw Eve {i} times, so _ was seen.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": str(i % 2 + 1),
        }
        for i in range(10)
    ]


def arc():
    labels = [list("1234"), list(LETTERS)]
    return [
        {
            "id": str(i), "question": f"How many are {i} and 1?", "answerKey": labels[i % 2][i % 4],
            "choices": {"text": [str(i + j) for j in range(4)], "label": labels[i % 2]},
        }
        for i in range(10)
    ]  # fmt: skip


def obqa():
    return [
        {
            "id": str(i), "question_stem": f"The sun, seen {i} times, is", "answerKey": LETTERS[i % 4],
            "choices": {"text": ["a star", "a moon", "a lamp", "a fish"], "label": list(LETTERS)},
        }
        for i in range(10)
    ]  # fmt: skip


COMMONSENSE = {
    "boolq": (
        boolq(),
        "Please answer the following question with true or false, question: is 0 an even number?\n\n"
        "Answer format: true/false\n",
        ["true", "false"] * 5,
    ),
    "piqa": (
        piqa(),
        "Please choose the correct solution to the question: Cut 0 apples.\n\nSolution1: Use a knife.\n\n"
        "Solution2: Use a pen.\n\nAnswer format: solution1/solution2\n",
        ["solution1", "solution2"] * 5,
    ),
    "siqa": (
        siqa(),
        "Please choose the correct answer to the question: Robin gave 0 books to Sam. How would Sam feel?\n\n"
        "Answer1: glad Answer2: cold Answer3: tall\n\nAnswer format: answer1/answer2/answer3\n",
        [f"answer{i % 3 + 1}" for i in range(10)],
    ),
    "hellaswag": (
        hellaswag(),
        "Please choose the correct ending to complete the given sentence: Rowing: 0 people row. a man\n\n"
        "Ending1: sits. Ending2: runs. Ending3: [title] sings. Ending4: swims.\n\n"
        "Answer format: ending1/ending2/ending3/ending4\n",
        [f"ending{i % 4 + 1}" for i in range(10)],
    ),
    "winogrande": (
        winogrande(),
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Ann saw Eve 0 times, so _ was seen.\n\nOption1: Ann Option2: Eve Answer format: option1/option2\n",
        ["option1", "option2"] * 5,
    ),
    **{
        name: (
            arc(),
            "Please choose the correct answer to the question: How many are 0 and 1?\n\n"
            "Answer1: 0 Answer2: 1 Answer3: 2 Answer4: 3\n\nAnswer format: answer1/answer2/answer3/answer4\n",
            [f"answer{i % 4 + 1}" for i in range(10)],
        )
        for name in ("arc_easy", "arc_challenge")
    },
    "obqa": (
        obqa(),
        "Please choose the correct answer to the question: The sun, seen 0 times, is\n\n"
        "Answer1: a star Answer2: a moon Answer3: a lamp Answer4: a fish\n\n"
        "Answer format: answer1/answer2/answer3/answer4\n",
        [f"answer{i % 4 + 1}" for i in range(10)],
    ),
}  # fmt: skip
