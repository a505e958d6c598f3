"""The figures of paper.reproduce: each takes the outcomes and the scale."""

import math
import textwrap
from dataclasses import replace

import numpy as np

from lib.methods import count_parameters
from model import SIZES
from paper.logs import Log
from paper.methods import ADAM_LRS, METHODS, WITH_ADAM
from paper.output import save
from paper.runs import RESULTS, Run, log_of, scale_of, seconds_per_step
from tools import plot
from tools.plot import COLOURS, new_figure

BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK = COLOURS
GREY = "#777777"
# One look for a method whose curve is drawn: dashes say that it is guided, or another's variant
LOOKS = {"spectron": (BLUE, "o", "-"), "orthogonalize": (RED, "s", "-"), "renormalize": (PINK, "D", "-"),
         "neither": (ORANGE, "^", "-"), "adamw": (GREEN, "v", "-"), "self-guided": (GREEN, "P", "--"),
         "self-guided-muon": (RED, "X", "--"), "dense": (BLACK, "d", "-"), "dense-adamw": (GREY, "h", "-"),
         "rank-0.4": (SKY, "^", "-"), "rank-0.125": (ORANGE, "v", "-"), "dense-time": (GREY, "d", "--"),
         "equilibrated": (GREEN, "^", "-"), "equilibrated-2": (SKY, "v", "--"),
         "equilibrated-muon": (ORANGE, "s", "--"), "lora-muon": (PINK, "P", "-")}
MOST = 8  # curves with a legend; more have labels beside them, and the colours of their families
FAMILIES = {"orthogonalized updates": BLUE, "AdamW": RED, "momentum, not orthogonalized": GREY}


def look(method: str) -> dict:
    colour, marker, line = LOOKS.get(method) or LOOKS[method.removesuffix("-ffn").removesuffix("-flops")]
    return {"color": colour, "marker": marker, "ls": line}


def family(method: str) -> str:
    """How the block matrices of a method are updated, by its flags."""
    flags = METHODS[method].flags
    adam = "muon" not in flags and any(name in flags for name in ("adamw", "self-guided", *WITH_ADAM))
    if "--no-orthogonalize" in flags:
        return "momentum, not orthogonalized"
    return "AdamW" if adam else "orthogonalized updates"


def unit(found) -> str:
    return plot.unit([log.config for o in found for log in o.logs[:1]])


def panels(count: int, width: float = 9.5, height: float = 4.2, **more):
    fig = new_figure(width, height)
    fig.suptitle(" \n ", fontsize=11.5)  # the room of what output.save writes there
    axes = list(fig.subplots(1, count, squeeze=False, **more).flat)
    for ax in axes:
        ax.grid(alpha=0.25)
    return fig, axes


def label_points(ax, points) -> None:
    """A label beside each (x, y, label, colour), where it covers least of the curves, points and texts."""
    ax.figure.draw_without_rendering()  # what follows is in pixels
    placed = [text.get_window_extent().get_points() for text in ax.texts]
    at = ax.transData.transform([point[:2] for point in points])
    drawn = np.concatenate(4 * [at] + [
        line.get_transform().transform_path(line.get_path()).interpolated(120).vertices
        for line in ax.get_lines()])

    for (x, y, label, colour), here in zip(points, at):
        text = ax.text(x, y, label, fontsize=9)
        half = text.get_window_extent().size / 2 + (3, 1)
        text.remove()
        cost, places = [], [(side, np.array([side * (half[0] + 9), rise])) for rise in range(-90, 91, 3)
                            for side in (1, -1, 0) if side or abs(rise) > 16]
        for _, place in places:
            low, high = here + place - half, here + place + half
            covered = ((drawn > low) & (drawn < high)).all(1).sum()
            hidden = sum((np.minimum(high, b) - np.maximum(low, a)).clip(0).prod() for a, b in placed)
            outside = (ax.bbox.min - low).clip(0).sum() + (high - ax.bbox.max).clip(0).sum()
            cost.append(8 * covered + hidden + 9 * outside + math.hypot(place[0] - half[0], 2 * place[1]))
        side, best = places[np.argmin(cost)]
        placed.append((here + best - half, here + best + half))
        arrow = {"arrowstyle": "-", "lw": 0.7, "color": colour, "relpos": (0.5 - side / 2, 0.5)}
        ax.annotate(label, (x, y), best * 72 / ax.figure.dpi, textcoords="offset points", fontsize=9,
                    color=colour, ha="center", va="center", arrowprops=arrow)


