"""Laws of the interventions: the paper's formulas, strength, dropout, starts, arithmetic and honest counts."""

import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

REFERENCE = Path(__file__).parent / "reference"
D, RANK = 16, 3

# The paper's formulas, typed out; `h` is a row, `R` has orthonormal columns, `f` is the activation function.
FORMULAS = {
    "LoReFT": lambda h, f, W, b, R: h + (f(h @ W.T + b) - h @ R) @ R.T,
    "DiReFT": lambda h, f, W, b, W2: h + f(h @ W.T + b) @ W2,
    "OrthoDiReFT": lambda h, f, W, b, R: h + f(h @ W.T + b) @ R.T,
    "NoReFT": lambda h, f, W, b, W2: h + (f(h @ W.T + b) - h @ W2.T) @ W2,
    "ConsReFT": lambda h, f, b, R: h + (b - h @ R) @ R.T,
    "LobiReFT": lambda h, f, b, R: h + b @ R.T,
}
FUNCTIONS = {
    "linear": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}
READS = ("LoReFT", "DiReFT", "OrthoDiReFT", "NoReFT")
ORTHONORMAL = ("LoReFT", "OrthoDiReFT", "ConsReFT", "LobiReFT")
# Every kind, the fixed ones in each of their forms. Ablations and steering vectors get random tensors in `build`.
GATED = {
    "LoReFT behind Threshold": lambda rl, d: rl.interventions.Threshold(torch.randn(d)),
    "LoReFT behind Sigmoid": lambda rl, d: rl.interventions.Sigmoid(d, temperature=2.0),
}
EVERY = (*FORMULAS, "RED", "SteeringVector", "zero ablation", "mean ablation", "subspace ablation", *GATED)
PYREFT = {
    "LoReFT": "LoreftIntervention",
    "NoReFT": "NoreftIntervention",
    "ConsReFT": "ConsreftIntervention",
    "LobiReFT": "LobireftIntervention",
    "OrthoDiReFT": "DireftIntervention",
    "DiReFT": "NodireftIntervention",
}
# Every kind with every activation that it takes.
ACTIVATED = [(n, a) for n in FORMULAS for a in FUNCTIONS if a == "linear" or n in READS]
# Kinds and functions with an identity start: the code is 0 there, and something has a gradient.
IDENTITY = [
    ("LoReFT", "linear"),
    ("NoReFT", "linear"),
    ("LobiReFT", "linear"),
    ("DiReFT", "linear"),
    ("DiReFT", "gelu"),
    ("DiReFT", "tanh"),
    ("OrthoDiReFT", "linear"),
    ("OrthoDiReFT", "silu"),
]


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


@torch.no_grad()
def build(rl, name, d=D, rank=RANK, dtype=torch.float32, **settings):
    """One intervention of a kind in eval mode, every parameter far from its start."""
    if name in GATED:
        inner = build(rl, name.split()[0], d, rank, dtype, **settings)
        module = rl.interventions.Gated(inner, GATED[name](rl, d)).to(dtype)
        for parameter in module.gate.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape).to(dtype))
        return module.eval()
    if name == "SteeringVector":
        return rl.SteeringVector(d, torch.randn(d)).to(dtype).eval()
    if name == "zero ablation":
        return rl.Ablation(d).to(dtype).eval()
    if name == "mean ablation":
        return rl.Ablation(d, torch.randn(d)).to(dtype).eval()
    if name == "subspace ablation":
        return rl.Ablation(d, torch.randn(d), torch.randn(d, rank)).to(dtype).eval()
    ranks = () if name == "RED" else (rank,)
    module = getattr(rl.interventions, name)(d, *ranks, **settings).to(dtype)
    for parameter in module.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape).to(dtype))
    return module.eval()


def gram_schmidt(m):
    columns = []
    for column in m.T:
        for done in columns:
            column = column - (done @ column) * done
        columns.append(column / column.norm())
    return torch.stack(columns, dim=1)


def weights(module):
    """The weights of a module in the letters of `FORMULAS`, the frame by Gram-Schmidt."""
    parameters = {n: p for n, p in module.named_parameters() if n in ("W", "b", "W2")}
    return parameters | ({} if module.frame is None else {"R": gram_schmidt(module.frame.matrix)})


# -- the formulas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "activation"), [(n, a) for n, a in ACTIVATED if a in ("linear", "relu")])
def test_on_equal_weights_each_kind_equals_pyrefts(rl, name, activation):
    prefix = PYREFT[name] + ("." if activation == "linear" else f".{activation}.")
    stored = load_file(REFERENCE / "pyreft_functions.safetensors")
    theirs = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    module = getattr(rl.interventions, name)(24, 3, activation=activation)
    with torch.no_grad():
        for letter in ("W", "b", "W2"):
            if letter in theirs:
                getattr(module, letter).copy_(theirs[letter])
        if "R" in theirs:
            module.frame.set(theirs["R"])
        difference = (module(theirs["h"]) - theirs["out"]).abs().max().item()
    assert difference < 1e-6
    assert (theirs["out"] - theirs["h"]).abs().max() > 0.1  # the edit is no small thing


@pytest.mark.parametrize(("name", "activation"), ACTIVATED)
def test_each_kind_is_the_papers_formula(rl, name, activation):
    module = build(rl, name, dtype=torch.float64, activation=activation)
    for shape in ((D,), (7, D), (2, 5, D), (0, D)):
        h = torch.randn(shape, dtype=torch.float64)
        expected = FORMULAS[name](h, FUNCTIONS[activation], **weights(module))
        # float64 against float64: only rounding is left.
        assert torch.allclose(module(h), expected, rtol=0, atol=1e-12)


