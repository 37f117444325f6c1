"""Causal models by their laws, and the pairs of every built-in task against answers worked out another way."""

import re
from dataclasses import replace

import pandas
import pytest
import torch

import reftlens as rl
from reftlens.tasks.addition import addition
from reftlens.tasks.gendered_pronoun import gendered_pronoun
from reftlens.tasks.indirect_object import indirect_object
from reftlens.tasks.multiple_choice import multiple_choice
from reftlens.tasks.price_tagging import price_tagging

TASKS = {t.name: t for t in (price_tagging(), indirect_object(), gendered_pronoun(), multiple_choice(), addition())}
CELLS = [(name, v) for name, t in TASKS.items() for v in t.causal.derived if v != t.causal.output]


def _model():
    derived = {
        "left": rl.tasks.causal.Derived(("a", "b"), lambda a, b: a == b),
        "right": rl.tasks.causal.Derived(("c", "d"), lambda c, d: c == d),
        "same": rl.tasks.causal.Derived(("left", "right"), lambda left, right: left == right),
    }
    return rl.tasks.causal.CausalModel({name: range(3) for name in "abcd"}, derived, "same")


def test_it_runs_intervenes_and_interchanges():
    model = _model()
    base, source = dict(a=0, b=0, c=1, d=1), dict(a=0, b=1, c=2, d=2)
    assert model.run(base) == {**base, "left": True, "right": True, "same": True}
    assert model.run(base, {"left": False})["same"] is False
    assert model.run(base, {"a": 2})["left"] is False, "an input can be held fixed as well"
    assert model.interchange(base, {"left": source})["same"] is False
    assert model.interchange(base, {"left": source, "right": dict(a=0, b=0, c=0, d=1)})["same"] is True
    nested = (base, {"left": source})  # a source whose own left was exchanged: its `same` is False
    assert model.interchange(base, {"same": nested})["same"] is False


def test_what_is_no_causal_model_is_said():
    one = rl.tasks.causal.Derived(("a",), lambda a: a)
    with pytest.raises(ValueError, match="in a circle"):
        rl.tasks.causal.CausalModel(
            {"a": [1]}, {"x": rl.tasks.causal.Derived(("y",), str), "y": rl.tasks.causal.Derived(("x",), str)}, "x"
        )
    with pytest.raises(ValueError, match="which no variable is called"):
        rl.tasks.causal.CausalModel({"a": [1]}, {"x": rl.tasks.causal.Derived(("b",), str)}, "x")
    with pytest.raises(ValueError, match="both an input and computed"):
        rl.tasks.causal.CausalModel({"a": [1]}, {"a": one}, "a")
    with pytest.raises(ValueError, match="no value to take"):
        rl.tasks.causal.CausalModel({"a": []}, {"x": one}, "x")
    with pytest.raises(ValueError, match="the output is 'y'"):
        rl.tasks.causal.CausalModel({"a": [1]}, {"x": one}, "y")
    model = rl.tasks.causal.CausalModel({"a": [1]}, {"x": rl.tasks.causal.Derived(("a",), lambda a: a / 0)}, "x")
    with pytest.raises(ValueError, match="x could not be computed from a=1: ZeroDivisionError"):
        model.run({"a": 1})
    with pytest.raises(ValueError, match="no value for a"):
        model.run({})
    with pytest.raises(ValueError, match="no variable z"):
        model.interchange({"a": 1}, {"z": {"a": 1}})


@pytest.mark.parametrize("name", TASKS)
def test_a_setting_that_is_its_own_source_changes_nothing(name):
    task, generator = TASKS[name], torch.Generator().manual_seed(0)
    for _ in range(20):
        setting = task.draw(generator)
        plain = task.causal.run(setting)
        assert task.causal.interchange(setting, {v: setting for v in task.causal.derived}) == plain


@pytest.mark.parametrize("name, variable", CELLS)
def test_pairs_are_balanced_repeatable_and_apart(name, variable):
    task = TASKS[name]
    train, test = (task.pairs(40, variable, split=split, seed=1) for split in ("train", "test"))
    for pairs in (train, test):
        assert sum(b.completion != c for b, c in zip(pairs.base, pairs.counterfactual, strict=True)) == 20
        prompts = {(b.prompt, s.prompt) for b, s in zip(pairs.base, pairs.sources[variable], strict=True)}
        assert len(prompts) == 40
    assert not {b.prompt for b in train.base} & {b.prompt for b in test.base}
    assert task.pairs(40, variable, seed=1) == train != task.pairs(40, variable, seed=2)
    assert train[3:5].base == train.base[3:5] and len(train[[0, 7]]) == 2


