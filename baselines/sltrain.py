"""SLTrain (Han et al. 2024): W = (alpha / r) A B^T + S, with S sparse on places that are drawn once.

    python train.py --method sltrain --method_args delta=0.03 alpha=32

S holds floor(delta m n) values; A starts at zero, so that S is all of W at first. W is formed in every
forward pass, as the authors do: what is saved is the memory of weights and optimizer, not compute. Everything
is AdamW's. The log follows W, so that sigma_A is its norm.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import methods
from lib.methods import LOW_RANK_FLAGS, Method, block_matrices, split_parameters
from lib.optimizers import adamw
from model import FactorizedLinear


class SLTrainLinear(FactorizedLinear):
    """A (m, r), B (n, r), and `values` at the sorted flat places `index`."""

    def __init__(self, in_features: int, out_features: int, rank: int, delta: float, alpha: float):
        super().__init__(in_features, out_features, rank)
        count, self.scale = int(delta * (in_features * out_features)), alpha / rank
        self.values = nn.Parameter(torch.empty(count))
        self.register_buffer("index", torch.empty(count, dtype=torch.int64))
        if not self.A.is_meta:
            places = torch.randperm(in_features * out_features, device=self.A.device)[:count]
            self.index.copy_(places.sort().values)
            for p in self.values, self.B:
                nn.init.uniform_(p, -in_features**-0.5, in_features**-0.5)
            nn.init.zeros_(self.A)

    def dense(self) -> Tensor:
        W = self.scale * self.A @ self.B.T
        return W.flatten().index_add(0, self.index, self.values.to(W.dtype)).view_as(W)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense())

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.dense(), torch.eye(self.in_features).to(self.A)


def flops_per_token(model: nn.Module) -> float:
    """Those of the dense W, which is what is multiplied; forming W once a micro-step is left out."""
    own = sum(p.numel() for layer in block_matrices(model).values() for p in layer.parameters())
    dense = sum(layer.in_features * layer.out_features for layer in block_matrices(model).values())
    return methods.flops_per_token(model) + 6 * (dense - own)


def build_optimizers(model: nn.Module, c) -> list:
    pairs, dense, others = split_parameters(model)
    values = [layer.values for layer in model.modules() if isinstance(layer, SLTrainLinear)]
    taken = {id(p) for p in values}
    return [adamw([p for pair in pairs for p in pair] + dense + values, c.lr, c, entries=values),
            adamw([p for p in others if id(p) not in taken], c.adam_lr, c)]


def method(delta: float = 0.03, alpha: float = 32) -> Method:
    """ValueError for a delta that is not in (0, 1], or an alpha that is no number."""
    for name, value in ("delta", delta), ("alpha", alpha):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}={value}, expected a number")
    if not 0 < delta <= 1:
        raise ValueError(f"delta={delta}, expected a number in (0, 1]")
    return Method(optimizers=build_optimizers, lr=2e-3, nano_lr=5e-3, nano_adam_lr=0.03, flags=LOW_RANK_FLAGS,
                  linear=partial(SLTrainLinear, delta=delta, alpha=alpha), flops_per_token=flops_per_token)
