"""Speed and memory on this machine, as ratios of things that are timed in turn in one process.

    python -m paper.bench                             what needs a CPU; the table goes to results/bench/cpu.md
    python -m paper.bench optimizer nano              some of it, to the screen
    python -m paper.bench seconds --scale nano        a step of every method, to results/seconds/nano.json, by
                                                      which the tables have equal wall-clock
    python -m paper.bench tokenize --text FILE...
    python -m paper.bench decoding --run out/run      text from its factors, and from dense weights
    python -m paper.bench predict --mfu 0.4 --peak 989e12 --link 25e9     hours and memory on other hardware
    python -m paper.bench --gpu                       S, M, L on one CUDA device, to results/bench/gpu.md
"""

import gc
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

import data
import train
from eval import load_run
from lib.cli import Parser, UserError, command, number
from lib.methods import block_matrices, flops_per_token
from lib.optimizers import muon
from lib.ranks import choose_device, native_bf16
from model import SIZES, Llama, LlamaConfig
from paper import runs
from paper.arms import ARMS
from paper.experiments import EXPERIMENTS
from paper.output import write, write_json
from tools import machine, plan, prepare
from tools.sample import Decoder

RESULTS = runs.RESULTS / "bench"
PAPER_STEP = 2**20  # tokens of a step at the paper's sizes


def in_turn(arms: dict, rounds: int) -> dict[str, list[float]]:
    """The seconds of each arm. All are called once without a clock and then in turn, so that whatever else
    the machine does slows them alike."""
    seconds = {name: [] for name in arms}
    for measured in [False] + rounds * [True]:
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()
            for device in torch.cuda, torch.mps:
                if device.is_available():
                    device.synchronize()
            if measured:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def rows(seconds: dict, amount: float = 0, unit: str = ""):
    """The first arm beside each of the others: medians, and how many times as fast the first is."""
    def speed(name):
        taken = median(seconds[name])
        return f"{amount / taken:,.1f} {unit}/s" if amount else f"{taken:.3g} s"
    first, *others = seconds
    for other in others:
        ratio = median(b / a for a, b in zip(seconds[first], seconds[other]))
        yield row(first, speed(first), f"{other}: {speed(other)}", f"{ratio:.2f}x")


def row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(*titles) -> str:
    return f"{row(*titles)}\n|{'---|' * len(titles)}"


def stamp() -> str:
    made = machine.provenance()
    facts = {"commit": made["git"], **made["hardware"], "native bf16": native_bf16("cpu"),
             **made["versions"], "date": time.strftime("%Y-%m-%d")}
    return ", ".join(f"{key} {value}" for key, value in facts.items())


class Trainer:
    """The steps of train.py for its flags; on random tokens where only the time counts."""

    def __init__(self, flags: str, random: bool = False):
        self.c = c = train.resolve(train.parse(shlex.split(flags)))
        method, self.done = train.find_method(c.method, c.method_args), 0
        torch.manual_seed(c.seed)
        with torch.device(c.device):
            self.model = Llama(LlamaConfig(**c.model), method.linear).to(c.device)
        self.optimizers = method.optimizers(self.model, c)
        self.network, sequences = train.wrapped(self.model, c), c.tokens_per_step // c.seq_len
        if random:
            tokens = torch.randint(data.vocabulary(c.tokenizer), (sequences, c.seq_len + 1))
            self.batch = lambda: (tokens[:, :-1], tokens[:, 1:])
        else:
            split = data.open_split(c.data, "train", c.seq_len, c.tokenizer)
            self.batch = lambda: split.batch(self.done, sequences, c.seed, 0, 1)

    def backward(self):
        loss = train.backward(self.network, *self.batch(), self.c)
        norm, self.loss, _ = train.read_back(self.model, loss, False)
        train.clip_gradients(self.model, norm)

    def update(self):
        train.update(self.optimizers, train.schedule(self.done, self.c.steps))
        self.done += 1

    def step(self):
        self.backward()
        self.update()


def one_sequence(size: str, method: str = "spectron") -> Trainer:
    """Trains on the CPU."""
    return Trainer(f"--size {size} --method {method} --device cpu --batch_size 1 --tokens_per_step "
                   f"{SIZES[size].seq_len}", random=True)


def optimizer(size="S", rounds=9):
    """Spectron on the factors of a size, beside Muon on the same tensors."""
    trainer = one_sequence(size)
    spectron = trainer.optimizers[0]
    factors = spectron.param_groups[0]["params"]
    for p in factors:
        p.grad = torch.randn_like(p)
    yield from rows(in_turn({f"`Spectron.step()`, factors of {size}": spectron.step, "Muon, the same tensors":
                             muon(factors, 0.02, trainer.c).step}, rounds))


