"""Laws of the orthonormal frame: it stays one whatever an optimizer does, and costs no d × d buffer."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = [(1, 1), (5, 1), (7, 3), (24, 3), (6, 6), (64, 8)]
EPS = {torch.float32: 1.2e-7, torch.float64: 2.3e-16}


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices this small are slower on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rl():
    import reftlens

    return reftlens


def frame(d, rank, *, seed=0, dtype=torch.float32):
    from reftlens.interventions.subspace import Frame

    result = Frame(d, rank)
    result.reset(torch.Generator().manual_seed(seed))
    return result.to(dtype)


def shaken(d, rank, dtype=torch.float64, scale=1.0):
    """A frame whose parameter has left the manifold, as after some training."""
    result = frame(d, rank, dtype=dtype)
    with torch.no_grad():
        result.matrix.add_(scale * torch.randn(d, rank, dtype=dtype))
    return result


def off_orthonormal(basis):
    return (basis.T @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)).abs().max().item()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_frame_starts_as_unit_vectors_and_draws_nothing_by_itself(shape):
    from reftlens.interventions.subspace import Frame

    state = torch.random.get_rng_state()
    assert torch.equal(Frame(*shape)(), torch.eye(*shape))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_columns_are_orthonormal_wherever_the_parameter_is(shape, dtype):
    for scale in (0.0, 0.1, 10.0):
        # Householder QR is backward stable: the error is a few units of rounding per column.
        assert off_orthonormal(shaken(*shape, dtype, scale)()) < 10 * shape[1] * EPS[dtype]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_frame_spans_what_the_parameter_spans_with_a_positive_triangular_factor(shape):
    """This fixes the gauge: `QᵀM` upper triangular with positive diagonal has one solution only."""
    f = shaken(*shape)
    q, m = f(), f.matrix
    r = q.T @ m
    assert torch.allclose(q @ r, m, atol=1e-13)  # float64: nothing of M lies outside
    assert r.tril(-1).abs().max() < 1e-13
    assert (r.diagonal() > 0).all()


def gram_schmidt(m):
    """The same frame by the textbook: subtract the projections, then normalise."""
    columns = []
    for column in m.T:
        for done in columns:
            column = column - (done @ column) * done
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_frame_is_that_of_gram_schmidt(rl, shape):
    m = torch.randn(shape, dtype=torch.float64)
    assert torch.allclose(
        rl.interventions.orthonormal(m), gram_schmidt(m), atol=1e-10
    )  # Gram-Schmidt itself loses digits


@pytest.mark.parametrize("shape", [(5, 1), (7, 3), (4, 4)])
def test_gradients_agree_with_finite_differences(rl, shape):
    m = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert gradcheck(rl.interventions.orthonormal, (m,))


def test_gradients_are_those_of_gram_schmidt(rl):
    m = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    readout = torch.randn(9, 4, dtype=torch.float64)
    (ours,) = torch.autograd.grad((rl.interventions.orthonormal(m) * readout).sum(), m)
    (theirs,) = torch.autograd.grad((gram_schmidt(m) * readout).sum(), m)
    assert torch.allclose(ours, theirs, atol=1e-11)
    assert ours.abs().max() > 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_scaling_columns_leaves_the_frame_and_mixing_them_turns_it(rl, shape):
    m = torch.randn(shape, dtype=torch.float64)
    q = rl.interventions.orthonormal(m)
    assert torch.equal(rl.interventions.orthonormal(m * 4.0), q)  # a power of two rounds nothing
    assert torch.allclose(
        rl.interventions.orthonormal(m * torch.rand(shape[1], dtype=torch.float64).add(0.1)), q, atol=1e-12
    )
    upper = torch.randn(shape[1], shape[1], dtype=torch.float64).triu(1) + 2 * torch.eye(shape[1], dtype=torch.float64)
    assert torch.allclose(rl.interventions.orthonormal(m @ upper), q, atol=1e-11)
    assert torch.allclose(rl.interventions.orthonormal(-m), -q, atol=1e-12)
    if shape[1] > 1:
        assert not torch.allclose(rl.interventions.orthonormal(m.flip(1)), q, atol=0.01)


def test_weight_decay_alone_never_moves_the_frame():
    """pyreft's rotation is zero after one AdamW step with any weight decay, its default included."""
    f = shaken(24, 3, torch.float32)
    before, norm = f().detach().clone(), f.matrix.norm().item()
    optimizer = torch.optim.AdamW(f.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(100):
        f.matrix.grad = torch.zeros_like(f.matrix)
        optimizer.step()
    assert f.matrix.norm() < 0.5 * norm  # the decay did reach the parameter
    assert torch.allclose(f(), before, atol=1e-6)  # float32 rounding of the shrunken parameter


@pytest.mark.parametrize("weight_decay", [0.0, 1e-3, 0.01, 1.0])
def test_the_frame_stays_orthonormal_and_learns_under_any_weight_decay(weight_decay):
    f, goal = frame(24, 3), frame(24, 3, seed=1)().detach()
    optimizer = torch.optim.AdamW(f.parameters(), lr=0.02, weight_decay=weight_decay)
    losses = []
    for _ in range(60):
        loss = (f() - goal).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert off_orthonormal(f()) < 3e-6
    assert losses[-1] < 0.2 * losses[0]


def test_settling_keeps_the_frame_and_is_idempotent_up_to_rounding():
    f = shaken(24, 3, torch.float32)
    before, old = f().detach().clone(), f.matrix.detach().clone()
    f.settle()
    assert torch.equal(f.matrix, before)  # what is stored is what acted
    assert not torch.allclose(f.matrix, old, atol=0.1)
    assert torch.allclose(f(), before, atol=1e-6)
    f.settle()
    assert torch.allclose(f.matrix, before, atol=1e-6)


def test_settling_keeps_the_parameter_itself_so_that_an_optimizer_still_trains_it():
    f = shaken(24, 3, torch.float32)
    parameter = f.matrix
    optimizer = torch.optim.SGD(f.parameters(), lr=0.1)
    f.settle()
    assert f.matrix is parameter
    before = f().detach().clone()
    f()[0, 0].backward()
    optimizer.step()
    assert not torch.equal(f(), before)


def test_an_orthonormal_parameter_is_its_own_frame():
    f, goal = frame(24, 3), frame(24, 3, seed=1)().detach()
    f.set(goal)
    assert torch.equal(f.matrix, goal)
    assert torch.allclose(f(), goal, atol=1e-6)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda q: q * 1.001,
        lambda q: torch.cat([q[:, :2], q[:, :1]], dim=1),
        lambda q: q + 0.001,
        lambda q: torch.zeros_like(q),
        lambda q: torch.full_like(q, torch.nan),
    ],
    ids=["scaled", "repeated", "shifted", "zero", "nan"],
)
def test_a_basis_that_is_not_orthonormal_is_refused_and_changes_nothing(spoil):
    f = frame(24, 3)
    before = f.matrix.detach().clone()
    with pytest.raises(ValueError, match=r"not orthonormal.*pass it through interventions.orthonormal first"):
        f.set(spoil(f().detach()))
    assert torch.equal(f.matrix, before)


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_a_basis_of_another_shape_is_refused(columns):
    """One column would broadcast to a frame of equal ones."""
    with pytest.raises(ValueError, match=rf"the basis has shape \[24, {columns}\], expected \[24, 3\]"):
        frame(24, 3).set(frame(24, columns)().detach())


