"""The pictures and numbers of docs/LESSON.md.

    python -m paper.lesson          draws every picture into docs/lesson/, prints the sentences with numbers
    python -m paper.lesson sigma    chapter 4: trains nano, and compares every sigma with the exact norm
    python -m paper.lesson bound    chapter 6: pairs made so that ||dW|| is as large as it can be

Everything comes from committed logs and from small computations with fixed seeds. docs/lesson/sigma.json is
the log of one run: python -m paper.lesson sigma --steps 100 --json docs/lesson/sigma.json. sign.json has the
losses of the lesson's own method.
"""

import math
import re
import statistics
from functools import cache
from pathlib import Path

import torch

import train
from lib.cli import Parser, command, positive
from lib.methods import count_parameters, flops_per_token
from lib.norms import product_norm, spectral_norm
from model import SIZES, Llama, LlamaConfig, rank_of
from paper import logs, tuned
from paper.draw import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, name_ticks, panels, ratios
from paper.methods import METHODS, SHAPES
from paper.output import read_json, save, write_json
from spectron import Spectron, power_iteration
from tools import machine, prepare

PICTURES, RUNS = Path("docs/lesson"), Path("results/runs/nano.jsonl")
NO_ONE = Path("results/equilibrated/ideas-200x4096.jsonl")  # its runs no1: the radius without its + 1
NANO, MATRIX = SIZES["nano"], "blocks.2.attention.o_proj"
ETA = 0.2


def log(name: str, path: Path = RUNS) -> logs.Log:
    return logs.get(path, name)


def caption(ax, title: str) -> None:
    """What a panel shows, in the letters of save()."""
    ax.set_title(title, fontsize=8, color="0.35", loc="left")


def mark(ax, values, form: str) -> None:
    """The values of horizontal bars beside their ends."""
    for row, value in enumerate(values):
        ax.text(value + 0.02, row, form.format(value), va="center", fontsize=9,
                bbox=dict(facecolor="white", edgecolor="none", pad=0.5))


def without_last(run: logs.Log, key: str) -> list[tuple]:
    """(step, value): in the last step the learning rate is nearly zero."""
    return run.points(key)[:-1]


# ------------------------------------------- 1: what low rank costs -----------------------------------------

def dense(config: LlamaConfig) -> LlamaConfig:
    return LlamaConfig(**vars(config) | {"rank_ratio": None})


def meta(config: LlamaConfig) -> Llama:
    with torch.device("meta"):
        return Llama(config)


@cache
def costs() -> dict:
    """What low rank costs, over what dense weights cost. Seconds are of two CPU cores, memory and speed of S
    on one H100, compiled."""
    seconds = read_json(Path("results/seconds/nano.json"))["seconds"]
    gpu = {kind: (float(speed.replace(",", "")), float(peak)) for kind, speed, peak in re.findall(
        r"S, (\w+), compiled \| 16 x 2,048 \| ([\d,]+) .* ([\d.]+) GB",
        Path("results/bench/gpu.md").read_text("utf-8"))}
    in_factors = sum(p.numel() for pair in meta(SIZES["S"]).factor_pairs() for p in pair)
    return {"matrices": {name: r * (m + n) / (m * n) for name, n, m in (
                ("q, k, v, o", NANO.dim, NANO.dim), ("gate, up", NANO.dim, NANO.ffn_dim),
                ("down", NANO.ffn_dim, NANO.dim)) for r in [rank_of(0.25, n, m)]},
            "parameters": (count_parameters(NANO), count_parameters(dense(NANO))),
            "flops": (flops_per_token(meta(NANO)), flops_per_token(meta(dense(NANO)))),
            "seconds": (seconds["spectron"], seconds["dense"]),
            "memory": (gpu["spectron"][1], gpu["dense"][1]),
            "speed": gpu["spectron"][0] / gpu["dense"][0],
            "S": count_parameters(SIZES["S"]),
            "dense part of S": 1 - in_factors / count_parameters(SIZES["S"])}


