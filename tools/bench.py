"""Measurements: ratios of things timed in turn in one process, each against what it is asked to reach.

    python -m tools.bench                     all but tokenize; the table goes to results/bench/cpu.md
    python -m tools.bench optimizer nano      some of them, to the screen
    python -m tools.bench tokenize --text FILE [FILE ...]
    python -m tools.bench decoding --run out/run      tokens per second of its factors, and of dense weights
    python -m tools.bench predict --mfu 0.4 --peak 989e12 --link 25e9     hours and memory on other hardware
    python -m tools.bench --gpu               S, M, L on one CUDA device, to results/bench/gpu.md
"""

import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data
import train
from data import Parser, UserError, command
from eval import choose_device, load_run
from model import SIZES, FactorizedLinear, Llama, LlamaConfig, count_parameters
from spectron import Spectron
from tools import machine, plan, prepare
from tools.sample import Decoder

RESULTS, T = Path("results/bench"), 2048
HEAD = "| what | here | against | ratio | asked |\n|---|---|---|---|---|"


########################################
#             Instruments              #
########################################

def in_turn(arms: dict, rounds: int) -> dict[str, list[float]]:
    """The seconds of each arm, all called once unmeasured and then in turn, so that noise meets them
    alike."""
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


def faster(seconds: dict, one: str, other: str) -> float:
    """How many times as fast `one` is as `other`: the median over the rounds."""
    return median(b / a for a, b in zip(seconds[one], seconds[other]))


def row(what, here, against="", ratio="", asked="") -> str:
    return f"| {what} | {here} | {against} | {ratio} | {asked} |"


def stamp(device: str = "cpu") -> str:
    bf16 = "" if device == "cuda" else f", {'' if train.native_bf16('cpu') else 'no '}native bf16"
    name = (torch.cuda.get_device_name() if device == "cuda"
            else f"{torch.get_num_threads()} threads, {machine.cpu_name()}{bf16}")
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{name}; {versions}; {time.strftime('%Y-%m-%d')}"


class Trainer:
    """Steps of train.py in this process, after its flags."""

    def __init__(self, flags: str, tokens=None):
        self.c = train.resolve(train.parse(flags.split()))
        torch.manual_seed(0)
        self.device = torch.device(self.c.device)
        with self.device:
            self.model = Llama(LlamaConfig(**self.c.model))
        self.network = torch.compile(self.model.to(self.device)) if self.c.compile else self.model
        self.optimizers = train.METHODS[self.c.method].optimizers(self.model, self.c)
        self.data = tokens or data.open_split(self.c.data, "train", self.c.seq_len, self.c.tokenizer)
        self.done = 0

    def backward(self):
        loss = train.backward(self.network, self.data, self.c, self.done, self.device, 0, 1)
        norm, *_ = train.read_back(self.model, loss, False, 1)
        train.clip_gradients(self.model, norm, 1, 0.0)

    def update(self):
        train.update(self.optimizers, 1e-3)

    def step(self):
        self.backward()
        self.update()
        self.done += 1


class RandomTokens:
    """Stands for a split of gpt2 tokens where only the time counts."""

    def batch(self, step, windows, seed, rank, ranks):
        tokens = torch.randint(0, 50257, (windows, T + 1), generator=torch.Generator().manual_seed(step))
        return tokens[:, :-1], tokens[:, 1:]


def one_sequence(flags: str = "") -> Trainer:
    """Size S on one sequence of 2,048 tokens a step."""
    return Trainer(f"--size S --device cpu --tokens_per_step {T} --batch_size 1 {flags}", RandomTokens())


########################################
#         What is measured             #
########################################

def optimizer() -> list[str]:
    """Spectron.step on the factors of size S beside torch's Muon on the same tensors; and what it moves
    by."""
    with torch.device("meta"):
        shapes = [p.shape for pair in Llama(SIZES["S"]).factor_pairs() for p in pair]
    dtype = torch.bfloat16 if train.native_bf16("cpu") else None

    def parameters():
        made = [nn.Parameter(torch.randn(shape) * 0.03) for shape in shapes]
        for p in made:
            p.grad = torch.randn_like(p) * 1e-3
        return made
    ours, theirs = parameters(), parameters()
    spectron = Spectron(zip(ours[::2], ours[1::2]), lr=0.01, ns_dtype=dtype)
    muon = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0)
    seconds = in_turn({"Spectron": spectron.step, "Muon": muon.step}, 9)
    return [row("`Spectron.step()`, factors of S", f"{median(seconds['Spectron']):.2f} s",
                f"torch.optim.Muon, the same tensors: {median(seconds['Muon']):.2f} s",
                f"{faster(seconds, 'Spectron', 'Muon'):.2f}x faster", "1.5x"), *quality(dtype)]


