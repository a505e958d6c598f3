"""The figures of paper.reproduce: each takes the outcomes and the scale."""

import math
import textwrap
from dataclasses import replace

from lib.methods import count_parameters
from model import SIZES
from paper.arms import ADAM_LRS, ARMS, TRANSFERRED
from paper.output import save
from paper.runs import RESULTS, Run, log_of, seconds_per_step
from tools import plot
from tools.plot import COLOURS, new_figure

BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK = COLOURS
GREY = "#777777"
# One look for an arm in every figure: the colour says how it is updated, dashes that it is guided
LOOKS = {"spectron": (BLUE, "o", "-"), "orthogonalize": (RED, "s", "-"), "renormalize": (PINK, "D", "-"),
         "neither": (ORANGE, "^", "-"), "adamw": (GREEN, "v", "-"), "self-guided": (GREEN, "P", "--"),
         "self-guided-muon": (RED, "X", "--"), "dense": (BLACK, "d", "-"), "dense-adamw": (GREY, "h", "-"),
         "rank-0.4": (SKY, "^", "-"), "rank-0.125": (ORANGE, "v", "-"), "dense-time": (GREY, "d", "--"),
         "equilibrated": (GREEN, "^", "-"), "equilibrated-2": (SKY, "v", "--"),
         "equilibrated-muon": (ORANGE, "s", "--"), "lora-muon": (PINK, "P", "-"),
         "galore": (ORANGE, "o", ":"), "fira": (ORANGE, "s", ":"), "sltrain": (PINK, "D", ":"),
         "relora": (PINK, "^", ":"), "sct": (SKY, "v", ":"), "tsvd": (SKY, "P", ":"),
         "cola": (BLUE, "X", ":")}


def look(arm: str) -> dict:
    colour, marker, line = LOOKS.get(arm) or LOOKS[arm.removesuffix("-ffn").removesuffix("-flops")]
    return {"color": colour, "marker": marker, "ls": line}


def unit(found) -> str:
    return plot.unit([log.config for o in found for log in o.logs[:1]])


