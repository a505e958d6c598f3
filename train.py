"""Train a Llama from scratch with low-rank weights only.

    python train.py                                      nano on the offline corpus: minutes on two cores
    torchrun --nproc_per_node=8 train.py --size S        the paper's Factorized Transformer-S on FineWeb
    python train.py --no-renormalize --lr 0.02           an ablation
    python train.py --resume --out out/nano-spectron-00  go on where a run stopped

--size and --method decide every other value. Each is printed at the start and can be set by its flag.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
from data import Parser, Split, UserError, command, number, positive, rank_and_ranks
from eval import (BROKEN, baseline, choose_device, join_ranks, load_checkpoint, load_model, precision, seal,
                  validate)
from model import (ALIASES, NANO_SIZES, SIZES, FactorizedLinear, Llama, LlamaConfig, block_matrices,
                   count_parameters, split_parameters)
from spectron import Spectron, newton_schulz

WARMUP = 0.05  # of the steps
CLIP = 1.0  # on the norm of all gradients together


########################################
#  Methods: how W is stored and moved  #
########################################

@dataclass
class Method:
    """What --method names. Four are in METHODS below; any other is a file in baselines/ with a function
    method(**method_args) that returns one of these."""
    optimizers: Callable  # (model, c) -> a list of optimizers that together hold every parameter once
    lr: float  # of the block matrices, at the paper's sizes
    nano_lr: float  # the best of results/rivals/nano/table.md
    flags: tuple = ()  # of train.py, that apply to this method and not to all
    dense: bool = False  # nn.Linear in place of `linear`
    linear: Callable = FactorizedLinear  # (in_features, out_features, rank) -> a layer with A and B
    before_step: Callable | None = None  # (model, optimizers, c, step) -> True where parameters have left
    flops_per_token: Callable = Llama.flops_per_token  # (model) -> FLOPs that this step executes
    compiles: bool = True  # the forward pass is the same in every step
    logged: Callable = lambda model: {}  # what else this method has for a record of the log
    nano_adam_lr: float = 3e-3  # of embedding, head and norms, the best of results/adam_lr/nano/table.md


def adamw(params, lr, c):
    """AdamW for these parameters; the gains of the norms are not decayed."""
    groups = [dict(params=[p for p in params if p.ndim > 1], weight_decay=c.weight_decay),
              dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95),
                             fused=params[0].device.type in ("cpu", "cuda") or None)


class Muon(torch.optim.Optimizer):
    """Muon for dense matrices, as torch.optim.Muon does it. Torch's always multiplies in bfloat16: on a CPU
    without bfloat16 hardware it is 28 times slower than this."""

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


def spectron_optimizers(model, c):
    """Spectron for the factors, Muon for matrices that stay dense, AdamW for embedding, head and norms."""
    pairs, dense, others = split_parameters(model)
    spectron = Spectron(
        pairs, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay, nesterov=c.nesterov,
        shape_scale=c.shape_scale, ns_steps=c.ns_steps, power_steps=c.power_steps,
        orthogonalize=c.orthogonalize, renormalize=c.renormalize, equilibrate=c.equilibrate,
        ns_dtype=torch.bfloat16 if c.dtype == "bfloat16" else None)
    return [spectron, *([muon(dense, c.muon_lr, c)] if dense else []), adamw(others, c.adam_lr, c)]


def adamw_optimizers(model, c):
    pairs, dense, others = split_parameters(model)
    return [adamw([p for pair in pairs for p in pair] + dense, c.lr, c), adamw(others, c.adam_lr, c)]


def muon_optimizers(model, c):
    _, dense, others = split_parameters(model)
    return [muon(dense, c.lr, c), adamw(others, c.adam_lr, c)]


LOW_RANK_FLAGS, MUON_FLAGS = ("rank_ratio", "factorize"), ("momentum", "nesterov", "ns_steps")
SPECTRON_FLAGS = "orthogonalize", "renormalize", "power_steps", "shape_scale", "muon_lr", "equilibrate"
METHODS = {
    "spectron": Method(spectron_optimizers, 0.05, 0.2, LOW_RANK_FLAGS + MUON_FLAGS + SPECTRON_FLAGS),
    "adamw": Method(adamw_optimizers, 1e-3, 1e-3, LOW_RANK_FLAGS, nano_adam_lr=0.03),
    "dense": Method(muon_optimizers, 0.02, 0.05, MUON_FLAGS, dense=True),
    "dense-adamw": Method(adamw_optimizers, 6e-4, 1e-3, dense=True, nano_adam_lr=0.03),
}


def find_method(name: str, args: dict) -> Method:
    """The method of this name, with its own arguments. UserError where there is none, or it takes no such."""
    if name not in METHODS:
        return baseline(name, args)
    if args:
        raise UserError(f"--method_args are for the methods of baselines/; --method {name} takes none")
    return METHODS[name]


def assert_assigned(model, optimizers) -> None:
    """Every parameter belongs to exactly one optimizer."""
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    wrong = [name for name, p in model.named_parameters() if held.count(id(p)) != 1]
    assert not wrong and len(held) == len(list(model.parameters())), f"not in exactly one optimizer: {wrong}"


########################################
#         Flags and defaults           #
########################################

def key_and_value(text: str):
    """key=value, the value read as true, false or a number where it is one."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected key=value")
    try:
        return key, json.loads(value.lower())
    except ValueError:
        return key, value


