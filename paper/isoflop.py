"""Sections 6 and D, at nano: which runs there are, what they came to, and what was fitted to them.

At each budget both kinds of model, low-rank under Spectron and dense under Muon, are trained at six sizes or
more around the best one, each for as many steps as the budget of executed FLOPs pays for and with a schedule
of that length. (docs/SCALING.md says what the paper's 6 N D leaves out.) paper.laws has the fits.
"""

import math
import statistics
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from lib.methods import count_parameters, flops_per_token
from model import NANO_SIZES, SIZES, Llama, LlamaConfig
from paper import laws, logs, runs
from paper.arms import ARMS, Arm
from paper.laws import Law, Points
from paper.output import markdown
from paper.runs import Run, Scale

BUDGETS = (1.5e11, 4.7e11, 1.4e12, 4.5e12)
SEEDED, SEEDS = 1.5e11, 3  # the budget at which the noise is measured
CHECKED = {4.7e11: ("nano-2x32", "nano-2x96"), 4.5e12: ("nano-2x96",)}  # at other learning rates, too:
TIMES = 0.5, 2
KINDS = {  # the learning rate is that of a run of 1,000 steps
    "spectron": Arm("low-rank, Spectron", "--momentum 0.9", 0.037, swept=False),
    "dense": Arm("dense, Muon", "--method dense --momentum 0.9", 0.0145, swept=False)}
# The smallest and the largest width at each budget: six sizes around the best of the budget before, times the
# root of the FLOPs, and more on a side where the best was the last or the last but one
WIDTHS = {"spectron": ((8, 64), (16, 96), (16, 160), (64, 256)),
          "dense": ((8, 48), (12, 96), (16, 96), (24, 160))}
LADDER = Scale({}, "nano", "isoflop", None, 512, "data/stdlib", 1, SEEDS)
PAPER_BUDGETS = tuple(np.geomspace(2.20e18, 3.57e19, 4))  # the ends are the paper's, the spacing is assumed


def run(kind: str, size: str, budget: float, seed: int = 0, times: float = 1) -> Run:
    """times: of the learning rate that a run of this length has. paper.runs then knows its arm."""
    name = f"{kind}-{size.removeprefix('nano-')}-{budget:g}"
    ARMS[name] = replace(KINDS[kind], size=size, budget=budget)
    steps = round(budget / cost(config_of(size, kind))["flops"] / LADDER.tokens_per_step)  # as runs.steps_of
    return Run(name, float(f"{times * lr_of(kind, steps):.4g}"), seed)


def lr_of(kind: str, steps: int) -> float:
    """It falls with the root of the steps, as the best one did in pilot runs."""
    return float(f"{KINDS[kind].lr * (1000 / steps) ** 0.5:.2g}")


def sizes(kind: str, budget: float) -> list[str]:
    """From the smallest to the largest."""
    low, high = WIDTHS[kind][BUDGETS.index(budget)]
    return [size for size, c in NANO_SIZES.items() if size.startswith("nano-2x") and low <= c.dim <= high]


def make() -> None:
    """Every run that is missing, from the smallest budget to the largest."""
    for budget in BUDGETS:
        seeds = range(SEEDS if budget == SEEDED else 1)
        wanted = [run(kind, size, budget, seed)
                  for kind in KINDS for size in sizes(kind, budget) for seed in seeds]
        checked = [run(kind, size, budget, 0, times) for kind in KINDS for size in CHECKED.get(budget, ())
                   for times in TIMES]
        runs.make_all(wanted + checked, LADDER)


def papers_sizes(budget: float) -> list[str]:
    """39 runs: ten of the twelve sizes of Table 5, without two near twins, and without the smallest at the
    largest budget, so that the tokens are the paper's 250M to 90B. Which ones it ran it does not say."""
    listed = [size for size in SIZES if size[0].isdigit() and size not in ("150M", "835M")]
    return listed[1:] if budget > 3e19 else listed


def papers_design() -> Points:
    """The paper's runs under its own law."""
    sizes = [[cost(config_of(size))["total"] for size in papers_sizes(C)] for C in PAPER_BUDGETS]
    return laws.design(PAPER_BUDGETS, sizes, Law(**laws.PAPER))


def config_of(size: str, kind: str = "spectron") -> LlamaConfig:
    c = SIZES[size] if size in NANO_SIZES else replace(SIZES[size], vocab_size=32000)
    return replace(c, rank_ratio=None) if kind == "dense" else c


