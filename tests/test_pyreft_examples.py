"""PyReFT's other examples: what is memorised, skills in directions of their own, few examples."""

import pytest
import torch
from test_methods import _subject

import architectures

TEXT = architectures.TEXT * 3


@pytest.fixture
def rl():
    import reftlens

    return reftlens


# -- memorisation -------------------------------------------------------------------------------------------


def test_what_is_recalled_is_what_greedy_writing_gives(rl, llama):
    from reftlens.experiments.examples.memorisation import memorisation, recalled

    config = rl.FitConfig(steps=20, lr=0.1, batch_size=1)
    found = memorisation(llama, TEXT, layers=[0, 2], lengths=[1, 12], rank=4, config=config, progress=False)
    assert found.recalled.shape == (2, 2, 2) and found.steps == 20 and found.parameters == 32 * 4 + 4
    assert found.recalled[:, :, 0].min() == 1 and found.recalled.max() < 12, "one token is learned, and never twelve"
    assert found.longest() == found.longest(shuffled=True) == {0: 1, 2: 1}
    # a first token that the model would not write, and what it writes after it
    (rest,) = rl.generate(None, llama, ["ALIC#ID1-> moon"], rl.Decoding(max_new_tokens=4)).texts
    row = rl.encode(llama, [rl.Example("ALIC#ID1->", f" moon{rest}")], end=False)
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.interventions.ConsReFT(32, 4)})
    counts = []
    for steps in (0, 15, 40):
        if steps:
            rl.fit(reft, llama, row, steps=steps, lr=0.05, progress=False)
        written = rl.generate(reft, llama, ["ALIC#ID1->"], rl.Decoding(max_new_tokens=len(row.target_ids))).ids[0]
        same = [a == b for a, b in zip(written, row.target_ids.tolist(), strict=False)]
        leading = same.index(False) if False in same else len(same)
        assert recalled(reft, llama, row) == leading
        counts.append(leading)
    assert counts[0] == 0 and counts[-1] >= 2, counts


def test_a_shuffled_text_has_the_same_tokens_and_the_prompt_stays(rl, llama):
    from reftlens.experiments.examples.memorisation import shuffled

    row = rl.encode(llama, [rl.Example("ALIC#ID1->", TEXT[:60])], end=False)
    other = shuffled(row)
    assert sorted(other.tokens[0].tolist()) == sorted(row.tokens[0].tolist())
    assert torch.equal(other.tokens[row.prompt_mask], row.tokens[row.prompt_mask])
    assert not torch.equal(other.tokens, row.tokens) and torch.equal(shuffled(row).tokens, other.tokens)


def test_a_text_that_is_too_short_is_refused(rl, llama):
    from reftlens.experiments.examples.memorisation import memorisation

    with pytest.raises(ValueError, match="tokens, expected 500 or more"):
        memorisation(llama, "the cat", layers=[0], lengths=[500], progress=False)
    with pytest.raises(ValueError, match="expected one or more of each"):
        memorisation(llama, TEXT, layers=[], lengths=[5], progress=False)


# -- skills in directions of their own ----------------------------------------------------------------------


def _skilled(rl, model):
    from reftlens.experiments.examples.subspaces import Skills

    skills = Skills({"cat": [0, 1], "dog": [2, 3]})
    rows = [rl.Example("the moon over the", f" {w}") for w in ("cat", "dog")] * 2
    names = ["cat", "dog"] * 2
    data = rl.encode(model, rows, end=False)
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.DiReFT(32, rank=4, init="paper")})
    reft.reset(1)
    return skills, names, data, reft


def test_each_row_trains_the_directions_of_its_skill_alone(rl, llama):
    skills, _, data, reft = _skilled(rl, llama)
    before = {n: p.clone() for n, p in reft[0].named_parameters()}
    only = data[[0, 2]]
    settings = {"steps": 5, "lr": 0.05, "batch_size": 2, "progress": False}
    rl.fit(reft, llama, only, objective=skills.objective(["cat", "cat"]), **settings)
    for name, parameter in reft[0].named_parameters():
        assert torch.equal(parameter[2:], before[name][2:]) and not torch.equal(parameter[:2], before[name][:2]), name


def test_two_skills_in_one_step_are_those_of_a_loop_written_by_hand(rl, llama):
    skills, names, data, reft = _skilled(rl, llama)
    losses = []
    for row, name in enumerate(names):
        some = data[[row]]
        with reft.on(llama, some, skills.variant([name])):
            logits = llama(some.tokens, attention_mask=some.attention_mask.long(), use_cache=False)
        losses.append(torch.nn.functional.cross_entropy(logits[some.predicting], some.target_ids))
    expected = torch.stack(losses).mean()
    gradients = torch.autograd.grad(expected, list(reft.parameters()))
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt().item()
    settings = {"steps": 1, "batch_size": 4, "clip": None, "progress": False}
    run = rl.fit(reft, llama, data, objective=skills.objective(names), **settings)
    assert run.losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert run.gradient_norms[0] == pytest.approx(norm, rel=1e-4)


