"""Hierarchical equality: prompts against a reading of their own, and the trained network's one place for `left`."""

from functools import cache

import pytest
import torch
import transformers

import reftlens as rl
from reftlens.tasks.hierarchical_equality import SYMBOLS, equality_network, hierarchical_equality

B = rl.positions.Nth(2)  # BOS, a, b


def test_answers_against_the_prompts_read_anew():
    pairs = hierarchical_equality().pairs(80, "left", split="test")
    held_out = set(SYMBOLS[len(SYMBOLS) // 2 :])
    for base, source, answer in zip(pairs.base, pairs.sources["left"], pairs.counterfactual, strict=True):
        (a, b, c, d, _), (e, f, *_) = base.prompt.split(), source.prompt.split()
        assert {a, b, c, d} <= held_out
        assert base.completion == (" yes" if (a == b) == (c == d) else " no")
        assert answer == (" yes" if (e == f) == (c == d) else " no")


def test_equals_are_not_rare():
    task, generator = hierarchical_equality(), torch.Generator().manual_seed(0)
    runs = [task.causal.run(task.draw(generator)) for _ in range(400)]
    for name in ("left", "right", "same"):
        assert 160 < sum(run[name] for run in runs) < 240, name


def test_two_variables_can_be_exchanged_at_once():
    pairs = hierarchical_equality().pairs(40, ["left", "right"])
    for i, answer in enumerate(pairs.counterfactual):
        assert answer == (" yes" if pairs.values["left"][i] == pairs.values["right"][i] else " no")


def test_an_untrained_network_is_a_function_of_its_seed_and_leaves_the_users_random_numbers_alone():
    state = torch.random.get_rng_state()
    one, same, other = (equality_network(seed, steps=0).original_model for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    weights = [m.get_input_embeddings().weight for m in (one, other)]
    assert not torch.equal(*weights)


def test_training_is_repeatable_and_changes_all_but_the_embeddings():
    one, same, none = (equality_network(steps=n).original_model for n in (3, 3, 0))
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), none.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.grad is None and not torch.equal(a, c), name


def test_the_trained_network_is_a_plain_gpt2():
    network = equality_network(steps=3)
    names = {"._original_component": "", ".attn.qkv.": ".attn.c_attn.", ".attn.o.": ".attn.c_proj."}
    state = {}
    for name, parameter in network.original_model.named_parameters():
        for old, new in names.items():
            name = name.replace(old, new)
        if not any(f".attn.{part}." in name for part in "qkv"):
            state[name] = parameter.detach()
    plain = transformers.GPT2LMHeadModel(network.original_model.config).eval()
    assert not plain.load_state_dict(state, strict=False).unexpected_keys
    assert state.keys() == dict(plain.named_parameters()).keys()
    tokens = torch.randint(64, (4, 6))
    torch.testing.assert_close(network(tokens), plain(tokens).logits, rtol=1e-4, atol=1e-5)  # another order of sums


@cache
def _network(steps: int):
    return equality_network(steps=steps)


def _scored(network, site, rank=1):
    """Held-out interchange accuracy of DAS on `left`, and how often the network is right by itself."""
    task = hierarchical_equality()
    train, test = task.pairs(800, "left"), task.pairs(400, "left", split="test", seed=1)
    das = rl.ReFT({site: rl.DAS(32, rank=rank, generator=torch.Generator().manual_seed(0))})
    rl.fit(das, network, train.encode(network), epochs=4, lr=2e-2, batch_size=32, progress=False)
    scores = rl.causal.interchange_scores(
        das, network, test.encode(network), base=test.encode_base(network), batch_size=100, progress=False
    )
    assert scores.base_hits is not None
    return scores.accuracy.value, scores.base_hits.float().mean().item()


@pytest.mark.slow
def test_das_finds_left_at_the_second_token_of_the_trained_network():
    accuracy, right = _scored(_network(1600), rl.resid_post(0, B))
    assert right >= 0.97, "the network solves the task with symbols it has never seen"
    assert accuracy >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    "site",
    [rl.resid_pre(0, B), rl.resid_post(0, rl.positions.Nth(1)), rl.resid_post(0, "last")],
    ids=["before block 0", "at the first token", "at the last token"],
)
def test_das_finds_nothing_elsewhere(site):
    accuracy, _ = _scored(_network(1600), site, rank=4)
    assert accuracy < 0.65


@pytest.mark.slow
def test_das_finds_nothing_in_an_untrained_network():
    accuracy, right = _scored(_network(0), rl.resid_post(0, B), rank=4)
    assert accuracy < 0.75 and right < 0.75
