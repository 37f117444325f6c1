"""What a notebook has set globally does not reach inside: the same numbers, or an error that names the setting."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from architectures import D, bridge, fresh_bridge

ROWS = [(f"the cat sat on the mat {i}", " over the green hill") for i in range(6)]


@contextmanager
def no_gradients():
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


@contextmanager
def default(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = {
    "gradients off": no_gradients,
    "no_grad around it": torch.no_grad,
    "bfloat16 by default": lambda: default(torch.bfloat16),
    "float64 by default": lambda: default(torch.float64),
}


def made(kind):
    import reftlens as rl

    settings = {} if kind == "SteeringVector" else {"rank": 2}
    make = getattr(rl, kind, None) or getattr(rl.interventions, kind)
    reft = rl.ReFT({rl.resid_post(1, "last"): make(D, **settings)})
    reft.reset(0)
    return reft


def session(folder, kind):
    """Made, trained, scored, swept, written from, stored: every number of it."""
    import reftlens as rl

    model = bridge("llama")
    data = rl.encode(model, [rl.Example(*row) for row in ROWS])
    reft = made(kind)
    if any(module.variables for _, module in reft.items()):
        data = data.resampled()
    run = rl.fit(reft, model, data, steps=4, lr=1e-2, progress=False)
    scores = rl.evaluate(reft, model, data, [0, 1], progress=False)
    numbers = [torch.tensor(run.losses, dtype=torch.float64), scores.loss, *(p.detach() for p in reft.parameters())]
    rl.save(reft, folder, model)
    numbers += [p.detach() for p in rl.load(folder, model).parameters()]
    if not data.sources:
        doses = rl.dose_response(reft, model, data, [0.0, 1.0], progress=False)
        numbers += [doses.on_data.kl, torch.tensor(rl.generate(reft, model, ["the cat"]).ids)]
    return numbers


@pytest.mark.parametrize("kind", ["LoReFT", "SteeringVector", "DAS", "BoundlessDAS"])
def test_the_numbers_do_not_depend_on_what_is_set(kind, tmp_path):
    expected = session(tmp_path / "plain", kind)
    for setting, turned in (*SETTINGS.items(), ("nothing any more", nullcontext)):
        with turned():
            numbers = session(tmp_path / setting, kind)
        for a, b in zip(numbers, expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), setting


def test_training_goes_on_inside_inference_mode_where_the_parts_were_made_outside():
    import reftlens as rl

    model, reft, expected = bridge("llama"), made("LoReFT"), made("LoReFT")
    data = rl.encode(model, [rl.Example(*row) for row in ROWS])
    rl.fit(expected, model, data, steps=3, progress=False)
    with torch.inference_mode():
        run = rl.fit(reft, model, rl.encode(model, [rl.Example(*row) for row in ROWS]), steps=3, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(reft.parameters(), expected.parameters(), strict=True))
    assert run.computation.startswith("light cone")


def test_what_was_made_in_inference_mode_is_named():
    import reftlens as rl

    model = bridge("llama")
    data = rl.encode(model, [rl.Example(*row) for row in ROWS])
    with torch.inference_mode():
        reft, booted = made("LoReFT"), fresh_bridge("llama")
    with pytest.raises(ValueError, match=r"ReFT was made inside torch.inference_mode"):
        rl.fit(reft, model, data, steps=1, progress=False)
    for call in (
        lambda: rl.fit(made("LoReFT"), booted, data, steps=1, progress=False),
        lambda: rl.evaluate(made("LoReFT"), booted, data, progress=False),
        lambda: rl.generate(None, booted, ["the cat"]),
    ):
        with pytest.raises(ValueError, match=r"loaded inside torch.inference_mode\(\): load it outside"):
            call()


def test_another_default_device_is_named():
    import reftlens as rl

    model, reft = bridge("llama"), made("LoReFT")
    data = rl.encode(model, [rl.Example(*row) for row in ROWS])
    try:
        torch.set_default_device("meta")
        with pytest.raises(ValueError, match=r"set_default_device\('meta'\) is on"):
            rl.fit(reft, model, data, steps=1, progress=False)
    finally:
        torch.set_default_device(None)


def test_rows_without_an_edit_are_no_missing_gradient():
    """A micro-batch in which no site chooses a token has no gradient, and that is no error."""
    import reftlens as rl

    model = bridge("llama")
    data = rl.encode(model, [rl.Example("the cat sat", " over"), rl.Example("the dog ran", " over")])
    reft = rl.ReFT({rl.resid_post(1, rl.positions.Tokens(" cat", missing="skip")): rl.LoReFT(D, rank=2)})
    with no_gradients():
        run = rl.fit(reft, model, data, epochs=2, batch_size=1, accumulate=2, progress=False)
    assert len(set(run.losses)) == len(run.losses) > 1
