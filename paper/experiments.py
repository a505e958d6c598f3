"""The experiments: which methods a table or figure of the paper compares, and what came of them here."""

import math
import re
import statistics
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import torch

import train
from model import ALIASES, Llama, LlamaConfig
from paper import draw
from paper.methods import ADAM_LRS, DEARER, LADDERS, METHODS, MOMENTA, SETTINGS, WITH_ADAM
from paper.output import read_json
from paper.runs import Run, Scale, best_of, log_of, scores_of, seconds_per_step, tried
from tools import plan

PAPER = read_json(Path(__file__).with_name("paper.json"))  # low-rank sizes of Table 5, otherwise perplexities
SAID = {part.split()[0]: dict(re.findall(r"- (\w+): (.*)", part)) for part in
        Path(__file__).with_name("experiments.md").read_text("utf-8").split("\n## ")[1:]}
T95 = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # of Student's t, by how many seeds


@dataclass
class Outcome:
    """One method at one scale: its learning rates, and its best one over the seeds."""
    method: str
    grid: dict  # lr -> validation loss of seed 0, None where it diverged
    lr: float | None  # the best
    by_seed: dict  # seed -> validation loss at that lr, None where it diverged
    logs: list  # of the seeds at that lr
    scores: dict = field(default_factory=dict)  # what eval.py said of the first seed; nothing at nano
    paper: float | None = None  # the paper's perplexity
    seconds: float | None = None  # of a step, as paper.bench timed it

    @property
    def label(self) -> str:
        return METHODS[self.method].label

    @property
    def losses(self) -> list[float]:
        return [loss for loss in self.by_seed.values() if loss is not None]

    @property
    def flops(self) -> float | None:
        return self.logs[0].steps[-1].get("flops") if self.logs else None

    @cached_property
    def memory(self) -> dict:
        """How many parameters are trained, bytes of the optimizer's state, and with weights and gradients."""
        c = SimpleNamespace(**self.logs[0].config)
        with torch.device("meta"):
            model = Llama(LlamaConfig(**c.model), train.find_method(c.method, c.method_args).linear)
        needed = plan.memory(c, model)
        return {"parameters": sum(p.numel() for p in model.parameters()), "optimizer": needed["optimizer"],
                "all": sum(needed[key] for key in ("weights", "gradients", "optimizer"))}

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses) if self.losses else math.inf

    @property
    def sd(self) -> float | None:
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    @property
    def width(self) -> str:
        """By what factor the learning rates differ that end within 5% of the best loss of seed 0."""
        lrs = sorted(self.grid)
        good = [lr for lr in lrs if self.lr and self.grid[lr] is not None
                and self.grid[lr] <= 1.05 * self.grid[self.lr]]
        if not good or len(lrs) < 2:
            return ""
        return "≥ " * (good[0] == lrs[0] or good[-1] == lrs[-1]) + f"{good[-1] / good[0]:g}x"

    def __str__(self) -> str:
        if not self.losses:
            return "diverged at every lr" if self.grid else "not run"
        lost = len(self.by_seed) - len(self.losses)
        return (f"{self.mean:.3f}" + (f" ± {self.sd:.3f}" if self.sd is not None else "")
                + (f", {lost} of {len(self.by_seed)} diverged" if lost else ""))


def outcome(name: str, scale: Scale) -> Outcome:
    grid, _ = tried(name, scale)
    lr = best_of(grid)
    found = {seed: log for seed in range(scale.seeds) if lr and (log := log_of(Run(name, lr, seed), scale))}
    scores = read_json(scores_of(Run(name, lr or 0), scale)) or {}
    by_seed = {seed: log.final_loss for seed, log in found.items()}
    return Outcome(name, grid, lr, by_seed, [*found.values()], scores)


def gap(a: Outcome, b: Outcome) -> tuple[float | None, float | None, int]:
    """(b's loss minus a's in nats, half of its 95% interval, seeds), from the differences seed by seed, as a
    seed has the same data in both. None where one diverged, and for the interval of one seed."""
    pairs = [b.by_seed[seed] - a.by_seed[seed] for seed in a.by_seed
             if None not in (a.by_seed[seed], b.by_seed.get(seed))]
    if len(pairs) < 2:
        return pairs[0] if pairs else None, None, len(pairs)
    return *mean_and_half(pairs), len(pairs)


def mean_and_half(gaps: list[float]) -> tuple[float, float]:
    """The mean, and half of its 95% interval, of 2 to 8 differences."""
    return statistics.mean(gaps), T95[len(gaps)] * statistics.stdev(gaps) / len(gaps)**0.5