RATES = ", ".join(f"{name} {m.lr:g} (nano {m.nano_lr:g})" for name, m in METHODS.items())
# --name: how it is read, its default, what it is. A default of None is decided by resolve(): see the help.
FLAGS = {
    # the model and the method
    "size": (list(SIZES), "nano", "the paper's sizes (S = 134M, M = 500M, L = 780M), or nano for laptops"),
    "method": (str, "spectron", f"{', '.join(METHODS)}, or a file in baselines/, such as self-guided"),
    "method_args": (key_and_value, {}, "of a method in baselines/"),
    "rank_ratio": (number(below=1.0001), 0.25, "rank over the input width of each matrix, in (0, 1]"),
    "factorize": (["all", "ffn"], "all", "which matrices of a block are low-rank"),
    # the optimizer
    "lr": (number(), None, "of the block matrices; for spectron the bound on ||dW||_2 of a step.\n"
           f"{RATES}.\nThose of the paper's sizes come from public launches, untested here"),
    "orthogonalize": (bool, True, "spectron: Newton-Schulz on each factor's momentum"),
    "renormalize": (bool, True, "spectron: divide lr by sigma_A + sigma_B + 1"),
    "adam_lr": (number(), None, "AdamW's learning rate for embedding, head and norms: 0.003; at nano 0.03\n"
                "where it trains the block matrices, too"),
    "muon_lr": (number(), 0.02, "spectron with --factorize ffn: Muon's for the dense matrices"),
    "momentum": (number(below=1), 0.95, "of spectron and Muon, in [0, 1)"),
    "nesterov": (bool, True, "Nesterov momentum; --no-nesterov is Algorithm 1 to the letter"),
    "shape_scale": (bool, False, "multiply A's update by sqrt(max(1, m / r)), as the public code does"),
    "ns_steps": (positive, 5, "Newton-Schulz iterations"),
    "power_steps": (positive, 1, "power iterations per step"),
    "equilibrate": ([0, 1, 2], 0, "even out the rows of the momentum, once or twice: ours, not the paper's"),
    "weight_decay": (number(), 0.0, "decoupled, of every matrix, times that matrix's lr"),
    # the batch and the run
    "steps": (positive, None, "optimizer steps: at the paper's sizes 20 tokens per parameter"),
    "stop_at": (positive, None, "save and end after this step, on the schedule of --steps"),
    "tokens_per_step": (number(int, 1, 2**40), 2**20, "the batch, over all ranks and micro-steps"),
    "batch_size": (positive, None, "sequences per device and micro-step: memory, never the result"),
    "seq_len": (number(int, 1, 2**20 + 1), None, "tokens per sequence: 2,048; nano 256"),
    "seed": (number(int, 0, 2**63), 0, "of the initial weights and the order of the data"),
    "data": (str, "data/fineweb", "directory of token shards"),
    "out": (str, None, "directory of the run: the next free out/<size>-<method>-NN"),
    "device": (["cuda", "cpu", "mps"], None, "the first that is there"),
    "dtype": (["bfloat16", "float32"], None, "autocast over fp32 weights: bfloat16 where hardware has it"),
    "compile": (bool, None, "torch.compile: on for CUDA from size 60M up"),
    # what is recorded
    "eval_every": (positive, None, "steps between validations: a tenth of --steps; nano a fifth"),
    "eval_tokens": (positive, 10 * 2**20, "validation tokens at most, during training"),
    "final_eval_tokens": (positive, 100_000_000, "validation tokens at most, after the last step"),
    "save_every": (positive, None, "steps between checkpoints: a tenth of --steps"),
    "keep_every": (positive, None, "steps between checkpoints that stay, as ckpt-000100.pt: none does"),
    "spectra_every": (positive, 10, "steps between logged steps, each with the norms of one matrix"),
    "spectra_of": (str, None, "that matrix, e.g. blocks.0.ffn.down_proj: o_proj of the middle block"),
    "on_nonfinite": (["stop", "record"], "stop", "on a gradient that is not finite: end with an error, or\n"
                     "record it in the log as diverged and end without one, for sweeps"),
}
# What is smaller at nano's sizes. The paper's batch is 512 sequences of 2,048 (Appendix E.3).
NANO = dict(tokens_per_step=4096, momentum=0.7, data="data/stdlib", steps=240)
MAY_CHANGE = {"batch_size", "device", "compile", "eval_every", "save_every", "keep_every", "spectra_every",
              "out", "stop_at", "on_nonfinite", "data"}  # at --resume
