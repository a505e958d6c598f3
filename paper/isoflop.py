"""Sections 6 and D, at nano: which runs there are, what they came to, and what was fitted to them.

At each budget both kinds of model, low-rank under Spectron and dense under Muon, are trained at six sizes or
more around the best one, each for as many steps as the budget of executed FLOPs pays for and with a schedule
of that length. (docs/SCALING.md says what the paper's 6 N D leaves out.) paper.laws has the fits.

AdamW's learning rate for embedding, head and norms is swept for every model: at the two smaller budgets until
the best is inside, at the two larger over three values.
"""

import math
import statistics
from collections import defaultdict
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from lib.methods import count_parameters, flops_per_token, split_parameters
from model import NANO_SIZES, SIZES, Llama, LlamaConfig
from paper import laws, logs, runs
from paper.methods import METHODS, Method
from paper.laws import STUDIES, Law, Points
from paper.output import markdown
from paper.runs import Run, Scale

BUDGETS = (1.5e11, 4.7e11, 1.4e12, 4.5e12)
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # of adam_lr
SWEPT = BUDGETS[:2]  # have FIRST, and on until the best is inside; the others have THREE
FIRST, THREE = GRID[1:4], (3e-3, 3e-2, 1e-1)
BASE = 3e-3  # that of every run of the first study
SEEDED, SEEDS = 1.5e11, 3  # the budget at which each size has as many seeds with BASE
REPEATED = 3  # sizes around each minimum that have as many seeds at their adam_lr
CHECKED = {4.7e11: ("nano-2x32", "nano-2x96"), 4.5e12: ("nano-2x96",)}  # at other learning rates, too:
TIMES = 0.5, 2
KINDS = {  # the learning rate is that of a run of 1,000 steps
    "spectron": Method("low-rank, Spectron", "--momentum 0.9", 0.037, swept=False),
    "dense": Method("dense, Muon", "--method dense --momentum 0.9", 0.0145, swept=False)}
# The smallest and the largest width at each budget: six sizes around the best of the budget before, times the
# root of the FLOPs, and more on a side where the best was the last or the last but one
WIDTHS = {"spectron": ((8, 64), (16, 96), (16, 160), (48, 256)),
          "dense": ((8, 64), (12, 96), (16, 128), (24, 160))}
LADDER = Scale({}, "nano", "isoflop", None, 512, "data/stdlib", 1, SEEDS, kept=1)
PAPER_BUDGETS = tuple(np.geomspace(2.20e18, 3.57e19, 4))  # the ends are the paper's


def run(kind: str, size: str, budget: float, seed: int = 0, times: float = 1, adam_lr: float = BASE) -> Run:
    """times: of the learning rate that a run of this length has. paper.runs then knows its method."""
    name = f"{kind}-{size.removeprefix('nano-')}-{budget:g}" + f"-adam{adam_lr:g}" * (adam_lr != BASE)
    METHODS[name] = replace(KINDS[kind], size=size, budget=budget,
                         flags=f"{KINDS[kind].flags} --adam_lr {adam_lr:g}")
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
        while missing := [run for run in wanted(budget) if not runs.log_of(run, LADDER)]:
            runs.make_all(missing, LADDER)


def wanted(budget: float) -> list[Run]:
    """The runs of a budget, as far as those that are there tell which: one seed at each adam_lr, and once
    they are there, more seeds at the sizes around each minimum."""
    found = []
    for kind in KINDS:
        rows = rows_of(kind)
        own = [run(kind, size, budget, seed) for size in sizes(kind, budget)
               for seed in range(SEEDS if budget == SEEDED else 1)]
        own += [run(kind, size, budget, 0, times) for size in CHECKED.get(budget, ()) for times in TIMES]
        own += [run(kind, size, budget, adam_lr=x) for size in sizes(kind, budget)
                for x in adam_lrs(rows, size, budget)]
        if all(runs.log_of(run, LADDER) for run in own):
            own += [run(kind, size, budget, seed, adam_lr=x) for seed in range(1, SEEDS)
                    for size, x in around_the_minimum(rows, budget)]
        found += own
    return found


def adam_lrs(rows: list[dict], size: str, budget: float) -> list[float]:
    """Where the sweep goes on at an edge: those that were run, and the two beside the best of them."""
    found = swept(rows).get((size, budget), {})
    if budget not in SWEPT or set(found) < set(FIRST) or not any(found.values()):
        return [*(FIRST if budget in SWEPT else THREE)]
    best = GRID.index(runs.best_of(found))
    return sorted({*found, *GRID[max(0, best - 1):best + 2]})


def swept(rows: list[dict]) -> dict[tuple, dict]:
    """By size and budget: adam_lr -> the loss of seed 0 at the learning rate of the run's length."""
    found = defaultdict(dict)
    for r in rows:
        if r["seed"] == 0 and r["lr"] == lr_of(r["kind"], r["steps"]):
            found[r["size"], r["budget"]][r["adam_lr"]] = r["loss"]
    return found


def around_the_minimum(rows: list[dict], budget: float) -> list[tuple[str, float]]:
    """(size, its adam_lr) of the sizes nearest to the minimum of seed 0's parabola."""
    of = [r for r in kept(rows) if r["budget"] == budget and r["seed"] == 0]
    fitted = laws.profiles(points_of(of), [budget])[0]
    centre = fitted.N if fitted.inside else min(of, key=lambda r: r["loss"])["total"]
    nearest = sorted(of, key=lambda r: abs(math.log(r["total"] / centre)))[:REPEATED]
    return [(r["size"], r["adam_lr"]) for r in sorted(nearest, key=lambda r: r["total"])]


