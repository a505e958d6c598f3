"""The norms of one matrix over one step, for the log: what the paper's Figures 2 and 3 draw."""

import math

import torch

from lib.cli import UserError
from lib.methods import block_matrices
from model import FactorizedLinear
from spectron import power_iteration


def check_name(model, name: str) -> None:
    if name not in block_matrices(model):
        raise UserError(f"--spectra_of {name}: no such matrix; there are {', '.join(block_matrices(model))}")


def spectral_norm(M) -> torch.Tensor:
    return torch.linalg.matrix_norm(M, ord=2)


def product_norm(A, B) -> torch.Tensor:
    """||A B^T||_2, exactly, from the triangles of two QRs: A (m, k), B (n, k), and never an m x n matrix."""
    R_A, R_B = (torch.linalg.qr(X, mode="r")[1] for X in (A, B))
    return spectral_norm(R_A @ R_B.T)


def finite(x) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(x) if x is not None and math.isfinite(x) else None


@torch.no_grad()
def divisors(model) -> list[float] | None:
    """The smallest, the median and the largest ||A|| + ||B|| + 1 of all pairs of factors, which is what
    Spectron divides by; by 30 power iterations, so from below, by a percent at most where it was tried. None
    where a model has no factors, or they are not finite."""
    sums, alike = [], {}
    for pair in model.factor_pairs():
        alike.setdefault(tuple(p.shape for p in pair), []).append(pair)
    for pairs in alike.values():
        total = 1
        for factors in zip(*pairs):
            W = torch.stack(factors)
            u = torch.randn(W.shape[:2], generator=torch.Generator().manual_seed(0), device="cpu").to(W)
            total = total + power_iteration(W, u, steps=30)[0]
        sums.append(total)
    if not sums or not (every := torch.cat(sums)).isfinite().all():
        return None
    return [float(f"{float(x):.6g}") for x in (every.min(), every.median(), every.max())]


class Spectra:
    """The norms of one matrix over one step, for any method: what the paper's Figures 2 and 3 draw.

    probe (1, T) are fixed tokens, on which the change of the layer's output is measured. A dense W counts as
    the factors (W, I).
    """

    def __init__(self, model, name: str, optimizers, probe: torch.Tensor):
        self.model, self.name, self.optimizers, self.probe = model, name, optimizers, probe

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of two matrices of which W is the product, in float64."""
        def copy(p):  # mps has no float64
            return p.detach().to("cpu" if p.device.type == "mps" else p.device, copy=True).double()
        if isinstance(self.layer, FactorizedLinear):
            A, B = self.layer.factors()
            return copy(A), copy(B)
        W = copy(self.layer.weight)
        return W, torch.eye(W.size(1)).to(W)

    @torch.no_grad()
    def before(self) -> None:
        """Keep the weights, and what the layer reads of the probe."""
        # Since the last step a method may have put another layer here, or other parameters.
        self.layer, inputs = block_matrices(self.model)[self.name], []
        self.old = self.factors()
        hook = self.layer.register_forward_pre_hook(lambda _, x: inputs.extend(x))
        self.model.hidden(self.probe)
        hook.remove()
        self.x = inputs[0].to(self.old[0].device).double()

    def after(self) -> dict:
        """lr, that of the matrix; dW and W; dy, the RMS of dW x (Eq. 9); gauge, dW over lr. sigma and rho are
        those that the optimizer used; where it has none, the exact sigma of before, and no rho. divisor is of
        all matrices."""
        (A0, B0), (A, B) = self.old, self.factors()
        dW = product_norm(torch.cat([A - A0, A], 1), torch.cat([B0, B - B0], 1))  # dA B0^T + A dB^T
        dy = self.x @ B @ A.T - self.x @ B0 @ A0.T
        sigma_A = sigma_B = rho = None
        low_rank = isinstance(self.layer, FactorizedLinear)
        weights = [self.layer.A, self.layer.B] if low_rank else [self.layer.weight]
        state, lr = self.owner(weights[0])
        if low_rank:
            sigma_A, sigma_B = (state[p]["sigma"] if "sigma" in state[p] else spectral_norm(old)
                                for p, old in zip(weights, self.old))
            rho = state[weights[0]].get("rho")
        norms = {"lr": lr, "dW": dW, "W": product_norm(A, B), "dy": dy.square().mean().sqrt(),
                 "sigma_A": sigma_A, "sigma_B": sigma_B, "rho": rho, "gauge": dW / lr}
        return {key: finite(value) for key, value in norms.items()} | {"divisor": divisors(self.model)}

    def owner(self, weight) -> tuple[dict, float]:
        """(state, lr) of the optimizer that has this parameter."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if any(p is weight for p in group["params"]):
                    return optimizer.state, group["lr"]