ACTIONS = {"resume": "go on from the checkpoint in --out; auto: or start there, where there is none yet",
           "overwrite": "start anew in an --out that has a run",
           "dry_run": "print what would be trained and what it needs, and end"}


def parse(argv) -> dict:
    """The flags that were given, and only those."""
    parser = Parser(__doc__, usage="python train.py [--flag value ...]")
    for name, (kind, default, help) in FLAGS.items():
        more = ({"choices": kind, "type": type(kind[0])} if isinstance(kind, list) else
                {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind})
        if name == "method_args":
            more |= {"nargs": "+", "metavar": "KEY=VALUE"}
        if default not in (None, {}):
            help += f" ({default}" + (f"; nano {NANO[name]})" if name in NANO else ")")
        parser.add_argument(f"--{name}", help=help, default=argparse.SUPPRESS, **more)
    for name, help in ACTIONS.items():
        more = ({"nargs": "?", "const": "last", "choices": ["last", "auto"]} if name == "resume" else
                {"action": "store_true"})
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=help, **more)
    given = vars(parser.parse_args(argv))
    for flag in "out", "data":
        if given.get(flag) == "":
            raise UserError(f"--{flag} is empty: name a directory, or leave the flag out")
    if "method" in given:
        given["method"] = given["method"].replace("_", "-")
    if "method_args" in given:
        given["method_args"] = dict(given["method_args"])
    return given


