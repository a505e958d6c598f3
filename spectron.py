"""Spectron: spectral renormalization with orthogonalization, for weights that exist only as W = A @ B.T.

A step of both factors moves the weight by dW = dA B^T + A dB^T + dA dB^T (Eq. 2). With ||dA||, ||dB|| <= rho <= 1

    ||dW|| <= rho ||B|| + rho ||A|| + rho^2 <= rho (||A|| + ||B|| + 1) = eta,    rho = eta / (||A|| + ||B|| + 1),

all in spectral norms (Eqs. 13 to 16). So each factor moves by rho along its orthogonalized momentum, and lr bounds the
step of W itself. Janson, Oyallon, Belilovsky 2026, "Stabilizing Native Low-Rank LLM Pretraining".
"""

import torch
from torch import Tensor

NS_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # steep at zero, at the price of landing near one instead of on it


def newton_schulz(G: Tensor, steps: int = 5) -> Tensor:
    """Algorithm 2: nearly the polar factor U V^T of G = U S V^T. G (..., p, q) of any float dtype; the same returns.

    After five steps a singular value above 0.01 of G's Frobenius norm comes out within [0.68, 1.14], a smaller one
    within [0, 1.21]. Finite for every finite G, zero included.
    """
    a, b, c = NS_COEFFICIENTS
    largest = G.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(G.dtype).tiny)
    X = G / largest  # tiny and huge entries alike survive being squared
    X = X / (torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) + 1e-7 / largest.clamp_min(1))
    wide = X.size(-2) < X.size(-1)
    X = X.mT if wide else X  # tall, so that X^T X is the small Gram matrix: r x r for a factor
    for _ in range(steps):
        gram = X.mT @ X
        X = a * X + X @ (b * gram + c * gram @ gram)
    return X.mT if wide else X


def power_iteration(W: Tensor, u: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """Algorithm 3: (sigma, u), the largest singular value of W from below, and the unit vector behind it.

    W (..., p, q), the last u (..., p) of any length, sigma (...). Where W annihilates u, as a zero factor does, sigma is
    0 and u starts anew, from the same vector on every rank, so that sigma recovers when W does.
    """
    anew = unit(torch.arange(1, W.size(-2) + 1, dtype=u.dtype, device=u.device).square().cos())
    for _ in range(steps):
        v = unit(torch.einsum("...pq,...p->...q", W, u))
        Wv = torch.einsum("...pq,...q->...p", W, v)
        sigma = torch.linalg.vector_norm(Wv, dim=-1)  # = u^T W v, with the u of the next line
        u = torch.where(sigma.unsqueeze(-1) > 0, unit(Wv), anew)
    return sigma, u


def unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def spectral_norm(M: Tensor) -> Tensor:
    """||M||_2 of M (..., p, q), exactly, from the smaller Gram matrix. Waits for the GPU: for one ablation only."""
    gram = M @ M.mT if M.size(-2) < M.size(-1) else M.mT @ M
    return torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0).sqrt()


def batched(function, *columns: list[Tensor]) -> list:
    """[function(*row) for row in zip(*columns)], with the rows of equal shape stacked into one call."""
    results, by_shape = [None] * len(columns[0]), {}
    for i, x in enumerate(columns[0]):
        by_shape.setdefault((x.shape, x.dtype, x.device), []).append(i)
    for rows in by_shape.values():
        out = function(*(torch.stack([column[i] for i in rows]) for column in columns))
        for i, row in zip(rows, zip(*out) if isinstance(out, tuple) else out):
            results[i] = row
    return results


def precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Spectron(torch.optim.Optimizer):
    """Algorithm 1 on pairs of factors (A (m, r), B (n, r)); every other parameter wants an optimizer of its own.

    lr is eta, the bound on ||dW||_2. nesterov=False is Algorithm 1 to the letter. shape_scale multiplies A's update by
    sqrt(max(1, m / r)), as the public code does, outside the bound. Weight decay shrinks a factor by
    1 - lr * weight_decay before its update. Newton-Schulz runs in ns_dtype (None: the factor's own). Of the toggles,
    orthogonalize alone is Muon on each factor, eta O; renormalize alone is rho M / ||M||_2, a direction that the paper
    leaves open; neither is SGD, eta M. ValueError for factors that are no pair, or a setting out of range.
    """

    def __init__(self, pairs, lr, momentum=0.95, weight_decay=0.0, nesterov=True, shape_scale=False,
                 ns_steps=5, power_steps=1, ns_dtype=None, orthogonalize=True, renormalize=True):
        pairs = [tuple(pair) for pair in pairs]
        for pair in pairs:
            if len(pair) != 2 or any(p.ndim != 2 for p in pair) or pair[0].size(1) != pair[1].size(1):
                raise ValueError(f"a pair is A (m, r) and B (n, r), not {[tuple(p.shape) for p in pair]}")
        if not (lr >= 0 and 0 <= momentum < 1 and weight_decay >= 0 and ns_steps >= 1 and power_steps >= 1):
            raise ValueError(f"lr {lr} and weight_decay {weight_decay} must be >= 0, momentum {momentum} in [0, 1), "
                             f"ns_steps {ns_steps} and power_steps {power_steps} >= 1")
        super().__init__([p for pair in pairs for p in pair], dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, shape_scale=shape_scale,
            ns_steps=ns_steps, power_steps=power_steps, ns_dtype=ns_dtype, orthogonalize=orthogonalize,
            renormalize=renormalize))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            pairs = list(enumerate(zip(group["params"][::2], group["params"][1::2])))
            pairs = [(i, pair) for i, pair in pairs if all(p.grad is not None for p in pair)]
            for i, pair in pairs:
                if not self.state[pair[0]]:
                    self._init_state(i, pair)
            if pairs:
                self._update([pair for _, pair in pairs], group)
        return loss

    def _init_state(self, i, pair):
        generator = torch.Generator().manual_seed(i)  # of the pair: the same u on every rank
        for p in pair:
            u = torch.randn(p.size(0), generator=generator).to(p.device, precise(p).dtype)
            _, u = power_iteration(precise(p), u, steps=20)  # after one step from cold, sigma would be far too low
            self.state[p].update(momentum_buffer=torch.zeros_like(p), u=u)

    def _update(self, pairs, group):
        eta, beta, factors = group["lr"], group["momentum"], [p for pair in pairs for p in pair]
        states, G = [self.state[p] for p in factors], [p.grad for p in factors]

        M = [state["momentum_buffer"] for state in states]
        torch._foreach_lerp_(M, G, 1 - beta)  # M <- beta M + (1 - beta) G
        D = torch._foreach_lerp(G, M, beta) if group["nesterov"] else M
        if group["orthogonalize"]:
            D = [d.to(group["ns_dtype"] or d.dtype) for d in D]
            D = batched(lambda d: newton_schulz(d, group["ns_steps"]), D)
        elif group["renormalize"]:
            D = batched(lambda d: d / spectral_norm(d)[:, None, None].clamp_min(torch.finfo(d.dtype).tiny), D)

        if group["renormalize"]:  # by the factors as they are before this update
            sigmas = batched(lambda W, u: power_iteration(precise(W), precise(u), group["power_steps"]),
                             factors, [state["u"] for state in states])
            for state, (sigma, u) in zip(states, sigmas):
                state.update(sigma=sigma, u=u)

        for (A, B), d_A, d_B in zip(pairs, D[::2], D[1::2]):
            rho = eta / (self.state[A]["sigma"] + self.state[B]["sigma"] + 1) if group["renormalize"] else eta
            self.state[A]["rho"] = rho
            scale = max(1, A.size(0) / A.size(1)) ** 0.5 if group["shape_scale"] else 1
            for p, d, radius in (A, d_A, rho * scale), (B, d_B, rho):
                p.mul_(1 - eta * group["weight_decay"]).sub_(d * radius)
