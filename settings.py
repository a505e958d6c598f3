"""The settings of a run: its flags, the defaults that follow from size, method and hardware, what is refused,
what it costs.
"""

import argparse
import importlib
import math
import os
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import cli
import data
import methods
from cli import UserError
from model import ALIASES, NANO_SIZES, SIZES, FactorizedLinear, count_parameters, rank_of, split_parameters

# What --size decides besides the architecture. The paper's sizes: 512 sequences of 2,048 tokens
# (Appendix E.3).
PAPER = dict(tokens_per_step=2**20, momentum=0.95, adam_lr=3e-3, data="data/fineweb")
NANO = dict(tokens_per_step=4096, momentum=0.9, adam_lr=3e-3, data="data/stdlib", steps=600)
COMMON = dict(method_args={}, weight_decay=0.0, seed=0, factorize="all", orthogonalize=True,
              renormalize=True, ns_steps=5, power_steps=1, nesterov=True, shape_scale=False, muon_lr=0.02,
              eval_tokens=10 * 2**20, final_eval_tokens=100_000_000, spectra_every=10, stop_at=None,
              on_nonfinite="stop", out=None)
# The best lr of each corner at nano, (orthogonalize, renormalize) -> lr: results/table2/nano/table.md
NANO_CORNERS = {(True, True): 0.1, (True, False): 0.02, (False, True): 0.05, (False, False): 0.5}
MAY_CHANGE = {"batch_size", "device", "compile", "eval_every", "save_every", "spectra_every", "out",
              "stop_at", "on_nonfinite"}  # at --resume
ACTIONS = {"resume", "overwrite", "dry_run"}  # what to do with a run, not a setting of it


def parse(argv, description: str) -> dict:
    """The flags that were given, and only those."""
    parser = cli.Parser(description)

    def add(name, help, type=None, **more):
        parser.add_argument(f"--{name}", help=help, default=argparse.SUPPRESS,
                            **({"type": type} if type else {}), **more)

    def toggle(name, help):
        add(name, help, action=argparse.BooleanOptionalAction)

    add("size", ", ".join([*NANO_SIZES, *(name for name in SIZES if name not in {**ALIASES, **NANO_SIZES})])
        + "; " + ", ".join(f"{alias} = {name}" for alias, name in ALIASES.items()) + " (nano)",
        choices=list(SIZES), metavar="SIZE")
    add("method", f"{', '.join(methods.names())} (spectron)", choices=methods.names(), metavar="METHOD")
    add("method_args", "of a method in baselines/, e.g. --method self-guided --method_args optimizer=muon",
        nargs="+", metavar="KEY=VALUE")
    toggle("orthogonalize", "spectron: Newton-Schulz on each factor's momentum (on)")
    toggle("renormalize", "spectron: divide lr by sigma_A + sigma_B + 1 (on)")
    add("rank_ratio", "rank over the input width of each matrix, in (0, 1] (0.25)", float)
    add("factorize", "which matrices of a block are low-rank: all, or ffn (all)", choices=["all", "ffn"])
    add("lr", "learning rate of the block matrices; for spectron the bound on ||dW||_2 of a step\n("
        + ", ".join(f"{name} {method.lr:g}, at nano {method.nano_lr:g}"
                    for name, method in methods.METHODS.items())
        + ";\nat the paper's sizes from public launches and the field's practice, untested here)", float)
    add("adam_lr", "AdamW's learning rate for embedding, head and norms (3e-3, untested at the paper's "
        "sizes)", float)
    add("muon_lr", "spectron with --factorize ffn: Muon's learning rate for the dense matrices (0.02, "
        "untested)", float)
    add("momentum", "of spectron and Muon, in [0, 1) (0.95; nano 0.9)", float)
    toggle("nesterov", "Nesterov momentum; --no-nesterov is Algorithm 1 to the letter (on)")
    toggle("shape_scale", "multiply A's update by sqrt(max(1, m / r)), as the public code does (off)")
    add("ns_steps", "Newton-Schulz iterations (5)", int)
    add("power_steps", "power iterations per step (1)", int)
    add("weight_decay", "decoupled, of every matrix, times that matrix's lr (0)", float)
    add("steps", "optimizer steps (from the size, and from whether W is dense)", int)
    add("stop_at", "save and end after this step, on the schedule of --steps", int)
    add("tokens_per_step", "the batch, in tokens, over all ranks and micro-steps (1,048,576; nano 4,096)",
        int)
    add("batch_size", "sequences per device and micro-step: memory, never the result (16; 1 on a CPU "
        "past nano)", int)
    add("seq_len", "tokens per sequence (2,048; nano 256)", int)
    add("seed", "of the initial weights and the order of the data (0)", int)
    add("device", "cuda, cpu or mps (the first that is there; mps is untested)",
        choices=["cuda", "cpu", "mps"])
    add("dtype", "bfloat16 (autocast over fp32 weights) or float32 (bfloat16 where the hardware has it)",
        choices=["bfloat16", "float32"])
    toggle("compile", "torch.compile (on for CUDA from size 60M up)")
    add("out", "directory of the run (the next free out/<size>-<method>-NN)")
    add("data", "directory of token shards (data/fineweb; nano data/stdlib, built where it is missing)")
    add("eval_every", "steps between validations (a tenth of --steps)", int)
    add("eval_tokens", "validation tokens at most, during training (10,485,760)", int)
    add("final_eval_tokens", "validation tokens at most, after the last step (100,000,000)", int)
    add("save_every", "steps between checkpoints (a tenth of --steps)", int)
    add("spectra_every", "steps between logged steps, each with the norms of one matrix (10)", int)
    add("spectra_of", "that matrix, e.g. blocks.0.ffn.down_proj (attention.o_proj of the middle block)")
    add("on_nonfinite", "what a gradient that is not finite does: stop, with an error, or record, which "
        "marks the run\nas diverged in its log and ends it without one, for sweeps (stop)",
        choices=["stop", "record"])
    add("resume", "go on from the checkpoint in --out", action="store_true")
    add("overwrite", "start anew in an --out that has a run", action="store_true")
    add("dry_run", "print what would be trained and what it needs, and end", action="store_true")
    given = vars(parser.parse_args(argv))
    if "method_args" in given:
        given["method_args"] = methods.parse_args(given["method_args"])
    return given