def missing() -> str:
    """How many runs are asked for by what is there, and their hours, as runs of the same size took."""
    rows = {(kind, row["size"]): row for kind in KINDS for row in rows_of(kind)}
    lines = []
    for budget in BUDGETS:
        left = [METHODS[run.method] for run in wanted(budget) if not runs.log_of(run, LADDER)]
        pace = [rows.get(("dense" if "dense" in method.flags else "spectron", method.size))
                for method in left]
        hours = sum(budget * row["seconds"] / row["executed"] for row in pace if row) / 3600
        lines.append(f"{budget:.2g} FLOPs: {len(left)} runs are to be made, {hours:.2f} core-hours")
    return "\n".join([*lines, "That is known so far. The sweep decides on more values of adam_lr, and on the "
                      "sizes with more seeds."])


def papers_sizes(budget: float) -> list[str]:
    """The 46 runs that the public code lists (da462/spectron, bin/scaling): all twelve sizes of Table 5, of
    which the largest budget leaves out the two smallest. All have a learning rate of 0.07. The paper counts
    39 runs and does not name them."""
    listed = [size for size in SIZES if size[0].isdigit()]
    return listed[2:] if budget > 3e19 else listed


def papers_design() -> Points:
    """The paper's runs under its own law."""
    sizes = [[cost(config_of(size))["total"] for size in papers_sizes(C)] for C in PAPER_BUDGETS]
    return laws.design(PAPER_BUDGETS, sizes, Law(**laws.PAPER))


def config_of(size: str, kind: str = "spectron") -> LlamaConfig:
    c = SIZES[size] if size in NANO_SIZES else replace(SIZES[size], vocab_size=32000)
    return replace(c, rank_ratio=None) if kind == "dense" else c


@cache
def cost(c: LlamaConfig) -> dict:
    """Parameters, total and without embedding and head, executed FLOPs of a token, and the optimizer's of a
    step."""
    total = count_parameters(c)
    with torch.device("meta"):
        flops, optimizer = flops_per_token(Llama(c)), optimizer_flops(Llama(c))
    return {"total": total, "blocks": total - 2 * c.vocab_size * c.dim, "flops": flops,
            "optimizer": optimizer}


def optimizer_flops(model: Llama) -> int:
    """Of a step, the matrix products: five Newton-Schulz iterations of every factor or dense matrix of the
    blocks, each X^T X, its square and X times their sum, and a power iteration of every factor."""
    pairs, dense, _ = split_parameters(model)
    factors = [p for pair in pairs for p in pair]
    orthogonalized = sum(5 * (4 * max(p.shape) * min(p.shape)**2 + 2 * min(p.shape)**3)
                         for p in factors + dense)
    return orthogonalized + sum(4 * p.numel() for p in factors)


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
        found.append({"kind": kind, "size": c["size"], "budget": budget, "lr": c["lr"],
                      "adam_lr": c["adam_lr"], "seed": c["seed"],
                      "total": counted["total"], "blocks": counted["blocks"], "steps": c["steps"],
                      "tokens": last["tokens"], "executed": last["flops"],
                      "optimizer": counted["optimizer"] * c["steps"], "loss": log.final_loss,
                      "seconds": last["seconds"]})
    return found


CHOICES = {"the best of each size": None, "0.03 for all": 3e-2, "0.003 for all": 3e-3}  # of adam_lr


def kept(rows: list[dict], adam_lr: float | None = None) -> list[dict]:
    """The runs that are fitted: at the learning rate of their length, not diverged, and at an adam_lr, or
    else at the one that was best for their size with seed 0."""
    best = {place: runs.best_of(losses) for place, losses in swept(rows).items()}
    return [r for r in rows if r["adam_lr"] == (adam_lr or best.get((r["size"], r["budget"])))
            and r["lr"] == lr_of(r["kind"], r["steps"]) and r["loss"] is not None]


def points_of(rows: list[dict], count: str = "total", flops: str = "executed") -> Points:
    N, D, executed, L = (np.array([r[key] for r in rows], float)
                         for key in (count, "tokens", "executed", "loss"))
    return Points(N, D, executed if flops == "executed" else 6 * N * D, L)


def noise(rows: list[dict]) -> np.ndarray:
    """The standard deviation between the seeds of a size at each budget, pooled over its sizes; where no size
    has several, that of all budgets."""
    groups = defaultdict(list)
    for r in rows:
        groups[r["budget"], r["size"]].append(r["loss"])
    variances = defaultdict(list)
    for (budget, _), losses in groups.items():
        if len(losses) > 1:
            variances[budget].append(statistics.variance(losses))
    every = sum(variances.values(), [])
    return np.array([statistics.mean(variances[budget] or every) for budget in BUDGETS])**0.5


def lowest(points: Points, budgets) -> np.ndarray:
    """The loss at the minimum of each budget's parabola; nan where it has none inside its grid."""
    found = {p.C: p.L for p in laws.profiles(points, budgets) if p.inside}
    return np.array([found.get(C, np.nan) for C in budgets])


def gaps(low: Points, dense: Points, budgets, sigmas, times: int = STUDIES) -> tuple[np.ndarray, np.ndarray]:
    """How much higher the best dense model ends than the best low-rank one at each budget, and the 95%
    interval (2, budgets) from fits to losses that have the seeds' noise added once more; sigmas has it for
    both kinds at each budget."""
    generator = np.random.default_rng(0)

    def noisy(points, sigma):
        each = sigma[laws.nearest(points, budgets)]
        return replace(points, L=points.L + each * generator.standard_normal(len(points)))
    drawn = [lowest(noisy(dense, sigmas[1]), budgets) - lowest(noisy(low, sigmas[0]), budgets)
             for _ in range(times)]
    return lowest(dense, budgets) - lowest(low, budgets), np.nanpercentile(drawn, [2.5, 97.5], axis=0)
