"""The runs behind the paper's tables and figures: how each is made, once.

A run is train.py as a user calls it. Its log, thinned, becomes a line of results/runs/<scale>.jsonl, from
which every table and figure is made. A run that has a line is not made again, and one that was stopped goes
on from its checkpoint in out/paper. Each method has as many learning rates as those beside it; its best one
then gets the other seeds.
"""

import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

import data
import train
from eval import load_run, validate
from lib import methods
from lib.cli import UserError
from lib.files import lock
from model import NANO_SIZES, Llama, LlamaConfig
from paper import logs
from paper.methods import METHODS, Method
from paper.logs import Log
from paper.output import read_json
from tools.plot import read_log

RESULTS, OUT = Path("results"), Path("out/paper")
SERIES = [float(f"{m}e{e}") for e in range(-9, 6) for m in (1, 2, 5)]  # learning rates: 1, 2, 5, 10, ...
MOST_LRS = 15  # of a method: around each method's own, the series reaches as far
WIDER = 2  # times that a grid may grow where its best is at the edge


@dataclass(frozen=True)
class Scale:
    """Where the methods are compared. Its name is that of its files: nano-imdb-bytes, S-300x131072."""
    given: dict = field(hash=False)  # the flags of paper.reproduce that make it
    size: str
    name: str
    steps: int | None  # None: the paper's
    tokens_per_step: int
    data: str
    lrs: int  # learning rates of each method
    seeds: int
    flags: tuple = ()
    halves: bool = False  # whether a log has the final loss on each half of the validation text
    kept: int = 100  # steps of a log, beside those that were validated
    dtype: str = "float32"  # at nano, so that a laptop and a GPU make the same run

    @property
    def nano(self) -> bool:
        return self.size in NANO_SIZES


def scale_of(scale: str, data=None, steps=None, tokens_per_step=None, lrs=None, seeds=3) -> Scale:
    """A scale from what the user gave, a size and what differs from its own, which goes into the name."""
    if lrs and lrs > MOST_LRS:
        raise UserError(f"--lrs {lrs}: at most {MOST_LRS}, which span more than four powers of ten")
    given = {"scale": scale if scale != "nano" else None, "data": data, "steps": steps,
             "tokens_per_step": tokens_per_step, "lrs": lrs, "seeds": seeds if seeds != 3 else None}
    nano, default = scale in NANO_SIZES, train.new_run({"size": scale}, "cpu")
    tokens = tokens_per_step or default.tokens_per_step
    name = scale + (f"-{Path(data).name}" if data else "")
    if steps or tokens_per_step:
        name += f"-{steps or 'paper'}x{tokens}"
    return Scale(given, scale, name, steps or (200 if nano else None), tokens, data or default.data,
                 lrs or (6 if nano else 3), seeds)


def steps_of(name: str, scale: Scale) -> int:
    """Those of the scale, or as many as cost what the method's twin costs."""
    method = METHODS[name]
    if method.budget:
        return max(1, round(method.budget / flops_per_token(name, scale) / scale.tokens_per_step))
    dense = "--method dense" in method.flags
    steps = scale.steps or train.paper_steps(method.size or scale.size, dense and method.steps == "flops")
    # The paper's own steps are equal in FLOPs already.
    if method.steps == "same" or scale.steps is None and method.steps == "flops":
        return steps
    of = {"flops": flops_per_token, "time": seconds_per_step}[method.steps]
    twin, own = of(method.twin, scale), of(name, scale)
    if not (twin and own):
        raise UserError(f"nobody has timed {name!r}: python -m paper.bench seconds --scale {scale.size}")
    return max(1, round(steps * twin / own))


@cache
def flops_per_token(name: str, scale: Scale) -> float:
    """Of the method's first step; of a guided run, whose guide is there for half of the steps, the mean."""
    c = train.resolve(train.parse(flags_of(METHODS[name], scale)))
    method = train.find_method(c.method, c.method_args)
    with torch.device("meta"):
        first = method.flops_per_token(Llama(LlamaConfig(**c.model), method.linear))
        plain = methods.flops_per_token(Llama(LlamaConfig(**c.model)))
    return (first + plain) / 2 if c.method == "self-guided" else first


