"""LoRA-Muon against its definition."""

import pytest
import torch

from baselines.lora_muon import LoRAMuon, inverse_root
from spectron import Spectron


def pair(scale=1.0):
    torch.manual_seed(0)
    A, B, G, H = (torch.randn(n, 6, dtype=torch.float64) for n in (40, 30, 40, 30))
    A, B = torch.nn.Parameter(scale * A), torch.nn.Parameter(B / scale)
    A.grad, B.grad = G / scale, scale * H  # those of the same loss as a function of W
    return A, B


def step_of_W(optimizer, A, B):
    W = (A @ B.T).detach()
    optimizer.step()
    return (A @ B.T).detach() - W


def test_the_inverse_root_is_one_and_finite_for_a_singular_matrix():
    X = torch.randn(20, 6, dtype=torch.float64)
    R = inverse_root(X.T @ X)
    assert torch.allclose(R @ X.T @ X @ R, torch.eye(6, dtype=torch.float64), atol=1e-9)
    assert inverse_root(torch.zeros(6, 6)).isfinite().all()


def test_the_balance_of_the_factors_does_not_matter_as_it_does_for_spectron():
    one, other = (step_of_W(LoRAMuon([p], 0.01), *p) for p in (pair(), pair(4.0)))
    assert (one - other).norm() < 1e-4 * one.norm()
    one, other = (step_of_W(Spectron([p], 0.01), *p) for p in (pair(), pair(4.0)))
    assert (one - other).norm() > 0.1 * one.norm()


def test_each_first_order_term_is_half_of_the_learning_rate():
    """Up to the singular values of five Newton-Schulz steps."""
    A, B = pair()
    A0, B0 = A.detach().clone(), B.detach().clone()
    LoRAMuon([(A, B)], 0.01).step()
    for term in (A.detach() - A0) @ B0.T, A0 @ (B.detach() - B0).T:
        assert 0.005 * 0.67 < torch.linalg.matrix_norm(term, ord=2) < 0.005 * 1.21


@pytest.mark.parametrize("flags", [[], ["--factorize", "ffn"]])
def test_it_trains_and_resumes(run, flags):
    import train
    from tools import plot
    whole = run("--method", "lora-muon", *flags, "--steps", 6, out="whole")
    out = run("--method", "lora-muon", *flags, "--steps", 6, "--stop_at", 3)
    train.main(["--resume", "--out", str(out)])
    one, two = (torch.load(x / "ckpt.pt", weights_only=True)["model"] for x in (whole, out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    losses = [row["loss"] for row in plot.read_log(out)[1]]
    assert losses[-1] < losses[0] - 0.5
