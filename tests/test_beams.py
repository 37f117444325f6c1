"""Beam search: transformers' own where nothing is edited, an exhaustive search where something is."""

import pytest
import torch

from architectures import ARCHITECTURES, D_HEAD, D, bridge, fresh_bridge, hf_model, tokenizer

STEPS = 5
TEXTS = ("the cat sat", "a dog ran by the green hill and looked at the moon", "on")


def ids_of(text):
    return tokenizer()(text, add_special_tokens=False).input_ids


def batch_of(rows):
    from reftlens.text.batch import batch_from_rows

    return batch_from_rows(rows, [[1] * len(row) for row in rows], tokenizer=tokenizer())


def sites(seed=1):
    import reftlens as rl

    torch.manual_seed(seed)
    return rl.ReFT(
        {
            rl.resid_post(0, "l2+generated"): rl.LoReFT(D, rank=3),
            rl.attn_z(1, "all", [1, 2]): rl.LoReFT(2 * D_HEAD, rank=3),
        }
    )


def of_transformers(model, row, stops, **settings):
    """The best hypothesis of transformers' beam search for one prompt, without padding."""
    tokens = torch.tensor([row])
    with torch.no_grad():
        whole = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=STEPS,
            pad_token_id=2,
            eos_token_id=stops,
            **settings,
        )[0, len(row) :].tolist()
    end = next((i for i, token in enumerate(whole) if token in stops), len(whole) - 1)
    return tuple(whole[: end + 1])


STOPS = list(range(1, 300, 3))
"""Every third token ends a text, so that hypotheses of all lengths compete."""


@pytest.mark.parametrize(
    "architecture, stopping, beams",
    [*((a, "many stop tokens", 2) for a in ARCHITECTURES), *((a, "eos", 5) for a in ("gpt2", "neox", "gemma3"))],
)
def test_unedited_beams_are_those_of_transformers(architecture, stopping, beams):
    import reftlens as rl

    model, plain = fresh_bridge(architecture), hf_model(architecture)
    stops = [1] if stopping == "eos" else STOPS
    model.original_model.generation_config.eos_token_id = stops
    rows = [ids_of(text) for text in TEXTS] + [[40, 50]]
    found = rl.generate(None, model, batch_of(rows), rl.Decoding(max_new_tokens=STEPS, beams=beams))
    expected = tuple(of_transformers(plain, row, stops, num_beams=beams) for row in rows)
    assert found.ids == expected
    if stopping != "eos":
        assert any(len(ids) < STEPS for ids in found.ids)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_beams_find_what_greedy_search_misses(architecture):
    import reftlens as rl

    model = bridge(architecture)
    rows = batch_of([[i, i + 1] for i in range(10, 60, 4)])
    greedy = rl.generate(None, model, rows, rl.Decoding(max_new_tokens=4))
    beams = rl.generate(None, model, rows, rl.Decoding(max_new_tokens=4, beams=8))
    better = [
        score(None, model, p, b) - score(None, model, p, g)
        for p, b, g in zip(greedy.prompt_ids, beams.ids, greedy.ids, strict=True)
    ]
    assert max(better) > 0.01 and sum(better) > 0


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.5}, {"no_repeat_ngram": 1}])
def test_penalties_act_in_every_beam_as_in_transformers(settings):
    import reftlens as rl

    model, plain = bridge("llama"), hf_model("llama")
    rows = [ids_of(text) for text in TEXTS[:2]]
    found = rl.generate(None, model, batch_of(rows), rl.Decoding(max_new_tokens=STEPS, beams=3, **settings))
    theirs = {{"no_repeat_ngram": "no_repeat_ngram_size"}.get(k, k): v for k, v in settings.items()}
    assert found.ids == tuple(of_transformers(plain, row, [1], num_beams=3, **theirs) for row in rows)
    assert found.ids != rl.generate(None, model, batch_of(rows), rl.Decoding(max_new_tokens=STEPS, beams=3)).ids