def seconds_per_step(name: str, scale: Scale) -> float | None:
    """Of a method with these flags, as paper.bench timed it beside the others; None where it has not."""
    timed = (read_json(RESULTS / "seconds" / f"{scale.size}.json") or {}).get("seconds", {})
    return next((timed[other] for other in timed if METHODS[other].flags == METHODS[name].flags), None)


def reproduce(name: str, scale: Scale) -> str:
    """The command that makes an experiment."""
    given = [f"--{key} {value}" for key, value in scale.given.items() if value is not None]
    return " ".join(["python -m paper.reproduce", name, *given])


def flags_of(method: Method, scale: Scale) -> list[str]:
    """What every run of a method has in common."""
    return ["--size", method.size or scale.size, *method.flags.split(), "--data", scale.data,
            "--tokens_per_step", str(scale.tokens_per_step), *scale.flags]


@dataclass(frozen=True)
class Run:
    method: str
    lr: float
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.method}-lr{self.lr:g}-seed{self.seed}"


def pack_of(scale: Scale) -> Path:
    return RESULTS / "runs" / f"{scale.name}.jsonl"


def log_of(run: Run, scale: Scale) -> Log | None:
    """What is kept of a run; None where it was not made."""
    return logs.get(pack_of(scale), run.name)


def scores_of(run: Run, scale: Scale) -> Path:
    """Where eval.py puts what a run scores."""
    return RESULTS / "runs" / scale.name / f"{run.name}.scores.json"


def is_finished(log: Path) -> bool:
    try:
        return Log(*read_log(log)).is_finished
    except UserError:  # none, or a kill has left no more than its beginning
        return False


def command(run: Run, scale: Scale) -> list[str]:
    """What a user would type."""
    steps = steps_of(run.method, scale)
    gpus = 1 if scale.nano else torch.cuda.device_count()
    python = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] \
        if gpus > 1 else [sys.executable]
    often = ["--eval_every", str(math.ceil(steps / (8 if scale.nano else 20)))]
    if scale.nano:
        often += ["--save_every", str(math.ceil(steps / 2)), "--eval_tokens", "16384", "--dtype", scale.dtype]
    if scale.steps and not scale.nano:  # shortened: validation should not take longer than training
        often += ["--eval_tokens", "1048576", "--final_eval_tokens", "10485760"]
    out = OUT / scale.name / run.name
    return [*python, "train.py", *flags_of(METHODS[run.method], scale), "--lr", f"{run.lr:g}",
            "--seed", str(run.seed), "--steps", str(steps), *often, "--on_nonfinite", "record",
            "--out", str(out), "--resume", "auto"]


def make(run: Run, scale: Scale, children: list) -> None:
    """Train, unless it is done; then keep the thinned log."""
    log = OUT / scale.name / run.name / "log.jsonl"
    if not is_finished(log):
        env = os.environ | ({"OMP_NUM_THREADS": "1"} if scale.nano else {})
        # a session of its own: Ctrl-C reaches it once, from make_all
        child = subprocess.Popen(command(run, scale), stdout=subprocess.DEVNULL if scale.nano else None,
                                 stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)
        children.append(child)
        said = child.communicate()[1]
        if not is_finished(log):
            raise UserError(f"{run.name} did not come to its end (exit code {child.returncode}). What was "
                            f"done is kept: the same command goes on.\n{' '.join(command(run, scale))}\n"
                            f"{said.strip()}")
    records = [json.loads(row) for row in log.read_text("utf-8").splitlines()]
    if scale.halves and records[-1].get("val_loss") is not None:
        records[-1]["halves"] = losses_of_halves(log.parent)
    logs.add(pack_of(scale), run.name, logs.thinned(records, scale.kept))


def losses_of_halves(out: Path) -> list[float]:
    """The loss of a run's last checkpoint on each half of the windows of the validation text."""
    model, _, config = load_run(out)
    split = data.open_split(config["data"], "val", config["seq_len"], config["tokenizer"])
    T, found = config["seq_len"], []
    for size in split.windows // 2 * T, split.windows * T:
        found.append(validate(model, split, size, config["batch_size"], config["dtype"]))
    first, whole = found
    rest = (whole["val_loss"] * whole["val_tokens"] - first["val_loss"] * first["val_tokens"]) / (
        whole["val_tokens"] - first["val_tokens"])
    return [float(f"{loss:.6g}") for loss in (first["val_loss"], rest)]