def curve(ax, o, x: str = "step", each: float = 1.0) -> None:
    """The validation loss of a method over `each` times x: the mean over its seeds, and their band. The final
    one is of more tokens than those before it, so that it stands alone."""
    logs = [[(each * there, loss) for there, loss in log.points("val_loss", x)] for log in o.logs]
    if not logs:
        return
    columns = [(column[0][0], [loss for _, loss in column]) for column in zip(*logs)]
    xs, low, mean, high = zip(*((there, min(ys), sum(ys) / len(ys), max(ys)) for there, ys in columns))
    style, c = look(o.method), o.logs[0].config
    ax.plot(xs[:-1], mean[:-1], label=METHODS[o.method].label, ms=4, lw=1.6, **style)
    ax.fill_between(xs[:-1], low[:-1], high[:-1], color=style["color"], alpha=0.2, lw=0)
    ax.plot(xs[-1], o.mean, ms=8, mew=1.6, mfc="none", **style | {"ls": ""})
    of = "all" if c.get("final_eval_tokens", 10**8) >= 10**8 else f"{c['final_eval_tokens']:,} tokens"
    ax.plot([], [], "o", ms=8, mfc="none", color="0.3", label=f"final, {of} of the validation text")
    ax.set_ylabel(f"validation loss ({unit([o])})\ncurves: its first {c['eval_tokens']:,} tokens")


def curves_and_gaps(found, scale):
    """Left, validation loss over training; right, how much higher each ends than the lowest."""
    fig, (left, right) = panels(2, 10.5, width_ratios=[1.4, 1])
    for o in found:
        curve(left, o)
    left.set(xlabel="step")
    losses = [loss for o in found for log in o.logs[:1] for _, loss in log.points("val_loss")[:-1]]
    left.set_ylim(top=min(max(losses), 1.9 * min(losses)))
    least = min(o.mean for o in found)
    for row, o in enumerate(found):
        if o.losses:
            right.errorbar(100 * (o.mean / least - 1), row, xerr=100 * (o.sd or 0) / least, capsize=3, ms=6,
                           **look(o.method))
    names = [textwrap.fill(o.label if o.losses else f"{o.label}: diverged", 18) for o in found]
    right.set(yticks=range(len(found)), yticklabels=names, ylim=(len(found) - 0.4, -0.6),
              xlabel="final loss over the lowest (%)\nmean and standard deviation of the seeds")
    low, high = right.get_xlim()
    right.set_xlim(min(-1.0, low), high + 0.04 * (high - low))
    return fig


def figure5(found, scale):
    low, by_flops, by_time = found
    fig, (left, right) = panels(2, sharey=True)
    for o in (low, by_flops):
        curve(left, o, "flops")
    for o in (low, by_time):
        curve(right, o, "step", seconds_per_step(o.method, scale))
    left.set(xlabel="training FLOPs (executed)")
    left.xaxis.set_major_formatter(lambda x, _: f"{x:g}".replace("e+", "e"))
    right.set(xlabel="seconds of training (as paper.bench timed the steps)", ylabel="")
    return fig


