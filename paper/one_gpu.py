"""One GPU, twelve minutes: speed at the paper's sizes, then a model of 15M parameters on bytes of real text.

    python -m tools.prepare text imdb_train.jsonl.gz --tokenizer bytes --out data/imdb-all
    python -m paper.one_gpu              prints its plan; each result is a line of results/one_gpu/rows.jsonl
    python -m paper.one_gpu --report     table.md, from the lines that are there
    python -m paper.one_gpu --tiny       all of it at a tiny size on a CPU, in a minute

What has a line is not made again, what fails says so and has none, and what would end after --minutes is left
out: it is safe to stop, and the same command goes on. Without a network; everything runs in this process, in
bf16 where the device has it.
"""

import gc
import json
import math
import shlex
import time
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F

import data
import train
from lib import norms
from lib.cli import Parser, UserError, command, number
from lib.methods import flops_per_token
from model import SIZES, Attention, SwiGLU, rotate
from paper.bench import PAPER_STEP, Trainer, in_turn
from paper.output import markdown, write
from paper.runs import RESULTS
from tools import machine


# --------------------------------------------- Two ways to compute ------------------------------------------

def together(layers, x) -> list[torch.Tensor]:
    """What each low-rank layer makes of x: one product with all their B's side by side, then each one's A."""
    B = torch.cat([layer.B for layer in layers], 1)  # (n, the sum of the ranks)
    hidden = F.linear(x, B.T).split([layer.rank for layer in layers], -1)
    return [F.linear(part, layer.A) for part, layer in zip(hidden, layers)]


class AttentionTogether(Attention):
    def forward(self, x, rope, attend):
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
                   for y in together([self.q_proj, self.k_proj, self.v_proj], x))
        return self.o_proj(attend(rotate(q, rope), rotate(k, rope), v).transpose(1, 2).flatten(2))


class SwiGLUTogether(SwiGLU):
    def forward(self, x):
        gate, up = together([self.gate_proj, self.up_proj], x)
        return self.down_proj(F.silu(gate) * up)


def side_by_side(model) -> None:
    for block in model.blocks:
        block.attention.__class__, block.ffn.__class__ = AttentionTogether, SwiGLUTogether


def compiled(model, whole: bool, backend: str):
    """As train.py does it, in one piece; or a block, whose code all blocks and runs share, and the head with
    the loss, which takes a fraction of the time."""
    if whole:
        return torch.compile(model, backend=backend)
    for block in model.blocks:
        block.compile(backend=backend)
    loss = torch.compile(loss_of, backend=backend)
    return lambda tokens, targets: loss(model.hidden(tokens), model.head.weight, targets)


def loss_of(x, head, targets):
    return F.cross_entropy(F.linear(x, head).flatten(0, 1).float(), targets.flatten())


# ------------------------------------------------- What is made ---------------------------------------------

@dataclass(frozen=True)
class Setting:
    flags: str  # of every run of train.py
    sizes: tuple
    batch: int  # sequences, of the bench
    trained: str  # flags of the model that is trained
    seconds: float  # of one run, at Spectron's speed
    eval_tokens: int
    rounds: int = 15  # of a timing
    backend: str = "inductor"


REAL = Setting("--device cuda", ("S", "M", "L"), 16,
               "--size 60M --seq_len 512 --tokens_per_step 65536 --batch_size 128", 20, 2**21)
TINY = Setting("--device cpu --dtype float32", ("nano-2x16", "nano-2x32", "nano-2x48"), 1,
               "--size nano-2x32 --seq_len 32 --tokens_per_step 256 --batch_size 8", 0.3, 2**10, 3, "eager")
METHODS = {"spectron": "--method spectron", "orthogonalize": "--no-renormalize", "adamw": "--method adamw",
           "dense": "--method dense"}
NAMES = {"spectron": "Spectron", "orthogonalize": "Muon on the factors", "adamw": "AdamW on the factors",
         "dense": "dense, Muon"}
LRS = {"spectron": (0.1, 0.2, 0.05), "orthogonalize": (0.02, 0.05, 0.01), "dense": (0.02, 0.05, 0.01),
       "adamw": (1e-3, 2e-3, 5e-4)}  # in this order, method after method
