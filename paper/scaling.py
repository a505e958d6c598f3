"""The scaling laws, Sections 6 and D: their runs at nano, and what is fitted to them.

    python -m paper.scaling isoflop       figures 8 and 9: parabolas, power laws, the gap, to results/isoflop
    python -m paper.scaling parametric    L(N, D), and what the paper's design can tell, to results/parametric
    python -m paper.scaling plan          the runs, their FLOPs and hours; with --scale S those of the paper

The first two draw from the logs that are there. With --make they train first what is missing, which takes
hours and may be stopped.
"""

import itertools
import statistics

import numpy as np

from lib.cli import Parser, command, number
from model import SIZES
from paper import draw, isoflop
from paper.experiments import SAID
from paper.isoflop import (BASE, BUDGETS, CHECKED, CHOICES, GRID, KINDS, PAPER_BUDGETS, TIMES, gaps, kept,
                           noise, papers_design, points_of, rows_of, swept)
from paper.laws import (PAPER, STUDIES, Law, Points, bootstrap, fit_law, interval, power_law, profiles,
                        simulate, without_a_minimum, without_each)
from paper.laws import isoflop as exponent_of
from paper.output import markdown, save, write
from paper.runs import RESULTS

COLOURS = {"spectron": draw.BLUE, "dense": draw.BLACK}
SETTING = ("nano, two layers of many widths, 512 tokens a step of the offline corpus, "
           "each run with a schedule of its own length")


def collected(count: str = "total", flops: str = "executed",
              adam_lr: float | None = None) -> tuple[dict, dict, dict]:
    """By kind: the rows that are fitted, their points, and the budgets (the mean C of their runs)."""
    rows = {kind: kept(rows_of(kind), adam_lr) for kind in KINDS}
    points = {kind: points_of(r, count, flops) for kind, r in rows.items()}
    budgets = {}
    for kind, p in points.items():
        of = np.array([BUDGETS.index(row["budget"]) for row in rows[kind]])
        budgets[kind] = [float(np.exp(np.log(p.C[of == i]).mean())) for i in sorted(set(of))]
    return rows, points, budgets


def isoflop_table(rows, points, budgets, gap, low, high) -> str:
    """What Approach 2 finds, the gap, the noise and the learning rates, as Markdown."""
    parts = []
    for kind in KINDS:
        found = [p for p in profiles(points[kind], budgets[kind]) if p.inside]
        minima = [[f"{p.C:.2e}", str(len(p.points)), str(len(set(p.points.N))), f"{p.N / 1e3:,.1f}k",
                   f"{p.D / 1e6:.2f}M", f"{p.L:.3f}", f"{optimizers_share(rows[kind], p):.0%}", f"{sd:.3f}"]
                  for p, sd in zip(found, noise(rows[kind]))]
        parts += [f"## {KINDS[kind].label}\n", markdown(
            ["FLOPs", "runs", "sizes", "N at the minimum", "tokens there", "loss there",
             "the optimizer's FLOPs beside them", "sd between seeds (nats)"], minima),
                  exponents(points[kind], budgets[kind]),
                  f"In {without_a_minimum(points[kind], budgets[kind]):.0%} of the {STUDIES} bootstraps some "
                  "budget has no minimum, and the parabolas do without it.\n"]
    parts += [f"a, low-rank minus dense: {difference(points, budgets)}.\n",
              "## The best dense model minus the best low-rank one\n", markdown(
        ["FLOPs", "nats per byte", "95% interval"],
        [[f"{C:.2e}", f"{x:+.3f}", f"{a:+.3f} to {b:+.3f}"]
         for C, x, a, b in zip(budgets["spectron"], gap, low, high) if np.isfinite(x)]),
              same_size(rows)]
    every = {kind: rows_of(kind) for kind in KINDS}
    parts += [adam_lr_tables(every), f"## Other learning rates, at an adam_lr of {BASE:g}\n", markdown(
        ["", "FLOPs", "size", *(f"lr times {x:g}" for x in sorted({1, *TIMES}))], checked(every))]
    return "\n".join(parts)


