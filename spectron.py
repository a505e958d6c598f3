"""Spectron: spectral renormalization with orthogonalization, for weights that exist only as W = A @ B.T.

A step of both factors moves W by dW = dA B^T + A dB^T + dA dB^T (Eq. 2). With ||dA||, ||dB|| <= rho <= 1,

    ||dW|| <= rho ||B|| + rho ||A|| + rho^2 <= rho (||A|| + ||B|| + 1) = eta

for rho = eta / (||A|| + ||B|| + 1), in spectral norms (Eqs. 13 to 16). So each factor moves by rho along its
orthogonalized momentum, and eta, the learning rate, bounds the step of W itself. (Janson, Oyallon, Belilovsky
2026, "Stabilizing Native Low-Rank LLM Pretraining".)
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def newton_schulz(G: Tensor, steps: int = 5) -> Tensor:
    """Algorithm 2: roughly the polar factor U V^T of G = U S V^T. G (..., p, q), any float dtype.

    After five steps a singular value above 0.01 of G's Frobenius norm comes out within [0.68, 1.14] (0.67 in
    bfloat16), a smaller one within [0, 1.21]. The result is finite for every finite G. Entries have to lie
    between 1e-20 and 1e18 in size: outside of that the squares in the norm leave float32.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steep at zero; the price is that values land near one, not on it
    norm = torch.linalg.vector_norm(G, dim=(-2, -1), keepdim=True)
    X = G / (norm + 1e-7 * norm.clamp_max(1)).clamp_min(1e-19)  # the paper's 1e-7, relative for a small G
    wide = X.size(-2) < X.size(-1)
    X = X.mT if wide else X  # tall, so that X^T X is the small Gram matrix, r x r for a factor
    for _ in range(steps):
        gram = X.mT @ X
        X = a * X + X @ (b * gram + c * gram @ gram)
    return X.mT if wide else X


def equilibrate(M: Tensor, times: int, ns_steps: int) -> Tensor:
    """The momentum M (..., p, q) with its rows scaled: once to one length, so that no neuron of A and no
    input feature of B is left behind, and twice so that also the rows of its polar factor are about equal.

    Ours, not the paper's; MuonEq-R and Aurora do it for dense weights. The polar factor of a square matrix
    has unit rows; that of a tall one, as every factor is, need not. Scaling rows before Newton-Schulz leaves
    the singular values of its result near 1, and so the bound as it was. A row of zeros stays one.
    """
    M = F.normalize(M, dim=-1, eps=1e-19)
    for _ in range(times - 1):
        M = M / torch.linalg.vector_norm(newton_schulz(M, ns_steps), dim=-1, keepdim=True).clamp_min(1e-4)
    return M


def power_iteration(W: Tensor, u: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """Algorithm 3: (sigma, u), an estimate of the largest singular value of W from below, and its vector.

    W (..., p, q), u (..., p) of any length from the last call, sigma (...). Where W^T u is zero, as it is for
    a zero factor, sigma is 0 and u is replaced by a fixed vector, so that sigma recovers when W does.
    """
    W, u = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (W, u))
    fresh = unit(torch.arange(1, W.size(-2) + 1, dtype=u.dtype, device=u.device).square().cos())
    for _ in range(steps):
        v = unit((u.unsqueeze(-2) @ W).squeeze(-2))
        Wv = (W @ v.unsqueeze(-1)).squeeze(-1)
        sigma = torch.linalg.vector_norm(Wv, dim=-1)  # = u^T W v, with the u of the next line
        u = torch.where(sigma.unsqueeze(-1) > 0, unit(Wv), fresh)
    return sigma, u


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=torch.finfo(torch.float32).tiny)