@pytest.mark.parametrize(("d", "rank"), [(4, 5), (4, 0), (4, -1)])
def test_a_rank_that_does_not_fit_is_refused(d, rank):
    with pytest.raises(ValueError, match=rf"rank={rank} does not fit into d={d}: need 1 <= rank <= d"):
        frame(d, rank)


def test_the_draw_depends_on_the_generator_only():
    first = frame(24, 3, seed=5).matrix
    torch.manual_seed(99)
    assert torch.equal(frame(24, 3, seed=5).matrix, first)
    assert not torch.allclose(frame(24, 3, seed=6).matrix, first, atol=0.1)
    again = frame(24, 3, seed=6)
    state = torch.random.get_rng_state()
    again.reset(torch.Generator().manual_seed(5))
    assert torch.equal(again.matrix, first)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_draw_is_uniform_among_frames():
    """Its law is the same after any rotation: mean 0, `E[Q Qᵀ] = rank/d · 1`, fourth moment `3 / (d (d + 2))`.

    LAPACK's own signs would make the first entry negative always.
    """
    d, rank, draws = 6, 2, 1500
    generator = torch.Generator().manual_seed(0)
    f = frame(d, rank)
    seen = torch.empty(draws, d, rank)
    for i in range(draws):
        f.reset(generator)
        seen[i] = f.matrix.detach()
    noise = 5 / math.sqrt(draws * d)  # five standard deviations: a column has entries of variance 1/d
    assert seen.mean(dim=0).abs().max() < noise
    projector = torch.einsum("nir,njr->ij", seen, seen) / draws
    assert (projector - rank / d * torch.eye(d)).abs().max() < noise
    assert seen.pow(4).mean(dim=0).sub(3 / (d * (d + 2))).abs().max() < noise / 2


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (7, 3), (6, 6)])
def test_degrees_of_freedom_are_the_rank_of_the_jacobian(rl, shape):
    m = torch.randn(shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(rl.interventions.orthonormal, m)
    count = torch.linalg.matrix_rank(jacobian.reshape(m.numel(), m.numel()), rtol=1e-9).item()
    assert frame(*shape).degrees_of_freedom == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_in_half_precision_gives_a_frame_in_single_precision(dtype):
    basis = frame(24, 3, dtype=dtype)()
    assert basis.dtype == torch.float32
    assert off_orthonormal(basis) < 3e-6


class _Largest(TorchDispatchMode):
    """The most numbers that any tensor had, inside the block, forward and backward."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_no_tensor_is_larger_than_the_frame_forward_or_backward():
    d, rank = 512, 4
    f = frame(d, rank)
    with _Largest() as seen:
        f().square().sum().backward()
    assert f.matrix.grad is not None
    assert seen.numbers == d * rank
    with _Largest() as control:  # torch's own orthogonal map, as pyreft uses it, does not pass
        torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(rank, d, bias=False)).weight.sum().backward()
    assert control.numbers >= d * d
