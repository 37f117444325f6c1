"""What is asked for wrongly is refused where it meets the library, and the message says what would be right.

Where the tests have types checked at every call, that is before the library sees what it was given; the cases of a
wrong type run in a process of their own then, this file as a script.
"""

import json
import math
import re
import subprocess
import sys

import pandas
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

import architectures

D = architectures.D


def _reft():
    import reftlens as rl

    return rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, 2)})


def _data(model):
    import reftlens as rl

    return rl.encode(model, [rl.Example("the cat", " sat on"), rl.Example("a dog ran", " by")])


CASES = {
    "effects of something else": (
        lambda rl, m: rl.effects(_reft(), m, _data(m), of="tokens"),
        "expected 'positions', 's",
    ),
    "a strength for the variant of an effect": (
        lambda rl, m: rl.effects(_reft(), m, _data(m), {"half": 0.5}),
        r"'half': 0.5}, expected {label: Variant}",
    ),
    "examples not encoded": (lambda rl, m: rl.fit(_reft(), m, [rl.Example("a", "b")]), r"a list, expected a Batch"),
    "an intervention without a site": (lambda rl, m: rl.fit(rl.LoReFT(D, 2), m, _data(m)), r"put it at a site"),
    "a transformers model": (
        lambda rl, m: rl.fit(_reft(), m.original_model, _data(m)),
        r"expected a TransformerBridge",
    ),
    "validation not encoded": (lambda rl, m: rl.fit(_reft(), m, _data(m), validation=[1]), r"expected a Batch"),
    "several without names": (lambda rl, m: rl.training.fit_many([_reft()], m, _data(m)), r"such as reft.seeds"),
    "data for settings": (
        lambda rl, m: rl.fit(_reft(), m, _data(m), _data(m)),
        r"expected a FitConfig, or its settings",
    ),
    "a misspelt setting": (lambda rl, m: rl.fit(_reft(), m, _data(m), epoch=3), r"epoch=3 is no argument and no"),
    "nothing to evaluate": (lambda rl, m: rl.evaluate(None, m, _data(m)), r"expected a ReFT, got NoneType"),
    "no data to evaluate on": (lambda rl, m: rl.evaluate(_reft(), m, "data", [0.5]), r"a str, expected a Batch"),
    "records not examples": (lambda rl, m: rl.encode(m, [{"prompt": "a"}]), r"row 0 is a dict, expected an Example"),
    "texts without completions": (lambda rl, m: rl.encode(m, ["a", "b"]), r"row 0 is a str.*encode_prompts takes"),
    "a table for prompts": (
        lambda rl, m: rl.encode_prompts(m, pandas.DataFrame({"prompt": ["a"], "label": [1]})),
        r"got a DataFrame: one column of it is prompts, encode_prompts\(model, table\['prompt'\]\)",
    ),
    "a table for examples": (
        lambda rl, m: rl.encode(m, pandas.DataFrame({"prompt": ["a"]})),
        r"got a DataFrame.*load_examples\(table",
    ),
    "columns for prompts": (lambda rl, m: rl.encode_prompts(m, {"prompt": ["a"]}), r"expected rows, got a dict"),
    "texts for activations": (
        lambda rl, m: rl.activations(m, ["a"], rl.resid_post(1, "last")),
        r"a list, expected a Batch: encode_prompts",
    ),
    "texts for an edited pass": (
        lambda rl, m: _reft().on(m, ["a"]).__enter__(),
        r"data is a list, expected a Batch: encode_prompts",
    ),
    "texts for a source": (
        lambda rl, m: _data(m).with_sources(["a", "b"]),
        r"source 'source' is a list, expected a Batch.*encode_prompts",
    ),
    "one example": (lambda rl, m: rl.encode(m, rl.Example("a", "b")), r"got one Example: write \[Example"),
    "a completion that is no text": (lambda rl, m: rl.encode(m, [rl.Example("a", 3)]), r"row 0: the completion is 3"),
    "text for a variant": (
        lambda rl, m: rl.generate(_reft(), m, ["a"], variant="strong"),
        r"'strong', expected a Variant",
    ),
    "a number for a variant of a pass": (
        lambda rl, m: rl.places.stream_effects(_reft(), m, _data(m), variant=0.5),
        r"variant=0.5, expected a Variant",
    ),
    "a number for a decoding": (lambda rl, m: rl.generate(_reft(), m, ["a"], 8), r"decoding=8, .*Decoding\(max_new"),
    "an intervention to prefill for": (
        lambda rl, m: rl.generation.prefill(rl.LoReFT(D, 2), m, ["a"]),
        r"put it at a site",
    ),
    "an intervention for a slider": (lambda rl, m: rl.slider(rl.LoReFT(D, 2), m, "a"), r"put it at a site"),
    "a model's name to write": (lambda rl, m: rl.generate(None, "gpt2", ["a"]), r"expected a TransformerBridge"),
    "one text to write from": (lambda rl, m: rl.generate(None, m, "a"), r"expected a list, got one str"),
    "one site of a variant": (lambda rl, m: rl.Variant(sites=0), r"sites=0, expected a list of indices"),
    "sites of a variant": (lambda rl, m: rl.Variant(sites=[rl.embeddings("last")]), r"expected a whole number"),
    "a strength that is text": (lambda rl, m: rl.Variant("2"), r"strength='2', expected a number"),
    "several prompts to stream": (
        lambda rl, m: list(rl.generation.stream(_reft(), m, ["a"])),
        r"a stream is of one prompt",
    ),
    "no positions": (lambda rl, m: rl.resid_post(1, None), r"positions=None"),
    "a learning rate that is text": (lambda rl, m: rl.FitConfig(lr="1e-2"), r"lr='1e-2', expected a number"),
    "a seed that is text": (lambda rl, m: rl.FitConfig(seed="a"), r"seed='a', expected a whole number"),
    "a number of seeds": (lambda rl, m: _reft().seeds(3), r"seeds=3, expected a list"),
    "a hook for a site": (
        lambda rl, m: rl.activations(m, _data(m), "blocks.0.hook_out"),
        r"expected a Site, such as Site\('blocks.0.hook_out'",
    ),
    "a layer for a site": (lambda rl, m: rl.activations(m, _data(m), 1), r"expected a Site, such as resid_post\(1, "),
    "nothing for a site": (lambda rl, m: rl.activations(m, _data(m), None), r"such as resid_post\(8, 'last'\)"),
    "a direction for an intervention": (
        lambda rl, m: rl.ReFT({rl.embeddings("last"): rl.directions.random_subspace(D)}),
        r"a Direction, expected an Intervention, such as .*as_steering\(\)",
    ),
    "a class for an intervention": (lambda rl, m: rl.ReFT({rl.embeddings("last"): rl.LoReFT}), r"LoReFT .* is a class"),
    "a hook in a ReFT": (lambda rl, m: rl.ReFT({"blocks.0.hook_out": rl.LoReFT(D)}), r"Site\('blocks.0.hook_out'"),
    "a model's name to load onto": (lambda rl, m: rl.load("runs/x", "gpt2"), r"model='gpt2', expected a model"),
    "a run for held-out pairs": (
        lambda rl, m: rl.controls(_reft(), m, _data(m), rl.FitConfig()),
        r"test is a FitConfig, expected a Batch: controls\(reft, model, train, test, run\)",
    ),
    "a record for controls": (
        lambda rl, m: rl.report(_reft(), m, _data(m), "no.html", controls=rl.FitConfig()),
        r"controls is a FitConfig, expected the Controls that controls\(…\) gave",
    ),
    "doses for a record": (
        lambda rl, m: rl.report(_reft(), m, _data(m), "no.html", run=[0.5]),
        r"run is a list, expected the FitResult that fit\(…\) gave",
    ),
    "examples for a report": (
        lambda rl, m: rl.report(_reft(), m, ["a"], "no.html"),
        r"data is a list, expected a Batch",
    ),
    "a strength that is a word": (
        lambda rl, m: rl.dose_response(_reft(), m, _data(m), "strong"),
        r"strengths='strong', expected a number",
    ),
    "kinds in a list": (lambda rl, m: rl.load("runs/x", m, kinds=[1]), r"expected \{kind: class\}"),
}


