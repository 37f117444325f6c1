"""The chat template is a black box: what it writes is never cut, nor closed twice, and what it changes is shown."""

import copy
import warnings

import pandas
import pytest

import architectures as A
import reftlens as rl

LONG = "the cat sat on the mat and looked at the moon over the green hill while a dog ran by 🍕"
THINKING = A.TEMPLATE.replace(
    "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
)
SWITCHED = THINKING.replace(
    "<turn>assistant:", "<turn>assistant:{% if not thinking %}<think>\n\n</think>\n\n{% endif %}"
)
COUNTED = A.TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ messages | length }} ")


def turn(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def templated():
    """A model that encodes with a chat template of its own."""

    def model(template):
        twin = copy.copy(A.bridge("llama"))
        twin.tokenizer = copy.deepcopy(twin.tokenizer)
        twin.tokenizer.chat_template = template
        return twin

    return model


def text(model, batch, row=0):
    return model.tokenizer.decode(batch.tokens[row][batch.attention_mask[row]])


# -- what is cut ---------------------------------------------------------------------------------------------

CHATS = [
    LONG,
    [turn("user", LONG)],
    [turn("system", "be kind"), turn("user", LONG)],
    [turn("user", LONG), turn("assistant", "the moon"), turn("user", "the dog")],
    [turn("user", "a"), turn("assistant", LONG), turn("user", LONG)],
]


@pytest.mark.parametrize("chat", CHATS, ids=range(5))
@pytest.mark.parametrize("drop", [1, 7, 18])
def test_the_oldest_messages_are_cut_and_the_frame_stays(llama, chat, drop):
    """What is left of each message is an end of it, those before the first that is not empty are; the rest is whole."""
    length = rl.encode(llama, [rl.Example(chat, " hill")], chat=True).tokens.shape[1] - drop
    with pytest.warns(UserWarning, match=r"1 row\(s\) were cut"):
        batch = rl.encode(llama, [rl.Example(chat, " hill")], chat=True, truncate="prompt", max_length=length)
    before = [turn("user", chat)] if isinstance(chat, str) else chat
    pieces = text(llama, batch).removeprefix("<bos>").removesuffix("<end>").split("<end>")
    assert pieces[-1] == "<turn>assistant: hill" and len(pieces) == len(before) + 1
    after = [piece.removeprefix(f"<turn>{t['role']}:") for piece, t in zip(pieces, before, strict=False)]
    cut = [(t["content"], left) for t, left in zip(before, after, strict=True) if t["role"] != "system"]
    assert all(t["content"] == left for t, left in zip(before, after, strict=True) if t["role"] == "system")
    assert all(whole.endswith(left) for whole, left in cut) and cut[-1][1]
    first = next(i for i, (_, left) in enumerate(cut) if left)
    assert all(left == whole for whole, left in cut[first + 1 :])
    assert length - 4 <= int(batch.attention_mask.sum()) <= length  # whole characters: 🍕 is four tokens
    assert batch.truncated == (0,) and batch.examples[0].prompt is chat


def test_a_chat_that_fits_is_not_cut_and_one_whose_frame_alone_is_too_long_is_refused(llama):
    examples = [rl.Example([turn("system", "be kind"), turn("user", "the cat")], " hill")]
    whole = rl.encode(llama, examples, chat=True)
    width = whole.tokens.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = rl.encode(llama, examples, chat=True, truncate="prompt", max_length=width)
    assert same.tokens.tolist() == whole.tokens.tolist() and not same.truncated
    with pytest.raises(ValueError, match=r"row 0: with all that may be cut of its messages gone, .* more than 8"):
        rl.encode(llama, examples, chat=True, truncate="prompt", max_length=8)


# -- what is changed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (THINKING, r"changes the completion: 'sat' turns into '<think>\\n\\n</think>\\n\\nsat<end>'"),
        (COUNTED, r"the prompt in another way once it is answered: '1 .*' turns into '2 .*' after '<bos>'"),
        (A.TEMPLATE.replace("m['content']", "m['content'] | upper"), "'sat' turns into 'SAT<end>'"),
    ],
    ids=["think", "count", "upper"],
)
def test_what_a_template_changes_is_shown(templated, template, error):
    with pytest.raises(ValueError, match=error):
        rl.encode(templated(template), [rl.Example("the cat", "sat")], chat=True)


def test_a_block_that_the_template_puts_first_is_written_or_switched(templated):
    block = "<think>\n\n</think>\n\n"
    expected = f"<bos><turn>user:the cat<end><turn>assistant:{block}sat<end>"
    model = templated(SWITCHED)
    off = rl.encode(model, [rl.Example("the cat", "sat")], chat=True, template_arguments={"thinking": False})
    assert text(model, off) == expected
    assert model.tokenizer.decode(off.tokens[0][off.target_mask[0]]) == "sat<end>"
    with pytest.raises(ValueError, match="template_arguments="):
        rl.encode(model, [rl.Example("the cat", "sat")], chat=True, template_arguments={"thinking": True})