def resolve(given: dict, ranks: int, saved: dict | None = None) -> SimpleNamespace:
    """Every setting of a run: the flags given, over those of the run that is resumed, or over the defaults,
    which follow from size, method and hardware. UserError where one makes no sense."""
    settings = {key: value for key, value in given.items() if key not in ACTIONS}
    device = choose_device(given.get("device"), planned="dry_run" in given)
    if saved:
        check_resume(settings, saved)
        compiles = saved["compile"] and device == saved["device"]
        c = SimpleNamespace(**{**saved, "stop_at": None, "compile": compiles, **settings, "device": device})
    else:
        size, name = given.get("size", "nano"), given.get("method", "spectron")
        method = methods.find(name, given.get("method_args"))
        check_method(settings, name, method)
        c = SimpleNamespace(**{**defaults(size, name, method, device), **settings})
        check_ratio(c)
        c.eval_every, c.save_every = (given.get(key, max(1, c.steps // 10))
                                      for key in ("eval_every", "save_every"))
        known = Path(c.data).is_dir()
        c.tokenizer = (data.read_meta(Path(c.data))["tokenizer"] if known
                       else "bytes" if size in NANO_SIZES else "gpt2")
        c.model = asdict(replace(SIZES[size], vocab_size=data.padded_vocabulary(c.tokenizer),
                                 seq_len=c.seq_len, rank_ratio=c.rank_ratio, factorize=c.factorize))
    check_values(settings)
    split_batch(c, "batch_size" in given, ranks)
    return c


def defaults(size: str, name: str, method, device: str) -> dict:
    """What is not given: by size, by method, and by what the hardware can do."""
    nano = size in NANO_SIZES
    return {"size": size, "method": name, "lr": method.nano_lr if nano else method.lr,
            "seq_len": SIZES[size].seq_len,
            "steps": NANO["steps"] if nano else paper_steps(size, method.dense),
            **COMMON, **(NANO if nano else PAPER),
            "rank_ratio": None if method.dense else 0.25, "batch_size": 16 if nano or device == "cuda" else 1,
            "device": device, "dtype": "bfloat16" if native_bf16(device) else "float32",
            "compile": device == "cuda" and not nano and method.compiles,
            "spectra_of": f"blocks.{SIZES[size].n_layers // 2}.attention.o_proj"}


def paper_steps(size: str, dense: bool) -> int:
    """Steps of 2^20 tokens: the factorized model sees 20 per parameter of its nominal dense size, the dense
    model 20 per parameter of its factorized twin (at 32,000 tokens of vocabulary), so that 6 N D is equal.
    All six of Appendix E.3."""
    nominal = ALIASES.get(size, size)
    parameters = (count_parameters(replace(SIZES[size], vocab_size=32000)) if dense
                  else float(nominal[:-1]) * {"M": 1e6, "B": 1e9}[nominal[-1]])
    return math.ceil(20 * parameters / 2**20)


def choose_device(device: str | None, planned: bool = False) -> str:
    """The device asked for, or the first that is there. UserError if it is not, unless it is only planned."""
    found = [d for d in ("cuda", "mps", "cpu") if available(d)]
    if device and device not in found and not planned:
        raise UserError(f"--device {device}: torch {torch.__version__} finds none here. There is: --device "
                        + " or ".join(found))
    return device or found[0]


def join_ranks(device: str) -> torch.device:
    """This rank's device; under torchrun, after the ranks have found each other."""
    where = (torch.device(device, int(os.environ.get("LOCAL_RANK", 0))) if device == "cuda"
             else torch.device(device))
    if device == "cuda":
        if where.index >= torch.cuda.device_count():
            raise UserError(f"torchrun starts more ranks than there are GPUs: --nproc_per_node="
                            f"{torch.cuda.device_count()} at most, or --device cpu")
        torch.cuda.set_device(where)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Imported later, by DDP or an optimizer, it would keep the group alive in default arguments: Gloo's
        # threads would outlive destroy_process_group, and now and then abort the interpreter's exit.
        importlib.import_module("torch._dynamo")
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return where


def my_rank() -> tuple[int, int]:
    """(rank, ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(sums: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's float64 tensor on the CPU, which NCCL wants on the GPU."""
    if dist.is_initialized():
        sums = sums.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(sums)
    return sums.cpu()


def precision(device, dtype: str):
    """Autocast to bfloat16 over fp32 weights, or nothing where dtype is float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def available(device: str) -> bool:
    return {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available,
            "cpu": lambda: True}[device]()


def native_bf16(device: str) -> bool:
    """Whether this device multiplies bfloat16 matrices in hardware; torch does it everywhere, but elsewhere
    slowly."""
    if device == "cpu":
        return any(getattr(torch.cpu, probe, lambda: False)()
                   for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device == "cuda" and (not available("cuda") or torch.cuda.is_bf16_supported(False))


########################################
#            What is refused           #
########################################

def check_method(settings: dict, name: str, method) -> None:
    """UserError for a flag that the method does not have."""
    core = methods.METHODS
    optional = {flag for other in core.values() for flag in other.flags}
    for flag in sorted(optional & set(settings) - set(method.flags)):
        written = f"--no-{flag}" if settings[flag] is False else f"--{flag}"
        raise UserError(f"{written} does not apply to --method {name}; it is a flag of --method "
                        + " or ".join(other for other in core if flag in core[other].flags))
    if settings.get("compile") and not method.compiles:
        raise UserError(f"--compile does not go with --method {name}, whose forward pass changes from step "
                        "to step: leave it out")
    for flag, toggle in ("ns_steps", "orthogonalize"), ("power_steps", "renormalize"):
        if flag in settings and settings.get(toggle) is False:
            raise UserError(f"--{flag} has no effect with --no-{toggle}: leave one of them out")
    if "muon_lr" in settings and settings.get("factorize") != "ffn":
        raise UserError("--muon_lr is for the dense matrices that --factorize ffn leaves: add that, "
                        "or drop it")


def check_ratio(c) -> None:
    try:
        rank_of(1.0 if c.rank_ratio is None else c.rank_ratio, 1, 1)
    except ValueError as error:
        raise UserError(f"--{error}; e.g. --rank_ratio 0.25") from None


def check_values(settings: dict) -> None:
    """UserError for a number out of its range."""
    for flag in ("steps", "tokens_per_step", "batch_size", "seq_len", "ns_steps", "power_steps", "eval_every",
                 "eval_tokens", "final_eval_tokens", "save_every", "spectra_every", "stop_at"):
        if settings.get(flag, 1) < 1:
            raise UserError(f"--{flag} is {settings[flag]}, and has to be at least 1")
    for flag in "lr", "adam_lr", "muon_lr", "weight_decay":
        if not 0 <= settings.get(flag, 0) < math.inf:
            raise UserError(f"--{flag} is {settings[flag]}, and has to be a number of at least 0")
    if not 0 <= settings.get("seed", 0) < 2**63:
        raise UserError(f"--seed is {settings['seed']}, and has to be in [0, 2^63)")
    if not 0 <= settings.get("momentum", 0) < 1:
        raise UserError(f"--momentum is {settings['momentum']}, and has to be in [0, 1); "
                        "e.g. --momentum 0.95")


def check_resume(settings: dict, saved: dict) -> None:
    """UserError that lists the flags given which would change the result of the run that is resumed."""
    changed = [f"--{key} {value} (was {saved.get(key)})" for key, value in settings.items()
               if key not in MAY_CHANGE and saved.get(key) != value]
    if changed:
        raise UserError("a resumed run keeps its settings, and these differ: " + ", ".join(changed)
                        + ". Leave them out, or start another run without --resume. What may change: "
                        + ", ".join(sorted(MAY_CHANGE)))


def split_batch(c, chosen: bool, ranks: int) -> None:
    """Sets micro_steps so that batch_size x seq_len x ranks x micro_steps = tokens_per_step; batch_size too
    unless the user chose it. UserError with the nearest valid value where nothing does."""
    unit = c.seq_len * ranks
    if c.tokens_per_step % unit:
        raise UserError(f"--tokens_per_step {c.tokens_per_step} is not a multiple of {unit} = "
                        f"--seq_len {c.seq_len} x {ranks} rank(s); the nearest that is: --tokens_per_step "
                        f"{max(1, round(c.tokens_per_step / unit)) * unit}")
    sequences = c.tokens_per_step // unit
    valid = [d for d in range(1, sequences + 1) if sequences % d == 0]
    if not chosen:
        c.batch_size = max(d for d in valid if d <= c.batch_size)
    if c.batch_size not in valid:
        raise UserError(f"--batch_size {c.batch_size} does not divide the {sequences} sequences that a step "
                        f"gives each of {ranks} rank(s); the nearest that does: --batch_size "
                        f"{min(valid, key=lambda d: abs(d - c.batch_size))}")
    c.micro_steps = sequences // c.batch_size


########################################
#            What it costs             #
########################################

def describe(c, model, train, ranks: int) -> str:
    """What will be trained and what it needs. `model` may be on the meta device; `train` is the split, None
    if not here."""
    parameters, tokens = sum(p.numel() for p in model.parameters()), c.steps * c.tokens_per_step
    factors = sum(p.numel() for pair in model.factor_pairs() for p in pair)
    flops, dense = model.flops_per_token(), count_parameters(replace(model.config, rank_ratio=None))
    guided = methods.find(c.method, c.method_args).before_step
    epochs = train and tokens / (train.windows * c.seq_len)
    lines = ["settings: " + ", ".join(f"{key} {value}" for key, value in vars(c).items()
                                      if key not in ("model", "out")),
             f"model: {parameters:,} parameters, {factors:,} of them in factors "
             f"({dense:,} if all were dense)",
             f"batch: {c.batch_size} sequences x {c.seq_len} tokens x {ranks} rank(s) x "
             f"{c.micro_steps} micro-step(s) = {c.tokens_per_step:,} tokens a step",
             f"tokens: {c.steps:,} steps, {tokens:,} tokens, "
             f"{math.ceil(tokens / data.SHARD_TOKENS)} shard(s) of 100M"
             + (f", {epochs:.2f} epochs of {c.data}" if train else "")
             + (": text is seen again" * bool(train and epochs > 1)),
             f"FLOPs: {flops:,} a token" + (" at first, fewer when the guide has gone" if guided else
                                            f", {flops * tokens:.3e} in all")
             + f" (the paper's 6 N D: {6 * parameters * tokens:.3e})",
             "memory per device: " + memory(c, model)]
    if not c.compile:
        lines.append("compile: off (on by default for CUDA from size 60M up; elsewhere it costs more than "
                     "it saves)")
    if c.method == "spectron":
        best = NANO_CORNERS[c.orthogonalize, c.renormalize]
        lines.append(f"lr: {c.lr:g}; the best measured at nano for orthogonalize {c.orthogonalize}, "
                     f"renormalize {c.renormalize} is {best:g} (README, Table 2)")
    return "\n".join(textwrap.fill(line, 118, subsequent_indent="  ", break_on_hyphens=False)
                     for line in lines)


def memory(c, model) -> str:
    """Bytes on one device: weights, gradients and optimizer state exactly, activations by an estimate."""
    pairs, dense, others = split_parameters(model)
    matrices = sum(p.numel() for p in [*dense, *(p for pair in pairs for p in pair)])
    total = matrices + sum(p.numel() for p in others)
    width, D = 2 if c.dtype == "bfloat16" else 4, c.model["dim"]
    per_token = (c.model["n_layers"] * (16 * D  # residuals in fp32; the rest
                                        + width * (7 * D + 4 * model.config.hidden))
                 + width * sum(layer.rank for layer in model.modules() if isinstance(layer, FactorizedLinear))
                 + width * c.model["vocab_size"])  # logits, which the loss replaces by their gradient
    parts = {"weights": 4 * total, "gradients": 4 * total,
             "optimizer": (4 if c.method in ("spectron", "dense") else 8) * matrices + 8 * (total - matrices),
             "activations, about": per_token * c.batch_size * c.seq_len}
    return (", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
            + f"; {sum(parts.values()) / 1e9:.1f} GB")