@pytest.fixture(scope="module")
def messages(request):
    """What each case raises, `[type, message]`."""
    if not request.config.getoption("--jaxtyping-packages"):
        return _run()
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _run():
    import reftlens as rl

    model, messages = architectures.bridge("gpt2"), {}
    for name, (call, _) in CASES.items():
        try:
            call(rl, model)
        except Exception as error:
            messages[name] = [type(error).__name__, str(error)]
    return messages


@pytest.mark.parametrize("case", CASES)
def test_the_wrong_thing_is_named(case, messages):
    kind, message = messages[case]
    assert kind == "TypeError" and re.search(CASES[case][1], message), (kind, message[:300])


@pytest.mark.parametrize("strength", [math.nan, math.inf, (1.0, math.nan)])
def test_a_strength_is_finite(strength):
    import reftlens as rl

    with pytest.raises(ValueError, match="expected finite numbers"):
        rl.Variant(strength)


def test_layers_are_counted_from_the_bottom(gpt2):
    import reftlens as rl

    with pytest.raises(ValueError, match="counted from 0 at the bottom"):
        rl.resid_post(-1, "last")
    with pytest.raises(rl.errors.HookNotFound, match="it has 3 layers, 0 to 2"):
        rl.training.preflight(rl.ReFT({rl.resid_post(99, "last"): rl.LoReFT(D)}), gpt2)


