"""`plan` says before a run what the run then does: tokens counted in the blocks, operations by torch's own counter."""

from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from architectures import ARCHITECTURES, CONTEXT, LAYERS, D, bridge

SHOTS = "the cat sat on the mat and looked at the moon over "
PAIRS = [
    ("the green hill", " a dog"),
    ("a dog ran", " by the moon and looked"),
    ("the mat", " cat"),
    ("looked at the moon over the green hill while", " the cat sat on"),
    ("the moon by", " hill"),
    ("the cat while the dog ran", " over the mat"),
]


def data_of(model):
    import reftlens as rl

    return rl.encode(model, [rl.Example(SHOTS + prompt, completion) for prompt, completion in PAIRS])


def reft_at(*sites):
    import reftlens as rl

    return rl.ReFT({site: rl.LoReFT(D, rank=1) for site in sites})


def sites_of(name):
    import reftlens as rl

    return {
        "above a block": [rl.resid_post(1, "last")],
        "at all layers": [rl.resid_post(layer, "f2+l2") for layer in range(LAYERS)],
        "at the embedding": [rl.embeddings("last")],
        "on an MLP": [rl.mlp_out(0, "last")],
        "after the last block": [rl.resid_post(LAYERS - 1, "last")],
    }[name]


@contextmanager
def counted(model):
    """Rows times columns that pass through each block, by its number, without a gradient and with one."""
    blocks = {id(block.original_component): i for i, block in enumerate(model.blocks)}
    kind = type(model.blocks[0].original_component)
    forward, tokens = kind.forward, {False: Counter(), True: Counter()}

    def counting(self, *args, **kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        tokens[torch.is_grad_enabled()][blocks[id(self)]] += hidden.shape[0] * hidden.shape[1]
        return forward(self, *args, **kwargs)

    kind.forward = counting
    try:
        yield tokens
    finally:
        kind.forward = forward


@pytest.fixture
def fitted(monkeypatch):
    """The record of a run and the tokens that it computed, without those of the first look at its sites."""
    import reftlens as rl

    monkeypatch.setattr("reftlens.training.fitting.preflight", lambda *_: None)

    def run(reft, model, data, config, reuse, counter=None):
        with counted(model) as tokens, counter or nullcontext():
            record = rl.fit(reft, model, data, config, reuse=reuse, progress=False)
        return record, tokens

    return run


OTHERS = ("above a block", "at the embedding", "on an MLP", "after the last block")
CASES = [*((name, "at all layers") for name in ARCHITECTURES), *(("llama", where) for where in OTHERS)]


@pytest.mark.parametrize(("architecture", "where"), CASES)
def test_a_plan_says_what_the_run_then_computes(architecture, where, fitted):
    import reftlens as rl

    model, reuse, config = (
        bridge(architecture),
        rl.training.Reuse(plain=False, verify=False),
        rl.FitConfig(steps=2, batch_size=4),
    )
    data, reft = data_of(model), reft_at(*sites_of(where))
    plan = rl.training.plan(reft, model, data, config, reuse=reuse)
    counter = FlopCounterMode(display=False) if architecture == "llama" else None  # it takes its time
    record, tokens = fitted(reft, model, data, config, reuse, counter)
    assert plan.computation == record.computation
    assert plan.capture.padded == tokens[False][0]
    first = {"above a block": 2, "at all layers": 1, "after the last block": LAYERS}.get(where, 0)
    assert first == LAYERS or plan.step.padded == tokens[True][first]
    assert plan.step.tokens <= plan.step.padded and plan.capture.tokens <= plan.capture.padded
    total = plan.step.operations + plan.capture.operations  # the edits' own products are left out
    assert counter is None or total <= counter.get_total_flops() <= 1.005 * total
    if architecture in ("gpt2", "gemma3") or (where == "at all layers" and architecture == "llama"):
        assert plan == rl.training.plan(reft, model.original_model.config, data, config, reuse=reuse, device="cpu")


@pytest.mark.parametrize(
    "settings",
    [dict(epochs=1), dict(epochs=2, accumulate=2), dict(steps=4, shuffle=False)],
    ids=["one epoch", "accumulated", "in order"],
)
@pytest.mark.parametrize("room", [None, 0], ids=["kept", "no room"])
def test_rows_are_captured_when_the_run_captures_them(settings, room, fitted, llama):
    import reftlens as rl

    reuse = rl.training.Reuse(verify=False, remember=False, memory=room, disk=room)
    config, data, reft = rl.FitConfig(batch_size=2, **settings), data_of(llama), reft_at(rl.resid_post(1, "last"))
    plan = rl.training.plan(reft, llama, data, config, reuse=reuse)
    record, tokens = fitted(reft, llama, data, config, reuse)
    assert plan.capture.padded == tokens[False][0] and plan.step.padded == tokens[True][2]
    assert plan.computation == record.computation and plan.tier in plan.computation


def test_without_reuse_it_is_the_full_computation(fitted, llama):
    import reftlens as rl

    config, data, reft = rl.FitConfig(steps=2, batch_size=4), data_of(llama), reft_at(rl.resid_post(0, "last"))
    plan = rl.training.plan(reft, llama, data, config, reuse=False)
    record, tokens = fitted(reft, llama, data, config, False, counter := FlopCounterMode(display=False))
    assert plan.ratio == plan.run_ratio == 1.0 and plan.stored == 0 and plan.capture == plan.capture + plan.capture
    assert plan.computation == record.computation and plan.step.padded == tokens[True][0]
    assert plan.step.operations <= counter.get_total_flops() <= 1.005 * plan.step.operations


def test_what_a_step_holds_is_estimated(fitted, llama):
    import reftlens as rl

    data, reft, seen = data_of(llama), reft_at(rl.resid_post(0, "last")), {}
    own = {p.untyped_storage().data_ptr() for p in (*llama.parameters(), *llama.original_model.buffers())}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fitted(reft, llama, data, rl.FitConfig(steps=1, batch_size=6), False)
    plan = rl.training.plan(reft, llama, data, rl.FitConfig(steps=1, batch_size=6), reuse=False)
    assert 0.5 < plan.step.memory / sum(tensor.untyped_storage().nbytes() for tensor in seen.values()) < 2


def llama_3(**settings):
    shape = dict(
        vocab_size=128256,
        hidden_size=4096,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        dtype=torch.bfloat16,
    )
    return transformers.LlamaConfig(**{**shape, **settings})


def test_a_bare_configuration_is_enough_and_nothing_is_allocated(llama):
    import reftlens as rl
    from reftlens.bridge.weightless import is_weightless, weightless
    from reftlens.cone.body import Body
    from reftlens.cone.size import size_of

    before = torch.get_rng_state()
    model = weightless(llama_3())
    assert is_weightless(model) and not is_weightless(llama) and torch.equal(before, torch.get_rng_state())
    size = size_of(Body(model))
    assert size.blocks == (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336,) * 2
    assert (size.attention, size.stored, size.unembedding) == (8192, 2048, 4096 * 128256)
    assert size.bytes == 2 * sum(p.numel() for p in model.original_model.parameters())
    mixtral = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    assert size_of(Body(weightless(mixtral))).blocks == (2 * 64 * 64 + 2 * 64 * 32 + 8 * 64 + 2 * 3 * 64 * 96,)
    reft, data = rl.ReFT({rl.resid_post(0, "last"): rl.LoReFT(4096, rank=4)}), data_of(llama)
    text = str(
        rl.training.plan(
            reft, llama_3(), data, rl.FitConfig(steps=2), device="cuda", reuse=rl.training.Reuse(memory=10**9)
        )
    )
    assert "light cone: blocks 1 to 1, " in text and "on the device" in text and "GFLOP" in text


def test_one_more_pass_costs_what_launching_it_takes(llama):
    """3 ms a block on an H200, in which it does 3.3e11 multiply-adds in 16 bits, and a sixth of them in float32."""
    from reftlens.bridge.weightless import weightless
    from reftlens.cone.body import Body

    large = Body(weightless(llama_3()))
    assert large.pass_cost == 25  # the CPU's
    large.kind = "cuda"
    assert 1450 < large.pass_cost < 1550
    tiny = Body(llama)  # in float32
    tiny.kind = "cuda"
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32  # attention, MLP and norms
    assert tiny.pass_cost == pytest.approx(3.3e11 / 6 / weights)


def test_a_plan_leaves_no_trace(llama):
    import reftlens as rl
    from reftlens.cone.memory import MEMORY

    rl.training.forget()
    reft, data = reft_at(rl.resid_post(0, "last")).eval(), data_of(llama)
    with counted(llama) as tokens:
        plan = rl.training.plan(reft, llama, data, rl.FitConfig(steps=2))
    assert not any(tokens.values()) and MEMORY.size == 0 and not any(module.training for module in reft.modules())
    assert list(plan.to_frame().index) == ["capture", "steps", "steps in full"]
    assert plan.to_frame().loc["steps", "tokens"] == sum(step.tokens for step in plan.steps)


def longer_than(tokens):
    from reftlens.text.batch import batch_from_rows

    return batch_from_rows([[5] * (tokens + 1)], [[1] * tokens + [2]])


REFUSED = {
    "a model without attention": (
        lambda rl: dict(model=transformers.MambaConfig(num_hidden_layers=1)),
        r"MambaConfig has no num_attention_heads",
    ),
    "an encoder-decoder": (lambda rl: dict(model=transformers.T5Config()), r"encoder-decoder"),
    "a name": (
        lambda rl: dict(model="meta-llama/Llama-3-8B"),
        r"model is a str, expected a TransformerBridge or a conf",
    ),
    "no configuration of fit": (lambda rl: dict(config={"steps": 3}), r"xpected .*FitConfig"),
    "a block that is not there": (
        lambda rl: dict(reft=reft_at(rl.resid_post(LAYERS, "last"))),
        r"has 3 layers, 0 to 2",
    ),
    "another width": (
        lambda rl: dict(reft=rl.ReFT({rl.resid_post(0, "last"): rl.LoReFT(D + 1, rank=1)})),
        r"vectors of width 32, and its LoReFT was made for d=33",
    ),
    "rows without targets": (lambda rl: dict(data=rl.encode_prompts(bridge("llama"), ["the cat"])), r"have no target"),
    "an exchange without sources": (
        lambda rl: dict(reft=rl.ReFT({rl.resid_post(0, "last"): rl.DAS(D, rank=1)})),
        r"source",
    ),
    "rows longer than the context": (
        lambda rl: dict(model=bridge("gpt2"), data=longer_than(CONTEXT)),
        r"positions for 160",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_planned_is_refused_by_name(case, llama):
    import reftlens as rl

    make, message = REFUSED[case]
    arguments = dict(reft=reft_at(rl.resid_post(0, "last")), model=llama, data=data_of(llama), config=rl.FitConfig())
    with pytest.raises((TypeError, ValueError, KeyError), match=message):
        rl.training.plan(**{**arguments, **make(rl)})
