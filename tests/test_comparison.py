"""Saved edits side by side: each number is that of the edit alone, and what cannot be compared is refused."""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from test_report import EVIL, NOW, Page, numbers, trained, without_charts

import architectures

__all__ = ["without_charts"]
SECTIONS = ["summary", "texts", "strength", "subspaces", "training", "provenance"]


@cache
def other():
    """A second edit of the same model: one hook that `trained()` edits too, under another name, and one of its own."""
    import reftlens as rl

    model, data, _, _ = trained()
    lo, di = rl.LoReFT(architectures.D, rank=3), rl.DiReFT(architectures.D, rank=1)
    reft = rl.ReFT({rl.Site("blocks.1.hook_out", "l2"): lo, rl.mlp_out(0, "last"): di})
    reft.reset(seed=1)
    return reft, rl.fit(reft, model, data[:12], steps=8, lr=1e-2, seed=4, progress=False)


@pytest.fixture
def folders(tmp_path):
    return saved(tmp_path)


def saved(tmp_path):
    """The two edits, each in a folder."""
    import reftlens as rl

    model, _, reft, run = trained()
    rl.save(reft, tmp_path / "wide", model, run=run)
    rl.save(other()[0], tmp_path / "narrow", model, run=other()[1])
    return [tmp_path / "wide", tmp_path / "narrow"]


def compare(folders, path, **options):
    import reftlens as rl

    model, data, _, _ = trained()
    given = {"data": data, "prompts": [EVIL, "the dog"], "decoding": rl.Decoding(max_new_tokens=5), "now": NOW}
    text = rl.reports.comparison(folders, model, path, progress=False, **{**given, **options})
    return text.read_text(encoding="utf-8")


def test_each_number_is_that_of_the_edit_alone(folders, tmp_path):
    import reftlens as rl

    model, data, reft, run = trained()
    page = compare(folders, tmp_path / "c.html")
    found, edits = numbers(page), {"wide": (reft, run), "narrow": other()}
    assert [a["id"] for tag, a in Page(page).elements if tag == "section"] == SECTIONS
    for name, (each, record) in edits.items():
        losses = [row["loss"] for row in found["training"] if row["edit"] == name]
        assert losses == list(record.losses)
        scored = rl.evaluate(each, model, data, [0, 1], progress=False)
        gained = [row["effect"] for row in found["strength"] if row["edit"] == name and row["strength"] == 1.0]
        before, after = (e.value for e in scored.estimate("loss"))
        assert gained == [pytest.approx(before - after, abs=1e-5)]
        written = rl.generate(each, model, [EVIL, "the dog"], rl.Decoding(max_new_tokens=5))
        assert tuple(row["text"] for row in found["texts"] if row["edit"] == name) == written.texts
        (row,) = (row for row in found["edits"] if row["edit"] == name)
        assert row["parameters"] == each.parameter_count(model).stored and row["last loss"] == record.loss
    unedited = rl.generate(reft, model, [EVIL, "the dog"], rl.Decoding(max_new_tokens=5), variant=0)
    assert tuple(row["text"] for row in found["texts"] if row["edit"] == "unedited") == unedited.texts


def test_the_paired_difference_is_that_of_the_examples(folders, tmp_path, without_charts):
    model, data, reft, _ = trained()
    said = Page(compare(folders, tmp_path / "c.html")).text["strength"]
    losses = []
    for each in (reft, other()[0]):
        with torch.no_grad(), each.on(model, data):
            logits = model(data.tokens, attention_mask=data.attention_mask.long(), return_type="logits")
        lp = logits.log_softmax(-1)[data.predicting].gather(1, data.target_ids[:, None])[:, 0]
        losses.append(torch.stack([lp[data.target_rows == row].mean() for row in range(len(data))]))
    assert f"narrow less that of wide is {(losses[1] - losses[0]).mean().item():.2f} [" in said


def test_subspaces_are_compared_where_both_edit_the_same_vectors(folders, tmp_path, without_charts):
    """Under two names of one hook, at other positions; and not where only one of them edits."""
    page = compare(folders, tmp_path / "c.html")
    (row,) = numbers(page)["overlap"]
    a, b = (torch.linalg.qr(m.basis().detach().double()).Q for m in (trained()[2][1], other()[0][0]))
    cosines = torch.linalg.svdvals(a.T @ b)
    assert row["overlap"] == pytest.approx(cosines.square().mean().item(), abs=1e-6)
    angles = torch.rad2deg(cosines.clamp(max=1).acos())
    assert row["smallest_angle"] == pytest.approx(angles.min().item(), abs=1e-3)
    assert row["largest_angle"] == pytest.approx(angles.max().item(), abs=1e-3)
    assert (row["a"], row["b"], row["positions"]) == ("wide", "narrow", "Last(n=1) | Last(n=2)")
    sites = numbers(page)["sites"]
    assert [(s["wide"] == "–", s["narrow"] == "–") for s in sites].count((False, False)) == 0, "no positions agree"
    assert len(sites) == 4


