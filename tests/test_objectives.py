"""Laws of the objective: negative log-likelihood of each target, in nats, one number per target."""

import math

import pytest
import torch


@pytest.fixture
def rl():
    import reftlens

    return reftlens


def batch_of(rows, vocab=11):
    """Rows of `(prompt, response)` lengths with random ids."""
    from reftlens.text.batch import batch_from_rows

    ids = [torch.randint(vocab, (p + r,)).tolist() for p, r in rows]
    return batch_from_rows(ids, [[1] * p + [2] * r for p, r in rows])


@pytest.fixture
def batch(rl):
    return batch_of([(2, 3), (4, 1), (1, 5)])


def test_each_target_costs_minus_the_logarithm_of_its_probability(rl, batch):
    logits = 3 * torch.randn(9, 11, dtype=torch.float64)
    losses = rl.training.cross_entropy(logits, batch)
    assert losses.shape == (9,)
    place = 0
    for row, target in zip(batch.tokens, batch.target_mask, strict=True):
        for token in row[target].tolist():
            weights = [math.exp(v) for v in logits[place].tolist()]
            assert losses[place].item() == pytest.approx(-math.log(weights[token] / sum(weights)), rel=1e-12)
            place += 1
    assert place == 9


def test_known_values(rl, batch):
    assert torch.allclose(rl.training.cross_entropy(torch.zeros(9, 11), batch), torch.full((9,), math.log(11)))
    certain = 100.0 * torch.nn.functional.one_hot(batch.target_ids, 11).float()
    assert rl.training.cross_entropy(certain, batch).max() < 1e-6
    assert torch.allclose(rl.training.cross_entropy(-certain, batch), torch.tensor(100 + math.log(10)), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_scored_in_single(rl, batch, dtype):
    logits = (10 * torch.randn(9, 11)).to(dtype)
    losses = rl.training.cross_entropy(logits, batch)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, rl.training.cross_entropy(logits.float(), batch))


def test_double_precision_stays(rl, batch):
    assert rl.training.cross_entropy(torch.randn(9, 11, dtype=torch.float64), batch).dtype == torch.float64


def test_the_gradient_is_probability_minus_target(rl, batch):
    logits = torch.randn(9, 11, dtype=torch.float64, requires_grad=True)
    rl.training.cross_entropy(logits, batch).sum().backward()
    expected = logits.detach().softmax(dim=1)
    expected[torch.arange(9), batch.target_ids] -= 1
    assert torch.allclose(logits.grad, expected, atol=1e-14)


def test_losses_of_a_batch_are_those_of_its_rows(rl, batch):
    logits = torch.randn(9, 11)
    together = rl.training.cross_entropy(logits, batch)
    alone = [rl.training.cross_entropy(logits[batch.target_rows == i], batch[i]) for i in range(len(batch))]
    assert torch.equal(torch.cat(alone), together)


def test_logits_that_are_not_one_row_per_target_are_refused(rl, batch):
    with pytest.raises(ValueError):
        rl.training.cross_entropy(torch.randn(8, 11), batch)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
def test_losses_and_gradients_are_those_of_torch(rl, dtype, rtol, offset):
    """Of more rows than are computed at once, some tokens being impossible."""
    batch = batch_of([(2, 30), (4, 7)], vocab=90)
    logits = 8 * torch.randn(37, 100, dtype=dtype) + offset
    logits[:, 95:] = -float("inf")
    expected = torch.nn.functional.cross_entropy(logits.requires_grad_(), batch.target_ids, reduction="none")
    losses, weight = rl.training.cross_entropy(logits, batch), torch.randn(37, dtype=dtype)
    assert torch.allclose(losses, expected, rtol=0, atol=rtol * expected.max().item())
    grads = [torch.autograd.grad((values * weight).sum(), logits)[0] for values in (losses, expected)]
    assert torch.allclose(*grads, rtol=0, atol=rtol * weight.abs().max().item())
