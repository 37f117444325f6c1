"""Planted directions are found by every method, and by none where labels mean nothing."""

import numpy
import pandas
import pytest
import torch

import reftlens as rl

D, N = 12, 600


def _planted(seed=0, gap=3.0):
    """`(x, labels, direction)`: two classes `gap` apart along one direction, noise of unit size in all."""
    g = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(D, generator=g, dtype=torch.float64), dim=0)
    labels = torch.arange(N) % 2
    return torch.randn(N, D, generator=g).double() + gap * (labels - 0.5)[:, None] * direction, labels, direction


METHODS = {
    "difference of means": lambda x, y: rl.directions.difference_of_means(x, y),
    "linear probe": lambda x, y: rl.directions.linear_probe(x, y, l2=0.1),
    "LDA": lambda x, y: rl.directions.lda(x, y),
    "CAA": lambda x, y: rl.directions.caa(x[y == 1], x[y == 0]),
    "RepE": lambda x, y: rl.directions.repe(x[y == 1], x[y == 0]),
    "PCA": lambda x, y: rl.directions.pca(x),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_planted_direction_is_found_and_points_to_the_later_class(name):
    x, labels, direction = _planted()
    estimate = METHODS[name](x, labels)
    cosine = (estimate.basis[:, 0] @ direction).item()
    assert (abs(cosine) if name == "PCA" else cosine) > 0.95
    assert estimate.name == name


@pytest.mark.parametrize("name", [n for n in METHODS if n != "PCA"])
def test_shuffled_labels_find_nothing(name):
    x, labels, direction = _planted(gap=1.0)
    shuffled = labels[torch.randperm(N, generator=torch.Generator().manual_seed(3))]
    estimate = METHODS[name](x, shuffled)
    assert abs(estimate.basis[:, 0] @ direction) < 0.8
    if name in ("difference of means", "CAA"):
        assert estimate.scale[0] < 0.5


@pytest.mark.parametrize("name", [n for n in METHODS if n != "LDA"])
def test_a_rotation_of_the_data_rotates_the_direction(name):
    x, labels, _ = _planted(1)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)).Q
    plain, turned = (METHODS[name](data, labels).basis[:, 0] for data in (x, x @ turn.T))
    assert abs((turn @ plain) @ turned) == pytest.approx(1.0, abs=1e-3 if name == "linear probe" else 1e-8)


def test_against_numpy():
    x, labels, _ = _planted(2)
    data, classes = x.numpy(), labels.numpy()
    values, vectors = numpy.linalg.eigh(numpy.cov(data.T, bias=True))
    estimate = rl.directions.pca(x, 3)
    for i in range(3):
        assert abs(estimate.basis[:, i].numpy() @ vectors[:, -1 - i]) == pytest.approx(1.0)
        assert estimate.scale[i] == pytest.approx(values[-1 - i] ** 0.5)
    difference = data[classes == 1].mean(0) - data[classes == 0].mean(0)
    means = rl.directions.difference_of_means(x, labels)
    assert numpy.allclose(means.basis[:, 0].numpy() * means.scale[0].item(), difference)
    within = sum(numpy.cov(data[classes == c].T, bias=True) * (classes == c).sum() for c in (0, 1)) / (N - 2)
    fisher = numpy.linalg.solve(0.5 * within + 0.5 * numpy.trace(within) / D * numpy.eye(D), difference)
    assert abs(rl.directions.lda(x, labels, shrinkage=0.5).basis[:, 0].numpy() @ fisher) == pytest.approx(
        numpy.linalg.norm(fisher)
    )


def test_the_probe_is_at_the_minimum():
    x, labels, _ = _planted(4)
    estimate = rl.directions.linear_probe(x, labels, l2=0.1).basis[:, 0]
    z = (x - x.mean(0)) / x.std(0).mean()
    weight = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=0.5)
    for _ in range(2000):  # two-class softmax with weights ±w/2: the penalty on w is l2/4
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z @ weight + bias, labels.double())
        (loss + 0.1 * weight.square().sum() / 4).backward()
        optimizer.step()
    assert torch.nn.functional.cosine_similarity(estimate, weight.detach(), dim=0) == pytest.approx(1.0, abs=1e-6)