def same_size(rows) -> str:
    """Who has the lower loss where both kinds have a model of a shape at a budget."""
    low, dense = ({(r["size"], r["budget"]): r["loss"] for r in rows[kind] if r["seed"] == 0}
                  for kind in KINDS)
    above = [low[place] - dense[place] for place in low if place in dense]
    return (f"At the same shape and FLOPs dense has the lower loss in {sum(x > 0 for x in above)} of "
            f"{len(above)} pairs (seed 0), by {statistics.median(above):.3f} in the median.\n")


def optimizers_share(rows, minimum) -> float:
    """Of the size nearest to a minimum: what the optimizer's products cost over what is counted as FLOPs."""
    of = [r for r in rows if abs(np.log(r["executed"] / minimum.C)) < 0.1]
    row = min(of, key=lambda r: abs(np.log(r["total"] / minimum.N)))
    return row["optimizer"] / row["executed"]


def difference(points, budgets) -> str:
    """How much larger the low-rank exponent is, by both approaches, with the bootstraps' middle 95%."""
    (low, low_laws), (dense, dense_laws) = (bootstrap(points[kind], budgets[kind]) for kind in KINDS)
    a, b = (exponent_of(points[kind], budgets[kind]) for kind in KINDS)
    c, d = (fit_law(points[kind]).exponent for kind in KINDS)
    return ", ".join(f"{found:+.3f} ({x:+.3f} to {y:+.3f}) by {name}" for name, found, drawn in (
        ("parabolas", a - b, np.subtract(low, dense)),
        ("the parametric law", c - d, [x.exponent - y.exponent for x, y in zip(low_laws, dense_laws)]))
                     for x, y in [interval(drawn)])


def adam_lr_tables(rows) -> str:
    """The sweep of adam_lr, and what another choice would have given."""
    losses = []
    for kind, budget, size in [(k, C, size) for k in KINDS for C in BUDGETS for size in isoflop.sizes(k, C)]:
        found = swept(rows[kind]).get((size, budget), {})
        losses.append([KINDS[kind].label, f"{budget:.2g}", size, *(
            "" if x not in found else "diverged" if found[x] is None else f"{found[x]:.3f}" for x in GRID)])
    others = []
    for label, adam_lr in CHOICES.items():
        _, points, budgets = collected(adam_lr=adam_lr)
        gap = isoflop.lowest(points["dense"], budgets["dense"]) - isoflop.lowest(
            points["spectron"], budgets["spectron"])
        others.append([label, *(f"{exponent_of(points[kind], budgets[kind]):.3f}" for kind in KINDS),
                       *(f"{x:+.3f}" for x in gap)])
    return "\n".join([
        "## adam_lr: the losses of seed 0\n",
        markdown(["", "FLOPs", "size", *(f"{x:g}" for x in GRID)], losses),
        "## The same study with another adam_lr\n",
        markdown(["adam_lr", *(f"a, {KINDS[kind].label}" for kind in KINDS),
                  *(f"gap at {C:.2g}" for C in BUDGETS)], others)])


def exponents(points: Points, budgets) -> str:
    """Of N_opt and D_opt with their intervals, and without each budget, by both approaches."""
    second, laws = bootstrap(points, budgets)
    left_out = without_each(points, budgets)
    rows = []
    for i, (name, a, d, drawn) in enumerate((
            ("parabolas", exponent_of(points, budgets), exponent_of(points, budgets, "D"), second),
            ("parametric law", (law := fit_law(points)).exponent, 1 - law.exponent,
             [law.exponent for law in laws]))):
        low, high = interval(drawn)
        rows.append([name, f"{a:.3f}", f"{low:.3f} to {high:.3f}", f"{d:.3f}",
                     ", ".join(f"{found[1 + i]:.3f}" for found in left_out)])
    return markdown(["", "a of N_opt ~ C^a", "95% interval", "exponent of D_opt",
                     "a without each budget, smallest first"], rows)