def test_two_without_a_hook_in_common_say_so(tmp_path, without_charts):
    import reftlens as rl

    model, _, reft, _ = trained()
    elsewhere = rl.ReFT({rl.attn_out(2, "last"): rl.LoReFT(architectures.D, rank=1)})
    folders = {"here": rl.save(reft, tmp_path / "a", model), "there": rl.save(elsewhere, tmp_path / "b", model)}
    said = Page(compare(folders, tmp_path / "c.html", data=None, prompts=None)).text
    assert "No two of them edit the same vectors" in said["subspaces"]
    assert "No record of a training" in said["training"] and "in the folder of here, there:" in said["summary"]
    assert "No data were given" in said["strength"] and "no prompts to write from" in said["texts"]


def test_what_speaks_against_a_comparison_is_said(folders, tmp_path, without_charts):
    import reftlens as rl

    model, data, reft, run = trained()
    care = Page(compare(folders, tmp_path / "c.html")).text["summary"]
    assert "trained on different data" in care and "may be of the seed" in care and "same weights" not in care
    assert "the data that wide was trained on" in care and "Only 13 examples" in care
    rl.save(reft, tmp_path / "copy", model, run=run)
    twin = compare([folders[0], tmp_path / "copy"], tmp_path / "t.html", data=data[:3])
    care = Page(twin).text["summary"]
    assert "wide and copy have the same weights." in care and "different data" not in care
    assert "was trained on, not" not in care
    assert all(row["overlap"] == pytest.approx(1) for row in numbers(twin)["overlap"])
    assert "copy less that of wide is 0.00 [" in Page(twin).text["strength"]


def test_settings_that_differ_stand_apart_from_those_alike(folders, tmp_path, without_charts):
    found = numbers(compare(folders, tmp_path / "c.html"))
    differing = {row["setting"]: (row["wide"], row["narrow"]) for row in found["differing"]}
    assert differing["steps"] == ("12", "8") and differing["lr"] == ("0.02", "0.01") and "data" in differing
    alike = {row["setting"] for row in found["alike"]}
    assert "objective" in alike and "batch_size" in alike and not alike & differing.keys()


def test_nothing_is_loaded_texts_stay_text_and_the_bytes_repeat(folders, tmp_path):
    page = compare(folders, tmp_path / "c.html")
    assert not re.findall(r"https?://", page) and "default-src 'none'" in page
    assert [tag for tag, _ in Page(page).elements].count("script") == 2
    assert 'alert("x")' not in re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    ids = [a["id"] for _, a in Page(page).elements if "id" in a]
    assert len(ids) == len(set(ids)) and page.count("<svg") == 5
    assert compare(folders, tmp_path / "d.html") == page


def test_what_cannot_be_compared_is_refused_in_a_sentence(folders, tmp_path):
    import reftlens as rl
    from reftlens.errors import StoreMismatch

    model, out = trained()[0], tmp_path / "c.html"
    with pytest.raises(ValueError, match="expected two or more"):
        compare(folders[:1], out)
    with pytest.raises(ValueError, match="each of them once"):
        compare([folders[0], folders[0]], out)
    with pytest.raises(TypeError, match="is one folder"):
        compare(str(folders[0]), out)
    with pytest.raises(FileNotFoundError, match=r"holds no reft.json"):
        compare([folders[0], tmp_path], out)
    foreign = architectures.fresh_bridge("llama", seed=7)
    rl.save(trained()[2], tmp_path / "foreign", foreign)
    with pytest.raises(
        StoreMismatch, match=r"edits of one model are compared, and 'wide' was trained on .* are others"
    ):
        compare([folders[0], tmp_path / "foreign"], out)
    with pytest.raises(StoreMismatch, match="this model differs"):
        rl.reports.comparison(folders, foreign, out, progress=False)
    assert not out.exists() and not any(point.fwd_hooks for point in model.hook_dict.values())


def test_an_exchange_writes_no_text_and_is_compared_all_the_same(tmp_path, without_charts):
    import reftlens as rl

    model, data, _, _ = trained()
    pairs = data[:12].with_sources(data[[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0]])
    folders = {}
    for seed in (0, 1):
        das = rl.ReFT({rl.resid_post(1, "last"): rl.DAS(architectures.D, rank=1)})
        das.reset(seed)
        folders[f"seed {seed}"] = rl.save(das, tmp_path / str(seed), model)
    page = compare(folders, tmp_path / "c.html", data=pairs)
    assert "Texts: not shown, because" in Page(page).text["texts"]
    assert len(numbers(page)["overlap"]) == 1 and len(numbers(page)["strength"]) == 8


def test_the_command_compares_the_folders_that_it_is_given(folders, tmp_path, monkeypatch, capsys, without_charts):
    from reftlens import __main__ as cli

    model, _, _, _ = trained()
    monkeypatch.setattr(cli, "load_model", lambda name, progress: model)
    asked = ["report", *map(str, folders), "--quiet"]
    assert cli.main([*asked, "--prompts", "the cat"]) == 0
    path = folders[0] / "comparison.html"
    assert capsys.readouterr().out.strip() == str(path)
    page = path.read_text(encoding="utf-8")
    assert [row["prompt"] for row in numbers(page)["texts"]] == ["the cat"] * 3
    assert "No data were given" in Page(page).text["strength"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "the cat", "completion": " ran by"}\n{"prompt": "a", "completion": " dog"}')
    assert cli.main([*asked, "--data", str(rows), "--out", str(tmp_path / "out.html")]) == 0
    assert "Measured on 2 examples." in Page((tmp_path / "out.html").read_text(encoding="utf-8")).text["strength"]
    monkeypatch.delattr(cli, "load_model")
    assert cli.main([*asked[:2], str(tmp_path)]) == 1
    assert "holds no reft.json" in capsys.readouterr().err, "before a model is loaded"


