"""The slider without a kernel: its widgets are moved by the tests, and the grid that stands in for it."""

import asyncio
import re
import sys

import pytest

import architectures


def edit(*, positions="l2", rank=2, second=None):
    import reftlens as rl

    sites = {rl.resid_post(0, positions): rl.LoReFT(architectures.D, rank=rank)}
    if second is not None:
        sites[rl.resid_post(1, second)] = rl.LoReFT(architectures.D, rank=rank)
    reft = rl.ReFT(sites)
    for module in reft.interventions:
        module.b.data += 5  # an edit that is seen
    return reft


def panel(model, reft, tokens=8, **options):
    import reftlens as rl
    from reftlens.widgets.live import slider

    return slider(reft, model, "the cat sat on the mat", rl.Decoding(max_new_tokens=tokens), live=True, **options)


def shown(widget):
    """The text in an HTML widget, markup and title removed."""
    return re.sub(r"<[^>]*>", "", widget.value.split("<pre>")[1])


def test_the_text_is_what_generate_gives_at_that_strength(llama):
    import reftlens as rl

    reft = edit()
    one = panel(llama, reft)
    one.write()
    for strength in (1.0, 0.0, 2.5, -1.0):
        one.strength.value = strength
        made = rl.generate(
            reft, llama, ["the cat sat on the mat"], rl.Decoding(max_new_tokens=8), variant=rl.Variant(strength)
        )
        assert one.edited.ids == made.ids and one.edited.edited == made.edited
        assert one.first_token > 0
    base = rl.generate(None, llama, ["the cat sat on the mat"], rl.Decoding(max_new_tokens=8))
    assert one.unedited.ids == base.ids


def test_the_shown_text_changes_with_the_strength_and_the_unedited_text_stays(llama):
    one = panel(llama, edit())
    one.write()
    first, base = one.edited_view.value, one.base_view.value
    assert "strength 1" in first
    one.strength.value = 0.0
    assert shown(one.edited_view) == shown(one.base_view) != re.sub(r"<[^>]*>", "", first.split("<pre>")[1])
    assert one.base_view.value == base


def test_each_control_is_in_the_variant(llama):
    import reftlens as rl

    one = panel(llama, edit(second="f1"))
    assert one.variant() == rl.Variant(1.0)
    one.directions[1].value = 0.5
    assert one.variant() == rl.Variant([1.0, 0.5])
    one.strength.value = 2.0
    assert one.variant() == rl.Variant([2.0, 1.0])
    one.directions[0].value = 0.5
    assert one.variant() == rl.Variant(1.0)
    first, last = one.positions.options[1], one.positions.options[-1]
    assert first.endswith("'<bos>'") and last.endswith("' mat'")
    one.positions.value = last
    assert one.variant() == rl.Variant(1.0, rl.positions.Nth(-1, missing="skip"), [0])
    assert one.prompt_view.value.count("<mark") == 1
    one.positions.value = first
    assert one.variant().sites == (1,)


def test_the_seed_matters_where_something_is_sampled_and_only_there(llama):
    one = panel(llama, edit(), tokens=16)
    one.write()
    greedy = one.edited.ids
    assert one.seed.disabled
    one.temperature.value = 2.0
    assert not one.seed.disabled
    sampled, base = one.edited.ids, one.unedited.ids
    one.seed.value = 7
    assert one.edited.ids != sampled and one.unedited.ids != base
    one.seed.value = 0
    assert one.edited.ids == sampled and one.unedited.ids == base
    one.temperature.value = 0.0
    assert one.edited.ids == greedy


def test_tokens_that_are_edited_while_they_are_written_are_marked(llama):
    one = panel(llama, edit(positions="all"))
    one.write()
    assert "<mark" in one.edited_view.value and "<mark" not in one.base_view.value
    assert "what is written" in one.positions.options
    one.positions.value = "what is written"
    assert "<mark" not in one.prompt_view.value
    one.strength.value = 0.0
    assert "<mark" not in one.edited_view.value