def panels(count: int, width: float = 9.5, height: float = 4.2, rows: int = 1, **more):
    fig = new_figure(width, height)
    axes = list(fig.subplots(rows, count // rows, squeeze=False, **more).flat)
    for ax in axes:
        ax.grid(alpha=0.25)
    return fig, axes


def curve(ax, o, x: str = "step", each: float = 1.0) -> None:
    """The validation loss of an arm over `each` times x: the mean over its seeds, and their band."""
    logs = [log.points("val_loss", x)[:-1] for log in o.logs]  # the last is over more tokens than the others
    if not logs:
        return
    xs, (low, mean, high) = [each * p[0] for p in logs[0]], zip(*(
        (min(column), sum(column) / len(column), max(column))
        for column in zip(*([y for _, y in log] for log in logs))))
    style, tokens = look(o.arm), o.logs[0].config["eval_tokens"]
    ax.plot(xs, mean, label=ARMS[o.arm].label, ms=4, lw=1.6, **style)
    ax.fill_between(xs, low, high, color=style["color"], alpha=0.2, lw=0)
    ax.set_ylabel(f"validation loss, first {tokens:,} tokens\n({unit([o])})")


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
                           **look(o.arm))
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
        curve(right, o, "step", seconds_per_step(o.arm, scale))
    left.set(xlabel="training FLOPs (executed)")
    right.set(xlabel="seconds of training (as paper.bench timed the steps)", ylabel="")
    return fig


def loss_over_lr(found, scale):
    """What diverged, or ends too high, is drawn at the top."""
    fig, (ax,) = panels(1, 9.5, 5)
    losses = [loss for o in found for loss in o.grid.values() if loss is not None]
    top = min(losses + [1]) * 2 if len(losses) < 2 else min(losses) + 0.8 * (max(losses) - min(losses))
    for o in found:
        style, label = look(o.arm), ARMS[o.arm].label
        shown = [(lr, min(top, loss if loss is not None else top)) for lr, loss in o.grid.items()]
        ax.plot(*zip(*shown), label=label, ms=5, lw=1.5, **style)
        lost = [lr for lr, loss in o.grid.items() if loss is None]
        ax.plot(lost, [top] * len(lost), ls="", marker="x", ms=12, mew=2.5, color=style["color"])
        if o.lr:
            ax.plot(o.lr, o.grid[o.lr], ls="", marker="o", ms=13, mfc="none", color=style["color"])
    ax.axhline(top, color="0.6", lw=0.8)
    for lr in (0.001, 0.01) if any(o.arm == "adamw" for o in found) else ():  # Figure 12's
        ax.axvline(lr, color="0.5", lw=1, ls="--")
        ax.text(lr, 0.02, f" the paper's {lr:g}", transform=ax.get_xaxis_transform(), va="bottom", fontsize=8,
                color="0.35")
    diverged = any(loss is None for o in found for loss in o.grid.values())
    ax.text(0.995, top, f"{top:.2f} and above; {'crosses' if diverged else 'none'} diverged",
            transform=ax.get_yaxis_transform(), ha="right", va="bottom", fontsize=8.5, color="0.3")
    ax.set(xscale="log", xlabel="learning rate of the block matrices (rings: the best of each)",
           ylabel=f"final validation loss ({unit(found)})")
    name_lrs(ax, {lr for o in found for lr in o.grid})
    return fig


def name_lrs(ax, lrs: set) -> None:
    """The learning rates under a logarithmic axis; powers of ten where they span much."""
    if max(lrs) < 500 * min(lrs):
        name_ticks(ax.xaxis, sorted(lrs))


def name_ticks(axis, ticks, unit: float = 1.0, suffix: str = "") -> None:
    axis.set_ticks(ticks, labels=[f"{tick / unit:g}{suffix}" for tick in ticks])
    axis.set_minor_formatter("")


def loss_by_arm(found, scale):
    """A row for each arm: the loss at its best learning rate, and small those at its others."""
    fig, (ax,) = panels(1, 9.5, 0.9 + 0.33 * len(found))
    for row, o in enumerate(found):
        others = [loss for loss in o.grid.values() if loss is not None]
        ax.plot(others, [row] * len(others), ls="", marker="|", ms=9, color="0.6")
        ax.plot(o.mean, row, marker="o", ms=6, color=BLUE)
    ax.set_yticks(range(len(found)), labels=[o.label for o in found])
    ax.invert_yaxis()
    ax.set_xlabel(f"final validation loss ({unit(found)}; dots: the best learning rate, bars: the others)")
    return fig


def transfer(found, scale):
    """A panel for each method: how far each width and rank ends above its own best loss."""
    by_name = {o.arm: o for o in found}
    fig, axes = panels(len(TRANSFERRED), 12.5, sharey=True)
    for ax, (method, arms) in zip(axes, TRANSFERRED.items()):
        for i, o in enumerate(by_name[arm] for arm in arms):
            shown = [(lr, loss - o.grid[o.lr]) for lr, loss in o.grid.items() if loss is not None]
            _, size, ratio = o.arm.split("@")
            ax.plot(*zip(*shown), color=COLOURS[i], marker="osvD^P"[i], ms=4, lw=1.4,
                    ls="-" if ratio == "0.25" else "--", label=f"width {size[7:]}, rank ratio {ratio}")
        ax.set(xscale="log", xlabel=f"learning rate of {ARMS[method].label}", ylim=(-0.02, 0.5))
        name_lrs(ax, {lr for arm in arms for lr in by_name[arm].grid})
    axes[0].set_ylabel(f"final loss above the curve's best\n({unit(found)})")
    return fig


def loss_over_adam_lr(found, scale):
    fig, (ax,) = panels(1, 8, 4.6)
    by_name, lines = {o.arm: o for o in found}, {}
    for base, lr, adam_lr, arm in ADAM_LRS:
        lines.setdefault((base, lr), []).append((adam_lr, by_name[arm].grid.get(lr)))
    for (base, lr), shown in lines.items():
        ax.plot(*zip(*shown), label=f"{ARMS[base].label}, lr {lr:g}", ms=5, lw=1.5, **look(base))
    ax.set(xscale="log", xlabel="learning rate of embedding, head and norms",
           ylabel=f"final validation loss ({unit(found)})")
    return fig


def loss_over_memory(found, scale):
    fig, (ax,) = panels(1, 8, 4.8)
    for o in found:
        ax.errorbar(o.memory["all"] / 1e6, o.mean, yerr=o.sd or 0, capsize=3, ms=7, label=o.label,
                    **look(o.arm) | {"ls": ""})
    ax.set(xscale="log", xlabel="MB of weights, gradients and optimizer state",
           ylabel=f"final validation loss ({unit(found)})")
    name_ticks(ax.xaxis, [25, 30, 40, 50, 60, 80])
    return fig


def over_parameters(ax, found, scale, ys: list) -> list[float]:
    """A line for the low-rank models and one for the dense, over million parameters, which it returns."""
    xs, half = [], len(found) // 2
    for o in found:
        c = SIZES[ARMS[o.arm].size or scale.size]
        xs.append(count_parameters(replace(c, rank_ratio=None) if o.arm.startswith("dense") else c) / 1e6)
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
    ax.set(xscale="log", xlabel="million parameters (dotted: the same shape, equal FLOPs)",
           ylabel=f"perplexity per {unit(found).split()[-1]}")
    name_ticks(ax.xaxis, [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 50, 100, 200, 500, 1000, 2000)
                          if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]])
    return fig