def checked(rows) -> list[list[str]]:
    """The losses of the runs that were repeated at other learning rates."""
    table = []
    for budget, size, kind in [(C, size, kind) for C, sizes in CHECKED.items() for size in sizes
                               for kind in KINDS]:
        by_lr = {r["lr"]: r["loss"] for r in rows[kind]
                 if (r["size"], r["budget"], r["seed"], r["adam_lr"]) == (size, budget, 0, BASE)}
        losses = (f"{by_lr[lr]:.3f}" for lr in sorted(by_lr))
        table.append([KINDS[kind].label, f"{budget:.2g}", size, *losses])
    return table


def log_axis(axis, label: str) -> None:
    """A logarithmic axis with ticks at 1, 2, 5, 10, ..., as far as the data reach."""
    low, high = axis.get_data_interval()
    ticks = [d * 10.0**e for e in range(3, 15) for d in (1, 2, 5) if low / 1.1 < d * 10.0**e < high * 1.1]
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}label": label})
    draw.name_ticks(axis, ticks)


def figure9(points, budgets):
    """Loss over size at each budget, low-rank and dense, with the parabolas and their minima."""
    fig, axes = draw.panels(2, 10.5, sharey=True)
    for ax, kind in zip(axes, KINDS):
        p = points[kind]
        for i, fitted in enumerate(profiles(p, budgets[kind])):
            N = fitted.points.N
            colour, x = draw.COLOURS[i], np.linspace(*np.log([N.min(), N.max()]), 50)
            ax.plot(N, fitted.points.L, "o", ms=4, color=colour, label=f"{BUDGETS[i]:.1e} FLOPs")
            ax.plot(np.exp(x), np.polyval(fitted.coefficients, x), color=colour, lw=1.3)
            if fitted.inside:
                ax.axvline(fitted.N, color=colour, ls="--", lw=1)
        log_axis(ax.xaxis, f"parameters, {KINDS[kind].label}")
    axes[0].set_ylabel("final validation loss (nats per byte)")
    return fig


def figure8(points, budgets):
    """N_opt and D_opt over the budget, each with its power law and the paper's slope."""
    fig, axes = draw.panels(2, 9.5)
    for ax, slope, of, label in ((axes[0], 0.479, "N", "parameters at the minimum"),
                                 (axes[1], 0.521, "D", "tokens at the minimum")):
        for kind in KINDS:
            found = [p for p in profiles(points[kind], budgets[kind]) if p.inside]
            C, y = [p.C for p in found], [getattr(p, of) for p in found]
            exponent, factor = power_law(C, y)
            ax.plot(C, y, "o", color=COLOURS[kind])
            ax.plot(C, factor * np.array(C)**exponent, color=COLOURS[kind],
                    label=f"{KINDS[kind].label}: {of} ~ C^{exponent:.2f}")
            if kind == "spectron":
                middle = np.exp(np.log(C).mean()), np.exp(np.log(y).mean())
                ax.plot(C, middle[1] * (np.array(C) / middle[0])**slope, "--", color="0.4",
                        label="the paper's slopes, C^0.479 and C^0.521")
        log_axis(ax.xaxis, "training FLOPs (executed)")
        log_axis(ax.yaxis, label)
    return fig


def gap_figure(budgets, gap, low, high):
    fig, (ax,) = draw.panels(1, 6.5, 4)
    ax.errorbar(budgets, gap, yerr=[gap - low, high - gap], fmt="o", capsize=4, color=draw.BLUE)
    ax.axhline(0, color="0.4", lw=1)
    log_axis(ax.xaxis, "training FLOPs (executed)")
    ax.set_ylabel("dense minus low-rank loss\n(nats per byte, 95% interval)")
    return fig