ADAM_LRS = {"spectron": (3e-3, 1e-2), "orthogonalize": (1e-2, 3e-2), "dense": (3e-3, 1e-2),
            "adamw": (1e-2, 3e-2)}  # the second is for the best lr alone
FIRST_STEP = {"S": 56, "M": 95, "L": 110}  # seconds in one piece, by results/bench/gpu.md and the layers


def parts(s: Setting, lines: dict):
    """(name, about how many seconds, what makes its line from those before), the most valuable first."""
    S, M, L = s.sizes

    def run(name, method, *args, **kwargs):
        of = lines.get("steps")
        about = 8 + (of["steps"] * of["seconds"][method] if of else s.seconds)
        return f"run {method} {name}", about, partial(trained, s, method, *args, **kwargs)
    rates = [[run(f"{lr:g}", method, lr) for method, lr in zip(LRS, lrs)] for lrs in zip(*LRS.values())]
    yield from [*bench(s, L), *bench(s, M)]
    yield "steps", 60, partial(speeds, s)
    yield from sum(rates[:2], [])
    yield from [run("seconds", method, None, seconds=True) for method in ("dense", "adamw")]
    yield from bench(s, S)
    yield from sum(rates[2:], [])
    yield from [run("adam_lr", method, None, other) for method, (_, other) in ADAM_LRS.items()]
    for size, whole in (L, S), (M, M), (S, L):
        for method in "spectron", "dense":
            yield (f"speed {size} {method} in one piece", FIRST_STEP.get(size, 10) + 10,
                   partial(speed, s, size, method, False, True))


def bench(s: Setting, size):
    for method, beside in ("spectron", False), ("dense", False), ("spectron", True):
        yield (f"speed {size} {method}" + " side by side" * beside, 30,
               partial(speed, s, size, method, beside, False))