class PlainGPT(nn.Module):
    """A GPT of torch's own layers, with nano's width and depth and 3.3M parameters."""

    def __init__(self, V=320, D=256, layers=4, heads=4, length=256):
        super().__init__()
        self.token, self.position = nn.Embedding(V, D), nn.Embedding(length, D)
        layer = nn.TransformerEncoderLayer(D, heads, 4 * D, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(D), enable_nested_tensor=False)

    def forward(self, tokens, targets):
        T = tokens.size(1)
        x = self.token(tokens) + self.position.weight[:T]
        x = self.blocks(x, nn.Transformer.generate_square_subsequent_mask(T), is_causal=True)
        return F.cross_entropy((x @ self.token.weight.T).flatten(0, 1), targets.flatten())


def nano(flags="", rounds=25):
    """Whole steps of `python train.py`, of dense weights, and of a plain fp32 GPT with AdamW."""
    ours, dense = (Trainer(f"--device cpu --method {method} {flags}") for method in ("spectron", "dense"))
    gpt = PlainGPT()
    adamw = torch.optim.AdamW(gpt.parameters(), lr=1e-3)

    def plain():
        gpt(*ours.batch()).backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
    yield from rows(in_turn({f"training {ours.c.size}": ours.step, "dense weights, Muon": dense.step,
                             "a plain fp32 GPT, AdamW": plain}, rounds), ours.c.tokens_per_step, "tokens")


def sequence(size="S", rounds=5):
    """A size on one sequence beside its dense twin, and the optimizers' share of a step of 2^20 tokens."""
    ours, dense = one_sequence(size), one_sequence(size, "dense")
    name = f"{size}, forward and backward, one sequence"
    seconds = in_turn({name: ours.backward, "dense": dense.backward, "update": ours.update}, rounds)
    update, one = median(seconds.pop("update")), median(seconds[name])
    step = PAPER_STEP / ours.c.seq_len * one + update
    yield from rows(seconds)
    yield row(f"both optimizers of {size}", f"{update:.3g} s", f"a step of 2^20 tokens: {step:,.0f} s",
              f"{update / step:.3%}")


def init(size="S"):
    """The initial weights of a size, beside LAPACK's SVD of every matrix that the factors stand for."""
    with torch.device("meta"):
        shapes = [layer.product().shape for layer in block_matrices(Llama(SIZES[size])).values()]

    def svds():
        for shape in shapes:
            torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    yield from rows(in_turn({f"initial weights of {size}": lambda: Llama(SIZES[size]),
                             "LAPACK's SVD of each matrix": svds}, 1))


def start(flags="", rounds=3):
    """From `python train.py` to its first step, with the corpus there."""
    def first_step():
        with tempfile.TemporaryDirectory() as out:
            run = [sys.executable, "-u", "train.py", *shlex.split(flags), "--out", f"{out}/run"]
            with subprocess.Popen(run, stdout=subprocess.PIPE, encoding="utf-8") as process:
                if not any(line.startswith("step ") for line in process.stdout):
                    raise UserError("train.py ended before its first step")
                process.kill()
    yield from rows(in_turn({"`python train.py` to its first step": first_step, "`import torch`":
                             lambda: subprocess.run([sys.executable, "-c", "import torch"])}, rounds))


def batches(flags="", rounds=25):
    """Reading the batch of a step, beside the step."""
    trainer = Trainer(f"--device cpu {flags}")
    yield from rows(in_turn({f"reading a batch of {trainer.c.tokens_per_step:,} tokens": trainer.batch,
                             f"a step of {trainer.c.size}": trainer.step}, rounds))


def memory(size="S"):
    """Peak memory of a process that trains on one sequence a step, beside what --dry_run says. Linux only."""
    if sys.platform == "linux":
        code = (f"from paper.bench import *; t = one_sequence({size!r}); t.step(); t.step(); t.step();"
                " print(sum(plan.memory(t.c, t.model).values()), open('/proc/self/status').read())")
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        planned, found = int(ran.stdout.split()[0]), 1024 * int(re.search(r"VmHWM:\s*(\d+)", ran.stdout)[1])
        yield row(f"peak memory of training {size} on one sequence", f"{found / 1e9:.2f} GB",
                  f"--dry_run: {planned / 1e9:.2f} GB", f"{found / planned:.2f}x")


