"""Laws of examples and batches: what the tokens of a row are, which are learned, and which rows are refused."""

import copy
import json
import random
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from jaxtyping import TypeCheckError

import architectures

PAD, PROMPT, RESPONSE = 0, 1, 2
DATA = Path(__file__).parents[1] / "data"
PAIRS = [
    ("the cat sat", " on the mat"),
    ("a dog", " ran by the 🍕 hill, 漢字 and é"),
    ("the moon\n", "over\n\nthe hill"),
    ("x", " y"),
    ("the cat sat on the mat and looked at", " the moon"),
]


@pytest.fixture
def rl():
    import reftlens

    return reftlens


class Retokenised:
    """As much of a bridge as encoding needs, with a tokenizer of its own; the model itself stays as it is."""

    training = False

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.cfg = model, tokenizer, model.cfg
        self.hook_dict, self.original_model = model.hook_dict, model.original_model

    def check_hooks_to_add(self, hook_point, hook_point_name, hook):
        self.model.check_hooks_to_add(hook_point, hook_point_name, hook)

    def __call__(self, *args):
        return self.model(*args)


def with_tokenizer(model, **changes):
    """The same model with a changed copy of its tokenizer."""
    tokenizer = copy.deepcopy(model.tokenizer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return Retokenised(model, tokenizer)


@pytest.fixture
def bare(gpt2):
    """A bridge whose tokenizer adds no BOS (TransformerLens switches it on where there is a BOS token)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(architectures.tokenizer().name_or_path)
    assert tokenizer("a").input_ids[0] != tokenizer.bos_token_id
    return Retokenised(gpt2, tokenizer)


def examples(rl):
    return [rl.Example(prompt, completion) for prompt, completion in PAIRS]


def row_ids(batch, row=0):
    return batch.tokens[row][batch.attention_mask[row]].tolist()


def turns(prompt):
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


# -- the tokens of a row -------------------------------------------------------------------------------------


def test_a_row_is_the_text_as_transformerlens_tokenises_it_and_the_end(rl, gpt2):
    batch = rl.encode(gpt2, examples(rl))
    for row, (prompt, completion) in enumerate(PAIRS):
        assert row_ids(batch, row) == [*gpt2.to_tokens(prompt + completion)[0].tolist(), gpt2.tokenizer.eos_token_id]
    prompts = rl.encode_prompts(gpt2, [p for p, _ in PAIRS])
    for row, (prompt, _) in enumerate(PAIRS):
        assert row_ids(prompts, row) == gpt2.to_tokens(prompt)[0].tolist()
        assert prompts.prompt_mask[row].sum() == prompts.attention_mask[row].sum()
    assert not prompts.target_mask.any()


def test_a_chat_row_is_the_template_applied_once(rl, gpt2):
    batch = rl.encode(gpt2, examples(rl), chat=True)
    for row, (prompt, completion) in enumerate(PAIRS):
        conversation = [*turns(prompt), {"role": "assistant", "content": completion}]
        text = gpt2.tokenizer.apply_chat_template(conversation, tokenize=False)
        assert gpt2.tokenizer.decode(row_ids(batch, row)) == text
        assert row_ids(batch, row) == gpt2.tokenizer(text, add_special_tokens=False).input_ids
        assert text.count("<turn>user:") == text.count("<turn>assistant:") == 1


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_the_prompt_is_tokenised_as_it_will_be_at_generation(rl, gpt2, bare, chat, bos):
    model = gpt2 if bos else bare
    trained = rl.encode(model, examples(rl), chat=chat)
    generated = rl.encode_prompts(model, [p for p, _ in PAIRS], chat=chat)
    for row in range(len(PAIRS)):
        assert trained.tokens[row][trained.prompt_mask[row]].tolist() == row_ids(generated, row)


@pytest.mark.parametrize("chat", [False, True])
def test_the_targets_are_the_completion_and_its_end_and_nothing_else(rl, gpt2, chat):
    batch = rl.encode(gpt2, examples(rl), chat=chat)
    end = gpt2.tokenizer.convert_tokens_to_ids("<end>" if chat else "<eos>")
    assert torch.equal(batch.target_mask, batch.role == RESPONSE)
    for row, (_, completion) in enumerate(PAIRS):
        ids = batch.tokens[row][batch.target_mask[row]].tolist()
        assert ids[-1] == end and end not in ids[:-1]
        assert gpt2.tokenizer.decode(ids[:-1]) == completion
    unended = rl.encode(gpt2, examples(rl), chat=chat, end=False)
    for row, (_, completion) in enumerate(PAIRS):
        assert row_ids(unended, row) == row_ids(batch, row)[:-1]
        assert gpt2.tokenizer.decode(unended.tokens[row][unended.target_mask[row]].tolist()) == completion


def test_only_the_last_answer_of_a_conversation_is_learned(rl, gpt2):
    conversation = [
        {"role": "system", "content": "hill"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "the dog"},
    ]
    batch = rl.encode(gpt2, [rl.Example(conversation, "ran")], chat=True)
    decode = gpt2.tokenizer.decode
    assert decode(batch.tokens[0][batch.target_mask[0]].tolist()) == "ran<end>"
    assert decode(batch.tokens[0][batch.prompt_mask[0]].tolist()) == (
        "<bos><turn>system:hill<end><turn>user:the cat<end><turn>assistant:sat<end><turn>user:the dog<end>"
        "<turn>assistant:"
    )


def test_a_system_message_goes_in_front_and_never_twice(rl, gpt2):
    batch = rl.encode(gpt2, [rl.Example("the cat", "sat")], chat=True, system="hill")
    text = gpt2.tokenizer.decode(row_ids(batch))
    assert text == "<bos><turn>system:hill<end><turn>user:the cat<end><turn>assistant:sat<end>"
    own = [{"role": "system", "content": "moon"}, {"role": "user", "content": "the cat"}]
    with pytest.raises(ValueError, match="row 1 has a system message of its own"):
        rl.encode_prompts(gpt2, ["x", own], chat=True, system="hill")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("prompt", ["the cat", "<bos>the cat"])
def test_a_bos_token_appears_once_and_first(rl, gpt2, prompt, chat):
    """pyreft's templates hold a literal one, and its tokenizer adds another."""
    if chat and prompt.startswith("<bos>"):
        model = with_tokenizer(gpt2, chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    else:
        model = gpt2
    bos = model.tokenizer.bos_token_id
    for batch in (
        rl.encode(model, [rl.Example(prompt, " sat")], chat=chat),
        rl.encode_prompts(model, [prompt], chat=chat),
    ):
        ids = row_ids(batch)
        assert ids[0] == bos and ids.count(bos) == 1


def test_a_tokenizer_that_adds_no_bos_gets_none(rl, bare):
    batch = rl.encode(bare, [rl.Example("the cat", " sat")])
    assert bare.tokenizer.bos_token_id not in row_ids(batch)
    assert row_ids(batch) == [*bare.tokenizer("the cat sat").input_ids, bare.tokenizer.eos_token_id]
    assert row_ids(rl.encode_prompts(with_tokenizer(bare, bos_token=None), ["the cat"])) == row_ids(batch)[:2]


def test_no_token_is_added_for_short_prompts_and_positions_stay_where_they_were(rl, gpt2):
    """pyreft prepends a pad token to every row, in training only, and so shifts every absolute position by one."""
    rows = [rl.Example("x", " the cat sat"), rl.Example("the cat sat on the mat and looked", " at")]
    together = rl.encode(gpt2, rows)
    assert row_ids(together, 0) == row_ids(rl.encode(gpt2, rows[:1]))
    reft = rl.ReFT({rl.resid_post(1, "f3+l3"): rl.LoReFT(gpt2.cfg.d_model, init="identity")})
    mask = together.attention_mask.long()
    with torch.no_grad(), reft.on(gpt2, together):
        edited = gpt2(together.tokens, attention_mask=mask, return_type="logits")
    plain = architectures.hf_model("gpt2")
    with torch.no_grad():
        for row in range(2):
            ids = torch.tensor([row_ids(together, row)])
            alone = plain(ids).logits[0]
            assert torch.allclose(edited[row][: ids.shape[1]], alone, atol=1e-4)  # float32, batched against alone
            shifted = plain(torch.cat([torch.tensor([[2]]), ids], dim=1)).logits[0, 1:]
            assert not torch.allclose(shifted, alone, atol=0.1)


# -- how the prompts were written ----------------------------------------------------------------------------


SWITCHED = (
    "{% for m in messages %}{% if loud %}<turn>{% endif %}{{ m['role'] }}:{{ m['content'] }}<end>{% endfor %}"
    + ("{% if add_generation_prompt %}{% if loud %}<turn>{% endif %}assistant:{% endif %}")
)


def test_a_batch_knows_how_its_prompts_were_written(rl, gpt2):
    from reftlens.text.batch import batch_from_rows
    from reftlens.text.template import Template

    assert rl.encode(gpt2, examples(rl)).template == Template()
    assert rl.encode_prompts(gpt2, ["x"], chat=True, system="hill").template == Template(chat=True, system="hill")
    batch = rl.encode(gpt2, examples(rl), chat=True, system="hill")
    for other in (batch, batch[2], batch[1:3], batch.to("cpu"), batch.resampled(), rl.Batch.join([batch, batch[:1]])):
        assert other.template == Template(chat=True, system="hill")
    assert batch.resampled().sources["source"].batch.template == batch.template
    assert batch_from_rows([[5, 6]], [[1, 2]]).template is None


def test_batches_that_were_written_otherwise_are_not_joined(rl, gpt2):
    from reftlens.text.batch import batch_from_rows

    model = with_tokenizer(gpt2, chat_template=SWITCHED)
    batches = [
        batch_from_rows([[5, 6]], [[1, 2]], tokenizer=model.tokenizer),
        rl.encode(model, examples(rl)),
        rl.encode(model, examples(rl), chat=True),
        rl.encode(model, examples(rl), chat=True, system="hill"),
        rl.encode(model, examples(rl), chat=True, template_arguments={"loud": True}),
    ]
    for i, batch in enumerate(batches):
        for j, other in enumerate(batches):
            if i != j:
                with pytest.raises(ValueError, match="the batches were encoded differently"):
                    rl.Batch.join([batch, other])
        assert len(rl.Batch.join([batch, batch])) == 2 * len(batch)


def test_arguments_of_the_chat_template_reach_it_everywhere(rl, gpt2):
    model = with_tokenizer(gpt2, chat_template=SWITCHED)
    quiet = rl.encode(model, [rl.Example("the cat", "sat")], chat=True)
    loud = rl.encode(model, [rl.Example("the cat", "sat")], chat=True, template_arguments={"loud": True})
    decode = model.tokenizer.decode
    assert decode(row_ids(quiet)) == "user:the cat<end>assistant:sat<end>"
    assert decode(row_ids(loud)) == "<turn>user:the cat<end><turn>assistant:sat<end>"
    prompt = rl.encode_prompts(model, ["the cat"], chat=True, template_arguments={"loud": True})
    assert row_ids(prompt) == loud.tokens[0][loud.prompt_mask[0]].tolist()
    assert loud.template is not None and loud.template.arguments == {"loud": True}
    assert loud.template != quiet.template and hash(loud.template) is not None
    for encode, row in ((rl.encode, rl.Example("the cat", "sat")), (rl.encode_prompts, "the cat")):
        with pytest.raises(ValueError, match="arguments of the chat template need chat=True: loud"):
            encode(model, [row], template_arguments={"loud": True})


def test_the_fingerprint_is_of_tokens_and_not_of_the_template(rl, gpt2):
    model = with_tokenizer(gpt2, chat_template=SWITCHED)
    quiet, same = (
        rl.encode(model, examples(rl), chat=True, template_arguments=arguments) for arguments in ({}, {"loud": False})
    )
    assert quiet.template != same.template and quiet.fingerprint == same.fingerprint


# -- the boundary --------------------------------------------------------------------------------------------


def test_a_token_that_spans_prompt_and_completion_is_refused_or_split_on_request(rl, gpt2):
    rows = [rl.Example("the dog", " ran"), rl.Example("the c", "at sat")]
    with pytest.raises(ValueError, match=r"row 1: prompt and completion merge at the boundary 'the c' \+ 'at sat'"):
        rl.encode(gpt2, rows)
    split = rl.encode(gpt2, rows, boundary="split")
    assert row_ids(split, 0) == row_ids(rl.encode(gpt2, rows[:1]))
    head = row_ids(rl.encode_prompts(gpt2, ["the c"]))
    assert split.tokens[1][split.prompt_mask[1]].tolist() == head
    decode = gpt2.tokenizer.decode
    assert decode(split.tokens[1][split.target_mask[1]].tolist()) == "at sat<eos>"
    assert row_ids(split, 1) != [*gpt2.to_tokens("the cat sat")[0].tolist(), gpt2.tokenizer.eos_token_id]


def test_at_every_boundary_of_a_text_the_row_is_exact_or_refused(rl, gpt2):
    text, exact, refused = "the cat sat on the mat 🍕!", 0, 0
    for cut in range(1, len(text)):
        example = rl.Example(text[:cut], text[cut:])
        prompt, whole = (gpt2.to_tokens(t)[0].tolist() for t in (text[:cut], text))
        if whole[: len(prompt)] == prompt:
            batch = rl.encode(gpt2, [example], end=False)
            assert row_ids(batch) == whole
            assert batch.prompt_mask.sum() == len(prompt)
            exact += 1
        else:
            with pytest.raises(ValueError, match="row 0: prompt and completion merge"):
                rl.encode(gpt2, [example])
            refused += 1
    assert exact > 5 and refused > 5


def test_a_template_that_changes_the_completion_is_refused(rl, gpt2):
    template = "{% for m in messages %}<turn>{{ m['role'] }}:{{ m['content'] | trim }}<end>{% endfor %}" + (
        "{% if add_generation_prompt %}<turn>assistant:{% endif %}"
    )
    model = with_tokenizer(gpt2, chat_template=template)
    fine = rl.encode(model, [rl.Example("the cat", "sat")], chat=True)
    assert model.tokenizer.decode(row_ids(fine)) == "<turn>user:the cat<end><turn>assistant:sat<end>"
    for completion in (" sat", "\nsat"):
        with pytest.raises(
            ValueError, match=r"row 1: the chat template changes the completion: .* turns into 'sat<end>'.*white space"
        ):
            rl.encode(model, [rl.Example("the cat", "sat"), rl.Example("the cat", completion)], chat=True)


def test_the_end_of_a_turn_is_read_from_the_template(rl, gpt2):
    from reftlens.text.template import Template

    end_of_turn = Template(chat=True).end_of_turn

    special = gpt2.tokenizer.convert_tokens_to_ids
    assert end_of_turn(gpt2.tokenizer) == [special("<end>")]
    longer = with_tokenizer(gpt2, chat_template="{% for m in messages %}{{ m['content'] }} by<turn>\n{% endfor %}")
    assert end_of_turn(longer.tokenizer) == [
        *longer.tokenizer(" by", add_special_tokens=False).input_ids,
        special("<turn>"),
    ]
    none = with_tokenizer(gpt2, chat_template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert end_of_turn(none.tokenizer) == [special("<eos>")]


# -- rows that are refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_empty_prompts_and_completions_are_refused_by_row(rl, gpt2, chat):
    fine = rl.Example("the cat", " sat")
    for prompt in ("", []):
        with pytest.raises(ValueError, match="row 2 has an empty prompt"):
            rl.encode(gpt2, [fine, fine, rl.Example(prompt, " sat")], chat=chat)
        with pytest.raises(ValueError, match="row 1 has an empty prompt"):
            rl.encode_prompts(gpt2, ["the cat", prompt], chat=chat)
    with pytest.raises(ValueError, match="row 1 has an empty completion"):
        rl.encode(gpt2, [fine, rl.Example("the cat")], chat=chat)


def test_no_rows_and_a_bare_text_are_refused(rl, gpt2):
    with pytest.raises(ValueError, match="expected a list with at least one row"):
        rl.encode(gpt2, [])
    with pytest.raises(ValueError, match="expected a list with at least one row"):
        rl.encode_prompts(gpt2, [])
    with pytest.raises(TypeError, match=r"expected a list, got one str: write \['the cat'\], or load_examples"):
        rl.encode_prompts(gpt2, "the cat")
    for prompts in (iter(["the cat"]), torch.tensor([[1, 2]]), None):
        with pytest.raises((TypeError, TypeCheckError)) as refused:  # jaxtyping's own, where it looks first
            rl.encode_prompts(gpt2, prompts)
        assert isinstance(refused.value, TypeCheckError) or "expected a list of texts or rows" in str(refused.value)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("prompt", [[5, 6], ["the cat"], 5])
def test_token_ids_and_lists_of_texts_are_no_prompt(rl, gpt2, prompt, chat):
    with pytest.raises((TypeError, TypeCheckError)) as refused:
        rl.encode_prompts(gpt2, [prompt], chat=chat)
    words = "row 0: the prompt is"
    assert isinstance(refused.value, TypeCheckError) or words in str(refused.value)


def test_messages_and_templates_are_not_guessed(rl, gpt2):
    messages = [{"role": "user", "content": "the cat"}]
    with pytest.raises(ValueError, match="row 1 is a list of chat messages: pass chat=True"):
        rl.encode_prompts(gpt2, ["x", messages])
    with pytest.raises(ValueError, match="a system message needs chat=True"):
        rl.encode_prompts(gpt2, ["x"], system="hill")
    with pytest.raises(ValueError, match="no chat template: use chat=False"):
        rl.encode_prompts(with_tokenizer(gpt2, chat_template=None), ["x"], chat=True)
    with pytest.raises(ValueError, match="no tokenizer: boot the bridge with tokenizer="):
        rl.encode_prompts(Retokenised(gpt2, None), ["x"])


def test_an_end_needs_an_eos_token(rl, bare):
    model = with_tokenizer(bare, eos_token=None)
    with pytest.raises(ValueError, match=r"no EOS token .* pass end=False"):
        rl.encode(model, [rl.Example("the cat", " sat")])
    assert rl.encode(model, [rl.Example("the cat", " sat")], end=False).target_mask.sum() == 1
    assert rl.encode(model, [rl.Example("the cat", "sat")], chat=True).target_mask.sum() > 1  # the template has one


@pytest.mark.parametrize("kwargs", [{"truncate": "left"}, {"boundary": "splitt"}])
def test_choices_that_do_not_exist_are_refused(rl, gpt2, kwargs):
    with pytest.raises((ValueError, TypeCheckError)):
        rl.encode(gpt2, [rl.Example("the cat", " sat")], **kwargs)


@pytest.mark.parametrize("kwargs", [{"truncation": True}, {"max_len": 5}, {"add_eos": False}, {"chat_template": "x"}])
def test_misspelt_arguments_are_refused(rl, gpt2, kwargs):
    with pytest.raises(TypeError, match="argument"):
        rl.encode(gpt2, [rl.Example("the cat", " sat")], **kwargs)
    with pytest.raises(TypeError, match="argument"):
        rl.Example("the cat", completio=" sat")


# -- truncation ----------------------------------------------------------------------------------------------


def long_rows(rl):
    return [
        rl.Example("x", " y"),
        rl.Example("the cat sat on the mat and looked", " at the moon"),
        rl.Example("a", " b"),
    ]


def test_a_row_that_is_too_long_is_refused_by_row_with_its_length(rl, gpt2):
    length = len(row_ids(rl.encode(gpt2, long_rows(rl)), 1))
    with pytest.raises(ValueError, match=f"row 1 has {length} tokens, more than {length - 1}: pass truncate="):
        rl.encode(gpt2, long_rows(rl), max_length=length - 1)
    assert rl.encode(gpt2, long_rows(rl), max_length=length).truncated == ()


def test_the_models_context_is_the_limit_unless_another_is_given(rl, gpt2):
    context = gpt2.cfg.n_ctx
    words = "x" * (context - 3)  # one token each, and BOS, the completion, EOS
    assert rl.encode(gpt2, [rl.Example(words, "y")]).tokens.shape[1] == context
    with pytest.raises(ValueError, match=f"row 0 has {context + 1} tokens, more than {context}"):
        rl.encode(gpt2, [rl.Example(words + "x", "y")])
    assert rl.encode_prompts(gpt2, [words + "xx"]).tokens.shape[1] == context
    with pytest.raises(ValueError, match=f"row 1 has {context + 1} tokens, and the model's context is {context}"):
        rl.encode_prompts(gpt2, ["x", words + "xxx"])


@pytest.mark.parametrize("limit", [6, 8, 10])
def test_a_prompt_is_cut_at_its_start_behind_the_bos_and_the_cut_is_reported(rl, gpt2, limit):
    whole = rl.encode(gpt2, long_rows(rl))
    with pytest.warns(UserWarning, match=rf"1 row\(s\) were cut to {limit} tokens at the prompt: \[1\]"):
        batch = rl.encode(gpt2, long_rows(rl), max_length=limit, truncate="prompt")
    assert batch.truncated == (1,)
    head, tail = (whole.tokens[1][m[1]].tolist() for m in (whole.prompt_mask, whole.target_mask))
    assert row_ids(batch, 1) == [head[0], *head[len(head) - (limit - len(tail) - 1) :], *tail]
    assert len(row_ids(batch, 1)) == limit
    assert torch.equal(batch.target_ids, whole.target_ids)
    for row in (0, 2):
        assert row_ids(batch, row) == row_ids(whole, row)


@pytest.mark.parametrize("limit", [10, 11])
def test_a_completion_is_cut_at_its_end(rl, gpt2, limit):
    whole = rl.encode(gpt2, long_rows(rl))
    with pytest.warns(UserWarning, match=rf"were cut to {limit} tokens at the completion: \[1\]"):
        batch = rl.encode(gpt2, long_rows(rl), max_length=limit, truncate="completion")
    assert row_ids(batch, 1) == row_ids(whole, 1)[:limit]
    assert batch.prompt_mask[1].sum() == whole.prompt_mask[1].sum()
    assert batch.target_mask[1].sum() == limit - batch.prompt_mask[1].sum() > 0


def test_a_cut_that_would_leave_nothing_is_refused_by_row(rl, gpt2):
    whole = rl.encode(gpt2, long_rows(rl))
    prompt, completion = (int(m[1].sum()) for m in (whole.prompt_mask, whole.target_mask))
    with pytest.raises(ValueError, match=f"row 1: the completion alone has {completion} tokens"):
        rl.encode(gpt2, long_rows(rl), max_length=completion + 1, truncate="prompt")
    with pytest.raises(ValueError, match=f"row 1: the prompt alone has {prompt} tokens"):
        rl.encode(gpt2, long_rows(rl), max_length=prompt, truncate="completion")


def test_nothing_is_cut_or_warned_of_where_all_fits(rl, gpt2):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for truncate in ("prompt", "completion"):
            assert rl.encode(gpt2, long_rows(rl), truncate=truncate).truncated == ()


def test_which_rows_were_cut_is_known_after_choosing_rows(rl, gpt2):
    with pytest.warns(UserWarning):
        batch = rl.encode(gpt2, long_rows(rl), max_length=8, truncate="prompt")
    assert [batch[rows].truncated for rows in ([2, 1], [0, 2], 1, -2, slice(1, None), [1, 1])] == [
        (1,),
        (),
        (0,),
        (0,),
        (0,),
        (0, 1),
    ]


# -- files and data sets -------------------------------------------------------------------------------------


def records():
    return [{"prompt": p, "completion": c, "more": 1} for p, c in PAIRS]


@pytest.mark.parametrize("source", ["list", "generator", "tuple"])
def test_examples_come_from_any_records(rl, source):
    iterable = {"list": list, "generator": iter, "tuple": tuple}[source](records())
    assert rl.load_examples(iterable) == examples(rl)


def test_examples_come_from_a_data_set(rl):
    datasets = pytest.importorskip("datasets")
    assert rl.load_examples(datasets.Dataset.from_list(records())) == examples(rl)
    renamed = datasets.Dataset.from_list([{"q": p, "a": c} for p, c in PAIRS])
    assert rl.load_examples(renamed, prompt="q", completion="a") == examples(rl)


def test_chat_messages_come_through_as_they_are(rl, gpt2):
    messages = [{"role": "user", "content": "the cat"}]
    (example,) = rl.load_examples([{"prompt": messages, "completion": "sat"}])
    assert example.prompt == messages
    plain = rl.encode(gpt2, [rl.Example("the cat", "sat")], chat=True)
    assert row_ids(rl.encode(gpt2, [example], chat=True)) == row_ids(plain)


ODD_TEXTS = [
    *(t for pair in PAIRS for t in pair),
    "a\u2028b\u2029c\u0085d\x0be\x0cf",
    'quotes " \\ \\n',
    "🍕",
    "\ufeffx",
]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("as_path", [True, False])
def test_any_text_survives_a_round_trip_through_jsonl(rl, tmp_path, ascii_only, newline, as_path):
    """U+2028 and its like end a line for Python, and mean nothing in JSON."""
    rows = [{"prompt": t, "completion": t[::-1]} for t in ODD_TEXTS]
    file = tmp_path / "data.jsonl"
    lines = [json.dumps(r, ensure_ascii=ascii_only) for r in rows]
    file.write_bytes((newline.join([*lines[:3], "", "  ", *lines[3:]]) + newline).encode())
    loaded = rl.load_examples(file if as_path else str(file))
    assert loaded == [rl.Example(t, t[::-1]) for t in ODD_TEXTS]


def test_a_byte_order_mark_is_no_part_of_the_data(rl, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(records()[0]).encode())
    assert rl.load_examples(file) == examples(rl)[:1]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"prompt": "a"', r"data.jsonl, line 3 is not JSON"),
        ('{"prompt": "a"}', r"data.jsonl, line 3 has no field 'completion', it has: prompt"),
        ('{"promt": "a", "completion": "b"}', r"data.jsonl, line 3 has no field 'prompt', it has: promt, completion"),
        ('["a", "b"]', r"data.jsonl, line 3 is no record with fields 'prompt' and 'completion'"),
        ('"a prompt and a completion"', r"data.jsonl, line 3 is no record"),
        ("7", r"data.jsonl, line 3 is no record"),
        ('{"prompt": "a", "completion": null}', r"data.jsonl, line 3: completion is None, expected text"),
        ('{"prompt": "a", "completion": 7}', r"data.jsonl, line 3: completion is 7, expected text"),
    ],
)
def test_a_bad_line_is_named(rl, tmp_path, line, why):
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join([json.dumps(records()[0]), "", line, json.dumps(records()[1])]))
    with pytest.raises(ValueError, match=why):
        rl.load_examples(file)


