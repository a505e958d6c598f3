"""The runs behind the paper's tables and figures: which there are, and how each is made, once.

A run is train.py as a user calls it. Its log, thinned, goes to
results/runs/<scale>/<arm>-lr<lr>-seed<seed>.jsonl and feeds every table and figure that wants it; a run whose
log is there is not made again, and one that was stopped goes on from its checkpoint in out/paper. Each arm
sees the same data in the same order, the same schedule, clipping and adam_lr, and as many learning rates as
the arms beside it; its best one then gets the other seeds.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import methods
import settings
from cli import UserError
from model import NANO_SIZES, SIZES, Llama
from plot import read_log

RESULTS, OUT = Path("results"), Path("out/paper")
SERIES = [float(f"{m}e{e}") for e in range(-6, 3) for m in (1, 2, 5)]  # learning rates: 1, 2, 5, 10, ...
FEW = 3  # learning rates of an arm that is one of many, or costs much
WIDER = 2  # times that a grid may grow where its best is at the edge
KEPT = 100  # steps of a log, beside those that were validated


########################################
#                 Arms                 #
########################################

@dataclass(frozen=True)
class Arm:
    """One line of a table: how it is trained, and the learning rate around which its grid lies."""
    label: str
    flags: str = ""
    lr: float = 0.1  # at nano; above, one place lower in the series
    steps: str = "same"  # or "flops", "time": as many as cost what `twin` costs
    twin: str = ""
    size: str = ""  # where it is not that of the scale


ARMS = {
    "spectron": Arm("Spectron"),
    "orthogonalize": Arm("orthogonalization only (Muon)", "--no-renormalize", 0.02),
    "renormalize": Arm("renormalization only", "--no-orthogonalize", 0.05),
    "neither": Arm("neither (SGD)", "--no-orthogonalize --no-renormalize", 1.0),
    "adamw": Arm("AdamW", "--method adamw", 1e-3),
    "self-guided": Arm("self-guided, AdamW", "--method self-guided", 1e-3),
    "self-guided-muon": Arm("self-guided, Muon", "--method self-guided --method_args optimizer=muon", 0.02),
    "self-guided-stochastic": Arm("self-guided, stochastic",
                                  "--method self-guided --method_args stochastic=true", 1e-3),
    "dense": Arm("dense, Muon", "--method dense", 0.02),
    "dense-adamw": Arm("dense, AdamW", "--method dense-adamw", 1e-3),
    "rank-0.125": Arm("rank ratio 0.125", "--rank_ratio 0.125"),
    "rank-0.4": Arm("rank ratio 0.4", "--rank_ratio 0.4"),
    "spectron-ffn": Arm("Spectron", "--factorize ffn"),
    "adamw-ffn": Arm("AdamW", "--method adamw --factorize ffn", 1e-3),
    "self-guided-ffn": Arm("self-guided, AdamW", "--method self-guided --factorize ffn", 1e-3),
    "dense-flops": Arm("dense, equal FLOPs", "--method dense", 0.02, "flops", "spectron"),
    "dense-time": Arm("dense, equal wall-clock", "--method dense", 0.02, "time", "spectron"),
}
LADDERS = {"nano": list(NANO_SIZES), "paper": ["134M", "500M", "780M"]}
for _size in [size for ladder in LADDERS.values() for size in ladder if size != "nano"]:
    ARMS[f"spectron@{_size}"] = Arm(f"Spectron {_size}", size=_size)
    ARMS[f"dense@{_size}"] = Arm(f"dense {_size}", "--method dense", 0.02, "flops", f"spectron@{_size}",
                                 _size)


########################################
#                Scales                #
########################################

@dataclass(frozen=True)
class Scale:
    """Where the arms are compared. Its name is that of its directories: nano-imdb, S-300x131072."""
    size: str
    name: str
    steps: int | None  # None: the paper's
    tokens_per_step: int
    data: str
    lrs: int  # learning rates of each arm
    seeds: int
    flags: tuple = ()

    @property
    def nano(self) -> bool:
        return self.size in NANO_SIZES


def scale_of(size: str, data=None, steps=None, tokens_per_step=None, lrs=None, seeds=3) -> Scale:
    """A scale from what the user gave; what differs from the size's own goes into its name."""
    nano = size in NANO_SIZES
    default = settings.NANO if nano else settings.PAPER
    shortened = f"-{steps or 'paper'}x{tokens_per_step or default['tokens_per_step']}" \
        if steps or tokens_per_step else ""
    name = size + (f"-{Path(data).name}" if data else "") + shortened
    return Scale(size, name, steps or (200 if nano else None), tokens_per_step or default["tokens_per_step"],
                 data or default["data"], lrs or (6 if nano else 3), seeds)


def steps_of(arm: Arm, scale: Scale) -> int:
    """Optimizer steps of an arm: those of the scale, or as many as cost what its twin costs."""
    method = methods.METHODS["dense" if "--method dense" in arm.flags else "spectron"]
    steps = scale.steps or settings.paper_steps(arm.size or scale.size, method.dense and arm.steps == "flops")
    if arm.steps == "same" or scale.steps is None and arm.steps == "flops":  # the paper's are equal in FLOPs
        return steps
    cost = {"flops": flops_per_token, "time": seconds_per_step}[arm.steps]
    return max(1, round(steps * cost(ARMS[arm.twin], scale) / cost(arm, scale)))