def loss_over_lr(found, scale):
    """What diverged, or ends too high, is drawn at the top."""
    fig, (ax,) = panels(1, 9.5, 5)
    losses = [loss for o in found for loss in o.grid.values() if loss is not None]
    top = min(losses + [1]) * 2 if len(losses) < 2 else min(losses) + 0.8 * (max(losses) - min(losses))
    for o in found:
        style, label = look(o.method), METHODS[o.method].label if len(found) <= MOST else None
        shown = [(lr, min(top, loss if loss is not None else top)) for lr, loss in o.grid.items()]
        ax.plot(*zip(*shown), label=label, ms=5, lw=1.5, **style)
        lost = [lr for lr, loss in o.grid.items() if loss is None]
        ax.plot(lost, [top] * len(lost), ls="", marker="x", ms=12, mew=2.5, color=style["color"])
        if o.lr:
            ax.plot(o.lr, o.grid[o.lr], ls="", marker="o", ms=13, mfc="none", color=style["color"])
    ax.axhline(top, color="0.6", lw=0.8)
    for lr in (0.001, 0.01) if any(o.method == "adamw" for o in found) else ():  # Figure 12's
        ax.axvline(lr, color="0.5", lw=1, ls="--")
        ax.text(lr, 0.02, f" the paper's {lr:g}", transform=ax.get_xaxis_transform(), va="bottom", fontsize=8,
                color="0.35")
    diverged = any(loss is None for o in found for loss in o.grid.values())
    ax.text(0.995, top, f"{top:.2f} and above; {'crosses' if diverged else 'none'} diverged",
            transform=ax.get_yaxis_transform(), ha="right", va="bottom", fontsize=8.5, color="0.3")
    ax.set(xscale="log", xlabel="learning rate of the block matrices (rings: the best of each)",
           ylabel=f"final validation loss ({unit(found)})")
    name_lrs(ax, {lr for o in found for lr in o.grid})
    if len(found) > MOST:
        ax.set_ylim(bottom=min(losses) - 0.14 * (top - min(losses)))
        label_points(ax, [(o.lr, o.grid[o.lr], o.label, look(o.method)["color"]) for o in found if o.lr])
    return fig


def name_lrs(ax, lrs: set) -> None:
    """The learning rates under a logarithmic axis; powers of ten where they span much."""
    if max(lrs) < 500 * min(lrs):
        name_ticks(ax.xaxis, sorted(lrs))


def name_ticks(axis, ticks) -> None:
    """20000 as 20k, 1000000 as 1M, 2e+11 as 2e11."""
    def short(x):
        return next((f"{x / unit:g}{suffix}" for unit, suffix in ((1e6, "M"), (1e3, "k"))
                     if unit <= x < 1000 * unit), f"{x:g}".replace("e+", "e"))
    axis.set_ticks(ticks, labels=[short(tick) for tick in ticks])
    axis.set_minor_formatter("")


def loss_by_method(found, scale):
    """A row for each method: the loss at its best learning rate, and small those at its others."""
    fig, (ax,) = panels(1, 9.5, 0.9 + 0.33 * len(found))
    for row, o in enumerate(found):
        others = [loss for loss in o.grid.values() if loss is not None]
        ax.plot(others, [row] * len(others), ls="", marker="|", ms=9, color="0.6")
        ax.plot(o.mean, row, marker="o", ms=6, color=BLUE)
    ax.set_yticks(range(len(found)), labels=[o.label for o in found])
    ax.invert_yaxis()
    ax.set_xlabel(f"final validation loss ({unit(found)}; dots: the best learning rate, bars: the others)")
    return fig


def loss_over_lr_of_shapes(curves: dict):
    """A panel for each method, from shape -> lr -> loss: how far each ends above its own best loss."""
    fig, axes = panels(len(curves), 13.5, sharey=True)
    for ax, (method, shapes) in zip(axes, curves.items()):
        for i, ((width, ratio), losses) in enumerate(shapes.items()):
            ax.plot([*losses], [loss - min(losses.values()) for loss in losses.values()], color=COLOURS[i],
                    marker="osvD^P"[i], ms=4, lw=1.4, ls="-" if ratio == 0.25 else "--",
                    label=f"width {width}, rank ratio {ratio:g}")
        ax.set(xscale="log", xlabel=f"learning rate of {METHODS[method].label}", ylim=(-0.02, 0.5))
        name_lrs(ax, {lr for losses in shapes.values() for lr in losses})
        ax.tick_params(axis="x", labelsize=7)
    axes[0].set_ylabel("final loss above the curve's best\n(nats per byte)")
    return fig


