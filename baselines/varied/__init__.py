"""What paper.tuned varies and train.py has no flag for. It is no method of its own, so it is no file beside
those of baselines/.

    python train.py --method varied --method_args beta1=0.8     AdamW on the factors with another beta1
    python train.py --method varied --method_args c=4           Spectron from the factors c A and B / c: the
                                                                same W, and ||A|| + ||B|| is larger
"""

from dataclasses import replace

import torch

from lib.methods import Method
from model import FactorizedLinear
from train import METHODS, adamw_optimizers


class Unbalanced(FactorizedLinear):
    c = 1.0

    @torch.no_grad()
    def set_weight(self, W) -> None:
        super().set_weight(W)
        self.A.mul_(self.c)
        self.B.div_(self.c)


def method(beta1: float | None = None, c: float | None = None) -> Method:
    """One of the two. ValueError for none and for both."""
    if (beta1 is None) == (c is None):
        raise ValueError("give beta1=... for AdamW, or c=... for Spectron")
    if beta1 is None:
        return replace(METHODS["spectron"], linear=type("Unbalanced", (Unbalanced,), {"c": float(c)}))

    def optimizers(model, config):
        factors, others = adamw_optimizers(model, config)
        for group in factors.param_groups:
            group["betas"] = (beta1, group["betas"][1])
        return [factors, others]
    return replace(METHODS["adamw"], optimizers=optimizers)
