"""Train a Llama, from scratch, with low-rank weights only.

    python train.py                                      nano on the offline corpus: minutes on two cores
    torchrun --nproc_per_node=8 train.py --size S        the paper's Factorized Transformer-S on FineWeb
    python train.py --no-renormalize --lr 0.02           an ablation
    python train.py --resume --out out/nano-spectron-00  go on where a run stopped

--size and --method decide every other value; each is printed at the start and can be set by its flag.
"""

import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import cli
import data
import methods
import plot
import sample
import settings
from cli import UserError
from eval import BROKEN, load_checkpoint, load_model, validate
from model import FEW_ROWS, FactorizedLinear, Llama, LlamaConfig, block_matrices
from settings import precision

WARMUP = 0.05  # of the steps
CLIP = 1.0  # on the norm of all gradients together
PEAK_BF16_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
                   "A100": 312e12, "L40S": 362e12, "L4": 121e12,
                   "RTX 4090": 165e12, "RTX 3090": 71e12}  # data sheets


########################################
#               One step               #
########################################

def schedule(step: int, steps: int) -> float:
    """The fraction of lr at a step (from 0): linear warm-up over 5%, then cosine towards zero; never zero
    itself."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def backward(network, train, c, step: int, device, rank: int, ranks: int) -> torch.Tensor:
    """Leaves the gradients of the mean loss over the batch of a step (from 0), all-reduced; this rank's mean
    loss."""
    x, y = train.batch(step, c.tokens_per_step // c.seq_len, c.seed, rank, ranks)
    total = torch.zeros((), device=device)
    for micro, (x_micro, y_micro) in enumerate(zip(x.split(c.batch_size), y.split(c.batch_size))):
        reduces = ranks == 1 or micro == c.micro_steps - 1  # once a step, with its last micro-step
        with nullcontext() if reduces else network.no_sync():
            with precision(device, c.dtype):
                loss = network(x_micro.to(device), y_micro.to(device)) / c.micro_steps
            loss.backward()
        total += loss.detach()
    return total


class NonFinite(UserError):
    """A gradient that is not finite."""


def clip_gradients(model, step: int, lr: float) -> None:
    """Clip the norm of all gradients to CLIP. NonFinite, before any weight is touched, where it is not
    finite."""
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient for {missing}"
    try:
        nn.utils.clip_grad_norm_(model.parameters(), CLIP, error_if_nonfinite=True)
    except RuntimeError:
        name = next((n for n, p in model.named_parameters() if not p.grad.isfinite().all()),
                    "none, only their norm")
        raise NonFinite(f"non-finite gradient at step {step}, lr {lr:.3g}; the first parameter that has one: "
                        f"{name}. No weight was touched, and a checkpoint that was saved is whole. Start "
                        "again with a lower --lr") from None


def update(optimizers, fraction: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * fraction
        optimizer.step()
        optimizer.zero_grad()


def sum_over_ranks(*values) -> list[float]:
    values = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=values[0].device)
                          for value in values])
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


########################################
#      The norms of one matrix         #
########################################

def product_norm(A, B) -> torch.Tensor:
    """||A B^T||_2, exactly, from the triangles of two QRs: A (m, k), B (n, k), and never an m x n matrix."""
    R_A, R_B = (torch.linalg.qr(X, mode="r")[1] for X in (A, B))
    return norm(R_A @ R_B.T)


def norm(M) -> torch.Tensor:
    return torch.linalg.matrix_norm(M, ord=2)


def finite(x) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(x) if x is not None and math.isfinite(x) else None


class Spectra:
    """The norms of one matrix over one step, for any method: what the paper's Figures 2 and 3 draw.

    probe (1, T), T < model.FEW_ROWS: tokens for dy. Of a self-guided layer it is A B^T, the part that stays.
    """

    def __init__(self, model, name: str, optimizers, probe: torch.Tensor):
        self.model, self.name, self.probe = model, name, probe
        layer = block_matrices(model)[name]
        self.weights = [layer.A, layer.B] if isinstance(layer, FactorizedLinear) else [layer.weight]
        self.state, self.group = next((o.state, group) for o in optimizers for group in o.param_groups
                                      if any(p is self.weights[0] for p in group["params"]))

    def _float64(self, weights):
        return [p.detach().to("cpu" if p.device.type == "mps" else p.device, torch.float64, copy=True)
                for p in weights]

    @torch.no_grad()
    def before(self) -> None:
        """Keep the weights, and what the layer reads of the probe."""
        self.old, caught = self._float64(self.weights), []
        hook = block_matrices(self.model)[self.name].register_forward_pre_hook(
            lambda layer, inputs: caught.extend(inputs))
        self.model.hidden(self.probe)
        hook.remove()
        self.x, = self._float64(caught)

    def after(self) -> dict:
        """dW, W, dy, sigma_A, sigma_B, rho, gauge of the step since before(). dy is the RMS of dW x (Eq. 9).
        sigma and rho as the optimizer used them; where it has none, the exact sigma of before, and no rho.
        gauge is ||dW||_2 over the lr of that step."""
        if len(self.weights) == 1:
            W, W0 = *self._float64(self.weights), *self.old
            norms, dy = {"dW": norm(W - W0), "W": norm(W)}, self.x @ (W - W0).T
        else:
            (A, B), (A0, B0), states = (self._float64(self.weights), self.old,
                                        [self.state[p] for p in self.weights])
            sigma_A, sigma_B = (state["sigma"] if "sigma" in state else norm(p)
                                for state, p in zip(states, self.old))
            dW = product_norm(torch.cat([A - A0, A], 1), torch.cat([B0, B - B0], 1))  # dA B0^T + A dB^T
            norms = {"dW": dW, "W": product_norm(A, B), "sigma_A": sigma_A, "sigma_B": sigma_B,
                     "rho": states[0].get("rho")}
            dy = self.x @ B @ A.T - self.x @ B0 @ A0.T
        norms.update(gauge=norms["dW"] / self.group["lr"], dy=dy.square().mean().sqrt())
        keys = "dW", "W", "dy", "sigma_A", "sigma_B", "rho", "gauge"
        return {key: finite(norms.get(key)) for key in keys}


########################################
#        What a run leaves behind      #
########################################

def check_directory(c, overwrite: bool) -> None:
    """UserError if --out names something that is not empty."""
    path = Path(c.out or "out")
    if path.exists() and (not path.is_dir() or (c.out and any(path.iterdir()) and not overwrite)):
        raise UserError(f"--out {path} exists. Go on with that run: --resume; replace it: --overwrite; or "
                        "name another")


def new_directory(c) -> Path:
    """The directory of this run, made: --out, or the next free one."""
    number = 0
    while c.out is None:
        path = Path(f"out/{c.size}-{c.method}-{number:02d}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
    Path(c.out).mkdir(parents=True, exist_ok=True)
    return Path(c.out)


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.machine()


def git(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)


def provenance(argv, c, ranks: int) -> dict:
    """The first record of a log: how to make it again, and where it was made."""
    commit = git("rev-parse", "HEAD").stdout.strip() if shutil.which("git") else ""
    if commit and git("diff", "--quiet", "HEAD", "--", "*.py").returncode:
        commit += "-dirty"  # results that a run has written do not count
    return {"argv": argv, "config": vars(c), "git": commit or None, "ranks": ranks,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(),
                         "threads": torch.get_num_threads(),
                         "gpu": torch.cuda.get_device_name() if c.device == "cuda" else None}}


def cut_log(path: Path, step: int) -> None:
    """Drop what was logged after a step, and a line that a kill left torn: the resumed run writes them
    again."""
    kept = []
    for row in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(row).get("step", 0) <= step:
                kept.append(row + "\n")
        except ValueError:
            pass
    part = path.with_suffix(".part")
    part.write_text("".join(kept))
    os.replace(part, path)


def open_log(argv, c, step: int, ranks: int):
    """(directory of the run, its log): a new one, or the one that is resumed, cut after `step`."""
    out = Path(c.out) if step else new_directory(c)
    c.out = str(out)
    for name in () if step else ("log.jsonl", "ckpt.pt", "loss.png"):  # of the run that is replaced
        (out / name).unlink(missing_ok=True)
    cut_log(out / "log.jsonl", step)
    log = open(out / "log.jsonl", "a")
    print(json.dumps(provenance(argv, c, ranks)), file=log, flush=True)
    return out, log


def save(path: Path, model, optimizers, c, step: int, seconds: float, flops: int) -> None:
    """The whole state of a run, in a file that is replaced at once: a kill at any moment leaves the old one
    or the new."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                    "step": step, "seconds": seconds, "flops": flops, "config": vars(c)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def peak_flops(gpu: str) -> float | None:
    """bf16 FLOPs per second of this GPU by its data sheet; None for one that is not in the table."""
    return next((flops for name, flops in PEAK_BF16_FLOPS.items()
                 if re.search(rf"\b{name}\b(?! (Laptop|Ti|SUPER|D\b))", gpu)), None)


