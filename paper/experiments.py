"""The experiments: which arms a table or figure of the paper compares, and what came of them here."""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from model import ALIASES
from paper import draw, runs
from paper.runs import ARMS, Run, Scale, best_of, final_loss, log_of, tried
from plot import read_log

PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
T95 = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78}  # of Student's t, by the number of seeds
STANDS_FOR = {"nano": "S"}  # the size of the paper's that is beside nano
ABLATED = "S", ALIASES["S"]  # Tables 2 and 3 are of this size alone


########################################
#         What the runs came to        #
########################################

@dataclass
class Outcome:
    """One arm at one scale: its learning rates, and its best one over the seeds."""
    arm: str
    grid: dict  # lr -> validation loss of seed 0, None where it diverged
    lr: float | None  # the best
    by_seed: dict  # seed -> validation loss at that lr, None where it diverged
    logs: list  # of the seeds at that lr

    @property
    def label(self) -> str:
        return ARMS[self.arm].label

    @property
    def losses(self) -> list[float]:
        return [loss for loss in self.by_seed.values() if loss is not None]

    @property
    def steps(self) -> int | None:
        return read_log(self.logs[0])[0]["config"]["steps"] if self.logs else None

    @property
    def scores(self) -> dict:
        """What eval.py said of the first seed; nothing at nano."""
        path = self.logs[0].with_suffix(".scores.json") if self.logs else None
        return json.loads(path.read_text()) if path and path.is_file() else {}

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses) if self.losses else math.inf

    @property
    def sd(self) -> float | None:
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None

    def __str__(self) -> str:
        if not self.losses:
            return "diverged at every lr"
        lost = len(self.by_seed) - len(self.losses)
        return (f"{self.mean:.3f}" + (f" ± {self.sd:.3f}" if self.sd is not None else "")
                + (f", {lost} of {len(self.by_seed)} diverged" if lost else ""))


def outcome(name: str, scale: Scale, few: bool = False) -> Outcome:
    grid = tried(name, scale, few)
    lr = best_of(grid)
    logs = {seed: log_of(Run(name, lr, seed), scale) for seed in range(scale.seeds)} if lr else {}
    logs = {seed: log for seed, log in logs.items() if log.is_file()}
    return Outcome(name, grid, lr, {seed: final_loss(log) for seed, log in logs.items()}, list(logs.values()))


def gap(a: Outcome, b: Outcome) -> tuple[float, float | None]:
    """How much higher b ends than a, in nats, and the half width of its 95% interval, from the differences
    seed by seed: a seed has the same data in both, and, where the shapes are the same, the same initial
    weights. No interval from one seed; infinite where one of them diverged."""
    pairs = [b.by_seed[seed] - a.by_seed[seed] for seed in a.by_seed
             if None not in (a.by_seed[seed], b.by_seed.get(seed))]
    if len(pairs) < 2:
        return pairs[0] if pairs else math.inf, None
    return statistics.mean(pairs), T95.get(len(pairs), 2.6) * statistics.stdev(pairs) / len(pairs)**0.5


def said(difference: float, interval: float | None) -> str:
    return f"{difference:+.3f}" + (" (one seed)" if interval is None else f" ± {interval:.3f}")


def compared(better: Outcome, worse: Outcome) -> str:
    """One step of the paper's order: does it hold here, by how much, against what spread."""
    names = f"{better.label} before {worse.label}"
    if not (better.losses and worse.losses):
        lost = " and ".join(o.label for o in (better, worse) if not o.losses)
        return f"{names}: {'holds' if better.losses else 'does not hold'}, {lost} diverged at every lr"
    difference, interval = gap(better, worse)
    verdict = ("cannot be told" if interval is None or abs(difference) < interval else
               "holds" if difference > 0 else "is the other way round")
    return f"{names}: {verdict}, {said(difference, interval)}"


########################################
#        The tables and figures        #
########################################

@dataclass
class Experiment:
    """A table or figure of the paper. `arms` are in the paper's order, the best first."""
    title: str
    arms: tuple
    figure: Callable  # (outcomes, paper's perplexities, scale) -> matplotlib figure
    differs: str  # what is not as in the paper, and what the paper leaves unclear
    paper: Callable = lambda size: {}  # the paper's perplexities at this size, by arm
    few: bool = False  # three learning rates for each arm
    single: tuple | None = ()  # arms that need no more than one seed; None: all
    tasks: bool = False  # task columns, above nano
    ordered: bool = True  # the paper ranks the arms


def paper_table1(size: str) -> dict:
    row = PAPER["table1"].get({full: short for short, full in ALIASES.items()}.get(size, size), {})
    return {arm: values[0] for arm, values in row.items()}


def paper_table2(size: str) -> dict:
    if size not in ABLATED:
        return {}
    names = {(True, True): "spectron", (True, False): "orthogonalize", (False, True): "renormalize",
             (False, False): "neither"}
    return {names[row["orthogonalize"], row["renormalize"]]: row["perplexity"]
            for row in PAPER["table2_ablation_S"]}


