"""A head on a hook point: its gradients and those of the edits beside it are a plain loop's; labels; storage."""

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import architectures

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import zoo

TEXTS = [("the cat sat", "on the mat"), ("a dog ran", "over the hill"), ("the moon", "was green"), ("it sat", "it ran")]
SINGLE = [f"{a} {b}" for a, b in TEXTS] * 2
LABELS = [0, 1, 2, 1, 0, 2, 1, 1]
NAMES = ("BertForMaskedLM", "RobertaForMaskedLM", "LlamaForCausalLM")


@cache
def _pair(name):
    """A bridge in float64, and a plain copy."""
    import reftlens as rl

    plain = zoo.plain(name).double().eval()
    import copy

    return rl.load_model(copy.deepcopy(plain), tokenizer=zoo.tokenizer()), plain


def _where(name):
    return "last" if name.startswith("Llama") else "first"


def _reft(name, outputs=3, rank=2, **head):
    import reftlens as rl

    d = _pair(name)[0].cfg.d_model
    edits = {rl.resid_post(layer, "f2+l1"): rl.LoReFT(d, rank) for layer in (0, 1)}
    reft = rl.ReFT(edits) | rl.ReFT({rl.resid_post(1, _where(name)): rl.interventions.Head(d, outputs, **head)})
    reft = reft.to(torch.float64)
    reft.reset(3)
    return reft


def _data(name, labels=LABELS):
    import reftlens as rl

    return rl.training.encode_labelled(_pair(name)[0], SINGLE[: len(labels)], labels)


def _fit(name, reft, data=None, **settings):
    import reftlens as rl

    settings = {"steps": 4, "batch_size": 4, "lr": 1e-2, "progress": False} | settings
    data = _data(name) if data is None else data
    return rl.fit(reft, _pair(name)[0], data, objective=rl.training.HeadLoss(reft), **settings)


def _plain_scores(name, plain, reft, data):
    """Row by row, with forward hooks written out."""
    layers = next(m for n, m in plain.named_modules() if n.endswith(("encoder.layer", "model.layers")))
    head = reft[len(reft) - 1]
    rows = []
    for ids, real in zip(data.tokens, data.attention_mask, strict=True):
        tokens, states = ids[real][None], {}
        at = sorted({0, 1, len(tokens[0]) - 1})

        def hook(layer, *, states=states, at=at):
            def edit(module, args, out):
                h = (out[0] if isinstance(out, tuple) else out).clone()
                kind, x = reft[layer], h[0, at]
                R = kind.frame()
                h[0, at] = x + (F.linear(x, kind.W, kind.b) - x @ R) @ R.T
                states[layer] = h
                return (h, *out[1:]) if isinstance(out, tuple) else h

            return edit

        handles = [layers[layer].register_forward_hook(hook(layer)) for layer in (0, 1)]
        plain(input_ids=tokens)
        for handle in handles:
            handle.remove()
        h = states[1][0, -1 if _where(name) == "last" else 0]
        rows.append(head.W2 @ torch.tanh(head.W1 @ h + head.b1) + head.b2)
    return torch.stack(rows)