def line(record: dict, c, speed: float, mfu: float | None) -> str:
    """One logged step, in fixed width."""
    val, gauge = ("      -" if record[key] is None else f"{record[key]:7.4f}"
                  for key in ("val_loss", "gauge"))
    left = round((c.steps - record["step"]) * c.tokens_per_step / speed)
    return (f"step {record['step']:>6}/{c.steps}  loss {record['loss']:7.4f}  val {val}  "
            f"lr {record['lr']:.2e}  gauge {gauge}  {speed:>9,.0f} tok/s  "
            f"MFU {f'{mfu:.1%}' if mfu else 'n/a':>5}  "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")


def report(model, tokenizer, out: Path, c, step: int, seconds: float, scores: dict) -> None:
    """The end of a run: a sample, the figure, and a block of `key: value` lines."""
    if step:
        plot.figure([out], out / "loss.png")
    print("---")
    if step < c.steps and "diverged" not in scores:
        print(f"stopped after step {step} of {c.steps}. Go on: python train.py --resume --out {out}")
    elif tokenizer and scores.get("val_loss") is not None:
        steps = sample.generate(model, [tokenizer.eot_token], 200, seed=c.seed, vocab=tokenizer.n_vocab)
        print(f"sample:\n{''.join(text for text, in sample.texts(tokenizer, steps, 1))}\n---")
    results = {"step": step, "seconds": seconds, **scores, "log": out / "log.jsonl"}
    results |= {key: out / file for key, file in (("checkpoint", "ckpt.pt"), ("figure", "loss.png"))
                if (out / file).exists()}
    print("\n".join(f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}"
                    for key, value in results.items()), flush=True)