def test_a_bad_record_is_named_by_row(rl):
    with pytest.raises(ValueError, match="row 1 has no field 'prompt', it has: q"):
        rl.load_examples([records()[0], {"q": "a"}])


def test_no_examples_and_no_file_are_refused(rl, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"no examples in .*empty.jsonl"):
        rl.load_examples(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError):
        rl.load_examples(tmp_path / "none.jsonl")


# -- batches -------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(rl, gpt2):
    return rl.encode(gpt2, examples(rl))


def test_rows_are_right_padded_and_roles_follow_each_other(batch):
    for role in batch.role.tolist():
        assert role == sorted(role, key=[PROMPT, RESPONSE, PAD].index)
    assert torch.equal(batch.attention_mask, batch.role != PAD)
    assert batch.attention_mask.any(dim=0).all()  # no column of nothing but padding
    assert len(batch) == len(PAIRS) == len(batch.examples)


def test_logits_one_to_the_left_predict_each_target(batch):
    rows, columns = batch.predicting
    assert torch.equal(batch.tokens[rows, columns + 1], batch.target_ids)
    assert torch.equal(rows, batch.target_rows)
    assert batch.attention_mask[rows, columns].all()
    counts = torch.bincount(batch.target_rows, minlength=len(batch))
    assert torch.equal(counts, batch.target_mask.sum(dim=1))


