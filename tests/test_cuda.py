"""What must also hold on a GPU; skipped where there is none."""

import pytest
import torch

import architectures

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _on_cuda(architecture, dtype=torch.float32):
    return architectures.fresh_bridge(architecture, dtype=dtype).to("cuda")


def _setup(model):
    import reftlens as rl

    words = architectures.TEXT.split()
    data = rl.encode(model, [rl.Example(" ".join(words[i : i + 3]), " " + words[i + 4]) for i in range(6)])
    lo = rl.LoReFT(model.cfg.d_model, 2, generator=torch.Generator().manual_seed(0))
    return data, rl.ReFT({rl.resid_post(1, "f1+l1"): lo})


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_training_follows_the_cpu_and_generation_continues_alike(architecture):
    import reftlens as rl

    runs = []
    for model in (architectures.bridge(architecture), _on_cuda(architecture)):
        data, reft = _setup(model)
        run = rl.fit(reft, model, data, steps=5, batch_size=4, progress=False)
        runs.append((run.losses, rl.generate(reft, model, ["the cat sat"], rl.Decoding(max_new_tokens=8)).ids))
    # float32 kernels of CPU and GPU round differently, and five steps amplify it a little
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-3)
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_the_light_cone_equals_the_full_computation(architecture):
    from test_scorer import off, scored, worst

    import reftlens as rl

    model = _on_cuda(architecture)
    data, reft = _setup(model)
    reft.to("cuda")
    rows = tuple(range(len(data)))
    for reuse in (off(), off(plain=False), off(memory=0), rl.training.Reuse(memory=0, disk=0, verify=False)):
        expected, _ = scored(model, reft, data, None, rows=rows)
        found, said = scored(model, reft, data, reuse, rows=rows)
        assert said.startswith("light cone") and worst(found, expected) < 1e-4  # float32 kernels of other shapes


def test_half_precision_models_train_float32_interventions(tmp_path):
    import reftlens as rl

    model = _on_cuda("llama", torch.bfloat16)
    data, reft = _setup(model)
    run = rl.fit(reft, model, data, epochs=15, lr=1e-2, checkpoint=tmp_path / "c", progress=False)
    assert run.losses[-1] < run.losses[0] and run.device.startswith("cuda")
    assert all(p.dtype == torch.float32 and p.is_cuda for p in reft.parameters())
    loaded = rl.load(rl.save(reft, tmp_path / "reft", model), model)
    assert (
        rl.generate(loaded, model, data, rl.Decoding(beams=2)).ids
        == rl.generate(reft, model, data, rl.Decoding(beams=2)).ids
    )


def test_answers_preferences_and_states_that_are_looked_at_follow_the_cpu():
    import reftlens as rl

    class Quiet(rl.training.Objective):
        reference = True

        def __init__(self):
            self.sites = {"late": rl.resid_post(2, "last")}

        def losses(self, predictions):
            moved = predictions.by_row((predictions.log_probs - predictions.reference).square())
            return moved + predictions.activations["late"].square().mean(dim=1)

    results = []
    for model in (architectures.bridge("llama"), _on_cuda("llama")):
        rows = [rl.Example("the cat sat on", " dog"), rl.Example("a", " cat"), rl.Example("the moon over", " cat")]
        data = rl.encode(model, rows, end=False, among_answers=[" cat", " dog"])
        pairs = rl.training.preference_pairs(model, [("the cat", " sat on", " dog"), ("a", " cat", " moon")])
        lo = rl.LoReFT(model.cfg.d_model, 2, generator=torch.Generator().manual_seed(0))
        reft = rl.ReFT({rl.resid_post(1, "f1+l1"): lo})
        losses = rl.evaluate(reft, model, data, progress=False).loss.flatten().tolist()
        losses += rl.evaluate(reft, model, data, objective=Quiet(), progress=False).loss[1].tolist()
        for objective, some in ((rl.training.RePS((0.5, 1.0)), pairs), (Quiet(), data)):
            losses += rl.fit(reft, model, some, steps=2, batch_size=2, objective=objective, progress=False).losses
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-3)  # kernels of CPU and GPU round differently


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_has_the_same_fingerprint_as_on_the_cpu(dtype):
    """To the last digit: a checkpoint or a run begun on the one goes on on the other."""
    from reftlens.bridge.fingerprint import fingerprint

    here = architectures.fresh_bridge("llama", dtype=dtype)
    known = fingerprint(here)
    assert fingerprint(here.to("cuda")) == known
