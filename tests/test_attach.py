"""An edited transformers model: whatever writes with it or scores with it gets what `reft.on` and `generate` compute."""

import copy
import pickle
import warnings
from functools import cache

import pytest
import torch
import transformers
from transformers import DynamicCache

import architectures

D, VOCABULARY, NEW = architectures.D, 300, 8
PAD = 2
LENGTHS = (9, 3, 17, 6, 1, 12)


def dtype_of(architecture):
    """float64; but on padding on the left the attention of Gemma 2 is NaN there, as its softmax is of float32."""
    return torch.float32 if architecture == "gemma2" else torch.float64


def fresh(architecture="llama"):
    return architectures.hf_model(architecture).to(dtype_of(architecture))


plain = cache(fresh)  # shared: every test leaves it as it was


def prompts(count=6, seed=0):
    """Rows of random tokens of different lengths."""
    from reftlens.text.batch import batch_from_rows
    from reftlens.text.view import TokenRole

    generator = torch.Generator().manual_seed(seed)
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(count)]
    ids = [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    roles = [[int(TokenRole.PROMPT)] * n for n in lengths]
    return batch_from_rows(ids, roles, tokenizer=architectures.tokenizer())


def left(batch):
    """Ids and attention mask, padded on the left."""
    real = batch.attention_mask
    order = real.long().argsort(dim=1, stable=True)
    mask = real.gather(1, order)
    return batch.tokens.gather(1, order).masked_fill(~mask, PAD), mask.long()


def edit(kind="mixed", rank=3):
    import reftlens as rl

    P, generator = rl.positions, torch.Generator().manual_seed(5)
    direction = torch.randn(D, generator=generator)

    def lo():
        return rl.LoReFT(D, rank)

    gated = rl.interventions.Gated(lo(), rl.interventions.Threshold(direction, 0.0, per="prompt"))
    sites = {
        "last": {rl.resid_post(1, "last"): lo()},
        "f2+l2": {rl.resid_pre(1, "f2+l2"): lo()},
        "prompt": {rl.resid_pre(0, "prompt"): rl.SteeringVector(D, direction)},
        "all": {rl.resid_post(0, "all"): lo()},
        "generated": {rl.resid_post(2, "generated"): rl.SteeringVector(D, 3 * direction)},
        "first generated": {rl.resid_post(0, P.Response() >> P.First(4)): lo()},
        "written": {
            rl.resid_post(1, P.Written("[a-zA-Z]", regex=True, then="after")): rl.SteeringVector(D, 3 * direction)
        },
        "gate per prompt": {rl.resid_post(0, "all"): gated},
        "gate per token": {
            rl.resid_post(1, "all"): rl.interventions.Gated(lo(), rl.interventions.Threshold(direction, 0.0))
        },
        "schedule": {rl.resid_post(1, "all"): rl.interventions.Gated(lo(), rl.interventions.Schedule([1.0, 0.5, 0.0]))},
        "mixed": {
            rl.resid_pre(0, "last"): lo(),
            rl.resid_post(0, "all"): gated,
            rl.resid_post(1, P.Response() >> P.First(4)): lo(),
            rl.resid_post(2, P.Written("[a-zA-Z]", regex=True)): rl.SteeringVector(D, 3 * direction),
        },
    }[kind]
    reft = rl.ReFT(sites).double().eval()
    for module in reft.modules():
        if isinstance(module, rl.LoReFT):
            module.reset(generator)
    return reft


KINDS = "last f2+l2 prompt all generated written schedule mixed".split() + [
    "first generated",
    "gate per prompt",
    "gate per token",
]


def attached(reft, model, **kwargs):
    import reftlens as rl

    return rl.attach(reft, model, tokenizer=architectures.tokenizer(), **kwargs)


def ours(reft, architecture, batch, **decoding):
    import reftlens as rl

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*chose no token")
        bridge = architectures.bridge(architecture, dtype_of(architecture))
        return rl.generate(reft, bridge, batch, rl.Decoding(**{"max_new_tokens": NEW, **decoding})).ids


def theirs(model, tokens, mask, **settings):
    """What `generate` writes after each row."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, **settings}
    return model.generate(tokens, attention_mask=mask, **settings)[:, tokens.shape[1] :].tolist()


def assert_same(written, ids):
    for row, expected in zip(written, ids, strict=True):
        assert row[: len(expected)] == list(expected) and set(row[len(expected) :]) <= {PAD}


def quiet(attachment):
    """Detach, whatever has chosen no token."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attachment.detach()


def state(model):
    """All that an attachment may change of a model."""
    hooks = [(name, list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()]
    return hooks, sorted(model.__dict__), list(model.state_dict())


# -- greedy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_greedy_texts_are_those_of_generate_alone_and_in_batches_with_and_without_a_cache(architecture):
    reft, batch, model = edit(), prompts(), plain(architecture)
    expected, base = ours(reft, architecture, batch), ours(None, architecture, batch)
    assert sum(a != b for a, b in zip(expected, base, strict=True)) >= 3
    tokens, mask = left(batch)
    attachment = attached(reft, model)
    assert_same(theirs(model, tokens, mask), expected)
    assert_same(theirs(model, tokens, mask, use_cache=False), expected)
    assert_same(theirs(model, tokens[2:4], mask[2:4]), expected[2:4])
    for row in (0, 1, 4):
        alone = batch.tokens[row : row + 1, : LENGTHS[row]]
        assert_same(theirs(model, alone, torch.ones_like(alone)), expected[row : row + 1])
    attachment.detach()
    assert_same(theirs(model, tokens, mask), base)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_every_kind_of_positions_and_gate_acts_as_in_generate(architecture, kind):
    reft, batch, model = edit(kind), prompts(), plain(architecture)
    tokens, mask = left(batch)
    expected = ours(reft, architecture, batch)
    attachment = attached(reft, model)
    assert_same(theirs(model, tokens, mask), expected)
    assert_same(theirs(model, tokens, mask, use_cache=False), expected)
    quiet(attachment)
    assert expected != ours(None, architecture, batch)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_a_hundred_greedy_texts_are_those_of_generate(architecture):
    reft, batch, model = edit(), prompts(100, seed=5), plain(architecture)
    expected, (tokens, mask) = ours(reft, architecture, batch), left(batch)
    with attached(reft, model):
        assert_same(theirs(model, tokens, mask), expected)
        assert_same(theirs(model, tokens, mask, use_cache=False), expected)
        for row in range(len(batch)):
            alone = tokens[row : row + 1, mask[row].bool()]
            assert_same(theirs(model, alone, torch.ones_like(alone)), expected[row : row + 1])


def test_beams_and_several_texts_for_a_prompt_are_rows_that_change_places():
    for architecture in ("llama", "gemma2"):
        reft, batch, model = edit(), prompts(), plain(architecture)
        tokens, mask = left(batch)
        with attached(reft, model):
            assert_same(theirs(model, tokens, mask, num_beams=3), ours(reft, architecture, batch, beams=3))
            assert_same(
                theirs(model, tokens, mask, num_beams=3, use_cache=False), ours(reft, architecture, batch, beams=3)
            )
            several = theirs(model, tokens, mask, num_beams=3, num_return_sequences=2)
        assert_same(several[::2], ours(reft, architecture, batch, beams=3))


@pytest.mark.parametrize("cached", [True, False])
def test_sampled_texts_come_from_the_logits_of_the_edited_bridge(cached):
    from reftlens.text.batch import batch_from_rows
    from reftlens.text.view import TokenRole

    reft, batch, model = edit(), prompts(), plain("llama")
    tokens, mask = left(batch)
    torch.manual_seed(0)
    with attached(reft, model):
        out = model.generate(
            tokens, attention_mask=mask, do_sample=True, num_return_sequences=2, max_new_tokens=NEW, pad_token_id=PAD,
            use_cache=cached, output_logits=True, return_dict_in_generate=True, eos_token_id=[],
        )  # fmt: skip
    written, logits = out.sequences[:, tokens.shape[1] :].tolist(), torch.stack(out.logits, dim=1)
    ids = [batch.tokens[i // 2, : LENGTHS[i // 2]].tolist() + row for i, row in enumerate(written)]
    roles = [[int(TokenRole.PROMPT)] * LENGTHS[i // 2] + [int(TokenRole.GENERATED)] * NEW for i in range(len(ids))]
    whole, bridge = batch_from_rows(ids, roles, tokenizer=batch.tokenizer), architectures.bridge("llama", torch.float64)
    with torch.no_grad(), reft.on(bridge, whole):
        full = bridge(whole.tokens, attention_mask=whole.attention_mask.long())
    for i, row in enumerate(logits):
        n = LENGTHS[i // 2]
        assert (full[i, n - 1 : n + NEW - 1].float() - row).abs().max() < 1e-5  # norms and logits are float32


def test_the_pipeline_of_transformers_writes_what_generate_writes():
    import reftlens as rl

    bridge, model, tokenizer = architectures.bridge("llama", torch.float64), plain("llama"), architectures.tokenizer()
    texts, reft = ["the cat sat on", "a dog ran by the mat", "the moon"], edit()
    batch = rl.encode_prompts(bridge, texts)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    pipe.tokenizer.padding_side = "left"
    starts = ["<bos>" + text for text in texts]
    with attached(reft, model):
        for size in (1, 3):
            made = pipe(starts, batch_size=size, max_new_tokens=NEW, do_sample=False, return_tensors=True)
            rows = [each[0]["generated_token_ids"] for each in made]
            assert_same([row[-NEW:] for row in rows], [ids for ids in ours(reft, "llama", batch)])