class Spectron(torch.optim.Optimizer):
    """Algorithm 1 on pairs of factors, A (m, r) and B (n, r). All other parameters want another optimizer.

    lr is eta. nesterov=False is Algorithm 1 to the letter. shape_scale multiplies A's update by
    sqrt(max(1, m / r)), as the public code does, which breaks the bound. Weight decay first shrinks a factor
    by 1 - lr * weight_decay. Newton-Schulz runs in ns_dtype (None: the factor's own). equilibrate, 0 to 2, is
    how often the rows of the momentum are evened out. orthogonalize alone is Muon on each factor, eta O;
    renormalize alone is rho M / ||M||_2, a direction that the paper leaves open; neither is SGD, eta M.
    ValueError for factors that are no pair and for settings out of range.
    """

    def __init__(self, pairs, lr, momentum=0.95, weight_decay=0.0, nesterov=True, shape_scale=False,
                 ns_steps=5, power_steps=1, ns_dtype=None, orthogonalize=True, renormalize=True,
                 equilibrate=0):
        settings = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, shape_scale=shape_scale,
            ns_steps=ns_steps, power_steps=power_steps, ns_dtype=ns_dtype, orthogonalize=orthogonalize,
            renormalize=renormalize, equilibrate=equilibrate)
        if not (lr >= 0 <= weight_decay and 0 <= momentum < 1 <= min(ns_steps, power_steps)
                and equilibrate in (0, 1, 2)):
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
            for index, pair in enumerate(pairs):
                self._init_state(index, pair)
            if pairs := [pair for pair in pairs if all(p.grad is not None for p in pair)]:
                self._update(pairs, group)
        return loss

    def _init_state(self, index, pair):
        generator = torch.Generator().manual_seed(index)  # the same u on every rank
        for p in (p for p in pair if not self.state[p]):
            u = torch.randn(p.size(0), generator=generator, device="cpu").to(p)
            _, u = power_iteration(p, u, steps=20)  # one step from a random u would leave sigma too low
            self.state[p].update(momentum_buffer=torch.zeros_like(p), u=u)

    def _update(self, pairs, group):
        eta, beta, factors = group["lr"], group["momentum"], [p for pair in pairs for p in pair]
        gradients, momenta = [p.grad for p in factors], [self.state[p]["momentum_buffer"] for p in factors]
        torch._foreach_lerp_(momenta, gradients, 1 - beta)  # M <- beta M + (1 - beta) G
        directions = torch._foreach_lerp(gradients, momenta, beta) if group["nesterov"] else momenta
        stacks = {}  # factors of one shape, A's apart from B's: each stack is one batch for every product
        for i, p in enumerate(factors):
            stacks.setdefault((p.shape, p.dtype, i % 2), []).append(i)
        self._set_rho(pairs, [[factors[i] for i in rows] for rows in stacks.values()], group)
        for (shape, _, side), rows in stacks.items():
            stack, D = [factors[i] for i in rows], torch.stack([directions[i] for i in rows])
            if group["orthogonalize"]:
                D = D.to(group["ns_dtype"] or D.dtype)
                if times := group.get("equilibrate"):  # older checkpoints do not have it
                    D = equilibrate(D, times, group["ns_steps"])
                D = newton_schulz(D, group["ns_steps"])
            elif group["renormalize"]:  # by the exact norm, from an SVD that waits for the GPU
                norm = torch.linalg.matrix_norm(D, ord=2, keepdim=True)
                D = D / norm.clamp_min(torch.finfo(D.dtype).tiny)
            rho = torch.stack([self.state[p]["rho"] for p in stack]).view(-1, 1, 1)
            if group["shape_scale"] and side == 0:
                rho = rho * max(1, shape[0] / shape[1]) ** 0.5
            if group["weight_decay"]:
                torch._foreach_mul_(stack, 1 - eta * group["weight_decay"])
            torch._foreach_sub_(stack, list((rho * D).unbind()))

    def _set_rho(self, pairs, stacks, group):
        """Eq. 16, from the factors as they are before this update; eta itself without renormalization."""
        A, B = zip(*pairs)
        if group["renormalize"]:
            for stack in stacks:
                u = torch.stack([self.state[p]["u"] for p in stack])
                for p, sigma, u in zip(stack, *power_iteration(torch.stack(stack), u, group["power_steps"])):
                    self.state[p].update(sigma=sigma, u=u)
            sigma_A, sigma_B = (torch.stack([self.state[p]["sigma"] for p in side]) for side in (A, B))
            rho = group["lr"] / (sigma_A + sigma_B + 1)
        else:
            dtype = torch.promote_types(A[0].dtype, torch.float32)
            rho = torch.full((len(A),), group["lr"], dtype=dtype, device=A[0].device)
        for p, radius in [*zip(A, rho), *zip(B, rho)]:
            self.state[p]["rho"] = radius