########################################
#               The run                #
########################################

@cli.command
def main(argv=None):
    """Look at everything that can be wrong, before anything is allocated or written; then train."""
    argv = sys.argv[1:] if argv is None else argv
    given = settings.parse(argv, __doc__)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    checkpoint = None
    if given.get("resume"):
        if "out" not in given or "overwrite" in given:
            raise UserError("--resume goes on with a run, and needs its directory: --resume --out out/<run>, "
                            "without --overwrite")
        if not Path(given["out"]).is_dir():
            raise UserError(f"--out {given['out']}: no such directory. Runs are in out/; make one with: "
                            "python train.py")
        checkpoint = load_checkpoint(given["out"])
    c = settings.resolve(given, ranks, checkpoint and checkpoint["config"])
    stop = min(c.steps, c.stop_at or c.steps)
    if checkpoint and checkpoint["step"] >= stop:
        raise UserError(f"{given['out']} has come to step {checkpoint['step']} of {c.steps}: nothing is left "
                        f"to do up to step {stop}. Its scores: python eval.py {given['out']}")
    with torch.device("meta"):
        blank = Llama(LlamaConfig(**c.model), methods.find(c.method, c.method_args).linear)
    if c.spectra_of not in block_matrices(blank):
        raise UserError(f"--spectra_of {c.spectra_of}: no such matrix; there are "
                        f"{', '.join(block_matrices(blank))}")
    if given.get("dry_run"):
        train = data.open_data(c.data, c.seq_len)[0] if Path(c.data).is_dir() else None
        return print(settings.describe(c, blank, train, ranks)) if rank == 0 else None
    if checkpoint is None:
        check_directory(c, "overwrite" in given)

    device = settings.join_ranks(c.device)
    corpus = open_corpus(c, rank)
    with signals_caught() as stopping:
        run(argv, c, corpus, checkpoint, stop, stopping, device, rank, ranks)
    if ranks > 1:
        dist.destroy_process_group()


def open_corpus(c, rank: int):
    """(train, validation, tokenizer or None); builds the offline corpus where that is what is missing."""
    if c.data == settings.NANO["data"] and not Path(c.data).is_dir() and rank == 0:
        print(f"building the offline corpus in {c.data}", flush=True)
        try:
            data.build_stdlib(c.data)
        except (UserError, OSError):
            if not Path(c.data).is_dir():  # if it is, another run has built it meanwhile
                raise
    if dist.is_initialized():
        dist.barrier()
    train, val, tokenizer = data.open_data(c.data, c.seq_len)
    if tokenizer != c.tokenizer:
        raise UserError(f"{c.data} was made with tokenizer {tokenizer!r}, and this run was trained with "
                        f"{c.tokenizer!r}. Make it again: python data.py text FILE... "
                        f"--tokenizer {c.tokenizer} --out {c.data}")
    found = {"train": train.tokens, "val": val.tokens}
    if vars(c).setdefault("data_tokens", found) != found:
        raise UserError(f"{c.data} holds {found} tokens, and this run was trained on {c.data_tokens}: "
                        "put those shards back")
    try:
        return train, val, data.get_tokenizer(c.tokenizer)
    except UserError as error:  # training needs none: a machine without a network can go on
        if rank == 0:
            print(f"there will be no bits per byte and no sample: {error}")
        return train, val, None


