"""TSVD-style, inferred from its abstract: SCT with a rank that follows the spectral energy.

    python train.py --method tsvd --method_args energy=0.98 every=100

The text of the paper (arXiv 2605.28573) could not be had. What is here: U and V are retracted once an
optimizer step and used by all its micro-steps as they are (the cached orthonormal factor). After the warm-up
each layer looks at its spectrum: it keeps the least rank that has `energy` of the sum of s^2, at least
`least`, and drops at most half at once. A layer that dropped nothing waits twice as long. Adam's state goes
with the columns that stay. The log has the mean rank of all layers: python -m tools.plot RUN --y rank.
"""

import math
import statistics
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from baselines import sct
from lib.methods import Method, block_matrices
from train import WARMUP


class TSVDLinear(sct.SCTLinear):
    """SCT's U, s and V, and the buffer `check`: the step of the next look, and the wait that led to it."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__(in_features, out_features, rank)
        self.register_buffer("check", torch.zeros(2, dtype=torch.int64))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """A checkpoint may have a lower rank."""
        for name in "A", "B", "s":
            if prefix + name in state_dict:
                setattr(self, name, nn.Parameter(torch.empty_like(state_dict[prefix + name])))
        self.rank = self.s.numel()
        super()._load_from_state_dict(state_dict, prefix, *args)


def rank_for(s: torch.Tensor, energy: float, least: int) -> int:
    """The least rank that has this part of the sum of s^2; at least `least`, and half of what there is."""
    sums = s.detach().double().square().sort(descending=True).values.cumsum(0)
    needed = int((sums < energy * sums[-1]).sum()) + 1
    return min(s.numel(), max(needed, least, math.ceil(s.numel() / 2)))


def cut(layer: TSVDLinear, rank: int, optimizer) -> None:
    """Keep the columns of the largest |s|, with their state in the optimizer."""
    keep = layer.s.detach().abs().topk(rank).indices.sort().values
    for name in "A", "B", "s":
        old = getattr(layer, name)
        new = nn.Parameter(old.detach()[..., keep].clone())
        state = optimizer.state.pop(old, {})
        optimizer.state[new] = {key: x[..., keep].clone() if x.ndim else x for key, x in state.items()}
        for group in optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        setattr(layer, name, new)
    layer.rank = rank


def before_step(model, optimizers, c, step: int, energy: float, every: int, least: int) -> bool:
    """Every layer that is due looks at its spectrum. True where one was cut."""
    changed = False
    for layer in (x for x in model.modules() if isinstance(x, TSVDLinear)):
        due, wait = layer.check.tolist()
        if wait == 0:
            due, wait = math.ceil(WARMUP * c.steps), every
        if step >= due and step > 0:
            rank = rank_for(layer.s, energy, least)
            wait = every if rank < layer.rank else 2 * wait
            due, changed = step + wait, changed or rank < layer.rank
            if rank < layer.rank:
                cut(layer, rank, optimizers[0])
        layer.check.copy_(torch.tensor([due, wait]))
    return changed


def logged(model) -> dict:
    return {"rank": statistics.fmean(layer.rank for layer in block_matrices(model).values()
                                     if isinstance(layer, TSVDLinear))}


def method(energy: float = 0.98, every: int = 100, least: int = 4, s_lr: float = 1.0) -> Method:
    """ValueError for an energy that is not in (0, 1], or an interval or a rank below 1."""
    if isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1:
        raise ValueError(f"energy={energy}, expected a number in (0, 1]")
    for name, value in ("every", every), ("least", least):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value}, expected a whole number of at least 1")
    own = sct.method(s_lr)
    return replace(own, tuned=(), linear=TSVDLinear, logged=logged,
                   before_step=partial(before_step, energy=energy, every=every, least=least))
