"""Train a Llama from scratch with low-rank weights only.

    python train.py                                      nano on the offline corpus: minutes on two cores
    torchrun --nproc_per_node=8 train.py --size S        the paper's Factorized Transformer-S on FineWeb
    python train.py --no-renormalize                     an ablation, with a learning rate of its own
    python train.py --resume --out out/nano-spectron-00  go on where a run stopped

--size and --method decide every other value. Each is printed at the start and can be set by its flag.
"""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
from eval import validate
from lib import checkpoints, flags, norms
from lib.cli import UserError, command, number, positive, rank_and_ranks, ratio
from lib.methods import (LOW_RANK_FLAGS, MUON_FLAGS, SPECTRON_FLAGS, Method, Tuned, assert_assigned, baseline,
                         paper_steps, split_parameters)
from lib.optimizers import adamw, muon
from lib.ranks import choose_device, join_ranks, my_rank, native_bf16, precision
from lib.run_directory import check_directory, run_directory
from lib.signals import exit_if_interrupted, signals_caught
from model import NANO_SIZES, SIZES, Llama, LlamaConfig
from spectron import Spectron
from tools import machine, plan, prepare, report

WARMUP = 0.05  # of the steps
CLIP = 1.0  # on the norm of all gradients together


# -------------------------------------- Methods: who owns which weight --------------------------------------

def spectron_optimizers(model, c, spectron=Spectron):
    """Spectron for the factors, Muon for matrices that stay dense, AdamW for embedding, head and norms."""
    pairs, dense, others = split_parameters(model)
    factors = spectron(
        pairs, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay, nesterov=c.nesterov,
        shape_scale=c.shape_scale, ns_steps=c.ns_steps, power_steps=c.power_steps,
        orthogonalize=c.orthogonalize, renormalize=c.renormalize,
        ns_dtype=torch.bfloat16 if c.dtype == "bfloat16" else None)
    return [factors, *([muon(dense, c.muon_lr, c)] if dense else []), adamw(others, c.adam_lr, c)]


def adamw_optimizers(model, c):
    """AdamW for everything, with one learning rate for the block matrices and one for the rest."""
    pairs, dense, others = split_parameters(model)
    return [adamw([p for pair in pairs for p in pair] + dense, c.lr, c), adamw(others, c.adam_lr, c)]


def muon_optimizers(model, c):
    _, dense, others = split_parameters(model)
    return [muon(dense, c.lr, c), adamw(others, c.adam_lr, c)]


def is_bounded(c) -> bool:
    """Whether eta bounds the step of W. Without orthogonalization it still does: M is divided by its norm."""
    return c.renormalize and not c.shape_scale and not c.weight_decay


TUNED = (  # flags whose best learning rate at nano is another: that is then the default
    Tuned("SGD on the factors", dict(orthogonalize=False, renormalize=False), table="table2", nano_lr=1.0),
    Tuned("Muon on the factors", dict(renormalize=False), table="table2", nano_lr=0.05, nano_adam_lr=0.01),
    Tuned("a rank ratio of 0.4", dict(rank_ratio=0.4), table="table3", nano_lr=0.1),
    Tuned("Spectron with dense attention", dict(factorize="ffn"), table="fig13", nano_lr=0.1),
)
METHODS = {  # lr at the paper's sizes is from public launches and untested here; nano_lr is the best at nano
    "spectron": Method(optimizers=spectron_optimizers, lr=0.05, nano_lr=0.2, tuned=TUNED, bounded=is_bounded,
                       flags=LOW_RANK_FLAGS + MUON_FLAGS + SPECTRON_FLAGS),
    "adamw": Method(optimizers=adamw_optimizers, lr=1e-3, nano_lr=1e-3, nano_adam_lr=0.03,
                    flags=LOW_RANK_FLAGS),
    "dense": Method(optimizers=muon_optimizers, lr=0.02, nano_lr=0.05, dense=True, flags=MUON_FLAGS),
    "dense-adamw": Method(optimizers=adamw_optimizers, lr=6e-4, nano_lr=1e-3, nano_adam_lr=0.03, dense=True),
}


def find_method(name: str, args: dict) -> Method:
    if name not in METHODS:
        return baseline(name, args, core=METHODS)
    if args:
        raise UserError(f"--method_args are for the methods of baselines/; --method {name} takes none")
    return METHODS[name]


# -------------------------------------------- Flags and defaults --------------------------------------------