def test_no_clipping_is_none():
    import reftlens as rl

    with pytest.raises(ValueError, match="clip=0 leaves no gradient"):
        rl.FitConfig(clip=0)


def test_a_reft_is_a_mapping_of_its_sites():
    import reftlens as rl

    reft, other = _reft(), rl.resid_post(2, "last")
    (site,) = reft
    assert site in reft and other not in reft and dict(reft) == dict(reft.items())
    assert "LoReFT(d=32, rank=2" in repr(reft) and "blocks.1.hook_resid_post at Last(n=1)" in repr(reft)
    with pytest.raises(KeyError, match=r"no site blocks\.2.*there are: blocks\.1"):
        reft[other]


def test_an_intervention_of_the_users_own_has_a_kind_and_settings_that_make_it_again(gpt2, tmp_path):
    import reftlens as rl

    with pytest.raises(TypeError, match="Nameless has no kind"):

        class Nameless(rl.LoReFT.__mro__[1]):
            def code(self, h, basis):
                return h

            def basis(self):
                return None

            def settings(self):
                return {}

            def reset(self, generator=None):
                return None

    class Wide(rl.SteeringVector):
        kind = "Wide"

        def settings(self):
            return {"d": self.d + 1}

    with pytest.raises(ValueError, match=r"Wide\(\*\*settings\(\)\) has other tensors"):
        rl.save(rl.ReFT({rl.resid_post(1, "last"): Wide(D)}), tmp_path, gpt2)


def test_a_record_is_kept_with_the_weights_that_it_ended_with(gpt2, tmp_path):
    import reftlens as rl

    reft = _reft()
    run = rl.fit(reft, gpt2, _data(gpt2), steps=1, progress=False)
    rl.save(reft, tmp_path, gpt2, run=run)
    assert rl.storage.load_run(tmp_path) == run
    rl.fit(reft, gpt2, _data(gpt2), steps=1, progress=False)
    for other in (reft, _reft()):
        with pytest.raises(ValueError, match="the record of other weights"):
            rl.save(other, tmp_path, gpt2, run=run)


def test_what_a_checkpoint_is_not_is_said(gpt2, tmp_path):
    import reftlens as rl

    def fit(path, **settings):
        return rl.fit(_reft(), gpt2, _data(gpt2), checkpoint=path, progress=False, **({"steps": 1} | settings))

    with pytest.raises(ValueError, match="is a folder, expected a file"):
        fit(tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(rl.errors.CheckpointMismatch, match="no checkpoint that fit wrote"):
        fit(tmp_path / "text")
    fit(tmp_path / "run.pt")
    with pytest.raises(rl.errors.CheckpointMismatch, match=r"its settings differ: seed 0 there, 3 here; delete"):
        fit(tmp_path / "run.pt", seed=3)
    with safe_open(tmp_path / "run.pt", framework="pt") as file:
        tensors, told = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["reftlens"])  # noqa: SIM118
    save_file(tensors, tmp_path / "earlier.pt", {"reftlens": json.dumps(told | {"format": 1})})
    with pytest.raises(rl.errors.CheckpointMismatch, match="another version of reftlens, in format 1, and this one"):
        fit(tmp_path / "earlier.pt")


def test_what_is_printed_fits_on_a_screen(gpt2):
    import reftlens as rl

    run = rl.fit(_reft(), gpt2, _data(gpt2), steps=2, progress=False)
    assert str(run).startswith("2 steps in ") and "light cone" in str(run)
    assert str(_data(gpt2)) == "Batch(2 rows of up to 6 tokens, 5 targets)"


if __name__ == "__main__":
    print(json.dumps(_run()))