def make_all(runs: list[Run], scale: Scale) -> None:
    """Those that are missing; small models side by side, a thread each, which is faster. Interrupted, it lets
    those that run save, and the same command goes on."""
    missing = [run for run in dict.fromkeys(runs) if not log_of(run, scale)]
    if not missing:
        return
    workers, children = min(os.cpu_count(), 16) if scale.nano else 1, []
    with alone(OUT / scale.name), ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(make, run, scale, children): run for run in missing}
        try:
            for i, (future, run) in enumerate(futures.items()):
                future.result()
                loss = log_of(run, scale).final_loss
                print(f"{i + 1}/{len(missing)}  {run.name}: {'diverged' if loss is None else f'{loss:.4f}'}",
                      flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.terminate()
            raise


@contextmanager
def alone(where: Path):
    """UserError where another process makes runs in this directory; SIGTERM is as Ctrl-C meanwhile."""
    where.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(where / "lock")
    except BlockingIOError:
        raise UserError(f"another process makes runs in {where}: wait for it, or stop it") from None
    with held:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def score(run: Run, scale: Scale, tasks: tuple) -> None:
    """The run's accuracies, by eval.py."""
    kept = scores_of(run, scale)
    kept.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "eval.py", str(OUT / scale.name / run.name), "--tasks", ",".join(tasks),
               "--json", str(kept)]
    if not kept.is_file() and subprocess.run(command).returncode:
        raise UserError(f"no scores of {run.name} (above is why); the same command goes on")


def lrs_of(name: str, scale: Scale) -> list[float]:
    """The learning rates that a method starts from."""
    if not METHODS[name].swept:
        return [METHODS[name].lr]
    start = SERIES.index(METHODS[name].lr) - (not scale.nano) - (scale.lrs - 1) // 2
    return SERIES[start:start + scale.lrs]


def tried(name: str, scale: Scale) -> tuple[dict[float, float | None], list[float]]:
    """(what the learning rates came to with seed 0, those that are still to be made): those that the method
    starts from, and beyond an edge that is best at most WIDER more, whatever else was run."""
    found, wanted = {}, lrs_of(name, scale)
    for _ in range(1 + WIDER * METHODS[name].swept):
        there = {lr: log.final_loss for lr in wanted if (log := log_of(Run(name, lr), scale))}
        found = dict(sorted((found | there).items()))
        if missing := [lr for lr in wanted if lr not in there]:
            return found, missing
        if not (wider := next_lr(found)):
            break
        wanted = [wider]
    return found, []


def best_of(losses: dict) -> float | None:
    """The learning rate of the lowest loss; None where every run diverged."""
    return min((lr for lr in losses if losses[lr] is not None), key=losses.get, default=None)


def next_lr(losses: dict) -> float | None:
    """The learning rate beyond the edge, where the best is there."""
    best, lowest, highest = best_of(losses), SERIES.index(min(losses)), SERIES.index(max(losses))
    if best in (None, SERIES[lowest]):
        return SERIES[lowest - 1]
    return SERIES[highest + 1] if best == SERIES[highest] else None


def sweep(names: tuple, scale: Scale) -> None:
    """Every method over its learning rates, then its best with the other seeds."""
    while missing := [Run(name, lr) for name in names for lr in tried(name, scale)[1]]:
        make_all(missing, scale)
    best = {name: best_of(tried(name, scale)[0]) for name in names}
    make_all([Run(name, lr, seed) for name, lr in best.items() if lr for seed in range(scale.seeds)], scale)


def estimate(names: tuple, scale: Scale) -> str:
    """What is still to be made: runs, and their FLOPs."""
    made = {name: tried(name, scale) for name in names}
    missing = [name for name in names for _ in made[name][1]]
    first = len(missing) + sum(len(found) for found, _ in made.values())
    later = [name for name in names for seed in range(1, scale.seeds)
             if not log_of(Run(name, best_of(made[name][0]) or 0, seed), scale)]
    if not missing and not later:
        return "all runs are there"
    flops = 0.0
    for name in missing + later:
        untimed = METHODS[name].steps == "time" and not seconds_per_step(name, scale)  # then about its twin's
        steps = steps_of(METHODS[name].twin if untimed else name, scale)
        flops += flops_per_token(name, scale) * scale.tokens_per_step * steps
    return (f"{first - len(missing)} of {first} runs are there; {len(missing)} and up to {len(later)} "
            f"with other seeds are to be made, {flops:.2e} FLOPs")
