"""CoLA (Liu et al. 2025): y = A silu(B^T x), a nonlinearity between the factors of all seven matrices.

    python train.py --method cola
    python train.py --method cola --method_args optimizer=spectron init=spectral

The layer is no linear map, so there is no W to export. The log follows A B^T, of which the layer's step is at
most 1.1 times, the Lipschitz constant of silu. CoLA starts from normal factors whose product has entries of
variance 1 / (m + n), and trains with AdamW; the SwiGLU keeps its own silu, as at CoLA's small sizes.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.cli import UserError
from lib.methods import Method
from model import FactorizedLinear
from train import find_method

ACTIVATIONS = {"silu": F.silu, "identity": lambda x: x}


class CoLALinear(FactorizedLinear):
    """A (m, r), B (n, r). init is CoLA's "normal" or this project's "spectral"."""

    def __init__(self, in_features: int, out_features: int, rank: int, init="normal", activation="silu"):
        super().__init__(in_features, out_features, rank)
        self.activation = ACTIVATIONS[activation]
        self.register_buffer("cola", torch.ones(()))  # by which a checkpoint is told from a plain one
        if init == "normal" and not self.A.is_meta:
            for p in self.A, self.B:
                torch.nn.init.normal_(p, std=(rank * (in_features + out_features)) ** -0.25)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.activation(F.linear(x, self.B.T)), self.A)

    def product(self) -> Tensor:
        raise UserError("CoLA has a nonlinearity between its factors, and so no matrix W to export")


def method(optimizer: str = "adamw", init: str = "normal", activation: str = "silu") -> Method:
    """optimizer: adamw, CoLA's own, or spectron or equilibrated. ValueError for another value."""
    for name, value, allowed in (("optimizer", optimizer, ("adamw", "spectron", "equilibrated")),
                                 ("init", init, ("normal", "spectral")),
                                 ("activation", activation, tuple(ACTIVATIONS))):
        if value not in allowed:
            raise ValueError(f"{name}={value}, expected {' or '.join(f'{name}={x}' for x in allowed)}")
    core = find_method(optimizer, {})
    own = dict(lr=3e-3, nano_lr=2e-3) if optimizer == "adamw" else {}  # CoLA: 6e-3 at 60M
    return replace(core, linear=partial(CoLALinear, init=init, activation=activation), **own)
