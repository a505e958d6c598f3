"""Equilibrated Spectron beside Spectron in every setting where both were tuned alike: a table, a figure."""

from paper import draw, runs
from paper.arms import ARMS
from paper.experiments import Outcome, gap, outcomes_of
from paper.runs import RESULTS, Run, Scale, final_loss, log_of
from paper.tables import markdown
from tools.plot import read_log

HALF = {"steps": 200, "tokens_per_step": 2048, "lrs": 5, "seeds": 5}
SETTINGS = [("the offline corpus", {"seeds": 5}), ("half the batch", HALF),
            ("that, IMDb reviews", HALF | {"data": "data/imdb-bytes"}),
            ("a width of 384", {"scale": "nano-7.3M"}),
            ("four times the steps", {"steps": 800, "seeds": 1})]
GOAL = -0.03  # nats


def scales() -> dict[str, Scale]:
    """By the name of the setting."""
    return {label: runs.scale_of(**{"scale": "nano"} | given) for label, given in SETTINGS}


def pairs() -> dict[str, list[Outcome]]:
    """(Spectron, equilibrated Spectron) in every setting whose runs are there."""
    found = {label: outcomes_of("equilibrated", scale) for label, scale in scales().items()}
    return {label: pair for label, pair in found.items() if all(o.logs for o in pair)}


def table(found: dict) -> str:
    head = ["", "steps x tokens", "lr", "Spectron", "lr", "equilibrated", "difference", "95% interval",
            "seeds", "lr within 5%", "FLOPs of each"]
    rows = []
    for label, (plain, even) in found.items():
        difference, interval, seeds = gap(plain, even)
        scale = scales()[label]
        rows.append([label, f"{scale.steps} x {scale.tokens_per_step:,}", f"{plain.lr:g}", str(plain),
                     f"{even.lr:g}", str(even), f"{difference:+.3f}",
                     "" if interval is None else f"± {interval:.3f}", str(seeds),
                     f"{plain.width}, {even.width}", f"{plain.flops:.2e}"])
    return markdown(head, rows)


CANDIDATES = {  # CAND of candidates.diff, but for silu, which is CoLA's layer under Spectron
    "no1": "radius without its + 1", "exact": "radius from the exact norm of dW",
    "after": "rows normalized after the polar factor", "kinds": "ranks by kind of matrix",
    "silu": "silu between the factors"}


def candidates() -> str:
    """What else was tried, one run each, beside Spectron's and equilibrated Spectron's at half the batch."""
    half, where, rows = scales()["half the batch"], RESULTS / "equilibrated" / "candidates", []
    logs = {ARMS[arm].label: log_of(Run(arm, 0.2), half) for arm in ("spectron", "equilibrated")}
    logs |= {label: where / f"{name}-lr0.2-seed0.jsonl" for name, label in CANDIDATES.items()}
    for label, log in logs.items():
        records = read_log(log)[1]
        gauge = max(r["gauge"] for r in records if r.get("gauge") is not None)
        rows.append([label, f"{final_loss(log):.3f}", f"{gauge:.2f}", f"{records[-1]['flops']:.2e}"])
    return markdown(["lr 0.2, seed 0", "loss", "largest gauge", "FLOPs"], rows)


def figure(found: dict):
    """Left, the differences with their intervals; right, the learning-rate curves, each over the best loss
    of Spectron in its setting."""
    fig, (left, right) = draw.panels(2, 10.5, width_ratios=[1, 1.3])
    for row, (label, (plain, even)) in enumerate(found.items()):
        difference, interval, _ = gap(plain, even)
        left.errorbar(difference, row, xerr=interval or 0, color=draw.COLOURS[row], marker="o", capsize=3)
        for o, line in (plain, "--"), (even, "-"):
            shown = [(lr, loss - plain.grid[plain.lr]) for lr, loss in o.grid.items() if loss is not None]
            right.plot(*zip(*shown), color=draw.COLOURS[row], ls=line, marker="os^vD"[row], ms=4, lw=1.5,
                       label=label if line == "-" else None)
    left.axvline(0, color="0.5", lw=0.8)
    left.axvline(GOAL, color="0.5", lw=1, ls=":")
    left.set(yticks=range(len(found)), yticklabels=list(found), ylim=(len(found) - 0.4, -0.6),
             xlabel="equilibrated minus Spectron (nats per byte)\n95% intervals; dotted: the goal")
    right.set(xscale="log", ylim=(-0.12, 0.4), xlabel="learning rate (dashed: Spectron)",
              ylabel="final loss above Spectron's best")
    draw.name_ticks(right, {lr for pair in found.values() for o in pair for lr in o.grid})
    draw.legend_below(fig, right)
    return fig