def test_the_kinds_are_told_apart_by_their_formulas(rl):
    """The oracle is no tautology: another kind's formula does not fit."""
    h = torch.randn(7, D, dtype=torch.float64)
    module = build(rl, "LoReFT", dtype=torch.float64)
    for name in ("OrthoDiReFT", "ConsReFT", "LobiReFT"):
        letters = {k: v for k, v in weights(module).items() if k in inspect.signature(FORMULAS[name]).parameters}
        assert not torch.allclose(module(h), FORMULAS[name](h, FUNCTIONS["linear"], **letters), atol=0.01)


def test_red_scales_and_shifts_each_number_by_itself(rl):
    module, h = build(rl, "RED", dtype=torch.float64), torch.randn(7, D, dtype=torch.float64)
    s, b = module.scale.detach(), module.bias.detach()
    assert torch.allclose(module(h), s * h + b, rtol=0, atol=1e-12)
    assert torch.allclose(module(h, strength=0.5), h / 2 + (s * h + b) / 2, rtol=0, atol=1e-12)
    assert module.stored_parameters == module.degrees_of_freedom == 2 * D and module.rank == D
    with pytest.raises(TypeError, match="rank"):
        rl.interventions.RED(D, rank=4)


def test_red_starts_as_the_identity_learns_from_there_and_drops_out_of_its_code(rl):
    module, h = rl.interventions.RED(D, dropout=0.5).train(), torch.randn(200, D)
    assert torch.equal(module(h), h) and torch.equal(module(h.bfloat16(), strength=-2.0), h.bfloat16())
    module(h).square().sum().backward()
    assert all(p.grad.abs().min() > 0 for p in module.parameters())
    module = build(rl, "RED", dtype=torch.float64, dropout=0.5)
    plain, dropped = module(h.double()) - h, module.train()(h.double()) - h
    off, doubled = dropped.abs() < 1e-9, (dropped / plain - 2).abs() < 1e-9
    assert (off | doubled).all() and 0.4 < off.double().mean() < 0.6
    module.reset()
    assert torch.equal(module(h), h)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_agree_with_finite_differences(rl, name):
    module = build(rl, name, d=5, rank=2, dtype=torch.float64)
    h = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    strength = torch.tensor([0.7] * module.rank, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in module.named_parameters()]

    def call(h, strength, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (h, strength))

    assert torch.autograd.gradcheck(call, (h, strength, *module.parameters()))


@pytest.mark.parametrize("name", EVERY)
def test_a_basis_that_was_kept_gives_the_same_edit(rl, name):
    module, h = build(rl, name), torch.randn(7, D)
    basis = module.basis()
    assert torch.equal(module(h, basis=basis), module(h))
    if basis is not None and name in FORMULAS:  # and it is used: another basis gives another edit
        assert not torch.allclose(module(h, basis=basis.flip(1)), module(h), atol=0.01)


@pytest.mark.parametrize("name", EVERY)
def test_the_edit_lies_in_the_basis_and_each_unit_is_edited_alone(rl, name):
    module, h = build(rl, name, dtype=torch.float64), torch.randn(4, 3, D, dtype=torch.float64)
    out = module(h)
    assert torch.allclose(out[1, 2], module(h[1, 2]), atol=1e-14)
    basis = module.basis()
    if basis is not None:
        q, _ = torch.linalg.qr(basis)
        edit = out - h
        assert torch.allclose(edit @ q @ q.T, edit, atol=1e-13)


@pytest.mark.parametrize(("name", "activation"), [*((n, None) for n in EVERY), *((n, "relu") for n in READS)])
def test_an_edit_is_affine_exactly_where_it_says_so(rl, name, activation):
    settings = {} if activation is None else {"activation": activation}
    module = build(rl, name, dtype=torch.float64, **settings)
    a, b = torch.randn(2, 9, D, dtype=torch.float64)
    gap = (module(a) + module(b) - module(a + b) - module(torch.zeros_like(a))).abs().max().item()
    assert module.affine == (gap < 1e-12)


def test_shapes_are_checked_where_the_hook_is_on(rl, request):
    """A vector of another width must not pass the annotations."""
    import jaxtyping

    if not request.config.getoption("--jaxtyping-packages"):
        pytest.skip("`.ci/run` puts the hook on")
    with pytest.raises(jaxtyping.TypeCheckError):
        rl.LoReFT(D)(torch.randn(2, D - 1))


def test_every_kind_is_in_the_tables(rl):
    from reftlens.interventions import KINDS

    assert {k for k, c in KINDS.items() if not c.variables and not c.pools} == {
        *FORMULAS,
        "RED",
        "SteeringVector",
        "Ablation",
        "Noise",
        "Gated",
        "Head",  # edits nothing: test_heads.py
    }
    # what a schedule is open at depends on the place in the text, and a hard concrete gate on nothing: test_gates.py
    assert {build(rl, name).gate.kind for name in GATED} == set(rl.interventions.GATES) - {"Schedule", "HardConcrete"}
    assert all(cls.kind == name and issubclass(cls, rl.Intervention) for name, cls in KINDS.items())
    with pytest.raises(TypeError, match="abstract"):
        rl.Intervention(4, 1)