def residuals_figure(points):
    """What the parametric law leaves, over size and over tokens."""
    fig, axes = draw.panels(2, 9.5, sharey=True)
    for kind in KINDS:
        p, law = points[kind], fit_law(points[kind])
        for ax, x in zip(axes, (p.N, p.D)):
            ax.plot(x, p.L - law(p.N, p.D), "o", ms=4, color=COLOURS[kind], label=KINDS[kind].label)
    for ax, label in (axes[0], "parameters"), (axes[1], "tokens"):
        ax.axhline(0, color="0.4", lw=1)
        log_axis(ax.xaxis, label)
    axes[0].set_ylabel("loss minus fitted law (nats per byte)")
    return fig


def precision_figure(spreads: dict):
    """The exponents that the public code's 46 runs would give, were the paper's own law true."""
    fig, axes = draw.panels(2, 9.5, sharey=True)
    for ax, i, name in (axes[0], 0, "parabolas"), (axes[1], 1, "parametric law"):
        for row, (sigma, found) in enumerate(spreads.items()):
            ax.hist(found[:, i], np.arange(0.36, 0.561, 0.004), histtype="step", lw=1.5,
                    color=draw.COLOURS[row], label=f"{sigma:g} nats of noise")
        ax.axvline(0.479, color="0.2", ls="--", lw=1.4, label="the paper's 0.479")
        ax.axvline(0.49, color="0.2", ls=":", lw=1.4, label="Chinchilla's 0.49")
        ax.set(xlabel=f"exponent of N_opt, by the {name}", xlim=(0.36, 0.56),
               xticks=(0.4, 0.45, 0.5, 0.55))
    axes[0].set_ylabel(f"of {STUDIES} simulated studies")
    return fig


def write_isoflop(count: str = "total", flops: str = "executed") -> None:
    rows, points, budgets = collected(count, flops)
    where = RESULTS / "isoflop"
    gap, (low, high) = gaps(points["spectron"], points["dense"], budgets["spectron"],
                            [noise(rows[kind]) for kind in KINDS])
    table = (f"# IsoFLOP profiles, low-rank and dense\n\n{SETTING}. N {count}, FLOPs {flops}. "
             f"`python -m paper.scaling isoflop`\n\n{isoflop_table(rows, points, budgets, gap, low, high)}\n")
    if (count, flops) != ("total", "executed"):
        return print(table)
    every = [row for kind in KINDS for row in rows_of(kind)]
    lines = [",".join(map(str, line)) + "\n" for line in (every[0], *(row.values() for row in every))]
    write(where / "runs.csv", "".join(lines))
    write(where / "table.md", f"{table}## The exponent a, counted otherwise\n\n{conventions()}\n"
          "[Every run](runs.csv)\n\n![profiles](figure9.png)\n![optima](figure8.png)\n![gap](gap.png)\n")
    save(figure9(points, budgets), where / "figure9.png",
         "At each budget one size is best, and it grows with the compute", SETTING)
    save(figure8(points, budgets), where / "figure8.png", SAID["parametric"]["message"], SETTING)
    save(gap_figure(budgets["spectron"], gap, low, high), where / "gap.png", SAID["isoflop"]["message"],
         SETTING)
    print(f"{where}/table.md, runs.csv, figure8.png, figure9.png, gap.png")


def conventions() -> str:
    """The same runs, with N without embedding and head, and with C as 6 N D."""
    table = []
    for flops, count in itertools.product(("executed", "6nd"), ("total", "blocks")):
        _, points, budgets = collected(count, flops)
        table.append([f"{count}, {flops}", *(f"{a:.3f}" for kind in KINDS for a in (
            exponent_of(points[kind], budgets[kind]), fit_law(points[kind]).exponent))])
    return markdown(["N, FLOPs", *(f"{KINDS[kind].label}, {by}" for kind in KINDS
                                   for by in ("parabolas", "law"))], table)