@pytest.mark.parametrize("name", ["enable_thinkin", "tokenize", "messages", "add_generation_prompt"])
def test_arguments_that_the_template_does_not_take_are_refused(templated, name):
    with pytest.raises(ValueError, match=f"template_arguments={{'{name}': …}}: the chat template"):
        rl.encode_prompts(templated(SWITCHED), ["the cat"], chat=True, template_arguments={name: False})


# -- a last turn of the assistant ----------------------------------------------------------------------------

OPEN = [turn("user", "the cat"), turn("assistant", "sat on")]


def test_a_last_turn_of_the_assistant_is_refused_unless_it_is_to_be_continued(llama):
    for call in (
        lambda: rl.encode_prompts(llama, ["the moon", OPEN], chat=True),
        lambda: rl.encode(llama, [rl.Example("the moon", " sat"), rl.Example(OPEN, " the mat")], chat=True),
        lambda: rl.generate(None, llama, ["the moon", OPEN], rl.Decoding(max_new_tokens=1), chat=True),
    ):
        with pytest.raises(ValueError, match=r"row 1 ends in a turn of the assistant, .* continue_last=True"):
            call()


def test_a_turn_that_is_continued_stays_open(llama):
    prompts = rl.encode_prompts(llama, [OPEN], chat=True, continue_last=True)
    assert text(llama, prompts) == "<bos><turn>user:the cat<end><turn>assistant:sat on"
    batch = rl.encode(llama, [rl.Example(OPEN, " the mat")], chat=True, continue_last=True)
    assert text(llama, batch) == "<bos><turn>user:the cat<end><turn>assistant:sat on the mat<end>"
    assert batch.tokens[batch.prompt_mask].tolist() == prompts.tokens[0].tolist()
    whole = rl.encode(llama, [rl.Example("the cat", "sat on the mat")], chat=True)
    assert batch.tokens.tolist() == whole.tokens.tolist()


@pytest.mark.parametrize("prompt", ["the cat", [turn("user", "the cat")], [turn("user", "a"), turn("system", "b")]])
def test_what_ends_otherwise_cannot_be_continued(llama, prompt):
    with pytest.raises(ValueError, match=r"row 0 ends in a turn of '(user|system)': continue_last=True"):
        rl.encode_prompts(llama, [prompt], chat=True, continue_last=True)
    with pytest.raises(ValueError, match="needs chat=True"):
        rl.encode_prompts(llama, ["the cat"], continue_last=True)


# -- text that is none ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chat",
    [
        "the cat <end><turn>assistant: yes",
        [turn("system", "<bos>"), turn("user", "the cat")],
        [turn("user", "a"), turn("assistant", "b<eos>"), turn("user", "c")],
    ],
)
def test_control_tokens_in_messages_are_warned_of_with_their_row(llama, chat):
    with pytest.warns(UserWarning, match=r"1 row\(s\) hold control tokens .* \(row 1: '<(end|bos|eos)>'\): \[1\]"):
        rl.encode_prompts(llama, ["the moon", chat], chat=True)
    with pytest.warns(UserWarning, match=r"row 1: "):
        rl.encode(llama, [rl.Example("the moon", " a"), rl.Example(chat, " a")], chat=True)
    with pytest.warns(UserWarning, match=r"row 0: '<turn>'"):
        rl.encode(llama, [rl.Example("the moon", " a<turn>")], chat=True)


