"""Positions by role: the tokens of a message are those that carry it, whatever the template writes around it."""

import copy
import json

import pytest
import torch
from jaxtyping import TypeCheckError

import architectures as A
import reftlens as rl
from reftlens.text.positions import Role, Tokens
from reftlens.text.positions.spelling import positions_from_dict

CHATS = [
    [
        {"role": "system", "content": "be kind 🍕"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "user"},
        {"role": "user", "content": "user:user  \n\n a dog 🍕"},
    ],
    "user",
    [
        {"role": "user", "content": " \n the moon"},
        {"role": "assistant", "content": "é"},
        {"role": "user", "content": "a"},
    ],
]
THINKING = A.TEMPLATE.replace("m['content'] }}", "m['content'].split('</think>')[-1] | trim }}")


def _said(prompt, role):
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [turn["content"] for turn in turns if turn["role"] == role]


def _text(batch, mask, row):
    return batch.tokenizer.decode(batch.tokens[row][mask[row]])


def _templated(template):
    twin = copy.copy(A.bridge("llama"))
    twin.tokenizer = copy.deepcopy(twin.tokenizer)
    twin.tokenizer.chat_template = template
    return twin


@pytest.mark.parametrize("turn", [None, 0, 1, -1, -2])
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_the_tokens_of_a_message_spell_it(llama, role, turn):
    """Also where a message says what the template says, and with white space at its ends."""
    batch = rl.encode_prompts(llama, CHATS, chat=True)
    mask = Role(role, turn, missing="skip").mask(batch.view)
    for row, chat in enumerate(CHATS):
        said = _said(chat, role)
        wanted = said if turn is None else said[turn:][:1] if -len(said) <= turn < len(said) else []
        assert _text(batch, mask, row) == "".join(wanted)


def test_what_the_template_writes_before_and_after_a_message(llama):
    batch = rl.encode_prompts(llama, CHATS, chat=True)

    def texts(*role):
        mask = Role(*role).mask(batch.view)
        return [_text(batch, mask, row) for row in range(3)]

    assert texts("user", 0, "before") == ["<end><turn>user:", "<bos><turn>user:", "<bos><turn>user:"]
    assert texts("user", -1, "before") == ["<end><turn>user:", "<bos><turn>user:", "<end><turn>user:"]
    assert texts("user", -1, "after") == ["<end><turn>assistant:"] * 3
    whole = Role("user", -1, "after")
    for role in ("user", "assistant", "system"):
        whole = whole | Role(role, missing="skip") | Role(role, part="before", missing="skip")
    assert torch.equal(whole.mask(batch.view), batch.prompt_mask), "the parts of all messages are the prompt"


ROLES = (
    Role("user", -1),
    Role("user", 0, "after"),
    Role("system", missing="skip"),
    Role("user") >> rl.positions.Last(),
)


@pytest.mark.parametrize("positions", ROLES, ids=str)
def test_padding_other_rows_slices_joins_and_completions_do_not_matter(llama, positions):
    examples = [rl.Example(chat, " ran by") for chat in CHATS]
    data, prompts = rl.encode(llama, examples, chat=True), rl.encode_prompts(llama, CHATS, chat=True)
    places = [row.nonzero().flatten().tolist() for row in positions.mask(data.view)]
    assert places == [row.nonzero().flatten().tolist() for row in positions.mask(prompts.view)]
    order = (data.attention_mask).long().argsort(dim=1, stable=True)
    left = data.rearranged(lambda x: x.gather(1, order))  # padding on the left
    assert torch.equal(positions.mask(left.right_padded().view), positions.mask(data.view))
    assert [int(m.sum()) for m in positions.mask(left.view)] == list(map(len, places))
    joined = rl.Batch.join([data[[2]], data[:2]])
    assert [row.nonzero().flatten().tolist() for row in positions.mask(joined.view)] == [places[2], *places[:2]]
    alone = [rl.encode(llama, [example], chat=True) for example in examples]
    assert [positions.mask(batch.view)[0].nonzero().flatten().tolist() for batch in alone] == places
    again = positions_from_dict(json.loads(json.dumps(positions.to_dict())))
    assert again == positions and torch.equal(again.mask(data.view), positions.mask(data.view))


