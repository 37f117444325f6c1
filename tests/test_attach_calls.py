"""What an edited transformers model is called with: padding, labels, caches of one's own, and what is refused."""

import threading

import pytest
import torch
from attaching import (
    LENGTHS,
    NEW,
    PAD,
    D,
    assert_same,
    attached,
    bridge,
    edit,
    fresh,
    leave,
    left,
    ours,
    plain,
    prompts,
    quiet,
    theirs,
)
from transformers import DynamicCache, GenerationConfig

import architectures


@pytest.fixture(autouse=True)
def _left():
    yield
    leave()


def whole(batch):
    """The rows with three tokens of a response after each."""
    from reftlens.text.batch import batch_from_rows
    from reftlens.text.view import TokenRole

    rows = [row[real].tolist() for row, real in zip(batch.tokens, batch.attention_mask, strict=True)]
    roles = [[int(TokenRole.PROMPT)] * len(row) + [int(TokenRole.RESPONSE)] * 3 for row in rows]
    letters = architectures.tokenizer()("a dog ran", add_special_tokens=False).input_ids
    both = [[*row, 9, *letters[i % 3 : i % 3 + 1], 7 + i] for i, row in enumerate(rows)]
    return batch_from_rows(both, roles, tokenizer=batch.tokenizer)


def bridged(reft, architecture, batch):
    model = bridge(architecture)
    with torch.no_grad(), reft.on(model, batch):
        return model(batch.tokens, attention_mask=batch.attention_mask.long())[batch.attention_mask]


def close(one, other):
    assert one.shape == other.shape and (one - other).abs().max() < 1e-5  # norms, rotations and softmax are float32


# -- one call ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f2+l2", "prompt", "mixed", "gate per prompt", "schedule"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3"])
def test_what_labels_leave_out_at_the_beginning_is_the_prompt(architecture, kind):
    reft, batch, model = edit(kind), whole(prompts()), plain(architecture)
    labels = batch.tokens.masked_fill(~batch.view.written, -100)
    expected = bridged(reft, architecture, batch)
    attachment = attached(reft, model)
    with torch.no_grad():
        out = model(batch.tokens, attention_mask=batch.attention_mask.long(), labels=labels)
        close(out.logits[batch.attention_mask], expected)
        tokens, mask = left(batch)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        begins = mask.argmax(dim=1)[:, None] + torch.tensor(LENGTHS)[:, None]
        labels = tokens.masked_fill(torch.arange(tokens.shape[1]) < begins, -100)
        padded = model(tokens, attention_mask=mask, position_ids=positions, labels=labels).logits
        close(padded[mask.bool()], expected)
    quiet(attachment)


def test_labels_from_the_first_token_on_leave_no_prompt_to_edit():
    batch, model = prompts(), plain("llama")
    labels = batch.tokens.masked_fill(~batch.attention_mask, -100)
    with pytest.raises(ValueError, match=r"chooses no token in any of 6 row"), attached(edit("last"), model):
        model(batch.tokens, attention_mask=batch.attention_mask.long(), labels=labels)