def over_spectron(gaps: dict):
    """A row for each method, from label -> steps -> (mean, half the 95% interval) of a difference."""
    fig, (ax,) = panels(1, 8, 1.3 + 0.42 * len(gaps))
    rows = sorted(gaps, key=lambda label: next(iter(gaps[label].values())))
    looks = dict(zip(sorted({steps for by_steps in gaps.values() for steps in by_steps}),
                     ((SKY, "o"), (BLUE, "s"), (BLACK, "D"))))
    for row, label in enumerate(rows):
        for i, (steps, (mean, half)) in enumerate(gaps[label].items()):
            colour, marker = looks[steps]
            ax.errorbar(mean, row + 0.22 * (i - (len(gaps[label]) - 1) / 2), xerr=half, color=colour,
                        fmt=marker, ms=5, capsize=3, label=f"{steps:,} steps")
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.4, -0.6),
           xlabel="final loss minus Spectron's (nats per byte; mean and 95% interval)")
    return fig


def loss_over_adam_lr(found, scale):
    """A row for each method: the loss at its best adam_lr, and how far above it ends at the others."""
    by_name, rows = {o.method: o for o in found}, {}
    for base, lr, adam_lr, method in ADAM_LRS:
        rows.setdefault((base, lr), {})[adam_lr] = by_name[method].grid.get(lr)
    columns = sorted({adam_lr for losses in rows.values() for adam_lr in losses})
    fig, (ax,) = panels(1, 9.5, 1.5 + 0.26 * len(rows))
    ax.grid(False)
    for row, ((base, _), losses) in enumerate(rows.items()):
        best, kind = min(loss for loss in losses.values() if loss is not None), family(base)
        for adam_lr, loss in losses.items():
            column, above = columns.index(adam_lr), math.inf if loss is None else loss - best
            ax.barh(row, 0.96, 0.92, column - 0.48, color=FAMILIES[kind], alpha=max(0.08, 0.9 - 6 * above),
                    label="" if above else kind)
            ax.text(column, row, f"{loss:.3f}" if not above else f"+{above:.3f}", ha="center", va="center",
                    fontsize=9, color="k" if above else "w", fontweight="normal" if above else "bold")
    ax.set(xlabel="learning rate of embedding, head and norms\nwhite: final loss at the best "
           f"({unit(found)}); black: how far above it", xticks=range(len(columns)),
           xticklabels=[f"{x:g}" for x in columns], yticks=range(len(rows)),
           yticklabels=[f"{METHODS[base].label}, lr {lr:g}" for base, lr in rows],
           ylim=(len(rows) - 0.4, -0.6))
    return fig


def loss_over_memory(found, scale):
    fig, (ax,) = panels(1, 9.5, 5)
    for o in found:
        ax.errorbar(o.memory["all"] / 1e6, o.mean, yerr=o.sd or 0, capsize=3, ms=6, fmt="o",
                    color=FAMILIES[family(o.method)], label=family(o.method))
    ax.set(xscale="log", xlabel="MB of weights, gradients and optimizer state",
           ylabel=f"final validation loss ({unit(found)})")
    name_ticks(ax.xaxis, [25, 30, 40, 50, 60, 80])
    label_points(ax, [(o.memory["all"] / 1e6, o.mean, o.label, FAMILIES[family(o.method)])
                      for o in sorted(found, key=lambda o: o.mean)])
    return fig


def over_parameters(ax, found, scale, ys: list) -> list[float]:
    """A line for the low-rank models and one for the dense, over parameters, which it returns."""
    xs, half = [], len(found) // 2
    for o in found:
        c = SIZES[METHODS[o.method].size or scale.size]
        xs.append(count_parameters(replace(c, rank_ratio=None) if o.method.startswith("dense") else c))
    ax.plot(xs[:half], ys[:half], label="Spectron, low-rank", ms=6, lw=1.6, **look("spectron"))
    ax.plot(xs[half:], ys[half:], label="Muon, dense", ms=6, lw=1.6, **look("dense"))
    return xs


