"""What an edit changes in the stream at each layer: as plain hooks give it, and nothing outside the light cone."""

import re
from html import unescape

import pytest
import torch
from planted import D, pairs, planted

from architectures import ARCHITECTURES, bridge, fresh_bridge

PROMPT, COMPLETION = "the cat sat on the hill", " and looked at the moon"


def _text(model, **settings):
    import reftlens as rl

    return rl.encode(model, [rl.Example("a dog", " ran by"), rl.Example(PROMPT, COMPLETION)], **settings)


def _reft(model, *sites):
    import reftlens as rl

    reft = rl.ReFT({site: rl.LoReFT(rl.hooks(model)[site.hook].width, rank=2) for site in sites})
    reft.reset(1)
    for module in reft.distinct:
        module.b.data += 3
    return reft


def _by_hand(model, ids, edit=None):
    """Stream and logits of one pass; `edit` is `(hook, positions, module)`, and acts by a hook of TransformerLens."""
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers))]
    stream = {}

    def acted(h, hook):
        h = h.clone()
        _, positions, module = edit
        x = h[:, positions]
        basis = module.basis()
        h[:, positions] = x + module.code(x, basis) @ basis.T
        return h

    hooks = [] if edit is None else [(edit[0], acted)]
    hooks += [(name, lambda h, hook, name=name: stream.update({name: h[0].clone()})) for name in names]
    with torch.no_grad():
        logits = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks, return_type="logits")[0]
    return torch.stack([stream[name] for name in names]), logits


def _lens(model, stream, logits):
    """Log-probabilities of what each layer reads: the model's own norm, unembedding and soft-cap; then its logits."""
    with torch.no_grad():
        raw = [model.unembed(model.ln_final(h[None]))[0] for h in stream[:-1]]
    cap = getattr(model.original_model.config, "final_logit_softcapping", None)
    raw = [x if cap is None else cap * torch.tanh(x / cap) for x in raw]
    return torch.stack([*raw, logits]).log_softmax(dim=-1)


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=pytest.mark.slow if a in ("qwen2", "gemma3") else ()) for a in ARCHITECTURES]
)
def test_each_layer_is_what_plain_hooks_give(architecture, doubles):
    import reftlens as rl

    model = bridge(architecture, torch.float64)
    data = _text(model)
    reft = _reft(model, rl.resid_post(1, "l2"))
    found = rl.places.stream_effects(reft, model, data, 1, top=2)
    ids = data[[1]].tokens[0].tolist()
    end = int(data[[1]].prompt_mask.sum())
    edited = list(range(end - 2, end))
    runs = [_by_hand(model, ids, e) for e in (None, ("blocks.1.hook_resid_post", edited, reft[0]))]
    (h, _), (after, _) = runs
    before, moved = (_lens(model, *run) for run in runs)
    assert torch.allclose(found.change, (after - h).norm(dim=-1) / h.norm(dim=-1), atol=1e-12)
    assert torch.allclose(found.divergence, (moved.exp() * (moved - before)).sum(dim=-1), atol=1e-10)
    for run, p in enumerate((before, moved)):
        likeliest = p.exp().topk(2, dim=-1)
        assert torch.equal(found.top[run], likeliest.indices)
        assert torch.allclose(found.probability[run], likeliest.values, atol=1e-12)
    assert found.layers == ("embed", "0", "1", "2") and len(found.tokens) == len(ids)
    assert found.acts.nonzero().tolist() == [[2, position] for position in edited]
    assert found.change[2, edited].min() > 0.01 and found.divergence[-1, edited[0] :].max() > 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "llama"])
def test_outside_the_light_cone_the_effect_is_exactly_nothing(architecture):
    import reftlens as rl

    model = bridge(architecture)
    data = _text(model)
    reft = _reft(model, rl.resid_post(1, "l2"))
    found = rl.places.stream_effects(reft, model, data, 1)
    first = int(data[[1]].prompt_mask.sum()) - 2
    for values in (found.change, found.divergence):
        assert not values[:2].any() and not values[:, :first].any(), "below the edit, and before it"
    assert not found.change[2, first + 2 :].any(), "at the edited layer, later tokens are not reached yet"
    assert found.change[3, first:].min() > 0, "the twin: above it they are"
    for same in (found.top, found.probability):
        assert torch.equal(same[0][:, :first], same[1][:, :first])