# -- strength ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0, -0.0])
@pytest.mark.parametrize("name", EVERY)
def test_strength_zero_is_h_itself_even_where_the_edit_is_not_finite(rl, name, strength):
    module, h = build(rl, name), torch.randn(7, D).bfloat16()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(torch.nan)
    assert module(h, strength=strength) is h


@pytest.mark.parametrize("name", EVERY)
def test_h_is_left_as_it_was(rl, name):
    h = torch.randn(7, D)
    before = h.clone()
    build(rl, name)(h)
    assert torch.equal(h, before)


@pytest.mark.parametrize("strength", [-1.0, 0.25, 0.5, 1, 2, 10.0])
@pytest.mark.parametrize("name", EVERY)
def test_strength_scales_the_edit(rl, name, strength):
    module, h = build(rl, name, dtype=torch.float64), torch.randn(7, D, dtype=torch.float64)
    full = module(h) - h
    assert full.abs().max() > 0.1
    assert torch.allclose(module(h, strength=strength), h + strength * full, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_one_strength_per_direction_turns_each_direction_on_its_own(rl, name):
    module, h = build(rl, name, dtype=torch.float64), torch.randn(7, D, dtype=torch.float64)
    basis = module.basis()
    columns = torch.eye(D, dtype=torch.float64) if basis is None else basis
    parts = []
    for i in range(module.rank):
        alone = torch.zeros(module.rank, dtype=torch.float64)
        alone[i] = 1.0
        part = module(h, strength=alone) - h
        direction = columns[:, i] / columns[:, i].norm()
        assert torch.allclose(torch.outer(part @ direction, direction), part, atol=1e-12)
        parts.append(part)
    assert torch.allclose(sum(parts), module(h) - h, atol=1e-12)
    some = torch.randn(module.rank, dtype=torch.float64)
    mixed = sum(s * p for s, p in zip(some, parts, strict=True))
    assert torch.allclose(module(h, strength=some), h + mixed, atol=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_equal_strengths_per_direction_or_per_token_are_one_strength(rl, name):
    module, h = build(rl, name), torch.randn(7, D)
    expected = module(h, strength=0.3)
    assert torch.equal(module(h, strength=torch.full((module.rank,), 0.3)), expected)
    assert torch.equal(module(h, strength=torch.full((7, 1), 0.3)), expected)
    assert torch.equal(module(h, strength=torch.zeros(module.rank)), h)
    per_token = torch.tensor([[0.0], [1.0]] * 3 + [[0.0]])
    mixed = module(h, strength=per_token)
    assert torch.equal(mixed[::2], h[::2])
    assert torch.equal(mixed[1::2], module(h, strength=torch.ones(7, 1))[1::2])
    with pytest.raises(Exception, match=r"dimension|shape|size"):
        module(h, strength=torch.ones(module.rank + 1))


@pytest.mark.parametrize("name", EVERY)
def test_a_strength_of_another_dtype_changes_neither_the_arithmetic_nor_the_result(rl, name):
    module, h = build(rl, name), torch.randn(7, D)
    half = [0.5] * module.rank
    for dtype in (torch.float64, torch.bfloat16):
        out = module(h, strength=torch.tensor(half, dtype=dtype))
        assert out.dtype == torch.float32
        assert torch.equal(out, module(h, strength=torch.tensor(half)))


# -- dropout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMULAS)
def test_dropout_falls_on_the_code_and_never_on_h(rl, name):
    """In pyreft it zeroes the hidden state itself, and doubles the rest."""
    module, h = build(rl, name, dtype=torch.float64, dropout=0.5), torch.randn(200, D, dtype=torch.float64)
    basis = module.basis().detach()
    plain = module(h) - h
    code = torch.linalg.lstsq(basis, plain.T).solution.T
    dropped = torch.linalg.lstsq(basis, (module.train()(h) - h).T).solution.T
    ratio = dropped / code
    off, doubled = ratio.abs() < 1e-9, (ratio - 2).abs() < 1e-9
    assert (off | doubled).all()  # each coordinate is either gone or, to keep the mean, doubled
    assert 0.4 < off.double().mean() < 0.6


@pytest.mark.parametrize("name", FORMULAS)
def test_dropout_leaves_everything_outside_the_basis_alone(rl, name):
    module, h = build(rl, name, dtype=torch.float64, dropout=0.5).train(), torch.randn(50, D, dtype=torch.float64)
    q, _ = torch.linalg.qr(module.basis().detach())
    edit = module(h) - h
    assert torch.allclose(edit - edit @ q @ q.T, torch.zeros_like(edit), atol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_eval_turns_dropout_off_and_train_turns_it_on_again(rl, name):
    module, h = build(rl, name, dropout=0.5), torch.randn(50, D)
    undropped = made_equal(module, dropout=0.0)
    assert torch.equal(module.eval()(h), undropped(h))
    assert not torch.equal(module.train()(h), module(h))
    assert torch.equal(module.eval()(h), undropped(h))


def made(module, settings):
    from reftlens.interventions import GATES, KINDS
    from reftlens.storage.record import arguments_of

    return type(module)(**arguments_of(settings, {**KINDS, **GATES}))


def made_equal(module, **changes):
    """Another module of the same kind with the same tensors."""
    other = made(module, {**module.settings(), **changes})
    other.load_state_dict(module.state_dict())
    return other


@pytest.mark.parametrize("dropout", [1.0, 1.5, -0.1])
def test_a_dropout_that_is_no_share_is_refused(rl, dropout):
    with pytest.raises(ValueError, match=r"expected 0 <= dropout < 1"):
        rl.LoReFT(D, dropout=dropout)


# -- starts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("name", "activation"), IDENTITY)
def test_the_identity_start_changes_nothing_bit_for_bit_with_dropout_or_without(rl, name, activation, dropout):
    for rank in (1, RANK, D):
        module = getattr(rl.interventions, name)(
            D, rank, init="identity", dropout=dropout, activation=activation
        ).train()
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for scale in (1e-3, 1.0, 1e4):
                h = (scale * torch.randn(7, D)).to(dtype)
                assert torch.equal(module(h), h)
                assert torch.equal(module(h, strength=-2.0), h)


@pytest.mark.parametrize(("name", "activation"), IDENTITY)
def test_learning_starts_from_the_identity(rl, name, activation):
    module, h = getattr(rl.interventions, name)(D, RANK, init="identity", activation=activation), torch.randn(20, D)
    goal = h + 0.1 * torch.randn(D)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(50):
        loss = (module(h) - goal).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3
    assert not torch.equal(module(h), h)


@pytest.mark.parametrize(
    ("name", "activation", "why"),
    [
        ("ConsReFT", "linear", "sets a constant"),
        ("LoReFT", "relu", "has no identity start"),
        ("NoReFT", "gelu", "has no identity start"),
        ("DiReFT", "sigmoid", r"f\(0\) = 0.5"),
        ("OrthoDiReFT", "sigmoid", r"f\(0\) = 0.5"),
        # relu'(0) = 0, so that no parameter would ever have a gradient
        ("DiReFT", "relu", r"f\(0\) = 0 and f'\(0\) = 0"),
        ("OrthoDiReFT", "relu", r"f\(0\) = 0 and f'\(0\) = 0"),
    ],
)
def test_an_identity_start_is_refused_where_there_is_none_to_learn_from(rl, name, activation, why):
    with pytest.raises(ValueError, match=why) as error:
        getattr(rl.interventions, name)(D, RANK, init="identity", activation=activation)
    assert 'init="paper"' in str(error.value)


@pytest.mark.parametrize(("rank", "size"), [(1, 0.032), (4, 0.081), (8, 0.113)])
def test_the_papers_start_is_as_far_from_the_identity_as_pyrefts(rl, rank, size):
    """Measured on pyreft 0.1.0: mean `|h' - h| / |h|` over normal h, d = 768."""
    generator, h = torch.Generator().manual_seed(0), torch.randn(50, 768)
    with torch.no_grad():
        starts = [rl.LoReFT(768, rank, generator=generator)(h) - h for _ in range(20)]
    seen = torch.stack([(edit.norm(dim=1) / h.norm(dim=1)).mean() for edit in starts]).mean().item()
    assert seen == pytest.approx(size, rel=0.15)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_papers_start_draws_uniformly_within_its_bounds(rl, name):
    module, bound = getattr(rl.interventions, name)(400, 8), 400**-0.5
    tensors = {n: p.detach() for n, p in module.named_parameters() if n in ("W", "W2")}
    for tensor in tensors.values():
        assert 0.99 * bound < tensor.abs().max() <= bound
        assert tensor.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    low, high = (-bound, bound) if name in READS else (0.0, 1.0)
    assert ((module.b >= low) & (module.b < high)).all()
    assert module.b.unique().numel() == 8


@pytest.mark.parametrize("name", FORMULAS)
def test_a_seed_gives_one_start_by_the_constructor_and_by_reset(rl, name):
    kind = getattr(rl.interventions, name)
    first = kind(D, RANK, generator=torch.Generator().manual_seed(3))
    module = build(rl, name)
    torch.manual_seed(77)
    module.reset(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), module.parameters(), strict=True))
    state = torch.random.get_rng_state()
    other = kind(D, RANK, generator=torch.Generator().manual_seed(4))
    assert torch.equal(torch.random.get_rng_state(), state)  # a generator of one's own is the only one drawn from
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_reset_takes_a_steering_vector_back_to_zero_and_leaves_an_ablation(rl):
    vector, ablation = build(rl, "SteeringVector"), build(rl, "subspace ablation")
    before = {k: v.clone() for k, v in ablation.state_dict().items()}
    vector.reset()
    ablation.reset()
    assert vector.vector.abs().max() == 0
    assert all(torch.equal(v, before[k]) for k, v in ablation.state_dict().items())


# -- arithmetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERY)
def test_half_precision_is_edited_in_single_precision_and_rounded_once(rl, name, dtype, autocast):
    module, h = build(rl, name), (5 * torch.randn(50, D)).to(dtype)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = module(h)
    assert out.dtype == dtype
    assert torch.equal(out, module(h.float()).to(dtype))


def test_half_precision_arithmetic_would_have_given_something_else(rl):
    module, h = build(rl, "LoReFT"), (5 * torch.randn(50, D)).bfloat16()
    letters = {k: v.bfloat16() for k, v in weights(module).items()}
    assert not torch.equal(FORMULAS["LoReFT"](h, FUNCTIONS["linear"], **letters), module(h))


@pytest.mark.parametrize("name", EVERY)
def test_autocast_changes_neither_values_nor_gradients(rl, name):
    module, h = build(rl, name), torch.randn(20, D, requires_grad=True)
    inputs = [h, *module.parameters()]
    plain = module(h)
    expected = torch.autograd.grad(plain.square().sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(h)
        loss = out.square().sum()
    assert out.dtype == torch.float32 and torch.equal(out, plain)
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", EVERY)
def test_wider_hidden_states_or_parameters_widen_the_arithmetic(rl, name):
    wide = build(rl, name, dtype=torch.float64)
    h = torch.randn(20, D)
    assert wide(h).dtype == torch.float32
    assert torch.equal(wide(h), wide(h.double()).float())
    narrow = build(rl, name)
    out = narrow(h.double())
    assert out.dtype == torch.float64
    assert not torch.equal(out, narrow(h).double()) or name == "zero ablation"
    assert torch.allclose(out, narrow(h).double(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EVERY)
def test_a_module_kept_in_half_precision_still_computes_in_single(rl, name, dtype):
    module, h = build(rl, name, dtype=dtype), torch.randn(20, D)
    again = made_equal(module.float())
    assert torch.equal(module.to(dtype)(h), again(h))
    assert torch.equal(module(h.to(dtype)), again(h.to(dtype).float()).to(dtype))


def test_the_default_works_on_a_float32_model(rl):
    """pyreft's README recipe raises there: half of the module is bfloat16."""
    module = rl.LoReFT(D, rank=4)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert module(torch.randn(2, D)).dtype == torch.float32


# -- frames under training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ORTHONORMAL)
def test_weight_decay_on_everything_harms_no_frame(rl, name):
    module, h = getattr(rl.interventions, name)(D, RANK), torch.randn(20, D)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        module(h).square().sum().backward()
        optimizer.step()
        basis = module.basis().detach()
        assert torch.allclose(basis.T @ basis, torch.eye(RANK), atol=3e-6)
    assert (module(h) - h).abs().max() > 0.01


@pytest.mark.parametrize("name", FORMULAS)
def test_loading_in_mid_training_changes_nothing_about_the_rest_of_it(rl, name):
    """In pyreft the frame is a new parameter after loading, unknown to the optimizer and no longer orthonormal."""
    h, goal = torch.randn(20, D), torch.randn(20, D)

    def train(module, reload):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for step in range(12):
            if reload and step == 6:
                parameters = list(module.parameters())
                module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()})
                assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
            optimizer.zero_grad()
            (module(h) - goal).square().sum().backward()
            optimizer.step()
        return module

    first = getattr(rl.interventions, name)(D, RANK, generator=torch.Generator().manual_seed(0))
    second = made_equal(first)
    start = first(h).detach()
    train(first, reload=False)
    train(second, reload=True)
    assert torch.equal(first(h), second(h))
    assert not torch.allclose(first(h), start, atol=0.01)


# -- settings and state --------------------------------------------------------------------------------------

SETTINGS = [
    (name, {"dropout": 0.25, "init": init} | ({"activation": activation} if name in READS else {}))
    for name in FORMULAS
    for init in ("paper", "identity")
    for activation in ("linear", "gelu")
    if init == "paper" or (name, activation) in [(n, a) for n, a in IDENTITY]
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("name", "settings"), [*SETTINGS, *((n, {}) for n in EVERY if n not in FORMULAS)])
def test_settings_and_tensors_make_an_equal_intervention(rl, name, settings, dtype):
    """pyreft loses activation, dropout and dtype on the way, and cannot build NoReFT and NodiReFT again."""
    module = build(rl, name, dtype=dtype, **settings)
    stored = json.loads(json.dumps(module.settings()))
    assert stored == module.settings()
    assert settings.items() <= stored.items()
    again = made(module, stored).to(dtype)
    missing = again.load_state_dict(module.state_dict(), strict=True)
    assert not missing.missing_keys and not missing.unexpected_keys
    assert again.settings() == module.settings()
    assert repr(again) == repr(module)
    h = torch.randn(20, D)
    assert torch.equal(again.eval()(h), module(h))
    torch.manual_seed(5)
    dropped = module.train()(h)
    torch.manual_seed(5)
    assert torch.equal(again.train()(h), dropped)


@pytest.mark.parametrize("name", EVERY)
def test_the_state_of_a_module_that_holds_one_is_not_empty(rl, name):
    """pyreft's nested `state_dict()` is."""
    module = build(rl, name)
    outer = nn.ModuleDict({"a": nn.Sequential(module)})
    own = module.state_dict()
    assert own and outer.state_dict().keys() == {f"a.0.{k}" for k in own}
    assert all(torch.equal(outer.state_dict()[f"a.0.{k}"], v) for k, v in own.items())


@pytest.mark.parametrize("name", ["LoReFT", "DiReFT", "OrthoDiReFT", "NoReFT", "ConsReFT", "LobiReFT"])
@pytest.mark.parametrize("misspelt", ["dropuot", "activations", "low_rank_dimension", "add_bias", "dtype", "act_fn"])
def test_misspelt_arguments_are_refused(rl, name, misspelt):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{misspelt}'"):
        getattr(rl.interventions, name)(D, RANK, **{misspelt: 0.5})


def test_misspelt_arguments_of_fixed_edits_are_refused(rl):
    for cls in (rl.SteeringVector, rl.Ablation):
        with pytest.raises(TypeError, match="unexpected keyword argument 'strenght'"):
            cls(D, strenght=2)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("rank", [0, -1, D + 1])
def test_a_rank_that_does_not_fit_is_refused(rl, name, rank):
    with pytest.raises(ValueError, match=f"rank={rank} does not fit into d={D}"):
        getattr(rl.interventions, name)(D, rank)


def test_an_activation_that_is_unknown_or_would_do_nothing_is_refused(rl):
    with pytest.raises(ValueError, match="unknown activation 'relo', expected one of gelu"):
        rl.LoReFT(D, activation="relo")
    for name in ("ConsReFT", "LobiReFT"):
        with pytest.raises(ValueError, match="reads nothing from h, so activation='relu' would do nothing"):
            getattr(rl.interventions, name)(D, activation="relu")
    with pytest.raises(ValueError, match="has parameters of its own"):
        rl.LoReFT(D, activation="prelu")


# -- sizes ---------------------------------------------------------------------------------------------------

COUNTS = json.loads((REFERENCE / "pyreft_functions.json").read_text())["trainable_parameters"]


@pytest.mark.parametrize("name", FORMULAS)
def test_stored_parameters_are_what_pyreft_counts(rl, name):
    for size, count in COUNTS[PYREFT[name]].items():
        d, rank = (int(part.split("=")[1]) for part in size.split(","))
        assert getattr(rl.interventions, name)(d, rank).stored_parameters == count


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("d", "rank"), [(D, 1), (D, 3), (7, 7), (4096, 4)])
def test_degrees_of_freedom_leave_out_the_constraints_of_the_frame(rl, name, d, rank):
    stored = (d * rank) * (2 if name in READS else 1) + rank
    module = getattr(rl.interventions, name)(d, rank)
    assert module.stored_parameters == stored
    assert module.degrees_of_freedom == stored - (rank * (rank + 1) // 2 if name in ORTHONORMAL else 0)


def test_fixed_edits_count_what_can_be_trained(rl):
    assert rl.SteeringVector(D).stored_parameters == rl.SteeringVector(D).degrees_of_freedom == D
    assert build(rl, "subspace ablation").stored_parameters == 0


# Section 3.1 of the peers' notes: class, d, rank, how many, stored, parameters of the model, the paper's percentage.
PAPER = [
    ("LLaMA-7B, all 32 layers, tied", "LoReFT", 4096, 8, 32, 2_097_408, 6_738_415_616, "0.031"),
    ("LLaMA-7B, DiReFT, untied", "DiReFT", 4096, 4, 64, 2_097_408, 6_738_415_616, "0.031"),
    ("LLaMA-13B, all 40 layers, tied", "LoReFT", 5120, 8, 40, 3_277_120, 13_015_864_320, "0.025"),
    ("Llama-3-8B, all 32 layers, tied", "LoReFT", 4096, 8, 32, 2_097_408, 8_030_261_248, "0.026"),
    ("Llama-2-7B, instruct, untied", "LoReFT", 4096, 4, 8, 262_176, 6_738_415_616, "0.0039"),
    ("Llama-2-7B, instruct, half", "LoReFT", 4096, 2, 8, 131_088, 6_738_415_616, "0.0019"),
    ("RoBERTa-base", "LoReFT", 768, 1, 12, 18_444, 124_645_632, "0.015"),
    ("RoBERTa-large", "LoReFT", 1024, 1, 24, 49_176, 355_359_744, "0.014"),
    ("Llama-2-7B, README", "LoReFT", 4096, 4, 1, 32_772, 6_738_415_616, "0.00049"),
    ("TinyLlama, emoji demo", "LoReFT", 2048, 4, 1, 16_388, 1_100_048_384, "0.0015"),
    ("Llama-3-8B, agent", "LoReFT", 4096, 2, 6, 98_316, 8_030_261_248, "0.0012"),
    ("LLaMA-7B, memorisation", "ConsReFT", 4096, 1, 1, 4_097, 6_738_415_616, "6.1e-05"),
]


@pytest.mark.parametrize(("setting", "name", "d", "rank", "count", "stored", "model", "percent"), PAPER)
def test_counts_and_percentages_are_the_papers(rl, setting, name, d, rank, count, stored, model, percent):
    reft = rl.ReFT({rl.resid_post(i, "f1+l1"): getattr(rl.interventions, name)(d, rank) for i in range(count)})
    size = reft.parameter_count(model)
    assert size.stored == stored
    assert str(size).startswith(f"{stored:,} stored parameters, ")
    assert f"{percent} % of the model's {model:,}" in str(size)
    assert size.degrees_of_freedom == stored - (count * rank * (rank + 1) // 2 if name in ORTHONORMAL else 0)


def test_the_count_takes_the_models_own_parameters_shared_ones_once(rl, gpt2):
    reft = rl.ReFT({rl.resid_post(0, "last"): rl.LoReFT(gpt2.cfg.d_model, 2)})
    total = sum(p.numel() for p in {id(p): p for p in gpt2.original_model.parameters()}.values())
    assert reft.parameter_count(gpt2).model == reft.parameter_count(gpt2.original_model).model == total
    assert reft.parameter_count(gpt2).percent == pytest.approx(100 * (4 * gpt2.cfg.d_model + 2) / total)


def test_tied_interventions_are_counted_and_stored_once(rl):
    shared, other = rl.LoReFT(D), rl.LoReFT(D)
    tied = rl.ReFT(
        {rl.resid_post(0, "first"): shared, rl.resid_post(0, "last"): shared, rl.resid_post(1, "all"): other}
    )
    count = tied.parameter_count(10**6)
    assert count.stored == 2 * shared.stored_parameters == sum(p.numel() for p in tied.parameters())
    assert count.degrees_of_freedom == 2 * shared.degrees_of_freedom
    assert len(tied) == 3 and len(tied.state_dict()) == 2 * len(shared.state_dict())
    assert tied[0] is tied[1] is shared and tied[2] is other


@pytest.mark.parametrize("name", FORMULAS)
def test_nothing_of_size_d_times_d_is_stored(rl, name):
    """pyreft keeps 64 MiB per intervention at this size."""
    module = getattr(rl.interventions, name)(4096, 4)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers()), **module.state_dict()}
    assert max(t.numel() for t in tensors.values()) == 4096 * 4


