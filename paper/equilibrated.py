"""Equilibrated Spectron beside Spectron in every setting where both were tuned alike: a table, a figure."""

from paper import draw, runs
from paper.experiments import Outcome, gap, outcomes_of
from paper.runs import RESULTS, Scale, best_of, final_loss
from paper.tables import markdown
from tools.plot import read_log

HALF = {"steps": 200, "tokens_per_step": 2048, "lrs": 5, "seeds": 5}
SETTINGS = [("the offline corpus", {"seeds": 5}), ("half the batch", HALF),
            ("that, IMDb reviews", HALF | {"data": "data/imdb-bytes"}),
            ("a width of 384", {"scale": "nano-7.3M"}),
            ("four times the steps", {"steps": 800, "seeds": 5})]
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


CANDIDATES = {  # CAND of candidates.diff; silu is CoLA's layer under Spectron
    "no1": "radius without its + 1", "exact": "radius from the exact norm of dW",
    "half": "rows divided by the root of their length", "after": "rows normalized after the polar factor",
    "kinds": "ranks by kind of matrix", "silu": "silu between the factors",
    **{f"{name}-equilibrated": f"{label}, even rows" for name, label in (
        ("no1", "without the + 1"), ("exact", "exact norm"), ("after", "rows normalized after as well"),
        ("kinds", "ranks by kind"), ("silu", "silu"))},
    "spectron-rank1": "rank ratio 1", "silu-rank1": "rank ratio 1, silu"}


def candidate(name: str, folder: str) -> Outcome:
    """What an idea came to, from its logs in results/equilibrated/candidates/<folder>."""
    logs = {}
    for log in sorted((RESULTS / "equilibrated/candidates" / folder).glob(f"{name}-lr*")):
        lr, seed = log.stem.removeprefix(f"{name}-lr").split("-seed")
        logs[float(lr), int(seed)] = log
    grid = {lr: final_loss(log) for (lr, seed), log in sorted(logs.items()) if seed == 0}
    best = best_of(grid)
    logs = {seed: log for (lr, seed), log in sorted(logs.items()) if lr == best}
    return Outcome(name, grid, best, {seed: final_loss(log) for seed, log in logs.items()},
                   list(logs.values()))


def candidates() -> str:
    """What else was tried, each at its best learning rate, beside Spectron and equilibrated Spectron."""
    short, long = (pairs()[label] for label in ("the offline corpus", "four times the steps"))
    found = [(o.label, o, ends) for o, ends in zip(short, long)]
    found += [(label, candidate(name, "200x4096"), candidate(name, "800x4096"))
              for name, label in CANDIDATES.items()]
    rows = []
    for label, o, ends in found:
        records, (difference, interval, seeds) = read_log(o.logs[0])[1], gap(short[1], o)
        gauge = max(r["gauge"] for r in records if r.get("gauge") is not None)
        over = f"{difference:+.3f}" + (f" ± {interval:.3f}" if seeds > 1 else "") if difference else ""
        rows.append([label, f"{o.lr:g}", str(o), over,
                     str(len(o.losses)), f"{gauge:.2f}", f"{o.flops:.2e}",
                     f"{min(ends.grid.values()):.3f}" if ends.grid else ""])
    return markdown(["", "lr", "loss", "over equilibrated Spectron", "seeds", "largest gauge", "FLOPs",
                     "800 steps, seed 0"], rows)


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