# --flag: how it is read, its default, its help; None follows from size, method or hardware, in new_run. A new
# flag is a line here and, where it applies, a name in NANO below, in LOW_RANK_FLAGS or those beside it in
# lib/methods.py, in MAY_CHANGE and without_effect of lib/flags.py, and in UNTOLD of tools/plot.py.
FLAGS_BY_TOPIC = {
    "the model and the method": {
        "size": (list(SIZES), "nano", "for laptops nano, nano-0.6M, nano-1.5M, nano-7.3M, nano-2x8 to 384;\n"
                 "the paper's 60M to 2.7B, of which S = 134M, M = 500M, L = 780M"),
        "method": (str, "spectron", f"{', '.join(METHODS)}, or a file in baselines/, such as self-guided"),
        "method_args": (flags.key_and_value, {}, "of a method in baselines/"),
        "rank_ratio": (ratio, 0.25, "rank over the input width of each matrix, in (0, 1]"),
        "factorize": (["all", "ffn"], "all", "which matrices of a block are low-rank"),
    },
    "the optimizer": {
        "lr": (number(), None, "of block matrices; for spectron the bound on ||dW||_2. At nano, and above:\n"
               + flags.learning_rates(METHODS)),
        "orthogonalize": (bool, True, "spectron: Newton-Schulz on each factor's momentum"),
        "renormalize": (bool, True, "spectron: divide lr by sigma_A + sigma_B + 1"),
        "adam_lr": (number(), None, "AdamW's for embedding, head and norms: 0.003; of Muon on the\n"
                    "factors 0.01; at nano 0.03 where Adam or a guide trains the block matrices"),
        "muon_lr": (number(), 0.02, "spectron with --factorize ffn: Muon's for the dense matrices"),
        "momentum": (number(below=1), 0.95, "of spectron and Muon, in [0, 1)"),
        "nesterov": (bool, True, "Nesterov momentum; --no-nesterov is Algorithm 1 to the letter"),
        "shape_scale": (bool, False, "multiply A's update by sqrt(max(1, m / r)), as the public code does"),
        "ns_steps": (positive, 5, "Newton-Schulz iterations"),
        "power_steps": (positive, 1, "power iterations per step"),
        "weight_decay": (number(), 0.0, "decoupled, of every matrix, times that matrix's lr"),
    },
    "the batch and the run": {
        "steps": (positive, None, "optimizer steps: at the paper's sizes 20 tokens per parameter"),
        "stop_at": (positive, None, "save and end after this step, on the schedule of --steps"),
        "tokens_per_step": (number(int, 1, 2**40), 2**20, "the batch, over all ranks and micro-steps"),
        "batch_size": (positive, None, "sequences per device at a time, memory only: cuda 8, cpu 1; nano 16"),
        "seq_len": (number(int, 1, 2**20 + 1), None, "tokens per sequence: 2,048; nano 256"),
        "seed": (number(int, 0, 2**63), 0, "of the initial weights and the order of the data"),
        "data": (str, "data/fineweb", "directory of token shards"),
        "out": (str, None, "directory of the run: the next free out/<size>-<method>-NN"),
        "device": (["cuda", "cpu", "mps"], None, "cuda if there is one, else cpu"),
        "dtype": (["bfloat16", "float32"], None,
                  "bfloat16 (autocast over float32 weights) where hardware has it, else float32"),
        "compile": (bool, None, "torch.compile: on for CUDA from size 60M up"),
    },
    "what is recorded": {
        "eval_every": (positive, None, "steps between validations: a tenth of --steps; nano a fifth"),
        "eval_tokens": (positive, 10 * 2**20, "validation tokens at most, during training"),
        "final_eval_tokens": (positive, 100_000_000, "validation tokens at most, after the last step"),
        "save_every": (positive, None, "steps between checkpoints: a tenth of --steps"),
        "keep_every": (positive, None, "also keep a checkpoint every so many steps: ckpt-000100.pt (none)"),
        "spectra_every": (positive, 10, "steps between logged steps, each with the norms of one matrix"),
        "spectra_of": (str, None, "that matrix, e.g. blocks.0.ffn.down_proj: o_proj of the middle block"),
        "on_nonfinite": (["stop", "record"], "stop", "on a non-finite gradient: end with an error, or\n"
                         "record it in the log as diverged and end without one, for sweeps"),
    },
}
FLAGS = {name: flag for topic in FLAGS_BY_TOPIC.values() for name, flag in topic.items()}
# What is smaller at nano's sizes. The paper's batch is 512 sequences of 2,048 (Appendix E.3).
NANO = dict(tokens_per_step=4096, momentum=0.7, data="data/stdlib", steps=240)


def parse(argv) -> dict:
    return flags.parse(__doc__, FLAGS_BY_TOPIC, NANO, argv)