def draw_costs():
    fig, (left, right) = panels(2, 9.5, 3.2, width_ratios=[1, 1.3])
    found = costs()
    for ax, shown in ((left, found["matrices"]), (right, {
            "parameters, nano": share(found["parameters"]), "FLOPs a token, nano": share(found["flops"]),
            "seconds a step, nano": share(found["seconds"]),
            "peak memory, S on a GPU": share(found["memory"])})):
        ax.barh(list(shown), shown.values(), color=BLUE, height=0.6)
        ax.axvline(1, color=BLACK, lw=1, ls="--")
        mark(ax, shown.values(), "{:.0%}")
        ax.set(xlim=(0, 1.25), xticks=(0, 0.5, 1), xticklabels=("0", "half", "dense"))
        ax.invert_yaxis()
    caption(right, "the whole model")
    return fig, \
        "Low rank saves parameters, FLOPs and time, but nothing in the down projection and no GPU memory", \
        "parameters of one matrix, nano, rank ratio 0.25"


def share(pair: tuple) -> float:
    return pair[0] / pair[1]


# --------------------------------------------- 2: why W jumps -----------------------------------------------

SAME_LR = {"with renormalization": "spectron-lr0.2-seed0",
           "without renormalization": "orthogonalize-adam0.003-lr0.2-seed0"}


def low_over_dense(lr: float) -> list[tuple]:
    """(step, ||dW|| of the low-rank matrix over that of the dense one), both with AdamW."""
    return ratios(*(log(f"{method}-lr{lr:g}-seed0") for method in ("adamw", "dense-adamw")))


def draw_jump():
    fig, (left, right) = panels(2, 9.5, 3.8)
    for (label, name), colour in zip(SAME_LR.items(), (BLUE, RED)):
        left.plot(*zip(*without_last(log(name), "gauge")), color=colour, lw=1.6,
                  label=f"{label}: loss {log(name).final_loss:.2f}")
    left.axhline(1, color=BLACK, lw=1, ls="--", label="the learning rate itself")
    left.set(xlabel="step", ylabel=r"$\|\Delta W\|_2$ / lr", yscale="log")
    for lr, colour in (1e-3, GREEN), (1e-2, PINK):
        right.plot(*zip(*low_over_dense(lr)), color=colour, lw=1.6, label=f"AdamW, both at {lr:g}")
    right.axhspan(10, 30, color=ORANGE, alpha=0.4, lw=0, label="the paper's 10 to 30")
    right.set(xlabel="step", ylabel=r"$\|\Delta W\|_2$, factors over dense", yscale="log")
    name_ticks(left.yaxis, [0.5, 1, 2, 5, 10])
    name_ticks(right.yaxis, [0.5, 1, 2, 5, 10, 30])
    caption(right, "nano; 0.001 is the best learning rate of both")
    return fig, "Renormalization keeps every step of W below the learning rate; without it the steps grow", \
        f"{MATRIX} of nano, both at lr 0.2 and adam_lr 0.003"


# ------------------------------------------ 3: Newton-Schulz -----------------------------------------------

SPECTRUM = torch.logspace(0, -3, 64, dtype=torch.float64)