def paper_table3(size: str) -> dict:
    if size not in ABLATED:
        return {}
    names = {0.25: "spectron", 0.4: "rank-0.4", 0.125: "rank-0.125"}
    return {names[row["rank_ratio"]]: row["perplexity"] for row in PAPER["table3_rank_ratio_S"]}


def ladder(scale: Scale) -> tuple:
    sizes = runs.LADDERS["nano" if scale.nano else "paper"]
    return tuple(f"{kind}@{size}" if size != "nano"
                 else {"spectron": "spectron", "dense": "dense-flops"}[kind]
                 for kind in ("spectron", "dense") for size in sizes)


ONE_SCHEDULE = ("All arms decay to zero; the public code stops its AdamW baselines at a tenth of their "
                "learning rate. ")
EXPERIMENTS = {
    "table2": Experiment(
        "Table 2 and Figure 10: the four corners", ("spectron", "orthogonalize", "renormalize", "neither"),
        draw.curves_and_gaps,
        "The paper leaves open how a momentum that is not orthogonalized is brought to the radius; here it "
        "is divided by its spectral norm. Its 20.26 after 1,800 steps beats the 21.86 that its Table 1 gives "
        "the same model after 2,556, so the two tables are not of one setting.", paper_table2),
    "table1": Experiment(
        "Table 1 with Figures 4 and 14a: three ways to train factors", ("spectron", "self-guided", "adamw"),
        draw.curves_and_gaps,
        ONE_SCHEDULE + "At M the paper's AdamW (15.54) and self-guided training (15.53) are equal, at S and "
        "L they are 0.9 and 2.3 apart: its own differences vary by as much.", paper_table1, tasks=True),
    "table3": Experiment(
        "Table 3 and Figure 11: the rank ratio, 0.25 where not said", ("rank-0.4", "spectron", "rank-0.125"),
        draw.curves_and_gaps,
        "The paper's 42.65 at a ratio of 0.125 is far from any smooth trend; a run that was not tuned would "
        "look like it. At 0.4 the down projection has more parameters than if it were dense.", paper_table3,
        few=True),
    "fig12": Experiment(
        "Figure 12: final loss over the learning rate",
        ("spectron", "orthogonalize", "renormalize", "neither", "self-guided", "self-guided-muon", "adamw",
         "dense", "dense-adamw"), draw.loss_over_lr,
        "The paper shows two learning rates, 0.001 and 0.01, of four methods at size S. A learning rate is "
        "the radius of a step for Spectron and about the size of an entry's step for AdamW, so it is the "
        "widths of the curves that compare, not their places.", single=("dense-adamw",), ordered=False),
    "fig2": Experiment(
        "Figure 2: the step of W under AdamW, low-rank and dense", ("adamw", "dense-adamw"), draw.figure2,
        "The paper draws layer 4 and does not say which learning rates it used; here it is the third of four "
        "blocks.", single=("dense-adamw",), ordered=False),
    "fig3": Experiment(
        "Figure 3: the norms of one matrix", ("spectron", "orthogonalize", "adamw"), draw.figure3,
        "Each at its own best learning rate. The paper draws 8,000 steps at size S, three times what it "
        "trains that size for elsewhere, and AdamW on an axis of its own; here they share one.",
        ordered=False),
    "fig13": Experiment(
        "Figure 13: only the FFNs factorized", ("spectron-ffn", "self-guided-ffn", "adamw-ffn"),
        draw.curves_and_gaps,
        ONE_SCHEDULE + "The attention's matrices stay dense: Muon's at a fixed 0.02 under Spectron, AdamW's "
        "under the others.", few=True),
    "fig5": Experiment(
        "Figure 5: dense and low-rank at equal FLOPs, and at equal wall-clock",
        ("spectron", "dense-flops", "dense-time"), draw.figure5,
        "The paper gives the low-rank model 20 tokens per parameter of the dense one, and the dense one 20 "
        "per parameter of the low-rank one (11.6 to 13.3 of its own): equal in 6 N D, but its dense model is "
        "trained on less than is optimal. Here FLOPs are executed ones, with the head and attention. It "
        "gives no wall-clock; an independent sweep of 65 runs found dense Muon ahead at equal time.",
        few=True, ordered=False),
    "fig1": Experiment(
        "Figure 1: dense and low-rank over training FLOPs", ("spectron", "dense-flops"), draw.figure1,
        "The same runs as Figure 5's.", few=True, ordered=False),
    "fig6": Experiment(
        "Figure 6: perplexity over parameters", (), draw.figure6,
        "At nano every low-rank model sees the same tokens, and its dense twin those that cost the same; the "
        "paper gives larger models more tokens.", few=True, single=None, ordered=False),
    "fig7": Experiment(
        "Figure 7: downstream accuracy over parameters", (), draw.figure7,
        "The same models as Figure 6's.", few=True, single=None, tasks=True, ordered=False),
}


