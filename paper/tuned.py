"""Studies in which every method is tuned by the same search in every setting.

    python -m paper.tuned shapes    does one learning rate serve all shapes, and for which method?
    python -m paper.tuned norms     where do the norms of the factors part, and does Spectron end lower there?
    python -m paper.tuned lengths   200, 800 and 1,600 steps of nano: who ends lowest?
    python -m paper.tuned plan      the runs that are missing, as far as is known, and their hours

Each draws from the logs that are there. With --make it trains first what is missing, which takes hours and
may be stopped. The search goes along one axis at a time (lr, adam_lr, ...), from a method's usual value to
the best beside it, until none beside it is lower on any axis. adam_lr has more than one minimum, so two or
three values of it are tried each time. The search reads seed 0, and in long runs a second seed of those that
are near the best, on half of the validation text where a log has halves; what is told is of other seeds, and
of the other half.
"""

import math
import statistics
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile

import numpy as np

import train
from lib.cli import Parser, UserError, command, number
from paper import draw, runs
from paper.methods import METHODS, PARTING, SHAPED, SHAPES
from paper.experiments import SAID, mean_and_half
from paper.output import markdown, save, write
from paper.runs import RESULTS, Run, Scale, log_of

GRIDS = {"lr": runs.SERIES, "adam_lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
         "momentum": (0.3, 0.5, 0.7, 0.9, 0.95), "beta1": (0.7, 0.8, 0.9, 0.95, 0.98)}
NEAR = 0.02  # nats, about what seeds differ by
FLAGS = {"adam_lr": "--adam_lr {:g}", "momentum": "--momentum {:g}",
         "beta1": "--method varied --method_args beta1={:g}"}


