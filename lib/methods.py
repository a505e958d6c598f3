"""What a method is: how W is stored and how it moves. Those of baselines/ are found here by their names."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import nn

from lib.cli import UserError
from model import FactorizedLinear, Llama, LlamaConfig
from spectron import newton_schulz

LOW_RANK_FLAGS, MUON_FLAGS = ("rank_ratio", "factorize"), ("momentum", "nesterov", "ns_steps")


def flops_per_token(model: Llama) -> int:
    """Executed matmul FLOPs of one token, forward and backward: 6 for each weight but the embedding's, and
    causal attention, which is half of the T x T scores: 6 * n_layers * T * D."""
    weights = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    return 6 * weights + 6 * model.config.n_layers * model.config.seq_len * model.config.dim


@dataclass
class Method:
    """What --method names. Four are in train.METHODS; any other is a file in baselines/ with a function
    method(**method_args) that returns one of these."""
    optimizers: Callable  # (model, c) -> a list of optimizers that together hold every parameter once
    lr: float  # of the block matrices, at the paper's sizes
    nano_lr: float  # the best of results/rivals/nano/table.md
    flags: tuple = ()  # of train.py, that apply to this method and not to all
    ignores: tuple = ()  # flags that apply to all others
    dense: bool = False  # nn.Linear in place of `linear`
    linear: Callable = FactorizedLinear  # (in_features, out_features, rank) -> a layer with A and B
    before_step: Callable | None = None  # (model, optimizers, c, step) -> True if parameters came or went
    flops_per_token: Callable = flops_per_token  # (model) -> FLOPs that this step executes
    compiles: bool = True  # the forward pass is the same in every step
    logged: Callable = lambda model: {}  # further values for the log
    nano_adam_lr: float = 3e-3  # of embedding, head and norms, the best of results/adam_lr/nano/table.md


def count_parameters(config: LlamaConfig) -> int:
    """Parameters of a model, embedding and head included, without making it."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


def block_matrices(model: Llama) -> dict[str, nn.Module]:
    """The seven linear layers of each block, factorized or dense, under their names in the model."""
    return {name: layer for name, layer in model.named_modules()
            if name.startswith("blocks.") and isinstance(layer, (nn.Linear, FactorizedLinear))}


def split_parameters(model: Llama):
    """(factor pairs, dense matrices of the blocks, all others: embedding, head and norms)."""
    pairs = model.factor_pairs()
    dense = [layer.weight for layer in block_matrices(model).values() if isinstance(layer, nn.Linear)]
    taken = {id(p) for p in [*dense, *(p for pair in pairs for p in pair)]}
    return pairs, dense, [p for p in model.parameters() if id(p) not in taken]


def adamw(params, lr, c, entries=()):
    """AdamW for these parameters. Matrices are decayed, and so are `entries` of a matrix that are kept as a
    vector; the gains of the norms are not."""
    kept = {id(p) for p in entries}
    groups = [dict(params=[p for p in params if p.ndim > 1 or id(p) in kept], weight_decay=c.weight_decay),
              dict(params=[p for p in params if p.ndim < 2 and id(p) not in kept], weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95),
                             fused=params[0].device.type in ("cpu", "cuda") or None)


class Muon(torch.optim.Optimizer):
    """Muon for dense matrices, with the steps of torch.optim.Muon. That one always multiplies in bfloat16: on
    a CPU without bfloat16 hardware it is 28 times slower."""

    def __init__(self, params, ns_dtype=None, **settings):
        super().__init__(params, settings)
        self.ns_dtype = ns_dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                M = self.state[p]["momentum_buffer"]
                M.lerp_(p.grad, 1 - group["momentum"])
                D = p.grad.lerp(M, group["momentum"]) if group["nesterov"] else M
                O = newton_schulz(D.to(self.ns_dtype or D.dtype), group["ns_steps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(O, alpha=-group["lr"] * max(1, p.size(0) / p.size(1)) ** 0.5)


def muon(params, lr, c):
    return Muon(params, torch.bfloat16 if c.dtype == "bfloat16" else None, lr=lr, momentum=c.momentum,
                nesterov=c.nesterov, ns_steps=c.ns_steps, weight_decay=c.weight_decay)


def baseline(name: str, args: dict):
    """The Method that the function method() of baselines/NAME.py makes from these arguments."""
    module, folder = name.replace("-", "_"), Path(__file__).parent.parent / "baselines"
    try:
        return importlib.import_module(f"baselines.{module}").method(**args)
    except ModuleNotFoundError as error:
        if error.name not in ("baselines", f"baselines.{module}"):
            raise UserError(f"--method {name}: {error}, for its function method()") from None
        there = sorted(path.stem.replace("_", "-") for path in folder.glob("*.py"))
        raise UserError(f"--method {name}: no such method. There are those of train.py --help, and in "
                        f"baselines/ {', '.join(there)}. For one of your own make baselines/{module}.py "
                        "with a function method()") from None
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"--method {name}: {error}. It has to be a method of train.py --help, or the file "
                        f"baselines/{module}.py with a function method(), whose arguments are "
                        "--method_args") from None


def assert_assigned(model, optimizers) -> None:
    """Every parameter belongs to exactly one optimizer."""
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    wrong = [name for name, p in model.named_parameters() if held.count(id(p)) != 1]
    assert not wrong and len(held) == len(list(model.parameters())), f"not in exactly one optimizer: {wrong}"
