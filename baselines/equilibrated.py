"""Equilibrated Spectron: the rows of the momentum are scaled to one length before Newton-Schulz.

    python train.py --method equilibrated
    python train.py --method equilibrated --method_args times=2 --no-renormalize

The line is MuonEq-R's, and with times=2 Aurora's loop, both for dense weights. New here is their use on
factors. The polar factor of a square matrix has unit rows, but that of a tall one, as every factor is, need
not: some neurons of A, or input features of B, hardly move. Scaling rows before Newton-Schulz leaves the
singular values of its result near 1, and so the bound as it was. docs/EQUILIBRATED.md has what it brings.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.methods import LOW_RANK_FLAGS, MUON_FLAGS, Method, Tuned
from spectron import Spectron, newton_schulz
from train import is_bounded, spectron_optimizers


def equilibrate(M: Tensor, times: int, ns_steps: int) -> Tensor:
    """M (..., p, q) with rows of one length. With times=2 they are scaled once more, by the rows that
    Newton-Schulz makes of them, so that those come out about equal too. A row of zeros stays one."""
    M = F.normalize(M, dim=-1, eps=1e-19)
    for _ in range(times - 1):
        M = M / torch.linalg.vector_norm(newton_schulz(M, ns_steps), dim=-1, keepdim=True).clamp_min(1e-4)
    return M


class EquilibratedSpectron(Spectron):
    def __init__(self, pairs, times: int, **settings):
        super().__init__(pairs, **settings)
        self.times = times

    def direction(self, factors, group) -> Tensor:
        M = self.momentum(factors, group)
        M = equilibrate(M.to(group["ns_dtype"] or M.dtype), self.times, group["ns_steps"])
        return newton_schulz(M, group["ns_steps"])


def method(times: int = 1) -> Method:
    """times: 1 or 2. ValueError for another value."""
    if type(times) is not int or times not in (1, 2):
        raise ValueError(f"times={times}, expected times=1 or times=2")

    optimizers = partial(spectron_optimizers, spectron=partial(EquilibratedSpectron, times=times))
    on_factors = Tuned("equilibrated Muon on the factors", dict(renormalize=False), table="neighbours",
                       nano_lr=0.05)
    flags = "renormalize", "power_steps", "shape_scale", "muon_lr"
    return Method(optimizers=optimizers, lr=0.05, nano_lr=0.2, tuned=(on_factors,), bounded=is_bounded,
                  flags=LOW_RANK_FLAGS + MUON_FLAGS + flags)