def score(reft, model, prompt, ids):
    """Mean log-probability per token of a continuation, from one forward pass over the finished text."""
    from reftlens.text.batch import batch_from_rows

    batch = batch_from_rows([[*prompt, *ids]], [[1] * len(prompt) + [3] * len(ids)], tokenizer=tokenizer())
    with torch.no_grad():
        if reft is None:
            logits = model(batch.tokens, use_cache=False)
        else:
            with reft.on(model, batch):
                logits = model(batch.tokens, use_cache=False)
    logprobs = logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
    return logprobs[torch.arange(len(ids)), torch.tensor(ids)].mean().item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_scores_of_edited_beams_are_those_of_the_teacher_forced_forward(architecture, monkeypatch):
    import reftlens as rl
    from reftlens.generation import beams as module

    model, reft, seen = fresh_bridge(architecture), sites(), []
    model.original_model.generation_config.eos_token_id = STOPS
    add = module._Hypotheses.add

    def remember(self, value, row):
        seen.append((id(self), value, row.ids(0)))
        add(self, value, row)

    monkeypatch.setattr(module._Hypotheses, "add", remember)
    rows = [ids_of(text) for text in TEXTS[:2]]
    found = rl.generate(reft, model, batch_of(rows), rl.Decoding(max_new_tokens=STEPS, beams=3))
    prompt_of = {}
    for searched in dict.fromkeys(s for s, _, _ in seen):  # which prompt a search belongs to
        best = max((v, t) for s, v, t in seen if s == searched)[1]
        prompt_of[searched] = rows[found.ids.index(best)]
    assert len(prompt_of) == 2 and len(seen) >= 6
    for searched, value, tokens in seen:
        # float32: a sum of a few log-probabilities, each right to about 1e-6
        assert value == pytest.approx(score(reft, model, prompt_of[searched], tokens), abs=1e-5)
    assert any(len(t) < STEPS for _, _, t in seen)
    assert any(abs(v - score(None, model, prompt_of[s], t)) > 1e-2 for s, v, t in seen)  # the edit matters


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_as_many_beams_as_tokens_find_the_best_pair_of_all(architecture):
    import reftlens as rl
    from reftlens.text.batch import batch_from_rows

    model, reft, row = bridge(architecture), sites(2), ids_of("the cat sat")
    vocab = len(tokenizer())
    pairs = batch_from_rows([[*row, t] for t in range(vocab)], [[1] * len(row) + [3]] * vocab, tokenizer=tokenizer())
    with torch.no_grad(), reft.on(model, pairs):
        logprobs = model(pairs.tokens, use_cache=False).log_softmax(dim=-1)
    first, second = logprobs[0, len(row) - 1], logprobs[:, len(row)]
    both = (first[:, None] + second) / 2
    stop = tokenizer().eos_token_id
    both[stop] = -torch.inf
    best = divmod(int(both.argmax()), vocab)
    expected = (stop,) if first[stop] > both.max() else best
    found = rl.generate(reft, model, batch_of([row]), rl.Decoding(max_new_tokens=2, beams=vocab))
    assert found.ids == (expected,)
    assert found.ids != rl.generate(None, model, batch_of([row]), rl.Decoding(max_new_tokens=2, beams=vocab)).ids


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "gemma3", "llama"])
def test_edited_beams_do_not_depend_on_the_batch_and_show_what_was_edited(architecture):
    import reftlens as rl

    model, reft = fresh_bridge(architecture), sites()
    model.original_model.generation_config.eos_token_id = STOPS
    rows = [ids_of(text) for text in TEXTS]
    together = rl.generate(reft, model, batch_of(rows), rl.Decoding(max_new_tokens=STEPS, beams=3))
    for i, row in enumerate(rows[:2]):
        one = rl.generate(reft, model, batch_of([row]), rl.Decoding(max_new_tokens=STEPS, beams=3))
        assert one.ids[0] == together.ids[i] and one.edited[0] == together.edited[i]
        assert together.edited[i] == (True,) * (len(row) + len(one.ids[0]) - 1) + (False,)
    last = rl.generate(
        rl.ReFT({rl.resid_post(0, "last"): sites()[0]}), model, batch_of(rows), rl.Decoding(max_new_tokens=2, beams=2)
    )
    for row, marks in zip(rows, last.edited, strict=True):
        assert [i for i, hit in enumerate(marks) if hit] == [len(row) - 1]


def test_strength_zero_is_the_unedited_search(any_model):
    import reftlens as rl

    rows = batch_of([ids_of(text) for text in TEXTS])
    off = rl.generate(
        sites(), any_model, rows, rl.Decoding(max_new_tokens=4, beams=3), variant=rl.Variant(strength=0.0)
    )
    on = rl.generate(sites(), any_model, rows, rl.Decoding(max_new_tokens=4, beams=3))
    plain = rl.generate(None, any_model, rows, rl.Decoding(max_new_tokens=4, beams=3))
    assert off.ids == plain.ids != on.ids