@dataclass(frozen=True)
class Study:
    """A method in a setting: its name, where its search starts, the seeds that tell its loss, those that tune
    it, and the values of adam_lr that are tried at each visit."""
    method: str
    start: dict
    scale: Scale
    axes: tuple = ("lr", "adam_lr")
    seeds: range = range(1, 5)
    tuning: tuple = (0,)
    adam_lrs: tuple = (3e-3, 1e-1)

    @cached_property
    def own(self) -> dict:
        c = train.resolve(train.parse(runs.flags_of(METHODS[self.method], self.scale)), 1)
        return {"adam_lr": c.adam_lr, "momentum": c.momentum, "beta1": 0.9}

    def run(self, point: dict, seed: int = 0) -> Run:
        """paper.runs then knows its method."""
        method, name = METHODS[self.method], self.method
        for axis, value in point.items():
            if axis != "lr" and value != self.own[axis]:
                name += f"-{axis.removesuffix('_lr')}{value:g}"
                method = replace(method, flags=f"{method.flags} {FLAGS[axis].format(value)}")
        METHODS.setdefault(name, replace(method, swept=False))
        return Run(name, point["lr"], seed)

    def log(self, point: dict, seed: int = 0):
        return log_of(self.run(point, seed), self.scale)

    def loss(self, point: dict, seed: int = 0, half: int = 0) -> float | None:
        """None where it was not run, infinite where it diverged; of one half of the text where there are."""
        log = self.log(point, seed)
        if log is None or log.final_loss is None:
            return log and math.inf
        return log.steps[-1]["halves"][half] if self.scale.halves else log.final_loss

    def mean(self, point: dict, seeds: tuple) -> float:
        """Of these seeds, as far as they were run."""
        losses = [self.loss(point, seed) for seed in seeds]
        return statistics.mean(loss for loss in losses if loss is not None)

    def beside(self, point: dict, axis: str) -> list[dict]:
        """The point, those beside it along one axis and those that are always tried; along momentum also with
        lr moved the other way, as the two trade off."""
        def moved(axis, by):
            place = GRIDS[axis].index(point[axis]) + by
            return {axis: GRIDS[axis][place]} if 0 <= place < len(GRIDS[axis]) else {}
        found = [point, *(point | moved(axis, by) for by in (-1, 1)),
                 *(point | {axis: value} for value in self.adam_lrs * (axis == "adam_lr"))]
        if axis == "momentum":
            found += [point | moved(axis, by) | moved("lr", -by) for by in (-1, 1)]
        return found

    @property
    def search(self) -> tuple[dict, list[Run], int]:
        """(the best point so far, the runs that have to be made to go on, how many were needed)."""
        point, tried = self.start, {self.run(self.start)}
        for seeds in dict.fromkeys((self.tuning[:1], self.tuning)):  # first by one seed, from there by all
            before = None
            while point != before:
                before = point
                for axis in self.axes:
                    point, missing = self.along(axis, point, seeds, tried)
                    if missing:
                        return point, missing, len(tried)
        return point, [], len(tried)

    def along(self, axis: str, point: dict, seeds: tuple, tried: set) -> tuple[dict, list[Run]]:
        """(the point with none lower beside it, or as far as the runs go; the runs that are missing)."""
        best = None
        while point != best:
            point = best or point
            around = self.beside(point, axis)
            wanted = [self.run(p) for p in around]
            if all(log_of(run, self.scale) for run in wanted):
                near = self.near(around, seeds)
                wanted += [self.run(p, seed) for p in around for seed in seeds[1:]
                           if p in near or self.log(p, seed)]
            tried |= {*wanted}
            if missing := [run for run in wanted if not log_of(run, self.scale)]:
                return point, missing
            best = min(around, key=lambda p: self.mean(p, seeds))
        return point, []

    def near(self, around: list[dict], seeds: tuple) -> list[dict]:
        """Those that one seed does not order: within NEAR of the lowest, where there is more than that."""
        losses = {self.run(p): self.mean(p, seeds) for p in around}
        near = [p for p in around if losses[self.run(p)] <= min(losses.values()) + NEAR]
        return near if len({self.run(p) for p in near}) > 1 else []

    def at(self, lr: float) -> dict:
        return self.search[0] | {"lr": lr}

    def over_lr(self) -> dict[float, float]:
        """lr -> the loss of seed 0, where it was run, all else at its best."""
        point = self.search[0]
        found = {lr: self.loss(point | {"lr": lr}) for lr in runs.SERIES}
        return {lr: loss for lr, loss in found.items() if loss is not None and math.isfinite(loss)}

    def wanted(self) -> list[Run]:
        """What the search needs; when it has ended, the seeds that tell."""
        point, missing, _ = self.search
        return missing or [self.run(point, seed) for seed in self.seeds]

    def told(self) -> list[float]:
        """The losses of the best point on the seeds, and the half, that it was not chosen by."""
        return [self.loss(self.search[0], seed, half=1) for seed in self.seeds]


SHAPE, SHORT, LONG, LONGER = (  # bfloat16, in which the CPU that made them does 1.5 times as many steps
    Scale({}, "nano", f"tuned-{name}", steps, 4096, "data/stdlib", lrs=1, seeds=1, halves=name != "shapes",
          kept=1, dtype="bfloat16")
    for name, steps in (("shapes", 200), ("200", 200), ("800", 800), ("1600", 1600)))


def above(study: Study, other: Study) -> list[float]:
    """How far it ends above the other, seed by seed."""
    return [a - b for a, b in zip(study.told(), other.told())]


def interval(gaps: list[float]) -> str:
    mean, half = mean_and_half(gaps)
    return f"{mean:+.3f} ± {half:.3f}"


# ------------------------------------------ One lr for all shapes -------------------------------------------

USUAL = {"spectron": dict(lr=0.2, adam_lr=1e-2), "orthogonalize": dict(lr=0.05, adam_lr=1e-2),
         "lora-muon": dict(lr=0.2, adam_lr=1e-2), "adamw": dict(lr=2e-3, adam_lr=3e-2)}


def of_shapes(method: str) -> list[Study]:
    return [Study(shape, USUAL[method], SHAPE, seeds=range(2, 6)) for shape in SHAPED[method]]


