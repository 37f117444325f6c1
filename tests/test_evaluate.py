"""Evaluation: per example, base beside edited, equal to what the logits say."""

import pytest
import torch


def batch_of(ids):
    """Rows of tokens whose last one is the target."""
    from reftlens.text.batch import batch_from_rows

    return batch_from_rows(ids, [[1] * (len(row) - 1) + [2] for row in ids])


def _setup(model):
    import reftlens as rl

    data = rl.encode(model, [rl.Example("the cat", " sat on"), rl.Example("a dog ran by the green", " hill while")])
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(model.cfg.d_model, 2, dropout=0.5)})
    return data, reft


def _losses(logits, data):
    """Per example, by hand."""
    result = []
    for i in range(len(data)):
        at = data.target_mask[i].nonzero().flatten()
        logprobs = logits[i].log_softmax(dim=-1)
        result.append(-sum(logprobs[t - 1, data.tokens[i, t]] for t in at).item() / len(at))
    return result


def test_losses_and_accuracies_are_those_of_the_logits(any_model):
    import reftlens as rl

    data, reft = _setup(any_model)
    found = rl.evaluate(reft, any_model, data, batch_size=1, progress=False)
    reft.eval()
    with torch.no_grad():
        base = any_model(data.tokens, attention_mask=data.attention_mask.long())
        with reft.on(any_model, data):
            edited = any_model(data.tokens, attention_mask=data.attention_mask.long())
    # float32: batches of one and of two sum in another order
    assert found.loss[0].tolist() == pytest.approx(_losses(base, data), abs=1e-4)
    assert found.loss[1].tolist() == pytest.approx(_losses(edited, data), abs=1e-4)
    assert (found.loss[1] - found.loss[0]).abs().max() > 1e-3
    hits = [(edited[0, t - 1].argmax() == data.tokens[0, t]).item() for t in data.target_mask[0].nonzero().flatten()]
    assert found.accuracy[1, 0] == pytest.approx(sum(hits) / len(hits))


def test_strength_zero_is_the_base_bit_for_bit(gpt2):
    import reftlens as rl

    data, reft = _setup(gpt2)
    for reuse in (True, False):
        found = rl.evaluate(reft, gpt2, data, [1, 0, rl.Variant(0, among="last")], reuse=reuse, progress=False)
        alone = rl.evaluate(reft, gpt2, data, [0], reuse=reuse, progress=False)
        for i in (1, 2):
            assert torch.equal(found.loss[i], alone.loss[0]) and torch.equal(found.accuracy[i], alone.accuracy[0])
        assert not torch.equal(found.loss[0], alone.loss[0])


def test_B17_evaluation_has_no_dropout_and_leaves_the_mode(gpt2):
    import reftlens as rl

    data, reft = _setup(gpt2)
    reft.train()
    first, second = (rl.evaluate(reft, gpt2, data, progress=False) for _ in range(2))
    assert torch.equal(first.loss, second.loss) and torch.equal(first.accuracy, second.accuracy)
    assert reft.training and reft[0].dropout.training


def test_B18_a_classifier_is_evaluated_during_training_and_after_it_with_its_own_objective(gpt2):
    import reftlens as rl

    labels = torch.tensor([5, 9, 20])  # the answer is one of three tokens

    def choice(logits, batch):
        wanted = (batch.target_ids[:, None] == labels).float().argmax(dim=1)
        return torch.nn.functional.cross_entropy(logits[:, labels], wanted, reduction="none")

    prompts = rl.encode_prompts(gpt2, ["the cat sat", "a dog ran by the hill", "the moon"])
    ids = [
        [*row[keep].tolist(), int(label)]
        for row, keep, label in zip(prompts.tokens, prompts.prompt_mask, labels, strict=True)
    ]
    data = batch_of(ids)
    reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(gpt2.cfg.d_model, 2)})
    run = rl.fit(reft, gpt2, data, steps=6, lr=0.05, objective=choice, validation=data, eval_every=2, progress=False)
    after = rl.evaluate(reft, gpt2, data, objective=choice, progress=False)
    assert [step for step, _ in run.validation] == [2, 4, 6]
    # float32: the one sums over a batch of three, the other over targets of each example
    assert after.loss[1].mean().item() == pytest.approx(run.validation[-1][1], abs=1e-5)
    assert after.loss[1].sum() < after.loss[0].sum()