def test_what_is_being_written_is_given_up_when_a_control_moves(llama):
    """And the model carries no hook of ours between two tokens."""
    reft = edit()
    hooks = [p for p in llama.hook_dict.values() if p.fwd_hooks]

    async def moved():
        one = panel(llama, reft, tokens=64)
        one.write()
        first = one._task
        while one.edited is None or len(one.edited.ids[0]) < 3:
            await asyncio.sleep(0)
        assert [p for p in llama.hook_dict.values() if p.fwd_hooks] == hooks
        for strength in (1.5, 2.0, 2.5):
            one.strength.value = strength
        await one._task
        return one, first

    one, first = asyncio.run(moved())
    assert first.cancelled() and "strength 2.5" in one.edited_view.value
    assert "done" in one.status.value or "all after" in one.status.value
    assert [p for p in llama.hook_dict.values() if p.fwd_hooks] == hooks


def test_interventions_of_several_ranks_have_no_control_for_each_direction(llama):
    import reftlens as rl

    reft = edit(rank=2)
    mixed = rl.ReFT({**dict(reft.items()), rl.resid_post(1, "l1"): rl.LoReFT(architectures.D, rank=3)})
    assert not panel(llama, mixed).directions
    assert len(panel(llama, reft).directions) == 2


def test_what_cannot_be_written_is_said_in_the_panel():
    import torch

    model = architectures.fresh_bridge("llama")
    one = panel(model, edit())
    one.write()
    with torch.no_grad():
        model.original_model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    one.strength.value = 0.5
    assert "its weights changed since the prompts were read" in one.status.value


def test_texts_are_never_html(llama):
    import reftlens as rl
    from reftlens.widgets.live import slider

    prompt = "<script>alert(1)</script> the cat"
    one = slider(edit(), llama, prompt, rl.Decoding(max_new_tokens=4), live=True)
    one.write()
    assert "<script" not in one.prompt_view.value and "&lt;script&gt;" in one.prompt_view.value
    grid = slider(edit(), llama, prompt, rl.Decoding(max_new_tokens=4), live=False)
    assert "<script>alert" not in grid._repr_html_()


def test_without_a_kernel_there_is_a_grid(llama):
    import reftlens as rl
    from reftlens.widgets.grid import STRENGTHS, Grid
    from reftlens.widgets.live import slider

    reft = edit()
    grid = slider(reft, llama, "the cat sat on the mat", rl.Decoding(max_new_tokens=8))
    assert isinstance(grid, Grid) and grid.strengths == STRENGTHS
    for strength in STRENGTHS:
        made = rl.generate(
            reft, llama, ["the cat sat on the mat"], rl.Decoding(max_new_tokens=8), variant=rl.Variant(strength)
        )
        assert grid.at(strength).texts == made.texts
    html, frame = grid._repr_html_(), grid.to_frame()
    assert html.count("data-at=") == len(STRENGTHS) and '<input type="range"' in html and "http" not in html
    assert len(frame) == len(STRENGTHS) and not frame.changed[0] and frame.changed.any()
    with pytest.raises(ValueError, match=r"strength 0\.3 is not in the grid, which has 0, 0\.25"):
        grid.at(0.3)


def test_the_grid_for_the_saved_notebook_is_made_when_the_texts_are(llama):
    class Handle:
        html = ""

        def update(self, made):
            self.html = made.data

    one = panel(llama, edit())
    one._saved_view = handle = Handle()
    one.write()
    assert handle.html.startswith("<details") and handle.html.count("data-at=") == 7
    assert one._saved_view is None


def test_a_missing_ipywidgets_is_named_with_what_to_install(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=r'pip install "reftlens\[notebook\]"'):
        panel(llama, edit())


def test_what_cannot_be_is_refused(llama):
    import reftlens as rl
    from reftlens.widgets.live import slider

    das = rl.ReFT({rl.resid_post(0, "last"): rl.DAS(architectures.D, rank=1)})
    with pytest.raises(ValueError, match=r"DAS at .* copies from a source"):
        slider(das, llama, "the cat")
    with pytest.raises(ValueError, match="expected them in this order"):
        panel(llama, edit(), low=2.0, high=1.0)
    reft, beams = edit(), rl.Decoding(max_new_tokens=2, beams=2)
    with pytest.raises(ValueError, match="needs beams=1: ask for live=False"):
        slider(reft, llama, "the cat", beams, live=True)
    grid = slider(reft, llama, "the cat", beams, live=False)
    assert grid.at(1.0) == rl.generate(reft, llama, ["the cat"], beams)