@pytest.mark.parametrize("how", ["strength 0", "an edit of nothing"])
def test_an_edit_that_does_nothing_has_no_effect(how):
    import reftlens as rl

    model = bridge("llama")
    data = _text(model)
    nothing = rl.ReFT({rl.resid_post(0, "all"): rl.SteeringVector(D, torch.zeros(D))})
    reft, strength = (nothing, 1.0) if how != "strength 0" else (_reft(model, rl.resid_post(0, "all")), 0.0)
    found = rl.places.stream_effects(reft, model, data, 1, variant=rl.Variant(strength))
    assert not found.change.any() and not found.divergence.any()
    assert torch.equal(found.top[0], found.top[1]) and torch.equal(found.probability[0], found.probability[1])
    assert found.acts.any() == (how != "strength 0")
    assert "0 of" in repr(found) and found.html().count("unchanged at every layer") == 2 * len(found.tokens)


def test_edits_before_the_blocks_after_them_and_inside_one_stand_where_they_show():
    import reftlens as rl

    model = bridge("llama")
    data = _text(model)
    rows = {
        rl.embeddings("first"): 0,
        rl.resid_pre(0, "first"): 0,
        rl.resid_pre(2, "first"): 3,
        rl.resid_mid(1, "first"): 2,
        rl.mlp_out(0, "first"): 1,
    }
    for site, row in rows.items():
        found = rl.places.stream_effects(_reft(model, site), model, data, 1)
        assert found.acts.nonzero().tolist() == [[row, 0]], site
        assert found.change[row, 0] > 0 and not found.change[:row].any(), site
    last = rl.places.stream_effects(_reft(model, rl.final_norm("first")), model, data, 1)
    assert last.acts.nonzero().tolist() == [[3, 0]]
    assert not last.change.any() and last.divergence[3, 0] > 0 and not last.divergence[:3].any()


def test_a_text_that_the_model_wrote_and_a_half_strength():
    import reftlens as rl

    model = bridge("llama")
    reft = _reft(model, rl.resid_post(0, "response"))
    written = rl.generate(reft, model, ["a dog", PROMPT], rl.Decoding(max_new_tokens=5))
    found = rl.places.stream_effects(reft, model, written.batch(), 1)
    start = len(written.prompt_ids[1])
    assert found.acts[1].nonzero()[:, 0].tolist() == list(range(start, start + len(written.ids[1])))
    likeliest = found.top[1, -1, :, 0].tolist()
    assert likeliest[start - 1 : -1] == list(written.ids[1]), "greedy text is what the edited model finds likeliest"
    half = rl.places.stream_effects(reft, model, written.batch(), 1, variant=rl.Variant(0.5))
    assert torch.allclose(2 * half.change[1], found.change[1], rtol=1e-4)


def test_an_exchange_takes_from_the_source_of_its_row():
    import reftlens as rl

    truth = planted()
    data, _ = pairs(truth.value, 4, 3)
    das = rl.DAS(D, rank=2)
    das.frame.set(truth.subspace)
    reft = rl.ReFT({rl.resid_post(1, "last"): das})
    found = [rl.places.stream_effects(reft, truth.model, data, row) for row in range(4)]
    alone = [rl.places.stream_effects(reft, truth.model, data[[row]]) for row in range(4)]
    assert all(torch.equal(a.change, b.change) for a, b in zip(found, alone, strict=True))
    assert any(each.change.any() for each in found)
    with pytest.raises(ValueError, match="source"):
        rl.places.stream_effects(reft, truth.model, data.with_sources({"other": data}))


def test_two_passes_and_no_reading_of_what_did_not_change(monkeypatch):
    import reftlens as rl
    from reftlens.analysis.places import streams

    passes, read = [], []
    forward, readout = streams.forward, streams.logit_readout
    monkeypatch.setattr(streams, "forward", lambda *a: passes.append(a) or forward(*a))
    monkeypatch.setattr(streams, "logit_readout", lambda model, h: read.append(len(h)) or readout(model, h))
    model = bridge("llama")
    data = _text(model)
    reft = _reft(model, rl.resid_post(1, "l2"))
    count = len(data[[1]].tokens[0])
    rl.places.stream_effects(reft, model, data, 1)
    assert len(passes) == 2 and read == [count, count, count, 2], "of three layers but the last, and two edited tokens"


def test_hooks_of_the_user_stay_and_weights_are_as_they_were():
    import reftlens as rl

    model = fresh_bridge("llama")
    before = {name: p.clone() for name, p in model.original_model.named_parameters()}
    reft = _reft(model, rl.resid_post(1, "last")).train()
    rl.places.stream_effects(reft, model, _text(model))
    assert reft.training and not any(point.fwd_hooks for point in model.hook_dict.values())
    assert all(torch.equal(p, before[name]) for name, p in model.original_model.named_parameters())