def test_the_result_has_a_frame_a_plot_and_a_sentence(gpt2):
    import reftlens as rl

    data, reft = _setup(gpt2)
    found = rl.evaluate(reft, gpt2, data, progress=False)
    assert found.to_frame().groupby("strength").loss.mean().tolist() == pytest.approx(found.loss.mean(dim=1).tolist())
    assert "2 examples" in str(found) and "nats" in found.plot().get_ylabel()


def test_each_mean_is_told_with_its_interval_and_drawn_with_it(gpt2):
    """Oracle: means of two examples drawn with replacement are one, the other or halfway."""
    import reftlens as rl

    data, reft = _setup(gpt2)
    found = rl.evaluate(reft, gpt2, data, progress=False)
    for v, loss in enumerate(found.estimate("loss")):
        assert (loss.low, loss.high) == pytest.approx(found.loss[v].aminmax()) and loss.count == 2
        assert loss.value == pytest.approx(found.loss[v].mean().item()) and f"loss {loss:.4f}, accuracy" in str(found)
    assert [line.partition(":")[0] for line in str(found).splitlines()[1:]] == ["unedited", "strength 1"]
    (band,) = found.plot().collections
    edges = {tuple(point) for path in band.get_paths() for point in path.vertices.tolist()}
    assert edges == {(x, end) for x, e in enumerate(found.estimate("loss")) for end in (e.low, e.high)}
    with pytest.raises(ValueError, match="measure='hits', expected one of 'loss', 'accuracy'"):
        found.estimate("hits")
    table, accuracy = found.by_variant(), found.estimate("accuracy")
    assert list(table.index) == ["unedited", "strength 1"] and table["accuracy_high"].tolist() == [
        a.high for a in accuracy
    ]
    axes = found.plot(measure="accuracy")
    assert "share of targets" in axes.get_ylabel() and axes.lines[-1].get_ydata().tolist() == [
        a.value for a in accuracy
    ]
    alone = rl.evaluate(reft, gpt2, data[[0]], progress=False)
    assert "no interval; only 1 example" in str(alone) and alone.plot() is not None, "no interval of one example"


@pytest.mark.parametrize(
    ("shares", "low", "high"),
    [([1.0] * 12, 0.025 ** (1 / 12), 1.0), ([0.0] * 12, 0.0, 1 - 0.025 ** (1 / 12)), ([0.5] * 12, 0.5, 0.5)],
)
def test_an_accuracy_of_whole_answers_has_the_exact_interval_and_one_of_parts_the_bootstrap(shares, low, high):
    """Clopper-Pearson at either end in closed form; what is half right on every example is a point to the bootstrap."""
    import reftlens as rl
    from reftlens.scoring import Evaluation
    from reftlens.scoring.statistics import mean_of

    variants = rl.Variant(1.0), rl.Variant(2.0)
    accuracy = torch.tensor([shares, [0.0, 0.5, 1.0] * 4], dtype=torch.float64)
    exact, parts = Evaluation(variants, torch.zeros(2, 12), accuracy, "").estimate("accuracy")
    assert (exact.low, exact.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
    assert parts == mean_of(accuracy[1]) and parts.low < 0.5 < parts.high


def test_data_without_targets_is_refused(gpt2):
    import reftlens as rl

    _, reft = _setup(gpt2)
    with pytest.raises(ValueError, match="no target"):
        rl.evaluate(reft, gpt2, rl.encode_prompts(gpt2, ["the cat"]), progress=False)


def test_losses_of_groups_are_those_of_each_of_their_rows_and_another_number_of_losses_is_refused(llama):
    import reftlens as rl

    class Together(rl.training.Objective):
        group = 2

        def __init__(self, size):
            self.size = size

        def losses(self, predictions):
            return -predictions.by_row(predictions.log_probs).reshape(-1, self.size).sum(dim=1)

    rows = [rl.Example("the cat", text) for text in (" sat on", " looked at the moon", " ran", " sat")]
    data, site = rl.encode(llama, rows), rl.resid_post(1, "last")
    reft = rl.ReFT({site: rl.LoReFT(llama.cfg.d_model, 2)})

    def loss(size):
        return rl.evaluate(reft, llama, data, objective=Together(size), progress=False).loss

    pairs, each = loss(2), loss(1)
    assert torch.allclose(pairs[:, ::2], each[:, ::2] + each[:, 1::2]) and torch.equal(pairs[:, ::2], pairs[:, 1::2])
    assert (each[:, 0] != each[:, 1]).all()
    with pytest.raises(ValueError, match=r"1 losses for 12 targets in 4 rows, or 2 groups: expected one for each"):
        loss(4)