def test_several_classes_span_their_means():
    g = torch.Generator().manual_seed(0)
    means = torch.randn(4, D, generator=g).double()
    labels = torch.arange(N) % 4
    x = means[labels] + 0.01 * torch.randn(N, D, generator=g).double()
    for method in (rl.directions.difference_of_means, rl.directions.lda, rl.directions.linear_probe):
        basis = method(x, labels).basis
        assert basis.shape == (D, 3)
        torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))
    basis, centred = rl.directions.difference_of_means(x, labels).basis, means - means.mean(0)
    torch.testing.assert_close(centred @ basis @ basis.T, centred, atol=0.02, rtol=0)


def test_what_is_done_with_a_direction():
    x, labels, _ = _planted()
    estimate, h = rl.directions.difference_of_means(x, labels), torch.randn(5, D)
    v = estimate.basis[:, 0].float()
    torch.testing.assert_close(estimate.as_steering()(h), h + estimate.scale[0].float() * v)
    torch.testing.assert_close(estimate.as_ablation()(h) @ v, torch.zeros(5), atol=1e-6, rtol=0)
    source = torch.randn(5, D)
    torch.testing.assert_close(estimate.as_exchange()(h, source=source[:, None]) @ v, source @ v)
    torch.testing.assert_close(rl.directions.mean_ablation(x)(h), x.mean(0).float().expand(5, D))
    assert torch.equal(
        rl.directions.random_subspace(D, 3, seed=4).basis, rl.directions.random_subspace(D, 3, seed=4).basis
    )
    assert not torch.equal(
        rl.directions.random_subspace(D, 3, seed=4).basis, rl.directions.random_subspace(D, 3, seed=5).basis
    )


def test_what_makes_no_direction_is_said():
    x, labels, _ = _planted()
    with pytest.raises(ValueError, match="two classes or more"):
        rl.directions.difference_of_means(x, torch.zeros(N, dtype=torch.long))
    with pytest.raises(ValueError, match="labels for"):
        rl.directions.lda(x, labels[:3])
    with pytest.raises(ValueError, match="they are pairs"):
        rl.directions.caa(x[:3], x[:2])
    with pytest.raises(ValueError, match="do not differ"):
        rl.directions.caa(x, x)
    with pytest.raises(ValueError, match="expected 1 to 12"):
        rl.directions.pca(x, 13)
    with pytest.raises(ValueError, match="shrinkage"):
        rl.directions.lda(x, labels, shrinkage=0.0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "turned_into", [torch.Tensor.numpy, torch.Tensor.tolist, lambda x: pandas.DataFrame(x.numpy())]
)
def test_activations_may_be_an_array_lists_or_a_table(name, turned_into):
    x, labels, _ = _planted()
    positive, negative = (turned_into(x[labels == c].contiguous()) for c in (1, 0))
    of_pairs = {"CAA": rl.directions.caa, "RepE": rl.directions.repe}
    of_classes = {"difference of means": rl.directions.difference_of_means, "LDA": rl.directions.lda}
    if name in of_pairs:
        estimate = of_pairs[name](positive, negative)
    elif name == "PCA":
        estimate = rl.directions.pca(turned_into(x))
    elif name in of_classes:
        estimate = of_classes[name](turned_into(x), labels)
    else:
        estimate = rl.directions.linear_probe(turned_into(x), labels, l2=0.1)
    # torch reads lists as float32, and the columns of a table lie in another order, so sums round differently
    assert torch.allclose(estimate.basis, METHODS[name](x, labels).basis, atol=1e-5)


def test_classes_are_in_the_order_of_their_names():
    x, labels, direction = _planted()
    towards = rl.directions.difference_of_means(x, ["good" if label else "bad" for label in labels])
    away = rl.directions.difference_of_means(x, ["good" if label else "zero" for label in labels])
    assert towards.basis[:, 0] @ direction > 0.95 and away.basis[:, 0] @ direction < -0.95