def lrs_between(studies: list[Study]) -> list[float]:
    """From the lowest to the highest lr that is best for a shape."""
    best = [s.search[0]["lr"] for s in studies]
    return [lr for lr in runs.SERIES if min(best) <= lr <= max(best)]


def mean_loss(study: Study, lr: float) -> float:
    point = study.at(lr)
    return statistics.mean(study.loss(point, seed) for seed in (0, 1))


def own_and_one(studies: list[Study]) -> tuple[list[float], float]:
    """(the best lr of each shape, the best for all of them), by the mean of seeds 0 and 1."""
    losses = {lr: [mean_loss(s, lr) for s in studies] for lr in lrs_between(studies)}
    best_of_each = [min(losses, key=lambda lr: losses[lr][i]) for i in range(len(studies))]
    return best_of_each, min(losses, key=lambda lr: sum(losses[lr]))


def shape_runs(method: str) -> list[Run]:
    """The search of every shape; then each shape, at its own adam_lr, at every lr between the best ones, with
    two seeds; then, with four others, at its best lr and at the one for all."""
    studies = of_shapes(method)
    if left := [run for s in studies for run in s.search[1]]:
        return left
    tuning = [s.run(s.at(lr), seed) for lr in lrs_between(studies) for s in studies for seed in (0, 1)]
    if any(not log_of(run, SHAPE) for run in tuning):
        return tuning
    lrs, one = own_and_one(studies)
    return tuning + [s.run(s.at(lr), seed) for s, own in zip(studies, lrs) for lr in {own, one}
                     for seed in s.seeds]


def at_one_lr(method: str) -> list[float]:
    """Seed by seed: the mean of the shapes, all at the one lr."""
    studies = of_shapes(method)
    one = own_and_one(studies)[1]
    points = [(s, s.at(one)) for s in studies]
    return [statistics.mean(s.loss(point, seed) for s, point in points) for seed in studies[0].seeds]


def over_spectron_of_shapes(method: str) -> str:
    """How much higher it ends, each method at its one lr, with the 95% interval."""
    return interval([a - b for a, b in zip(at_one_lr(method), at_one_lr("spectron"))])


def costs(studies: list[Study]) -> list[list[float]]:
    """Of each shape: how far it ends above its own best lr at the one for all, seed by seed."""
    lrs, one = own_and_one(studies)
    return [[0.0 if own == one else s.loss(s.at(one), seed) - s.loss(s.at(own), seed) for seed in s.seeds]
            for s, own in zip(studies, lrs)]


def shapes_page(methods: list) -> str:
    summary, rows, curves = [], [], {}
    for method in methods:
        studies, label = of_shapes(method), METHODS[method].label
        curves[method] = {shape: s.over_lr() for shape, s in zip(SHAPES, studies)}
        (lrs, one), found = own_and_one(studies), costs(studies)
        summary.append([label, ", ".join(f"{lr:g}" for lr in lrs), f"{one:g}",
                        interval([statistics.mean(seed) for seed in zip(*found)]),
                        f"{max(map(statistics.mean, found)):.3f}",
                        f"{statistics.mean(at_one_lr(method)):.3f}",
                        over_spectron_of_shapes(method) if method != "spectron" else ""])
        for (width, ratio), s in zip(SHAPES, studies):
            rows.append([label, str(width), f"{ratio:g}", f"{s.search[0]['adam_lr']:g}", str(s.search[2]),
                         ", ".join(f"{lr:g}: {mean_loss(s, lr):.3f}" for lr in lrs_between(studies)),
                         *divisors(s, s.at(one))])
    save(draw.loss_over_lr_of_shapes(curves), RESULTS / "shapes" / "figure.png", SAID["shapes"]["message"],
         "two layers, 200 steps of 4,096 tokens of the offline corpus, seed 0, each shape's best adam_lr")
    return "\n".join([
        "# One learning rate for all shapes\n\nTwo layers, 200 steps of 4,096 tokens of the offline corpus, "
        "bfloat16. Each shape has its best adam_lr, by a search on\nseed 0, and its best lr: by seed 0, and "
        "where shapes differ by the mean of seeds 0 and 1. The losses at one lr for all are\nof seeds 2 to "
        "5, in nats per byte, ± the 95% interval of a difference over seeds, without the noise of tuning."
        "\n`python -m paper.reproduce shapes`\n",
        markdown(["", "best lr of each shape", "one for all", "its loss above each one's best, mean",
                  "largest", "its loss, mean of the shapes", "over Spectron's"], summary),
        "The shapes, in this order:\n",
        markdown(["", "width", "rank ratio", "adam_lr", "runs of the search", "loss at each lr between",
                  *DIVISOR], rows), "![figure](figure.png)\n"])