def figure6(found, scale):
    """Perplexity of seed 0 over parameters, low-rank and dense, of equal training FLOPs for each pair."""
    fig, (ax,) = panels(1, 6.5, 4.2)
    ys, half = [math.exp(o.by_seed[0]) for o in found], len(found) // 2
    xs = over_parameters(ax, found, scale, ys)
    for i in range(half):
        ax.plot(xs[i::half], ys[i::half], color="0.6", lw=0.8, ls=":")
    ax.set(xscale="log", xlabel="parameters (dotted: the same shape, equal FLOPs)",
           ylabel=f"perplexity per {unit(found).split()[-1]}")
    name_ticks(ax.xaxis, [tick for tick in (2e5, 5e5, 1e6, 2e6, 5e6, 1e7, 5e7, 1e8, 2e8, 5e8, 1e9, 2e9)
                          if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]])
    return fig


def figure7(found, scale):
    fig, axes = panels(3, 10.5)
    for ax, task in zip(axes, ("hellaswag", "piqa", "arc_easy")):
        over_parameters(ax, found, scale, [100 * o.scores[f"{task}_acc_norm"] for o in found])
        ax.set(xscale="log", xlabel="parameters", ylabel=f"{task}, acc_norm (%)")
    return fig


def norm_curves(ax, found, key: str) -> None:
    """Without the last step, whose learning rate is nearly zero; beside dW the learning rate of Spectron."""
    for o in found:
        xs, ys = zip(*[(x, y) for x, y in o.logs[0].points(key)[:-1] if y > 0])
        style = look(o.method)
        ax.plot(xs, ys, color=style["color"], lw=1.5, label=METHODS[o.method].label)
        ax.plot(xs[-1], ys[-1], color=style["color"], marker=style["marker"], ms=5)
    if key == "dW" and found[0].method == "spectron":
        ax.plot(*zip(*found[0].logs[0].points("lr")[:-1]), color=BLUE, lw=1.2, ls="--",
                label="Spectron's learning rate, its bound")


def figure2(found, scale):
    """Left, the norm of W's step; right, low-rank over dense, beside the paper's 10 to 30."""
    fig, (left, right) = panels(2)
    norm_curves(left, found, "dW")
    low, dense = found
    matrix = low.logs[0].config["spectra_of"]
    left.set(xlabel="step", ylabel=rf"$\|\Delta W\|_2$ of {matrix}", yscale="log")
    right.plot(*zip(*ratios(low.logs[0], dense.logs[0])), color=BLUE, lw=1.6,
               label="ratio, each at its best learning rate")
    above = {lr: found for lr, found in step_ratios(found, scale).items() if lr > max(low.lr, dense.lr)}
    for (lr, points), colour in zip(above.items(), (SKY, ORANGE, RED)):
        right.plot(*zip(*points), color=colour, lw=1.6, label=f"ratio, both at {lr:g}")
    for ratio in 10, 30:
        right.axhline(ratio, color="0.3", ls="--", lw=1.2)
        right.text(0.99, ratio, f"the paper's {ratio}x", transform=right.get_yaxis_transform(), ha="right",
                   va="bottom", fontsize=9, color="0.3")
    right.set(xlabel="step", ylabel=r"$\|\Delta W\|_2$, low-rank over dense", yscale="log")
    name_ticks(right.yaxis, [0.5, 1, 2, 5, 10, 30])
    return fig


def ratios(log, other) -> list[tuple]:
    """||dW||_2 over the other's, by step, without the last one, whose learning rate is nearly zero."""
    there = dict(other.points("dW")[:-1])
    return [(step, dW / there[step]) for step, dW in log.points("dW") if there.get(step)]