def test_skills_are_composed_negated_and_left_out(rl, llama):
    skills, names, data, reft = _skilled(rl, llama)
    rl.fit(reft, llama, data, objective=skills.objective(names), steps=60, lr=0.05, batch_size=4, progress=False)
    variants = [0, skills.variant(["cat"]), skills.variant(["dog"]), skills.variant({"cat": -1})]
    loss = rl.evaluate(reft, llama, data[[0]], variants, progress=False).loss[:, 0]  # of "cat"
    assert loss[1] < 0.5 * loss[0] and loss[2] > loss[0] and loss[3] > loss[0]
    assert skills.variant(["cat", "dog"]) == rl.Variant((1.0, 1.0, 1.0, 1.0))
    assert skills.variant({"dog": 0.5}) == rl.Variant((0.0, 0.0, 0.5, 0.5))


def test_skills_that_do_not_fit_are_refused(rl, llama):
    from reftlens.experiments.examples.subspaces import Skills

    for wrong in ({"a": [0, 1], "b": [1]}, {"a": [0], "b": [2]}, {}):
        with pytest.raises(ValueError, match="expected each of 0, 1, 2"):
            Skills(wrong)
    skills, _, data, reft = _skilled(rl, llama)
    with pytest.raises(ValueError, match="no skill 'bird'"):
        skills.variant(["bird"])
    with pytest.raises(ValueError, match="no skill 'bird'"):
        skills.objective(["bird"])
    with pytest.raises(ValueError, match="2 skills for 4 rows of"):
        rl.fit(reft, llama, data, objective=skills.objective(["cat", "dog"]), progress=False)


def test_what_holds_in_texts_is_counted_by_the_directions_that_act(rl, llama):
    from reftlens.experiments.examples.skill_shares import skill_shares

    skills, names, data, reft = _skilled(rl, llama)
    rl.fit(reft, llama, data, objective=skills.objective(names), steps=60, lr=0.05, batch_size=4, progress=False)
    prompts, decoding = ["the moon over the", "the moon over the", "a hill"], rl.Decoding(max_new_tokens=3)
    holds = {"dog": lambda text: text.startswith(" dog"), "cat": lambda text: text.startswith(" cat")}
    found = skill_shares(reft, llama, skills, prompts, holds, decoding=decoding)
    assert [dict(each) for each in found.strengths] == [
        *({}, {"cat": 1}, {"dog": 1}, {"cat": 1, "dog": 1}, {"cat": 0.5, "dog": 0.5}),
        *({"cat": -1, "dog": 1}, {"cat": 1, "dog": -1}),
    ]
    for each, texts in zip(found.strengths, found.texts, strict=True):
        written = rl.generate(reft, llama, prompts, decoding, variant=skills.variant(each)).texts
        assert tuple(written) == texts
    assert found.skills == ("cat", "dog") and found.held.shape == (7, 2, 3)
    assert found.held[1, 0].sum() >= 2 and found.held[2, 1].sum() >= 2 and not found.held.all(dim=1).any()
    assert found.shares("cat")[1].value == pytest.approx(found.held[1, 0].double().mean().item())
    ends = {"cat": lambda text: text.startswith(" cat"), "dog": lambda text: bool(text)}
    some = skill_shares(reft, llama, skills, prompts[:2], ends, strengths=[{"cat": 1}, {"cat": 0}], decoding=decoding)
    assert [share.value for share in some.shares()] == [1.0, 0.0]
    with pytest.raises(ValueError, match="no skill 'bird'"):
        found.shares("bird")
    with pytest.raises(ValueError, match=r"holds of \['cat'\] and 3 prompts, expected \['cat', 'dog'\]"):
        skill_shares(reft, llama, skills, prompts, {"cat": holds["cat"]})
    with pytest.raises(ValueError, match="0 prompts"):
        skill_shares(reft, llama, skills, [], holds)


# -- few examples -------------------------------------------------------------------------------------------