def tokenize(files: list[Path], tokenizer="gpt2", rounds=3):
    """From documents to shards on disk, beside tiktoken's encoding to lists on as many threads."""
    texts = [text for path in files for text in prepare.documents(path)]
    encoding, threads = data.get_tokenizer(tokenizer), os.cpu_count()

    def ours():
        with tempfile.TemporaryDirectory() as directory:
            prepare.write_corpus(texts, tokenizer, Path(directory) / "shards", "bench", quiet=True)

    def theirs():
        for i in range(0, len(texts), 256):
            encoding.encode_ordinary_batch(texts[i:i + 256], num_threads=threads)
    yield from rows(in_turn({f"`tools.prepare text`, {len(texts):,} documents, {threads} threads": ours,
                             "tiktoken's encode_ordinary_batch": theirs}, rounds),
                    sum(len(text.encode()) for text in texts) / 1e6, "MB")


def decoding(run: str, dtype="float32", count=60, rounds=3):
    """Greedy decoding with a KV cache, of a low-rank model and of dense weights of the same shape."""
    model = load_run(run, choose_device())[0].to(getattr(torch, dtype))
    if model.config.rank_ratio is None:
        raise UserError("decoding compares factors with dense weights, and this run has no factors: name a "
                        "low-rank run")
    like, count = model.head.weight, min(count, model.config.seq_len - 1)
    dense = Llama(replace(model.config, rank_ratio=None)).to(like.device, like.dtype)

    def decode(model, texts):
        decoder, tokens = Decoder(model, texts), torch.zeros(texts, 1, dtype=torch.int64, device=like.device)
        for _ in range(count):
            tokens = decoder(tokens).argmax(-1, keepdim=True)
    for texts in 1, 16:
        name = f"decoding {texts} text(s), {str(like.dtype).removeprefix('torch.')}, {like.device.type}"
        yield from rows(in_turn({name: lambda: decode(model, texts), "dense": lambda: decode(dense, texts)},
                                rounds), texts * count, "tokens")