def polynomial(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """What so many steps make of the singular values x of a matrix with the Frobenius norm 1."""
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


@cache
def reached() -> dict:
    """Where five steps end: singular values above 0.01, and the highest below, with the value it is of."""
    x = torch.logspace(-6, 0, 400_001, dtype=torch.float64)
    y = polynomial(x)
    above = y[x >= 0.01]
    return {"least": float(above.min()), "most": float(above.max()), "top": float(y.max()),
            "from": float(x[y.argmax()])}


def draw_newton_schulz():
    (fig, (left, right)), ends = panels(2, 9.5, 3.8, sharey=True), reached()
    x = torch.logspace(-4, 0, 2000, dtype=torch.float64)
    for steps, colour in zip(range(6), (GREY, ORANGE, GREEN, SKY, RED, BLUE)):
        label = f"{steps} steps" if steps != 1 else "1 step"
        left.plot(x, polynomial(x, steps), color=colour, lw=2.2 if steps == 5 else 1.2, label=label)
        values = polynomial(SPECTRUM / SPECTRUM.norm(), steps)
        right.plot(range(1, 65), values.sort(descending=True).values, color=colour, marker=".", ms=4,
                   lw=2.2 if steps == 5 else 1)
    for ax in (left, right):
        ax.axhspan(ends["least"], ends["most"], color=BLUE, alpha=0.1, lw=0)
    caption(right, "one matrix with singular values from 1 to 0.001, over its Frobenius norm")
    left.set(xscale="log", xlabel="singular value before", ylabel="after")
    right.set(xlabel="singular values of one matrix, the largest first")
    return fig, "Five steps lift every singular value above 0.01 to between " \
        f"{ends['least']:.2f} and {ends['most']:.2f}", \
        "the polynomial, applied 0 to 5 times"


# ------------------------------------------ 4: power iteration ----------------------------------------------

class Watched(Spectron):
    """Spectron that also keeps, for each step, sigma over the exact norm of every factor."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.watched = []

    def step(self, closure=None):
        self.watched.append([])
        return super().step(closure)

    def spectral_norm(self, factors, group):
        sigma = super().spectral_norm(factors, group)
        F = torch.stack(factors).double()
        exact = torch.linalg.eigvalsh(F.mT @ F)[:, -1].sqrt()  # much faster than an SVD
        self.watched[-1] += (sigma.flatten() / exact).tolist()
        return sigma


def watch(steps: int, *flags) -> dict:
    """Trains nano as train.py does and returns the lowest and the median of sigma over the exact norm."""
    c = train.resolve(train.parse(["--dtype", "float32", "--device", "cpu", *flags]))
    corpus, *_ = prepare.open_corpus(c, train.NANO["data"])
    torch.manual_seed(c.seed)
    model = Llama(LlamaConfig(**c.model))
    optimizers = train.spectron_optimizers(model, c, Watched)
    for step in range(steps):
        x, y = corpus.batch(step, c.tokens_per_step // c.seq_len, c.seed)
        loss = train.backward(model, x, y, c)
        train.clip_gradients(model, train.read_back(model, loss, False)[0])
        train.update(optimizers, train.schedule(step, c.steps))
    ratios = optimizers[0].watched
    return {"made": machine.provenance(), "lowest": [round(min(row), 4) for row in ratios],
            "median": [round(statistics.median(row), 4) for row in ratios]}


def sigma(steps: int, json_file: Path | None = None, *flags) -> None:
    found = watch(steps, *flags)
    print("sigma over the exact norm, of the 56 factors")
    for step in sorted({1, 20, 40, steps} & set(range(steps + 1))):
        lowest, median = (found[key][step - 1] for key in ("lowest", "median"))
        print(f"step {step:3}   lowest {lowest:.3f}   median {median:.3f}")
    if json_file:
        write_json(json_file, found)


@cache
def cold() -> dict[int, tuple[float, float]]:
    """By the number of power steps from a random u: the lowest and the median of sigma over the exact norm of
    nano's first factors."""
    torch.manual_seed(0)
    factors = [p.detach().double() for pair in Llama(NANO).factor_pairs() for p in pair]
    starts = [torch.randn(len(p), generator=torch.Generator().manual_seed(i)).double()
              for i, p in enumerate(factors)]
    exact = [spectral_norm(p) for p in factors]
    found = {}
    for steps in (1, 2, 3, 5, 10, 20):
        ratios = [float(power_iteration(p, u, steps)[0] / norm) for p, u, norm in zip(factors, starts, exact)]
        found[steps] = min(ratios), statistics.median(ratios)
    return found


def draw_power():
    fig, (left, right) = panels(2, 9.5, 3.8, sharey=True)
    found, run = cold(), read_json(PICTURES / "sigma.json")
    for i, (label, colour) in enumerate((("the lowest of 56 factors", RED), ("their median", BLUE))):
        left.plot([*found], [pair[i] for pair in found.values()], color=colour, marker="o", ms=4, lw=1.6,
                  label=label)
        right.plot(range(1, len(run["lowest"]) + 1), run[label.split()[1]], color=colour, lw=1.6)
    for ax in (left, right):
        ax.axhline(1, color=BLACK, lw=1, ls="--")
    left.set(xscale="log", xticks=list(found), xlabel="power steps from a random u, before training",
             ylabel="sigma / exact norm")
    left.set_xticklabels(list(found))
    left.minorticks_off()
    right.set(xlabel="step of training, one power step each")
    caption(right, "nano, all factors")
    worst = 1 - min(run["lowest"])
    return fig, f"Sigma is never above the exact norm, mostly within 5% of it, at worst {worst:.0%} below", \
        "nano's first factors"


# --------------------------------------------- 5: the radius ------------------------------------------------

RADII = {"eta / (sigma_A + sigma_B + 1)": ("spectron-lr0.2-seed0", RUNS),
         "eta / (sigma_A + sigma_B)": ("no1-lr0.2-seed0", NO_ONE)}


def extremes(run: logs.Log) -> tuple[float, float]:
    """Of the gauge."""
    values = [value for _, value in run.points("gauge")]
    return min(values), max(values)


def mean_and_sd(run: str, path: Path) -> str:
    losses = [log(f"{run}-seed{seed}", path).final_loss for seed in range(3)]
    return f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"


def draw_radius():
    fig, (ax,) = panels(1, 8, 3.8)
    for (label, where), colour in zip(RADII.items(), (BLUE, RED)):
        ax.plot(*zip(*without_last(log(*where), "gauge")), color=colour, lw=1.6, label=f"rho = {label}")
    ax.axhline(1, color=BLACK, lw=1, ls="--", label="the bound")
    ax.set(xlabel="step", ylabel=r"gauge: $\|\Delta W\|_2$ / eta", ylim=(0, 1.1))
    return fig, "Without the + 1 the steps of W grow by a third, and the proof is lost", f"{MATRIX}, eta 0.2"


# ---------------------------------------- 6: where the bound ends -------------------------------------------

class Exact(Spectron):
    """With the exact polar factor in place of Newton-Schulz."""

    def direction(self, factors, group):
        U, _, Vh = torch.linalg.svd(self.momentum(factors, group), full_matrices=False)
        return U @ Vh


def aligned(size: float, grow: bool = True, r: int = 8) -> list[torch.nn.Parameter]:
    """A and B (32, r) of rank one and norm `size`, with gradients that move both along that one direction,
    the one that five Newton-Schulz steps lift most. Then all parts of dW add up."""
    torch.manual_seed(0)
    first = reached()["from"]
    values = torch.full((r,), math.sqrt((1 - first**2) / (r - 1)), dtype=torch.float64)
    values[0] = first
    V, pair = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0], []
    for _ in range(2):
        U = torch.linalg.qr(torch.randn(32, r, dtype=torch.float64))[0]
        p = torch.nn.Parameter(size * torch.outer(U[:, 0], V[:, 0]))
        p.grad = U * values @ V.T * (-1 if grow else 1)
        pair.append(p)
    return pair


