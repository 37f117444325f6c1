"""Tokens that move most are found in their text, and the planted corners where they were planted."""

from dataclasses import replace

import pytest
import torch
from planted import CORNERS, pairs, planted

from architectures import D, bridge

PROMPTS = ["the cat sat on the mat", "a dog ran by", "<moon> & the green hill", "the dog sat", "over the hill"]


def _examples(reft, model, data, **kwargs):
    from reftlens.analysis.subspaces.examples import direction_examples

    return direction_examples(reft, model, data, progress=False, **kwargs)


def test_the_tokens_that_move_most_carry_the_planted_value():
    """Zero ablation along one diagonal of the plane: two corners move, and two lie across it."""
    import reftlens as rl

    world = planted()
    diagonal = (world.subspace @ CORNERS[0])[:, None]
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.Ablation(D, torch.zeros(D), diagonal)})
    data = replace(pairs(world.value, 60, 0)[1], tokenizer=world.model.tokenizer)
    examples = _examples(reft, world.model, data, top=5)
    ids = data.tokens[torch.arange(60), data.target_mask.long().argmax(dim=1) - 1]
    values = {(r.end, int(world.value[ids[r.row]])) for r in examples.rows}
    assert values in ({("largest", 0), ("smallest", 3)}, {("largest", 3), ("smallest", 0)})
    for r in examples.rows:
        assert abs(r.code) == pytest.approx(3 * 2**0.5, rel=1e-4) and r.position == 3
    assert [r.code for r in examples.rows if r.end == "largest"] == sorted(
        (r.code for r in examples.rows if r.end == "largest"), reverse=True
    )


@pytest.mark.parametrize("context", [0, 2, 50])
def test_a_token_is_shown_in_its_text(context):
    import reftlens as rl

    model = bridge("gpt2")
    data = rl.encode_prompts(model, PROMPTS)
    reft = rl.ReFT({rl.resid_post(1, "all"): rl.LoReFT(D, 2)})
    examples = _examples(reft, model, data, top=3, context=context)
    assert len(examples.rows) == 12
    for r in examples.rows:
        ids = data.tokens[r.row][data.attention_mask[r.row]].tolist()
        assert r.token == model.tokenizer.decode([ids[r.position]])
        near = ids[max(0, r.position - context) : r.position + context + 1]
        assert r.before + r.token + r.after == model.tokenizer.decode(near)
    codes = examples.codes[:, 0]
    assert examples.rows[0].code == codes.max() and examples.rows[3].code == codes.min()


def test_html_shows_text_and_does_not_run_it():
    import reftlens as rl

    model = bridge("gpt2")
    data = rl.encode_prompts(model, ["<script>alert(1)</script> & the cat"])
    examples = _examples(rl.ReFT({rl.resid_post(1, "all"): rl.LoReFT(D, 1)}), model, data, top=50)
    page = examples._repr_html_()
    assert "<script" not in page and "&lt;" in page and page.count("<mark>") == len(examples.rows)
    assert examples.plot().get_ylabel() == "tokens" and len(examples.to_frame()) == len(examples.rows)
    assert "[" in str(examples)


def test_examples_that_cannot_be_shown_are_refused():
    import reftlens as rl

    model = bridge("gpt2")
    data, reft = rl.encode_prompts(model, PROMPTS), rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, 2)})
    with pytest.raises(ValueError, match="needs a tokenizer"):
        _examples(reft, model, replace(data, tokenizer=None))
    with pytest.raises(ValueError, match="directions="):
        _examples(reft, model, data, directions=[2])