def arms_of(name: str, scale: Scale) -> tuple:
    return EXPERIMENTS[name].arms or ladder(scale)


def single_of(name: str, scale: Scale) -> tuple:
    single = EXPERIMENTS[name].single
    return arms_of(name, scale) if single is None else single


def outcomes_of(name: str, scale: Scale) -> list[Outcome]:
    return [outcome(arm, scale, EXPERIMENTS[name].few) for arm in arms_of(name, scale)]


########################################
#        What a figure comes to        #
########################################

def says_fig12(found: list[Outcome], scale: Scale) -> str:
    """How wide each arm's range of good learning rates is: those within 5% of its best loss."""
    widths, lost = [], []
    for o in found:
        lrs = sorted(o.grid)
        good = [lr for lr in lrs if o.lr and o.grid[lr] is not None and o.grid[lr] <= 1.05 * o.grid[o.lr]]
        if good:
            open_end = good[0] == lrs[0] or good[-1] == lrs[-1]
            widths.append(f"{o.label} {'at least ' * open_end}{good[-1] / good[0]:g}x")
        diverged = [f"{lr:g}" for lr in lrs if o.grid[lr] is None]
        lost += [f"{o.label} at {', '.join(diverged)}"] if diverged else []
    by_arm = {o.arm: o for o in found}
    muon, others = by_arm["self-guided-muon"], (by_arm["self-guided"], by_arm["spectron"])
    guided = " and ".join(f"{said(*gap(o, muon))} from {o.label}'s" for o in others)
    return (f"Learning rates that end within 5% of an arm's best loss span {', '.join(widths)}. Diverged: "
            f"{'; '.join(lost) or 'none'}. The paper: AdamW is lost at 0.01, and self-guided training ends "
            f"worse with Muon than with AdamW. Here its loss with Muon is {guided}, for more FLOPs: "
            f"{flops(muon):.3g} against Spectron's {flops(by_arm['spectron']):.3g}.")


def flops(o: Outcome) -> float:
    return read_log(o.logs[0])[1][-1]["flops"] if o.logs else math.nan


def middle(o: Outcome, key: str) -> float:
    """The median over the logged steps of the first seed at the best learning rate."""
    return statistics.median(x for _, x in draw.points(o.logs[0], key)) if o.logs else math.nan


def says_fig2(found: list[Outcome], scale: Scale) -> str:
    low, dense = found
    if not (low.logs and dense.logs):
        return ""
    parts = []
    for log, at in ((dense.logs[0], f"each at its best learning rate ({low.lr:g} and {dense.lr:g})"),
                    (log_of(Run(dense.arm, low.lr), scale), f"both at {low.lr:g}")):
        if log.is_file():
            ratios = [ratio for _, ratio in draw.ratios(low.logs[0], log, "dW")]
            parts.append(f"{statistics.median(ratios):.1f} (at most {max(ratios):.1f}) times {at}")
    return ("The paper: the step of W is 10 to 30 times as large in the low-rank model as in the dense one. "
            f"Here, in the median over the run: {', '.join(parts)}.")


def says_fig3(found: list[Outcome], scale: Scale) -> str:
    last = [draw.points(o.logs[0], "W")[-1][1] if o.logs else math.nan for o in found]
    parts = [f"{o.label} {middle(o, 'dW'):.3g}, {middle(o, 'dy'):.3g}, {W:.3g}" for o, W in zip(found, last)]
    gauge = max((x for log in found[0].logs[:1] for _, x in draw.points(log, "gauge")), default=math.nan)
    return ("The paper: AdamW's norms explode, Muon's are held in part, Spectron's are bounded. Here the "
            f"medians of ||dW||_2 and |dy|_rms and the last ||W||_2 are: {'; '.join(parts)}. Spectron's "
            f"logged steps are at most {gauge:.2f} of their learning rate.")


def says_fig5(found: list[Outcome], scale: Scale) -> str:
    low, *others = found
    parts = [f"{said(*gap(low, o))} nats for {o.label} ({o.steps} steps against {low.steps})" for o in others]
    return f"The paper: the two end equal at equal FLOPs. Here, measured from Spectron: {', '.join(parts)}."


def says_fig6(found: list[Outcome], scale: Scale) -> str:
    half = len(found) // 2
    parts = [f"{ARMS[dense.arm].size or scale.size} {said(*gap(low, dense))}"
             for low, dense in zip(found[:half], found[half:])]
    return ("The paper: at equal FLOPs the low-rank model is better at every size. Here the dense one's loss "
            f"less the low-rank one's of the same shape is, in nats: {', '.join(parts)}.")


SAYS = {"fig12": says_fig12, "fig2": says_fig2, "fig3": says_fig3, "fig5": says_fig5, "fig1": says_fig5,
        "fig6": says_fig6}
