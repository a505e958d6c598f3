"""What paper.tuned varies and train.py has no flag for. It is no method of its own, so it is no file beside
those of baselines/.

    python train.py --method varied --method_args beta1=0.8   AdamW on the factors with another beta1
    python train.py --method varied --method_args c=8         Spectron; attention starts from the factors c A
                                                              and B / c: the same W, at larger norms
    python train.py --method varied --method_args decay=0.02  Spectron; the factors alone shrink, each step by
                                                              this, times the schedule, whatever the lr
"""

from dataclasses import replace

import torch

from lib.methods import Method
from model import FactorizedLinear
from train import METHODS, adamw_optimizers, spectron_optimizers


class Unbalanced(FactorizedLinear):
    c = 1.0

    @torch.no_grad()
    def set_weight(self, W) -> None:
        super().set_weight(W)
        if W.size(0) == W.size(1):  # attention's four
            self.A.mul_(self.c)
            self.B.div_(self.c)


def method(beta1: float | None = None, c: float | None = None, decay: float | None = None) -> Method:
    """One of the three. ValueError for none and for more."""
    if [beta1, c, decay].count(None) != 2:
        raise ValueError("give one of beta1=... for AdamW, c=... and decay=... for Spectron")
    if c is not None:
        return replace(METHODS["spectron"], linear=type("Unbalanced", (Unbalanced,), {"c": float(c)}))

    def optimizers(model, config):
        factors, *others = (spectron_optimizers if beta1 is None else adamw_optimizers)(model, config)
        for group in factors.param_groups:
            if beta1 is None:
                group["weight_decay"] = decay / config.lr
            else:
                group["betas"] = (beta1, group["betas"][1])
        return [factors, *others]
    return replace(METHODS["spectron" if beta1 is None else "adamw"], optimizers=optimizers)