def quality(dtype) -> list[str]:
    """Singular values of a first update over rho, for Gaussian gradients and for ill-conditioned ones."""
    def spread(gradient):
        A, B = nn.Parameter(torch.randn(gradient.shape)), nn.Parameter(torch.randn(8, gradient.size(1)))
        A.grad, B.grad, before = gradient, torch.randn_like(B), A.detach().double()
        step = Spectron([(A, B)], lr=0.1, ns_dtype=dtype)
        step.step()
        return torch.linalg.svdvals((before - A.detach().double()) / step.state[A]["rho"].double())
    m, r = 768, 192
    U, V = (torch.linalg.qr(torch.randn(k, r))[0] for k in (m, r))
    hard = [U * torch.logspace(0, -decades, r) @ V.T for decades in (1, 2, 4, 6)]
    hard += [torch.eye(m, r) * torch.logspace(0, -6, r), torch.ones(m, r), torch.zeros(m, r), 1e30 * U @ V.T,
             torch.randn(m, r) ** 7]
    gaussian, worst = spread(torch.randn(m, r)), torch.stack([spread(G) for G in hard])
    return [row("singular values of update / rho, Gaussian", f"{gaussian.min():.3f} to {gaussian.max():.3f}",
                "", "", "0.65 to 1.21"),
            row("the same, spectra down to 1e-6, rank 1, zero, 1e30", f"at most {worst.max():.3f}, "
                f"{'all finite' if worst.isfinite().all() else 'NOT FINITE'}", "", "", "1.21, finite")]


