"""RAVEL: pairs from made-up cities against the files read anew, positions, what a model knows, and the real files."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import reftlens as rl
from reftlens.tasks.ravel import Ravel, ask, entity_end, ravel_cities
from reftlens.tasks.ravel_files import City, Template
from reftlens.tasks.ravel_known import known

REAL = Path(__file__).parents[2] / "shared" / "data" / "ravel"
NAMES = ("Ato", "Bela", "Cumo", "Dari", "Evo", "Fisk", "Gora", "Hult", "Ivo", "Jarl", "Kemi", "Lodz")
CITIES = [
    {
        "entity": name,
        "split": ("train", "val", "test")[i % 3],
        "Country": f"{'XYZ'[i // 4]}land",
        "Language": f"{'PQ'[i % 2]}ish,Other",
    }
    for i, name in enumerate(NAMES)
]
PROMPTS = [
    {"attribute": "Country", "prompt": f"{split}: %s is in", "split": split} for split in ("train", "val", "test")
] + [
    {"attribute": "Language", "prompt": f'{split}, [{{"city": "%s", "lang": "', "split": split}
    for split in ("train", "val", "test")
]
SENTENCES = [
    {"prompt": "the %s fair", "split": "train", "entity": None},
    {"prompt": "Ato %s is a hill", "split": "train", "entity": "Ato"},
]
TABLE = {row["entity"]: row for row in CITIES}


def _folder(tmp_path, **changed):
    files = {"city_entities": CITIES, "city_prompts": PROMPTS, "city_wikipedia_prompts": SENTENCES} | changed
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return tmp_path


@pytest.fixture
def ravel(tmp_path):
    return ravel_cities(_folder(tmp_path))


def _city(prompt):
    return next(row for name, row in TABLE.items() if name in prompt)


def _asks(prompt):
    return "Country" if prompt.endswith("is in") else "Language"


def _value(row, attribute):
    return row[attribute].split(",")[0]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_cause_pairs_take_the_sources_attribute(ravel, split):
    pairs = ravel.cause("Country", 6, split=split)
    for base, source, answer in zip(pairs.base, pairs.sources["Country"], pairs.counterfactual, strict=True):
        own, other = _city(base.prompt), _city(source.prompt)
        assert own["split"] == other["split"] == split and base.prompt.startswith(split)
        assert base.completion == f" {own['Country']}" != answer == f" {other['Country']}"
    assert pairs == ravel.cause("Country", 6, split=split) != ravel.cause("Country", 6, split=split, seed=1)


def test_isolate_pairs_keep_an_answer_that_the_source_does_not_share(ravel):
    pairs = ravel.isolate("Country", 4)
    for base, source, answer in zip(pairs.base, pairs.sources["Country"], pairs.counterfactual, strict=True):
        own, other = _city(base.prompt), _city(source.prompt)
        assert (_asks(base.prompt), _asks(source.prompt)) == ("Language", "Country")
        assert base.completion == answer == _value(own, "Language"), "inside a quotation no space comes first"
        assert _value(own, "Language") != _value(other, "Language") and own["Country"] != other["Country"]
    told = ravel.isolate("Country", 3, wikipedia=True).sources["Country"]
    assert all(s.prompt.startswith("the ") for s in told), "a sentence about one city is not filled with another"


def test_cause_and_isolate_pairs_join_for_multi_task_das(ravel, gpt2):
    cause, isolate = ravel.cause("Country", 4), ravel.isolate("Country", 4)
    data = rl.Batch.join([cause.encode(gpt2), isolate.encode(gpt2)])
    das = rl.ReFT({rl.resid_post(1, ravel.positions): rl.DAS(32, rank=2)})
    rl.fit(das, gpt2, data, steps=2, progress=False)
    scores = [rl.causal.interchange_scores(das, gpt2, p.encode(gpt2), progress=False) for p in (cause, isolate)]
    assert len(rl.causal.cause_isolate(*scores).cause_hits) == 4


def test_the_entitys_last_token_is_chosen(ravel, gpt2):
    prompts = [ask(c, t).prompt for c in ravel.cities for t in ravel.templates]
    names = [c.name for c in ravel.cities for _ in ravel.templates]
    data = rl.encode_prompts(gpt2, prompts)
    mask = ravel.positions.mask(data.view)
    assert mask.sum(dim=1).tolist() == [1] * len(prompts)
    for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        place = int(mask[row].long().argmax())
        until = gpt2.tokenizer.decode(data.tokens[row, : place + 1].tolist(), skip_special_tokens=True)
        assert until == prompt[: prompt.rindex(name) + len(name)]


def test_where_one_ending_ends_another_the_longer_one_counts(gpt2):
    positions = entity_end(["%s is in", "from %s town is in"])
    data = rl.encode_prompts(gpt2, ["Ato is in", "from Ato town is in", "from Málaé town is in"])
    chosen = positions.mask(data.view)
    for row, until in enumerate(("Ato", "from Ato", "from Málaé")):
        place = int(chosen[row].long().argmax())
        assert gpt2.tokenizer.decode(data.tokens[row, : place + 1].tolist(), skip_special_tokens=True) == until
    assert chosen.sum(dim=1).tolist() == [1, 1, 1]
    assert rl.Site.from_dict(rl.resid_post(0, positions).to_dict()) == rl.resid_post(0, positions)
    with pytest.raises(ValueError, match="no such token"):
        positions.mask(rl.encode_prompts(gpt2, ["Ato was here"]).view)


def test_known_is_what_the_model_answers_by_itself(ravel, gpt2):
    answered = known(gpt2, ravel, progress=False)
    assert len(answered.questions) == 2 * len(CITIES), "each city with the templates of its split"
    for (city, template), hit in zip(answered.questions, answered.hits.tolist(), strict=True):
        row = rl.encode(gpt2, [ask(city, template)], end=False)
        place = int(row.target_mask.long().argmax())
        logits = gpt2(row.tokens[:, :place])[0, -1]
        assert hit == (int(logits.argmax()) == int(row.tokens[0, place]))
    frame = answered.to_frame()
    assert frame.hit.mean() == pytest.approx(answered.hits.float().mean().item())


def test_only_what_is_known_is_asked(ravel, gpt2):
    answered = known(gpt2, ravel, progress=False)
    country = torch.tensor([t.attribute == "Country" for _, t in answered.questions])
    taught = replace(answered, hits=country)
    cut = taught.keep()
    assert {a for c in cut.cities for a in c.known} == {"Country"}
    assert taught.accuracy("Country").value == 1 and taught.accuracy("Language").value == 0
    assert cut.cause("Country", 2) and len(cut.cities) == len(CITIES)
    with pytest.raises(ValueError, match="no train city can be asked for 'Language'"):
        cut.cause("Language", 2)
    assert not replace(answered, hits=~(country | ~country)).keep().cities


def test_the_best_templates_stay(gpt2):
    cities = tuple(City(n, "train", {"Country": "Xland"}, frozenset({"Country"})) for n in NAMES)
    good, bad = (Template(f"{word} %s is in", "train", "Country") for word in ("good", "bad"))
    answered = known(gpt2, Ravel(cities, (bad, good)), progress=False)
    taught = replace(answered, hits=torch.tensor([t == good for _, t in answered.questions]))
    assert taught.best(1).templates == (good,) and taught.of_template(bad) == 0


def test_what_cannot_be_had_is_said(ravel, tmp_path):
    with pytest.raises(ValueError, match="different pairs about Country were found where 500"):
        ravel.cause("Country", 500)
    with pytest.raises(ValueError, match="no train city can be asked for 'Colour'"):
        ravel.cause("Colour", 1)
    with pytest.raises(ValueError, match="other than 'Country'"):
        ravel.isolate("Country", 1, others=["Country"])
    with pytest.raises(ValueError, match=r"city_prompts\.jsonl, line 1 has no field 'split'"):
        ravel_cities(_folder(tmp_path, city_prompts=[{"prompt": "%s"}]))
    with pytest.raises(ValueError, match="%s 0 times"):
        ravel_cities(_folder(tmp_path, city_prompts=[{"prompt": "no city", "split": "train"}]))
    with pytest.raises(ValueError, match="split is 'dev'"):
        ravel_cities(_folder(tmp_path, city_entities=[{"entity": "Ato", "split": "dev"}]))
    (tmp_path / "city_prompts.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"city_prompts\.jsonl is not there"):
        ravel_cities(tmp_path)


def test_the_hub_is_asked_where_no_folder_is_given(monkeypatch):
    import datasets

    upper = [{"ID": "1", "City": r["entity"], "Country": r["Country"], "Language": r["Language"]} for r in CITIES[::3]]
    prompts = [{"Template": PROMPTS[0]["prompt"], "Attribute": "Country", "Source": "", "Entity": ""}]
    tables = {"city_entity": {"train": upper}, "city_prompt": {"train": prompts}}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, part: tables[part])
    ravel = ravel_cities()
    assert [c.name for c in ravel.cities] == list(NAMES[::3]) and ravel.attributes == ("Country",)
    assert len(ravel.cause("Country", 2)) == 2

    def offline(name, part):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(OSError, match=r"cannot read hij/ravel from the hub \(no network\): pass a folder"):
        ravel_cities()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="reftlens\\[datasets\\]"):
        ravel_cities()


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder with RAVEL's files is not here")
def test_the_real_files_are_read():
    ravel = ravel_cities(REAL)
    assert len(ravel.cities) == 3552 and len(ravel.templates) == 273 + 938
    assert set(ravel.attributes) == {"Country", "Continent", "Language", "Latitude", "Longitude", "Timezone"}
    table = {c.name: c for c in ravel.cities}
    assert table["Aalborg"].split == "test" and table["Aalborg"].answer("Timezone") == "Europe/Copenhagen"
    for split in ("train", "val", "test"):
        cause, isolate = ravel.cause("Country", 50, split=split), ravel.isolate("Country", 50, split=split)
        assert all(b.completion != c for b, c in zip(cause.base, cause.counterfactual, strict=True))
        assert all(b.completion == c for b, c in zip(isolate.base, isolate.counterfactual, strict=True))
