"""Studies in which every method is tuned by the same search in every setting.

    python -m paper.tuned shapes    does one learning rate serve all shapes, and for which method?
    python -m paper.tuned norms     where do the norms of the factors part, and does Spectron end lower there?
    python -m paper.tuned long      800 and 1,600 steps of nano: who ends lowest?
    python -m paper.tuned plan      the runs that are missing, as far as is known, and their hours

Each draws from the logs that are there. With --make it trains first what is missing, which takes hours and
may be stopped. The search goes along one axis at a time (lr, adam_lr, ...), from a method's usual value to
the best beside it, until none beside it is lower on any axis: the best is inside its grid. It reads seed 0.
"""

import math
import statistics
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import train
from lib.cli import Parser, UserError, command, number
from paper import draw, runs
from paper.methods import METHODS, PARTING, SHAPED, SHAPES
from paper.experiments import SAID, T95
from paper.output import markdown, save, write
from paper.runs import RESULTS, Run, Scale, log_of

GRIDS = {"lr": runs.SERIES, "adam_lr": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), "momentum": (0.5, 0.7, 0.9),
         "beta1": (0.8, 0.9, 0.95)}
FLAGS = {"adam_lr": "--adam_lr {:g}", "momentum": "--momentum {:g}",
         "beta1": "--method varied --method_args beta1={:g}"}


@dataclass(frozen=True)
class Study:
    """A method in a setting: its name, where its search starts, and how many seeds it has in the end."""
    method: str
    start: dict
    scale: Scale
    axes: tuple = ("lr", "adam_lr")
    seeds: range = field(default_factory=lambda: range(2))

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

    def beside(self, point: dict, axis: str) -> list[dict]:
        """The point, and those beside it along one axis."""
        grid, place = GRIDS[axis], GRIDS[axis].index(point[axis])
        return [point, *(point | {axis: grid[i]} for i in (place - 1, place + 1) if 0 <= i < len(grid))]

    @property
    def search(self) -> tuple[dict, list[dict], int]:
        """(the best point so far, the points that have to be run to go on, how many were needed)."""
        point, before, tried = self.start, None, {self.run(self.start)}
        while point != before:
            before = point
            for axis in self.axes:
                best = None
                while point != best:
                    point = best or point
                    around = self.beside(point, axis)
                    tried |= {self.run(p) for p in around}
                    if missing := [p for p in around if self.loss(p) is None]:
                        return point, missing, len(tried)
                    best = min(around, key=self.loss)
        return point, [], len(tried)

    def over_lr(self) -> dict[float, float]:
        """lr -> the loss of seed 0, where it was run, all else at its best."""
        point = self.search[0]
        found = {lr: self.loss(point | {"lr": lr}) for lr in runs.SERIES}
        return {lr: loss for lr, loss in found.items() if loss is not None and math.isfinite(loss)}

    def wanted(self) -> list[Run]:
        """What the search needs; when it has ended, the other seeds of its best."""
        point, missing, _ = self.search
        return [self.run(p) for p in missing] or [self.run(point, seed) for seed in self.seeds]


SHORT, LONG, LONGER = (  # in bfloat16, in which a core of the CPU that made them does 1.5 times as many steps
    Scale({}, "nano", f"tuned-{steps}", steps, 4096, "data/stdlib", lrs=1, seeds=2, halves=steps > 200,
          kept=20, dtype="bfloat16") for steps in (200, 800, 1600))


# ------------------------------------------ One lr for all shapes -------------------------------------------

USUAL = {"spectron": dict(lr=0.2, adam_lr=1e-2), "orthogonalize": dict(lr=0.05, adam_lr=1e-2),
         "lora-muon": dict(lr=0.2, adam_lr=1e-2), "adamw": dict(lr=2e-3, adam_lr=3e-2)}


def of_shapes(method: str) -> list[Study]:
    return [Study(shape, USUAL[method], SHORT) for shape in SHAPED[method]]


def common(studies: list[Study]) -> list[float]:
    """The learning rates that are best for some shape."""
    return sorted({s.search[0]["lr"] for s in studies})


def shape_runs(method: str) -> list[Run]:
    """The search of every shape; then each shape, at its own adam_lr, at every lr that is best for one."""
    studies = of_shapes(method)
    if missing := [s.run(p) for s in studies for p in s.search[1]]:
        return missing
    return [s.run(s.search[0] | {"lr": lr}, seed)
            for lr in common(studies) for s in studies for seed in s.seeds]