def test_a_frame_that_was_read_is_not_read_again(monkeypatch):
    import reftlens as rl
    from reftlens.analysis.subspaces import frame as module
    from reftlens.analysis.subspaces.tokens import direction_tokens

    model = bridge("gpt2")
    data = rl.encode_prompts(model, PROMPTS)
    reft = rl.ReFT({rl.resid_post(i, "all"): rl.LoReFT(D, 2) for i in (0, 1)})
    frame = rl.subspaces.principal_frame(reft, model, data, progress=False)
    anew = [
        (direction_tokens(reft, model, data, site=i, progress=False).rows, _examples(reft, model, data, site=i).rows)
        for i in (0, 1)
    ]
    points = _plane(reft, model, data, list("abcde"), site=1).points
    monkeypatch.setattr(module, "edits_of", lambda *_, **__: pytest.fail("the edits are read again"))
    for i in (0, 1):
        assert direction_tokens(reft, model, frame, site=i, progress=False).rows == anew[i][0]
        assert _examples(reft, model, frame, site=i).rows == anew[i][1]
    assert torch.equal(_plane(reft, model, frame, list("abcde"), site=1).points, points)
    with pytest.raises(ValueError, match="a frame of "):
        _examples(rl.ReFT({rl.resid_post(2, "all"): rl.LoReFT(D, 2)}), model, frame)


# -- the plane -----------------------------------------------------------------------------------------------


def _plane(reft, model, data, labels=None, **kwargs):
    from reftlens.analysis.subspaces.projection import plane

    return plane(reft, model, data, labels, progress=False, **kwargs)


def _planted_plane(**kwargs):
    import reftlens as rl

    world = planted()
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.Ablation(D, torch.ones(D), world.subspace)})
    data = pairs(world.value, 60, 0)[1]
    values = world.value[data.tokens[torch.arange(60), data.target_mask.long().argmax(dim=1) - 1]]
    return _plane(reft, world.model, data, values, **kwargs), values, world


def test_the_planted_corners_are_where_they_were_planted():
    plane, values, _ = _planted_plane()
    corners = 3 * CORNERS[values].double()
    torch.testing.assert_close(
        torch.cdist(plane.points, plane.points), torch.cdist(corners, corners), atol=1e-4, rtol=0
    )
    assert plane.labels == tuple(values.tolist())


def test_before_after_and_edit():
    """Mean ablation sends every point to one place."""
    before, after, edit = (_planted_plane(of=of)[0].points for of in ("before", "after", "edit"))
    torch.testing.assert_close(before + edit, after)
    assert after.std(dim=0).max() < 1e-5 < before.std(dim=0).min()


def test_labels_have_colours_and_markers():
    plane, _, _ = _planted_plane()
    axes = plane.plot()
    faces = {tuple(c.get_facecolor()[0]) for c in axes.collections}
    assert len(axes.collections) == 4 and len(faces) == 4
    assert set(plane.to_frame()["label"]) == {0, 1, 2, 3}
    import reftlens as rl

    model = bridge("gpt2")
    data, reft = rl.encode_prompts(model, PROMPTS * 2), rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, 3)})
    assert len(_plane(reft, model, data).plot().collections) == 1
    scale = _plane(reft, model, data, [i / 2 for i in range(10)], directions=(2, 0)).plot()
    assert len(scale.collections) == 1 and "direction 2" in scale.get_xlabel()


def test_every_edited_token_has_the_label_of_its_row():
    import reftlens as rl

    model = bridge("gpt2")
    data, reft = rl.encode_prompts(model, PROMPTS), rl.ReFT({rl.resid_post(1, "f1+l1"): rl.LoReFT(D, 2)})
    plane = _plane(reft, model, data, list("abcde"))
    assert plane.labels == tuple("aabbccddee") and len(plane.points) == 10


def test_what_is_no_plane_is_refused():
    import reftlens as rl

    model = bridge("gpt2")
    data, reft = rl.encode_prompts(model, PROMPTS), rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, 1)})
    with pytest.raises(ValueError, match="the subspace has 1"):
        _plane(reft, model, data)
    with pytest.raises(ValueError, match=r"2 label\(s\) for 5"):
        _plane(reft, model, data, [0, 1])