def speed(s: Setting, size, method, beside, whole, lines) -> dict:
    """As in results/bench/gpu.md. A batch that does not fit is halved."""
    batch, measured = s.batch, None
    while measured is None:
        try:
            measured = timed(s, size, method, beside, whole, batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        if measured is None:
            batch //= 2
            free()
    return {"size": size, "method": method, "side by side": beside, "in one piece": whole, "batch": batch,
            **measured}


def timed(s: Setting, size, method, beside, whole, batch) -> dict:
    T, started = SIZES[size].seq_len, time.perf_counter()
    trainer = trainer_of(s, f"--size {size} --method {method} --batch_size {batch} "
                         f"--tokens_per_step {batch * T}", beside, whole, random=True)
    trainer.step()
    synchronize()
    first = time.perf_counter() - started
    seconds = in_turn({"backward": trainer.backward, "update": trainer.update}, s.rounds)
    backward, update = (median(x) for x in seconds.values())
    step = PAPER_STEP / (batch * T) * backward + update
    low, _, high = quantiles(seconds["backward"])
    return {"tokens/s": PAPER_STEP / step, "MFU": mfu(PAPER_STEP / step, trainer.model),
            "optimizer": update / step, "first step": first, "memory": memory(),
            "spread": (high - low) / backward}


def speeds(s: Setting, lines) -> dict:
    """The seconds of a step of each method at the size that is trained, and how many steps a run has."""
    trainers = {method: trainer_of(s, f"{s.trained} {flags}") for method, flags in METHODS.items()}
    seconds = {method: median(x) for method, x in in_turn(
        {method: trainer.step for method, trainer in trainers.items()}, 3 * s.rounds).items()}
    tokens = trainers["spectron"].c.tokens_per_step
    return {"seconds": seconds, "steps": 10 * max(1, round(s.seconds / seconds["spectron"] / 10)),
            "parameters": {m: sum(p.numel() for p in t.model.parameters()) for m, t in trainers.items()},
            "MFU": {m: mfu(tokens / seconds[m], t.model) for m, t in trainers.items()}}


def best_lr(method: str, lines: dict) -> float:
    """Of the runs that are there; the first where there is none."""
    found = {lr: lines[name]["val_loss"] for lr in LRS[method] if (name := f"run {method} {lr:g}") in lines}
    return min(found, key=lambda lr: found[lr] or math.inf, default=LRS[method][0])


def trained(s: Setting, method, lr, adam_lr=None, *, seconds=False, lines) -> dict:
    """A run of as many tokens as all, or of as many measured seconds as Spectron's has; lr None: the best."""
    lr, adam_lr = lr or best_lr(method, lines), adam_lr or ADAM_LRS[method][0]
    steps, of = lines["steps"]["steps"], lines["steps"]["seconds"]
    if seconds:
        steps = round(steps * of["spectron"] / of[method])
    trainer = trainer_of(s, f"{s.trained} {METHODS[method]} --lr {lr} --adam_lr {adam_lr} --steps {steps}")
    curve, started = [], None
    for step in range(1, steps + 1):
        trainer.step()
        if step == 1:
            synchronize()
            started = time.perf_counter()
        if not math.isfinite(trainer.loss):
            break
        if step % max(1, steps // 20) == 0:
            curve.append([step, round(trainer.loss, 4)])
    synchronize()
    took, c = time.perf_counter() - started, trainer.c
    held_out = data.open_split(c.data, "val", c.seq_len, c.tokenizer)
    with torch.compiler.set_stance("force_eager"):
        scores = train.validate(trainer.model, held_out, s.eval_tokens, c.batch_size, c.dtype,
                                data.token_bytes(data.get_tokenizer(c.tokenizer)))
    return {"method": method, "lr": lr, "adam_lr": c.adam_lr, "equal": "seconds" if seconds else "tokens",
            "steps": steps, "tokens": steps * c.tokens_per_step, "done": step,
            "seconds": took * steps / max(1, step - 1),
            **{key: scores[key] if step == steps else None for key in ("val_loss", "bits_per_byte")},
            "divisor": norms.divisors(trainer.model), "curve": curve, "memory": memory()}


def trainer_of(s: Setting, flags, beside=False, whole=False, random=False) -> Trainer:
    trainer = Trainer(f"{flags} {s.flags} --no-compile", random)
    if beside:
        side_by_side(trainer.model)
    trainer.network = compiled(trainer.model, whole, s.backend)
    return trainer


def mfu(speed: float, model) -> float | None:
    peak = machine.peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return speed * flops_per_token(model) / peak if peak else None


def memory() -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ------------------------------------------------ Lines and pages -------------------------------------------

def read(path: Path) -> dict[str, dict]:
    """By name: the lines that are there. A last one that a kill has cut is none."""
    lines = {}
    for text in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            lines[json.loads(text)["name"]] = json.loads(text)
        except ValueError:
            continue
    return lines


def make(s: Setting, where: Path, minutes: float) -> None:
    path, started, before, failed = where / "rows.jsonl", time.monotonic(), "", []
    lines = read(path)
    todo = [part for part in parts(s, lines) if part[0] not in lines]
    print(f"{len(lines)} lines are there. To do, in this order, as far as {minutes:g} minutes reach:\n"
          + "\n".join(f"  about {seconds:4.0f} s  {name}" for name, seconds, _ in todo), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, *_ in todo:
        seconds, part = next(rest for same, *rest in parts(s, lines) if same == name)  # by now measured
        late = time.monotonic() - started + seconds > 60 * minutes
        if late or name.startswith("run") and "steps" not in lines:
            print(f"left out: {name}", flush=True)
            continue
        if not (name.startswith("run") and before.startswith(("run", "steps"))):
            torch.compiler.reset()  # those share what was compiled
        free()
        before, begun = name, time.monotonic()
        try:
            made = part(lines=lines)
        except Exception:  # whatever it is, the others can still be made
            print(f"{name} failed: {traceback.format_exc()}", flush=True)
            failed.append(name)
            continue
        lines[name] = {"name": name, **made, "took": round(time.monotonic() - begun, 1),
                       **machine.provenance()}
        add(path, lines[name])
        write(where / "table.md", page(lines))
        print(f"{lines[name]['took']:6.1f} s  {name}: " + ", ".join(
            f"{key} {lines[name][key]:.4g}" for key in ("tokens/s", "MFU", "memory", "steps", "val_loss")
            if isinstance(lines[name].get(key), int | float)), flush=True)
    if failed:
        raise UserError(f"failed, as printed above: {', '.join(failed)}. The same command tries them again")


def add(path: Path, line: dict) -> None:
    """On a line of its own, also after one that a kill has cut."""
    with open(path, "a", encoding="utf-8") as file:
        cut = file.tell() and not path.read_text("utf-8").endswith("\n")
        file.write("\n" * bool(cut) + json.dumps(line) + "\n")


def page(lines: dict) -> str:
    """The table of speeds, each beside the one that it is compared with; and those of the runs."""
    def cell(x, form):
        return "" if x is None else format(x, form)
    speeds, runs = ([x for name, x in lines.items() if name.startswith(kind)] for kind in ("speed", "run"))
    rows = []
    for x in speeds:
        other = f"speed {x['size']} " + ("spectron" if x["side by side"] else "dense") \
            + " in one piece" * x["in one piece"]
        ratio = x["tokens/s"] / lines[other]["tokens/s"] if other in lines and other != x["name"] else None
        rows.append([x["name"].removeprefix("speed "), str(x["batch"]), f"{x['tokens/s']:,.0f}",
                     cell(x["MFU"], ".1%"), cell(x["memory"], ".1f"), f"{x['optimizer']:.2%}",
                     f"{x['first step']:.0f}",
                     f"{ratio:.2f} of {other.removeprefix('speed ')}" if ratio else "",
                     f"{x['spread']:.1%}"])
    hardware = dict.fromkeys(x["hardware"]["gpu"] or x["hardware"]["cpu"] for x in lines.values())
    text = (f"# One GPU\n\n{', '.join(hardware)}. `python -m paper.one_gpu`\n\n" + markdown(
        ["compiled block by block where not said", "sequences", "tokens/s", "MFU", "memory (GB)",
         "optimizers' share", "first step after (s)", "speed, as a multiple",
         "half of its timings lie within"], rows))
    if of := lines.get("steps"):
        text += "\nThe model of the runs, in turn:\n\n" + markdown(
            ["method", "parameters", "seconds of a step", "MFU"],
            [[NAMES[m], f"{of['parameters'][m]:,}", f"{of['seconds'][m]:.4f}", cell(of["MFU"][m], ".1%")]
             for m in METHODS])
    rows = [[NAMES[x["method"]], f"{x['lr']:g}", f"{x['adam_lr']:g}", x["equal"], f"{x['steps']:,}",
             f"{x['tokens'] / 1e6:,.1f}M", f"{x['seconds']:.1f}", cell(x["val_loss"], ".4f") or "diverged",
             cell(x["bits_per_byte"], ".4f"), cell(x["memory"], ".1f"),
             ", ".join(f"{d:.2f}" for d in x["divisor"] or [])] for x in runs]
    return text + "\nOne seed: less than 0.03 between two runs means nothing.\n\n" + markdown(
        ["method", "lr", "adam_lr", "equal", "steps", "tokens", "seconds", "validation loss (nats)",
         "bits per byte", "memory (GB)", "‖A‖ + ‖B‖ + 1 at the end: smallest, median, largest"], rows)


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=number(), default=12, help="what would end later is left out (12)")
    parser.add_argument("--data", help="token shards, bytes (data/imdb-all; with --tiny data/stdlib)")
    parser.add_argument("--out", type=Path, help="directory (results/one_gpu; with --tiny out/one_gpu-tiny)")
    parser.add_argument("--report", action="store_true", help="write table.md alone")
    parser.add_argument("--tiny", action="store_true", help="everything at a tiny size, on a CPU")
    args = parser.parse_args(argv)
    setting, where, out = ((TINY, "data/stdlib", Path("out/one_gpu-tiny")) if args.tiny else
                           (REAL, "data/imdb-all", RESULTS / "one_gpu"))
    where, out = args.data or where, args.out or out
    if not args.report:
        if not args.tiny and not torch.cuda.is_available():
            raise UserError(f"torch {torch.__version__} finds no CUDA device; --tiny tries it all on a CPU")
        data.open_split(where, "val", 512, "bytes")  # or the message that says how it is made
        made = replace(setting, trained=f"{setting.trained} --data {shlex.quote(where)}")
        make(made, out, args.minutes)
    if not (lines := read(out / "rows.jsonl")):
        raise UserError(f"{out}/rows.jsonl has no result: python -m paper.one_gpu, where there is a GPU")
    write(out / "table.md", page(lines))
    print(f"{out}/table.md")


if __name__ == "__main__":
    main()
