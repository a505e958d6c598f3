"""Train a Llama, from scratch, with low-rank weights only.

    python train.py                                               nano on the offline corpus: two cores, three minutes
    torchrun --nproc_per_node=8 train.py --size S                 the paper's Factorized Transformer-S on FineWeb
    python train.py --no-renormalize --lr 0.02                    an ablation
    python train.py --resume --out out/nano-spectron-00           go on where a run stopped

--size and --method decide every other value; each is printed at the start and can be set by its flag. lr values other
than nano's come from public launches and the field's practice, and were not tried here.
"""

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cli
import data
import plot
import sample
from cli import UserError
from eval import load_checkpoint, precision, validate
from model import ALIASES, SIZES, FactorizedLinear, Llama, LlamaConfig, count_parameters, rank_of
from spectron import Spectron, spectral_norm

########################################
#               Methods                #
########################################


@dataclass
class Method:
    """How W is stored and how it is updated."""
    dense: bool
    optimizers: Callable  # (model, config) -> the optimizers, which together hold every parameter once
    lr: float  # of the block matrices, at the paper's sizes
    nano_lr: float
    flags: tuple = ()  # what else can be set


def _adamw(params, lr, c):
    """AdamW for these parameters; gains and biases are not decayed."""
    groups = [dict(params=[p for p in params if p.ndim > 1], weight_decay=c.weight_decay),
              dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95))


def _muon(params, lr, c):
    return torch.optim.Muon(params, lr=lr, weight_decay=c.weight_decay, momentum=c.momentum, nesterov=c.nesterov,
                            ns_steps=c.ns_steps)


