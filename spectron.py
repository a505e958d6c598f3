"""Spectron (Janson, Oyallon, Belilovsky 2026): an optimizer for weights that exist only as W = A @ B.T.

A step of both factors moves W by dW = dA B^T + A dB^T + dA dB^T (Eq. 2). If neither factor moves by more than
rho <= 1 in spectral norm, ||dW|| <= rho (||A|| + ||B|| + rho) (Eqs. 13 to 15). With Eq. 16,
rho = eta / (||A|| + ||B|| + 1), that is eta at most: the learning rate bounds the step of W. In practice five
steps of Newton-Schulz make it 1.21 eta, for eta <= 0.5, and sigma is an estimate: train.py logs the ratio.
"""

import warnings
from functools import partial

import torch
from torch import Tensor

unit = partial(torch.nn.functional.normalize, dim=-1, eps=torch.finfo(torch.float32).tiny)


def newton_schulz(G: Tensor, steps: int = 5) -> Tensor:
    """Algorithm 2: G = U S V^T (..., p, q) becomes roughly U V^T. Singular values above 0.01 of the Frobenius
    norm come out in [0.67, 1.14], smaller ones in [0, 1.21], if that norm is between 1e-18 and 1e19."""
    a, b, c = 3.4445, -4.7750, 2.0315  # a steep start at zero; in return values land near 1, not on it
    norm = torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True)
    X = G / (norm + 1e-7 * norm.clamp_max(1)).clamp_min(1e-19)  # the paper's 1e-7, relative for a small G
    wide = X.size(-2) < X.size(-1)
    X = X.mT if wide else X  # tall, so that X^T X is the small Gram matrix, r x r for a factor
    for _ in range(steps):
        gram = X.mT @ X
        X = a * X + X @ (b * gram + c * gram @ gram)
    return X.mT if wide else X


def power_iteration(W: Tensor, u: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """Algorithm 3: (sigma, u), an estimate from below of the spectral norm of W (..., p, q), and the vector
    (..., p) from which the next call starts. For W = 0 that is a fixed one: zero would stay zero forever."""
    W, u = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (W, u))
    fixed = unit(torch.arange(1, W.size(-2) + 1, dtype=u.dtype, device=u.device).square().cos())
    for _ in range(steps):
        v = unit((u.unsqueeze(-2) @ W).squeeze(-2))
        Wv = (W @ v.unsqueeze(-1)).squeeze(-1)
        sigma = torch.linalg.vector_norm(Wv, dim=-1)  # = u^T W v, with the u of the next line
        u = torch.where(sigma.unsqueeze(-1) > 0, unit(Wv), fixed)
    return sigma, u