def flops_per_token(arm: Arm, scale: Scale) -> float:
    """Of a model that is not made; a guide counts for the half of the steps that it is there."""
    c = settings.resolve(settings.parse(flags_of(arm, scale), ""), 1)
    with torch.device("meta"):
        model = Llama(replace(SIZES[c.size], **c.model), methods.find(c.method, c.method_args).linear)
    guides = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".W"))
    return model.flops_per_token() - 3 * guides


def seconds_per_step(arm: Arm, scale: Scale) -> float:
    """The median over the logs of its pacemaker."""
    name, times = pacemaker(arm), []
    for log in directory(scale).glob(f"{name}-lr*.jsonl"):
        records = read_log(log)[1]
        if len(records) > 1 and records[-1].get("seconds"):
            times.append((records[-1]["seconds"] - records[0]["seconds"])
                         / (records[-1]["step"] - records[0]["step"]))
    if not times:
        raise UserError(f"equal wall-clock needs a run of {name!r}: python -m paper.reproduce fig12 --scale "
                        f"{scale.size}")
    return statistics.median(times)


def pacemaker(arm: Arm) -> str:
    """The arm that is trained alike, for the steps of its scale."""
    return next(name for name, other in ARMS.items() if other.flags == arm.flags and other.steps == "same")


def flags_of(arm: Arm, scale: Scale) -> list[str]:
    """What every run of an arm has in common."""
    data = ["--data", scale.data] if Path(scale.data).is_dir() else []
    return ["--size", arm.size or scale.size, *arm.flags.split(), *data, *scale.flags,
            "--tokens_per_step", str(scale.tokens_per_step)]


########################################
#                 Runs                 #
########################################

@dataclass(frozen=True)
class Run:
    arm: str
    lr: float
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.arm}-lr{self.lr:g}-seed{self.seed}"


def directory(scale: Scale) -> Path:
    return RESULTS / "runs" / scale.name


def log_of(run: Run, scale: Scale) -> Path:
    return directory(scale) / f"{run.name}.jsonl"


def final_loss(log: Path) -> float | None:
    """The validation loss after the last step; None for a run that diverged: its gradient or its loss ceased
    to be finite, or it ended worse than a model that knows nothing, which has ln V nats."""
    header, records = read_log(log)
    last = records[-1] if records else {}
    loss = last.get("val_loss")
    return loss if loss is not None and loss < math.log(header["config"]["model"]["vocab_size"]) else None


def is_finished(log: Path) -> bool:
    if not log.is_file():
        return False
    header, records = read_log(log)
    return bool(records) and ("diverged" in records[-1]
                              or records[-1]["step"] == header["config"]["steps"])


def command(run: Run, scale: Scale) -> list[str]:
    """What a user would type."""
    arm, steps = ARMS[run.arm], steps_of(ARMS[run.arm], scale)
    gpus = torch.cuda.device_count()
    python = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] \
        if gpus > 1 else [sys.executable]
    often = ["--eval_every", str(math.ceil(steps / 8)), "--save_every", str(math.ceil(steps / 2)),
             "--eval_tokens", "16384"] if scale.nano else ["--eval_every", str(math.ceil(steps / 20))]
    out = OUT / scale.name / run.name
    return [*python, "train.py", *flags_of(arm, scale), "--lr", f"{run.lr:g}", "--seed", str(run.seed),
            "--steps", str(steps), *often, "--on_nonfinite", "record", "--out", str(out),
            "--resume" if (out / "ckpt.pt").is_file() else "--overwrite"]


def make(run: Run, scale: Scale, threads: int | None) -> None:
    """Train, unless it is done; then keep the thinned log."""
    log = OUT / scale.name / run.name / "log.jsonl"
    if not is_finished(log):
        env = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        done = subprocess.run(command(run, scale), capture_output=True, text=True, env=env)
        if not is_finished(log):
            raise UserError(f"{run.name} did not come to its end (exit code {done.returncode}). What was "
                            f"done is kept: the same command goes on.\n{' '.join(command(run, scale))}\n"
                            f"{done.stderr.strip()}")
    kept = log_of(run, scale)
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(".part")
    part.write_text("".join(thinned(log.read_text().splitlines())))
    os.replace(part, kept)