def resolve(given: dict, ranks: int = 1, saved: dict | None = None) -> SimpleNamespace:
    """Every setting of a run. What is not given comes from `saved`, the settings of the run that goes on, or
    from the defaults. UserError where settings do not go together."""
    # The machine of a dry run need not have the device.
    device = given["device"] if {"dry_run", "device"} <= given.keys() else choose_device(given.get("device"))
    given = {name: value for name, value in given.items() if name in FLAGS}
    c = flags.resumed(given, saved, FLAGS, device) if saved else new_run(given, device)
    flags.check_compiler(c, find_method(c.method, c.method_args))
    flags.split_batch(c, "batch_size" in given, ranks)  # sets c.micro_steps
    return c


def new_run(given: dict, device: str) -> SimpleNamespace:
    """What is given, and for the rest what follows from size, method and hardware."""
    c = SimpleNamespace(**{name: default for name, (_, default, _) in FLAGS.items()})
    nano = given.get("size", c.size) in NANO_SIZES
    vars(c).update(NANO if nano else {})
    vars(c).update(given)
    c.device, size, method = device, SIZES[c.size], find_method(c.method, c.method_args)
    flags.check(given, c, method, METHODS)
    steps = c.steps or paper_steps(c.size, method.dense)
    for name, default in {
            "steps": steps, "seq_len": size.seq_len,
            **method.learning_rates(c.size, method.tuned_for(c)),
            "batch_size": 16 if nano else 8 if device == "cuda" else 1,
            "dtype": "bfloat16" if native_bf16(device) else "float32",
            "compile": device == "cuda" and not nano and method.compiles,
            "eval_every": max(1, steps // (5 if nano else 10)), "save_every": max(1, steps // 10),
            "spectra_of": f"blocks.{size.n_layers // 2}.attention.o_proj"}.items():
        if getattr(c, name) is None:
            setattr(c, name, default)
    if method.dense:
        c.rank_ratio = None
    if Path(c.data).is_dir():
        c.tokenizer = data.read_meta(Path(c.data))["tokenizer"]
    else:  # data that train.py makes itself, or that tools.download fetches
        c.tokenizer = "bytes" if nano else "gpt2"
    c.model = asdict(replace(size, vocab_size=data.padded_vocabulary(c.tokenizer), seq_len=c.seq_len,
                             rank_ratio=c.rank_ratio, factorize=c.factorize))
    return c


# ------------------------------------------------- One step -------------------------------------------------

def schedule(step: int, steps: int) -> float:
    """The fraction of lr at a step (from 0): linear warm-up over 5%, then a cosine towards zero, which the
    last step is still above."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def backward(network, x, y, c) -> torch.Tensor:
    """Leaves the gradients of the mean loss over x, y (sequences, T), averaged over the ranks. Returns this
    rank's mean loss."""
    if c.device == "cuda":  # from pinned memory a copy runs beside the computation
        x, y = x.pin_memory(), y.pin_memory()
    total = torch.zeros((), device=c.device)
    for micro, (inputs, targets) in enumerate(zip(x.split(c.batch_size), y.split(c.batch_size)), 1):
        # Gradients add up over the micro-steps. The ranks average them once, with the last one.
        early = micro < c.micro_steps and isinstance(network, DistributedDataParallel)
        with network.no_sync() if early else nullcontext():
            with precision(c.device, c.dtype):
                loss = network(*(t.to(c.device, non_blocking=True) for t in (inputs, targets)))
                loss = loss / c.micro_steps
            loss.backward()
        total += loss.detach()
    return total


def read_back(model, loss: torch.Tensor, stopping: bool) -> tuple[float, float, bool]:
    """(norm of all gradients, mean loss over the ranks, whether any rank was told to stop). In a step that is
    not logged the CPU waits for the device here alone."""
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient for {missing}"
    sums, (_, ranks) = torch.stack([loss, loss.new_full((), float(stopping))]), my_rank()
    if ranks > 1:
        dist.all_reduce(sums)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    norm, loss, stops = torch.cat([norm.view(1), sums]).tolist()
    return norm, loss / ranks, stops > 0


def clip_gradients(model, norm: float) -> None:
    if norm > CLIP:
        torch._foreach_mul_([p.grad for p in model.parameters()], CLIP / (norm + 1e-6))


def update(optimizers, fraction: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * fraction  # ReLoRA sets its own
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------- The run --------------------------------------------------

@command
def main(argv=None):
    """Check all that can be wrong before the ranks join and anything is allocated or written; then train."""
    argv = sys.argv[1:] if argv is None else argv
    given, (rank, ranks) = parse(argv), rank_and_ranks()
    saved = checkpoints.find(given)  # the checkpoint to go on from, or None
    c = resolve(given, ranks, saved and saved["config"])
    if checkpoints.is_done(saved, c, given):
        return
    method = find_method(c.method, c.method_args)
    with torch.device("meta"):  # shapes without memory
        blank = Llama(LlamaConfig(**c.model), method.linear)
    norms.check_name(blank, c.spectra_of)
    if "dry_run" in given:
        if rank == 0:
            print(plan.describe(c, blank, method, FLAGS_BY_TOPIC, ranks))
        return
    if not saved:
        check_directory(c.out, given)

    corpus = c.data != NANO["data"] and prepare.open_corpus(c, NANO["data"])
    join_ranks(c.device)
    corpus = corpus or prepare.open_corpus(c, NANO["data"])  # which rank 0 makes while the others wait
    header = {"argv": argv, "ranks": ranks, **machine.provenance()}  # how to make this run again
    step = saved["step"] if saved else 0
    with signals_caught() as caught, run_directory(c, given, step, header) as log:
        run(c, method, corpus, saved, caught, log)
    if ranks > 1:
        dist.destroy_process_group()
    exit_if_interrupted(caught)


def run(c, method, corpus, saved, caught, log) -> None:
    """Train from the checkpoint, or from the start, until --steps, --stop_at, or a signal, which shows in
    `caught`. log(record) appends to the run's log."""
    (train, val, tokenizer), (rank, ranks) = corpus, my_rank()
    # The seed decides the weights. They are made on the device, where the SVDs of a large model are fast.
    torch.manual_seed(c.seed)
    if saved:
        model = checkpoints.load_model(saved, c.device)
    else:
        with torch.device(c.device):
            model = Llama(LlamaConfig(**c.model), method.linear)
        model.to(c.device)  # the RoPE table too
    optimizers = method.optimizers(model, c)
    assert_assigned(model, optimizers)
    step, seconds, flops = checkpoints.restore(optimizers, saved) if saved else (0, 0.0, 0)
    network = wrapped(model, c)
    # Logged steps follow one matrix: how far it moved, and how far its layer's output did on a few tokens.
    probe, _ = val.read([0])
    spectra = norms.Spectra(model, c.spectra_of, optimizers, probe[:, :64].to(c.device))
    journal = report.Journal(c, model, method, FLAGS_BY_TOPIC, log, step, seconds)

    stop, last, scores = min(c.steps, c.stop_at or c.steps), False, {}
    while not last:
        started, fraction = time.perf_counter(), schedule(step, c.steps)
        # A method may change the model between steps: drop a guide, cut a rank, merge and restart.
        if method.before_step and method.before_step(model, optimizers, c, step):
            network = wrapped(model, c)

        # The batch is a pure function of seed and step, so a resumed run needs nothing but the step.
        x, y = train.batch(step, c.tokens_per_step // c.seq_len, c.seed, rank, ranks)
        loss = backward(network, x, y, c)
        norm, loss, told_to_stop = read_back(model, loss, bool(caught))
        if not math.isfinite(norm + loss):  # before any weight is touched
            scores = journal.diverged(step + 1, fraction, loss)
            break
        clip_gradients(model, norm)
        step, flops = step + 1, flops + round(method.flops_per_token(model) * c.tokens_per_step)

        # All ranks agree on what happens after this step, since they have to validate together.
        last = step == stop or told_to_stop
        final = step == c.steps
        validate_now = final or step % c.eval_every == 0
        log_now = rank == 0 and (last or validate_now or step == 1 or step % c.spectra_every == 0)
        if log_now:
            spectra.before()
        # Everything above read the weights; here they move.
        update(optimizers, fraction)
        if log_now and c.device == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started  # what follows stands outside the clock

        # Validation is on the same fixed tokens every time; after the last step on more of them.
        scores = {}
        if validate_now:
            tokens = c.final_eval_tokens if final else c.eval_tokens
            lengths = data.token_bytes(tokenizer) if final and tokenizer else None
            scores = validate(model, val, tokens, c.batch_size, c.dtype, lengths)
        if log_now:
            journal.step(step, flops, seconds, loss, scores, spectra.after())
        # A checkpoint is the whole state, and replaces the one before it in a single rename.
        keep_now = c.keep_every and step % c.keep_every == 0
        if rank == 0 and (last or keep_now or step % c.save_every == 0):
            checkpoints.save(c, model, optimizers, step, seconds, flops)
        if log_now:
            journal.show()
    if rank == 0:
        journal.end(step, seconds, scores, tokenizer)


def wrapped(model, c):
    """The model as training calls it: compiled where that is on, averaging gradients over the ranks.
    Validation, samples and the probe call the model as it is, so that they never cause a recompilation."""
    network = torch.compile(model) if c.compile else model
    if dist.is_initialized():
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
        network.broadcast_buffers = False  # the RoPE table is the same on every rank already
    return network


if __name__ == "__main__":
    main()