def gpu(sizes=("S", "M", "L"), device="cuda", compiled=(True, False), batch=16, rounds=5):
    """Low-rank and dense models, compiled and not. A batch that does not fit is halved."""
    yield head("model", "batch", "tokens/s", "MFU", "optimizers' share of a step of 2^20 tokens",
               "first step after", "peak memory")
    todo = [(batch, *run) for run in itertools.product(sizes, ("spectron", "dense"), compiled)]
    while todo:
        sequences, *run = todo.pop(0)
        try:
            yield gpu_row(*run, device, sequences, rounds)
        except torch.OutOfMemoryError:
            todo[:0] = [(sequences // 2, *run)] if sequences > 1 else []
        gc.collect()
        torch.compiler.reset()
        torch.cuda.empty_cache()


def gpu_row(size, method, compile, device, batch, rounds) -> str:
    cuda, started, T = device == "cuda", time.perf_counter(), SIZES[size].seq_len
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(f"--size {size} --method {method} --device {device} --batch_size {batch} "
                      f"--tokens_per_step {batch * T} --{'' if compile else 'no-'}compile", random=True)
    trainer.step()
    trainer.model.norm.weight.sum().item()  # waits for the device
    first = time.perf_counter() - started
    backward, update = (median(s) for s in in_turn(
        {"backward": trainer.backward, "update": trainer.update}, rounds).values())
    step = PAPER_STEP / (batch * T) * backward + update
    peak = machine.peak_flops(torch.cuda.get_device_name()) if cuda else None
    return row(f"{size}, {method}{', compiled' * compile}", f"{batch} x {T:,}", f"{PAPER_STEP / step:,.0f}",
               f"{PAPER_STEP / step * flops_per_token(trainer.model) / peak:.1%}" if peak else "n/a",
               f"{update / step:.2%}", f"{first:.0f} s",
               f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if cuda else "n/a")


def predict(mfu: float, peak: float, link: float):
    """Hours and memory of the paper's runs, on GPUs of `peak` FLOP/s. The fp32 gradients of N parameters are
    all-reduced once a step over `link` bytes/s for each GPU, after backward:
    hours = (FLOPs / (mfu peak GPUs) + steps 8 N (GPUs - 1) / GPUs / link) / 3600."""
    yield f"MFU {mfu:.0%}, {peak / 1e12:.0f} TFLOP/s a GPU, {link / 1e9:.0f} GB/s a link\n"
    yield head("size", "parameters", "tokens", "1 GPU", "8 GPUs", "64 GPUs", "memory, 8 x 2,048 tokens")
    for size in "S", "M", "L", "2.7B":
        with torch.device("meta"):
            model = Llama(SIZES[size])
        steps, N = train.paper_steps(size, False), sum(p.numel() for p in model.parameters())
        flops = flops_per_token(model) * steps * PAPER_STEP
        hours = [(flops / (mfu * peak * gpus) + steps * 8 * N * (gpus - 1) / gpus / link) / 3600
                 for gpus in (1, 8, 64)]
        c = SimpleNamespace(dtype="bfloat16", compile=True, method="spectron", batch_size=8)
        needs = f"{sum(plan.memory(c, model).values()) / 1e9:.1f} GB"
        yield row(size, f"{N / 1e6:,.0f}M", f"{steps * PAPER_STEP / 1e9:.1f}B",
                  *(f"{h:,.2f} h" for h in hours), needs)


def seconds(size: str, rounds=9):
    """A step of one arm for each way to train that a table compares, on random tokens, without what a method
    does between steps; above nano, where all would not fit into memory, of the two of equal wall-clock."""
    scale = runs.scale_of(size)
    names = {name for e in EXPERIMENTS.values() if e.memory for name in e.arms} | {"self-guided-muon"}
    trainers = {name: Trainer(" ".join(runs.flags_of(ARMS[name], scale)), random=True)
                for name in ARMS if name in (names if scale.nano else ("spectron", "dense"))
                and ARMS[name].steps == "same"}
    times = in_turn({name: trainer.step for name, trainer in trainers.items()}, rounds)
    found = {name: float(f"{median(each):.4g}") for name, each in times.items()}
    path = runs.RESULTS / "seconds" / f"{size}.json"
    write_json(path, {"command": f"python -m paper.bench seconds --scale {size}", **machine.provenance(),
                      "tokens_per_step": scale.tokens_per_step, "seconds": found})
    yield f"{path}: " + ", ".join(f"{name} {x:g}" for name, x in found.items())


CPU = {part.__name__: part for part in (optimizer, nano, sequence, init, start, batches, memory)}


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"{', '.join(CPU)} (all of these), tokenize, decoding, predict, seconds")
    parser.add_argument("--text", nargs="+", type=Path, help="of tokenize: .txt, .jsonl, or their .gz")
    parser.add_argument("--scale", default="nano", choices=SIZES, metavar="SIZE", help="of seconds (nano)")
    parser.add_argument("--run", help="of decoding: directory of a low-rank run")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of decoding: of weights and cache (float32)")
    parser.add_argument("--gpu", action="store_true", help="measure S, M, L on a CUDA device instead")
    for flag, default, what in (("--mfu", 0.4, "model FLOPs utilization (0.4, assumed)"),
                                ("--peak", 989e12, "bf16 FLOP/s of a GPU (989e12)"),
                                ("--link", 25e9, "bytes/s between GPUs (25e9)")):
        parser.add_argument(flag, type=number(), default=default, help=f"of predict: {what}")
    args = parser.parse_args(argv)
    parts = {**CPU, "tokenize": lambda: tokenize(args.text), "seconds": lambda: seconds(args.scale),
             "predict": lambda: predict(args.mfu, args.peak, args.link), "gpu": gpu,
             "decoding": lambda: decoding(args.run, args.dtype)}
    names = ["gpu"] if args.gpu else args.names or list(CPU)
    if unknown := [name for name in names if name not in parts]:
        raise UserError(f"{unknown[0]!r} is not measured here; there is {', '.join(parts)}")
    if "gpu" in names and not torch.cuda.is_available():
        raise UserError(f"--gpu: torch {torch.__version__} finds no CUDA device; "
                        "python -m paper.bench measures the CPU")
    for name, flag, given in ("tokenize", "--text FILE", args.text), ("decoding", "--run out/run", args.run):
        if name in names and not given:
            raise UserError(f"{name} needs something to measure: python -m paper.bench {name} {flag}")
    if {"nano", "start", "batches"} & set(names) and not Path(train.NANO["data"]).is_dir():
        prepare.build_stdlib(train.NANO["data"])
    own_head = [] if names[0] in ("gpu", "predict", "seconds") else [head("what", "here", "against", "ratio")]
    lines = []
    for line in itertools.chain([f"{stamp()}\n"], own_head, *(parts[name]() for name in names)):
        print(line, flush=True)
        lines.append(line)
    if args.gpu or not args.names:
        path = RESULTS / ("gpu.md" if args.gpu else "cpu.md")
        write(path, "\n".join(lines) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
