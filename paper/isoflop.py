"""The nano ladder of Section 6: which runs there are, and how they are made.

At each budget of executed FLOPs both kinds of model, low-rank under Spectron and dense under Muon, are
trained at six sizes or more around the best one, each for as many steps as the budget pays for and with a
schedule of that length. The paper holds 6 N D constant instead; that leaves out attention, which is 4% to 18%
of a nano model and not the same for the two kinds.
"""

from dataclasses import replace

from model import NANO_SIZES, count_parameters
from paper import runs
from paper.runs import ARMS, Arm, Run, Scale, final_loss, log_of

BUDGETS = (2.5e11, 8e11, 2.5e12, 8e12)
SEEDED, SEEDS = 8e11, 3  # the budget at which the noise is measured
CHECKED = {"spectron": ("nano-0.11M", "nano-0.6M"), "dense": ("nano-0.11M", "nano-0.6M")}  # and its sizes
KINDS = {"spectron": Arm("Spectron, low-rank", "", 0.1, swept=False),
         "dense": Arm("Muon, dense", "--method dense", 0.05, swept=False)}
CENTRES = {"spectron": 0.09e6, "dense": 0.14e6}  # parameters, at the first budget
LEAST = 6  # sizes at a budget
LADDER = Scale({}, "nano", "isoflop", None, 2048, "data/stdlib", 1, SEEDS)


def arm(kind: str, size: str, budget: float) -> str:
    """Its name, under which paper.runs then knows it."""
    name = f"{kind}-{size.removeprefix('nano-')}-{budget:g}"
    ARMS[name] = replace(KINDS[kind], size=size, budget=budget)
    return name


def run(kind: str, size: str, budget: float, seed: int = 0, times: float = 1) -> Run:
    """times: of the kind's learning rate."""
    return Run(arm(kind, size, budget), KINDS[kind].lr * times, seed)


def parameters(kind: str, size: str) -> int:
    c = NANO_SIZES[size]
    return count_parameters(replace(c, rank_ratio=None) if kind == "dense" else c)


def losses(kind: str, budget: float) -> dict:
    """size -> final loss of seed 0, for the sizes that were run, in order; None where it diverged."""
    logs = {size: log_of(run(kind, size, budget), LADDER) for size in NANO_SIZES}
    return {size: final_loss(log) for size, log in logs.items() if log.is_file()}


def best(kind: str, budget: float) -> str:
    found = {size: loss for size, loss in losses(kind, budget).items() if loss is not None}
    return min(found, key=found.get)


def sizes(kind: str, index: int) -> list[str]:
    """Those that a budget starts from: the nearest ones to the best of the budget before, which is taken to
    grow with the root of the budget."""
    centre = CENTRES[kind]
    if index:
        growth = (BUDGETS[index] / BUDGETS[index - 1]) ** 0.5
        centre = parameters(kind, best(kind, BUDGETS[index - 1])) * growth
    distance = {size: max(n / centre, centre / n) for size in NANO_SIZES for n in [parameters(kind, size)]}
    return sorted(NANO_SIZES, key=distance.get)[:LEAST]


def wider(kind: str, budget: float) -> list[str]:
    """The next size where the best is the last or the last but one on its side."""
    found, ladder = list(losses(kind, budget)), list(NANO_SIZES)
    at, lowest, highest = found.index(best(kind, budget)), ladder.index(found[0]), ladder.index(found[-1])
    below, above = at < 2 and lowest > 0, len(found) - at <= 2 and highest < len(ladder) - 1
    return [ladder[lowest - 1]] * below + [ladder[highest + 1]] * above


def make() -> None:
    """Every run that is missing, from the smallest budget to the largest; the noise and the learning rates
    last."""
    for i, budget in enumerate(BUDGETS):
        runs.make_all([run(kind, size, budget) for kind in KINDS for size in sizes(kind, i)], LADDER)
        for _ in range(2):
            runs.make_all([run(kind, size, budget) for kind in KINDS for size in wider(kind, budget)], LADDER)
    runs.make_all([run(kind, size, SEEDED, seed) for kind in KINDS for size in losses(kind, SEEDED)
                   for seed in range(1, SEEDS)]
                  + [run(kind, size, SEEDED, 0, times) for kind in KINDS for size in CHECKED[kind]
                     for times in (0.5, 2)], LADDER)
