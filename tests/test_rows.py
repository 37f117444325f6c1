"""Rows out of files and of the hub's records: the same prompts as LLM-Adapters', and what cannot be one refused."""

import gzip
import json
import re
import warnings
from pathlib import Path

import hub_rows
import numpy as np
import pandas as pd
import pytest

DATA = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data sets")


def written(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def question(number, answer="true", choices="true/false"):
    """A record in the form of LLM-Adapters."""
    asked = f"Please answer the following question with true or false, question: is {number} odd?"
    output = f"the correct answer is {answer}"
    return {"instruction": f"{asked}\n\nAnswer format: {choices}", "input": "", "output": output, "answer": answer}


# -- commonsense ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hub_rows.COMMONSENSE)
def test_ten_rows_in_the_hubs_schema(name):
    from reftlens.experiments.rows.loading import TASKS, load_rows

    records, prompt, answers = hub_rows.COMMONSENSE[name]
    rows = load_rows(name, "test", data=records)
    assert rows[0].prompt == prompt
    assert [row.answer for row in rows] == answers and [row.index for row in rows] == list(range(10))
    for row in rows:
        assert row.answer in row.choices and row.completion == f"the correct answer is {row.answer}"
        assert TASKS[name].extract(row.completion, row) == row.answer
        assert all(TASKS[name].extract(TASKS[name].written(c, row), row) == c for c in row.choices)
        assert len(row.fields["options"]) in (0, len(row.choices))


RAW = {
    "boolq": (r".*, question: (?P<question>.*)\?\n\nAnswer format: .*", lambda a: a == "true", "answer"),
    "piqa": (
        r".* to the question: (?P<goal>.*)\n\nSolution1: (?P<sol1>.*)\n\nSolution2: (?P<sol2>.*)\n\nAnswer format: .*",
        lambda a: int(a[-1]) - 1, "label",
    ),
    "winogrande": (
        r".* the given sentence: (?P<sentence>.*)\n\nOption1: (?P<option1>.*) Option2: (?P<option2>.*) "
        r"Answer format: .*",
        lambda a: a[-1], "answer",
    ),
    "hellaswag": (
        r".* the given sentence: (?P<activity_label>[^:]*): (?P<ctx>.*)\n\nEnding1: (.*) Ending2: (.*) Ending3: (.*)"
        r" Ending4: (.*)\n\nAnswer format: .*",
        lambda a: str(int(a[-1]) - 1), "label",
    ),
    **dict.fromkeys(
        ("arc_easy", "arc_challenge"),
        (
            r".* to the question: (?P<question>.*?)\n\nAnswer1: (.*?) Answer2: (.*?) Answer3: (.*?)(?: Answer4: (.*?))?"
            r"(?: Answer5: (.*?))?\n\nAnswer format: .*",
            lambda a: "ABCDE"[int(a[-1]) - 1], "answerKey",
        ),
    ),
}  # fmt: skip
"""How the hub's fields are recovered from an instruction, and the label from its answer."""


def raw(name, record):
    """The record as the hub has it, recovered from the form of LLM-Adapters."""
    pattern, label, field = RAW[name]
    found = re.fullmatch(pattern, record["instruction"], re.DOTALL)
    assert found, record["instruction"]
    named = found.groupdict()
    rest = [g for i, g in enumerate(found.groups(), 1) if i not in found.re.groupindex.values() and g is not None]
    if name == "hellaswag":
        named["endings"] = rest
    if name.startswith("arc"):
        named["choices"] = {"text": rest, "label": list("ABCDE")[: len(rest)]}
    return {**named, field: label(record["answer"])}


@real
@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("name", RAW)
def test_templates_make_llm_adapters_instructions_byte_for_byte(name, part):
    from reftlens.experiments.rows.loading import load_rows

    records = [json.loads(line) for line in (DATA / f"commonsense/{part}/{name}.jsonl").open(encoding="utf-8")]
    rows = load_rows(name, part, data=[raw(name, record) for record in records])
    assert [row.prompt for row in rows] == [record["instruction"] + "\n" for record in records]
    assert [row.completion for row in rows] == [record["output"] for record in records]


@real
@pytest.mark.parametrize("name", RAW)
def test_files_in_the_form_of_llm_adapters_are_taken_as_they_are(name):
    from reftlens.experiments.rows.loading import load_rows

    path = DATA / f"commonsense/test/{name}.jsonl"
    records = [json.loads(line) for line in path.open(encoding="utf-8")]
    for data in (DATA, DATA / "commonsense", path):
        rows = load_rows(name, "test", data=data)
        assert [row.prompt for row in rows] == [record["instruction"] + "\n" for record in records]
        assert [row.answer for row in rows] == [record["answer"] for record in records]
    if name != "boolq":
        assert all(len(row.fields["options"]) == len(row.choices) for row in rows)


# -- arithmetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hub_rows.ARITHMETIC)
def test_ten_problems_in_the_hubs_schema(name):
    from reftlens.experiments.rows.loading import TASKS, load_rows
    from reftlens.experiments.rows.templates import alpaca

    records, known = hub_rows.ARITHMETIC[name]
    rows, task = load_rows(name, "test", data=records), TASKS[name]
    assert [row.prompt for row in rows] == [alpaca(question) for question in known["questions"]]
    assert [row.answer for row in rows] == known["answers"]
    ends = [f"The final answer is: {answer}" for answer in known["answers"]]
    steps = known["steps"] or [""] * 10
    assert [row.completion for row in rows] == [step + end for step, end in zip(steps, ends, strict=True)]
    assert all(task.equal(task.extract(row.completion, row), row.answer) for row in rows)
    assert all(task.extract(task.written(row.answer, row), row) == row.answer for row in rows)


def test_calculator_marks_are_kept_where_they_are_asked_for():
    from reftlens.experiments.rows.families.arithmetic import arithmetic
    from reftlens.experiments.rows.loading import load_rows

    kept, bare = load_rows(arithmetic("gsm8k", calculator=True), data=hub_rows.gsm8k()), hub_rows.gsm8k()
    assert "<<3+2=5>>" in kept[3].completion and "<<" not in load_rows("gsm8k", data=bare)[3].completion


def test_a_number_is_right_within_a_thousandth():
    from reftlens.experiments.rows.loading import TASKS

    equal = TASKS["gsm8k"].equal
    assert equal("3.001", "3") and not equal("3.0011", "3") and equal("-2", "-2") and not equal("2", "-2")
    assert equal("B", "B") and not equal("B", "C") and not equal("3", "C")


def test_commas_of_an_answer_stand_between_thousands():
    from reftlens.experiments.rows.loading import load_rows

    answers = {"1,000": "1000", "-12,345.50": "-12345.5", "1,234,567": "1234567", "+1,000": "1000"}
    rows = load_rows("multiarith", data=[{"question": "How many?", "final_ans": answer} for answer in answers])
    assert [row.answer for row in rows] == list(answers.values())
    for answer in ("1,5", "1,00", "12,34.5", "1000,000"):
        data = [{"question": "How many?", "final_ans": answer}]
        refused(f"final_ans is '{answer}', expected a number", "multiarith", data=data)


def test_truncated_completions_are_beginnings():
    from reftlens.experiments.rows.families.arithmetic import truncated
    from reftlens.experiments.rows.loading import load_rows

    rows = load_rows("gsm8k", data=hub_rows.gsm8k())
    for words in (1, 5, 100):
        for row, cut in zip(rows, truncated(rows, words), strict=True):
            assert row.completion.startswith(cut.completion) and cut.prompt == row.prompt
            assert len(cut.completion.split()) == min(words, len(row.completion.split()))
    with pytest.raises(ValueError, match="words=0"):
        truncated(rows, 0)


@real
@pytest.mark.parametrize("train", ["math10k", "mawps"])
def test_the_filter_by_question_finds_what_the_data_flag_as_leaks(train):
    from reftlens.experiments.rows.loading import load_rows, without_leaks

    flagged = load_rows(train, data=DATA, leaks=True)
    tests = {name: load_rows(name, "test", data=DATA) for name in ("aqua", "gsm8k", "mawps", "multiarith", "singleeq")}
    tests["gsm8k_dev300"] = load_rows("gsm8k", "dev", data=DATA)
    file = next((DATA / "arithmetic/train").glob(f"{train}_*.jsonl"))
    said = [json.loads(line)["in_test"] for line in file.open(encoding="utf-8")]
    assert len(load_rows(train, data=DATA)) == sum(not names for names in said) < len(flagged)
    for name, rows in tests.items():
        kept = {row.index for row in without_leaks(flagged, rows)}
        assert [i for i in range(len(said)) if i not in kept] == [i for i, names in enumerate(said) if name in names]


@real
@pytest.mark.parametrize(
    ("name", "part", "rows", "misread"),
    [("gsm8k", "train", 2500, 0), ("gsm8k", "dev", 300, 0), ("mawps", "train", 706, 0), ("aqua", "dev", 254, 0),
     ("math10k", "train", 1378, 11)],
)  # fmt: skip
def test_worked_answers_are_read_back_from_their_steps(name, part, rows, misread):
    """The 11 of MATH10K are a model's own: "None of the options", or a number where a letter is gold."""
    from reftlens.experiments.rows.loading import TASKS, load_rows

    task, loaded = TASKS[name], load_rows(name, part, data=DATA)
    read = [(task.extract(row.completion, row), row.answer) for row in loaded]
    assert (len(loaded), sum(a is None or not task.equal(a, gold) for a, gold in read)) == (rows, misread)


# -- instructions, and GLUE ----------------------------------------------------------------------------------


def test_instructions_with_and_without_an_input():
    from reftlens.experiments.rows.loading import TASKS, load_rows

    records = [
        {"instruction": "Name a bird.", "input": "", "output": "A wren."},
        {"instruction": "Translate.", "input": "chat", "output": "cat"},
    ]
    bare, given = load_rows("alpaca", data=records)
    assert bare.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a bird.\n\n### Response:\n"
    )
    assert given.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nTranslate.\n\n### Input:\nchat\n\n"
        "### Response:\n"
    )
    assert given.completion == given.answer == "cat" and given.question != bare.question
    assert TASKS["alpaca"].extract(" a dog \n", given) == "a dog" and TASKS["alpaca"].extract(" ", given) is None
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    (chosen,) = load_rows("ultrafeedback", data=[{"prompt": "Hello?", "chosen": turns, "rejected": turns}])
    assert "Hello?" in chosen.prompt and chosen.completion == "Hi."