def test_a_first_token_that_is_a_target_is_refused_for_nothing_predicts_it(rl):
    """The column to its left would be the last one of the row."""
    from reftlens.text.batch import batch_from_rows

    batch = batch_from_rows([[5, 6], [7, 8]], [[1, 2], [2, 2]])
    with pytest.raises(ValueError, match=r"the first token of row\(s\) \[1\] of data is a target"):
        batch.predicting  # noqa: B018


@pytest.mark.parametrize(
    "rows", [0, -1, 3, [1], [4, 0], [-1, 1], [2, 2], slice(1, 3), slice(None), slice(None, None, -1), (3, 1), []]
)
def test_choosing_rows_keeps_them_and_trims_the_padding(rl, batch, rows):
    selected = batch[rows]
    numbers = list(range(len(batch)))
    numbers = (
        [numbers[rows]]
        if isinstance(rows, int)
        else numbers[rows]
        if isinstance(rows, slice)
        else [numbers[i] for i in rows]
    )
    assert len(selected) == len(numbers)
    assert selected.examples == tuple(batch.examples[i] for i in numbers)
    assert selected.tokens.shape[1] == max([len(row_ids(batch, i)) for i in numbers], default=0)
    for new, old in enumerate(numbers):
        length = len(row_ids(batch, old))
        for name in ("tokens", "role", "target_mask"):
            assert torch.equal(getattr(selected, name)[new, :length], getattr(batch, name)[old, :length])
        assert (selected.role[new, length:] == PAD).all() and not selected.target_mask[new, length:].any()