@contextmanager
def signals_caught():
    """A list that a first SIGINT or SIGTERM fills, so that the run can save and end after its step; a second
    one interrupts."""
    caught, main_thread = [], threading.current_thread() is threading.main_thread()

    def handle(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
    old = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM) if main_thread}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run(argv, c, corpus, checkpoint, stop: int, stopping: list, device, rank: int, ranks: int) -> None:
    """Train from the checkpoint, or from the start, to step `stop`, or until a signal fills `stopping`; rank
    0 logs and saves."""
    train, val, tokenizer = corpus
    method = methods.find(c.method, c.method_args)
    torch.manual_seed(c.seed)
    if checkpoint:
        model = load_model(checkpoint, device)
    else:
        with torch.device(device):
            model = Llama(LlamaConfig(**c.model), method.linear)
    optimizers = method.optimizers(model, c)
    methods.assert_assigned(model, optimizers)
    step, seconds, flops = restore(optimizers, checkpoint) if checkpoint else (0, 0.0, 0)
    network, byte_lengths, scores, diverged = wrapped(model, c, ranks), None, {}, None
    spectra = Spectra(model, c.spectra_of, optimizers, val.read([0])[0][:, :FEW_ROWS - 1].to(device))
    peak = peak_flops(torch.cuda.get_device_name()) if c.device == "cuda" else None

    if rank == 0:
        out, log = open_log(argv, c, step, ranks)
        print(settings.describe(c, model, train, ranks), flush=True)
    marker = step, seconds  # the speed of the next logged step is counted from here
    while step < stop:
        started, fraction = time.perf_counter(), schedule(step, c.steps)
        if method.before_step and method.before_step(model, optimizers, c, step):
            network = wrapped(model, c, ranks)
        loss = backward(network, train, c, step, device, rank, ranks)
        try:
            clip_gradients(model, step + 1, fraction * c.lr)
        except NonFinite as error:
            if c.on_nonfinite == "stop":
                raise
            diverged = str(error)
            break
        loss, signals = sum_over_ranks(loss, len(stopping))
        step, flops = step + 1, flops + round(model.flops_per_token() * c.tokens_per_step)
        last, validated = step == stop or signals > 0, step == c.steps or step % c.eval_every == 0
        logged = rank == 0 and (last or validated or step == 1 or step % c.spectra_every == 0)
        if logged:
            spectra.before()
        update(optimizers, fraction)
        if logged and c.device == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - started  # what follows stands outside the clock

        scores = {}
        if validated:
            if step == c.steps and tokenizer:
                byte_lengths = data.token_bytes(tokenizer)
            tokens = c.final_eval_tokens if step == c.steps else c.eval_tokens
            scores = validate(model, val, tokens, c.batch_size, c.dtype, byte_lengths)
        if logged:
            speed = (step - marker[0]) * c.tokens_per_step / (seconds - marker[1])
            marker = step, seconds
            record = {"step": step, "tokens": step * c.tokens_per_step,
                      "flops": flops, "seconds": round(seconds, 3),
                      "loss": finite(loss / ranks), "val_loss": scores.get("val_loss"),
                      "lr": fraction * c.lr, **spectra.after()}
            print(json.dumps(record), file=log, flush=True)
            print(line(record, c, speed, peak and model.flops_per_token() * speed / peak / ranks), flush=True)
        if rank == 0 and (last or step % c.save_every == 0):
            save(out / "ckpt.pt", model, optimizers, c, step, seconds, flops)
        if last:
            break
    if rank == 0:
        if diverged:
            print(json.dumps({"step": step + 1, "diverged": diverged}), file=log)
            scores = {"diverged": diverged}
        log.close()
        report(model, tokenizer, out, c, step, seconds, scores)


def restore(optimizers, checkpoint: dict) -> tuple[int, float, int]:
    """(step, seconds, FLOPs) of a checkpoint, which is emptied; its state goes to the optimizers."""
    try:
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    except BROKEN as error:
        raise UserError("the checkpoint is damaged: its optimizers do not fit "
                        f"({type(error).__name__})") from None
    done = tuple(checkpoint[key] for key in ("step", "seconds", "flops"))
    checkpoint.clear()  # the memory
    return done


def wrapped(model, c, ranks: int):
    """The model as training calls it: compiled where that is on, averaging gradients where there are
    ranks."""
    network = torch.compile(model) if c.compile else model
    if ranks == 1:
        return network
    return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)


if __name__ == "__main__":
    main()