def thinned(rows: list[str]) -> list[str]:
    """The lines of a log with every nth step, those that were validated and the last, numbers to 6 digits;
    and where each part of the run was made."""
    records = [json.loads(row) for row in rows]
    every = max(1, len(records) // KEPT)
    return [json.dumps({key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in record.items()})
            + "\n" for i, record in enumerate(records)
            if "config" in record or i % every == 1 % every or i == len(records) - 1
            or record.get("val_loss") is not None]


def workers(scale: Scale) -> int:
    return os.cpu_count() if scale.nano and not torch.cuda.is_available() else 1


def make_all(runs: list[Run], scale: Scale) -> None:
    """Those that are missing; on a CPU side by side, a thread each, which is 1.2 times as fast here as one
    after the other with all threads."""
    missing = [run for run in runs if not log_of(run, scale).is_file()]
    threads = 1 if workers(scale) > 1 else None
    with ThreadPoolExecutor(workers(scale)) as pool:
        futures = {pool.submit(make, run, scale, threads): run for run in missing}
        try:
            for i, (future, run) in enumerate(futures.items()):
                future.result()
                loss = final_loss(log_of(run, scale))
                print(f"{i + 1}/{len(missing)}  {run.name}: {'diverged' if loss is None else f'{loss:.4f}'}",
                      flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def score(run: Run, scale: Scale, tasks: tuple) -> None:
    """The run's accuracies, by eval.py, beside its log."""
    kept = log_of(run, scale).with_suffix(".scores.json")
    if not kept.is_file():
        subprocess.run([sys.executable, "eval.py", str(OUT / scale.name / run.name),
                        "--tasks", ",".join(tasks), "--json", str(kept)], check=True)


########################################
#             The protocol             #
########################################

def lrs_of(name: str, scale: Scale, few: bool = False) -> list[float]:
    """The learning rates that an arm starts from."""
    count = min(FEW, scale.lrs) if few else scale.lrs
    start = SERIES.index(ARMS[name].lr) - (not scale.nano) - (count - 1) // 2
    return SERIES[start:start + count]


def tried(name: str, scale: Scale) -> dict[float, float | None]:
    """What each learning rate came to with seed 0."""
    runs = [Run(name, lr) for lr in SERIES]
    return {run.lr: final_loss(log_of(run, scale)) for run in runs if log_of(run, scale).is_file()}


def best_lr(name: str, scale: Scale) -> float | None:
    """None where every run diverged."""
    losses = {lr: loss for lr, loss in tried(name, scale).items() if loss is not None}
    return min(losses, key=losses.get, default=None)


def beyond(name: str, scale: Scale) -> list[Run]:
    """The next learning rate, where the best is at the edge of the grid."""
    lrs, best = list(tried(name, scale)), best_lr(name, scale)
    if best in (None, lrs[0]):
        return [Run(name, SERIES[SERIES.index(lrs[0]) - 1])]
    return [Run(name, SERIES[SERIES.index(lrs[-1]) + 1])] if best == lrs[-1] else []


def sweep(names: list[str], scale: Scale, few: tuple = (), single: tuple = ()) -> None:
    """Every arm over its learning rates, then its best lr with the other seeds; those in `few` over three
    learning rates, those in `single` with one seed."""
    timed = [name for name in names if ARMS[name].steps == "time"]
    make_all([Run(name, ARMS[name].lr) for name in map(pacemaker, map(ARMS.get, timed))], scale)
    for some in [name for name in names if name not in timed], timed:  # which wait for their twins' speed
        make_all([Run(name, lr) for name in some for lr in lrs_of(name, scale, name in few)], scale)
    for _ in range(WIDER):
        make_all([run for name in names for run in beyond(name, scale)], scale)
    make_all([Run(name, best_lr(name, scale), seed) for name in names if name not in single
              for seed in range(scale.seeds) if best_lr(name, scale) is not None], scale)


def estimate(names: tuple, scale: Scale, few: bool = False, single: tuple = ()) -> str:
    """What is still to be made: runs, FLOPs, and the time that they take at the rate of the runs that are
    there."""
    def cost(arm):  # equal wall-clock is not known before the runs: about that of its twin
        steps = steps_of(replace(arm, steps="same") if arm.steps == "time" else arm, scale)
        return flops_per_token(arm, scale) * scale.tokens_per_step * steps
    first = [Run(name, lr) for name in names for lr in lrs_of(name, scale, few)]
    missing = [run for run in first if not log_of(run, scale).is_file()]
    later = sum(not log_of(Run(name, best_lr(name, scale) or 0, seed), scale).is_file()
                for name in names if name not in single for seed in range(1, scale.seeds))
    if not missing and not later:
        return "all runs are there"
    costs = {name: cost(ARMS[name]) for name in names}
    flops = sum(costs[run.arm] for run in missing) + later * statistics.mean(costs.values())
    return (f"{len(first) - len(missing)} of {len(first)} runs are there; {len(missing)} and up to {later} "
            f"with other seeds are to be made, {flops:.2e} FLOPs, {duration(flops, scale)}")


def duration(flops: float, scale: Scale) -> str:
    """By the speed of the runs of this scale that were made here, as many side by side as there are
    workers."""
    made = [read_log(log)[1][-1] for log in (OUT / scale.name).glob("*/log.jsonl") if is_finished(log)]
    made = [record for record in made if record.get("seconds")]
    if not made:
        return "a time that the first of them will tell"
    rate = sum(r["flops"] for r in made) / sum(r["seconds"] for r in made) * workers(scale)
    hours, minutes = divmod(round(flops / rate / 60), 60)
    return f"about {hours}:{minutes:02} h"