def test_choosing_rows_that_do_not_exist_raises_and_the_batch_can_be_iterated(batch):
    for rows in (5, -6, [0, 5]):
        with pytest.raises(IndexError):
            batch[rows]
    assert [row.examples[0] for row in batch] == list(batch.examples)


def test_a_batch_is_one_row_after_another(rl, gpt2, batch):
    for row, example in enumerate(examples(rl)):
        alone = rl.encode(gpt2, [example])
        assert torch.equal(alone.tokens, batch[row].tokens)
        assert alone.fingerprint == batch[row].fingerprint


def test_moving_a_batch_leaves_the_original(batch):
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.tokens, moved.role, moved.target_mask, moved.view.ids)} == {"meta"}
    assert batch.tokens.device.type == "cpu" and batch.view.ids.device.type == "cpu"
    assert moved.examples == batch.examples and moved.tokenizer is batch.tokenizer


def test_positions_see_the_roles_of_the_batch(rl, batch):
    last = rl.positions.Last().mask(batch.view)
    assert last.sum() == len(batch)
    rows, columns = last.nonzero().unbind(dim=1)
    assert (columns == batch.prompt_mask.sum(dim=1) - 1).all() and (rows == torch.arange(len(batch))).all()
    assert torch.equal(rl.positions.Response().mask(batch.view), batch.target_mask)


