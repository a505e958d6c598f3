"""GaLore (Zhao et al. 2024): dense weights, and Adam's moments in a projected space of r dimensions.

    python train.py --method galore --method_args rank=64 scale=0.25 gap=200

Every `gap` steps the projection becomes the first r singular vectors of the gradient, on its shorter side.
Moments stay where they were, in the old basis, as in the authors' code; so does its Adam: eps is added to the
uncorrected second moment, and weight decay comes after the step. The log follows W.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lib.cli import UserError
from lib.methods import Method, Tuned, split_parameters
from lib.optimizers import adamw


class GaLore(torch.optim.Optimizer):
    """For matrices. UserError for a rank larger than one of them."""

    def __init__(self, params, lr, rank, scale=0.25, gap=200, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0):
        for p in params:
            if rank > min(p.shape):
                raise UserError(f"rank={rank} is larger than a matrix of {tuple(p.shape)}: --method_args "
                                f"rank={min(min(p.shape) for p in params)} at most")
        super().__init__(params, dict(lr=lr, rank=rank, scale=scale, gap=gap, betas=betas, eps=eps,
                                      weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, self.state[p], group)

    def update(self, p: Tensor, state: dict, group: dict) -> None:
        if not state:
            state.update(step=0)
        if state["step"] % group["gap"] == 0:
            U, _, Vh = torch.linalg.svd(p.grad.float(), full_matrices=False)
            state["right"] = p.size(0) >= p.size(1)  # a square matrix does not tell the side by its shape
            state["P"] = (Vh[:group["rank"]] if state["right"] else U[:, :group["rank"]]).to(p.dtype)
        P, right = state["P"], state["right"]
        R = p.grad @ P.T if right else P.T @ p.grad
        m, v = (state.setdefault(name, torch.zeros_like(R)) for name in "mv")
        beta1, beta2 = group["betas"]
        state["step"] += 1
        m.lerp_(R, 1 - beta1)
        v.mul_(beta2).addcmul_(R, R, value=1 - beta2)
        N = m / (v.sqrt() + group["eps"])

        def back(X):
            return group["scale"] * (X @ P if right else P @ X)
        correction = (1 - beta2**state["step"]) ** 0.5 / (1 - beta1**state["step"])
        p.sub_(back(N) + self.residual(p.grad, R, N, back, state), alpha=group["lr"] * correction)
        p.mul_(1 - group["lr"] * group["weight_decay"])

    def residual(self, G, R, N, back, state):
        """What Fira adds; nothing here."""
        return 0.0


def method(rank: int = 0, scale: float = 0.25, gap: int = 200) -> Method:
    """rank 0 is a quarter of the model's width. ValueError for a gap or a rank that makes no sense."""
    often = [Tuned("a gap of 10", {}, table="claims", nano_lr=2e-2)] if gap == 10 else []
    return replace(projected(GaLore, 1e-2, rank, scale, gap), tuned=tuple(often))


def projected(optimizer: type, nano_lr: float, rank: int, scale: float, gap: int) -> Method:
    for name, value, least in ("rank", rank, 0), ("gap", gap, 1):
        if type(value) is not int or value < least:
            raise ValueError(f"{name}={value}, expected a whole number of at least {least}")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise ValueError(f"scale={scale}, expected a number")

    def optimizers(model, c):
        _, dense, others = split_parameters(model)
        r = rank or model.config.dim // 4
        return [optimizer(dense, c.lr, r, scale, gap, weight_decay=c.weight_decay),
                adamw(others, c.adam_lr, c)]
    return Method(optimizers=optimizers, lr=1e-2, nano_lr=nano_lr, nano_adam_lr=0.03, dense=True)
