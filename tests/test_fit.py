"""The training loop: right against loops written by hand, repeatable, resumable, and it leaves the model alone."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import architectures

WORDS = architectures.TEXT.split()


def _data(model, rows=6):
    """Prompts and completions of different lengths."""
    import reftlens as rl

    return rl.encode(
        model,
        [
            rl.Example(" ".join(WORDS[i : i + 2 + i % 3]), " " + " ".join(WORDS[i + 5 : i + 6 + i % 4]))
            for i in range(rows)
        ],
    )


def _reft(model, seed=0, **kwargs):
    import reftlens as rl

    generator = torch.Generator().manual_seed(seed)
    lo = rl.LoReFT(model.cfg.d_model, rank=2, generator=generator, **kwargs)
    di = rl.DiReFT(model.cfg.d_model, rank=2, generator=generator)
    return rl.ReFT({rl.resid_post(0, "last"): lo, rl.mlp_out(1, "f1+l1"): di})


def _tensors(reft):
    return {name: tensor.clone() for name, tensor in reft.state_dict().items()}


def _same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def _by_hand(model, data, steps, lr):
    """LoReFT at block 0, last prompt token, written out on a plain transformers model: full batch, AdamW."""
    hf = architectures.hf_model("gpt2").double()
    import reftlens as rl

    start = rl.LoReFT(model.cfg.d_model, rank=2, generator=torch.Generator().manual_seed(3)).double()
    raw = start.frame.matrix.detach().clone().requires_grad_()
    w, b = start.W.detach().clone().requires_grad_(), start.b.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([raw, w, b], lr=lr, weight_decay=0.0)
    last = data.prompt_mask.sum(dim=1) - 1
    rows = torch.arange(len(data))

    def edit(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        q, r = torch.linalg.qr(raw)
        q = q * torch.sign(torch.diagonal(r))
        x = h[rows, last]
        new = h.clone()
        new[rows, last] = x + (x @ w.T + b - x @ q) @ q.T
        return (new, *output[1:]) if isinstance(output, tuple) else new

    hf.transformer.h[0].register_forward_hook(edit)
    losses = []
    for _ in range(steps):
        logits = hf(data.tokens, attention_mask=data.attention_mask.long()).logits
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), data.tokens[:, 1:], reduction="none")
        loss = nll[data.target_mask[:, 1:]].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    q, r = torch.linalg.qr(raw)
    return losses, (q * torch.sign(torch.diagonal(r))).detach(), w.detach(), b.detach()


def test_fit_equals_a_loop_written_by_hand_on_plain_transformers_in_float64(gpt2_double):
    import reftlens as rl

    data = _data(gpt2_double)
    lo = rl.LoReFT(gpt2_double.cfg.d_model, rank=2, generator=torch.Generator().manual_seed(3)).double()
    reft = rl.ReFT({rl.resid_post(0, "last"): lo})
    run = rl.fit(
        reft, gpt2_double, data, steps=6, lr=1e-2, batch_size=99, schedule="constant", clip=None, progress=False
    )
    losses, frame, w, b = _by_hand(gpt2_double, data, steps=6, lr=1e-2)
    # float64: what is left is the order of summation
    assert max(abs(x - y) for x, y in zip(run.losses, losses, strict=True)) < 1e-12
    for ours, theirs in ((lo.frame.matrix, frame), (lo.W, w), (lo.b, b)):
        assert (ours - theirs).abs().max() < 1e-10


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(gpt2_double):
    import reftlens as rl

    data = _data(gpt2_double)
    results = []
    for batch_size, accumulate in ((6, 1), (1, 6), (4, 2)):
        reft = _reft(gpt2_double).double()
        rl.fit(reft, gpt2_double, data, steps=3, batch_size=batch_size, accumulate=accumulate, progress=False)
        results.append(_tensors(reft))
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert (tensor - other[name]).abs().max() < 1e-10, name


def test_a_mean_of_micro_batch_means_would_be_another_step(gpt2_double):
    """The twin of the test above: the examples do differ enough for token weighting to matter."""
    import reftlens as rl

    data = _data(gpt2_double)
    per_row = rl.evaluate(_reft(gpt2_double).double(), gpt2_double, data, [1], progress=False).loss[0]
    tokens = data.target_mask.sum(dim=1)
    assert abs(per_row.mean() - (per_row * tokens).sum() / tokens.sum()) > 1e-3


def test_weight_decay_reaches_every_parameter_but_frames_and_never_harms_a_frame(gpt2_double):
    import reftlens as rl

    data = _data(gpt2_double)
    start = _tensors(_reft(gpt2_double).double())
    ends = {}
    for decay in (0.0, 0.5):
        reft = _reft(gpt2_double).double()
        rl.fit(
            reft,
            gpt2_double,
            data,
            steps=1,
            lr=1e-2,
            weight_decay=decay,
            schedule="constant",
            batch_size=9,
            progress=False,
        )
        ends[decay] = _tensors(reft)
    for name in start:
        pulled = ends[0.5][name] - ends[0.0][name]
        expected = torch.zeros_like(pulled) if "frame" in name else -1e-2 * 0.5 * start[name]
        assert (pulled - expected).abs().max() < 1e-14, name


def test_strong_weight_decay_over_many_steps_leaves_frames_orthonormal(gpt2):
    import reftlens as rl

    reft = _reft(gpt2)
    rl.fit(reft, gpt2, _data(gpt2), epochs=30, lr=1e-2, weight_decay=0.9, progress=False)
    frame = reft[0].frame.matrix.detach()
    assert (frame.T @ frame - torch.eye(2)).abs().max() < 1e-5


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.25, 3])
def test_learning_rate_rises_over_warmup_then_follows_its_schedule(schedule, warmup):
    import reftlens as rl

    config = rl.FitConfig(lr=2.0, schedule=schedule, warmup=warmup)
    rates = [config.learning_rate(i, 12) for i in range(12)]
    peak = 3 if warmup else 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert max(rates) == pytest.approx(2.0)
    assert all(a >= b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))
    if schedule == "constant":
        assert rates[-1] == 2.0
    else:
        done = (11 - peak) / (12 - peak)
        end = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        assert rates[-1] == pytest.approx(2.0 * end)


def test_the_recorded_learning_rates_are_the_schedules(gpt2):
    import reftlens as rl

    run = rl.fit(_reft(gpt2), gpt2, _data(gpt2), steps=5, lr=1e-3, warmup=2, schedule="cosine", progress=False)
    assert list(run.learning_rates) == [run.config.learning_rate(i, 5) for i in range(5)]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(gpt2):
    import reftlens as rl

    ends = []
    for seed in (0, 0, 1):
        reft = _reft(gpt2, dropout=0.2)
        rl.fit(reft, gpt2, _data(gpt2), epochs=2, batch_size=2, seed=seed, progress=False)
        ends.append(_tensors(reft))
    assert _same(ends[0], ends[1])
    assert not _same(ends[0], ends[2])


def test_fit_leaves_the_global_random_state_alone(gpt2):
    import reftlens as rl

    torch.manual_seed(5)
    before = torch.get_rng_state()
    rl.fit(_reft(gpt2, dropout=0.2), gpt2, _data(gpt2), steps=2, progress=False)
    assert torch.equal(before, torch.get_rng_state())


def test_fit_leaves_the_users_model_as_it_was():
    import reftlens as rl

    model = architectures.fresh_bridge("llama")
    root = model.original_model
    next(iter(root.parameters())).requires_grad_(False)
    flags = [p.requires_grad for p in root.parameters()]
    weights = [p.detach().clone() for p in root.parameters()]
    reft = _reft(model)
    with pytest.raises(RuntimeError, match="stop here"):
        rl.fit(reft, model, _data(model), steps=9, on_step=_stop_at_three, progress=False)
    assert [p.requires_grad for p in root.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(weights, root.parameters(), strict=True))
    assert all(p.grad is None for p in root.parameters())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert not root.training


def _stop_at_three(step):
    if step.step == 3:
        raise RuntimeError("stop here")


def test_on_step_sees_every_step(gpt2):
    import reftlens as rl

    seen = []
    run = rl.fit(_reft(gpt2), gpt2, _data(gpt2), steps=4, on_step=seen.append, progress=False)
    assert [s.step for s in seen] == [1, 2, 3, 4]
    assert tuple(s.loss for s in seen) == run.losses


def test_early_stopping_keeps_the_best_weights(gpt2):
    import reftlens as rl

    data = _data(gpt2)
    reft, snapshots = _reft(gpt2), {}

    def keep(step):
        snapshots[step.step] = _tensors(step.reft.clone())

    run = rl.fit(
        reft,
        gpt2,
        data[:3],
        steps=200,
        lr=0.05,
        validation=data[3:],
        eval_every=2,
        patience=3,
        on_step=keep,
        progress=False,
    )
    assert run.stopped_early
    assert len(run.losses) == run.best_step + 2 * 3
    best = _reft(gpt2)
    best.load_state_dict(snapshots[run.best_step])
    best.settle()
    assert _same(_tensors(reft), _tensors(best))
    steps, losses = zip(*run.validation, strict=True)
    assert losses[steps.index(run.best_step)] == min(losses)
    assert rl.evaluate(reft, gpt2, data[3:], progress=False).loss.isfinite().all()


def test_validation_without_patience_keeps_the_last_weights(gpt2):
    import reftlens as rl

    data = _data(gpt2)
    with_validation, without = _reft(gpt2), _reft(gpt2)
    run = rl.fit(with_validation, gpt2, data[:3], epochs=4, validation=data[3:], progress=False)
    rl.fit(without, gpt2, data[:3], epochs=4, progress=False)
    assert [s for s, _ in run.validation] == [1, 2, 3, 4]
    assert _same(_tensors(with_validation), _tensors(without))


def test_a_users_own_objective_is_what_is_minimised(gpt2):
    import reftlens as rl

    wanted = gpt2.tokenizer(" moon").input_ids[0]

    def prefer_moon(logits, batch):
        return -logits.log_softmax(dim=-1)[:, wanted]

    data, reft = _data(gpt2), _reft(gpt2)
    before = rl.evaluate(reft, gpt2, data, objective=prefer_moon, progress=False)
    rl.fit(reft, gpt2, data, epochs=20, lr=2e-2, objective=prefer_moon, progress=False)
    after = rl.evaluate(reft, gpt2, data, objective=prefer_moon, progress=False)
    assert after.loss[1].sum() < 0.8 * before.loss[1].sum()
    assert torch.equal(after.loss[0], before.loss[0])


def test_an_objective_may_give_one_loss_per_example(gpt2):
    import reftlens as rl

    def last_target(logits, batch):
        losses = rl.training.cross_entropy(logits, batch)
        last = torch.stack([(batch.target_rows == row).nonzero().max() for row in range(len(batch))])
        return losses[last]

    run = rl.fit(_reft(gpt2), gpt2, _data(gpt2), steps=8, objective=last_target, progress=False)
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize(
    ("broken", "cause"),
    [
        (lambda logits, batch: logits.sum(dim=-1) * float("nan"), "it is the objective"),
        (lambda logits, batch: (logits.sum(dim=-1) * 0).sqrt(), "gradient is not finite"),
    ],
    ids=["nan-loss", "nan-gradient"],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_with_step_and_cause(gpt2, broken, cause):
    import reftlens as rl

    def from_step_two(logits, batch):
        from_step_two.calls += 1
        return broken(logits, batch) if from_step_two.calls == 2 else rl.training.cross_entropy(logits, batch)

    from_step_two.calls = 0
    with pytest.raises(rl.errors.TrainingDiverged, match=f"step 2: .*{cause}"):
        rl.fit(_reft(gpt2), gpt2, _data(gpt2), steps=4, objective=from_step_two, progress=False)


def test_overflow_in_a_half_precision_model_is_named(gpt2):
    import reftlens as rl

    model = architectures.fresh_bridge("gpt2", dtype=torch.float16)
    reft = _reft(model)
    with torch.no_grad():
        reft[1].W2.fill_(1e4)
        reft[1].W.fill_(1e3)
    with pytest.raises(rl.errors.TrainingDiverged, match="overflow in float16"):
        rl.fit(reft, model, _data(model), steps=2, progress=False)


@pytest.mark.parametrize("precision", ["model", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_trains_float32_parameters(precision, dtype):
    import reftlens as rl

    model = architectures.fresh_bridge("llama", dtype=dtype)
    reft = _reft(model)
    run = rl.fit(reft, model, _data(model), epochs=6, lr=1e-2, precision=precision, progress=False)
    assert all(p.dtype == torch.float32 for p in reft.parameters())
    assert run.losses[-1] < run.losses[0]


def test_rows_that_no_site_chooses_do_not_stop_a_run_that_chooses_elsewhere(gpt2):
    import reftlens as rl

    data = _data(gpt2)
    long_rows = data.prompt_mask.sum(dim=1) > 4
    assert long_rows.any() and not long_rows.all()
    reft = rl.ReFT({rl.resid_post(0, rl.positions.Nth(4, missing="skip")): rl.LoReFT(gpt2.cfg.d_model, 2)})
    run = rl.fit(reft, gpt2, data, epochs=2, batch_size=1, progress=False)
    assert len(run.losses) == 2 * len(data)
    assert 0.0 in run.gradient_norms and max(run.gradient_norms) > 0


def test_seeds_are_single_runs_and_leave_the_template_alone(gpt2):
    import reftlens as rl

    template, data, config = _reft(gpt2), _data(gpt2), rl.FitConfig(steps=4, batch_size=2)
    before = _tensors(template)
    copies = template.seeds([3, 4])
    runs = rl.training.fit_many(copies, gpt2, data, config, progress=False)
    assert _same(before, _tensors(template))
    assert [(name, run.config.seed) for name, run in runs.items()] == [("seed 3", 3), ("seed 4", 4)]
    alone = template.clone()
    alone.reset(4)
    rl.fit(alone, gpt2, data, config, seed=4, progress=False)
    for a, b in zip(alone.parameters(), copies["seed 4"].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)  # float32: side by side with others sums are reordered
    assert not _same(_tensors(copies["seed 3"]), _tensors(copies["seed 4"]))


def test_settings_are_fields_of_a_config_that_take_its_values_place(gpt2):
    import reftlens as rl

    config = rl.FitConfig(steps=2, lr=1e-2, clip=None)
    first, second = _reft(gpt2), _reft(gpt2)
    run = rl.fit(first, gpt2, _data(gpt2), config, lr=2e-2, progress=False)
    rl.fit(second, gpt2, _data(gpt2), steps=2, lr=2e-2, clip=None, progress=False)
    assert run.config == rl.FitConfig(steps=2, lr=2e-2, clip=None) and config.lr == 1e-2
    assert _same(_tensors(first), _tensors(second))
    with pytest.raises(TypeError, match=r"learning_rate=1 is no argument and no setting; settings: epochs, .*patience"):
        rl.fit(first, gpt2, _data(gpt2), config, learning_rate=1, progress=False)
    with pytest.raises(ValueError, match="lr=-1"):
        config.replace({"lr": -1})


def test_the_result_is_complete_and_plots(gpt2):
    import reftlens as rl

    data = _data(gpt2)
    run = rl.fit(_reft(gpt2), gpt2, data[:4], steps=4, batch_size=2, validation=data[4:], progress=False)
    frame = run.to_frame()
    assert list(frame.columns) == ["loss", "learning_rate", "gradient_norm", "validation_loss"]
    assert tuple(frame["loss"]) == run.losses and frame["validation_loss"].notna().sum() == 2
    assert run.data_hash == data[:4].fingerprint != data.fingerprint
    assert run.versions["torch"] == torch.__version__.split("+")[0] or run.versions["torch"] == torch.__version__
    assert json.loads(json.dumps(run.to_dict()))["config"]["steps"] == 4
    ax = run.plot()
    assert "loss" in ax.get_ylabel() and ax.get_xlabel() == "optimizer step"
    assert len(ax.lines) == 2


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"schedule": "lineer"},
        {"precision": "fp8"},
        {"patience": 3},
        {"eval_every": 2},
        {"batch_size": 0},
        {"weight_decay": -0.1},
    ],
)
def test_settings_that_make_no_sense_are_refused(gpt2, settings):
    import reftlens as rl

    # the shape checks of the test run may see a wrong literal first, and raise a TypeError
    with pytest.raises((ValueError, TypeError), match=next(iter(settings))):
        rl.fit(_reft(gpt2), gpt2, _data(gpt2), progress=False, **settings)


def test_misspelt_settings_are_refused(gpt2):
    import reftlens as rl

    with pytest.raises(TypeError, match="weight_dacay"):
        rl.fit(_reft(gpt2), gpt2, _data(gpt2), weight_dacay=0.1)


def test_data_without_targets_is_refused_by_row(gpt2):
    import reftlens as rl

    prompts = rl.encode_prompts(gpt2, ["the cat", "a dog"])
    with pytest.raises(ValueError, match=r"row\(s\) \[0, 1\] of data have no target"):
        rl.fit(_reft(gpt2), gpt2, prompts, progress=False)


def test_positions_that_choose_nothing_in_the_data_are_refused(gpt2):
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(0, "generated"): rl.LoReFT(gpt2.cfg.d_model, 2)})
    with pytest.raises(ValueError, match="chooses no token"):
        rl.fit(reft, gpt2, _data(gpt2), progress=False)


def test_an_intervention_without_parameters_is_refused(gpt2):
    import reftlens as rl

    with pytest.raises(ValueError, match="nothing to train: Ablation"):
        rl.fit(rl.ReFT({rl.resid_post(0, "last"): rl.Ablation(gpt2.cfg.d_model)}), gpt2, _data(gpt2), progress=False)


def test_an_objective_of_the_wrong_shape_is_refused(gpt2):
    import reftlens as rl

    with pytest.raises(ValueError, match="expected one dimension"):
        rl.fit(_reft(gpt2), gpt2, _data(gpt2), objective=lambda logits, batch: logits.sum(), progress=False)


# -- checkpoints ---------------------------------------------------------------------------------------------


def test_a_run_that_raised_goes_on_from_its_checkpoint_bit_for_bit(gpt2, tmp_path):
    import reftlens as rl

    data = _data(gpt2)
    settings = {"steps": 9, "batch_size": 2, "weight_decay": 0.1, "validation": data[4:], "patience": 50}
    undisturbed, resumed = _reft(gpt2, dropout=0.3), _reft(gpt2, dropout=0.3)
    expected = rl.fit(undisturbed, gpt2, data[:4], progress=False, **settings)
    path = tmp_path / "run.ckpt"
    with pytest.raises(RuntimeError, match="stop here"):
        rl.fit(
            resumed,
            gpt2,
            data[:4],
            checkpoint=path,
            checkpoint_every=2,
            on_step=_stop_at_three,
            progress=False,
            **settings,
        )
    fresh = _reft(gpt2, seed=8, dropout=0.3)  # its own values do not matter: the checkpoint has all
    run = rl.fit(fresh, gpt2, data[:4], checkpoint=path, checkpoint_every=2, progress=False, **settings)
    assert _same(_tensors(fresh), _tensors(undisturbed))
    assert (run.losses, run.gradient_norms, run.validation) == (
        expected.losses,
        expected.gradient_norms,
        expected.validation,
    )
    again = rl.fit(_reft(gpt2, seed=9, dropout=0.3), gpt2, data[:4], checkpoint=path, progress=False, **settings)
    assert again.losses == expected.losses  # a finished run is not run twice
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]


def test_a_checkpoint_of_another_run_is_refused_and_named(gpt2, tmp_path):
    import reftlens as rl

    data, path = _data(gpt2), tmp_path / "run.ckpt"
    rl.fit(_reft(gpt2), gpt2, data, steps=2, checkpoint=path, progress=False)
    for what, call in {
        "settings": lambda: rl.fit(_reft(gpt2), gpt2, data, steps=2, lr=1.0, checkpoint=path, progress=False),
        "data": lambda: rl.fit(_reft(gpt2), gpt2, data[:3], steps=2, checkpoint=path, progress=False),
        "sites": lambda: rl.fit(_reft(gpt2, dropout=0.1), gpt2, data, steps=2, checkpoint=path, progress=False),
        "model": lambda: rl.fit(
            _reft(gpt2), architectures.fresh_bridge("gpt2", seed=1), data, steps=2, checkpoint=path, progress=False
        ),
    }.items():
        with pytest.raises(rl.errors.CheckpointMismatch, match=what):
            call()


def test_a_checkpoint_belongs_to_what_an_edit_was_given_and_does_not_train(gpt2, tmp_path):
    import reftlens as rl

    def fit(direction, **settings):
        gate = rl.interventions.Threshold(direction)
        inner = rl.interventions.Gated(rl.LoReFT(gpt2.cfg.d_model, 1), gate)
        reft = rl.ReFT({rl.resid_post(0, "all"): inner, rl.resid_post(1, "last"): hard()})
        reft.reset(0)
        return rl.fit(reft, gpt2, _data(gpt2), steps=3, checkpoint=path, progress=False, **settings)

    def hard():
        return rl.interventions.Gated(rl.LoReFT(gpt2.cfg.d_model, 1), rl.interventions.HardConcrete())

    path, (first, second) = tmp_path / "run.ckpt", torch.eye(gpt2.cfg.d_model)[:2]
    with pytest.raises(RuntimeError, match="stop here"):
        fit(first, checkpoint_every=1, on_step=_stop_at_three)
    with pytest.raises(rl.errors.CheckpointMismatch, match="its frozen tensors differ"):
        fit(second)
    resumed = fit(first)
    path = tmp_path / "other.ckpt"
    assert resumed.losses == fit(first).losses


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit():
    script = Path(__file__).with_name("kill_training.py")
    done = subprocess.run([sys.executable, str(script), "20"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["kills"] >= 20 and report["with_checkpoint"] >= 10
    assert report["identical"] == report["runs"] > 0