def consecutive(found):
    return zip(found, found[1:])


def against_first(found):
    return [(found[0], other) for other in found[1:]]


def same_shape(found):
    return zip(found[:len(found) // 2], found[len(found) // 2:])


def guided_with_muon(found):
    """Self-guided training with Muon against itself with AdamW, and against Spectron."""
    methods = {o.method: o for o in found}
    return [(methods[name], methods["self-guided-muon"]) for name in ("spectron", "self-guided")]


@dataclass
class Experiment:
    """A table or figure of the paper; what it says is in experiments.md."""
    methods: list | tuple  # in the paper's order, the best first
    figure: Callable  # (outcomes, scale) -> matplotlib figure
    few: bool = False  # three learning rates for each method, as they are many or cost much
    single: bool = False  # one seed, though other experiments may have given some methods more
    tasks: bool = False  # task columns, above nano
    pairs: Callable | None = against_first  # outcomes -> the pairs whose difference is told
    memory: bool = False  # columns of what each method costs


def ladder(scale: Scale) -> list:
    of_nano = {"spectron": "spectron", "dense": "dense-flops"}
    return [of_nano[kind] if size == "nano" else f"{kind}@{size}"
            for kind in of_nano for size in LADDERS["nano" if scale.nano else "paper"]]


CURVES = {"figure": draw.curves_and_gaps, "pairs": consecutive}
EXPERIMENTS = {
    "table2": Experiment(("spectron", "orthogonalize", "renormalize", "neither"), **CURVES),
    "table1": Experiment(("spectron", "self-guided", "adamw"), **CURVES, tasks=True),
    "table3": Experiment(("rank-0.4", "spectron", "rank-0.125"), **CURVES, few=True),
    "fig12": Experiment(
        ("spectron", "orthogonalize", "renormalize", "neither", "self-guided", "self-guided-muon", "adamw",
         "dense", "dense-adamw"), draw.loss_over_lr, pairs=guided_with_muon),
    "equilibrated": Experiment(("spectron", "equilibrated"), draw.loss_over_lr),
    "equilibrated-tuned": Experiment(
        ("equilibrated", "equilibrated-2", "spectron", "equilibrated-muon", "orthogonalize", "lora-muon",
         "dense", "self-guided-muon-flops"), draw.loss_over_lr, memory=True),
    "methods": Experiment(
        ("spectron", "equilibrated", "adamw", "self-guided", *WITH_ADAM, "orthogonalize", "renormalize",
         "neither", "dense", "dense-adamw"), draw.loss_over_memory, memory=True),
    "methods-flops": Experiment(
        ("spectron", "equilibrated", *(f"{name}-flops" for name in DEARER)), draw.loss_over_memory,
        few=True, memory=True),
    "settings": Experiment(SETTINGS, draw.loss_by_method, few=True, single=True, pairs=None),
    "adam_lr": Experiment([name for *_, name in ADAM_LRS], draw.loss_over_adam_lr, single=True, pairs=None),
    "momentum": Experiment([name for *_, name in MOMENTA], draw.loss_by_method, few=True, single=True,
                           pairs=None),
    "fig2": Experiment(("adamw", "dense-adamw"), draw.figure2),
    "fig3": Experiment(("spectron", "orthogonalize", "adamw"), draw.figure3),
    "fig13": Experiment(("spectron-ffn", "self-guided-ffn", "adamw-ffn"), **CURVES, few=True),
    "fig5": Experiment(("spectron", "dense-flops", "dense-time"), draw.figure5, few=True),
    "fig6": Experiment((), draw.figure6, few=True, single=True, pairs=same_shape),
    "fig7": Experiment((), draw.figure7, few=True, single=True, tasks=True, pairs=same_shape),
}


def methods_and_scale(name: str, scale: Scale) -> tuple[list | tuple, Scale]:
    """The methods of an experiment, and a scale with as many learning rates and seeds as it has."""
    e = EXPERIMENTS[name]
    return e.methods or ladder(scale), replace(scale, lrs=min(3, scale.lrs) if e.few else scale.lrs,
                                            seeds=1 if e.single else scale.seeds)


def outcomes_of(name: str, scale: Scale) -> list[Outcome]:
    """At nano the paper's perplexities are those of its smallest main model."""
    size = "134M" if scale.size == "nano" else ALIASES.get(scale.size, scale.size)
    methods, scale = methods_and_scale(name, scale)
    found = [outcome(method, scale) for method in methods]
    for o in found:
        o.paper = PAPER.get(name, {}).get(size, {}).get(o.method)
        o.seconds = seconds_per_step(o.method, scale)
    return found