@pytest.mark.parametrize("side", ["left", "right"])
def test_lengths_of_prompts_are_told_for_the_calls_of_a_block(side):
    reft, batch, model = edit(), whole(prompts()), plain("llama")
    lengths = list(LENGTHS)
    tokens, mask = left(batch) if side == "left" else (batch.tokens, batch.attention_mask.long())
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    attachment = attached(reft, model)
    with torch.no_grad(), attachment.prompts(lengths):
        logits = model(tokens, attention_mask=mask, position_ids=positions).logits[mask.bool()]
        close(logits, bridged(reft, "llama", batch))
        with pytest.raises(ValueError, match=r"were said to have .* rows of"):
            model(tokens[:2], attention_mask=mask[:2])
    with torch.no_grad():
        everything = model(tokens, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    quiet(attachment)
    assert (everything - logits).abs().max() > 1e-2


def test_lengths_of_prompts_hold_for_what_is_read_in_several_calls():
    reft, batch, model = edit(), whole(prompts(2)), plain("gpt2")
    row = batch.tokens[:1, : LENGTHS[0] + 3]
    attachment = attached(reft, model)
    with torch.no_grad(), attachment.prompts([LENGTHS[0]]):
        first = model(row[:, : LENGTHS[0]], use_cache=True)
        rest = model(row[:, LENGTHS[0] :], past_key_values=first.past_key_values).logits[0]
        close(torch.cat([first.logits[0], rest]), bridged(reft, "gpt2", batch[[0]]))
        with pytest.raises(ValueError, match="were said to have"):
            model(row[:, :5])
    quiet(attachment)


def test_loss_of_the_trainer_is_that_of_the_edited_bridge(tmp_path):
    from transformers import Trainer, TrainingArguments

    reft, batch, model = edit(), whole(prompts()), fresh()
    rows = [
        {"input_ids": ids[: n + 3].tolist(), "labels": [-100] * n + ids[n : n + 3].tolist()}
        for ids, n in zip(batch.tokens, LENGTHS, strict=True)
    ]

    def collated(some):
        from torch.nn.utils.rnn import pad_sequence

        names = {"input_ids": PAD, "labels": -100}
        padded = {k: pad_sequence([torch.tensor(r[k]) for r in some], True, v) for k, v in names.items()}
        lengths = torch.tensor([len(r["labels"]) for r in some])
        return padded | {"attention_mask": (torch.arange(padded["labels"].shape[1]) < lengths[:, None]).long()}

    settings = TrainingArguments(tmp_path, per_device_eval_batch_size=6, use_cpu=True, report_to=[])
    with attached(reft, model) as attachment:
        found = Trainer(model, settings, data_collator=collated, eval_dataset=rows).evaluate()["eval_loss"]
        quiet(attachment)
    logits = torch.zeros(*batch.tokens.shape, len(architectures.tokenizer()), dtype=torch.float64)
    logits[batch.attention_mask] = bridged(reft, "llama", batch)
    at = batch.predicting
    expected = torch.nn.functional.cross_entropy(logits[at], batch.tokens[batch.target_mask])
    assert abs(found - float(expected)) < 1e-5


# -- a loop of one's own -------------------------------------------------------------------------------------


def grown(model, tokens, mask, steps=NEW, change=None):
    """Greedy writing by hand; `change(cache, tokens, mask)` is called between steps."""
    out, begin = None, tokens.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            if out is None:
                out = model(tokens, attention_mask=mask, position_ids=positions, use_cache=True)
            else:
                cache = out.past_key_values
                out = model(tokens[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], past_key_values=cache)
            tokens = torch.cat([tokens, out.logits[:, -1].argmax(dim=-1)[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            if change is not None:
                tokens, mask = change(out.past_key_values, tokens, mask)
    return tokens[:, begin:].tolist()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_loop_of_ones_own_on_the_cache_writes_what_generate_writes(architecture):
    reft, batch, model = edit(), prompts(), plain(architecture)
    expected = ours(reft, architecture, batch)
    order = torch.tensor([3, 0, 5, 1, 2, 4])

    def moved(cache, tokens, mask):
        cache.reorder_cache(order)
        return tokens[order], mask[order]

    attachment = attached(reft, model)
    for ids, row in zip(expected, grown(model, *left(batch)), strict=True):
        assert row[: len(ids)] == list(ids)
    again, where = grown(model, *left(batch), change=moved), torch.arange(6)
    for _ in range(NEW):
        where = where[order]
    quiet(attachment)
    for i, row in zip(where.tolist(), again, strict=True):
        assert row[: len(expected[i])] == list(expected[i])


def test_a_cache_that_is_cut_and_read_on_is_followed():
    reft, batch, model = edit(), prompts(1), plain("llama")
    tokens, mask = left(batch)

    def tried(cache, tokens, mask):
        """A token that is taken back."""
        model(torch.full((1, 1), 77), past_key_values=cache)
        cache.crop(-1)
        return tokens, mask

    attachment = attached(reft, model)
    row = grown(model, tokens, mask, change=tried)[0]
    quiet(attachment)
    (ids,) = ours(reft, "llama", batch)
    assert row[: len(ids)] == list(ids)


def test_a_cache_that_the_attachment_has_not_followed_is_refused():
    import copy

    reft, batch, model = edit(), prompts(1), plain("llama")
    one, more = batch.tokens, torch.tensor([[7]])
    with torch.no_grad():
        before = model(one, use_cache=True).past_key_values
        attachment = attached(reft, model)
        seen = model(one, use_cache=True).past_key_values
        for cache in (before, copy.deepcopy(seen)):
            with pytest.raises(ValueError, match="filled before, elsewhere"):
                model(more, past_key_values=cache)
        with pytest.raises(ValueError, match=r"was called on 2 more tokens .*prompts"):
            model(torch.tensor([[7, 8]]), past_key_values=seen)
        seen.layers[-1].keys = seen.layers[-1].keys + 1
        with pytest.raises(ValueError, match="holds other tokens"):
            model(more, past_key_values=seen)
        seen = model(one, use_cache=True).past_key_values
        seen.crop(-4)
        with pytest.raises(ValueError, match="cut within a prompt"):
            model(more, past_key_values=seen)
        quiet(attachment)


def test_masks_that_change_or_are_left_out_between_steps_are_refused():
    reft, batch, model = edit(), prompts(2), plain("llama")
    (tokens, mask), more = left(batch), torch.tensor([[7], [8]])
    with torch.no_grad():
        attachment = attached(reft, model)
        cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="without their attention mask"):
            model(more, past_key_values=cache)
        with pytest.raises(ValueError, match="another one than when they were read"):
            model(more, past_key_values=cache, attention_mask=torch.ones(2, tokens.shape[1] + 1))
        with pytest.raises(ValueError, match=r"attention mask is \[2, 1\], expected \[2, 10\]"):
            model(more, past_key_values=cache, attention_mask=torch.ones(2, 1))
        quiet(attachment)


# -- generate ------------------------------------------------------------------------------------------------


def test_assisted_generation_and_an_empty_cache_of_ones_own_write_the_same():
    reft, batch, model = edit(), prompts(1), plain("llama")
    expected, one = ours(reft, "llama", batch), batch.tokens
    draft, mask = architectures.hf_model("llama", seed=1).double(), torch.ones_like(one)
    with attached(reft, model) as attachment:
        assert_same(theirs(model, one, mask, assistant_model=draft), expected)
        assert_same(theirs(model, one, mask, prompt_lookup_num_tokens=3), expected)
        assert_same(theirs(model, one, mask, past_key_values=DynamicCache()), expected)
        assert_same([model.generate(input_ids=one, max_new_tokens=NEW)[0, one.shape[1] :].tolist()], expected)
        quiet(attachment)


REFUSED = [
    ({"cache_implementation": "static"}, "StaticCache.*use_cache=False"),
    ({"prefill_chunk_size": 4}, "prompts of 17 tokens and reads 4 .*prefill_chunk_size"),
    ({"guidance_scale": 1.5}, "guidance_scale reads other prompts"),
    ({"generation_config": GenerationConfig(guidance_scale=1.5)}, "guidance_scale reads other prompts"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=str)
def test_what_generate_cannot_be_followed_in_is_refused(settings, message):
    model, (tokens, mask) = plain("llama"), left(prompts())
    with pytest.raises(ValueError, match=message), attached(edit(), model) as attachment:
        try:
            theirs(model, tokens, mask, **settings)
        finally:
            quiet(attachment)


def test_prompts_padded_on_the_right_and_a_cache_of_an_earlier_turn_are_refused():
    model, batch = plain("llama"), prompts()
    attachment = attached(edit(), model)
    with pytest.raises(ValueError, match="pad on the left"):
        theirs(model, batch.tokens, batch.attention_mask.long())
    one, cache = batch.tokens[:1, :9], DynamicCache()
    out = model.generate(one, past_key_values=cache, max_new_tokens=3, eos_token_id=[])
    with pytest.raises(ValueError, match=r"in another generate.*without past_key_values"):
        model.generate(torch.cat([out, one], dim=1), past_key_values=cache, max_new_tokens=3)
    with pytest.raises(ValueError, match="without input_ids"):
        model.generate(inputs_embeds=model.get_input_embeddings()(one), max_new_tokens=3)
    quiet(attachment)


CALLS = [
    (lambda x: {"attention_mask": torch.zeros(1, 1, 9, 9)}, r"pass \[batch, seq\]"),
    (lambda x: {"attention_mask": torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]])}, "other numbers than 0 and 1"),
    (lambda x: {"attention_mask": torch.ones(1, 8)}, r"is \[1, 8\], expected \[1, 9\]"),
    (lambda x: {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}, "several texts in one row.*position_ids"),
    (lambda x: {"cu_seq_lens_q": torch.tensor([0, 4, 9])}, "several texts in one row.*cu_seq_lens_q"),
]


@pytest.mark.parametrize(("call", "message"), CALLS, ids=range(len(CALLS)))
def test_a_call_that_does_not_show_which_token_is_what_is_refused(call, message):
    model, one = plain("llama"), prompts(1).tokens
    with pytest.raises(ValueError, match=message), attached(edit("last"), model):
        model(one, **call(one))


def test_two_threads_write_at_once():
    reft, batch, model = edit(), prompts(), plain("llama")
    expected, (tokens, mask), found = ours(reft, "llama", batch), left(batch), {}

    def write(rows):
        found[rows.start] = theirs(model, tokens[rows], mask[rows])

    with attached(reft, model) as attachment:
        threads = [threading.Thread(target=write, args=(rows,)) for rows in (slice(0, 3), slice(3, 6))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        quiet(attachment)
    assert_same(found[0] + found[3], expected)


def test_hidden_states_that_transformers_records_are_those_that_were_edited():
    import reftlens as rl

    for before in (True, False):
        model, one, vector = fresh(), prompts(1).tokens, torch.ones(D)
        reft = rl.ReFT({rl.resid_post(1, "all"): rl.SteeringVector(D, vector)}).double().eval()
        with torch.no_grad():
            base = fresh()(one, output_hidden_states=True)
            _ = model(one, output_hidden_states=before)
            with attached(reft, model):
                states = model(one, output_hidden_states=True).hidden_states
            assert (states[2] - base.hidden_states[2] - 1).abs().max() < 1e-12
            assert torch.equal(model(one, output_hidden_states=True).hidden_states[2], base.hidden_states[2])


def test_a_generate_that_goes_past_the_attachment_is_refused():
    import reftlens as rl

    model = fresh()
    kept, (ids, mask) = model.generate, left(prompts())
    settings = dict(attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=False, pad_token_id=PAD)
    before = model.generate(ids, **settings)
    with rl.attach(edit(), model, tokenizer=architectures.tokenizer()):
        edited = model.generate(ids, **settings)
        for past in (lambda: type(model).generate(model, ids, **settings), lambda: kept(ids, **settings)):
            with pytest.raises(ValueError, match=r"generate was called past rl.attach, .*: call model.generate"):
                past()
        assert torch.equal(model.generate(ids, **settings), edited)
    assert torch.equal(kept(ids, **settings), before) and not torch.equal(edited, before)