def write_parametric(count: str = "total", flops: str = "executed") -> None:
    _, points, budgets = collected(count, flops)
    table = (f"# L = E + A / N^alpha + B / D^beta\n\n{SETTING}. N {count}. "
             f"`python -m paper.scaling parametric`. In brackets the middle 95% of {STUDIES} bootstraps.\n\n"
             f"{laws_table(points, budgets)}\n")
    if (count, flops) != ("total", "executed"):
        return print(table)
    where, design = RESULTS / "parametric", papers_design()
    spreads = {sigma: simulate(design, PAPER_BUDGETS, sigma) for sigma in (0.005, 0.01, 0.02)}
    precision = markdown(["noise of a run (nats)", "a by parabolas", "a by the parametric law"], [
        [f"{sigma:g}", *(f"{np.nanmean(x):.3f} ± {np.nanstd(x):.3f}" for x in found.T)]
        for sigma, found in spreads.items()])
    write(where / "table.md", f"{table}![residuals](residuals.png)\n\n"
          f"## What the paper's design can tell\n\n{STUDIES} studies of the {len(design)} runs that the "
          "public code lists, with the paper's own law as the truth, whose a is "
          f"{Law(**PAPER).exponent:.3f}.\n\n"
          f"{precision}\n![precision](precision.png)\n")
    save(residuals_figure(points), where / "residuals.png",
         "The fitted law misses a run by 0.02 (dense) or 0.04 nats (rms), as much as seeds differ", SETTING)
    save(precision_figure(spreads), where / "precision.png",
         "With 0.01 nats of noise the paper's design cannot tell 0.479 from 0.49",
         f"{STUDIES} simulated studies of {len(design)} runs each, the paper's parametric law as the truth")
    print(f"{where}/table.md, residuals.png, precision.png")


def laws_table(points, budgets) -> str:
    """The fitted law of each kind, with intervals."""
    table = []
    for kind, p in points.items():
        law, (_, laws) = fit_law(p), bootstrap(p, budgets[kind])
        cells = [f"{getattr(law, key):.3g} ({a:.3g} to {b:.3g})"
                 for key in ("E", "A", "alpha", "B", "beta", "exponent")
                 for a, b in [interval([getattr(x, key) for x in laws])]]
        table.append([KINDS[kind].label, str(len(p)), *cells, ", ".join(law.at_bounds()) or "none"])
    return markdown(["", "runs", "E", "A", "alpha", "B", "beta", "a = beta / (alpha + beta)", "at a bound"],
                    table)


PARTS = {"isoflop": write_isoflop, "parametric": write_parametric}


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("name", choices=[*PARTS, "plan"], metavar="NAME", help="isoflop, parametric or plan")
    parser.add_argument("--scale", default="nano", choices=list(SIZES), metavar="SIZE",
                        help="of plan: nano, or any other for the paper's own runs (nano)")
    parser.add_argument("--count", choices=("total", "blocks"), default="total",
                        help="N with or without embedding and head (total)")
    parser.add_argument("--flops", choices=("executed", "6nd"), default="executed",
                        help="C as executed, or the paper's 6 N D (executed)")
    parser.add_argument("--rate", type=number(), help="of plan: FLOPs a second of the machine")
    parser.add_argument("--make", action="store_true", help="train first what is missing: hours, see plan")
    args = parser.parse_args(argv)
    if args.name == "plan":
        rate = args.rate or (2e10 if args.scale == "nano" else 3.2e15)  # two CPU cores; 8 H100s at 40%
        for kind in KINDS:
            print(isoflop.plan(args.scale, kind, rate, args.count, args.flops))
        return print(isoflop.missing() if args.scale == "nano" else "")
    if args.make:
        isoflop.make()
    PARTS[args.name](args.count, args.flops)


if __name__ == "__main__":
    main()
