"""A batch is used with the model whose tokens it holds, and `on` acts on the tokens of its batch alone."""

import copy

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import architectures as A
import reftlens as rl
from reftlens import generation

TEXTS = ["the cat sat on the mat and looked", "a dog", "the moon"]


@pytest.fixture
def reft():
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(A.D, rank=2)})
    reft.reset(0)
    return reft


@pytest.fixture
def batch(llama):
    return rl.encode_prompts(llama, TEXTS)


def left_padded(batch, wider=0):
    rows = [tokens[real].tolist() for tokens, real in zip(batch.tokens, batch.attention_mask, strict=True)]
    width = batch.tokens.shape[1] + wider
    return torch.tensor([[2] * (width - len(row)) + row for row in rows])


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        (left_padded, r"row 1 has '<pad>' at column 0, and the batch '<bos>' \(it is padded on the right\)"),
        (lambda b: left_padded(b, wider=2), r"tokens of shape \[3, 11\], and the batch has \[3, 9\]"),
        (lambda b: b.tokens.flip(0), "row 0 has ' moon' at column 2, and the batch ' cat'"),
        (lambda b: b.tokens[:2], r"tokens of shape \[2, 9\], and the batch has \[3, 9\]"),
        (lambda b: torch.where(b.attention_mask, b.tokens + 1, b.tokens), "row 0 has"),
    ],
    ids=["left", "wider", "other rows", "fewer rows", "other ids"],
)
def test_on_refuses_other_tokens_than_those_of_its_batch(llama, reft, batch, tokens, error):
    with pytest.raises(ValueError, match=error), torch.no_grad(), reft.on(llama, batch):
        llama(tokens(batch), return_type="logits")


def test_on_takes_whatever_stands_at_padding_and_leaves_nothing_behind(llama, reft, batch):
    other = torch.where(batch.attention_mask, batch.tokens, 7)
    with torch.no_grad(), reft.on(llama, batch):
        logits = [llama(t, attention_mask=batch.attention_mask.long()) for t in (batch.tokens, other)]
    assert torch.equal(*(x[batch.attention_mask] for x in logits))
    llama(left_padded(batch))
    assert not any(point.fwd_hooks for point in llama.hook_dict.values())


def calls(reft, model, data):
    yield lambda: rl.fit(reft, model, data, steps=1, progress=False)
    yield lambda: rl.evaluate(reft, model, data, progress=False)
    yield lambda: rl.activations(model, data, rl.resid_post(1, "last"), progress=False)
    yield lambda: rl.generate(reft, model, data, rl.Decoding(max_new_tokens=1))
    yield lambda: generation.prefill(reft, model, data)
    yield lambda: reft.on(model, data).__enter__()


def test_a_batch_of_another_tokenizer_is_refused(llama, reft):
    other = A.train_tokenizer(["zebra quick fox jumped lazily"] * 5, 320)
    foreign = TransformerBridge.boot_transformers(A.NAMES["llama"], hf_model=A.hf_model("llama"), tokenizer=other)
    data = rl.encode(foreign.eval(), [rl.Example("the quick fox", " jumped")] * 2)
    for call in calls(reft, llama, data):
        with pytest.raises(ValueError, match="encoded with another tokenizer than the model's"):
            call()
    own = rl.encode(llama, [rl.Example("the cat", " sat")] * 2)
    exchange = rl.ReFT({rl.resid_post(1, "last"): rl.Interchange(A.D)})
    with pytest.raises(ValueError, match="source 'source' was encoded with another tokenizer"):
        rl.evaluate(exchange, llama, own.with_sources(data), progress=False)


def test_a_copy_of_the_tokenizer_is_the_same_vocabulary(llama, reft):
    twin = A.fresh_bridge("llama")
    twin.tokenizer = copy.deepcopy(llama.tokenizer)
    data = rl.encode(twin, [rl.Example("the cat", " sat")] * 2)
    for call in list(calls(reft, llama, data))[:-1]:
        call()


def test_ids_without_an_embedding_are_refused_where_they_are_made_and_where_they_are_used(llama, reft):
    larger = A.fresh_bridge("llama")
    larger.tokenizer = copy.deepcopy(llama.tokenizer)
    larger.tokenizer.add_tokens(["<new>"])
    rows = len(llama.tokenizer)
    message = rf"row 1 of .* holds token {rows} \('<new>'\), and the model has embeddings for 0 to {rows - 1}.*resize"
    with pytest.raises(ValueError, match=message):
        rl.encode(larger, [rl.Example("the cat", " sat"), rl.Example("the <new>", " sat")])
    with pytest.raises(ValueError, match=message):
        rl.encode_prompts(larger, ["the cat", "the <new>"])
    rl.encode(larger, [rl.Example("the cat", " sat")])
    data = rl.encode(llama, [rl.Example("the cat", " sat")] * 2)
    data.tokens[1, 2] = rows
    data = data[:]
    for call in calls(reft, llama, data):
        with pytest.raises(ValueError, match=f"row 1 of .* holds token {rows}"):
            call()


def test_data_without_rows_are_refused_by_everything_that_takes_data(llama, reft, batch):
    for use in (
        lambda: rl.evaluate(reft, llama, batch[:0], progress=False),
        lambda: rl.activations(llama, batch[:0], rl.resid_post(1, "last"), progress=False),
        lambda: generation.prefill(reft, llama, batch[:0]),
        lambda: rl.generate(None, llama, batch[:0]),
    ):
        with pytest.raises(ValueError, match="there is no row in"):
            use()


def test_a_row_beyond_the_learned_positions_is_refused_and_one_within_them_is_not(gpt2):
    def example(words):
        return [rl.Example("b", "c"), rl.Example("a " * words, "b")]

    assert rl.encode(gpt2, example(60), max_length=500).tokens.shape[1] < 160
    with pytest.raises(ValueError, match=r"row 1 of the examples has 204 tokens, and the model has positions for 160"):
        rl.encode(gpt2, example(200), max_length=500)
