"""Fira (Chen et al. 2024): GaLore, and the part of the gradient that its projection discards, scaled.

    python train.py --method fira --method_args rank=64 scale=0.25 gap=200

A row (or column) of what is left is scaled by how much Adam scaled that row of the projected gradient. A
limiter lets the norm of this part grow by 1% a step. As in the authors' code, `scale` also multiplies the
projection that is taken out, so that at 0.25 three quarters of it stay in the residual.
"""

import torch

from baselines.galore import GaLore, projected


class Fira(GaLore):
    def residual(self, G, R, N, back, state):
        along = 1 if state["right"] else 0
        size = [torch.linalg.vector_norm(X, dim=along, keepdim=True) for X in (N, R)]
        S = size[0] / (size[1] + 1e-8) * (G - back(R))
        norm = S.norm()
        if "limit" in state:
            S = S / ((norm / (state["limit"] + 1e-8)).clamp_min(1.01) / 1.01)
        state["limit"] = S.norm()
        return S


def method(rank: int = 0, scale: float = 0.25, gap: int = 200):
    """As GaLore's."""
    return projected(Fira, 2e-3, rank, scale, gap)
