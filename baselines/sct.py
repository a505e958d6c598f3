"""SCT, training on the Stiefel manifold: W = U diag(s) V^T, U (m, r) and V (n, r) with orthonormal columns.

    python train.py --method sct --method_args s_lr=1.0

AdamW moves U, s and V; then a QR decomposition takes U and V back to orthonormal columns, with the signs of
R's diagonal, so that a step of zero leaves them as they are. s and the first U and V come from the truncated
SVD of a dense draw. Written from the paper's abstract (arXiv 2604.00733) and the textbook retraction; its
authors say that a patent is pending. The log follows W, and sigma_A and sigma_B are those of U diag(s) and V.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.methods import LOW_RANK_FLAGS, Method, Tuned, split_parameters
from lib.optimizers import adamw
from model import FactorizedLinear


class SCTLinear(FactorizedLinear):
    """A is U (m, r), B is V (n, r), and s (r,)."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__(in_features, out_features, rank)
        self.s = nn.Parameter(torch.ones(rank))
        if not self.A.is_meta:
            with torch.no_grad():  # A = U sqrt(S) and B = V sqrt(S) have columns of length sqrt(S)
                self.s.copy_(self.A.norm(dim=0) * self.B.norm(dim=0))
                for p in self.A, self.B:
                    p.copy_(retracted(p))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.B.T) * self.s, self.A)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A * self.s, self.B


def retracted(p: Tensor) -> Tensor:
    """The Q of p's QR decomposition, with a positive diagonal of R: orthonormal columns of the same span."""
    Q, R = torch.linalg.qr(p.to(torch.promote_types(p.dtype, torch.float32)))
    return (Q * torch.where(R.diagonal() < 0, -1, 1)).to(p.dtype)


class StiefelAdamW(torch.optim.AdamW):
    """AdamW; the matrices of the first group are then retracted."""

    @torch.no_grad()
    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            p.copy_(retracted(p))


def build_optimizers(model: nn.Module, c, s_lr: float) -> list:
    pairs, dense, others = split_parameters(model)
    s = [layer.s for layer in model.modules() if isinstance(layer, SCTLinear)]
    taken, decay = {id(p) for p in s}, c.weight_decay
    groups = [dict(params=[p for pair in pairs for p in pair], lr=c.lr), dict(params=s, lr=c.lr * s_lr)]
    return [StiefelAdamW(groups, betas=(0.9, 0.95), weight_decay=decay),
            *([adamw(dense, c.lr, c)] if dense else []),
            adamw([p for p in others if id(p) not in taken], c.adam_lr, c)]


def method(s_lr: float = 1.0) -> Method:
    """s_lr is the learning rate of s over that of U and V. ValueError unless it is a positive number."""
    if isinstance(s_lr, bool) or not isinstance(s_lr, (int, float)) or not s_lr > 0:
        raise ValueError(f"s_lr={s_lr}, expected a positive number")
    low = [Tuned(f"a rank ratio of {ratio}", dict(rank_ratio=ratio), table="claims", nano_lr=0.02)
           for ratio in (1 / 16, 1 / 32)]
    return Method(optimizers=partial(build_optimizers, s_lr=s_lr), lr=1e-3, nano_lr=5e-3, nano_adam_lr=0.03,
                  flags=LOW_RANK_FLAGS, linear=SCTLinear, tuned=tuple(low))
