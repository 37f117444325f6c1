"""No pair is left out of a score in silence: those counted and those left out, by reason, are all of them."""

from dataclasses import replace

import pytest
import torch
from planted import ANSWERS, VALUES, D, pairs, planted

SITE = "last"


def _rl():
    import reftlens as rl

    return rl


def _exchange(where="last"):
    rl = _rl()
    return rl.ReFT({rl.resid_post(1, where): rl.Interchange(D)})


def _wrong(batch, rows):
    """The same prompts, some of them with another answer than the one that is right."""
    tokens = batch.tokens.clone()
    for row in rows:
        last = batch.target_mask[row].nonzero()[0]
        tokens[row, last] = ANSWERS[(ANSWERS.index(int(tokens[row, last])) + 1) % 4]
    return replace(batch, tokens=tokens)


def _data(count=40):
    """`(pairs, base, source with its own answers)`."""
    data, base = pairs(planted().value, count, 3)
    theirs = data.sources["source"].batch
    answers = data.tokens[data.target_mask][:, None]
    source = replace(base, tokens=torch.cat([theirs.tokens[:, :4], answers], dim=1))
    return data, base, source


def test_reasons_are_looked_at_in_their_order_and_every_pair_is_somewhere():
    ledger = _rl().causal.Ledger.of(
        4, {"a": {"x": torch.tensor([1, 1, 0, 0]).bool(), "y": torch.tensor([0, 1, 1, 0]).bool()}, "all": {}}
    )
    assert ledger.left_out("a") == {"x": 2, "y": 1} and ledger.left_out("all") == {}
    assert ledger.counted("a").tolist() == [False, False, False, True] and ledger.counted("all").all()
    frame = ledger.to_frame()
    assert frame.groupby("score")["pairs"].sum().tolist() == [4, 4]
    assert str(ledger) == "a counts 1 of 4 pairs (x: 2; y: 1)"
    with pytest.raises(ValueError, match="no score 'b', there are: 'a', 'all'"):
        ledger.left_out("b")


def test_each_score_says_why_it_leaves_out_which_pairs():
    data, base, source = _data()
    base, source = _wrong(base, [0, 1, 2]), _wrong(source, [2, 3])
    agree = (data.tokens[data.target_mask] == base.tokens[base.target_mask]).tolist()
    scores = _rl().causal.interchange_scores(
        _exchange(), planted().model, data, base=base, source=source, progress=False
    )
    ledger = scores.ledger
    assert ledger.left_out("restricted") == {"base answered wrong": 3, "source answered wrong": 1}
    assert ledger.counted("restricted").nonzero().flatten().tolist() == list(range(4, 40))
    assert ledger.left_out("log_odds_ratio") == {"the two answers agree": sum(agree)} and sum(agree) > 3
    assert scores.log_odds_ratio.count == 40 - sum(agree) and scores.restricted.count == 36
    assert ledger.left_out("accuracy") == ledger.left_out("exchanged") == {}
    for score in ledger.reasons:
        assert ledger.counted(score).sum() + sum(ledger.left_out(score).values()) == 40
    assert scores.to_frame()["not in restricted"].tolist()[:5] == [
        *["base answered wrong"] * 3,
        "source answered wrong",
        "",
    ]
    assert "restricted counts 36 of 40 pairs (base answered wrong: 3; source answered wrong: 1)" in str(scores)


def test_pairs_in_which_nothing_is_exchanged_are_counted_as_such_and_keep_their_weight():
    """A change of exactly 0 is one: it was once left out of the ratio of sums, which then forgot what was possible."""
    rl, model = _rl(), planted().model
    data, base, _ = _data()
    mixed = data.with_sources((data.sources["source"].batch, [-1, *range(1, 40)]))
    scores = rl.causal.interchange_scores(_exchange(), model, mixed, base=base, progress=False)
    assert scores.ledger.left_out("exchanged") == {"no source to take from": 1}
    alike = data.tokens.clone()
    alike[:20, :1] = data.sources["source"].batch.tokens[:20, :1]
    alike = replace(data, tokens=alike)
    own = replace(base, tokens=torch.cat([alike.tokens[:, :4], base.tokens[:, 4:]], dim=1))
    scores = rl.causal.interchange_scores(_exchange("first"), model, alike, base=own, progress=False)
    assert scores.ledger.left_out("exchanged") == {"alike up to what is exchanged": 20}
    assert scores.logit_difference_recovered.count == scores.ledger.counted("logit_difference_recovered").sum()
    assert scores.logit_difference_recovered.value == pytest.approx(0.0, abs=1e-6)


def test_a_map_and_the_scores_of_one_of_several_variables_have_one_too():
    rl, model = _rl(), planted().model
    value = planted().value
    train, test = pairs(value, 32, 1, list(VALUES)[:200])[0], pairs(value, 12, 2, list(VALUES)[200:])[0]
    settings = dict(layers=[1], positions=["last", "first"], ranks=(0,), shuffles=99, progress=False)
    grid = rl.interchange_map(model, train, test, **settings)
    assert grid.ledger.left_out("choose") == {"kept to report": 6} and grid.ledger.counted("exchanged at last").all()
    assert "choose counts 6 of 12 pairs" in str(grid)
    theirs = test.sources["source"].batch
    both = test.with_sources({"a": (theirs, [*range(8), *[-1] * 4]), "b": theirs})
    das = rl.ReFT({rl.resid_post(1, "last"): rl.DAS(D, variables={"a": 2, "b": 1})})
    settings = dict(variable="a", random=2, random_model=False, shuffles=99, progress=False)
    table = rl.controls(das, model, both, both, rl.FitConfig(steps=1), **settings)
    assert table.ledger.left_out("held out") == {"does not exchange 'a'": 4} == table.ledger.left_out("training")
    assert "held out counts 8 of 12 pairs (does not exchange 'a': 4)" in str(table)
    meter = rl.causal.subspace_illusion(das, model, both, variable="a", progress=False)
    assert meter.ledger.left_out("held out") == {"does not exchange 'a'": 4}


def test_the_sources_own_answers_come_from_pairs_and_are_checked(gpt2):
    rl = _rl()
    columns = {"base": ["the cat", "a dog"], "source": ["a dog", "the cat"], "answer": [" ran", " sat"]}
    known = {**columns, "base answer": [" sat", " ran"], "source answer": [" ran", " sat"]}
    rows = [dict(zip(known, values, strict=True)) for values in zip(*known.values(), strict=True)]
    read = rl.tasks.Pairs.from_frame(rows, base_answer="base answer", source_answer="source answer")
    data, base, source = read.encode(gpt2), read.encode_base(gpt2), read.encode_source(gpt2)
    assert source[[1, 0]].fingerprint == base.fingerprint
    site = rl.ReFT({rl.resid_post(1, "last"): rl.Interchange(D)})
    score = lambda **own: rl.causal.interchange_scores(site, gpt2, data, progress=False, **own)  # noqa: E731
    assert set(score(base=base, source=source).ledger.left_out("restricted")) <= {
        "base answered wrong",
        "source answered wrong",
    }
    with pytest.raises(ValueError, match="source has the prompt"):
        score(base=base, source=source[[1, 0]])
    with pytest.raises(ValueError, match=r"goes with base=…"):
        score(source=source)
    with pytest.raises(ValueError, match="own answers are not known"):
        rl.tasks.Pairs.from_frame([{k: row[k] for k in columns} for row in rows]).encode_source(gpt2)