def figure7(found, scale):
    fig, axes = panels(3, 10.5)
    for ax, task in zip(axes, ("hellaswag", "piqa", "arc_easy")):
        over_parameters(ax, found, scale, [100 * o.scores[f"{task}_acc_norm"] for o in found])
        ax.set(xscale="log", xlabel="million parameters", ylabel=f"{task}, acc_norm (%)")
    return fig


def norm_curves(ax, found, key: str) -> None:
    """Without the last step, whose learning rate is nearly zero; beside dW the learning rate of Spectron."""
    for o in found:
        xs, ys = zip(*[(x, y) for x, y in o.logs[0].points(key)[:-1] if y > 0])
        style = look(o.arm)
        ax.plot(xs, ys, color=style["color"], lw=1.5, label=ARMS[o.arm].label)
        ax.plot(xs[-1], ys[-1], color=style["color"], marker=style["marker"], ms=5)
    if key == "dW" and found[0].arm == "spectron":
        ax.plot(*zip(*found[0].logs[0].points("lr")[:-1]), color=BLUE, lw=1.2, ls="--",
                label="Spectron's learning rate, its bound")


def figure2(found, scale):
    """Left, the norm of W's step; right, low-rank over dense, beside the paper's 10 to 30."""
    fig, (left, right) = panels(2)
    norm_curves(left, found, "dW")
    low, dense = found
    matrix = low.logs[0].config["spectra_of"]
    left.set(xlabel="step", ylabel=rf"$\|\Delta W\|_2$ of {matrix}", yscale="log")
    for log, label, line in ((dense.logs[0], "ratio, each at its best learning rate", "-"),
                             (log_of(Run(dense.arm, low.lr), scale), f"ratio, both at {low.lr:g}", ":")):
        if log:
            right.plot(*zip(*ratios(low.logs[0], log, "dW")[:-1]), color=BLUE, ls=line, lw=1.6, label=label)
    for ratio in 10, 30:
        right.axhline(ratio, color="0.3", ls="--", lw=1.2)
        right.text(0.99, ratio, f"the paper's {ratio}x", transform=right.get_yaxis_transform(), ha="right",
                   va="bottom", fontsize=9, color="0.3")
    right.set(xlabel="step", ylabel=r"$\|\Delta W\|_2$, low-rank over dense", yscale="log")
    name_ticks(right.yaxis, [0.5, 1, 2, 5, 10, 30])
    return fig


def ratios(log, other, key: str) -> list[tuple]:
    there = dict(other.points(key))
    return [(step, value / there[step]) for step, value in log.points(key) if there.get(step)]


def figure3(found, scale):
    """||dW||_2 with Spectron's learning rate, which bounds it; |dy|_rms; ||W||_2."""
    fig, axes = panels(3, 11.5)
    labels = {"dW": r"$\|\Delta W\|_2$", "dy": r"$|\Delta y|_{rms}$ on a fixed probe", "W": r"$\|W\|_2$"}
    for ax, (key, label) in zip(axes, labels.items()):
        norm_curves(ax, found, key)
        ax.set(xlabel="step", ylabel=label, yscale="linear" if key == "W" else "log")
        ax.text(0.98, 0.02, found[0].logs[0].config["spectra_of"], transform=ax.transAxes, ha="right",
                fontsize=8, color="0.35")
    return fig


def readme_figure(found) -> None:
    """||dW||_2 of three ways to update the same factors, and the bound that one of them has."""
    fig, (ax,) = panels(1, 8, 4.4)
    norm_curves(ax, found, "dW")
    ax.set(xlabel="step", ylabel=r"spectral norm of a step of $W = AB^T$", yscale="log")
    save(fig, RESULTS / "readme.png",
         "Spectron's step of W stays under its learning rate, which is its bound",
         f"size nano, {found[0].logs[0].config['spectra_of']}, each at its best learning rate")