@pytest.mark.parametrize("name", NAMES)
def test_head_and_edits_are_trained_as_by_a_plain_loop(name):
    reft, twin = _reft(name), _reft(name)
    data = _data(name)
    run = _fit(name, reft)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for step in range(4):
        (rows,) = run.config.micro_batches(step, len(data))
        scores = _plain_scores(name, _pair(name)[1], twin, data[list(rows)])
        loss = F.cross_entropy(scores, torch.tensor([LABELS[r] for r in rows]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = run.config.learning_rate(step, 4)
        optimizer.step()
        losses.append(loss.item())
    error = 1e-6 if name.startswith("Llama") else 1e-9  # Llama's norms are computed in float32
    assert run.losses == pytest.approx(losses, abs=error)
    for ours, theirs in zip(reft.distinct, twin.distinct, strict=True):
        for (n, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if n != "frame.matrix":
                assert torch.allclose(a, b, atol=100 * error), n


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_a_plain_model_and_of_what_was_loaded(name, tmp_path):
    import reftlens as rl

    reft, (bridge, plain), data = _reft(name), _pair(name), _data(name)
    _fit(name, reft)
    reft.eval()
    scores = rl.training.head_scores(reft, bridge, data, batch_size=3)
    error = 1e-6 if name.startswith("Llama") else 1e-10
    assert torch.allclose(scores, _plain_scores(name, plain, reft, data), atol=error)
    unedited = rl.training.head_scores(reft, bridge, data, rl.Variant(strength=0.0))
    assert (scores - unedited).abs().max() > 1e-6, "the edits matter to the head"
    rl.save(reft, tmp_path, bridge)
    assert torch.equal(rl.training.head_scores(rl.load(tmp_path, bridge), bridge, data, batch_size=3), scores)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
def test_on_a_decoder_the_light_cone_gives_what_the_full_computation_gives(architecture):
    import reftlens as rl

    bridge = architectures.bridge(architecture)
    data, d = rl.training.encode_labelled(bridge, SINGLE, LABELS), bridge.cfg.d_model
    edit = rl.ReFT({rl.resid_post(1, "l2"): rl.LoReFT(d, 2)})
    reft = edit | rl.ReFT({rl.resid_post(2, "last"): rl.interventions.Head(d, 3)})
    reft.reset(0)
    runs = {}
    for reuse in (True, False):
        copy = reft.clone()
        settings = {"objective": rl.training.HeadLoss(copy), "reuse": reuse, "progress": False, "lr": 1e-2}
        runs[reuse] = rl.fit(copy, bridge, data, steps=5, batch_size=4, **settings), copy
    (cone, ours), (full, theirs) = runs[True], runs[False]
    assert cone.computation.startswith("light cone") and full.computation.startswith("full")
    assert cone.losses == pytest.approx(full.losses, abs=1e-5)  # float32
    scores = [rl.training.head_scores(r.eval(), bridge, data, reuse=r is ours) for r in (ours, theirs)]
    assert torch.allclose(*scores, atol=1e-3) and (scores[0] - scores[0][0]).abs().max() > 1e-3


def test_an_encoder_computes_rows_of_similar_length_together_and_trains_alike():
    import reftlens as rl

    name, texts = "BertForMaskedLM", ["a dog ran over the hill " * 8, *SINGLE[:7]]
    bridge = _pair(name)[0]
    data, runs, passes = rl.training.encode_labelled(bridge, texts, LABELS), {}, {}
    for way, reuse in {"parts": True, "one": rl.training.Reuse(buckets=1), "full": False}.items():
        reft, seen = _reft(name), []
        counter = bridge.blocks[0].hook_in.register_forward_hook(
            lambda m, a, out, seen=seen: seen.append(out.shape[:2])
        )
        run = _fit(name, reft, data, steps=2, batch_size=8, reuse=reuse)
        scores = rl.training.head_scores(reft, bridge, data, reuse=reuse)
        counter.remove()
        runs[way], passes[way] = (torch.tensor(run.losses), scores), seen
    for way in ("one", "full"):
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(runs["parts"], runs[way], strict=True))
        assert [rows for rows, _ in passes[way]].count(8) == 3, "two steps and the scores, a pass each"
    assert sum(rows * columns for rows, columns in passes["parts"]) < 0.5 * sum(r * c for r, c in passes["one"])


def test_a_head_leaves_hidden_states_as_they_are_and_is_drawn_from_the_seed():
    import reftlens as rl

    head = rl.interventions.Head(8, 2)
    h = torch.randn(3, 8).bfloat16()
    assert head(h) is h and head(h, strength=2.0) is h
    first, second = (rl.ReFT({rl.resid_post(1, "first"): h}) for h in (head, rl.interventions.Head(8, 2)))
    first.reset(1)
    second.reset(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    second.reset(2)
    assert not torch.equal(first[0].W2, second[0].W2)
    assert head.stored_parameters == head.degrees_of_freedom == 8 * 8 + 8 + 2 * 8 + 2
    assert rl.interventions.Head(8, 2, hidden=0).stored_parameters == 2 * 8 + 2


def test_a_regression_learns_values_and_a_batch_of_noise_is_not_learned_from_nothing():
    import reftlens as rl

    name, values = "BertForMaskedLM", [0.5, 1.5, 2.5, 0.0, 0.5, 1.5, 2.5, 0.0]
    reft, data = _reft(name, outputs=1), _data(name, values)
    before = rl.training.head_scores(reft, _pair(name)[0], data)[:, 0]
    run = _fit(name, reft, data, steps=60, lr=3e-2)
    after = rl.training.head_scores(reft, _pair(name)[0], data)[:, 0]
    wanted = torch.tensor(values, dtype=torch.float64)
    assert (after - wanted).square().mean() < 0.2 * (before - wanted).square().mean()
    assert run.losses[-1] < run.losses[0] and "HeadLoss" in run.objective


def test_each_of_several_seeds_trains_its_own_head():
    import reftlens as rl

    name = "BertForMaskedLM"
    bridge, data, base = _pair(name)[0], _data(name), _reft(name, dropout=0.0)
    objective, refts = rl.training.HeadLoss(base), base.seeds([0, 1])
    settings = {"steps": 3, "batch_size": 4, "lr": 1e-2, "progress": False}
    together = rl.fit_many(refts, bridge, data, objective=objective, **settings)
    for seed in (0, 1):
        alone = base.clone()
        alone.reset(seed)
        run = rl.fit(alone, bridge, data, objective=objective, seed=seed, **settings)
        assert run.losses == pytest.approx(together[f"seed {seed}"].losses, abs=1e-9)
        assert torch.allclose(alone[2].W2, refts[f"seed {seed}"][2].W2, atol=1e-8)


def test_validation_keeps_the_best_and_dropout_of_the_head_is_off_where_it_scores():
    import reftlens as rl

    name = "BertForMaskedLM"
    reft, bridge, data = _reft(name, dropout=0.5), _pair(name)[0], _data(name)
    run = _fit(name, reft, validation=data, eval_every=1, patience=10)
    assert len(run.validation) == 4 and run.best_step is not None
    loss = F.cross_entropy(rl.training.head_scores(reft, bridge, data), torch.tensor(LABELS)).item()
    assert min(value for _, value in run.validation) == pytest.approx(loss, abs=1e-9)


@pytest.mark.parametrize(
    ("labels", "why"),
    [([0, 3], r"label of row 1 .* is 3.*outputs 0 to 2"), ([0, 0.5], "is 0.5"), ([0, float("nan")], "label of row 1")],
)
def test_labels_outside_the_set_are_refused(labels, why):
    from reftlens.errors import NotFinite

    reft = _reft("BertForMaskedLM")
    with pytest.raises((ValueError, NotFinite), match=why):
        _fit("BertForMaskedLM", reft, _data("BertForMaskedLM", labels))


def test_what_a_head_cannot_be_trained_on_is_refused():
    import reftlens as rl

    name = "BertForMaskedLM"
    (bridge, _), reft = _pair(name), _reft("BertForMaskedLM")
    with pytest.raises(ValueError, match=r"row 0 .* has no label: encode_labelled"):
        _fit(name, reft, rl.encode_prompts(bridge, SINGLE))
    with pytest.raises(ValueError, match="expected a ReFT with one Head, got 0 among LoReFT"):
        rl.training.HeadLoss(rl.ReFT({rl.resid_post(0, "first"): rl.LoReFT(bridge.cfg.d_model, 1)}))
    several = rl.ReFT({rl.resid_post(1, "f2"): rl.interventions.Head(bridge.cfg.d_model, 3)})
    with pytest.raises(ValueError, match="reads 2 tokens of row 0, expected 1"):
        _fit(name, several.double())
    with pytest.warns(UserWarning, match=rf"1 row.s. were cut to {bridge.cfg.n_ctx} tokens"):
        rl.training.encode_labelled(bridge, ["a " * 2000], [1], max_length=10**6)
    for texts, labels, why in (
        ("abc", [1, 2, 3], "texts is 'abc', expected a list"),
        (["a"], [1, 2], "1 texts and 2 labels"), ([" "], [1], "row 0"), (["a"], ["x"], "label"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=why):
            rl.training.encode_labelled(bridge, texts, labels)


def test_pairs_stand_as_the_tokenizer_of_the_model_writes_them_and_long_ones_are_cut_with_a_warning():
    import reftlens as rl

    bridge = _pair("BertForMaskedLM")[0]
    data = rl.training.encode_labelled(bridge, TEXTS, [0, 1, 0, 1])
    for row, (a, b) in enumerate(TEXTS):
        assert data.tokens[row][data.attention_mask[row]].tolist() == bridge.tokenizer(a, b).input_ids
    with pytest.warns(UserWarning, match="cut to 4 tokens"):
        short = rl.training.encode_labelled(bridge, TEXTS, [0, 1, 0, 1], max_length=4)
    assert short.attention_mask.sum(dim=1).max() == 4 and short.truncated
    assert data.fingerprint != rl.training.encode_labelled(bridge, TEXTS, [0, 1, 0, 0]).fingerprint