class _Largest(TorchDispatchMode):
    """The most numbers that any tensor had, inside the block, forward and backward."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("name", [n for n in EVERY if n in FORMULAS or n == "subspace ablation"])
def test_nothing_of_size_d_times_d_is_computed_forward_or_backward(rl, name):
    d, rank, tokens = 512, 4, 4
    module = build(rl, name, d, rank)
    with _Largest() as seen:
        h = torch.randn(tokens, d, requires_grad=True)
        module(h).square().sum().backward()
    assert 0 < seen.numbers <= d * max(rank, tokens)


# -- steering vector -----------------------------------------------------------------------------------------


def test_a_steering_vector_is_added_as_it_is(rl):
    v, h = torch.randn(D), torch.randn(7, D)
    module = rl.SteeringVector(D, v)
    assert torch.equal(module(h), h + v)
    for strength in (-2.0, 0.5, 3.0):
        assert torch.equal(module(h, strength=strength), h + strength * v)


def test_a_steering_vector_starts_at_zero_changes_nothing_there_and_learns(rl):
    module, h = rl.SteeringVector(D), torch.randn(7, D)
    assert torch.equal(module(h), h)
    goal = torch.randn(D)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        (module(h) - h - goal).square().sum(dim=1).mean().backward()
        optimizer.step()
    assert torch.allclose(module.vector, goal, atol=1e-4)


def test_a_steering_vector_is_a_copy(rl):
    v = torch.randn(D)
    module, before = rl.SteeringVector(D, v), v.clone()
    v.zero_()
    assert torch.equal(module.vector, before)


# -- ablation ------------------------------------------------------------------------------------------------


def test_zero_ablation_gives_exactly_zero(rl):
    h = torch.randn(7, D)
    assert torch.equal(rl.Ablation(D)(h), torch.zeros(7, D))


def test_mean_ablation_gives_the_reference_in_every_unit(rl):
    mean, h = torch.randn(D), torch.randn(7, D)
    assert torch.allclose(rl.Ablation(D, mean)(h), mean.expand(7, D), atol=1e-6)  # h + (mean - h) rounds twice


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("rank", [1, 3, D])
def test_subspace_ablation_sets_what_lies_in_the_subspace_and_nothing_else(rl, rank, with_reference):
    """Planted: `h` is a known part inside plus a known part outside; the directions are no orthonormal basis of it."""
    inside = torch.linalg.qr(torch.randn(D, rank, dtype=torch.float64)).Q
    directions = inside @ (torch.randn(rank, rank, dtype=torch.float64) + 3 * torch.eye(rank, dtype=torch.float64))
    reference = torch.randn(D) if with_reference else None
    module = rl.Ablation(D, reference, directions.float()).double()
    h = torch.randn(7, D, dtype=torch.float64)
    projector = inside @ inside.T
    target = torch.zeros(D, dtype=torch.float64) if reference is None else reference.double()
    out = module(h)
    # The directions were rounded to float32 on the way in, so nothing agrees to more than 1e-6.
    assert torch.allclose(out @ projector, (target @ projector).expand(7, D), atol=1e-5)
    assert torch.allclose(out - out @ projector, h - h @ projector, atol=1e-5)
    assert torch.allclose(module(out), out, atol=1e-5)  # twice is once
    assert torch.allclose(module(h, strength=0.5), (h + out) / 2, atol=1e-12)
    elsewhere = torch.linalg.qr(torch.cat([inside, torch.randn(D, D - rank, dtype=torch.float64)], dim=1)).Q[:, rank:]
    assert torch.allclose(out @ elsewhere, h @ elsewhere, atol=1e-5)


def test_an_ablation_of_a_direction_that_h_lacks_changes_nothing(rl):
    h = torch.randn(7, D)
    h[:, 3] = 0.0
    direction = torch.zeros(D, 1)
    direction[3] = 2.0
    assert torch.equal(rl.Ablation(D, directions=direction)(h), h)
    h[:, 3] = 1.0
    assert not torch.equal(rl.Ablation(D, directions=direction)(h), h)


def test_an_ablation_trains_nothing_and_stores_everything(rl):
    module = build(rl, "subspace ablation")
    assert not list(module.parameters())
    assert module.state_dict().keys() == {"reference", "directions"}
    assert build(rl, "zero ablation").state_dict().keys() == {"reference"}


def test_an_ablation_keeps_copies(rl):
    reference, directions, h = torch.randn(D), torch.randn(D, 2), torch.randn(7, D)
    module = rl.Ablation(D, reference, directions)
    before = module(h)
    reference.zero_()
    directions.zero_()
    assert torch.equal(module(h), before)


@pytest.mark.parametrize("columns", [1, 3])
def test_directions_that_span_less_than_they_say_are_refused(rl, columns):
    """QR would put an arbitrary direction in the place of the one that is missing."""
    spanned = torch.randn(D, columns) @ torch.randn(columns, columns + 1)
    for directions in (spanned, torch.zeros(D, columns)):
        with pytest.raises(ValueError, match="not linearly independent"):
            rl.Ablation(D, directions=directions)
    with pytest.raises(ValueError, match="not linearly independent"):
        rl.Ablation(D, directions=torch.randn(D, D + 1))


def test_a_rank_that_contradicts_the_directions_is_refused(rl):
    with pytest.raises(ValueError, match="rank=2, and there are 3 directions"):
        rl.Ablation(D, directions=torch.randn(D, 3), rank=2)


def test_tensors_of_another_width_are_refused(rl):
    from jaxtyping import TypeCheckError

    for make in (
        lambda: rl.SteeringVector(D, torch.randn(D + 1)),
        lambda: rl.Ablation(D, torch.randn(D + 1)),
        lambda: rl.Ablation(D, None, torch.randn(D + 1, 2)),
    ):
        with pytest.raises((ValueError, TypeCheckError)):
            make()


@pytest.mark.parametrize("name", EVERY)
def test_units_may_have_any_number_of_axes(rl, name):
    module, h = build(rl, name), torch.randn(2, 3, 4, D)
    assert torch.allclose(module(h).view(-1, D), module(h.view(-1, D)), atol=1e-6)
    assert module(torch.empty(0, D)).shape == (0, D)
    assert F.mse_loss(module(h), h) > 0


def _gated(draw):
    """A class of a user's own: LoReFT's edit, and a gate whose start is up to `draw`."""
    import reftlens as rl
    from reftlens.interventions.subspace import Frame

    class Gated(rl.Intervention):
        kind = "Gated"

        def __init__(self, d):
            super().__init__(d, rank=1)
            self.frame = Frame(d, 1)
            self.gate = nn.Linear(d, 1, dtype=torch.float32)

        def code(self, h, basis):
            return self.gate(h)

        def basis(self):
            return self.frame()

        def settings(self):
            return {"d": self.d}

        def reset(self, generator=None):
            self.frame.reset(generator)
            draw(self.gate, generator)

    return rl.ReFT({rl.resid_post(1, "last"): Gated(8)})


def _drawn(gate, generator):
    for parameter in gate.parameters():
        nn.init.normal_(parameter, generator=generator)


def test_reset_of_a_class_of_ones_own_that_draws_everything_from_the_seed_repeats():
    reft = _gated(_drawn)
    state = torch.get_rng_state()
    copies = [*reft.seeds([3, 4]).values(), reft.seeds([3])["seed 3"]]
    gates = [copy[0].gate.weight for copy in copies]
    assert torch.equal(gates[0], gates[2]) and not torch.equal(gates[0], gates[1])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "draw", [lambda gate, generator: None, lambda gate, generator: gate.reset_parameters()], ids=["left", "global"]
)
def test_reset_that_leaves_a_parameter_or_draws_it_from_the_global_generator_is_refused(draw):
    for call in (lambda r: r.reset(0), lambda r: r.seeds([0, 1])):
        with pytest.raises(ValueError, match=r"Gated.reset\(generator\) does not give 'gate.weight' the same value"):
            call(_gated(draw))


def _from_the_docstring(rl):
    """The class that the docstring of `Frame` shows."""
    lines = inspect.cleandoc(rl.interventions.Frame.__doc__)
    names = {"rl": rl, "torch": torch}
    exec(inspect.cleandoc("\n" + lines[lines.index("    class Squash") :]), names)
    return names["Squash"]


def test_a_frame_in_a_class_of_ones_own_is_trained_as_those_of_the_library(rl, gpt2, tmp_path):
    """Its formula; orthonormal, settled and out of reach of weight decay; stacked, stored and cut as any kind is."""
    kind = _from_the_docstring(rl)
    h, module = torch.randn(5, D, dtype=torch.float64), kind(D, 2).double()
    module.reset(torch.Generator().manual_seed(0))
    out, basis = module(h), gram_schmidt(module.frame.matrix)
    torch.testing.assert_close(out, h + (torch.tanh(h @ basis) - h @ basis) @ basis.T)
    assert module(h, strength=0.0) is h
    d = gpt2.cfg.d_model
    reft = rl.ReFT({rl.resid_post(1, "last"): kind(d, 2)})
    data = rl.encode(gpt2, [rl.Example("the cat sat on", " the"), rl.Example("a dog ran", " by")])
    settings = {"steps": 6, "lr": 5e-2, "progress": False}
    with pytest.raises(ValueError, match="all are orthonormal frames"):
        rl.fit(reft.clone(), gpt2, data, weight_decay=0.1, **settings)
    alone = reft.seeds([0, 1])
    together = rl.ReFT.seeds(reft, [0, 1])
    runs = rl.fit_many(together, gpt2, data, **settings)
    for name, one in alone.items():
        start = one[0].frame.matrix.clone()
        rl.fit(one, gpt2, data, seed=one.seed, **settings)
        matrix = one[0].frame.matrix.detach()
        assert (matrix - start).abs().max() > 0.01
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(2))  # settled: the parameter is the basis
        torch.testing.assert_close(together[name][0].frame.matrix, matrix, atol=1e-4, rtol=0)
        assert runs[name].computation.startswith("light cone")
    rl.save(one, tmp_path / "squash", gpt2)
    loaded = rl.load(tmp_path / "squash", gpt2, kinds={"Squash": kind})
    assert torch.equal(loaded[0].frame.matrix, one[0].frame.matrix)
    assert one[0].degrees_of_freedom == 2 * d - 3