def shapes_page(methods: list) -> str:
    summary, rows, curves = [], [], {}
    for method in methods:
        studies = of_shapes(method)
        curves[method] = {shape: s.over_lr() for shape, s in zip(SHAPES, studies)}
        found = [{lr: statistics.mean(s.loss(s.search[0] | {"lr": lr}, seed) for seed in s.seeds)
                  for lr in common(studies)} for s in studies]
        one = min(common(studies), key=lambda lr: sum(losses[lr] for losses in found))
        above = [losses[one] - min(losses.values()) for losses in found]
        summary.append([METHODS[method].label, ", ".join(f"{s.search[0]['lr']:g}" for s in studies),
                        f"{one:g}", f"{statistics.mean(above):.3f}", f"{max(above):.3f}"])
        for s, losses in zip(studies, found):
            point, _, tried = s.search
            rows.append([METHODS[s.method].label, f"{point['adam_lr']:g}", str(tried),
                         ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in losses.items()),
                         *divisors(s, point | {"lr": one})])
    save(draw.loss_over_lr_of_shapes(curves), RESULTS / "shapes" / "figure.png", SAID["shapes"]["message"],
         "two layers, 200 steps of 4,096 tokens of the offline corpus, seed 0, each shape's best adam_lr")
    return "\n".join([
        "# One learning rate for all shapes\n\nTwo layers, 200 steps of 4,096 tokens of the offline corpus, "
        "bfloat16. adam_lr and lr are tuned for each shape on\nseed 0; losses are means of two seeds, in "
        "nats per byte. `python -m paper.reproduce shapes`\n",
        markdown(["", "best lr of each shape", "one for all", "its loss above each one's best, mean",
                  "largest"], summary),
        "The shapes are widths 32, 64, 128 and 256 at rank ratio 0.25, and 128 at 0.125 and 0.5.\n",
        markdown(["", "adam_lr", "runs of the search", "loss at each lr that is best for a shape", *DIVISOR],
                 rows), "![figure](figure.png)\n"])


DIVISOR = [f"‖A‖ + ‖B‖ + 1, {when} step: smallest, median, largest" for when in ("first", "last")]


def divisors(study: Study, point: dict) -> list[str]:
    """Of all matrices, after the first and after the last step; of a seed whose log has them."""
    logs = [study.log(point, seed) for seed in study.seeds]
    found = next((log.points("divisor") for log in logs if log and log.points("divisor")), None)
    return [", ".join(f"{x:.2f}" for x in found[i][1]) for i in (0, -1)] if found else ["", ""]


# ------------------------------------------ Where the norms part --------------------------------------------

def of_norms() -> dict[str, list[Study]]:
    """By setting: Spectron and Muon on the factors, lr tuned alone; at last both at twice their best lr."""
    at = dict(lr=0.2, adam_lr=3e-3), dict(lr=0.05, adam_lr=1e-2)
    found = {short: [Study(method, start, SHORT, ("lr",)) for method, start in zip(methods, at)]
             for short, methods in PARTING.items()}
    return found | {"twice": [Study(s.method, s.search[0] | {"lr": 2 * s.search[0]["lr"]}, SHORT, ())
                              for s in found["plain"]]}


def norm_runs(setting: str) -> list[Run]:
    return [run for study in of_norms()[setting] for run in study.wanted()]


def norms_page(settings: list) -> str:
    rows = []
    for setting in settings:
        studies = of_norms()[setting]
        losses = [[s.loss(s.search[0], seed) for seed in s.seeds] for s in studies]
        for s, own in zip(studies, losses):
            rows.append([METHODS[s.method].label + ", twice the best lr" * (setting == "twice"),
                         f"{s.search[0]['lr']:g}", f"{statistics.mean(own):.3f}",
                         f"{statistics.mean(own) - statistics.mean(losses[0]):+.3f}",
                         *divisors(s, s.search[0])])
    return ("# Where the norms of the factors part\n\nNano, 200 steps, bfloat16; lr is tuned in each setting "
            "on seed 0, losses are means of two seeds.\n`python -m paper.reproduce norms`\n\n" + markdown(
                ["", "lr", "loss (nats per byte)", "over Spectron's", *DIVISOR], rows))


# ------------------------------------------------- Long runs ------------------------------------------------