@cache
def cost(c: LlamaConfig) -> dict:
    """Parameters, total and without embedding and head, and executed FLOPs of a token."""
    total = count_parameters(c)
    with torch.device("meta"):
        flops = flops_per_token(Llama(c))
    return {"total": total, "blocks": total - 2 * c.vocab_size * c.dim, "flops": flops}


def plan(scale: str, kind: str, rate: float, count: str = "total", flops: str = "executed") -> str:
    """The runs of each budget as a table, their FLOPs, and their hours on a machine of so many a second.
    count: N with (total) or without (blocks) embedding and head; flops: executed, or the paper's 6nd."""
    nano = scale == "nano"
    batch, rows, spent = LADDER.tokens_per_step if nano else 2**20, [], 0.0
    for budget in BUDGETS if nano else PAPER_BUDGETS:
        for size in sizes(kind, budget) if nano else papers_sizes(budget):
            c = cost(config_of(size, kind))
            steps = max(1, round(budget / (c["flops"] if flops == "executed" else 6 * c[count]) / batch))
            spent += steps * batch * c["flops"]
            rows.append([f"{budget:.3g}", size, f"{c[count] / 1e6:,.3g}M", f"{steps * batch / 1e6:,.4g}M",
                         f"{steps:,}", f"{batch:,}", f"{steps * batch / c[count]:.3g}"])
    head = ["budget", "size", f"N ({count})", "tokens", "steps", "tokens a step", "tokens per parameter"]
    return (markdown(head, rows) + f"\n{KINDS[kind].label}: {len(rows)} runs, {spent:.2e} executed FLOPs, "
            f"{spent / rate / 3600:.1f} hours at {rate:.2g} FLOPs a second.\n")


def rows_of(kind: str) -> list[dict]:
    """Every run of a kind: what it was, what it cost, and what it ended at (None: it diverged)."""
    found, pack = [], runs.pack_of(LADDER)
    for log in [logs.get(pack, name) for name in logs.read(pack) if name.startswith(f"{kind}-")]:
        c, last = log.config, log.steps[-1]
        counted = cost(config_of(c["size"], kind))
        budget = min(BUDGETS, key=lambda C: abs(math.log(last["flops"] / C)))
        found.append({"kind": kind, "size": c["size"], "budget": budget, "lr": c["lr"], "seed": c["seed"],
                      "total": counted["total"], "blocks": counted["blocks"], "steps": c["steps"],
                      "tokens": last["tokens"], "executed": last["flops"], "loss": log.final_loss,
                      "seconds": last["seconds"]})
    return found


def is_kept(row: dict) -> bool:
    """Whether a run is at the learning rate of its length, and did not diverge."""
    return row["lr"] == lr_of(row["kind"], row["steps"]) and row["loss"] is not None


def points_of(rows: list[dict], count: str = "total", flops: str = "executed") -> Points:
    """Those that are fitted."""
    kept = [row for row in rows if is_kept(row)]
    N, D, executed, L = (np.array([r[key] for r in kept], float)
                         for key in (count, "tokens", "executed", "loss"))
    return Points(N, D, executed if flops == "executed" else 6 * N * D, L)


def noise(rows: list[dict]) -> float:
    """The standard deviation between seeds, pooled over the sizes."""
    groups = {}
    for r in rows:
        if r["budget"] == SEEDED and is_kept(r):
            groups.setdefault(r["size"], []).append(r["loss"])
    return statistics.mean(map(statistics.variance, groups.values())) ** 0.5


def lowest(points: Points, budgets) -> np.ndarray:
    """The loss at the minimum of each budget's parabola; nan where it has none inside its grid."""
    found = {p.C: p.L for p in laws.profiles(points, budgets) if p.inside}
    return np.array([found.get(C, np.nan) for C in budgets])


def gaps(low: Points, dense: Points, budgets, sigmas, times: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """How much higher the best dense model ends than the best low-rank one at each budget, and the 95%
    interval (2, budgets) from fits to losses that have the seeds' noise added once more."""
    generator = np.random.default_rng(0)

    def noisy(points, sigma):
        return replace(points, L=points.L + sigma * generator.standard_normal(len(points)))
    drawn = [lowest(noisy(dense, sigmas[1]), budgets) - lowest(noisy(low, sigmas[0]), budgets)
             for _ in range(times)]
    return lowest(dense, budgets) - lowest(low, budgets), np.nanpercentile(drawn, [2.5, 97.5], axis=0)