def test_what_cannot_be_shown_is_refused():
    import reftlens as rl

    model = bridge("llama")
    data, reft = _text(model), _reft(model, rl.resid_post(0, rl.positions.Tokens("hill")))
    with pytest.raises(ValueError, match="no such token in the prompt"):
        rl.places.stream_effects(reft, model, data, 0)
    found = _reft(model, rl.resid_post(0, "last"))
    for row in (2, -3):
        with pytest.raises((ValueError, IndexError), match=str(row)):
            rl.places.stream_effects(found, model, data, row)
    with pytest.raises(ValueError, match="top"):
        rl.places.stream_effects(found, model, data, top=0)
    with pytest.raises(ValueError, match="expected one of change, kl"):
        rl.places.stream_effects(found, model, data).plot(measure="logit")


def test_the_view_has_each_number_as_text_and_texts_stay_text():
    import reftlens as rl

    model = bridge("llama")
    evil = "<script>alert(1)</script>"
    data = rl.encode_prompts(model, [f"{evil}\nthe cat"])
    found = rl.places.stream_effects(_reft(model, rl.resid_post(1, "l2")), model, data)
    page = found._repr_html_()
    assert page.count("<script") == 1 and evil not in page and "https:" not in page and "http:" not in page
    assert page.count('type="radio"') == page.count("<div data-token=") == len(found.tokens)
    assert page.count(" checked") == 1
    frame = found.to_frame().set_index(["position", "layer"])
    last = len(found.tokens) - 1
    names = re.findall(r'aria-label="(\d+: [^"]*)"', page)
    assert len(names) == len(found.tokens)
    assert f"next token's KL {frame.loc[(last, '2'), 'kl']:.3g} nats" in unescape(names[last])
    assert "unchanged at every layer" in names[0] and "⏎" in page
    cells = re.findall(r"</span>([^<]* %)</td><td>([^<]*)</td>", page.split(f'data-token="{last}"')[1])
    rows = frame.loc[last][::-1]
    rows = rows[(rows["change"] > 0) | (rows["kl"] > 0)]
    assert cells == [(f"{100 * c:.3g} %", f"{k:.3g}") for c, k in zip(rows["change"], rows["kl"], strict=True)]


class _Letters:
    """Tokens that are letters of Hebrew."""

    def decode(self, ids):
        return "אב"[ids[0]]


def _made(change, tokens=("א",)):
    """Effects at one token, of two layers, that change what is likeliest at the last one."""
    from reftlens.analysis.places.stream_results import StreamEffects

    divergence, acts = torch.tensor([[0.0], [0.5]]), torch.zeros(2, 1, dtype=torch.bool)
    top = torch.tensor([0, 0, 0, 1]).reshape(2, 2, 1, 1)
    return StreamEffects(
        tokens, ("embed", "0"), acts, torch.tensor(change), divergence, top, torch.ones(2, 2, 1, 1), _Letters()
    )


def test_before_and_after_keep_their_order_where_letters_run_from_right_to_left():
    found = _made([[0.0], [1.0]])
    for text in (repr(found), unescape(found.html())):
        assert "likeliest \u2068'א'\u2069 → \u2068'ב'\u2069; stream" in text
    assert "unicode-bidi: isolate" in found._repr_html_()


def test_an_edit_after_the_stream_changes_a_token_and_no_stream():
    found = _made([[0.0], [0.0]])
    assert repr(found).startswith("1 of 1 tokens are changed") and repr(found).endswith("; stream unchanged")


def test_what_has_no_shape_is_shown():
    page = _made([[0.0], [1.0]], ("\x00\n\r\x1b\x7f",)).html()
    assert page.count("␀⏎␍␛␡") == 3


def test_a_change_of_nothing_is_infinite_and_leaves_the_others_their_bars():
    from reftlens.analysis.places.streams import _compared, _Layer

    after = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    layer = _Layer(torch.zeros(2, 2), after, torch.tensor([1]), torch.zeros(2, 5), torch.zeros(1, 5))
    assert _compared(layer, 1).change.tolist() == [0, float("inf")]
    page = _made([[float("inf")], [0.5]]).html()
    assert not re.search(r"/(nan|inf)|width:(nan|inf)", page) and page.count("width:100.0%") == 2