class PlainGPT(nn.Module):
    """What anybody would write first: GPT-2 blocks in eager PyTorch, 3.3M parameters at nano's width and
    depth."""

    def __init__(self, V=320, D=256, layers=4, heads=4, length=256):
        super().__init__()
        self.heads, self.token, self.position = heads, nn.Embedding(V, D), nn.Embedding(length, D)
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            norm1=nn.LayerNorm(D), qkv=nn.Linear(D, 3 * D), out=nn.Linear(D, D),
            norm2=nn.LayerNorm(D), wide=nn.Linear(D, 4 * D), back=nn.Linear(4 * D, D)))
            for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens, targets):
        x = self.token(tokens) + self.position.weight[:tokens.size(1)]
        for b in self.blocks:
            q, k, v = b.qkv(b.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + b.out(y.transpose(1, 2).flatten(2))
            x = x + b.back(F.gelu(b.wide(b.norm2(x)), approximate="tanh"))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def nano() -> list[str]:
    """Whole steps of `python train.py`, of its dense twin, and of a plain fp32 GPT with AdamW."""
    ours, dense, gpt = Trainer("--device cpu"), Trainer("--device cpu --method dense"), PlainGPT()
    adamw = torch.optim.AdamW(gpt.parameters(), lr=1e-3)

    def plain():
        x, y = ours.data.batch(ours.done, 16, 0, 0, 1)
        gpt(x, y).backward()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
    seconds = in_turn({"nano": ours.step, "dense": dense.step, "plain": plain}, 25)
    speed = {name: 4096 / median(s) for name, s in seconds.items()}
    size = sum(p.numel() for p in gpt.parameters()) / 1e6
    return [row("nano training", f"{speed['nano']:,.0f} tok/s",
                f"dense weights, Muon: {speed['dense']:,.0f} tok/s",
                f"{faster(seconds, 'nano', 'dense'):.2f}x", "1.3x"),
            row("nano training", f"{speed['nano']:,.0f} tok/s",
                f"plain fp32 GPT, {size:.1f}M parameters, AdamW: {speed['plain']:,.0f} tok/s",
                f"{faster(seconds, 'nano', 'plain'):.2f}x", "2x")]


def linears() -> list[str]:
    """The seven linear layers of one S block, forward and backward, without what is between them."""
    config, arms = SIZES["S"], {}
    for name in "low-rank", "dense":
        make = ((lambda n, m: FactorizedLinear(n, m, n // 4)) if name == "low-rank"
                else (lambda n, m: nn.Linear(n, m, bias=False)))
        D, hidden = config.dim, config.hidden
        layers = [make(D, D) for _ in range(4)] + [make(D, hidden), make(D, hidden), make(hidden, D)]
        x, wide = (torch.randn(T, k).bfloat16().requires_grad_() for k in (D, hidden))

        def run(layers=layers, x=x, wide=wide):
            with torch.autocast("cpu", torch.bfloat16):
                out = [*(layer(x) for layer in layers[:6]), layers[6](wide)]
            torch.autograd.backward(out, [torch.ones_like(y) for y in out])
        arms[name] = run
    seconds = in_turn(arms, 15)
    return [row("seven linears of an S block, 2,048 tokens", f"{1e3 * median(seconds['low-rank']):.0f} ms",
                f"dense: {1e3 * median(seconds['dense']):.0f} ms",
                f"{faster(seconds, 'low-rank', 'dense'):.2f}x", "1.6x (FLOPs: 1.9x)")]


def sequence() -> list[str]:
    """Size S on one sequence: beside its dense twin, where the time goes, products beside bare products, and
    the optimizer's share of a step of 2^20 tokens."""
    ours, dense = one_sequence(), one_sequence("--method dense")
    seconds = in_turn({"S": ours.backward, "dense": dense.backward}, 5)
    del dense
    taken = median(seconds["S"])
    updates = []
    for _ in range(3):
        ours.backward()
        started = time.perf_counter()
        ours.update()
        updates.append(time.perf_counter() - started)
    update = median(updates)
    shapes = [tuple(p.shape) for pair in ours.model.factor_pairs() for p in pair]
    shapes += [tuple(ours.model.head.weight.shape)]
    flops = 6 * T * sum(m * r for m, r in shapes)
    rate, big = bare_products(shapes), bare_products([(4096, 4096)], 4096)
    share = update / (2**20 / T * taken + update)
    return [row("S, forward + backward, 2,048 tokens", f"{taken:.2f} s",
                f"dense: {median(seconds['dense']):.2f} s",
                f"{faster(seconds, 'S', 'dense'):.2f}x", "report"),
            row("where it goes", where(ours.backward), "", "", "report"),
            row("products of the weights in that time", f"{flops / taken / 1e12:.3f} TFLOP/s",
                f"the same products bare: {rate / 1e12:.3f} TFLOP/s", f"{flops / taken / rate:.0%}", "60%"),
            row("", "", f"bare at 4096^3: {big / 1e12:.3f} TFLOP/s", f"{flops / taken / big:.0%}", "report"),
            row("optimizers in a step of 2^20 tokens of S", f"{update:.2f} s",
                f"512 sequences: {2**20 / T * taken:.0f} s", f"{share:.3%}", "below 0.5%")]


def bare_products(shapes, tokens: int = T) -> float:
    """FLOP/s of a layer's three products, x W^T, dy W, dy^T x, over weights of these shapes, each timed
    alone."""
    dtype, flops, seconds = torch.bfloat16 if train.native_bf16("cpu") else torch.float32, 0, 0.0
    for shape in set(shapes):
        W, (x, dy) = torch.randn(shape).to(dtype), (torch.randn(tokens, k).to(dtype) for k in reversed(shape))
        times = in_turn({"forward": lambda: x @ W.T, "dx": lambda: dy @ W, "dW": lambda: dy.T @ x}, 7)
        seconds += shapes.count(shape) * sum(median(s) for s in times.values())
        flops += shapes.count(shape) * 6 * tokens * W.numel()
    return flops / seconds


def where(run) -> str:
    """Shares of a run's CPU time by kind of operation, from torch's profiler."""
    with torch.profiler.profile() as profile:
        run()
    kinds = {"products": r"aten::(mm|addmm)$",
             "attention": r"attention", "loss": r"softmax|nll_loss",
             "copies": r"aten::(copy_|cat|clone|fill_|zero_)$"}
    rest = "elementwise and the rest"
    total, sums = 0.0, dict.fromkeys([*kinds, rest], 0.0)
    for event in profile.key_averages():
        kind = next((k for k, pattern in kinds.items() if re.search(pattern, event.key)), rest)
        sums[kind] += event.self_cpu_time_total
        total += event.self_cpu_time_total
    return ", ".join(f"{kind} {share / total:.0%}" for kind, share in sums.items())


def init() -> list[str]:
    """The initial weights of S and L, beside LAPACK's SVD of every matrix that they stand for."""
    rows = []
    for size, asked in ("S", "10 s"), ("L", "150 s"):
        started = time.perf_counter()
        model = Llama(SIZES[size])
        taken = time.perf_counter() - started
        layers = [layer for layer in model.modules() if isinstance(layer, FactorizedLinear)]
        shapes = [(layer.out_features, layer.in_features) for layer in layers]
        del model, layers
        svd = 0.0
        for shape in set(shapes):
            times = in_turn({"": lambda: torch.linalg.svd(torch.randn(shape), full_matrices=False)}, 1)
            svd += shapes.count(shape) * min(times[""])
        rows.append(row(f"initial weights of {size}", f"{taken:.1f} s", f"LAPACK's SVDs: {svd:.0f} s",
                        f"{svd / taken:.0f}x faster", asked))
    return rows


def start() -> list[str]:
    """From `python train.py` to its first step, the corpus being there."""
    times = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as out:
            started = time.perf_counter()
            process = subprocess.Popen([sys.executable, "-u", "train.py", "--out", f"{out}/run"],
                                       stdout=subprocess.PIPE, text=True)
            next((line for line in process.stdout if line.startswith("step")), None)
            times.append(time.perf_counter() - started)
            process.kill()
            process.wait()
    return [row("start of `python train.py` to its first step", f"{median(times):.1f} s", "", "", "6 s")]


def batches() -> list[str]:
    """Reading a step's batch from ten shards, beside the step."""
    trainer = Trainer("--device cpu")
    with tempfile.TemporaryDirectory() as directory:
        for i in range(10):
            tokens = np.random.randint(0, 50257, 10**7).astype(np.uint16)
            data.write_shard(Path(directory) / f"train_{i:06}.bin", tokens)
        split = data.Split(Path(directory), "train", 256, "gpt2")
        steps = iter(range(10**6))
        seconds = in_turn({"batch": lambda: split.batch(next(steps), 16, 0, 0, 1), "step": trainer.step}, 15)
    part = median(seconds["batch"]) / median(seconds["step"])
    return [row("a batch of 4,096 tokens from ten shards", f"{1e3 * median(seconds['batch']):.2f} ms",
                f"a step of nano: {1e3 * median(seconds['step']):.0f} ms", f"{part:.2%}", "1%")]


def memory() -> list[str]:
    """Peak memory of a process that trains S on one sequence a step, beside what weights, gradients, state
    and bfloat16 logits add up to."""
    code = ("from tools.bench import one_sequence; t = one_sequence(); t.step(); t.step(); t.step();"
            " print(open('/proc/self/status').read())")  # its peak is not inherited, as ru_maxrss is
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = 1024 * int(re.search(r"VmHWM:\s*(\d+)", ran.stdout)[1])
    config = SIZES["S"]
    total = count_parameters(config)
    factors = total - (2 * config.vocab_size * config.dim + (2 * config.n_layers + 1) * config.dim)
    computed = 8 * total + 4 * factors + 8 * (total - factors) + 2 * T * config.vocab_size
    return [row("peak memory of training S, batch 1 x 2048", f"{found / 1e9:.2f} GB",
                f"weights + gradients + state + logits: {computed / 1e9:.2f} GB",
                f"{found / computed:.2f}x", "1.3x")]


def tokenize(files: list[Path], tokenizer: str = "gpt2", repeats: int = 3) -> list[str]:
    """Tokens per second of write_corpus (documents in, shards on disk out) and of encode_ordinary_batch on
    the same documents and threads, in turn; and the memory that write_corpus adds at most."""
    texts = [text for path in files for text in prepare.documents(path)]
    encoding, threads = data.get_tokenizer(tokenizer), os.cpu_count()
    ours, theirs, grown = [], [], 0
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as directory:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            started = time.perf_counter()
            meta = prepare.write_corpus(texts, tokenizer, Path(directory) / "shards", "bench", quiet=True)
            ours.append((meta["train_tokens"] + meta["val_tokens"]) / (time.perf_counter() - started))
            grown = max(grown, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        started = time.perf_counter()
        tokens = sum(len(ids) for i in range(0, len(texts), 256)
                     for ids in encoding.encode_ordinary_batch(texts[i:i + 256], num_threads=threads))
        theirs.append(tokens / (time.perf_counter() - started))
    return [row(f"`tools.prepare text`, {len(texts):,} documents, {threads} threads, to shards on disk",
                f"{median(ours):,.0f} tokens/s, {grown / 1024:.0f} MB more memory",
                f"tiktoken's encode_ordinary_batch, to lists: {median(theirs):,.0f} tokens/s",
                f"{median(a / b for a, b in zip(ours, theirs)):.2f}", "0.9")]


def decoding(model: Llama, count: int = 60, rounds: int = 3) -> list[str]:
    """Tokens per second at batch 1 and 16 with a KV cache, greedy: a low-rank model, and dense weights of the
    same shape, in turn. UserError for a dense one."""
    if model.config.rank_ratio is None:
        raise UserError("decoding compares factors with dense weights, and this run has no factors: name a "
                        "low-rank run")
    config, like = model.config, model.head.weight
    dense = Llama(replace(config, rank_ratio=None)).to(like.device, like.dtype)
    arms, count = {"low-rank": model, "dense": dense}, min(count, config.seq_len - 1)
    sizes = [sum(p.numel() for p in arm.parameters()) - like.numel() for arm in arms.values()]
    lines = [f"{count} tokens, {str(like.dtype).removeprefix('torch.')}; a token reads "
             f"{sizes[0] / 1e6:.1f}M low-rank or {sizes[1] / 1e6:.1f}M dense weights, "
             f"{sizes[1] / sizes[0]:.2f}x", "",
             "| batch | low-rank, tokens/s | dense, tokens/s | ratio |", "|---|---|---|---|"]
    for batch in 1, 16:
        seconds = in_turn({name: lambda arm=arm: decode(arm, batch, count) for name, arm in arms.items()},
                          rounds)
        speeds = [f"{batch * count / median(column):,.1f}" for column in seconds.values()]
        lines.append(f"| {batch} | {' | '.join(speeds)} | {faster(seconds, 'low-rank', 'dense'):.2f}x |")
    return lines


def decode(model: Llama, rows: int, count: int) -> None:
    decoder = Decoder(model, rows)
    tokens = torch.zeros(rows, 1, dtype=torch.int64, device=decoder.context.device)
    for _ in range(count):
        tokens = decoder(tokens).argmax(-1, keepdim=True)


########################################
#        GPUs, measured or not         #
########################################

def gpu(sizes=("S", "M", "L"), device="cuda", rounds=5, batch=16) -> list[str]:
    """tokens/s, MFU, the optimizers' share of a step of 2^20 tokens, peak memory, time to the first step; for
    factorized and dense, compiled and not. Then nano on this device beside nano on the CPU."""
    rows, peak = [], machine.peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    for size in sizes:
        for method in "spectron", "dense":
            for compiled in (True, False) if device == "cuda" else (False,):
                flags = (f"--size {size} --method {method} --device {device} --batch_size {batch} "
                         f"--tokens_per_step {batch * T} --{'' if compiled else 'no-'}compile")
                started = time.perf_counter()
                trainer = Trainer(flags, RandomTokens())
                trainer.step()
                next(trainer.model.parameters()).sum().item()  # waits for the device
                first = time.perf_counter() - started
                seconds = in_turn({"backward": trainer.backward, "step": trainer.step}, rounds)
                backward, update = median(seconds["backward"]), median(
                    b - a for a, b in zip(seconds["backward"], seconds["step"]))
                speed = 2**20 / (2**20 / batch / T * backward + update)
                mfu = f"{speed * trainer.model.flops_per_token() / peak:.1%}" if peak else "n/a"
                used = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
                rows.append(row(f"{size}, {method}{', compiled' if compiled else ''}",
                                f"{speed:,.0f} tok/s, MFU {mfu}",
                                f"optimizers {update / (2**20 / speed):.2%} of a step; "
                                f"first step after {first:.0f} s", f"{used:.1f} GB", ""))
                del trainer
                if device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
    losses = {name: nano_loss(name) for name in ("cpu", device)}
    return rows + [row("nano, validation loss after 100 steps", f"{losses[device]:.4f}",
                       f"on the CPU: {losses['cpu']:.4f}", "", "the same, within noise")]


def nano_loss(device: str) -> float:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "train.py", "--steps", "100", "--device", device, "--out", f"{out}/run"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(re.search(r"^val_loss: (.*)", printed, re.M)[1])


def predict(mfu: float, peak: float, link: float) -> list[str]:
    """Hours and memory of the paper's runs: hours = (FLOPs / (mfu peak GPUs) + steps x all-reduce) / 3600,
    all-reduce = 8 N (GPUs - 1) / GPUs bytes over a link of `link` bytes/s per GPU, not hidden behind
    backward."""
    rows = [f"MFU {mfu:.0%}, {peak / 1e12:.0f} TFLOP/s a GPU, {link / 1e9:.0f} GB/s a link\n",
            "| size | parameters | tokens | 1 GPU | 8 GPUs | 64 GPUs | memory a GPU, 8 x 2,048 tokens |",
            "|---|---|---|---|---|---|---|"]
    for size in "S", "M", "L", "2.7B":
        config, steps = SIZES[size], train.paper_steps(size, False)
        with torch.device("meta"):
            model = Llama(config)
        N = sum(p.numel() for p in model.parameters())

        def hours(gpus):
            compute = model.flops_per_token() * steps * 2**20 / (mfu * peak * gpus)
            return (compute + steps * 8 * N * (gpus - 1) / gpus / link) / 3600
        c = SimpleNamespace(dtype="bfloat16", model=asdict(config), method="spectron", batch_size=8,
                            seq_len=T)
        rows.append(f"| {size} | {N / 1e6:,.0f}M | {steps * 2**20 / 1e9:.1f}B | "
                    + " | ".join(f"{hours(gpus):,.2f} h" for gpus in (1, 8, 64))
                    + f" | {plan.memory(c, model).rsplit(';')[-1].strip()} |")
    return rows


ALL = {f.__name__: f for f in (optimizer, nano, linears, sequence, init, start, batches, memory)}


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"{', '.join([*ALL, 'tokenize', 'decoding', 'predict'])} (all)")
    parser.add_argument("--text", nargs="+", type=Path, default=[],
                        help="of tokenize: .txt, .jsonl, or their .gz")
    parser.add_argument("--run", help="of decoding: directory of a low-rank run")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of decoding: of weights and cache (float32)")
    parser.add_argument("--gpu", action="store_true", help="measure S, M, L on a CUDA device instead")
    parser.add_argument("--mfu", type=float, default=0.4,
                        help="of predict: model FLOPs utilization (0.4, assumed)")
    parser.add_argument("--peak", type=float, default=989e12,
                        help="of predict: bf16 FLOP/s of a GPU (989e12)")
    parser.add_argument("--link", type=float, default=25e9, help="of predict: bytes/s between GPUs (25e9)")
    args = parser.parse_args(argv)
    if "decoding" in args.names and not args.run:
        raise UserError("decoding needs a run: --run out/<run>")
    known = {**ALL, "tokenize": lambda: tokenize(args.text),
             "decoding": lambda: decoding(load_run(args.run, choose_device())[0]
                                          .to(getattr(torch, args.dtype))),
             "predict": lambda: predict(args.mfu, args.peak, args.link)}
    if unknown := [name for name in args.names if name not in known]:
        raise UserError(f"{unknown[0]!r} is not measured here; there is {', '.join(known)}")
    if args.gpu and not torch.cuda.is_available():
        raise UserError(f"--gpu: torch {torch.__version__} finds no CUDA device; "
                        "python -m tools.bench measures the CPU")
    if "tokenize" in args.names and not args.text:
        raise UserError("tokenize needs documents: --text FILE")
    names = ["gpu"] if args.gpu else args.names or [*ALL, *(["tokenize"] if args.text else [])]
    if {"nano", "start", "batches", "gpu"} & set(names) and not Path(train.NANO["data"]).is_dir():
        prepare.build_stdlib(train.NANO["data"])
    own_table = set(names) <= {"predict", "decoding"}
    lines = [stamp("cuda" if args.gpu else "cpu"), "", *([] if own_table else [HEAD])]
    print("\n".join(lines), flush=True)
    for name in names:
        rows = gpu() if name == "gpu" else known[name]()
        print("\n".join(rows), flush=True)
        lines += rows
    if args.gpu or not args.names:
        path = RESULTS / ("gpu.md" if args.gpu else "cpu.md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