DIVISOR = [f"‖A‖ + ‖B‖ + 1, {when} step: smallest, median, largest" for when in ("first", "last")]


def divisors(study: Study, point: dict) -> list[str]:
    """Of all matrices, after the first and after the last step, of one seed."""
    found = (study.log(point) or study.log(point, study.seeds[0])).points("divisor")
    return [", ".join(f"{x:.2f}" for x in found[i][1]) for i in (0, -1)] if found else ["", ""]


# ------------------------------------------ Where the norms part --------------------------------------------

def of_norms() -> dict[str, list[Study]]:
    """By setting: Spectron and Muon on the factors, lr and adam_lr tuned from their best in the plain one; at
    last both at twice their best lr."""
    both, seeds = ("spectron", "orthogonalize"), range(1, 6)
    plain = [of_length(SHORT, method) for method in both]
    found = {short: [Study(method, s.search[0], SHORT, seeds=seeds) for method, s in zip(methods, plain)]
             for short, methods in ({"plain": both} | PARTING).items()}
    return found | {"twice": [Study(s.method, s.at(twice(s)), SHORT, (), seeds) for s in found["plain"]]}


def twice(study: Study) -> float:
    """Twice the lr at which a parabola through the best one and those beside it, in log lr, is lowest; to two
    digits. (The best of a grid may be off by a quarter.)"""
    around = {p["lr"]: study.loss(p) for p in study.beside(study.search[0], "lr")}
    if None in around.values() or not all(map(math.isfinite, around.values())):
        return 2 * study.search[0]["lr"]
    square, linear, _ = np.polyfit(np.log([*around]), [*around.values()], 2)
    return float(f"{2 * math.exp(-linear / 2 / square):.2g}")


def norm_runs(setting: str) -> list[Run]:
    """The plain setting's too: the others start from it, and are compared with it."""
    found = of_norms()
    return [run for study in found["plain"] + found[setting] for run in study.wanted()]


def parted(setting: str) -> str:
    """How much higher Muon on the factors ends than Spectron, with the 95% interval."""
    return interval(above(*reversed(of_norms()[setting])))


def norms_page(settings: list) -> str:
    rows, plain = [], above(*reversed(of_norms()["plain"]))
    for setting in "plain", *settings:
        spectron, muon = of_norms()[setting]
        gaps = above(muon, spectron)
        for s in spectron, muon:
            rows.append([METHODS[s.method].label + ", twice the best lr" * (setting == "twice"),
                         ", ".join(f"{k} {s.search[0][k]:g}" for k in ("lr", "adam_lr")),
                         f"{statistics.mean(s.told()):.3f}",
                         *([interval(gaps), interval([a - b for a, b in zip(gaps, plain)])
                            if setting != "plain" else ""] if s is muon else ["", ""]),
                         *divisors(s, s.search[0])])
    return ("# Where the norms of the factors part\n\nNano, 200 steps, bfloat16. lr and adam_lr are tuned in "
            "each setting on seed 0 and the first half of the\nvalidation text; losses are means of seeds 1 "
            "to 5 on the other half, ± the 95% interval of a difference,\nwithout the noise of tuning. "
            "`python -m paper.reproduce norms`\n\n"
            + markdown(["", "tuned", "loss (nats per byte)", "over Spectron's",
                        "the same less that of the first rows", *DIVISOR], rows))