def _numbers(text):
    return [float(n) for n in re.findall(r"\d+\.\d+", text)]


def _price(prompt):
    """`(price, lower, upper)` read from a prompt, whatever stands first in it."""
    low, high = sorted(_numbers(prompt))[0], sorted(_numbers(prompt))[-1]
    match = re.search(r"(\d+\.\d+) dollars(?::| lie| within)", prompt)
    price = float(match.group(1))
    rest = [n for n in _numbers(prompt) if n != price] or [low, high]
    return price, min(rest), max(rest)


def test_price_tags_against_the_prompts_read_anew():
    for split in ("train", "test"):
        pairs = TASKS["price tagging"].pairs(60, "above", split=split)
        for base, source, answer in zip(pairs.base, pairs.sources["above"], pairs.counterfactual, strict=True):
            (price, low, high), (other, below, _) = _price(base.prompt), _price(source.prompt)
            assert base.completion == (" Yes" if low <= price <= high else " No")
            assert answer == (" Yes" if other >= below and price <= high else " No")


def test_indirect_objects_against_the_prompts_read_anew():
    pairs = TASKS["indirect object identification"].pairs(40, "position")
    for base, source, answer in zip(pairs.base, pairs.sources["position"], pairs.counterfactual, strict=True):
        names = [re.findall(r"\b(?!When|Then)[A-Z][a-z]+", e.prompt) for e in (base, source)]
        assert base.completion.strip() == next(n for n in names[0] if names[0].count(n) == 1)
        place = next(i for i in (0, 1) if names[1].count(names[1][i]) == 1)
        assert answer.strip() == names[0][place]


def test_multiple_choice_against_the_prompts_read_anew():
    pairs = TASKS["multiple choice"].pairs(40, "pointer")

    def options(prompt):
        return re.findall(r"^([A-D])\. (\w+)$", prompt, flags=re.M)

    for base, source, answer in zip(pairs.base, pairs.sources["pointer"], pairs.counterfactual, strict=True):
        where = next(i for i, (_, c) in enumerate(options(source.prompt)) if c in source.prompt.split("\n")[0])
        assert answer.strip() == options(base.prompt)[where][0]


def test_sums_against_the_prompts_read_anew():
    pairs = TASKS["two-digit addition"].pairs(40, "carry")
    for base, source, answer in zip(pairs.base, pairs.sources["carry"], pairs.counterfactual, strict=True):
        (a, b), (c, d) = ([int(n) for n in re.findall(r"(\d+) \+ (\d+) = $", e.prompt)[0]] for e in (base, source))
        assert int(base.completion) == a + b
        carry = (a % 10 + b % 10 >= 10), (c % 10 + d % 10 >= 10)
        assert int(answer) == a + b + 10 * (carry[1] - carry[0])


def test_several_variables_have_a_source_each():
    pairs = TASKS["price tagging"].pairs(30, ["above", "below"])
    assert set(pairs.sources) == set(pairs.values) == {"above", "below"}
    for i, answer in enumerate(pairs.counterfactual):
        assert answer == (" Yes" if pairs.values["above"][i] and pairs.values["below"][i] else " No")


def test_pairs_are_encoded_with_their_sources(gpt2):
    pairs = TASKS["gendered pronoun"].pairs(8, "gender")
    data, base = pairs.encode(gpt2), pairs.encode_base(gpt2)
    assert list(data.sources) == ["source"] and len(data.sources["source"].batch) == 8
    text = [gpt2.tokenizer.decode(data.tokens[i][data.target_mask[i]]) for i in range(8)]
    assert tuple(text) == pairs.counterfactual
    assert [e.prompt for e in data.sources["source"].batch.examples] == [e.prompt for e in pairs.sources["gender"]]
    assert not base.sources and [e.completion for e in base.examples] == [e.completion for e in pairs.base]
    both = TASKS["price tagging"].pairs(6, ["above", "below"]).encode(gpt2)
    assert set(both.sources) == {"above", "below"}
    first = pairs.encode_base(gpt2, first_token=True)
    assert first.target_mask.sum(dim=1).tolist() == [1] * 8
    with pytest.raises(ValueError, match="begin with the same token"):  # " he" and " she" do, letter by letter
        pairs.encode(gpt2, first_token=True)


def _table(pairs):
    return pandas.DataFrame(
        {
            "base": [e.prompt for e in pairs.base],
            "source": [e.prompt for e in pairs.sources["gender"]],
            "own": [e.completion for e in pairs.base],
            "theirs": [e.completion for e in pairs.sources["gender"]],
            "answer": pairs.counterfactual,
            "template": range(len(pairs)),
        }
    )