def step_of(pair, kind=Spectron, **settings) -> torch.Tensor:
    """dW, in two factors, of one step of a pair that has gradients."""
    old = [p.detach().clone() for p in pair]
    kind([tuple(pair)], lr=ETA, momentum=0.0, **settings).step()
    (A0, B0), (A, B) = old, (p.detach() for p in pair)
    return torch.cat([A - A0, A], 1), torch.cat([B0, B - B0], 1)


@cache
def gauges() -> dict[str, float]:
    """||dW|| / eta of pairs that are as unlucky as can be."""
    def gauge(size, *args, grow=True, **more):
        return float(product_norm(*step_of(aligned(size, grow), *args, **more))) / ETA
    return {"exact polar factors": gauge(100, Exact),
            "five Newton-Schulz steps": gauge(100),
            "five steps in bfloat16": gauge(100, ns_dtype=torch.bfloat16),
            "||W|| = 2.6, five steps": gauge(1.6, grow=False),
            "||W|| = 2.6, weight decay 0.1": gauge(1.6, grow=False, weight_decay=0.1)}


@cache
def splits() -> dict[float, tuple[float, float, float]]:
    """By c: rho / eta, the gauge, and the cosine between the step of W = (c A)(B / c)^T and that at c = 1,
    for one random gradient of W."""
    torch.manual_seed(0)
    layer = Llama(LlamaConfig(**vars(NANO) | {"n_layers": 1})).blocks[0].attention.o_proj
    A0, B0 = (p.detach().double() for p in (layer.A, layer.B))
    G, found, first = torch.randn(len(A0), len(B0), dtype=torch.float64), {}, None
    for c in (1, 2, 4, 8, 16):
        pair = [torch.nn.Parameter(c * A0), torch.nn.Parameter(B0 / c)]
        pair[0].grad, pair[1].grad = G @ pair[1].detach(), G.T @ pair[0].detach()
        rho = 1 / float(spectral_norm(pair[0].detach()) + spectral_norm(pair[1].detach()) + 1)
        X, Y = step_of(pair)
        dW = X @ Y.T
        first = dW if first is None else first
        found[c] = rho, float(spectral_norm(dW)) / ETA, float((dW * first).sum() / dW.norm() / first.norm())
    return found


