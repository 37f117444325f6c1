"""What users bring in: tables, files, paths and labels are taken as they are meant, or refused with a way on."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import TypeCheckError

import architectures as A
import reftlens as rl
from reftlens import storage

D = A.D
RECORDS = [{"prompt": "the cat", "completion": " sat\non"}, {"prompt": "é \u2028 🍕", "completion": ' a "dog"'}]
TABLE = pd.DataFrame(RECORDS)


@pytest.fixture
def reft():
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, rank=2)})
    reft.reset(0)
    return reft


@pytest.fixture
def data(llama):
    return rl.encode(llama, [rl.Example(f"the cat sat {i}", " over the hill") for i in range(4)])


# -- examples ------------------------------------------------------------------------------------------------


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        ("a.jsonl", lines(RECORDS).encode()),
        ("a.jsonl", lines(RECORDS).encode("utf-8-sig")),
        ("a.jsonl", lines(RECORDS).encode("utf-16")),
        ("a.jsonl", ("\n\r\n" + lines(RECORDS).replace("\n", "\r\n")).encode()),
        ("a.json", json.dumps(RECORDS).encode()),
        ("a.json", json.dumps(RECORDS, indent=2).encode("utf-16")),
        ("a.csv", TABLE.to_csv().encode()),
        ("a.csv", TABLE[["completion", "prompt"]].to_csv(index=False).encode("utf-8-sig")),
        ("a.tsv", TABLE.to_csv(sep="\t").encode("utf-16")),
    ],
)
def test_files_of_examples_in_usual_formats(tmp_path, monkeypatch, name, payload):
    (tmp_path / name).write_bytes(payload)
    expected = [rl.Example(**record) for record in RECORDS]
    assert rl.load_examples(tmp_path / name) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rl.load_examples(f"~/{name}") == expected


@pytest.mark.parametrize("source", [RECORDS, TABLE, iter(RECORDS), TABLE.set_index(pd.Index(["x", "y"]))], ids=type)
def test_tables_in_memory(source):
    assert rl.load_examples(source) == [rl.Example(**record) for record in RECORDS]


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (
            TABLE.rename(columns={"prompt": "question"}),
            "row 0 has no field 'prompt', it has: question, completion: say which are the prompts and the completions",
        ),
        (TABLE.assign(completion=[" a", None]), "row 1: completion is .*, expected text"),
        ({"prompt": ["a"], "completion": ["b"]}, r"a dict of prompt, completion, .*source\['train'\]"),
        ({"train": RECORDS}, r"a dict of train, .*source\['train'\]"),
        (TABLE.iloc[:0], "no examples in DataFrame"),
        (["a"], "row 0 is no record"),
    ],
    ids=str,
)
def test_other_tables_are_refused_with_what_is_missing(source, error):
    with pytest.raises(ValueError, match=error):
        rl.load_examples(source)


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        ('{"prompt": "é"}'.encode("latin-1"), r"a.jsonl is no text in UTF-8 \(.* at byte 12\).*pandas"),
        (b"PAR1\x93\x00", r"a.jsonl is no text in UTF-8 .*read_parquet"),
        (b'[{"prompt": "a"]', "a.jsonl is not JSON"),
        (b'{"prompt": "a", "completion": "b"}\n{"pro', "a.jsonl, line 2 is not JSON"),
        (b"prompt,completion\n", "a.jsonl, line 1 is not JSON"),
        (b'[["a", "b"]]', "a.jsonl, record 0 is no record"),
        (b"", "no examples in .*a.jsonl"),
    ],
    ids=repr,
)
def test_broken_files_are_refused_by_name_and_place(tmp_path, payload, error):
    (tmp_path / "a.jsonl").write_bytes(payload)
    with pytest.raises(ValueError, match=error):
        rl.load_examples(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="is a folder, expected a file"):
        rl.load_examples(tmp_path)


# -- folders -------------------------------------------------------------------------------------------------


def test_the_home_folder_is_meant_by_its_sign(tmp_path, monkeypatch, llama, reft, data):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = rl.fit(reft, llama, data, steps=1, progress=False, checkpoint="~/run/a.pt")
    assert rl.save(reft, "~/saved", llama, run=run) == tmp_path / "saved"
    assert rl.load("~/saved", llama).sites == reft.sites and storage.load_run("~/saved") == run
    others = (".cache", ".config")  # of libraries that are imported here for the first time
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in others) == ["run", "saved"]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path, llama, reft):
    (tmp_path / "a").write_text("x")
    with pytest.raises(ValueError, match="a is a file, expected a folder"):
        rl.save(reft, tmp_path / "a", llama)
    assert (tmp_path / "a").read_text() == "x"


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe{", b"\x00"])
def test_a_damaged_record_is_read_from_its_copy_with_a_warning(tmp_path, llama, reft, payload):
    rl.save(reft, tmp_path, llama)
    (tmp_path / "reft.json").write_bytes(payload)
    with pytest.warns(UserWarning, match="reft.json is damaged: the copy in weights.safetensors is read"):
        assert rl.load(tmp_path, llama).sites == reft.sites


def test_a_whole_record_is_read_without_a_warning(tmp_path, llama, reft):
    rl.save(reft, tmp_path, llama)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rl.load(tmp_path, llama)


@pytest.mark.parametrize("damage", [lambda r: r.pop("sites"), lambda r: r["sites"][0].pop("positions")])
def test_a_record_with_parts_missing_is_named(tmp_path, llama, reft, damage):
    rl.save(reft, tmp_path, llama)
    record = json.loads((tmp_path / "reft.json").read_text())
    damage(record)
    (tmp_path / "reft.json").write_text(json.dumps(record))
    with pytest.raises(rl.errors.StoreMismatch, match="is not as save"):
        rl.load(tmp_path, llama)


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"{}"])
def test_a_damaged_record_of_a_run_is_named(tmp_path, llama, reft, data, payload):
    rl.save(reft, tmp_path, llama, run=rl.fit(reft, llama, data, steps=1, progress=False))
    (tmp_path / "run.json").write_bytes(payload)
    with pytest.raises(rl.errors.StoreMismatch, match="is damaged, or was not written by save"):
        storage.load_run(tmp_path)


# -- labels, tokens of sources, beams ------------------------------------------------------------------------


@pytest.mark.parametrize("estimate", [rl.directions.difference_of_means, rl.directions.linear_probe, rl.directions.lda])
@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 0, 1, 1],
        np.array([0, 1, 0, 1, 1]),
        ["bad", "good", "bad", "good", "good"],
        pd.Series([0, 1, 0, 1, 1], index=[4, 3, 2, 1, 0]),
        [False, True, False, True, True],
        np.array([-1, 7, -1, 7, 7], dtype=np.int8),
        torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]),
    ],
    ids=repr,
)
def test_labels_of_every_kind_say_the_same(estimate, labels):
    x = torch.randn(5, D)
    expected = estimate(x, torch.tensor([0, 1, 0, 1, 1]))
    try:
        direction = estimate(x, labels)
    except TypeCheckError:
        pytest.skip("types are checked at every call")
    assert torch.equal(direction.basis, expected.basis)
    flipped = estimate(x, [1, 0, 1, 0, 0])
    assert torch.allclose(flipped.basis, -expected.basis, atol=1e-6)


def test_labels_that_do_not_fit_are_told_what_a_row_is():
    with pytest.raises(ValueError, match="2 labels for 5 activations: one is needed for each row, which is a token"):
        rl.directions.difference_of_means(torch.randn(5, D), [1, 0])
    with pytest.raises(ValueError, match=r"all labels are \['a'\]: two classes"):
        rl.directions.lda(torch.randn(2, D), ["a", "a"])


def test_unequally_many_tokens_of_base_and_source_are_told_of_the_last_of_each(llama):
    def score(where):
        reft = rl.ReFT({rl.resid_post(1, where): rl.Interchange(D)})
        base, source = (rl.encode(llama, [rl.Example(t, " on")]) for t in ("the cat sat", "the cat and cat"))
        return rl.evaluate(reft, llama, base.with_sources(source), progress=False)

    with pytest.raises(ValueError, match=r"such as the last of each: Tokens\(text='cat'\) >> Last\(1\)"):
        score(rl.positions.Tokens("cat"))
    score(rl.positions.Tokens("cat") >> rl.positions.Last(1))


def test_beams_of_a_plain_model_are_the_rows_of_the_batch_repeated(llama, reft):
    batch, plain = rl.encode_prompts(llama, ["the cat", "a dog"]), A.hf_model("llama")
    assert batch.attention_mask.all()

    with rl.attach(reft, plain, batch=batch):
        ids = plain.generate(batch.tokens, attention_mask=batch.attention_mask.long(), num_beams=2, max_new_tokens=4)
        with pytest.raises(ValueError, match="called on 3 rows, and the batch has 2"):
            plain(batch.tokens[[0, 1, 1]])
    ids = ids[:, batch.tokens.shape[1] :]
    ours = rl.generate(reft, llama, batch, rl.Decoding(max_new_tokens=4, beams=2))
    assert [tuple(row) for row in ids.tolist()] == list(ours.ids)


def test_a_plain_model_run_on_other_tokens_is_refused(llama, reft):
    batch, plain = rl.encode_prompts(llama, ["the cat", "a dog"]), A.hf_model("llama")
    with (
        pytest.raises(ValueError, match="other tokens than those of the batch"),
        rl.attach(reft, plain, batch=batch),
    ):
        plain(batch.tokens.flip(0))
    with torch.no_grad(), rl.attach(reft, plain, batch=batch):
        plain(batch.tokens)


# -- what is refused is refused first ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["folder", "file/run.pt", "file/deeper/run.pt"])
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, llama, reft, data, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    before = [p.clone() for p in reft.parameters()]
    with pytest.raises(ValueError, match=f"{name} (is a folder, expected a file|cannot be written)"):
        rl.fit(reft, llama, data, steps=1, progress=False, checkpoint=tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} (is a folder, expected a file|cannot be written)"):
        rl.report(reft, llama, data, tmp_path / name)
    assert all(torch.equal(p, q) for p, q in zip(before, reft.parameters(), strict=True))


def test_settings_of_generation_that_contradict_are_refused_before_prompts_are_read(llama, reft):
    """These prompts would be refused themselves."""
    beams = rl.Decoding(beams=2)
    with pytest.raises(ValueError, match="keep_logits needs beams=1"):
        rl.generate(reft, llama, [""], beams, keep_logits=True)
    with pytest.raises(ValueError, match="a stream needs beams=1"):
        list(rl.generation.stream(reft, llama, "", beams))
    with pytest.raises(ValueError, match=r"variant=\[\], expected one or more"):
        rl.generate(reft, llama, [""], variant=[])


def test_an_objective_gets_whole_micro_batches_in_the_order_of_the_step(llama, reft):
    texts = [f"{'the cat ' * (i % 3 + 1)}{i}" for i in range(7)]
    data, seen = rl.encode(llama, [rl.Example(t, " over the hill") for t in texts]), []

    def objective(logits, batch):
        seen.append([int(example.prompt[-1]) for example in batch.examples])
        assert len(logits) == len(batch.target_ids)
        return rl.training.cross_entropy(logits, batch)

    rl.fit(reft, llama, data, epochs=1, batch_size=4, shuffle=False, objective=objective, progress=False)
    assert [0, 1, 2, 3] in seen and [4, 5, 6] in seen and all(len(rows) > 2 for rows in seen)
