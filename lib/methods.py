"""What a method is: how W is stored and how it moves. Those of baselines/ are found here by their names."""

import difflib
import importlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import torch
from torch import nn

from lib.cli import UserError
from model import ALIASES, NANO_SIZES, SIZES, FactorizedLinear, Llama, LlamaConfig

# The flags of train.py that not every method has
LOW_RANK_FLAGS, MUON_FLAGS = ("rank_ratio", "factorize"), ("momentum", "nesterov", "ns_steps")
SPECTRON_FLAGS = "orthogonalize", "renormalize", "power_steps", "shape_scale", "muon_lr"
ADAM_LR = 3e-3  # of embedding, head and norms at the paper's sizes
ALSO_KNOWN = {"muon": "Muon on dense weights is --method dense, and Muon on the factors --no-renormalize. ",
              "sgd": "SGD on the factors is --no-orthogonalize --no-renormalize. "}


def flops_per_token(model: Llama) -> int:
    """Executed matmul FLOPs of one token, forward and backward: 6 for each weight but the embedding's, and
    causal attention, which is half of the T x T scores: 6 * n_layers * T * D."""
    weights = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    return 6 * weights + 6 * model.config.n_layers * model.config.seq_len * model.config.dim


@dataclass(frozen=True)
class Tuned:
    """The learning rates that were the best at nano for a method with certain flags."""
    name: str  # what the method is with them
    flags: dict  # flag of train.py: its value; {} where the arguments of the method decide
    table: str  # results/<table>/nano/table.md has the learning rates that were tried
    nano_lr: float
    nano_adam_lr: float | None = None  # None: the method's own


@dataclass(kw_only=True)
class Method:
    """What --method names. Four are in train.METHODS; any other is a file in baselines/ with a function
    method(**method_args) that returns one of these."""
    optimizers: Callable  # (model, c) -> a list of optimizers that together hold every parameter once
    lr: float  # of the block matrices, at the paper's sizes
    nano_lr: float  # the best of results/rivals/nano/table.md
    nano_adam_lr: float = 3e-3  # of embedding, head and norms, the best of results/adam_lr/nano/table.md
    tuned: tuple = ()  # of Tuned, where other flags have another best: the first that fits the run
    flags: tuple = ()  # of train.py, that apply to this method and not to all
    ignores: tuple = ()  # flags that apply to all others
    dense: bool = False  # nn.Linear in place of `linear`
    linear: Callable = FactorizedLinear  # (in_features, out_features, rank) -> a layer with A and B
    before_step: Callable | None = None  # (model, optimizers, c, step) -> True if parameters came or went
    flops_per_token: Callable = flops_per_token  # (model) -> FLOPs that this step executes
    compiles: bool = True  # the forward pass is the same in every step
    bounded: Callable = lambda c: False  # (c) -> whether lr bounds the spectral norm of a step of W = A B^T
    logged: Callable = lambda model: {}  # further values for the log

    def tuned_for(self, c) -> Tuned | None:
        """What was tuned for flags that this run has; None for the method as it is."""
        return next((tuned for tuned in self.tuned
                     if all(getattr(c, flag) == value for flag, value in tuned.flags.items())), None)

    def learning_rates(self, size: str, tuned: Tuned | None = None) -> dict[str, float]:
        """The defaults of lr and adam_lr, for the method as it is or as it was tuned. At the paper's sizes
        nothing was tuned: there the ratio of the two is that of nano."""
        lr, adam_lr = self.nano_lr, self.nano_adam_lr
        if tuned:
            lr, adam_lr = tuned.nano_lr, tuned.nano_adam_lr or adam_lr
        if size not in NANO_SIZES:
            lr, adam_lr = lr * self.lr / self.nano_lr, adam_lr * ADAM_LR / self.nano_adam_lr
        return {"lr": float(f"{lr:.3g}"), "adam_lr": float(f"{adam_lr:.3g}")}


def count_parameters(config: LlamaConfig) -> int:
    """Parameters of a model, embedding and head included, without making it."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


def paper_steps(size: str, dense: bool) -> int:
    """Steps of 2^20 tokens: the factorized model sees 20 per parameter of its nominal dense size, the dense
    model 20 per parameter of its factorized twin (at 32,000 tokens of vocabulary), so that both cost 6 N D
    FLOPs. It gives all six step counts of Appendix E.3."""
    nominal = ALIASES.get(size, size)  # 134M
    if dense:
        parameters = count_parameters(replace(SIZES[size], vocab_size=32000))
    else:
        parameters = float(nominal[:-1]) * {"M": 1e6, "B": 1e9}[nominal[-1]]
    return math.ceil(20 * parameters / 2**20)


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


def baseline(name: str, args: dict, core=()) -> Method:
    """The Method that the function method() of baselines/NAME.py makes from these arguments. `core` are the
    names of other methods, for the message where there is no such file."""
    module, folder = name.replace("-", "_"), Path(__file__).parent.parent / "baselines"
    try:
        return importlib.import_module(f"baselines.{module}").method(**args)
    except ModuleNotFoundError as error:
        if error.name not in ("baselines", f"baselines.{module}"):
            raise UserError(f"--method {name}: {error}, for its function method()") from None
        there = sorted(path.stem.replace("_", "-") for path in folder.glob("*.py"))
        near = difflib.get_close_matches(name, [*core, *there], 1, 0.5)
        meant = ALSO_KNOWN.get(name) or (f"Did you mean --method {near[0]}? " if near else "")
        raise UserError(f"--method {name}: no such method. {meant}There are {', '.join(core)}, and in "
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