@pytest.mark.parametrize("name", hub_rows.GLUE)
def test_ten_rows_of_each_task_of_glue(name):
    from reftlens.experiments.rows.loading import TASKS, load_rows

    records, labels = hub_rows.GLUE[name]
    rows, task = load_rows(name, "test", data=records), TASKS[name]
    for row, record in zip(rows, records, strict=True):
        assert row.answer == labels[row.index % len(labels)] and row.fields["label"] == record["label"]
        assert row.fields["texts"] == tuple(v for v in record.values() if isinstance(v, str))
        assert all(text in row.prompt for text in row.fields["texts"])
        assert row.completion[0] == " " and task.extract(row.completion, row) == row.answer
        assert all(task.extract(task.written(c, row), row) == c for c in row.choices)
        assert row.choices == (() if name == "stsb" else tuple(labels))
    assert task.equal("2.6", "2.6") and not task.equal("2.6", "3")
    wrong = [{**records[0], "label": -1}]
    refused("row 0: label (-1 is outside the set|is -1, expected a similarity)", name, data=wrong)


def test_a_file_of_glue_that_no_task_names_shows_its_labels(tmp_path):
    from reftlens.experiments.rows.loading import load_rows

    def loaded(labels, other=()):
        for split, values in (("validation", labels), ("train", other)):
            records = [{"first": "a", "second": "b", "label": label, "idx": i} for i, label in enumerate(values)]
            written(tmp_path / f"glue/oddity/{split}.jsonl", records)
        return load_rows("oddity", "test", data=tmp_path)

    rows = loaded([0, 1, 0, 1])
    assert [row.answer for row in rows] == ["0", "1", "0", "1"] and rows[0].prompt == "First: a\nSecond: b\nLabel:"
    assert loaded([0, 0])[0].choices == ("0", "1") and loaded(["0", "1"]) == loaded([0, 1])
    assert loaded([0, 1], other=[2])[0].choices == ("0", "1", "2"), "all splits have the labels of all"
    named = loaded(["no", "Not sure"], other=["yes"])
    assert named[1].choices == ("Not sure", "no", "yes") and named[1].completion == " not sure"
    assert named[1].fields["label"] == 0 and [row.answer for row in named] == ["no", "Not sure"]
    values = loaded([0, 7.5], other=[-1])
    assert values[1].choices == () and values[1].fields["label"] == 7.5 and values[1].answer == "7.5"
    for labels, message in (
        ([0, "no"], r"2 different labels, such as 'no' \(.*line 2\), 0 \(.*line 1\): expected names of"),
        ([0, -1], "line 2: label is -1, expected the numbers of at most 100 classes, from 0"),
        ([0, 100], "line 2: label is 100, expected the numbers of at most 100 classes"),
        ([f"text {i}" for i in range(101)], "101 different labels"),
        (["yes", "Yes"], "the labels 'Yes', 'yes' differ in case or spaces alone"),
        *[([0, label], "line 2: label is .*, expected the name or number of a class, or a value")
          for label in (True, None, "", float("nan"), [1])],
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            loaded(labels)


def test_names_of_labels_and_of_rows_are_no_texts_of_a_row():
    from reftlens.experiments.rows.families.glue import FAMILY
    from reftlens.experiments.rows.loading import load_rows

    more = {"label_text": "good", "idx": "17", "guid": "a-1", "pairID": "x", "label": 1}
    for texts in ({"text": "a"}, {"text1": "a", "text2": "b"}, {"premise": "a", "hypothesis": "b", "genre": "fiction"}):
        row = load_rows(FAMILY.other("oddity"), data=[{**texts, **more}])[0]
        assert row.fields["texts"] == ("a", "b")[: len(row.fields["texts"])] and "good" not in row.prompt
    refused("expected one or two texts and a label", FAMILY.other("oddity"), data=[{"a": "", "b": "", "c": "", **more}])


def test_labels_are_taken_by_their_names_too():
    from reftlens.experiments.rows.loading import load_rows

    rows = load_rows("sst2", data=[{"sentence": "a", "label": label} for label in ("positive", 1, "1")])
    assert {(row.answer, row.fields["label"]) for row in rows} == {("positive", 1)}
    refused("label 'neutral' is outside the set", "sst2", data=[{"sentence": "a", "label": "neutral"}])


def test_training_rows_of_glue_that_are_none_of_its_training_split_are_read_with_a_warning(tmp_path):
    from reftlens.experiments.rows.loading import load_rows

    other = written(tmp_path / "glue/qnli/train_from_validation.jsonl", hub_rows.GLUE["qnli"][0])
    with pytest.warns(UserWarning, match=r"train_from_validation.jsonl is not the training split of qnli, .* no publi"):
        rows = load_rows("qnli", data=tmp_path)
    assert len(rows) == 10 and other.name in rows[0].fields["place"]
    refused("no test rows of qnli", "qnli", split="test", data=tmp_path)
    written(tmp_path / "glue/qnli/train.jsonl", hub_rows.GLUE["qnli"][0][:3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_rows("qnli", data=tmp_path)) == 3
        assert len(load_rows("qnli", data=other)) == 10, "a file that is named is what it is"


# -- files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["commonsense", "", "mine"])
def test_a_file_of_a_family_that_no_task_names_is_read_as_that_familys(tmp_path, below):
    from reftlens.experiments.rows.loading import load_rows

    written(tmp_path / below / "test/oddity.jsonl", [question(i, choices="true/false/both") for i in range(3)])
    rows = load_rows("oddity", "test", data=tmp_path if below == "commonsense" else tmp_path / below)
    assert [row.index for row in rows] == [0, 1, 2] and rows[0].choices == ("true", "false", "both")
    assert rows[0].task == "oddity"
    assert load_rows("oddity", data=tmp_path / below / "test/oddity.jsonl") == rows


@pytest.mark.parametrize("place", ["test/oddity", "oddity/test", "commonsense/test/oddity", "commonsense/oddity/test"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".tsv"])
def test_a_file_may_be_a_list_or_lines_or_a_table_packed_or_not_by_split_or_by_task(tmp_path, place, ending):
    from reftlens.experiments.rows.loading import load_rows

    records, file = [question(i) for i in range(3)], tmp_path / f"{place}{ending}"
    file.parent.mkdir(parents=True)
    if ending in (".csv", ".tsv"):
        pd.DataFrame(records).to_csv(file, index=False, sep="\t" if ending == ".tsv" else ",")
    else:
        text = json.dumps(records, indent=2) if "jsonl" not in ending else "\r\n".join(map(json.dumps, records))
        file.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else b"\xef\xbb\xbf" + text.encode())
    rows = load_rows("oddity", "test", data=tmp_path)
    assert [row.prompt for row in rows] == [row.prompt for row in load_rows("boolq", data=records)]


def test_a_file_that_is_damaged_or_of_no_family_says_why(tmp_path):
    packed = tmp_path / "boolq.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(question(0)).encode())[:-9])
    refused("boolq.jsonl.gz is damaged: it cannot be unpacked", "boolq", data=packed)
    refused(
        r"line 1 is a row of none of .*\n  commonsense: answer 'perhaps' is outside the set, .*\n  arithmetic: answer",
        "oddity",
        data=written(tmp_path / "oddity.jsonl", [question(0, answer="perhaps")]),
    )
    written(tmp_path / "commonsense/test/twice.jsonl", [question(0, choices="true/true")])
    refused("the choices are 'true/true', expected each once", "twice", data=tmp_path, split="test")
    refused("no rows of boolq in list, test$", "boolq", data=[])
    refused("but those that a test set holds", "boolq", data=[{**question(0), "in_test": ["boolq"]}])


def test_a_limit_draws_the_same_rows_in_the_order_of_the_file():
    from reftlens.experiments.rows.loading import load_rows

    data = [question(i) for i in range(50)]
    some = load_rows("boolq", "test", data=data, limit=10)
    assert some == load_rows("boolq", "test", data=data, limit=10) and len(some) == 10
    assert [row.index for row in some] == sorted({row.index for row in some})
    assert some != load_rows("boolq", "test", data=data, limit=10, seed=1)
    assert len(load_rows("boolq", "test", data=data, limit=60)) == 50


def test_rows_whose_question_is_in_a_test_set_are_left_out():
    from reftlens.experiments.rows.loading import load_rows

    data = [{**question(i), "in_test": ["boolq"] * (i == 1)} for i in range(3)]
    assert [row.index for row in load_rows("boolq", data=data)] == [0, 2]
    assert [row.index for row in load_rows("boolq", data=data, leaks=True)] == [0, 1, 2]


def test_what_a_test_set_holds_is_told_in_a_frame_and_a_csv_as_in_json(tmp_path):
    from reftlens.experiments.rows.loading import load_rows

    rows = [{"instruction": f"What is {i} and 1?", "input": "", "output": "", "answer": i + 1} for i in range(3)]
    frame = pd.DataFrame([{**rows[0], "in_test": ["svamp"]}, rows[1], {**rows[2], "in_test": []}])
    assert [row.index for row in load_rows("math10k", data=frame)] == [1, 2]
    frame.to_csv(tmp_path / "lists.csv", index=False)
    assert [row.index for row in load_rows("math10k", data=tmp_path / "lists.csv")] == [1, 2]
    frame.assign(in_test=[True, False, False]).to_csv(tmp_path / "flags.csv", index=False)
    assert [row.index for row in load_rows("math10k", data=tmp_path / "flags.csv")] == [1, 2]
    arrays = [{**row, "in_test": np.array(["svamp", "mawps"][: 2 * (i == 0)])} for i, row in enumerate(rows)]
    assert [row.index for row in load_rows("math10k", data=arrays)] == [1, 2]


def test_a_split_keeps_rows_with_one_question_together():
    from reftlens.experiments.rows.loading import load_rows, split

    rows = load_rows("boolq", data=[question(i // 2) for i in range(40)])
    parts = split(rows, seed=3)
    assert [len(part) for part in parts.values()] == [20, 20] and list(parts) == ["dev", "test"]
    assert not {row.question for row in parts["dev"]} & {row.question for row in parts["test"]}
    assert parts == split(rows, seed=3) != split(rows, seed=4)
    with pytest.raises(ValueError, match="sum to 1"):
        split(rows, {"dev": 0.5})


def test_the_hub_is_asked_for_its_own_names(monkeypatch):
    import datasets

    from reftlens.experiments.rows.loading import load_rows

    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(hub_rows.arc() if config else hub_rows.piqa())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_rows("arc_challenge", "test")) == len(load_rows("piqa", "test", limit=10)) == 10
    assert asked == [("allenai/ai2_arc", "ARC-Challenge", "test"), ("ybisk/piqa", None, "validation")]


# -- bad input -----------------------------------------------------------------------------------------------


def refused(match, task="boolq", split="test", **more):
    from reftlens.experiments.rows.loading import load_rows

    with pytest.raises(ValueError, match=match) as error:
        load_rows(task, split, **more)
    return str(error.value)


def test_an_unknown_task_names_the_nearest(tmp_path):
    assert "hellaswag" in refused("no task 'helaswag'", "helaswag")
    written(tmp_path / "commonsense/test/oddity.jsonl", [question(1)])
    assert "oddity" in refused("no task 'odity'", "odity", data=tmp_path)


def test_a_file_that_is_not_there_is_told_with_where_it_was_looked_for(tmp_path):
    message = refused("no test rows of boolq", data=tmp_path)
    assert str(tmp_path / "commonsense/test/boolq.jsonl") in message
    refused("there is no such file", data=tmp_path / "nowhere")


def test_a_file_of_another_task_or_family_is_refused_with_its_line(tmp_path):
    mine = written(tmp_path / "a.jsonl", [question(1), {"instruction": "What is 3 + 4?", "input": "", "answer": "7.0"}])
    refused(
        r"a\.jsonl, line 2 is no commonsense question: its instruction ends in .*expected 'Answer format", data=mine
    )
    refused(r"line 1 asks for one of true, false, and piqa asks for solution1, solution2", "piqa", data=mine)
    other = written(tmp_path / "b.jsonl", [{"sentence": "fine .", "label": 1, "idx": 0}])
    refused(r"b\.jsonl, line 1 has no field 'question', it has: sentence, label, idx", data=other)
    refused("it would be a row of glue, and boolq is of commonsense", data=other)
    refused("it would be a row of commonsense, and gsm8k is of arithmetic", "gsm8k", data=mine)
    refused("it would be a row of commonsense, and sst2 is of glue", "sst2", data=mine)
    refused("has a field 'answer'.* it would be a row of commonsense", "alpaca", data=mine)
    other.write_text("[1, 2]")
    refused("b.jsonl, record 0 is no record with fields", data=other)


def test_a_label_outside_the_set_and_an_empty_answer_are_refused_with_their_line(tmp_path):
    mine = written(tmp_path / "a.jsonl", [question(1), question(2, "maybe")])
    refused(r"a\.jsonl, line 2: answer 'maybe' is outside the set, expected one of true, false", data=mine)
    written(mine, [question(1), question(2), question(3, "")])
    refused(r"a\.jsonl, line 3: answer is '', expected one of true, false", data=mine)
    refused(
        r"row 0: label -1 is outside the set, expected one of 0, 1",
        "piqa",
        data=[{**hub_rows.piqa()[0], "label": -1}],
    )
    refused(r"row 0: endings is \[\], expected a list", "hellaswag", data=[{**hub_rows.hellaswag()[0], "endings": []}])
    refused("row 0: input is 'x', expected none", data=[{**question(1), "input": "x"}])
    refused("no rows of boolq", data=[])


def test_what_cannot_be_a_problem_is_refused():
    first = hub_rows.gsm8k()[0]
    refused(r"row 0: answer is 'x', expected steps, then '#### '", "gsm8k", data=[{**first, "answer": "x"}])
    refused("the number after '####' is 'two', expected a number", "gsm8k", data=[{**first, "answer": "so\n#### two"}])
    refused("answer is '', expected text", "gsm8k", data=[{**first, "answer": ""}])
    refused("row 0: answer is True, expected a number", "gsm8k", data=[{"instruction": "?", "answer": True}])
    refused("row 0: correct 'F' is outside the set", "aqua", data=[{**hub_rows.aqua()[0], "correct": "F"}])
    refused("answer 'E' is outside the set, expected one of A, B", "aqua",
            data=[{"instruction": "Which? (A) 1 (B) 2", "answer": "E"}])  # fmt: skip
    refused("Question names N_01, and Numbers has 1", "mawps", data=[{**hub_rows.mawps()[0], "Numbers": "3.0"}])
    refused(r"lSolutions is \[\], expected", "addsub", data=[{**hub_rows.addsub()[0], "lSolutions": []}])
    refused(r"has the fields id, expected those of one form of instruction, answer; ", "svamp", data=[{"id": 3}])


def test_the_hub_out_of_reach_says_what_to_pass(monkeypatch):
    import datasets

    def load_dataset(name, config, *, split):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    refused(r"google/boolq, split 'validation', could not be loaded \(offline\): pass data=")


def test_a_label_that_is_text_is_no_text_of_the_row(tmp_path):
    from reftlens.experiments.rows.loading import load_rows

    file = tmp_path / "glue/own/train.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"sentence": "a film", "label": "1"}) + "\n")
    (row,) = load_rows("own", "train", data=tmp_path)
    assert row.fields["texts"] == ("a film",) and row.fields["label"] == 1 and "1" not in row.prompt