def resolve(given: dict, ranks: int = 1, saved: dict | None = None) -> SimpleNamespace:
    """Every setting of a run: the flags given, over those of the run that is resumed, or over the defaults,
    which follow from size, method and hardware. UserError where one makes no sense."""
    flags = {name: value for name, value in given.items() if name in FLAGS}
    device = given["device"] if {"dry_run", "device"} <= set(given) else choose_device(given.get("device"))
    if saved:
        check_unchanged(flags, saved)
        compiles = saved["compile"] and device == saved["device"]
        newer = {flag: default for flag, (_, default, _) in FLAGS.items() if flag not in saved}
        c = SimpleNamespace(**{**saved, **newer, "stop_at": None, "compile": compiles, **flags,
                               "device": device})
    else:
        c = SimpleNamespace(**{**defaults(flags, device), **flags})
        c.eval_every = c.eval_every or max(1, c.steps // (5 if c.size in NANO_SIZES else 10))
        c.save_every = c.save_every or max(1, c.steps // 10)
        c.tokenizer = (data.read_meta(Path(c.data))["tokenizer"] if Path(c.data).is_dir()
                       else "bytes" if c.size in NANO_SIZES else "gpt2")
        c.model = asdict(replace(SIZES[c.size], vocab_size=data.padded_vocabulary(c.tokenizer),
                                 seq_len=c.seq_len, rank_ratio=c.rank_ratio, factorize=c.factorize))
    if c.compile and not any(shutil.which(x) for x in (os.environ.get("CXX") or "g++", "clang++", "cl")):
        raise UserError("--compile needs a C++ compiler, and the path has none: install g++, or --no-compile")
    split_batch(c, "batch_size" in given, ranks)
    return c


def defaults(flags: dict, device: str) -> dict:
    """What is not given, by size, method and hardware. UserError for flags that do not go together."""
    size, name = flags.get("size", "nano"), flags.get("method", "spectron")
    method, nano = find_method(name, flags.get("method_args", {})), size in NANO_SIZES
    check_flags(flags, name, method)
    c = {flag: default for flag, (_, default, _) in FLAGS.items()} | (NANO if nano else {})
    c |= {"lr": method.nano_lr if nano else method.lr, "adam_lr": method.nano_adam_lr if nano else 3e-3,
          "seq_len": SIZES[size].seq_len, "device": device,
          "batch_size": 16 if nano or device == "cuda" else 1,
          "steps": c["steps"] or paper_steps(size, method.dense),
          "dtype": "bfloat16" if native_bf16(device) else "float32",
          "compile": device == "cuda" and not nano and method.compiles,
          "spectra_of": f"blocks.{SIZES[size].n_layers // 2}.attention.o_proj"}
    return c | ({"rank_ratio": None} if method.dense else {})


def check_flags(flags: dict, name: str, method: Method) -> None:
    """UserError for a flag that would have no effect."""
    optional = {flag for other in METHODS.values() for flag in other.flags}
    for flag in sorted(optional & set(flags) - set(method.flags)):
        raise UserError(f"--{'no-' * (flags[flag] is False)}{flag} does not apply to --method {name}; it is "
                        "a flag of --method " + " or ".join(m for m in METHODS if flag in METHODS[m].flags))
    if flags.get("compile") and not method.compiles:
        raise UserError(f"--compile does not go with --method {name}, whose forward pass changes from step "
                        "to step: leave it out")
    for flag, needs, there in (("ns_steps", "--orthogonalize", flags.get("orthogonalize", True)),
                               ("equilibrate", "--orthogonalize", flags.get("orthogonalize", True)),
                               ("power_steps", "--renormalize", flags.get("renormalize", True)),
                               ("muon_lr", "--factorize ffn", flags.get("factorize") == "ffn")):
        if flag in flags and not there:
            raise UserError(f"--{flag} has no effect without {needs}: add that, or leave --{flag} out")
    if not 0 < flags.get("rank_ratio", 1) <= 1:
        raise UserError(f"--rank_ratio {flags['rank_ratio']} has to be in (0, 1], e.g. --rank_ratio 0.25")


def check_unchanged(flags: dict, saved: dict) -> None:
    """UserError that lists the flags which would change the result of the run that is resumed."""
    changed = [f"--{key} {value} (was {saved.get(key)})" for key, value in flags.items()
               if key not in MAY_CHANGE and saved.get(key) != value]
    if changed:
        raise UserError(f"a resumed run keeps its settings, and these differ: {', '.join(changed)}. Leave "
                        "them out, or start another run without --resume. What may change: "
                        + ", ".join(sorted(MAY_CHANGE)))


def paper_steps(size: str, dense: bool) -> int:
    """Steps of 2^20 tokens: the factorized model sees 20 per parameter of its nominal dense size, the dense
    model 20 per parameter of its factorized twin (at 32,000 tokens of vocabulary), so that 6 N D is equal.
    All six of Appendix E.3."""
    nominal = ALIASES.get(size, size)
    parameters = (count_parameters(replace(SIZES[size], vocab_size=32000)) if dense
                  else float(nominal[:-1]) * {"M": 1e6, "B": 1e9}[nominal[-1]])
    return math.ceil(20 * parameters / 2**20)


def native_bf16(device: str) -> bool:
    """Whether this device multiplies bfloat16 matrices in hardware. Elsewhere torch does so too, slowly."""
    if device == "cpu":
        return any(getattr(torch.cpu, probe, lambda: False)()
                   for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported(False))


def split_batch(c, chosen: bool, ranks: int) -> None:
    """Sets micro_steps so that batch_size x seq_len x ranks x micro_steps = tokens_per_step; batch_size too
    unless the user chose it. UserError with the nearest valid value where nothing does."""
    unit = c.seq_len * ranks
    if c.tokens_per_step % unit:
        raise UserError(f"--tokens_per_step {c.tokens_per_step} is not a multiple of {unit} = "
                        f"--seq_len {c.seq_len} x {ranks} rank(s); the nearest that is: --tokens_per_step "
                        f"{max(1, round(c.tokens_per_step / unit)) * unit}")
    sequences = c.tokens_per_step // unit
    small = [d for d in range(1, math.isqrt(sequences) + 1) if sequences % d == 0]
    valid = small + [sequences // d for d in small]
    if not chosen:
        c.batch_size = max(d for d in valid if d <= c.batch_size)
    if c.batch_size not in valid:
        raise UserError(f"--batch_size {c.batch_size} does not divide the {sequences} sequences that a step "
                        f"gives each of {ranks} rank(s); the nearest that does: --batch_size "
                        f"{min(valid, key=lambda d: abs(d - c.batch_size))}")
    c.micro_steps = sequences // c.batch_size


########################################
#               One step               #
########################################

def schedule(step: int, steps: int) -> float:
    """The fraction of lr at a step (from 0): linear warm-up over 5%, then a cosine towards zero. It never is
    zero."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def backward(network, train: Split, c, step: int, device, rank: int, ranks: int) -> torch.Tensor:
    """Leaves the gradients of the mean loss over the batch of a step (from 0), averaged over the ranks.
    Returns this rank's mean loss."""
    x, y = train.batch(step, c.tokens_per_step // c.seq_len, c.seed, rank, ranks)
    if device.type == "cuda":  # from pinned memory a copy runs beside the computation
        x, y = x.pin_memory(), y.pin_memory()
    total = torch.zeros((), device=device)
    for micro, (x_micro, y_micro) in enumerate(zip(x.split(c.batch_size), y.split(c.batch_size))):
        # Gradients add up over the micro-steps. The ranks average them once, with the last one.
        reduces = ranks == 1 or micro == c.micro_steps - 1
        with nullcontext() if reduces else network.no_sync():
            with precision(device, c.dtype):
                loss = network(x_micro.to(device, non_blocking=True), y_micro.to(device, non_blocking=True))
                loss = loss / c.micro_steps
            loss.backward()
        total += loss.detach()
    return total


def read_back(model, loss: torch.Tensor, stopping: bool, ranks: int) -> tuple[float, float, bool]:
    """(norm of all gradients, mean loss over the ranks, whether any rank was told to stop). It is the one
    place of a step where the CPU waits for the device."""
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient for {missing}"
    sums = torch.stack([loss, loss.new_full((), float(stopping))])
    if ranks > 1:
        dist.all_reduce(sums)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    norm, loss, stops = torch.cat([norm.view(1), sums]).tolist()
    return norm, loss / ranks, stops > 0


class NonFinite(UserError):
    """A loss or a gradient that is not finite."""


def clip_gradients(model, norm: float, step: int, lr: float, loss: float = 0.0) -> None:
    """Scale the gradients so that their norm is at most CLIP. NonFinite, before any weight is touched, where
    the norm or the loss is not finite."""
    if not math.isfinite(norm + loss):
        name = next((n for n, p in model.named_parameters() if not p.grad.isfinite().all()), "none")
        raise NonFinite(f"non-finite gradient at step {step}, lr {lr:.3g}, loss {loss:.4g}; the first "
                        f"parameter that has one: {name}. No weight was touched, and a checkpoint that was "
                        "saved is whole. Start again with a lower --lr")
    if norm > CLIP:
        torch._foreach_mul_([p.grad for p in model.parameters()], CLIP / (norm + 1e-6))


def update(optimizers, fraction: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * fraction
        optimizer.step()
        optimizer.zero_grad()


########################################
#      The norms of one matrix         #
########################################

def spectral_norm(M) -> torch.Tensor:
    return torch.linalg.matrix_norm(M, ord=2)


def product_norm(A, B) -> torch.Tensor:
    """||A B^T||_2, exactly, from the triangles of two QRs: A (m, k), B (n, k), and never an m x n matrix."""
    R_A, R_B = (torch.linalg.qr(X, mode="r")[1] for X in (A, B))
    return spectral_norm(R_A @ R_B.T)


def finite(x) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(x) if x is not None and math.isfinite(x) else None


class Spectra:
    """The norms of one matrix over one step, for any method: what the paper's Figures 2 and 3 draw.

    probe (1, T) are fixed tokens, for dy. A dense W is followed as W I^T, so that one formula serves all.
    """

    def __init__(self, model, name: str, optimizers, probe: torch.Tensor):
        self.model, self.name, self.optimizers, self.probe = model, name, optimizers, probe

    def factors(self):
        found = self.layer.factors() if isinstance(self.layer, FactorizedLinear) else [self.layer.weight]
        A, *B = (p.detach().to("cpu" if p.device.type == "mps" else p.device, copy=True).double()
                 for p in found)  # mps has no float64
        return A, *(B or [torch.eye(A.size(1)).to(A)])

    @torch.no_grad()
    def before(self) -> None:
        """Keep the weights, and what the layer reads of the probe."""
        # Since the last step a method may have put another layer here, or other parameters.
        self.layer, inputs = block_matrices(self.model)[self.name], []
        self.old = self.factors()
        hook = self.layer.register_forward_pre_hook(lambda _, x: inputs.extend(x))
        self.model.hidden(self.probe)
        hook.remove()
        self.x = inputs[0].to(self.old[0].device).double()

    def after(self) -> dict:
        """dW and W; dy, the RMS of dW x (Eq. 9); gauge, dW over the lr of that step. sigma and rho are those
        that the optimizer used; where it has none, the exact sigma of before, and no rho."""
        (A0, B0), (A, B) = self.old, self.factors()
        dW = product_norm(torch.cat([A - A0, A], 1), torch.cat([B0, B - B0], 1))  # dA B0^T + A dB^T
        dy = self.x @ B @ A.T - self.x @ B0 @ A0.T
        sigma_A = sigma_B = rho = None
        low_rank = isinstance(self.layer, FactorizedLinear)
        weights = [self.layer.A, self.layer.B] if low_rank else [self.layer.weight]
        state, lr = next((o.state, group["lr"]) for o in self.optimizers for group in o.param_groups
                         if any(p is weights[0] for p in group["params"]))
        if low_rank:
            sigma_A, sigma_B = (state[p]["sigma"] if "sigma" in state[p] else spectral_norm(old)
                                for p, old in zip(weights, self.old))
            rho = state[weights[0]].get("rho")
        norms = {"dW": dW, "W": product_norm(A, B), "dy": dy.square().mean().sqrt(), "sigma_A": sigma_A,
                 "sigma_B": sigma_B, "rho": rho, "gauge": dW / lr}
        return {key: finite(value) for key, value in norms.items()}


########################################
#          Log and checkpoint          #
########################################

def save(path: Path, model, optimizers, c, step: int, seconds: float, flops: int) -> None:
    """The whole state of a run, with a checksum at its end. A kill at any moment leaves a whole checkpoint.
    The one before stays as ckpt.old.pt, except while this one is written: the disk never holds three."""
    old = path.with_name("ckpt.old.pt")
    old.unlink(missing_ok=True)
    with data.replacing(path, "w+b") as file:
        torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                    "step": step, "seconds": seconds, "flops": flops, "config": vars(c)}, file)
        file.write(seal(file, file.tell()))
        if path.exists():
            with suppress(OSError):  # a disk that knows no links keeps one checkpoint
                os.link(path, old)


def restore(optimizers, checkpoint: dict) -> tuple[int, float, int]:
    """(step, seconds, FLOPs) of a checkpoint, which is emptied; the optimizers get their state."""
    try:
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    except BROKEN as error:
        raise UserError("the checkpoint is damaged: its optimizers do not fit "
                        f"({type(error).__name__})") from None
    done = tuple(checkpoint[key] for key in ("step", "seconds", "flops"))
    checkpoint.clear()  # the memory
    return done


def line(record: dict, c, speed: float, mfu: float | None) -> str:
    """One logged step, in fixed width."""
    loss, val, gauge = ("      -" if record[key] is None else f"{record[key]:7.4f}"
                        for key in ("loss", "val_loss", "gauge"))
    left = round((c.steps - record["step"]) * c.tokens_per_step / speed)
    return (f"step {record['step']:>6}/{c.steps}  loss {loss}  val {val}  lr {record['lr']:.2e}  "
            f"gauge {gauge}  {speed:>9,.0f} tok/s  MFU {f'{mfu:.1%}' if mfu else 'n/a':>5}  "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")


########################################
#               The run                #
########################################

@command
def main(argv=None):
    """Look at everything that can be wrong, before anything is allocated or written; then train."""
    from tools import machine, safety
    argv = sys.argv[1:] if argv is None else argv
    given = parse(argv)
    rank, ranks = rank_and_ranks()
    checkpoint, overwrite, auto = None, "overwrite" in given, given.get("resume") == "auto"
    if "resume" in given:
        if "out" not in given or overwrite:
            raise UserError("--resume goes on with a run, and needs its directory: --resume --out out/<run>, "
                            "without --overwrite")
        if not auto or os.path.lexists(Path(given["out"]) / "ckpt.pt"):
            if not Path(given["out"]).is_dir():
                raise UserError(f"--out {given['out']}: no such directory. Runs are in out/; make one with: "
                                "python train.py")
            checkpoint = load_checkpoint(given["out"])
    c = resolve(given, ranks, checkpoint and checkpoint["config"])
    stop = min(c.steps, c.stop_at or c.steps)
    if checkpoint and checkpoint["step"] >= stop:
        done = (f"{given['out']} has come to step {checkpoint['step']} of {c.steps}: nothing is left "
                f"to do up to step {stop}. Its scores: python eval.py {shlex.quote(given['out'])}")
        if auto:
            return print(done) if rank == 0 else None
        raise UserError(done)
    method = find_method(c.method, c.method_args)
    with torch.device("meta"):  # shapes without memory
        blank = Llama(LlamaConfig(**c.model), method.linear)
    if c.spectra_of not in block_matrices(blank):
        raise UserError(f"--spectra_of {c.spectra_of}: no such matrix; there are "
                        f"{', '.join(block_matrices(blank))}")
    if given.get("dry_run"):
        from tools import plan
        return print(plan.describe(c, blank, method.flops_per_token(blank), ranks)) if rank == 0 else None
    if checkpoint is None:
        safety.check_directory(c, overwrite, auto)

    device = join_ranks(c.device)
    corpus = open_corpus(c, rank)
    first = {"argv": argv, "ranks": ranks, **machine.provenance()}  # of the log: how to make it again
    step = checkpoint["step"] if checkpoint else 0
    opened = safety.run_directory(c, overwrite, auto, step, first) if rank == 0 else nullcontext()
    with safety.signals_caught() as caught, opened as log:
        run(c, corpus, checkpoint, stop, caught, log, device, rank, ranks)
    if ranks > 1:
        dist.destroy_process_group()
    if signal.SIGINT in caught:
        raise SystemExit(130)


def open_corpus(c, rank: int):
    """(train, validation, tokenizer or None). It builds the offline corpus where that is what is missing."""
    if c.data == NANO["data"] and not Path(c.data).is_dir() and rank == 0:
        from tools import prepare
        print(f"building the offline corpus in {c.data}", flush=True)
        try:
            prepare.build_stdlib(c.data)
        except (UserError, OSError):
            if not Path(c.data).is_dir():  # otherwise another run has built it meanwhile
                raise
    if dist.is_initialized():
        dist.barrier()
    train, val = (data.open_split(c.data, split, c.seq_len, c.tokenizer) for split in ("train", "val"))
    found = {"train": train.tokens, "val": val.tokens}
    if vars(c).setdefault("data_tokens", found) != found:
        raise UserError(f"{c.data} holds {found} tokens, and this run was trained on {c.data_tokens}: "
                        "put those shards back, or name where they are now with --data")
    try:
        return train, val, data.get_tokenizer(c.tokenizer)
    except UserError as error:  # training needs none, so a machine without a network can go on
        if rank == 0:
            print(f"there will be no bits per byte and no sample: {error}")
        return train, val, None


def wrapped(model, c, ranks: int):
    """The model as training calls it: compiled where that is on, averaging gradients over the ranks."""
    network = torch.compile(model) if c.compile else model
    if ranks > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
        network.broadcast_buffers = False  # the RoPE table is the same on every rank already
    return network


def run(c, corpus, checkpoint, stop: int, caught, log, device, rank: int, ranks: int) -> None:
    """Train from the checkpoint, or from the start, to step `stop`, or until a signal fills `caught`.
    log(record) appends to the run's log."""
    from tools import machine, plan, report, safety
    train, val, tokenizer = corpus
    method = find_method(c.method, c.method_args)
    # The seed decides the weights. They are made on the device, where the SVDs of a large model are fast.
    torch.manual_seed(c.seed)
    if checkpoint:
        model = load_model(checkpoint, device)
    else:
        with torch.device(device):
            model = Llama(LlamaConfig(**c.model), method.linear)
        model.to(device)  # the RoPE table too
    optimizers = method.optimizers(model, c)
    assert_assigned(model, optimizers)
    step, seconds, flops = restore(optimizers, checkpoint) if checkpoint else (0, 0.0, 0)
    # `network` is for training alone. Validation, samples and the probe call the model as it is, so that they
    # never cause a recompilation.
    network = wrapped(model, c, ranks)
    spectra = Spectra(model, c.spectra_of, optimizers, val.read([0])[0][:, :64].to(device))
    peak = machine.peak_flops(torch.cuda.get_device_name()) if c.device == "cuda" else None
    if rank == 0:
        print(plan.describe(c, model, method.flops_per_token(model), ranks), flush=True)

    scores, diverged, last = {}, None, False
    shown = step, seconds  # the speed of the next logged step is counted from here
    while step < stop and not last:
        started, fraction = time.perf_counter(), schedule(step, c.steps)
        # A method may change the model between steps: drop a guide, cut a rank, merge and restart.
        if method.before_step and method.before_step(model, optimizers, c, step):
            network = wrapped(model, c, ranks)

        # The batch is a pure function of seed and step, so a resumed run needs nothing but the step.
        loss = backward(network, train, c, step, device, rank, ranks)
        norm, loss, told_to_stop = read_back(model, loss, bool(caught), ranks)
        try:
            clip_gradients(model, norm, step + 1, fraction * c.lr, loss)
        except NonFinite as error:
            if c.on_nonfinite == "stop":
                raise
            diverged = str(error)
            break
        step, flops = step + 1, flops + round(method.flops_per_token(model) * c.tokens_per_step)

        # All ranks agree on what happens after this step, since they have to validate together.
        last, validated = step == stop or told_to_stop, step == c.steps or step % c.eval_every == 0
        logged = rank == 0 and (last or validated or step == 1 or step % c.spectra_every == 0)
        if logged:
            spectra.before()
        # Everything above read the weights. This line is the only one that moves them.
        update(optimizers, fraction)
        if logged and c.device == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started  # what follows stands outside the clock

        # Validation is on the same fixed tokens every time; after the last step on more of them.
        scores = {}
        if validated:
            final = step == c.steps
            lengths = data.token_bytes(tokenizer) if final and tokenizer else None
            tokens = c.final_eval_tokens if final else c.eval_tokens
            scores = validate(model, val, tokens, c.batch_size, c.dtype, lengths)
        if logged:
            speed = (step - shown[0]) * c.tokens_per_step / (seconds - shown[1])
            shown = step, seconds
            record = {"step": step, "tokens": step * c.tokens_per_step, "flops": flops,
                      "seconds": round(seconds, 3), "loss": finite(loss), "val_loss": scores.get("val_loss"),
                      "lr": fraction * c.lr, **spectra.after(), **method.logged(model)}
            log(record)
            print(line(record, c, speed, peak and method.flops_per_token(model) * speed / peak / ranks),
                  flush=True)
        # A checkpoint is the whole state, and replaces the one before it in a single rename.
        kept = c.keep_every and step % c.keep_every == 0
        if rank == 0 and (last or kept or step % c.save_every == 0):
            save(Path(c.out) / "ckpt.pt", model, optimizers, c, step, seconds, flops)
            if kept:
                safety.keep(Path(c.out) / "ckpt.pt", step)

    if rank == 0:
        if diverged:
            log({"step": step + 1, "diverged": diverged})
            scores = {"diverged": diverged}
        report.end_of_run(model, tokenizer, Path(c.out), c, step, seconds, scores)


if __name__ == "__main__":
    sys.modules["train"] = sys.modules["__main__"]  # baselines and tools then import this module, not a copy
    main()