# ---------------------------------------- 200, 800 and 1,600 steps ------------------------------------------

MUONS, ADAMW = ("lr", "adam_lr", "momentum"), ("lr", "adam_lr", "beta1")
STARTS = {"spectron": (MUONS, dict(lr=0.2, adam_lr=3e-3, momentum=0.7)),
          "orthogonalize": (MUONS, dict(lr=0.05, adam_lr=1e-2, momentum=0.7)),
          "equilibrated": (MUONS, dict(lr=0.2, adam_lr=3e-3, momentum=0.7)),
          "equilibrated-muon": (MUONS, dict(lr=0.05, adam_lr=3e-3, momentum=0.7)),
          "dense": (MUONS, dict(lr=0.05, adam_lr=3e-3, momentum=0.7)),
          "dense-flops": (MUONS, dict(lr=0.1, adam_lr=1e-2, momentum=0.7)),
          "adamw": (ADAMW, dict(lr=1e-3, adam_lr=3e-2, beta1=0.9))}
SEEDS = {200: range(1, 9), 800: range(1, 5), 1600: range(1, 5)}  # by steps


def of_length(scale: Scale, method: str) -> Study:
    """A search starts from the best of the next shorter one, with fewer axes; Spectron's keeps adam_lr, whose
    best after 800 steps is not that of the others."""
    axes, start = STARTS[method]
    study = Study(method, start, SHORT, axes, SEEDS[200])
    last = ("adam_lr", "lr") if method == "spectron" else ("lr",)
    for longer, axes, adam_lrs in ((LONG, ("lr", "adam_lr"), (3e-3, 3e-2, 1e-1)),
                                   (LONGER, last, ()))[:(SHORT, LONG, LONGER).index(scale)]:
        study = replace(study, start=study.search[0], scale=longer, axes=axes, seeds=SEEDS[longer.steps],
                        tuning=(0, 5), adam_lrs=adam_lrs)
    return study


def over(scale: Scale, method: str, other: str = "spectron") -> str:
    """How much higher it ends, with the 95% interval; empty where a run is missing."""
    both = of_length(scale, method), of_length(scale, other)
    return "" if any(None in study.told() for study in both) else interval(above(*both))


def length_runs(scale: Scale, methods: tuple) -> list[Run]:
    return [run for method in methods for run in of_length(scale, method).wanted()]


def of_stages(stages: list) -> list[tuple]:
    return [(scale, method) for scale, methods in stages for method in methods]


def cost(per_step, method: str, scale: Scale) -> str:
    """Of a run, over Spectron's; empty where nobody has measured it."""
    own, first = (per_step(name, scale) for name in (method, "spectron"))
    return f"{own * runs.steps_of(method, scale) / first / scale.steps:.2f}" if own and first else ""


def lengths_page(stages: list) -> str:
    rows = []
    for scale, method in of_stages(stages):
        s, first = (of_length(scale, name) for name in (method, "spectron"))
        point, _, tried = s.search
        flops, seconds = (cost(of, method, scale) for of in (runs.flops_per_token, runs.seconds_per_step))
        rows.append([f"{scale.steps:,}", METHODS[method].label,
                     ", ".join(f"{k} {v:g}" for k, v in point.items()), str(tried),
                     f"{s.mean(point, s.tuning):.3f}", f"1 to {s.seeds[-1]}",
                     f"{statistics.mean(s.told()):.3f} ± {statistics.stdev(s.told()):.3f}",
                     "" if s == first else over(scale, method), flops, seconds, *divisors(s, point)])
    lengths_figure(stages)
    return ("# 200, 800 and 1,600 steps\n\nNano, steps of 4,096 tokens of the offline corpus, bfloat16. "
            "Tuned on seed 0 and the first half of the validation\ntext: after 200 steps lr, adam_lr and "
            "momentum or beta1, after 800 lr and adam_lr, after 1,600 lr (Spectron's\n"
            "also adam_lr), each from the best of the length before; in these, those within "
            f"{NEAR} of the best also with\nseed 5. Losses are of other seeds and the other half, in "
            "nats per byte, ± a standard deviation; of a\ndifference, seeds paired, ± the 95% interval, "
            "without the noise of tuning. Seconds are those of a step in\nfloat32, [all methods in turn]"
            "(../seconds/nano.json).\n`python -m paper.reproduce lengths`\n\n"
            + markdown(["steps", "", "tuned", "runs of the search", "loss it was tuned on", "seeds", "loss",
                        "over Spectron's", "FLOPs, over Spectron's", "seconds", *DIVISOR], rows)
            + "\n![figure](figure.png)\n")


