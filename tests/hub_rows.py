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


def numbered(question, steps=None, answers=None):
    """Ten answers, and what is asked and worked out for each."""
    return {
        "questions": [question.format(i) for i in range(10)],
        "steps": steps and [steps.format(i, i + 2) for i in range(10)],
        "answers": answers or [str(i + 2) for i in range(10)],
    }


def svamp():
    return [
        {
            "ID": f"chal-{i}", "Body": f"Ann had {i} pens.", "Question": "She buys 2. How many has she?",
            "Equation": f"( {i}.0 + 2.0 )", "Answer": f"{i + 2}.0", "Type": "Addition",
        }
        for i in range(10)
    ]  # fmt: skip


def addsub():
    return [
        {
            "iIndex": i,
            "sQuestion": f"Ann had {i} pens. She buys 2. How many has she?",
            "lEquations": [f"X={i}+2"],
            "lSolutions": [i + 2.0],
        }
        for i in range(10)
    ]


def multiarith():
    return [
        {"question": f"Ann had {i} pens. She buys 2. How many has she?", "final_ans": str(i + 2)} for i in range(10)
    ]


def mawps():
    return [
        {
            "Question": "Ann had N_00 pens . She buys N_01 . How many ?",
            "Numbers": f"{i}.0 2.0",
            "Equation": "+ N_00 N_01",
            "Answer": i + 2.0,
        }
        for i in range(10)
    ]


def gsm8k():
    return [
        {
            "question": f"Ann had {i} pens. She buys 2. How many?",
            "answer": f"She has {i} + 2 = <<{i}+2={i + 2}>>{i + 2} pens.\n#### {i + 2},000",
        }
        for i in range(10)
    ]


def aqua():
    return [
        {
            "question": f"What is {i} + 2?", "options": [f"{c}){i + j}" for j, c in enumerate("ABCDE")],
            "rationale": f"{i} + 2 = {i + 2}", "correct": "C",
        }
        for i in range(10)
    ]  # fmt: skip


ARITHMETIC = {
    "svamp": (svamp(), numbered("Ann had {} pens. She buys 2. How many has she?", "( {} + 2 ) = {}\n")),
    "addsub": (addsub(), numbered("Ann had {} pens. She buys 2. How many has she?")),
    "singleeq": (addsub(), numbered("Ann had {} pens. She buys 2. How many has she?")),
    "multiarith": (multiarith(), numbered("Ann had {} pens. She buys 2. How many has she?")),
    "mawps": (mawps(), numbered("Ann had {} pens . She buys 2 . How many ?")),
    "gsm8k": (
        gsm8k(),
        numbered(
            "Ann had {} pens. She buys 2. How many?",
            "She has {0} + 2 = {1} pens.\n",
            [f"{i + 2}000" for i in range(10)],
        ),
    ),
    "aqua": (
        aqua(),
        {
            "questions": [
                f"What is {i} + 2? Answer Choices: (A) {i} (B) {i + 1} (C) {i + 2} (D) {i + 3} (E) {i + 4}"
                for i in range(10)
            ],
            "steps": [f"{i} + 2 = {i + 2}\n" for i in range(10)],
            "answers": ["C"] * 10,
        },
    ),
}  # fmt: skip
"""Of each data set its records, and the questions, steps and answers that they hold."""


def glue(texts, labels):
    return [{**{t: f"{t} number {i}" for t in texts}, "label": labels[i % len(labels)], "idx": i} for i in range(10)]


GLUE = {
    "cola": (glue(["sentence"], [0, 1]), ["unacceptable", "acceptable"]),
    "sst2": (glue(["sentence"], [0, 1]), ["negative", "positive"]),
    "mrpc": (glue(["sentence1", "sentence2"], [0, 1]), ["not_equivalent", "equivalent"]),
    "stsb": (glue(["sentence1", "sentence2"], [0.0, 2.6, 5.0]), ["0", "2.6", "5"]),
    "qqp": (glue(["question1", "question2"], [0, 1]), ["not_duplicate", "duplicate"]),
    "mnli": (glue(["premise", "hypothesis"], [0, 1, 2]), ["entailment", "neutral", "contradiction"]),
    "qnli": (glue(["question", "sentence"], [0, 1]), ["entailment", "not_entailment"]),
    "rte": (glue(["sentence1", "sentence2"], [0, 1]), ["entailment", "not_entailment"]),
    "wnli": (glue(["sentence1", "sentence2"], [0, 1]), ["not_entailment", "entailment"]),
}
"""Of each data set its records, and the names of their labels in turn (`nyu-mll/glue`)."""
