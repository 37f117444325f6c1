"""Log-probability and KL of targets: float64 from logits of any dtype, against forty decimal digits."""

import math
from decimal import Decimal, localcontext

import pytest
import torch

from reftlens.scoring import divergence


def _exactly(p, q, ids):
    """Log-probability under `p` and KL(p ‖ q) of each row of logits, in forty digits."""
    with localcontext(prec=40):
        rows = []
        for x, y, i in zip(p.tolist(), q.tolist(), ids.tolist(), strict=True):
            (a, b) = ([Decimal(v) for v in row] for row in (x, y))
            total, before = (sum(v.exp() for v in row).ln() for row in (a, b))
            kl = sum((u - total).exp() * (u - total - v + before) for u, v in zip(a, b, strict=True))
            rows.append((float(a[i] - total), float(kl)))
        return torch.tensor(rows, dtype=torch.float64).T


def _measured(p, q, ids):
    at = torch.arange(len(p)).flip(0)  # the two may have their targets in other orders
    softmax, kl = divergence.softmax_and_divergence(p, divergence.softmax_of(q[at]), at)
    return torch.stack([softmax.log_prob(ids), kl])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("change", "largest"), [(1.0, 10.0), (1e-2, 1e-3), (1e-4, 2e-8)])
def test_log_probability_and_kl_have_float64_accuracy_however_small(dtype, change, largest, monkeypatch):
    torch.manual_seed(0)
    q = 4 * torch.randn(5, 40, dtype=torch.float64) - 7
    p = (q + change * torch.randn(5, 40) + 3).to(dtype)  # what all logits are moved by changes no probability
    q, ids = q.to(dtype), torch.randint(40, (5,))
    measured, exact = _measured(p, q, ids), _exactly(p, q, ids)
    torch.testing.assert_close(measured[0], exact[0], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(measured[1], exact[1], rtol=1e-12, atol=2e-15)
    assert dtype == torch.bfloat16 or 0 < measured[1].min() < measured[1].max() < largest
    monkeypatch.setitem(divergence._TOGETHER, "cpu", 80)  # two rows, two rows, one
    torch.testing.assert_close(_measured(p, q, ids), measured, rtol=1e-13, atol=1e-15)


def test_equal_logits_diverge_by_nothing_at_all():
    logits = torch.randn(3, 40)
    assert torch.equal(_measured(logits, logits.clone(), torch.arange(3))[1], torch.zeros(3, dtype=torch.float64))


def test_a_token_that_is_excluded_adds_nothing_and_one_that_becomes_possible_infinitely_much():
    p, q, ids = torch.randn(4, 40), torch.randn(4, 40), torch.zeros(4, dtype=torch.long)
    p[0, 3] = p[1, 3] = q[1, 3] = q[2, 3] = -math.inf
    p[3, 3] = math.nan
    kl = _measured(p, q, ids)[1]
    among = [i for i in range(40) if i != 3]
    q_log = q.double().log_softmax(dim=1)[:1, among]
    p_log = p.double().log_softmax(dim=1)[:1, among]
    assert kl[0].item() == pytest.approx((p_log.exp() * (p_log - q_log)).sum().item(), rel=1e-12)
    torch.testing.assert_close(kl[1:2], _exactly(p[1:2, among], q[1:2, among], ids[1:2])[1], rtol=1e-12, atol=0.0)
    assert kl[2] == math.inf
    assert kl[3].isnan() and _measured(q[3:], p[3:], ids[3:])[1].isnan(), "what is no number is not hidden"