def step_ratios(found, scale) -> dict[float, list[tuple]]:
    """By learning rate that both methods had: ||dW||_2 of the first over that of the second, seed 0."""
    pairs = {lr: [log_of(Run(o.method, lr), scale) for o in found] for lr in found[0].grid}
    return {lr: ratios(low, dense) for lr, (low, dense) in pairs.items() if low and dense}


def figure3(found, scale):
    """||dW||_2 with Spectron's learning rate, which bounds it; |dy|_rms; ||W||_2."""
    fig, axes = panels(3, 11.5)
    labels = {"dW": r"$\|\Delta W\|_2$", "dy": r"$|\Delta y|_{rms}$ on a fixed probe", "W": r"$\|W\|_2$"}
    for ax, (key, label) in zip(axes, labels.items()):
        norm_curves(ax, found, key)
        ax.set(xlabel="step", ylabel=label, yscale="linear" if key == "W" else "log")
    axes[0].set_xlabel(f"step ({found[0].logs[0].config['spectra_of']})")
    return fig


def readme_figure(found) -> None:
    """||dW||_2 of Spectron at its default learning rate, and of Muon on the factors at that and at a
    quarter of it; all else is Spectron's."""
    fig, (ax,) = panels(1, 8, 4.3)
    lr, first = found[0].lr, found[0].logs[0]
    quarter = lr / 4
    same, own = (log_of(Run("orthogonalize-adam0.003", x), scale_of("nano")) for x in (lr, quarter))
    for log, name, colour, style, y in (
            (first, f"Spectron, lr {lr:g}", BLUE, "-", 0.88),
            (own, f"Muon on the factors\nlr {quarter:g}", ORANGE, "--", 0.5),
            (same, f"Muon on the factors\nlr {lr:g}", RED, "-", 9)):
        points = [(step, gauge * log.config["lr"] / lr) for step, gauge in log.points("gauge")]
        ax.plot(*zip(*points), color=colour, lw=2.4, ls=style)
        ax.text(points[-1][0] + 4, y, f"{name}\nloss {log.final_loss:.3f}", color=colour,
                fontsize=11, fontweight="bold", va="center")
    ax.axhspan(0.1, 1, color=BLUE, alpha=0.08, lw=0)
    ax.axhline(1, color=BLACK, lw=1.4)
    ax.axhline(1.21, color=GREY, lw=0.9, ls=":")
    ax.text(198, 0.97, "Spectron's bound: the learning rate", ha="right", va="top", fontsize=11)
    ax.text(198, 1.25, "1.21, with five Newton-Schulz steps", ha="right", va="bottom", fontsize=9, color=GREY)
    ax.set(xlabel="step", ylabel=rf"step of $W = AB^T$: $\|\Delta W\|_2\,/\,{lr:g}$", yscale="log",
           xlim=(0, points[-1][0]), ylim=(0.35, 15))
    name_ticks(ax.yaxis, [0.5, 1, 2, 5, 10])
    save(fig, RESULTS / "readme.png",
         f"Renormalization bounds the step of W by the learning rate; at lr {quarter:g} Muon on the factors "
         "takes the same steps without it",
         f"Size nano, seed 0, {first.config['spectra_of']}; final validation loss, {unit(found)}")


def first_run_figure() -> None:
    """The losses of the README's first command."""
    log = Log(*plot.read_log(RESULTS / "nano/default.jsonl"))
    fig, (ax,) = panels(1, 7, 3.2)
    ax.plot(*zip(*log.points("loss")), color=BLUE, lw=1.4, label="training, one batch")
    ax.plot(*zip(*log.points("val_loss")), color=RED, marker="o", ls="none", label="validation")
    ax.set(xlabel="step", ylabel="loss (nats per byte)", ylim=(1, 6))
    save(fig, RESULTS / "first-run.png", f"240 steps bring the loss to {log.final_loss:.2f}",
         "python train.py: nano, bytes of Python's standard library, seed 0, two CPU cores in float32")
