"""How W is stored and how it is updated: the table behind --method, and what baselines/ adds to it."""

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, get_args

import torch

from cli import UserError
from model import FactorizedLinear, split_parameters
from spectron import Spectron

BASELINES = Path(__file__).parent / "baselines"
MUON_FLAGS = "momentum", "nesterov", "ns_steps"
LOW_RANK_FLAGS = "rank_ratio", "factorize"
SPECTRON_FLAGS = "orthogonalize", "renormalize", "power_steps", "shape_scale", "muon_lr"


@dataclass
class Method:
    """A Linear class and an optimizer builder, and what follows from them."""
    optimizers: Callable  # (model, settings) -> a list that together holds every parameter once
    lr: float  # of the block matrices, at the paper's sizes
    nano_lr: float  # the best of results/fig12/nano/table.md
    flags: tuple = ()  # what can be set for this method and not for all
    dense: bool = False  # nn.Linear in place of `linear`
    linear: Callable = FactorizedLinear  # (in_features, out_features, rank) -> a layer with A and B
    # (model, optimizers, settings, step) before each step; True where parameters have left the model
    before_step: Callable | None = None
    compiles: bool = True  # the forward pass is the same in every step


########################################
#           Their optimizers           #
########################################

def adamw(params, lr, c):
    """AdamW for these parameters; gains are not decayed."""
    groups = [dict(params=[p for p in params if p.ndim > 1], weight_decay=c.weight_decay),
              dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95),
                             fused=params[0].device.type in ("cpu", "cuda") or None)


def muon(params, lr, c):
    return torch.optim.Muon(params, lr=lr, weight_decay=c.weight_decay, momentum=c.momentum,
                            nesterov=c.nesterov, ns_steps=c.ns_steps)


def spectron_optimizers(model, c):
    pairs, dense, others = split_parameters(model)
    spectron = Spectron(
        pairs, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay, nesterov=c.nesterov,
        shape_scale=c.shape_scale, ns_steps=c.ns_steps, power_steps=c.power_steps,
        orthogonalize=c.orthogonalize, renormalize=c.renormalize,
        ns_dtype=torch.bfloat16 if c.dtype == "bfloat16" else None)
    return [spectron, *([muon(dense, c.muon_lr, c)] if dense else []), adamw(others, c.adam_lr, c)]


def adamw_optimizers(model, c):
    pairs, dense, others = split_parameters(model)
    return [adamw([p for pair in pairs for p in pair] + dense, c.lr, c), adamw(others, c.adam_lr, c)]


def muon_optimizers(model, c):
    _, dense, others = split_parameters(model)
    return [muon(dense, c.lr, c), adamw(others, c.adam_lr, c)]


def assert_assigned(model, optimizers) -> None:
    """Every parameter belongs to exactly one optimizer."""
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    wrong = [name for name, p in model.named_parameters() if held.count(id(p)) != 1]
    assert not wrong and len(held) == len(list(model.parameters())), f"not in exactly one optimizer: {wrong}"


METHODS = {
    "spectron": Method(spectron_optimizers, 0.05, 0.1, LOW_RANK_FLAGS + MUON_FLAGS + SPECTRON_FLAGS),
    "adamw": Method(adamw_optimizers, 1e-3, 1e-3, LOW_RANK_FLAGS),
    "dense": Method(muon_optimizers, 0.02, 0.05, MUON_FLAGS, dense=True),
    "dense-adamw": Method(adamw_optimizers, 6e-4, 5e-4, dense=True),
}


########################################
#              Baselines               #
########################################

def names() -> list[str]:
    """What --method takes; baselines/self_guided.py is self-guided. None of the files is imported."""
    return [*METHODS, *sorted(path.stem.replace("_", "-") for path in BASELINES.glob("[!_]*.py"))]


def find(name: str, args: dict | None = None) -> Method:
    """The method of this name, with its own arguments: those of `method(...)` in its file in baselines/.
    UserError for an argument that it does not have."""
    build = None if name in METHODS else _builder(name)
    allowed = {} if build is None else inspect.signature(build).parameters
    for key, value in (args or {}).items():
        if key not in allowed:
            raise UserError(f"--method_args {key}={value}: --method {name} has no {key}; "
                            f"it has {', '.join(map(say, allowed.values())) or 'none'}")
        if value not in choices(allowed[key]):
            raise UserError(f"--method_args {key}={value}: expected {say(allowed[key])}")
    return METHODS[name] if build is None else build(**(args or {}))


def _builder(name: str) -> Callable:
    if name not in names():
        raise UserError(f"--method {name}: there is no {BASELINES / name.replace('-', '_')}.py; "
                        f"there is {', '.join(names())}")
    return importlib.import_module(f"baselines.{name.replace('-', '_')}").method


def choices(parameter: inspect.Parameter) -> tuple:
    """The values that an argument may have: (False, True), or those of its Literal[...]."""
    return (False, True) if parameter.annotation is bool else get_args(parameter.annotation)


def say(parameter: inspect.Parameter) -> str:
    return f"{parameter.name}={'|'.join(map(str, choices(parameter)))} ({parameter.default})"


def parse_args(pairs: list[str]) -> dict:
    """['key=value', ...] as a dict; True and False become bools."""
    unpaired = next((pair for pair in pairs if "=" not in pair), None)
    if unpaired:
        raise UserError(f"--method_args {unpaired}: expected key=value")
    read = {"true": True, "false": False}
    return {key: read.get(value.lower(), value) for key, value in (pair.split("=", 1) for pair in pairs)}
