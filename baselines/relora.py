"""ReLoRA (Lialin et al. 2024): a frozen W, and a low-rank update that is merged into it and started anew.

    python train.py --method relora --method_args every=50

y = W x + (alpha / r) A (B^T x) with A at zero. Every `every` steps A B^T is added to W, B is drawn again, A
and the moments of both are zero, and the learning rate warms up again under one cosine. W is a usual dense
draw and never trained by itself; embedding, head and norms are AdamW's as everywhere. The log follows all of
W, so that sigma_A is its norm; dropout and the authors' warm start with dense training are left out.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import methods
from lib.methods import LOW_RANK_FLAGS, Method, Tuned, block_matrices, split_parameters
from lib.optimizers import adamw
from model import FactorizedLinear
from train import WARMUP, schedule


class ReLoRALinear(FactorizedLinear):
    """A (m, r), B (n, r) and the buffer W (m, n)."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float):
        super().__init__(in_features, out_features, rank)
        self.scale = alpha / rank
        self.register_buffer("W", torch.empty(out_features, in_features))
        if not self.A.is_meta:
            nn.init.uniform_(self.W, -in_features**-0.5, in_features**-0.5)
            self.restart(None)

    @torch.no_grad()
    def restart(self, generator) -> None:
        """A at zero, B as nn.Linear would draw it."""
        draw = torch.rand(self.B.shape, generator=generator, device="cpu" if generator else self.B.device)
        self.B.copy_((2 * draw - 1) * self.in_features**-0.5)
        self.A.zero_()

    def dense(self) -> Tensor:
        return self.W + self.scale * self.A @ self.B.T

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W) + self.scale * F.linear(F.linear(x, self.B.T), self.A)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.dense(), torch.eye(self.in_features).to(self.A)


def is_restart(step: int, steps: int, every: int) -> bool:
    """Whether a multiple of `every` is a restart. The first draw is none, and neither is one with less than
    half of `every` left: the run would end before the new factors had learnt anything."""
    return step >= every and steps - step > every // 2


def envelope(step: int, steps: int, warmup: int, every: int, rewarm: int, least: float = 0.1) -> float:
    """The fraction of lr at a step (from 0), as the authors have it: a linear warm-up, then a cosine towards
    `least`; after each restart it climbs from 0 to where the cosine is `rewarm` steps later."""
    def cosine(t):
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (steps - warmup)))
    if step < warmup:
        return step / warmup
    since = step % every
    if is_restart(step - since, steps, every) and since < rewarm:
        return since / rewarm * cosine(step - since + rewarm)
    return cosine(step)


def before_step(model: nn.Module, optimizers: list, c, step: int, every: int | None) -> None:
    """Merge and restart in the step after a multiple of `every`; set the learning rate of this step."""
    every = every or max(2, c.steps // 4)
    if step % every == 1 and is_restart(step - 1, c.steps, every):
        for index, layer in enumerate(x for x in model.modules() if isinstance(x, ReLoRALinear)):
            with torch.no_grad():
                layer.W.copy_(layer.dense())
            # The same draw on every rank, and after a resume.
            layer.restart(torch.Generator().manual_seed(c.seed + 1_000_003 * step + index))
            for p in layer.A, layer.B:
                state = optimizers[0].state[p]
                state["exp_avg"].zero_(), state["exp_avg_sq"].zero_()
    warmup, rewarm = math.ceil(WARMUP * c.steps), min(max(5, every // 50), every // 2)
    fraction = envelope(step, c.steps, warmup, every, rewarm)
    for group in optimizers[0].param_groups:  # train.update multiplies by the common schedule
        group["initial_lr"] = c.lr * fraction / schedule(step, c.steps)


def flops_per_token(model: nn.Module) -> float:
    """W has a forward and a backward product, and no gradient of its own."""
    frozen = sum(layer.W.numel() for layer in block_matrices(model).values()
                 if isinstance(layer, ReLoRALinear))
    return methods.flops_per_token(model) + 4 * frozen


def build_optimizers(model: nn.Module, c) -> list:
    pairs, dense, others = split_parameters(model)
    return [adamw([p for pair in pairs for p in pair], c.lr, c),
            *([adamw(dense, c.lr, c)] if dense else []), adamw(others, c.adam_lr, c)]


def method(every: int | None = None, alpha: float = 32) -> Method:
    """every: steps between merges, a quarter of the run where it is not given. ValueError for less than 2."""
    if every is not None and (type(every) is not int or every < 2):
        raise ValueError(f"every={every}, expected a whole number of at least 2")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"alpha={alpha}, expected a number")
    once = [Tuned("no restart", {}, table="settings", nano_lr=2e-3)] if every and every >= 200 else []
    return Method(optimizers=build_optimizers, lr=1e-3, nano_lr=5e-3, nano_adam_lr=0.03, flags=LOW_RANK_FLAGS,
                  linear=partial(ReLoRALinear, alpha=alpha), flops_per_token=flops_per_token,
                  before_step=partial(before_step, every=every), tuned=tuple(once))
