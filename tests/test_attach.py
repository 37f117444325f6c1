"""Whatever writes with an edited transformers model writes what `generate` writes on a bridge."""

import pytest
import torch
import transformers
from attaching import (
    KINDS,
    LENGTHS,
    NEW,
    PAD,
    assert_same,
    attached,
    bridge,
    edit,
    left,
    ours,
    plain,
    prompts,
    quiet,
    theirs,
)

import architectures

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
    whole, other = batch_from_rows(ids, roles, tokenizer=batch.tokenizer), bridge("llama")
    with torch.no_grad(), reft.on(other, whole):
        full = other(whole.tokens, attention_mask=whole.attention_mask.long())
    for i, row in enumerate(logits):
        n = LENGTHS[i // 2]
        assert (full[i, n - 1 : n + NEW - 1].float() - row).abs().max() < 1e-5  # norms and logits are float32


def test_the_pipeline_of_transformers_writes_what_generate_writes():
    import reftlens as rl

    model, tokenizer = plain("llama"), architectures.tokenizer()
    texts, reft = ["the cat sat on", "a dog ran by the mat", "the moon"], edit()
    batch = rl.encode_prompts(bridge("llama"), texts)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    pipe.tokenizer.padding_side = "left"
    starts = ["<bos>" + text for text in texts]
    with attached(reft, model):
        for size in (1, 3):
            made = pipe(starts, batch_size=size, max_new_tokens=NEW, do_sample=False, return_tensors=True)
            rows = [each[0]["generated_token_ids"] for each in made]
            assert_same([row[-NEW:] for row in rows], [ids for ids in ours(reft, "llama", batch)])


@pytest.mark.slow
def test_a_hundred_texts_of_the_default_model_differ_only_where_two_tokens_are_as_likely(smol):
    import reftlens as rl

    model = transformers.AutoModelForCausalLM.from_pretrained(smol.original_model.config.name_or_path).eval()
    tokenizer, P = smol.tokenizer, rl.positions
    starts = ["The capital of", "Once upon a time", "Give me a recipe for", "My favourite number is", "In the year"]
    ends = [" France", " there was", " cake", " 7 because", " 1969 the", "", " of all", " and", ", she said", ": a dog"]
    batch = rl.encode_prompts(smol, [a + b + c for a in starts for b in ends for c in ("", " then")])
    d = smol.cfg.d_model
    gate = rl.interventions.Threshold(torch.randn(d), 0.0, per="prompt")
    sites = {
        rl.resid_post(8, "f2+l2"): rl.LoReFT(d, 4),
        rl.resid_post(12, "all"): rl.interventions.Gated(rl.LoReFT(d, 4), gate),
        rl.resid_post(16, P.Response() >> P.First(4)): rl.SteeringVector(d, torch.randn(d)),
        rl.resid_pre(20, P.Written(" the")): rl.SteeringVector(d, torch.randn(d)),
    }
    reft, new = rl.ReFT(sites).eval(), 12
    expected = rl.generate(reft, smol, batch, rl.Decoding(max_new_tokens=new), keep_logits=True)
    tokens, mask = left(batch)
    tied = 0
    with rl.attach(reft, model, tokenizer=tokenizer):
        for cached in (True, False):
            written = theirs(model, tokens, mask, max_new_tokens=new, use_cache=cached)
            for row, ids, logits in zip(written, expected.ids, expected.logits, strict=True):
                step = next((i for i, (a, b) in enumerate(zip(row, ids, strict=False)) if a != b), None)
                if step is not None:
                    top = logits[step].topk(2).values
                    assert top[0] - top[1] < 1e-3
                    tied += 1
    assert len(batch) == 100 and tied <= 4
