"""Spectron: spectral renormalization with orthogonalization, for weights that exist only as W = A @ B.T.

A step of both factors moves W by dW = dA B^T + A dB^T + dA dB^T (Eq. 2). With ||dA||, ||dB|| <= rho <= 1,

    ||dW|| <= rho ||B|| + rho ||A|| + rho^2 <= rho (||A|| + ||B|| + 1) = eta

for rho = eta / (||A|| + ||B|| + 1), in spectral norms (Eqs. 13 to 16). So each factor moves by rho along its
orthogonalized momentum, and eta, the learning rate, bounds the step of W itself. (Janson, Oyallon, Belilovsky
2026, "Stabilizing Native Low-Rank LLM Pretraining".)
"""
from functools import partial

import torch
from torch import Tensor

NS_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # steep at zero, at the price of landing near one and not on it
unit = partial(torch.nn.functional.normalize, dim=-1, eps=torch.finfo(torch.float32).tiny)


def newton_schulz(G: Tensor, steps: int = 5) -> Tensor:
    """Algorithm 2: nearly the polar factor U V^T of G = U S V^T. G (..., p, q), any float dtype.

    After five steps a singular value above 0.01 of G's Frobenius norm comes out within [0.68, 1.14] (0.67 in
    bfloat16), a smaller one within [0, 1.21]. Finite for every finite G, zero included.
    """
    a, b, c = NS_COEFFICIENTS
    largest = G.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(G.dtype).tiny)
    X = (G / largest).reshape(-1, *G.shape[-2:])  # tiny and huge entries alike survive being squared
    X /= torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True) + 1e-7 / largest.clamp_min(1).view(-1, 1, 1)
    wide = X.size(-2) < X.size(-1)
    X = X.mT if wide else X  # tall, so that X^T X is the small Gram matrix: r x r for a factor
    for step in range(steps):
        # P Gram P is the Gram matrix of X P, at r x r prices. A third step without going back to X would
        # amplify its rounding in bfloat16: singular values of 1.26.
        gram = torch.bmm(torch.bmm(P, gram), P) if step % 2 else torch.bmm(X.mT, X)
        P = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)  # P = a I + b Gram + c Gram^2
        X = torch.bmm(X, P)
    return (X.mT if wide else X).reshape(G.shape)


def power_iteration(W: Tensor, u: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """Algorithm 3: (sigma, u), the largest singular value of W from below, and the unit vector behind it.

    W (..., p, q), the last u (..., p) of any length, sigma (...). Where W annihilates u, as a zero factor
    does, sigma is 0 and u starts anew, the same on every rank, so that sigma recovers when W does.
    """
    W, u = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (W, u))
    anew = unit(torch.arange(1, W.size(-2) + 1, dtype=u.dtype, device=u.device).square().cos())
    for _ in range(steps):
        v = unit((u.unsqueeze(-2) @ W).squeeze(-2))
        Wv = (W @ v.unsqueeze(-1)).squeeze(-1)
        sigma = torch.linalg.vector_norm(Wv, dim=-1)  # = u^T W v, with the u of the next line
        u = torch.where(sigma.unsqueeze(-1) > 0, unit(Wv), anew)
    return sigma, u


def stacks(tensors: list[Tensor]):
    """The indices of tensors of equal shape, dtype and device, as many at a time as are worth one call."""
    by_kind = {}
    for i, x in enumerate(tensors):
        by_kind.setdefault((x.shape, x.dtype, x.device), []).append(i)
    for (shape, _, device), rows in by_kind.items():
        lot = max(1, 2**(22 if device.type == "cpu" else 28) // shape.numel())  # a bound on memory
        yield from (rows[k:k + lot] for k in range(0, len(rows), lot))


class Spectron(torch.optim.Optimizer):
    """Algorithm 1 on pairs of factors, A (m, r) and B (n, r); all other parameters want another optimizer.

    lr is eta. nesterov=False is Algorithm 1 to the letter. shape_scale multiplies A's update by
    sqrt(max(1, m / r)), as the public code does, outside the bound. Weight decay shrinks a factor, first, by
    1 - lr * weight_decay. Newton-Schulz runs in ns_dtype (None: the factor's). orthogonalize alone is Muon on
    each factor, eta O; renormalize alone is rho M / ||M||_2, a direction that the paper leaves open; neither
    is SGD, eta M. ValueError for factors that are no pair, and for a setting out of range.
    """

    def __init__(self, pairs, lr, momentum=0.95, weight_decay=0.0, nesterov=True, shape_scale=False,
                 ns_steps=5, power_steps=1, ns_dtype=None, orthogonalize=True, renormalize=True):
        settings = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, shape_scale=shape_scale,
            ns_steps=ns_steps, power_steps=power_steps, ns_dtype=ns_dtype, orthogonalize=orthogonalize,
            renormalize=renormalize)
        if not (lr >= 0 <= weight_decay and 0 <= momentum < 1 <= min(ns_steps, power_steps)):
            raise ValueError(f"out of range, one of {settings}")
        for A, B in (pairs := [tuple(pair) for pair in pairs]):
            if not (A.ndim == B.ndim == 2 and A.size(1) == B.size(1)):
                raise ValueError(f"no pair A (m, r), B (n, r): {tuple(A.shape)}, {tuple(B.shape)}")
        super().__init__([p for pair in pairs for p in pair], settings)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            pairs = list(zip(group["params"][::2], group["params"][1::2]))
            for i, pair in enumerate(pairs):
                generator = torch.Generator().manual_seed(i)  # the same u on every rank
                for p in (p for p in pair if not self.state[p]):
                    u = torch.randn(p.size(0), generator=generator, device="cpu").to(p)
                    _, u = power_iteration(p, u, steps=20)  # one step from cold would leave sigma too low
                    self.state[p].update(momentum_buffer=torch.zeros_like(p), u=u)
            if pairs := [pair for pair in pairs if all(p.grad is not None for p in pair)]:
                self._update(pairs, group)
        return loss

    def _update(self, pairs, group):
        factors, eta, beta = [p for pair in pairs for p in pair], group["lr"], group["momentum"]
        direction = {}
        for rows in stacks(factors):
            W = [factors[i] for i in rows]
            G, M = [p.grad for p in W], [self.state[p]["momentum_buffer"] for p in W]
            torch._foreach_lerp_(M, G, 1 - beta)  # M <- beta M + (1 - beta) G
            D = torch._foreach_lerp(G, M, beta) if group["nesterov"] else M
            if group["orthogonalize"]:
                D = torch.stack([d.to(group["ns_dtype"] or d.dtype) for d in D])
                D = newton_schulz(D, group["ns_steps"])
            elif group["renormalize"]:  # by the exact norm, from an SVD that waits for the GPU
                D = [d / torch.linalg.matrix_norm(d, ord=2).clamp_min(torch.finfo(d.dtype).tiny) for d in D]
            direction.update(zip(W, D))
            if group["renormalize"]:  # by the factors as they are before this update
                u = torch.stack([self.state[p]["u"] for p in W])
                for p, *known in zip(W, *power_iteration(torch.stack(W), u, group["power_steps"])):
                    self.state[p]["sigma"], self.state[p]["u"] = known
        for A, B in pairs:
            rho = eta / (self.state[A]["sigma"] + self.state[B]["sigma"] + 1) if group["renormalize"] else eta
            self.state[A]["rho"] = rho
            for p, scale in (A, max(1, A.size(0) / A.size(1)) ** 0.5 if group["shape_scale"] else 1), (B, 1):
                if group["weight_decay"]:
                    p.mul_(1 - eta * group["weight_decay"])
                p.sub_(direction[p] * (rho * scale))