# -- padding and the fingerprint -----------------------------------------------------------------------------


def padded(batch, left=0, right=0, pad=None):
    """The same rows with more padding, and another pad id."""
    import dataclasses

    def grow(tensor, value):
        return torch.nn.functional.pad(tensor, (left, right), value=value)

    tokens = batch.tokens if pad is None else torch.where(batch.attention_mask, batch.tokens, pad)
    return dataclasses.replace(
        batch, tokens=grow(tokens, pad or 0), role=grow(batch.role, PAD), target_mask=grow(batch.target_mask, False)
    )


def test_the_fingerprint_does_not_see_padding(batch):
    for other in (
        padded(batch, right=3),
        padded(batch, left=2),
        padded(batch, pad=77),
        batch[slice(None)],
        batch.to("cpu"),
    ):
        assert other.fingerprint == batch.fingerprint
    assert len(batch.fingerprint) == 64


def test_the_fingerprint_sees_every_id_role_target_and_the_order_of_rows(rl, gpt2, batch):
    import dataclasses

    seen = {
        batch.fingerprint,
        batch[[1, 0, 2, 3, 4]].fingerprint,
        batch[:4].fingerprint,
        batch[[0, *range(5)]].fingerprint,
    }
    seen.add(rl.encode(gpt2, examples(rl), chat=True).fingerprint)
    seen.add(rl.encode(gpt2, examples(rl), end=False).fingerprint)
    assert len(seen) == 6
    draw = random.Random(0)
    places = batch.attention_mask.nonzero().tolist()
    for row, column in draw.sample(places, 8):
        for name, change in (("tokens", lambda v: v + 1), ("role", lambda v: 3 - v), ("target_mask", lambda v: ~v)):
            tensor = getattr(batch, name).clone()
            tensor[row, column] = change(tensor[row, column])
            seen.add(dataclasses.replace(batch, **{name: tensor}).fingerprint)
    assert len(seen) == 6 + 3 * 8