def test_no_edit_takes_the_name_of_a_column():
    """Which would then hold what the edit wrote, in place of the unedited model's text, say."""
    from reftlens.reports.saved import COLUMNS, named

    for taken in COLUMNS:
        assert list(named([f"runs/{taken}", "runs/other"])) == [f"runs/{taken}", "runs/other"]
        with pytest.raises(ValueError, match=f"'{taken}'.* other than hook"):
            named({taken: "runs/a", "b": "runs/b"})
    first, second = named(["hook", "runs/other"])
    assert first.endswith("/hook") and second.endswith("/runs/other"), "where a path is such a name, too"
    assert list(named(["x/runs", "y/runs"])) == ["x/runs", "y/runs"]
    with pytest.raises(TypeError, match=r"\{1: …\}, expected a text|Type-check error"):
        named({1: "a", 2: "b"})


def test_the_command_compares_edits_of_a_model_without_chat_template(tmp_path, monkeypatch, capsys, without_charts):
    import reftlens as rl
    from reftlens import __main__ as cli
    from reftlens.reports.page import encoded

    model = architectures.bridge("llama")
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    for name in ("a", "b"):
        edit = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(architectures.D, rank=1)})
        rl.save(edit, tmp_path / name, model)
    monkeypatch.setattr(cli, "load_model", lambda name, progress: model)
    asked = ["report", str(tmp_path / "a"), str(tmp_path / "b"), "--quiet"]
    assert cli.main(asked) == 0, capsys.readouterr().err
    page = (tmp_path / "a" / "comparison.html").read_text(encoding="utf-8")
    assert "None" not in Page(page).text["summary"], "of what is not known"
    with pytest.raises(TypeError, match="expected a list"):
        encoded("the cat", model, rl.encode(model, [rl.Example("a", " dog")]))
    monkeypatch.delattr(cli, "load_model")
    (tmp_path / "rows.jsonl").write_text('{"question": "the cat"}')
    for asked_of in (asked, asked[:2]):
        assert cli.main([*asked_of, "--data", str(tmp_path / "rows.jsonl")]) == 1, "before a model is loaded"
        assert "prompt" in capsys.readouterr().err


def test_one_example_is_one_and_what_is_not_finite_says_so_in_its_place():
    from reftlens.errors import NotFinite
    from reftlens.reports.parts import few_measured, or_reason

    def fails():
        raise NotFinite("the logits: NaN")

    assert list(few_measured(1)) == ["Only 1 example was measured: the intervals are rough."]
    assert not list(few_measured(50))
    assert or_reason("Effects of a", fails) == "Effects of a: not shown, because the logits: NaN."


def test_an_edit_that_overflows_is_named_and_the_rest_stands(tmp_path, without_charts):
    import reftlens as rl
    from reftlens.reports.compared import _difference

    model, data, reft, _ = trained()
    huge = reft.clone()
    for module in huge.distinct:
        module.b.data.fill_(3e38)
    folders = {"huge": rl.save(huge, tmp_path / "b", model), "fine": rl.save(reft, tmp_path / "a", model)}
    text = compare(folders, tmp_path / "c.html", data=data[:3], prompts=[])
    said = Page(text).text
    assert "Effects of huge: not shown, because" in said["strength"]
    assert "the logits of rows [0, 1, 2]" in said["strength"]
    assert "Overlap" in said["subspaces"] and {row["edit"] for row in numbers(text)["strength"]} == {"fine"}
    alone = {"huge": folders["huge"], "again": rl.save(huge, tmp_path / "again", model)}
    said = Page(compare(alone, tmp_path / "d.html", data=data[:3], prompts=[])).text
    assert "Effects of huge: not shown" in said["strength"] and "Effects of again: not shown" in said["strength"]
    for module in huge.distinct:  # finite behind the last norm, and larger than its norm can say
        module.b.data.fill_(1e37)
    dose = rl.dose_response(huge, model, data[:3], [0, 1], progress=False)
    assert [e.value for e in dose.estimate("edit_size")] == [0.0, float("inf")]
    nan = float("nan")
    with pytest.raises(ValueError, match="edit_size is no number on any example at strength 1: leave"):
        replace(dose, unit_size=dose.unit_size * nan).estimate("edit_size")
    half = _difference("it", torch.tensor([nan, 2.0]))
    assert " is 2.00 [" in half and "(1 of 2;" in half
    assert " of " not in _difference("it", torch.tensor([2.0, 2.0]))
    assert "is not known" in _difference("it", torch.tensor([nan, nan]))
