"""Self-guided training (Wei et al. 2024; the paper's Appendix C): o = alpha W x + (1 - alpha) A (B^T x).

A dense W is trained together with the factors and leads them, while alpha falls from 1 to 0 as a cosine over
the first half of the steps. Then W and its optimizer are dropped, and a plain low-rank model is left.

    python train.py --method self-guided
    python train.py --method self-guided --method_args optimizer=muon init=dense stochastic=true

FLOPs are counted as they are executed. W is there for half of the steps, so a run costs half of the dense
matrices' FLOPs on top of the factors'. With stochastic=true W is used with probability alpha, which is 1/2 on
average, so it costs a quarter.
"""

import math
import random
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import methods
from lib.methods import LOW_RANK_FLAGS, MUON_FLAGS, Method, split_parameters
from lib.optimizers import adamw, muon
from model import FactorizedLinear


class SelfGuidedLinear(FactorizedLinear):
    """A (m, r), B (n, r) and their guide W (m, n), which begins as A B^T (Eq. 18), or, with init dense, as
    the weight of which A and B are the truncated SVD, as in the public code."""

    def __init__(self, in_features: int, out_features: int, rank: int, init: str = "product"):
        super().__init__(in_features, out_features, rank)
        self.W = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("alpha", torch.ones(()))  # saved: a run that was stopped is scored with it
        self.idle = 0  # weights that the forward passes of a step leave out, on average
        self._skips = iter(())
        if not self.W.is_meta:
            with torch.no_grad():
                if init == "dense":
                    nn.init.uniform_(self.W, -in_features**-0.5, in_features**-0.5)
                    self.set_weight(self.W)
                else:
                    self.W.copy_(self.A @ self.B.T)

    def lead(self, alpha: float, skips: list[bool]) -> None:
        """For one step: the weight of W, and whether each micro-step leaves it out."""
        self.alpha.fill_(alpha)
        self.idle, self._skips = self.W.numel() * sum(skips) / len(skips), iter(skips)

    def forward(self, x: Tensor) -> Tensor:  # (..., n) -> (..., m)
        low_rank = super().forward(x)
        if torch.is_grad_enabled() and next(self._skips, False):  # never in evaluation
            return low_rank + 0 * self.W[0, 0]  # a gradient of zeros on every rank: momentum still moves W
        return self.alpha * F.linear(x, self.W) + (1 - self.alpha) * low_rank

    def product(self) -> Tensor:
        return self.alpha * self.W.double() + (1 - self.alpha) * super().product()

    def alone(self) -> FactorizedLinear:
        """The same A and B without W."""
        with torch.device("meta"):
            layer = FactorizedLinear(self.in_features, self.out_features, self.rank)
        layer.A, layer.B = self.A, self.B
        return layer


def alpha_at(step: int, steps: int) -> float:
    """The weight of W at a step (from 0): 1 at the first, 0 from the middle of the run on."""
    guided = steps // 2
    return 0.5 * (1 + math.cos(math.pi * step / guided)) if step < guided else 0.0


def skipped(alpha: float, *where) -> bool:
    """Eq. 19: W is left out with probability 1 - alpha; the same draw on every rank, and after a resume."""
    return random.Random(" ".join(map(str, where))).random() >= alpha


def before_step(model: nn.Module, optimizers: list, c, step: int, stochastic: bool) -> bool:
    """Lead with this step's alpha; at 0, drop every W, and their optimizer, which is the last."""
    guided = {name: layer for name, layer in model.named_modules() if isinstance(layer, SelfGuidedLinear)}
    alpha = alpha_at(step, c.steps)
    for name, layer in guided.items():
        if alpha:
            layer.lead(alpha, [stochastic and skipped(alpha, c.seed, step, micro, name)
                               for micro in range(c.micro_steps)])
        else:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer.alone())
    if alpha or not guided:
        return False
    optimizers.pop()
    return True


def flops_per_token(model: nn.Module) -> float:
    """As the model counts them, without the guides that this step leaves out."""
    idle = sum(layer.idle for layer in model.modules() if isinstance(layer, SelfGuidedLinear))
    return methods.flops_per_token(model) - 6 * idle


def build_optimizers(model: nn.Module, c, update) -> list:
    pairs, dense, others = split_parameters(model)
    guides = [layer.W for layer in model.modules() if isinstance(layer, SelfGuidedLinear)]
    taken = {id(W) for W in guides}
    return [update([p for pair in pairs for p in pair] + dense, c.lr, c),
            adamw([p for p in others if id(p) not in taken], c.adam_lr, c),
            *([update(guides, c.lr, c)] if guides else [])]


def method(init: str = "product", optimizer: str = "adamw", stochastic: bool = False) -> Method:
    """init: product or dense; optimizer: AdamW on A, B and W as in Table 1, or muon, Figure 12's other curve.
    ValueError for another value."""
    choices = {"init": (init, ("product", "dense")), "optimizer": (optimizer, ("adamw", "muon")),
               "stochastic": (stochastic, (False, True))}
    for name, (value, allowed) in choices.items():
        if value not in allowed or isinstance(value, bool) != (name == "stochastic"):
            raise ValueError(f"{name}={value}, expected {' or '.join(f'{name}={x}' for x in allowed)}")
    update, lr = {"adamw": (adamw, 1e-3), "muon": (muon, 0.02)}[optimizer]
    return Method(optimizers=partial(build_optimizers, update=update), lr=lr, nano_lr=lr, nano_adam_lr=0.03,
                  flags=LOW_RANK_FLAGS + (MUON_FLAGS if optimizer == "muon" else ()),
                  linear=partial(SelfGuidedLinear, init=init), flops_per_token=flops_per_token,
                  before_step=partial(before_step, stochastic=stochastic), compiles=False)