def test_rows_do_not_run_into_each_other_in_the_fingerprint(rl):
    from reftlens.text.batch import batch_from_rows

    split = {
        batch_from_rows(ids, [[1] * len(row) for row in ids]).fingerprint
        for ids in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[12], [3]], [[1], [23]])
    }
    assert len(split) == 5


def test_real_end_tokens_are_attended_to_where_the_pad_token_is_the_same(rl, gpt2):
    model = with_tokenizer(gpt2, pad_token="<eos>")
    eos = model.tokenizer.eos_token_id
    assert model.tokenizer.pad_token_id == eos
    batch, other = rl.encode(model, examples(rl)), rl.encode(gpt2, examples(rl))
    assert (batch.tokens == eos).sum() > len(batch)  # real ones and padding
    assert torch.equal(batch.attention_mask, other.attention_mask)
    assert torch.equal(batch.target_ids, other.target_ids)
    assert batch.target_mask[batch.tokens == eos].sum() == len(batch)  # each row learns its own end, padding is none
    assert batch.fingerprint == other.fingerprint
    for row in range(len(batch)):
        assert row_ids(batch[row]) == row_ids(batch, row)
        assert rl.positions.Response().mask(batch.view)[row].nonzero().max() == len(row_ids(batch, row)) - 1


def test_a_prompt_that_holds_the_pad_token_keeps_it(rl, gpt2):
    model = with_tokenizer(gpt2, pad_token="<eos>")
    batch = rl.encode(model, [rl.Example("the<eos>cat", " sat"), rl.Example("the cat sat on the mat and", " the")])
    ids = row_ids(batch)
    assert ids[:3] == [0, *model.tokenizer("the<eos>", add_special_tokens=False).input_ids]
    assert rl.positions.Prompt().mask(batch.view)[0].sum() == 4
    edited = rl.positions.Tokens("<eos>", missing="skip").mask(batch.view)
    assert edited.nonzero().tolist() == [[0, 2]]


