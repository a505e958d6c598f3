"""LoRA-Muon (Cesista, Crowson, Simal, Biderman 2026): steepest descent in the spectral norm of W = A B^T.

    python train.py --method lora-muon

dA = -(eta / 2) msign(M_A R) R with R = (B^T B)^(-1/2), and the same for B with the Gram matrix of A. R B^T
has orthonormal rows, so each of the two first-order terms of dW has the norm eta / 2, whatever the sizes of A
and B: A -> c A, B -> B / c changes nothing. Spectron's radius depends on that balance. The paper's split
weight decay is left out; momentum is Nesterov's, as in the other methods here.
"""

import torch
from torch import Tensor

from lib.methods import LOW_RANK_FLAGS, MUON_FLAGS, Method, split_parameters
from lib.optimizers import adamw, muon
from spectron import newton_schulz


def inverse_root(S: Tensor) -> Tensor:
    """S^(-1/2) of a symmetric S (..., r, r); eigenvalues below 1e-6 of the largest count as that."""
    values, V = torch.linalg.eigh(S.to(torch.promote_types(S.dtype, torch.float32)))
    values = values.maximum(1e-6 * values[..., -1:]).clamp_min(1e-30)
    return ((V * values.rsqrt().unsqueeze(-2)) @ V.mT).to(S.dtype)


class LoRAMuon(torch.optim.Optimizer):
    """param_groups[0]["params"] = [A0, B0, A1, B1, ...], as with Spectron."""

    def __init__(self, pairs, lr, momentum=0.9, nesterov=True, ns_steps=5):
        super().__init__([p for pair in pairs for p in pair],
                         dict(lr=lr, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for pair in zip(group["params"][::2], group["params"][1::2]):
                # Both steps are of the factors as they were.
                steps = [self.direction(p, other, group) for p, other in (pair, pair[::-1])]
                for p, step in zip(pair, steps):
                    p.sub_(step, alpha=group["lr"] / 2)

    def direction(self, p, other, group) -> Tensor:
        if not self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        M, beta = self.state[p]["momentum_buffer"], group["momentum"]
        M.lerp_(p.grad, 1 - beta)
        R = inverse_root(other.mT @ other)
        return newton_schulz((p.grad.lerp(M, beta) if group["nesterov"] else M) @ R, group["ns_steps"]) @ R


def method() -> Method:
    def optimizers(model, c):
        pairs, dense, others = split_parameters(model)
        return [LoRAMuon(pairs, c.lr, c.momentum, c.nesterov, c.ns_steps),
                *([muon(dense, c.muon_lr, c)] if dense else []), adamw(others, c.adam_lr, c)]
    return Method(optimizers=optimizers, lr=0.05, nano_lr=0.2,
                  flags=LOW_RANK_FLAGS + MUON_FLAGS + ("muon_lr",), ignores=("weight_decay",))