def bound() -> None:
    print(f"||dW|| / eta at eta = {ETA}, of pairs made so that it is large")
    for name, value in gauges().items():
        print(f"{name:32}{value:.2f}")
    print("one W as (c A)(B / c)^T          rho / eta   gauge   cosine with the step at c = 1")
    for c in (1, 4, 16):
        rho, gauge, cosine = splits()[c]
        print(f"c = {c:<28}{rho:.3f}       {gauge:.2f}    {cosine:.2f}")


def draw_bound():
    fig, (left, right) = panels(2, 9.5, 3.4)
    found = gauges()
    left.barh(list(found), found.values(), color=[BLUE, BLUE, BLUE, GREY, RED], height=0.6)
    left.axvline(1, color=BLACK, lw=1, ls="--")
    mark(left, found.values(), "{:.2f}")
    left.set(xlabel=r"$\|\Delta W\|_2$ / eta", xlim=(0, 1.6))
    left.invert_yaxis()
    by_c = splits()
    looks = {"rho / eta": ORANGE, "gauge": BLUE, "cosine with the step at c = 1": GREEN}
    for i, (label, colour) in enumerate(looks.items()):
        right.plot([*by_c], [row[i] for row in by_c.values()], color=colour, marker="o", ms=4, label=label)
    right.set(xscale="log", xlabel="c: the same W, stored as cA and B / c", xticks=[*by_c], ylim=(0, 1.05))
    right.set_xticklabels([*by_c])
    right.minorticks_off()
    caption(right, "the same W and the same gradient of W, eta 0.2")
    return fig, \
        "Newton-Schulz costs a fifth of the bound, weight decay adds to it, another split is another step", \
        "pairs as unlucky as can be, eta 0.2"


# -------------------------------------------- The verdict ---------------------------------------------------

def best_lrs(method: str) -> list[float]:
    """Of each shape, adam_lr tuned."""
    return tuned.own_and_one(tuned.of_shapes(method))[0]


def divisors(step: int) -> tuple[float, float]:
    """The smallest and the largest sigma_A + sigma_B + 1 under Spectron, of all matrices of all shapes, at
    the one learning rate."""
    studies = tuned.of_shapes("spectron")
    one = tuned.own_and_one(studies)[1]
    found = [(study.log(study.at(one)) or study.log(study.at(one), study.seeds[0])).points("divisor")[step][1]
             for study in studies]
    return min(row[0] for row in found), max(row[2] for row in found)


def parted_divisors() -> tuple[float, float]:
    """The smallest and the largest after the first step, with an unbalanced attention."""
    study = tuned.of_norms()["unbalanced"][0]
    smallest, _, largest = study.log(study.search[0]).points("divisor")[0][1]
    return smallest, largest


def lost_from_an_unbalanced_start() -> float:
    """By Spectron, beside the usual start; lr and adam_lr tuned in both."""
    usual, unbalanced = (tuned.of_norms()[setting][0].told() for setting in ("plain", "unbalanced"))
    return statistics.mean(unbalanced) - statistics.mean(usual)


# --------------------------------------- The sentences with numbers -----------------------------------------

def percent(pair: tuple) -> str:
    """How much less the first is than the second."""
    return f"{1 - share(pair):.0%}"