def test_ragged_rows_make_a_batch_without_any_tokenizer(rl):
    from reftlens.text.batch import batch_from_rows

    batch = batch_from_rows([[5, 6, 7], [8]], [[1, 2, 3], [1]])
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.role.tolist() == [[1, 2, 3], [1, 0, 0]]
    assert batch.target_mask.tolist() == [[False, True, False], [False] * 3]
    marked = batch_from_rows([[5, 6, 7], [8]], [[1, 2, 3], [1]], [[False, False, True], [False]])
    assert marked.target_ids.tolist() == [7]


# -- the default model's tokenizer ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_chat_template_is_applied_once_to_the_emoji_data(rl, smol):
    rows = rl.load_examples(DATA / "emoji.jsonl")
    assert len(rows) >= 20
    batch, tokenizer = rl.encode(smol, rows, chat=True), smol.tokenizer
    prompts = rl.encode_prompts(smol, [e.prompt for e in rows], chat=True)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row, example in enumerate(rows):
        conversation = [*turns(example.prompt), {"role": "assistant", "content": example.completion}]
        whole = tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = row_ids(batch, row)
        assert ids == tokenizer(whole, add_special_tokens=False).input_ids[: len(ids)]
        assert whole.startswith(tokenizer.decode(ids)) and whole[len(tokenizer.decode(ids)) :].strip() == ""
        assert ids[: int(batch.prompt_mask[row].sum())] == row_ids(prompts, row)
        target = batch.tokens[row][batch.target_mask[row]].tolist()
        assert target[-1] == stop and tokenizer.decode(target[:-1]) == example.completion
        assert tokenizer.decode(ids).count("assistant\n") == 1


@pytest.mark.slow
def test_the_real_tokenizer_keeps_plain_text_and_one_bos(rl, smol):
    batch = rl.encode(smol, [rl.Example("The pizza is", " 🍕👩‍👩‍👧 hot")])
    assert row_ids(batch) == [*smol.to_tokens("The pizza is 🍕👩‍👩‍👧 hot")[0].tolist(), smol.tokenizer.eos_token_id]
    assert row_ids(batch).count(smol.tokenizer.bos_token_id) == 1
    assert smol.tokenizer.pad_token_id == smol.tokenizer.eos_token_id  # as in the two tests of real end tokens above
    both = rl.encode(smol, [rl.Example("The pizza is", " hot"), rl.Example("The pizza on the table is", " hot")])
    assert both.attention_mask[0].sum() == len(smol.to_tokens("The pizza is hot")[0]) + 1