def test_pairs_come_out_of_a_table(gpt2):
    pairs = TASKS["gendered pronoun"].pairs(8, "gender")
    table = _table(pairs).sample(frac=1.0, random_state=0).sort_index()
    read = rl.tasks.Pairs.from_frame(table, base_answer="own", source_answer="theirs")
    assert read.counterfactual == pairs.counterfactual and read.base == pairs.base
    assert read.values == {"source": tuple(table["theirs"])}
    data, expected = read.encode(gpt2), pairs.encode(gpt2)
    assert data.fingerprint == expected.fingerprint, "sources and all, as of the pairs that the table was made of"
    assert read.encode_base(gpt2).fingerprint == pairs.encode_base(gpt2).fingerprint
    assert read.others == {"template": tuple(range(8))} and read[2:4].others == {"template": (2, 3)}
    records = rl.tasks.Pairs.from_frame(iter(table.to_dict("records")), source={"gender": "source"}, base_answer="own")
    assert records.base == read.base and list(records.sources) == ["gender"] and records.values == {}
    both = rl.tasks.Pairs.from_frame(table, source={"name": "source", "verb": "source"}).encode(gpt2)
    assert list(both.sources) == ["name", "verb"], "several variables may come from one source"
    assert "8 rows, sources of source; the exchange changes" in repr(read) and "template in others" in repr(read)


def test_pairs_without_the_bases_answers_say_so_where_these_are_needed(gpt2):
    pairs = TASKS["gendered pronoun"].pairs(8, "gender")
    read = rl.tasks.Pairs.from_frame(_table(pairs))
    data = read.encode(gpt2, first_token=True)
    assert read.encode(gpt2).fingerprint == pairs.encode(gpt2).fingerprint
    assert "without the bases' answers" in repr(read)
    with pytest.raises(ValueError, match=r"from_frame\(…, base_answer=…\) reads them"):
        read.encode_base(gpt2)
    grid = rl.interchange_map(gpt2, data, data, layers=(1,), ranks=(0,), shuffles=40, progress=False)
    das = rl.ReFT({rl.resid_post(1, "last"): rl.DAS(32, 1)})
    config = rl.FitConfig(steps=1)
    table = rl.controls(das, gpt2, data, data, config, random=2, shuffles=9, random_model=False, progress=False)
    assert len(grid.cells) == 1 and 0 <= table["trained"].accuracy.value <= 1


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("answer", float("nan"), "row 1, column 'answer' is missing, expected text: drop or fill such rows"),
        ("base", pandas.NA, "row 1, column 'base' is missing, expected text, or a list of chat messages"),
        ("source", "", "row 1, column 'source' is empty"),
        ("own", None, "row 1, column 'own' is missing"),
        ("answer", 7, r"row 1, column 'answer' is 7, expected text: make it text, ' ' \+ table\['answer'\]"),
        ("answer", [" a"], r"row 1, column 'answer' is \[' a'\]"),
    ],
)
def test_what_is_no_pair_is_named_by_row_and_column(column, value, why):
    table = _table(TASKS["gendered pronoun"].pairs(3, "gender")).astype(object)
    table.at[1, column] = value
    with pytest.raises(ValueError, match=why):
        rl.tasks.Pairs.from_frame(table, base_answer="own")


def test_columns_that_cannot_be_meant_are_refused():
    table = _table(TASKS["gendered pronoun"].pairs(3, "gender"))
    read = rl.tasks.Pairs.from_frame
    with pytest.raises(ValueError, match="row 0 has no column 'after', it has: base, source, own"):
        read(table, answer="after")
    with pytest.raises(ValueError, match="column 'base' is named for two parts"):
        read(table, source="base")
    with pytest.raises(ValueError, match="column 'base' is named for two parts"):
        read(table, answer="base")
    with pytest.raises(ValueError, match="source_answer names 'x', and the sources are of: source"):
        read(table, source_answer={"x": "theirs"})
    with pytest.raises(ValueError, match="two columns called 'answer'"):
        read(table.rename(columns={"own": "answer"}))
    with pytest.raises(ValueError, match="no rows"):
        read(table[:0])


def test_what_cannot_be_asked_of_a_task_is_said():
    task = TASKS["gendered pronoun"]
    with pytest.raises(ValueError, match="no variable"):
        task.pairs(4, "colour")
    few = replace(task, pools={"train": {"name": ("Mary", "John"), "verb": ("slept",)}})
    assert len(few.pairs(8, "gender")) == 8, "two templates, two names each way: as many as there are"
    with pytest.raises(ValueError, match=r"8 different pairs .* 9 were asked for: ask for fewer"):
        few.pairs(9, "gender")
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        task.pairs(4, "gender", changed=1.5)
