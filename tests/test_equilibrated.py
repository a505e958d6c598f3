"""baselines/equilibrated.py: rows of one length, and the bound that stays."""

from functools import partial

import pytest
import torch

import spectron
from baselines.equilibrated import EquilibratedSpectron, equilibrate
from spectron import newton_schulz
from test_spectron import adversarial_pairs, dW_over_eta, norm, random_pair


def uneven(m=96, r=24):
    """A momentum whose rows differ in length by factors of e, as real ones do."""
    return torch.randn(m, r, dtype=torch.float64) * torch.randn(m, 1, dtype=torch.float64).exp()


def row_norms(O):
    return torch.linalg.vector_norm(O, dim=-1) * (O.size(-2) / O.size(-1)) ** 0.5


def test_equilibrated_rows_are_even_and_singular_values_stay_near_one():
    for _ in range(10):
        M = uneven()
        spread = [row_norms(newton_schulz(equilibrate(M, times, 5) if times else M)).std()
                  for times in (0, 1, 2)]
        assert spread[0] > 0.25 > 0.1 > spread[1] > 0.04 > spread[2]
        for times in 1, 2:
            s = torch.linalg.svdvals(newton_schulz(equilibrate(M, times, 5)))
            assert 0.67 < s.min() and s.max() < 1.21


def test_equilibrate_commutes_with_a_rotation_of_the_rank():
    """A Q, B Q is the same W: the r axis must not be normalised."""
    M, Q = uneven(), torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0]
    for times in 1, 2:
        assert torch.allclose(equilibrate(M @ Q, times, 5), equilibrate(M, times, 5) @ Q)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equilibrate_is_finite_with_rows_of_zeros_and_at_any_scale(times, dtype):
    M = uneven().to(dtype)
    M[::3] = 0
    M[1] *= 1e-30
    for scale in 0.0, 1e-20, 1.0, 1e15:
        O = newton_schulz(equilibrate(scale * M, times, 5))
        assert O.isfinite().all() and not O[::3].any()
        assert scale != 1 or O[1].norm() < 1e-3  # and a row of next to nothing does not become a step


@pytest.mark.parametrize("times", [1, 2])
def test_a_step_of_an_equilibrated_optimizer(times):
    A, B = random_pair(40, 30, 4)
    old, M = [A.detach().clone(), B.detach().clone()], [0.1 * A.grad, 0.1 * B.grad]
    optimizer = EquilibratedSpectron([(A, B)], times, lr=0.2, momentum=0.9, nesterov=False)
    optimizer.step()
    for p, q, m in zip(old, (A, B), M):
        expected = optimizer.state[A]["rho"] * newton_schulz(equilibrate(m, times, 5))
        assert torch.allclose(p - q, expected, atol=1e-12)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("eta", [0.01, 0.1, 0.5])
def test_dW_is_within_1_21_eta_for_the_five_step_iteration(eta, times, monkeypatch):
    monkeypatch.setattr(spectron, "power_iteration", lambda W, u, steps=1: (norm(W), u))
    kind = partial(EquilibratedSpectron, times=times)
    assert max(dW_over_eta(pair, eta, kind=kind) for pair in adversarial_pairs()) <= 1.21