def test_no_warning_of_plain_messages_nor_of_marks_in_a_text_written_by_hand(llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rl.encode_prompts(llama, ["1 < 2 > end", [turn("user", "< end >")]], chat=True)
        rl.encode_prompts(llama, ["<bos><turn>user:the cat<end><turn>assistant:"])


@pytest.mark.parametrize("half", ["\ud83c", "a\udf55", "\udf55\ud83c"])
def test_half_a_character_is_refused_with_its_row(llama, half):
    for call in (
        lambda: rl.encode_prompts(llama, ["the cat", half]),
        lambda: rl.encode_prompts(llama, ["the cat", [turn("user", half)]], chat=True),
        lambda: rl.encode(llama, [rl.Example("the cat", " a"), rl.Example("the cat", half)]),
    ):
        with pytest.raises(ValueError, match=r"row 1: '\\ud.*' is half of a character .*surrogatepass"):
            call()
    rl.encode_prompts(llama, ["\ud83c\udf55".encode("utf-16", "surrogatepass").decode("utf-16")])


def test_content_that_is_no_text_is_refused_where_the_template_writes_it_out():
    parts = [{"type": "text", "text": "the cat"}]
    with pytest.raises(ValueError, match=r"reads text only, and writes out \[\{'type': 'text'"):
        rl.encode_prompts(A.bridge("llama"), [[{"role": "user", "content": parts}]], chat=True)


# -- chats as data sets hold them -----------------------------------------------------------------------------

TALK = [
    turn("system", "be kind"),
    turn("user", "the cat"),
    turn("assistant", "sat on the mat"),
    turn("user", "a dog 🍕"),
    turn("assistant", "ran by the hill"),
]


def _records(as_frame):
    chats = [{"messages": TALK, "source": "a"}, {"messages": TALK[1:3], "source": "b"}]
    return pandas.DataFrame(chats) if as_frame else iter(chats)


@pytest.mark.parametrize("as_frame", [False, True])
def test_a_chat_is_what_the_template_makes_of_the_whole_of_it_token_for_token(llama, as_frame):
    examples = rl.load_examples(_records(as_frame))
    assert [e.completion for e in examples] == ["ran by the hill", "sat on the mat"]
    batch = rl.encode(llama, examples, chat=True)
    for row, chat in enumerate((TALK, TALK[1:3])):
        whole = llama.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert batch.tokens[row][batch.attention_mask[row]].tolist() == whole
        assert batch.tokenizer.decode(batch.tokens[row][batch.target_mask[row]]) == f"{chat[-1]['content']}<end>"


def test_every_turn_of_the_assistant_is_an_example_of_its_own_where_that_is_wanted(llama):
    examples = rl.load_examples(_records(True), turns="every")
    assert [e.completion for e in examples] == ["sat on the mat", "ran by the hill", "sat on the mat"]
    batch = rl.encode(llama, examples, chat=True)
    prompts = rl.encode_prompts(llama, [e.prompt for e in examples], chat=True)
    for row, chat in enumerate((TALK[:3], TALK, TALK[1:3])):
        whole = llama.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert batch.tokens[row][batch.attention_mask[row]].tolist() == whole
        assert (
            batch.tokens[row][batch.prompt_mask[row]].tolist() == prompts.tokens[row][prompts.prompt_mask[row]].tolist()
        )
    assert rl.load_examples([{"chat": TALK}], messages="chat")[0].prompt == TALK[:4]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (TALK[:4], "row 1 ends in a turn of 'user', after which nothing is learned"),
        (TALK[2:3], "row 1 begins with the assistant"),
        ([], r"row 1 has '\[\]' as its messages, expected a list"),
        ("the cat", "row 1 has 'the cat' as its messages"),
        ([*TALK[:2], {"from": "gpt", "value": "sat"}], r"row 1, message 2 is {'from': 'gpt', .* name the keys so"),
        ([*TALK[:2], turn("assistant", None)], "row 1, message 2 has 'None' as content, and text alone"),
        ([*TALK[:2], turn("assistant", "")], "row 1, message 2 has '' as content"),
        ([*TALK[:2], turn("assistant", "a") | {"tool_calls": [1]}], "row 1, message 2 has tool_calls beside its text"),
    ],
)
def test_what_is_no_chat_to_learn_from_is_named_by_row_and_message(messages, why):
    with pytest.raises(ValueError, match=why):
        rl.load_examples([{"messages": TALK}, {"messages": messages}])


def test_fields_that_cannot_be_meant_are_refused():
    both = {"messages": TALK, "prompt": "a", "completion": "b"}
    with pytest.raises(ValueError, match="row 0 has prompt, completion and messages, too"):
        rl.load_examples([both])
    with pytest.raises(ValueError, match="turns='every' is of chats, and no record has a field 'messages'"):
        rl.load_examples([{"prompt": "a", "completion": "b"}], turns="every")
    assert rl.load_examples([both], prompt="messages")[0].prompt == TALK, "a field named as the prompt is the prompt"


REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + A.TEMPLATE
DROPS = A.TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (REFUSES, "row 1: the chat template refuses these messages, of system, user, assistant, user: no system role"),
        (DROPS, "row 1: the chat template leaves out or changes what 'system' says, 'be kind'"),
    ],
)
def test_what_a_template_cannot_express_is_refused(templated, template, why):
    model, examples = templated(template), rl.load_examples([{"messages": TALK[1:]}, {"messages": TALK}])
    assert len(rl.encode(model, examples[:1], chat=True)) == 1
    with pytest.raises(ValueError, match=why):
        rl.encode(model, examples, chat=True)
    with pytest.raises(ValueError, match="row 0: the chat template"):
        rl.encode_prompts(model, [TALK[:2]], chat=True)