@pytest.mark.parametrize("positions", ROLES[:2], ids=str)
def test_generation_edits_the_message_as_the_teacher_forced_forward_does(gpt2, positions):
    """The prompts stand in one batch, are read on the cache, and go on in rows that end at different times."""
    reft = rl.ReFT({rl.resid_post(1, positions): rl.SteeringVector(A.D, torch.full((A.D,), 2.0))})
    prompts = rl.encode_prompts(gpt2, CHATS, chat=True)
    written = rl.generate(reft, gpt2, prompts, rl.Decoding(max_new_tokens=4), keep_logits=True)
    mask = positions.mask(prompts.view)
    for row, ids in enumerate(written.prompt_ids):
        marks = written.edited[row]
        assert list(marks[: len(ids)]) == mask[row][prompts.prompt_mask[row]].tolist() and not any(marks[len(ids) :])
    batch = written.batch()
    with torch.no_grad(), reft.on(gpt2, batch):
        logits = gpt2(batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False)
    for row, ids in enumerate(written.prompt_ids):
        expected = logits[row, len(ids) - 1 : len(ids) - 1 + len(written.ids[row])]
        torch.testing.assert_close(written.logits[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("among", [Role("user", -1), Tokens("user")], ids=str)
def test_a_variant_among_what_only_the_prompts_hold_is_generated_with(among):
    """The check of the ways to compute writes on short prompts of its own, which hold no such message or text."""
    model, vector = A.fresh_bridge("llama"), torch.full((A.D,), 2.0)
    everywhere, there = (rl.ReFT({rl.resid_post(1, p): rl.SteeringVector(A.D, vector)}) for p in ("all", among))
    settings = rl.Decoding(max_new_tokens=4)
    narrowed = rl.generate(everywhere, model, CHATS[:2], settings, chat=True, variant=rl.Variant(among=among))
    expected = rl.generate(there, model, CHATS[:2], settings, chat=True)
    assert narrowed.ids == expected.ids and narrowed.edited == expected.edited


def test_a_shortened_prompt_has_the_messages_that_are_left(llama):
    chat = [{"role": "user", "content": "the cat sat on the mat and looked"}, {"role": "assistant", "content": "a"}]
    example = rl.Example([*chat, {"role": "user", "content": "the moon"}], " hill")
    length = rl.encode(llama, [example], chat=True).tokens.shape[1] - 3
    with pytest.warns(UserWarning, match="were cut"):
        batch = rl.encode(llama, [example], chat=True, truncate="prompt", max_length=length)
    first = _text(batch, Role("user", 0).mask(batch.view), 0)
    assert chat[0]["content"].endswith(first) and 0 < len(first) < len(chat[0]["content"])
    assert _text(batch, Role("user", -1).mask(batch.view), 0) == "the moon"


def test_a_template_that_drops_what_was_thought_keeps_its_messages_and_one_that_rewrites_is_refused():
    thought = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "<think>a dog</think>sat"},
        {"role": "user", "content": " ran "},
    ]
    batch = rl.encode_prompts(_templated(THINKING), [thought], chat=True)
    assert _text(batch, Role("assistant").mask(batch.view), 0) == "sat"
    assert _text(batch, Role("user", -1).mask(batch.view), 0) == "ran"
    upper = rl.encode_prompts(_templated(A.TEMPLATE.replace("m['content']", "m['content'] | upper")), CHATS, chat=True)
    with pytest.raises(ValueError, match=r"rewrites what is said in row\(s\) \[0, 1, 2\]; choose by Tokens"):
        Role("user").mask(upper.view)


def test_what_is_no_message_is_said(llama):
    batch = rl.encode_prompts(llama, CHATS, chat=True)
    with pytest.raises(ValueError, match=r"Role\(role='system'\): none in row\(s\) \[1, 2\]; pass missing=\"skip\""):
        Role("system").mask(batch.view)
    with pytest.raises(ValueError, match=r"is of chats, and these prompts are none: encode them with chat=True"):
        Role("user").mask(rl.encode_prompts(llama, ["the cat"]).view)
    with pytest.raises(ValueError, match="acts on the prompt only"):
        rl.positions.All() >> Role("user")
    with pytest.raises((ValueError, TypeCheckError), match="header"):
        Role("user", part="header")
    with pytest.raises((TypeError, TypeCheckError), match="role"):
        Role(3)


@pytest.mark.slow
def test_the_real_template_is_told_from_its_messages(smol):
    """Its tokenizer gives all but the first token of a character an empty span."""
    chats = [
        *CHATS[:2],
        [{"role": "user", "content": "the moon 🍕"}, {"role": "assistant", "content": "漢字"}, *CHATS[0][1:2]],
    ]
    batch = rl.encode_prompts(smol, chats, chat=True)
    for role in ("user", "assistant"):
        mask = Role(role, missing="skip").mask(batch.view)
        assert [_text(batch, mask, i) for i in range(3)] == ["".join(_said(chat, role)) for chat in chats]
    assert _text(batch, Role("user", -1, "after").mask(batch.view), 0) == "<|im_end|>\n<|im_start|>assistant\n"