MUONS, ADAMW = ("lr", "adam_lr", "momentum"), ("lr", "adam_lr", "beta1")
STARTS = {"spectron": (MUONS, dict(lr=0.1, adam_lr=3e-3, momentum=0.7)),
          "orthogonalize": (MUONS, dict(lr=0.05, adam_lr=1e-2, momentum=0.7)),
          "equilibrated": (MUONS, dict(lr=0.1, adam_lr=3e-3, momentum=0.7)),
          "equilibrated-muon": (MUONS, dict(lr=0.02, adam_lr=3e-3, momentum=0.7)),
          "dense": (MUONS, dict(lr=0.05, adam_lr=3e-3, momentum=0.7)),
          "adamw": (ADAMW, dict(lr=1e-3, adam_lr=3e-2, beta1=0.9))}


def of_length(steps: int, method: str) -> Study:
    """At 1,600 steps the search has lr alone, from the best of 800 steps. Seed 0 tunes, the others tell."""
    axes, start = STARTS[method]
    study = Study(method, start, LONG, axes, range(1, 5))
    if steps == 800:
        return study
    return replace(study, start=study.search[0], scale=LONGER, axes=("lr",))


def long_runs(steps: int, methods: tuple) -> list[Run]:
    return [run for method in methods for run in of_length(steps, method).wanted()]


def long_page(stages: list) -> str:
    rows = []
    for scale, method in [(scale, method) for scale, methods in stages for method in methods]:
        s, first = (of_length(scale.steps, name) for name in (method, "spectron"))
        point, _, tried = s.search
        told, beside = ([x.loss(x.search[0], seed, half=1) for seed in x.seeds] for x in (s, first))
        gaps = [a - b for a, b in zip(told, beside)]
        interval = T95[len(gaps)] * statistics.stdev(gaps) / len(gaps)**0.5
        rows.append([f"{scale.steps:,}", METHODS[method].label,
                     ", ".join(f"{k} {v:g}" for k, v in point.items()), str(tried), f"{s.loss(point):.3f}",
                     f"{statistics.mean(told):.3f} ± {statistics.stdev(told):.3f}",
                     "" if s == first else f"{statistics.mean(gaps):+.3f} ± {interval:.3f}",
                     *divisors(s, point)])
    return ("# Long runs\n\nNano, steps of 4,096 tokens of the offline corpus, bfloat16. Tuned on seed 0 and "
            "the first half of the validation text;\nreported on seeds 1 to 4 and the other half. `python -m "
            "paper.reproduce long`\n\n"
            + markdown(["steps", "", "tuned", "runs of the search", "loss it was tuned on",
                        "loss (nats per byte), ± standard deviation of four seeds",
                        "over Spectron's, ± 95% interval", *DIVISOR], rows))


# ----------------------------------------------- All of them ------------------------------------------------

PAIRS = ("spectron", "orthogonalize"), ("equilibrated", "equilibrated-muon"), ("dense", "adamw")
PARTS = {  # name -> (what each stage is about -> its scale and what says which runs it needs now; the page)
    "shapes": ({method: (SHORT, partial(shape_runs, method)) for method in SHAPED}, shapes_page),
    "norms": ({setting: (SHORT, partial(norm_runs, setting)) for setting in (*PARTING, "twice")}, norms_page),
    "long": ({(scale, methods): (scale, partial(long_runs, scale.steps, methods))
              for scale in (LONG, LONGER) for methods in PAIRS}, long_page)}


def missing(scale: Scale, wanted) -> list[Run]:
    return [run for run in dict.fromkeys(wanted()) if not log_of(run, scale)]


def plan(name: str, rate: float) -> str:
    """What the stages need now. A search goes on from there: in all about three times as many."""
    lines = []
    for scale, wanted in PARTS[name][0].values():
        left = missing(scale, wanted)
        tokens = scale.tokens_per_step * scale.steps
        flops = sum(runs.flops_per_token(run.method, scale) * tokens for run in left)
        lines.append(f"{name}, {scale.name}, {wanted.args}: {len(left)} runs, {flops:.1e} FLOPs, "
                     f"{flops / rate / 3600:.1f} hours at {rate:.2g} FLOPs a second")
    return "\n".join(lines)


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("name", choices=[*PARTS, "plan"], metavar="NAME", help="shapes, norms, long or plan")
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
    if not (complete := [about for about, stage in stages.items() if not missing(*stage)]):
        raise UserError(f"no part of {args.name} has all its runs. This trains them, and may be stopped: "
                        f"python -m paper.tuned {args.name} --make (hours: python -m paper.tuned plan)")
    write(RESULTS / args.name / "table.md", page(complete))
    print(f"{RESULTS / args.name}/table.md")


if __name__ == "__main__":
    main()