def sentences() -> list[str]:
    """Every statement of docs/LESSON.md that has a computed number, word for word."""
    cost, ends = costs(), reached()
    with_it, without = (log(name) for name in SAME_LR.values())
    ratio = {lr: statistics.median(value for _, value in low_over_dense(lr)) for lr in (1e-3, 1e-2)}
    (low, high), (low_0, high_0) = (extremes(log(*where)) for where in RADII.values())
    no_one, spectron_again = mean_and_sd("no1-lr0.1", NO_ONE), mean_and_sd("spectron-lr0.2", RUNS)
    signs = read_json(PICTURES / "sign.json")
    lrs = {name: best_lrs(name) for name in ("spectron", "orthogonalize", "adamw")}
    lengths = tuned.SHORT, tuned.LONG, tuned.LONGER
    return [
        f"saves {percent(cost['parameters'])} of the parameters, {percent(cost['flops'])} of the FLOPs and "
        f"{percent(cost['seconds'])} of the time of a step",
        f"{cost['memory'][0]:.1f} GB against {cost['memory'][1]:.1f} GB",
        f"{cost['speed']:.2f} times as fast",
        f"At S ({cost['S'] / 1e6:.1f}M parameters)",
        f"at S they hold {cost['dense part of S']:.0%}.",
        f"the gauge is at most {high:.2f}, dW/lr reaches {extremes(without)[1]:.1f}, and the losses are "
        f"{with_it.final_loss:.2f} against {without.final_loss:.2f}",
        f"{without.points('W')[-1][1]:.1f}, against {with_it.points('W')[-1][1]:.1f} with renormalization",
        f"({with_it.points('W')[-1][1]:.1f}: ‖W‖ after training)",
        f"{ratio[1e-3]:.1f} times the dense one at 0.001, the best learning rate of both, and "
        f"{ratio[1e-2]:.1f} times at 0.01",
        f"between {ends['least']:.2f} and {ends['most']:.2f}",
        f"smaller ones end at {ends['top']:.4f} at most",
        f"gauge is {low_0:.2f} to {high_0:.2f}, instead of {low:.2f} to {high:.2f}",
        f"{no_one} without the + 1, at its best learning rate of 0.1, against {spectron_again} "
        "(± is a standard deviation over three seeds)",
        "Muon on the factors minus Spectron is {}, after 800 steps {}, after 1,600 {} (95% intervals".format(
            *(tuned.over(scale, "orthogonalize").replace("-", "−") for scale in lengths)),
        "it is {}, {} and {}: there the division costs at first".format(
            *(tuned.over(scale, "equilibrated-muon", "equilibrated").replace("-", "−")
              for scale in lengths)),
        "Muon on the factors ends {} ± {} below Spectron".format(
            *tuned.over_spectron_of_shapes("orthogonalize").removeprefix("-").split(" ± ")),
        "that sum is {:.1f} to {:.1f}".format(*parted_divisors()),
        "Muon on the factors ends {} above Spectron, itself {:.2f} higher".format(
            tuned.parted("unbalanced").removeprefix("+"), lost_from_an_unbalanced_start()),
        "rank ratio of 1/16 it costs {}".format(tuned.parted("thin").removeprefix("-")),
        *(f"|{name}|" + "|".join(f"{loss:.3f}" for loss in signs[key].values())
          for name, key in (("sign", "sign"), ("Spectron|", "spectron"))),
        f"ends {min(signs['sign'].values()) - min(signs['spectron'].values()):.2f} above Spectron",
        "{:.1f} to {:.1f} after the first step and {:.1f} to {:.1f} after the last".format(
            *divisors(0), *divisors(-1)),
        f"five times its best, 1, it ends at {log('spectron-lr1-seed0').final_loss:.2f}",
        f"at four times its best, 0.2, at {log('orthogonalize-lr0.2-seed0').final_loss:.2f} (one seed)",
        "|width, rank ratio|" + "|".join(f"{width}, {ratio:g}" for width, ratio in SHAPES) + "|",
        *(f"|{METHODS[name].label}|" + "|".join(f"{lr:g}" for lr in found) + "|"
          for name, found in lrs.items()),
    ]


DRAWN = {"costs": draw_costs, "jump": draw_jump, "newton-schulz": draw_newton_schulz, "power": draw_power,
         "radius": draw_radius, "bound": draw_bound}


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("name", nargs="?", choices=["sigma", "bound"], metavar="NAME", help="sigma or bound")
    parser.add_argument("--steps", type=positive, default=40, help="of sigma: steps to train (40)")
    parser.add_argument("--json", type=Path, help="of sigma: also write every step to this file")
    args = parser.parse_args(argv)
    if args.name:
        return sigma(args.steps, args.json) if args.name == "sigma" else bound()
    for name, draw in DRAWN.items():
        fig, message, setting = draw()
        save(fig, PICTURES / f"{name}.png", message, setting)
    print("\n".join(sentences()))


if __name__ == "__main__":
    main()