def lengths_figure(stages: list) -> None:
    gaps = {}
    for scale, method in of_stages(stages):
        if method != "spectron":
            found = above(of_length(scale, method), of_length(scale, "spectron"))
            gaps.setdefault(METHODS[method].label, {})[scale.steps] = mean_and_half(found)
    save(draw.over_spectron(gaps), RESULTS / "lengths" / "figure.png", SAID["lengths"]["message"],
         "nano, all tuned; on other seeds and text than the tuning's, whose noise is left out")


# ----------------------------------------------- All of them ------------------------------------------------

STAGES = [(SHORT, ("spectron", "dense-flops")), (SHORT, ("orthogonalize", "dense")),
          (SHORT, ("equilibrated", "equilibrated-muon", "adamw")),
          *((scale, methods) for scale in (LONG, LONGER) for methods in (
              ("spectron", "orthogonalize"), ("equilibrated", "equilibrated-muon"), ("dense",)))]
PARTS = {  # name -> (what each stage is about -> its scale and what says which runs it needs now; the page)
    "shapes": ({method: (SHAPE, partial(shape_runs, method)) for method in SHAPED}, shapes_page),
    "norms": ({setting: (SHORT, partial(norm_runs, setting)) for setting in (*PARTING, "twice")}, norms_page),
    "lengths": ({stage: (stage[0], partial(length_runs, *stage)) for stage in STAGES}, lengths_page)}


def missing(scale: Scale, wanted) -> list[Run]:
    return [run for run in dict.fromkeys(wanted()) if not log_of(run, scale)]


def plan(name: str, rate: float) -> str:
    """What the stages need now. A search goes on from there: in all about three times as many."""
    lines = []
    for scale, wanted in PARTS[name][0].values():
        left = missing(scale, wanted)
        tokens = scale.tokens_per_step * scale.steps
        flops = sum(runs.flops_per_token(run.method, scale) * tokens for run in left)
        lines.append(f"{name}, {scale.name}, {wanted.args[-1]}: {len(left)} runs, {flops:.1e} FLOPs, "
                     f"{flops / rate / 3600:.1f} hours at {rate:.2g} FLOPs a second")
    return "\n".join(lines)


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("name", choices=[*PARTS, "plan"], metavar="NAME",
                        help="shapes, norms, lengths or plan")
    parser.add_argument("--make", action="store_true", help="train first what is missing: hours, see plan")
    parser.add_argument("--rate", type=number(), default=8e10,
                        help="of plan: FLOPs a second (8e10, about that of two cores)")
    args = parser.parse_args(argv)
    if args.name == "plan":
        return print("\n".join(plan(name, args.rate) for name in PARTS))
    stages, page = PARTS[args.name]
    for stage in stages.values() if args.make else ():
        while left := missing(*stage):
            runs.make_all(left, stage[0])
    complete = [*takewhile(lambda about: not missing(*stages[about]), stages)]  # each needs those before
    if not complete:
        raise UserError(f"no part of {args.name} has all its runs. This trains them, and may be stopped: "
                        f"python -m paper.tuned {args.name} --make (hours: python -m paper.tuned plan)")
    write(RESULTS / args.name / "table.md", page(complete))
    print(f"{RESULTS / args.name}/table.md")


if __name__ == "__main__":
    main()