def split_parameters(model: Llama):
    """(factor pairs, dense matrices of the blocks, everything else: embedding, head, norms)."""
    pairs = model.factor_pairs()
    dense = [layer.weight for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    taken = {id(p) for p in dense} | {id(p) for pair in pairs for p in pair}
    return pairs, dense, [p for p in model.parameters() if id(p) not in taken]


def spectron_optimizers(model, c):
    pairs, dense, others = split_parameters(model)
    ns_dtype = torch.bfloat16 if c.dtype == "bfloat16" else None
    spectron = Spectron(pairs, c.lr, c.momentum, c.weight_decay, c.nesterov, c.shape_scale, c.ns_steps, c.power_steps,
                        ns_dtype, c.orthogonalize, c.renormalize)
    return [spectron, *([_muon(dense, c.muon_lr, c)] if dense else []), _adamw(others, c.adam_lr, c)]


def adamw_optimizers(model, c):
    pairs, dense, others = split_parameters(model)
    return [_adamw([p for pair in pairs for p in pair] + dense, c.lr, c), _adamw(others, c.adam_lr, c)]


def muon_optimizers(model, c):
    _, dense, others = split_parameters(model)
    return [_muon(dense, c.lr, c), _adamw(others, c.adam_lr, c)]


MUON_FLAGS = "momentum", "nesterov", "ns_steps"
LOW_RANK_FLAGS = "rank_ratio", "factorize"
METHODS = {
    "spectron": Method(False, spectron_optimizers, lr=0.05, nano_lr=0.1, flags=(
        *LOW_RANK_FLAGS, *MUON_FLAGS, "orthogonalize", "renormalize", "power_steps", "shape_scale", "muon_lr")),
    "adamw": Method(False, adamw_optimizers, lr=1e-3, nano_lr=1e-3, flags=LOW_RANK_FLAGS),
    "dense": Method(True, muon_optimizers, lr=0.02, nano_lr=0.02, flags=MUON_FLAGS),
    "dense-adamw": Method(True, adamw_optimizers, lr=6e-4, nano_lr=3e-3),
}
# The best lr of each corner at nano, (orthogonalize, renormalize) -> lr: results/nano/table.md
NANO_CORNERS = {(True, True): 0.1, (True, False): 0.02, (False, True): 0.1, (False, False): 10.0}


########################################
#               Settings               #
########################################

# What --size decides besides the architecture. The paper's sizes: 512 sequences of 2,048 tokens (Appendix E.3).
PAPER = dict(tokens_per_step=2**20, momentum=0.95, adam_lr=3e-3, data="data/fineweb")
NANO = dict(tokens_per_step=4096, momentum=0.9, adam_lr=3e-3, data="data/stdlib", steps=600)
COMMON = dict(weight_decay=0.0, seed=0, factorize="all", orthogonalize=True, renormalize=True, ns_steps=5, power_steps=1,
              nesterov=True, shape_scale=False, muon_lr=0.02, eval_tokens=10 * 2**20, spectra_every=10, stop_at=None)
MAY_CHANGE = {"batch_size", "device", "compile", "eval_every", "save_every", "spectra_every", "out", "stop_at"}  # at --resume
FINAL_EVAL_TOKENS = 100_000_000
WARMUP = 0.05  # of the steps
CLIP = 1.0  # on the norm of all gradients together
PEAK_BF16_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
                   "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def parse(argv) -> dict:
    """The flags that were given, and only those."""
    parser = cli.Parser(__doc__)
    no = argparse.SUPPRESS

    def add(name, help, type=None, **more):
        parser.add_argument(f"--{name}", help=help, default=no, **({"type": type} if type else {}), **more)

    def toggle(name, help):
        add(name, help, action=argparse.BooleanOptionalAction)

    add("size", f"{', '.join(name for name in SIZES if name not in ALIASES)}; "
        + ", ".join(f"{a} = {n}" for a, n in ALIASES.items()) + " (nano)", choices=list(SIZES), metavar="SIZE")
    add("method", f"{', '.join(METHODS)} (spectron)", choices=list(METHODS), metavar="METHOD")
    toggle("orthogonalize", "spectron: Newton-Schulz on each factor's momentum (on)")
    toggle("renormalize", "spectron: divide lr by sigma_A + sigma_B + 1 (on)")
    add("rank_ratio", "rank over the input width of each matrix, in (0, 1] (0.25)", float)
    add("factorize", "which matrices of a block are low-rank: all, or ffn (all)", choices=["all", "ffn"])
    add("lr", "learning rate of the block matrices. spectron: the bound on ||dW||_2 of a step (0.05; nano 0.1);\n"
        "adamw 1e-3, dense 0.02, dense-adamw 6e-4 (nano 3e-3). Untested at the paper's sizes", float)
    add("adam_lr", "AdamW's learning rate for embedding, head and norms (3e-3, untested at the paper's sizes)", float)
    add("muon_lr", "spectron with --factorize ffn: Muon's learning rate for the dense matrices (0.02, untested)", float)
    add("momentum", "of spectron and Muon, in [0, 1) (0.95; nano 0.9)", float)
    toggle("nesterov", "Nesterov momentum; --no-nesterov is Algorithm 1 to the letter (on)")
    toggle("shape_scale", "multiply A's update by sqrt(max(1, m / r)), as the public code does (off)")
    add("ns_steps", "Newton-Schulz iterations (5)", int)
    add("power_steps", "power iterations per step (1)", int)
    add("weight_decay", "decoupled, of every matrix, times that matrix's lr (0)", float)
    add("steps", "optimizer steps (from the size, and from whether W is dense)", int)
    add("stop_at", "save and end after this step, on the schedule of --steps", int)
    add("tokens_per_step", "the batch, in tokens, over all ranks and micro-steps (1,048,576; nano 4,096)", int)
    add("batch_size", "sequences per device and micro-step: memory, never the result", int)
    add("seq_len", "tokens per sequence (2,048; nano 256)", int)
    add("seed", "of the initial weights and the order of the data (0)", int)
    add("device", "cuda, cpu or mps (the first that is there; mps is untested)", choices=["cuda", "cpu", "mps"])
    add("dtype", "bfloat16 (autocast over fp32 weights) or float32 (bfloat16 where the hardware has it)",
        choices=["bfloat16", "float32"])
    toggle("compile", "torch.compile (on for CUDA from size 60M)")
    add("out", "directory of the run (the next free out/<size>-<method>-NN)")
    add("data", "directory of token shards (data/fineweb; nano data/stdlib, built where it is missing)")
    add("eval_every", "steps between validations (a tenth of --steps)", int)
    add("eval_tokens", "validation tokens during training (10,485,760); at the end it is up to 100,000,000", int)
    add("save_every", "steps between checkpoints (a tenth of --steps)", int)
    add("spectra_every", "steps between logged steps, each with the norms of one matrix (10)", int)
    add("spectra_of", "that matrix (attention.o_proj of the middle layer), e.g. blocks.0.ffn.down_proj")
    add("resume", "go on from the checkpoint in --out", action="store_true")
    add("overwrite", "start anew in an --out that has a run", action="store_true")
    add("dry_run", "print what would be trained and what it needs, and end", action="store_true")
    return vars(parser.parse_args(argv))


def resolve(given: dict, ranks: int, saved: dict | None = None) -> SimpleNamespace:
    """Every setting of a run: the flags given, over those of the run that is resumed, or over the defaults, which follow
    from size, method and hardware. UserError where one makes no sense."""
    size, name = given.get("size", "nano"), given.get("method", "spectron")
    device = given.get("device") or next(d for d in ("cuda", "mps", "cpu") if available(d))
    check_flags(given, saved["method"] if saved else name, device)
    flags = dict.fromkeys(("resume", "overwrite", "dry_run"), False)
    c = SimpleNamespace(**{**(saved or defaults(size, name, device)), **flags, **given, "device": device})
    if saved is None:
        try:
            rank_of(c.rank_ratio or 1.0, 1, 1)
        except ValueError as error:
            raise UserError(f"--{error}. Example: --rank_ratio 0.25") from None
        c.tokenizer = data.read_meta(Path(c.data))["tokenizer"] if Path(c.data).is_dir() else default_tokenizer(c)
        c.model = asdict(replace(SIZES[size], vocab_size=data.padded_vocab(c.tokenizer), seq_len=c.seq_len,
                                 rank_ratio=c.rank_ratio, factorize=c.factorize))
        c.eval_every = given.get("eval_every", max(1, c.steps // 10))
        c.save_every = given.get("save_every", max(1, c.steps // 10))
    resolve_batch(c, given, ranks)
    return c


def defaults(size: str, name: str, device: str) -> dict:
    method, nano = METHODS[name], size == "nano"
    return {"size": size, "method": name, "lr": method.nano_lr if nano else method.lr, "seq_len": SIZES[size].seq_len,
            "steps": NANO["steps"] if nano else paper_steps(size, method.dense), **COMMON, **(NANO if nano else PAPER),
            "rank_ratio": None if method.dense else 0.25, "out": None,
            "batch_size": 16 if nano or device == "cuda" else 1,
            "dtype": "bfloat16" if native_bf16(device) else "float32", "compile": device == "cuda" and not nano,
            "spectra_of": f"blocks.{SIZES[size].n_layers // 2}.attention.o_proj"}


def default_tokenizer(c) -> str:
    return "bytes" if c.size == "nano" else "gpt2"


def resolve_batch(c, given: dict, ranks: int) -> None:
    """tokens_per_step = batch_size x seq_len x ranks x micro_steps. UserError with the nearest valid value."""
    unit = c.seq_len * ranks
    if c.tokens_per_step % unit:
        raise UserError(f"--tokens_per_step {c.tokens_per_step} is not a multiple of {unit} = --seq_len {c.seq_len} x "
                        f"{ranks} rank(s); the nearest that is: --tokens_per_step "
                        f"{max(1, round(c.tokens_per_step / unit)) * unit}")
    sequences = c.tokens_per_step // unit
    valid = [d for d in range(1, sequences + 1) if sequences % d == 0]
    if "batch_size" not in given:
        c.batch_size = max(d for d in valid if d <= c.batch_size)
    if c.batch_size not in valid:
        raise UserError(f"--batch_size {c.batch_size} does not divide the {sequences} sequences that a step gives each of "
                        f"{ranks} rank(s); the nearest that does: --batch_size "
                        f"{min(valid, key=lambda d: abs(d - c.batch_size))}")
    c.micro_steps = sequences // c.batch_size


def check_resume(given: dict, saved: dict) -> None:
    """UserError that lists the flags given which would change the result of the run that is resumed."""
    changed = [f"--{key} {value} (was {saved.get(key)})" for key, value in given.items()
               if key not in MAY_CHANGE | {"resume"} and saved.get(key) != value]
    if changed:
        raise UserError("a resumed run keeps its settings, and these differ: " + ", ".join(changed) + ". Leave them out, "
                        "or start another run without --resume. Only these may change: " + ", ".join(sorted(MAY_CHANGE)))


def check_flags(given: dict, name: str, device: str) -> None:
    """UserError for a flag that the method does not have, for a number out of range, for hardware that is not there."""
    optional = {flag for other in METHODS.values() for flag in other.flags}
    for flag in sorted(optional & set(given) - set(METHODS[name].flags)):
        has = ", ".join(other for other in METHODS if flag in METHODS[other].flags)
        raise UserError(f"{flag!r} does not apply to --method {name}; it is a setting of: {has}")
    if "muon_lr" in given and given.get("factorize") != "ffn":
        raise UserError("--muon_lr is for the dense matrices that --factorize ffn leaves; add that, or drop it")
    for flag in ("steps", "tokens_per_step", "batch_size", "seq_len", "ns_steps", "power_steps", "eval_every",
                 "eval_tokens", "save_every", "spectra_every", "stop_at"):
        if given.get(flag, 1) < 1:
            raise UserError(f"--{flag} is {given[flag]}, and has to be at least 1")
    for flag in "lr", "adam_lr", "muon_lr", "weight_decay":
        if not 0 <= given.get(flag, 0) < math.inf:
            raise UserError(f"--{flag} is {given[flag]}, and has to be a number of at least 0")
    if not 0 <= given.get("momentum", 0) < 1:
        raise UserError(f"--momentum is {given['momentum']}, and has to be in [0, 1)")
    if not available(device):
        raise UserError(f"--device {device}: torch {torch.__version__} finds no such device here; "
                        f"available: {', '.join(d for d in ('cuda', 'mps', 'cpu') if available(d))}")


def available(device: str) -> bool:
    return {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}[device]()


def native_bf16(device: str) -> bool:
    """Whether this device multiplies bfloat16 matrices in hardware; torch runs them everywhere, but slowly."""
    if device == "cpu":
        return any(getattr(torch.cpu, probe, lambda: False)()
                   for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def paper_steps(size: str, dense: bool) -> int:
    """Steps of 2^20 tokens: the factorized model sees 20 per parameter of its nominal dense size, the dense model 20 per
    parameter of its factorized twin (at 32,000 tokens of vocabulary), which makes 6 N D equal. All six of Appendix E.3."""
    nominal = ALIASES.get(size, size)
    parameters = (count_parameters(replace(SIZES[size], vocab_size=32000)) if dense
                  else float(nominal[:-1]) * {"M": 1e6, "B": 1e9}[nominal[-1]])
    return math.ceil(20 * parameters / 2**20)


########################################
#             One run                  #
########################################

def schedule(step: int, steps: int) -> float:
    """The fraction of lr at a step (from 0): linear warm-up over 5%, then cosine towards zero; never zero itself."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def product_norm(A, B) -> float:
    """||A B^T||_2, exactly, from the triangles of two QRs in float64: A (m, k), B (n, k), and never an m x n matrix."""
    R_A, R_B = (torch.linalg.qr(_float64(X), mode="r")[1] for X in (A, B))
    return spectral_norm(R_A @ R_B.T).item()


def _float64(x):
    return x.cpu().double() if x.device.type == "mps" else x.double()


class Spectra:
    """The norms of one matrix over one step, for any method: what the paper's Figures 2 and 3 draw."""

    def __init__(self, model, name: str):
        layers = {f"blocks.{n}": list(layer.parameters()) for n, layer in model.blocks.named_modules()
                  if isinstance(layer, (nn.Linear, FactorizedLinear))}
        if name not in layers:
            raise UserError(f"--spectra_of {name}: no such matrix; there are {', '.join(layers)}")
        self.weights = layers[name]  # [A, B] or [W], which the optimizer changes in place

    def before(self):
        self.old = [p.detach().clone() for p in self.weights]

    @torch.no_grad()
    def after(self, lr: float, state: dict) -> dict:
        """The norms of the step since before(): sigma and rho as the optimizer's state has them, else sigma exactly and no
        rho; gauge = ||dW||_2 / lr."""
        if len(self.weights) == 1:
            W, W0 = self.weights[0], self.old[0]
            norms = {"dW": spectral_norm(_float64(W) - _float64(W0)), "W": spectral_norm(_float64(W))}
        else:
            (A, B), (A0, B0) = map(_float64, self.weights), map(_float64, self.old)
            of_A, of_B = (state.get(p, {}) for p in self.weights)
            norms = {"dW": product_norm(torch.cat([A - A0, A], 1), torch.cat([B0, B - B0], 1)), "W": product_norm(A, B),
                     "sigma_A": of_A["sigma"] if "sigma" in of_A else spectral_norm(A0),
                     "sigma_B": of_B["sigma"] if "sigma" in of_B else spectral_norm(B0), "rho": of_A.get("rho")}
        norms["gauge"] = norms["dW"] / lr
        return {key: finite(norms.get(key)) for key in ("dW", "W", "sigma_A", "sigma_B", "rho", "gauge")}


def finite(x):
    """x as a float, or None where it is none or not finite: JSON has no NaN."""
    return float(x) if x is not None and math.isfinite(x) else None


def describe(c, ranks: int, model: Llama, train) -> str:
    """What will be trained, what it costs and what it needs; `train` is the training split, or None if it is not here."""
    parameters, tokens = sum(p.numel() for p in model.parameters()), c.steps * c.tokens_per_step
    dense = count_parameters(replace(model.config, rank_ratio=None))
    factors = sum(p.numel() for pair in model.factor_pairs() for p in pair)
    flops = model.flops_per_token()
    settings = {key: value for key, value in vars(c).items() if key not in ("model", "resume", "overwrite", "dry_run")}
    lines = ["settings: " + ", ".join(f"{key} {value}" for key, value in settings.items()),
             f"model: {parameters:,} parameters ({factors:,} in factors; {dense:,} if dense)",
             f"batch: {c.batch_size} sequences x {c.seq_len} tokens x {ranks} rank(s) x {c.micro_steps} micro-step(s) "
             f"= {c.tokens_per_step:,} tokens a step",
             f"tokens: {c.steps:,} steps, {tokens:,} tokens; as shards of 100M: {math.ceil(tokens / data.SHARD_TOKENS)}"]
    if train:
        epochs = tokens / (train.windows * c.seq_len)
        lines[-1] += (f"; {epochs:.2f} epochs of {c.data}" + (", so text is seen again" if epochs > 1 else ""))
    lines.append(f"FLOPs: {flops:,} a token, {flops * tokens:.3e} in all (the paper's 6 N D: {6 * parameters * tokens:.3e})")
    lines.append("memory per device: " + memory(c, model))
    if not c.compile:
        lines.append("compile: off (it is on for CUDA from size 60M up: elsewhere it takes longer than it saves)")
    if c.method == "spectron":
        best = NANO_CORNERS[c.orthogonalize, c.renormalize]
        lines.append(f"lr {c.lr}; the best measured at nano for this corner (orthogonalize {c.orthogonalize}, renormalize "
                     f"{c.renormalize}) is --lr {best}")
    return "\n".join(lines)


def memory(c, model: Llama) -> str:
    """Bytes of weights, gradients and optimizer state (exact), of activations (estimated), as text."""
    total = sum(p.numel() for p in model.parameters())
    pairs, dense, others = split_parameters(model)
    matrices = sum(p.numel() for p in dense) + sum(p.numel() for pair in pairs for p in pair)
    state = 4 * matrices * (2 if "adamw" in c.method else 1) + 8 * (total - matrices)
    ranks = sum(layer.rank for layer in model.modules() if isinstance(layer, FactorizedLinear))
    width = 2 if c.dtype == "bfloat16" else 4  # bytes; per token and block: 2 residuals, norms, q, k, v, out, the SwiGLU
    per_token = model.config.n_layers * (16 * c.model["dim"] + width * (7 * c.model["dim"] + 4 * model.config.hidden))
    per_token += width * ranks + (8 + width) * c.model["vocab_size"]  # logits, and their softmax in fp32
    parts = {"weights": 4 * total, "gradients": 4 * total, "optimizer": state,
             "activations, about": per_token * c.batch_size * c.seq_len}
    return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items()) + f"; {sum(parts.values()) / 1e9:.1f} GB"


def new_directory(c) -> Path:
    """The directory of this run, made. UserError if --out names one that has something in it."""
    if c.out is None:
        for number in range(10**6):
            path = Path(f"out/{c.size}-{c.method}-{number:02d}")
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                continue
    path = Path(c.out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not c.overwrite:
        raise UserError(f"--out {path} exists. Go on with that run: --resume; replace it: --overwrite; or name another")
    path.mkdir(parents=True, exist_ok=True)
    for name in "log.jsonl", "ckpt.pt", "loss.png":
        (path / name).unlink(missing_ok=True)
    return path


def provenance(argv, c, ranks: int) -> dict:
    """The first record of a log: how to make it again, and where it was made."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {"argv": argv, "config": vars(c), "git": git.stdout.strip() or None, "ranks": ranks,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "hardware": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                         "gpu": torch.cuda.get_device_name() if c.device == "cuda" else None}}


def cut_log(path: Path, step: int) -> None:
    """Drop the records after a step: the resumed run writes them again."""
    records = [line for line in path.read_text().splitlines() if json.loads(line).get("step", 0) <= step]
    path.with_suffix(".part").write_text("\n".join(records) + "\n")
    os.replace(path.with_suffix(".part"), path)


def save(path: Path, model, optimizers, c, step: int, seconds: float) -> None:
    """The whole state of a run, in a file that is replaced at once: a kill at any moment leaves the old one or the new."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step,
                    "seconds": seconds, "config": vars(c)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def assert_assigned(model, optimizers) -> None:
    """Every parameter belongs to exactly one optimizer."""
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    names = [name for name, p in model.named_parameters() if held.count(id(p)) != 1]
    assert not names and len(held) == len(list(model.parameters())), f"not in exactly one optimizer: {names}"


def peak_flops(device: str) -> float | None:
    """bf16 FLOPs per second of the GPU by its data sheet, None for one that is not in the table."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((flops for key, flops in PEAK_BF16_FLOPS.items() if key in name), None)


@cli.command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    given = parse(argv)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    # Everything that can be wrong is looked at before anything is allocated or written.
    checkpoint = None
    if given.get("resume"):
        if "out" not in given:
            raise UserError("--resume needs the run: --out DIR")
        checkpoint = load_checkpoint(given["out"])
        check_resume(given, checkpoint["config"])
    c = resolve(given, ranks, checkpoint and checkpoint["config"])
    stop = min(c.steps, given.get("stop_at", c.steps))
    with torch.device("meta"):
        blank = Llama(LlamaConfig(**c.model))
    Spectra(blank, c.spectra_of)
    if c.dry_run:
        train = data.open_data(c.data, c.seq_len, c.model["vocab_size"])[0] if Path(c.data).is_dir() else None
        print(describe(c, ranks, blank, train))
        return
    device = torch.device(c.device, int(os.environ.get("LOCAL_RANK", 0))) if c.device == "cuda" else torch.device(c.device)
    if c.device == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl" if c.device == "cuda" else "gloo")
    try:
        train_run(argv, c, checkpoint, stop, device, rank, ranks)
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def open_corpus(c, rank: int):
    """(train, validation, bytes per token or None, tokenizer or None); builds the offline corpus where it is missing."""
    if Path(c.data) == Path(NANO["data"]) and not Path(c.data).is_dir() and rank == 0:
        print(f"building the offline corpus in {c.data}", flush=True)
        data.build_stdlib(c.data)
    if dist.is_initialized():
        dist.barrier()
    train, val, made_with = data.open_data(c.data, c.seq_len, c.model["vocab_size"])
    if made_with != c.tokenizer:
        raise UserError(f"{c.data} was made with tokenizer {made_with!r}, and this run was trained with {c.tokenizer!r}")
    found = {"train_tokens": train.tokens, "val_tokens": val.tokens}
    if vars(c).setdefault("data_tokens", found) != found:
        raise UserError(f"{c.data} holds {found}, and this run was trained on {c.data_tokens}: put those shards back")
    try:
        tokenizer = data.get_tokenizer(c.tokenizer)
    except UserError as error:  # training needs no tokenizer, so a machine without a network can go on
        if rank == 0:
            print(f"no bits per byte and no sample: {error}")
        return train, val, None, None
    return train, val, data.token_bytes(tokenizer), tokenizer


def train_run(argv, c, checkpoint, stop, device, rank, ranks):
    """Train from the checkpoint, or from the start, to step `stop`, and say at the end what came of it."""
    train, val, byte_lengths, tokenizer = open_corpus(c, rank)
    torch.manual_seed(c.seed)
    with torch.device(device):
        model = Llama(LlamaConfig(**c.model))
    optimizers = METHODS[c.method].optimizers(model, c)
    assert_assigned(model, optimizers)
    step, seconds = 0, 0.0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        step, seconds = checkpoint["step"], checkpoint["seconds"]
    network = torch.compile(model) if c.compile else model
    if ranks > 1:
        network = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    spectra, flops, peak = Spectra(model, c.spectra_of), model.flops_per_token(), peak_flops(c.device)

    out = log = None
    if rank == 0:
        out = Path(c.out) if checkpoint else new_directory(c)
        c.out = str(out)
        if checkpoint:
            cut_log(out / "log.jsonl", step)
        log = open(out / "log.jsonl", "a")
        print(describe(c, ranks, model, train), flush=True)
        print(json.dumps(provenance(argv, c, ranks)), file=log, flush=True)

    stopping = catch_signals()
    marker = step, seconds  # where the speed of the next line is counted from
    while step < stop:
        started, warmth = time.perf_counter(), schedule(step, c.steps)
        loss = backward(network, train, c, step, device, rank, ranks)
        clip_gradients(model, step + 1, warmth * c.lr)
        step += 1
        last = step == stop or sum_over_ranks(len(stopping), device) > 0
        validated = step == c.steps or step % c.eval_every == 0
        logged = last or validated or step == 1 or step % c.spectra_every == 0
        if logged:
            spectra.before()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * warmth
            optimizer.step()
            optimizer.zero_grad()
        loss = sum_over_ranks(loss, device) / ranks
        seconds += time.perf_counter() - started  # validation, norms and checkpoints stand outside the clock

        scores = {}
        if validated:
            tokens = FINAL_EVAL_TOKENS if step == c.steps else c.eval_tokens
            scores = validate(model, val, tokens, c.batch_size, c.dtype, byte_lengths)
        if logged and rank == 0:
            speed = (step - marker[0]) * c.tokens_per_step / (seconds - marker[1])
            marker = step, seconds
            record = {"step": step, "tokens": step * c.tokens_per_step, "flops": flops * step * c.tokens_per_step,
                      "seconds": round(seconds, 3), "loss": finite(loss), "val_loss": scores.get("val_loss"),
                      "lr": warmth * c.lr, **spectra.after(warmth * c.lr, optimizers[0].state)}
            print(json.dumps(record), file=log, flush=True)
            print(line(record, c, speed, peak and flops * speed / peak / ranks), flush=True)
        if rank == 0 and (last or step % c.save_every == 0):
            save(out / "ckpt.pt", model, optimizers, c, step, seconds)
        if last:
            break

    if rank == 0:
        log.close()
        report(model, tokenizer, out, c, step, seconds, scores)


def backward(network, train, c, step: int, device, rank: int, ranks: int) -> float:
    """Gradients of the mean loss over the batch of a step (from 0), all-reduced; returns this rank's mean loss."""
    x, y = train.batch(step, c.tokens_per_step // c.seq_len, c.seed, rank, ranks)
    total = 0.0
    for micro, (x_micro, y_micro) in enumerate(zip(x.split(c.batch_size), y.split(c.batch_size))):
        sync = ranks == 1 or micro == c.micro_steps - 1  # all-reduce once, with the last micro-step
        with nullcontext() if sync else network.no_sync():
            with precision(device, c.dtype):
                loss = network(x_micro.to(device, non_blocking=True), y_micro.to(device, non_blocking=True))
            (loss / c.micro_steps).backward()
        total += loss.detach() / c.micro_steps
    return total


def clip_gradients(model, step: int, lr: float) -> None:
    """Clip the norm of all gradients to CLIP. UserError, before any weight is touched, where it is not finite."""
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient for {missing}"
    try:
        nn.utils.clip_grad_norm_(model.parameters(), CLIP, error_if_nonfinite=True)
    except RuntimeError:
        name = next((n for n, p in model.named_parameters() if not p.grad.isfinite().all()), "none, only their norm")
        raise UserError(f"non-finite gradient at step {step}, lr {lr:.3g}; first parameter that has one: {name}. No weight "
                        "was touched, and the last checkpoint is whole. Start again with a lower --lr") from None


def sum_over_ranks(value, device) -> float:
    value = torch.as_tensor(value, dtype=torch.float32, device=device)
    if dist.is_initialized():
        dist.all_reduce(value)
    return value.item()


def catch_signals() -> list:
    """A list that a first SIGINT or SIGTERM fills, so that the run can save and end after the step; a second one kills."""
    caught = []

    def handle(number, frame):
        if caught:
            signal.default_int_handler(number, frame)
        caught.append(number)
    if threading.current_thread() is threading.main_thread():
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, handle)
    return caught


def line(record: dict, c, speed: float, mfu: float | None) -> str:
    """One logged step in fixed width."""
    def show(key, form):
        return format(record[key], form) if record[key] is not None else "-".rjust(int(form.split(".")[0]))
    left = round((c.steps - record["step"]) * c.tokens_per_step / speed)
    return (f"step {record['step']:>6}/{c.steps}  loss {show('loss', '7.4f')}  val {show('val_loss', '7.4f')}  "
            f"lr {record['lr']:.2e}  gauge {show('gauge', '5.3f')}  {speed:>9,.0f} tok/s  "
            f"MFU {f'{mfu:.1%}' if mfu else 'n/a':>5}  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")


def report(model, tokenizer, out: Path, c, step: int, seconds: float, scores: dict) -> None:
    """The end of a run: a sample, the figure, and a block of `key: value` lines."""
    plot.figure([out], out / "loss.png")
    print("---")
    if step < c.steps:
        print(f"stopped after step {step} of {c.steps}. Go on: python train.py --resume --out {out}")
    elif tokenizer:
        text = tokenizer.decode(sample.generate(model, [tokenizer.eot_token], 200, seed=c.seed, vocab=tokenizer.n_vocab))
        print(f"sample:\n{text}\n---")
    result = {"step": step, "seconds": round(seconds, 1), **scores, "log": out / "log.jsonl",
              "checkpoint": out / "ckpt.pt", "figure": out / "loss.png"}
    print("\n".join(f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}"
                    for key, value in result.items()))


if __name__ == "__main__":
    main()