def test_a_rule_is_learned_from_few_examples(rl):
    from reftlens.experiments.examples.few_shot import learning_curve, right
    from reftlens.experiments.methods import Reft, Unedited

    subject, words = _subject(), ["moon", "hill", "green", "mat", "sat", "over", "ran", "and"]
    rows = [rl.Example(f"{kind} {w}", answer) for w in words for kind, answer in (("cat", " the"), ("dog", " on"))]
    config = rl.FitConfig(steps=30, lr=0.05, batch_size=8)
    settings = {"shots": (2, 8), "seeds": (0,), "config": config, "separator": " ", "progress": False}
    curve = learning_curve(Reft(rank=4, positions="f2+l2"), subject, rows[:10], rows[10:], [" the", " on"], **settings)
    assert curve.trained.shape == (2, 1, 6) and curve.in_context.shape == (2, 1, 6)
    assert curve.trained[1].double().mean() > 0.8
    base = Unedited().fit(subject)
    assert torch.equal(curve.unedited, right(base, rows[10:], [" the", " on"]))
    answers = [" the", " on"]
    for row, found in zip(rows[10:], curve.unedited.tolist(), strict=True):
        both = rl.encode(subject.bridge, [rl.Example(row.prompt, answer) for answer in answers], end=False)
        first, second = base.log_probs(both).tolist()
        assert found == (row.completion == answers[int(second > first)])
    with pytest.raises(ValueError, match="' by' is none of the answers"):
        learning_curve(Reft(), subject, rows, [rl.Example("a", " by")], answers, **settings)
    with pytest.raises(ValueError, match="up to 3 shots"):
        learning_curve(Reft(), subject, rows[:3], rows, [" the", " on"], **settings)


# -- a reward model -----------------------------------------------------------------------------------------


def _rewarded(rl, chat=False):
    from reftlens.experiments.examples.reward import BradleyTerry, reward_rows

    model, words = architectures.bridge("llama"), ["moon", "hill", "green", "mat", "sat", "over", "ran", "and"]
    pairs = [(f"the {w}", " cat", " dog") for w in words]  # a cat is preferred, whatever came before
    rows = reward_rows(model, pairs, chat=chat)
    head = rl.interventions.Head(32, 1, hidden=0)
    reft = rl.ReFT({rl.resid_post(1, "f1+l1"): rl.LoReFT(32, 1, init="identity"), rl.final_norm("l1"): head})
    reft.reset(0)
    return model, rows, reft, BradleyTerry(reft)


def test_the_loss_of_rewards_is_bradley_and_terrys(rl):
    model, rows, reft, objective = _rewarded(rl)
    with torch.no_grad(), reft.on(model, rows):
        seen = model.run_with_cache(rows.tokens, attention_mask=rows.attention_mask.long())[1]
    h = seen["ln_final.hook_out" if "ln_final.hook_out" in seen else reft.sites[1].hook]
    at = rows.attention_mask.sum(dim=1) - 1
    head = reft[1]
    by_hand = h[torch.arange(len(rows)), at] @ head.W2[0] + head.b2
    expected = torch.log1p(torch.exp(by_hand[1::2] - by_hand[::2])).mean().item()
    settings = {"steps": 1, "batch_size": 8, "shuffle": False, "progress": False}
    run = rl.fit(reft, model, rows, objective=objective, **settings)
    assert run.losses[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("chat", [False, True])
def test_a_reward_model_learns_what_is_preferred_and_is_stored(rl, chat, tmp_path):
    from reftlens.experiments.examples.reward import preferred, rewards

    model, rows, reft, objective = _rewarded(rl, chat)
    train, test = rows[:12], rows[12:]
    rl.fit(reft, model, train, objective=objective, steps=25, lr=0.02, batch_size=6, progress=False)
    assert preferred(reft, model, test).value == 1.0
    turned = torch.arange(len(test)).view(-1, 2).flip(1).flatten()
    assert preferred(reft, model, test[turned]).value == 0.0
    rl.save(reft, tmp_path / "reward", model)
    again = rl.load(tmp_path / "reward", model)
    both = ["the moon cat", "the moon dog"]
    if chat:
        both = [
            [{"role": "user", "content": "the moon"}, {"role": "assistant", "content": a}] for a in (" cat", " dog")
        ]
    values = rewards(again, model, both, chat=chat)
    assert torch.equal(values, rewards(reft, model, both, chat=chat)) and values[0] > values[1]


def test_rewards_of_another_form_are_refused(rl):
    from reftlens.experiments.examples.reward import BradleyTerry, reward_rows

    model, rows, reft, objective = _rewarded(rl)
    with pytest.raises(ValueError, match="expected groups of 2"):
        rl.fit(reft, model, rows[:3], objective=objective, progress=False)
    with pytest.raises(ValueError, match="a reward is one number, and the head has 2 outputs"):
        BradleyTerry(rl.ReFT({rl.final_norm("l1"): rl.interventions.Head(32, 2)}))
    with pytest.raises(ValueError, match="expected a ReFT with one Head"):
        BradleyTerry(rl.ReFT({rl.final_norm("l1"): rl.LoReFT(32, 1)}))
    with pytest.raises(ValueError, match="reads 2 tokens of row 0"):
        wide = rl.ReFT({rl.final_norm("l2"): rl.interventions.Head(32, 1)})
        rl.fit(wide, model, rows, objective=BradleyTerry(wide), progress=False)
    with pytest.raises(TypeError, match="pair"):
        reward_rows(model, [("a", "b")])