class Spectron(torch.optim.Optimizer):
    """Algorithm 1 on pairs of factors, A (m, r) and B (n, r). Every other parameter needs another optimizer.

    lr is eta; nesterov=False is Algorithm 1 to the letter. Without renormalize a factor moves by eta O (Muon
    on the factors), without orthogonalize by rho M / ||M|| (left open by the paper), without both by eta M
    (SGD). shape_scale, the public code's sqrt(max(1, m / r)) on A's step, and weight decay void the bound.
    """

    def __init__(self, pairs, lr, momentum=0.95, weight_decay=0.0, nesterov=True, shape_scale=False,
                 ns_steps=5, power_steps=1, ns_dtype=None, orthogonalize=True, renormalize=True):
        super().__init__(pairs, dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, shape_scale=shape_scale,
            ns_steps=ns_steps, power_steps=power_steps, ns_dtype=ns_dtype, orthogonalize=orthogonalize,
            renormalize=renormalize))

    def add_param_group(self, group):
        new = {**self.defaults, **group, "params": "..."}
        factors = [p for x in group["params"] for p in (x if isinstance(x, tuple | list) else [x])]
        if not (new["lr"] >= 0 and new["weight_decay"] >= 0 and 0 <= new["momentum"] < 1):
            raise ValueError(f"out of range: lr, weight_decay or momentum of {new}")
        if new["ns_steps"] < 1 or new["power_steps"] < 1:
            raise ValueError(f"out of range: ns_steps or power_steps of {new}")
        for A, B in zip(factors[::2], factors[1::2], strict=True):
            if hasattr(A, "full_tensor") or not (A.ndim == B.ndim == 2 and A.size(1) == B.size(1)
                                                 and A.requires_grad == B.requires_grad):
                raise ValueError(f"no pair A (m, r), B (n, r), unsharded, frozen alike: {A.shape}, {B.shape}")
        super().add_param_group({**group, "params": factors})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            alike = {}  # pairs of one shape are one batch: attention; gate and up; down
            for index, (A, B) in enumerate(zip(group["params"][::2], group["params"][1::2])):
                if not self.state[A]:
                    self.init_state(A, B, seed=index)
                moves = A.grad is not None and B.grad is not None
                if moves:
                    alike.setdefault((A.shape, B.shape, A.dtype, A.device), []).append((A, B))
                idle = self.state[A]["idle"] = 0 if moves else self.state[A].get("idle", 0) + 1
                if idle == 3 and (A.requires_grad or B.requires_grad):
                    warnings.warn("a pair had no gradient in three steps: one factor is frozen, or the model "
                                  "has other parameters now, as after fully_shard or to_empty")
            for pairs in alike.values():
                self.update(*zip(*pairs), group)
        return loss

    def update(self, As, Bs, group):
        """One step of k pairs of one shape: As are k factors (m, r), Bs the k factors (n, r) beside them."""
        eta, m, r = group["lr"], *As[0].shape
        O_A, O_B = self.direction(As, group), self.direction(Bs, group)  # (k, m, r), (k, n, r)
        rho = As[0].new_full((len(As), 1, 1), eta)
        if group["renormalize"]:
            rho = eta / (self.spectral_norm(As, group) + self.spectral_norm(Bs, group) + 1)  # Eq. 16
        rho_A = rho * max(1, m / r) ** 0.5 if group["shape_scale"] else rho
        for factors, steps in (As, rho_A * O_A), (Bs, rho * O_B):
            if group["weight_decay"]:
                torch._foreach_mul_(factors, 1 - eta * group["weight_decay"])
            torch._foreach_sub_(factors, steps.unbind())
            for p, radius in zip(factors, rho.flatten()):
                self.state[p]["rho"] = radius  # for the log

    def direction(self, factors, group) -> Tensor:
        """Where k factors (p, r) move, (k, p, r): along their momentum, orthogonalized."""
        M = self.momentum(factors, group)
        if group["orthogonalize"]:
            return newton_schulz(M.to(group["ns_dtype"] or M.dtype), group["ns_steps"])
        if group["renormalize"]:  # by the exact norm: an SVD, for which the CPU waits
            return M / torch.linalg.matrix_norm(M, ord=2, keepdim=True).clamp_min(torch.finfo(M.dtype).tiny)
        return M

    def momentum(self, factors, group) -> Tensor:
        beta, G = group["momentum"], [p.grad for p in factors]
        M = [self.state[p]["momentum_buffer"] for p in factors]
        torch._foreach_lerp_(M, G, 1 - beta)  # M <- beta M + (1 - beta) G
        return torch.stack(torch._foreach_lerp(G, M, beta) if group["nesterov"] else M)

    def spectral_norm(self, factors, group) -> Tensor:
        """sigma of k factors, (k, 1, 1), by a power iteration that starts where the last step's ended."""
        u = torch.stack([self.state[p]["u"] for p in factors])
        sigmas, u = power_iteration(torch.stack(factors), u, group["power_steps"])
        for p, sigma, vector in zip(factors, sigmas, u):
            self.state[p].update(sigma=sigma, u=vector)
        return sigmas.view(-1, 1, 1)

    def init_state(self, A, B, seed):
        generator = torch.Generator().manual_seed(seed)  # the same u on every rank
        for p in A, B:
            u = torch.randn(p.size(0), generator=generator, device="cpu").to(p)
            _, u = power_iteration(p, u, steps=20)  # one step from a random u would leave sigma too low
            self.state[p].update(momentum_buffer=torch.zeros_like(p), u=u)
