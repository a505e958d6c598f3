"""The paper's tables and figures, one command each.

    python -m paper.reproduce table2                 at nano, on the offline corpus
    python -m paper.reproduce all --scale nano       all that two cores can do: hours, and it may be stopped
    python -m paper.reproduce fig3 --scale S         at the paper's size, on what GPUs there are
    python -m paper.reproduce report                 results/README.md, from the logs that are there

NAME is one of table1 (with figures 4 and 14a), table2 (10), table3 (11), table4, table5, fig2, fig3, fig5
(with 1), fig6, fig7, fig12, fig13, isoflop (8 and 9) and parametric (appendix D). Each writes
results/NAME/<scale>/: table.md, table.json, figure.png. The logs behind them are in results/runs/<scale>: a
run that is there is not made again, so that after a clone everything can be drawn without training.
"""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

from lib.cli import Parser, UserError, command, number, positive
from lib.files import replacing
from model import ALIASES, SIZES, count_parameters
from paper import draw, equilibrated, isoflop, runs, scaling_report
from paper.arms import ARMS, TRANSFERRED
from paper.experiments import EXPERIMENTS, PAPER, arms_of, gap, outcomes_of, single_of
from paper.runs import RESULTS, Run, Scale, log_of
from paper.tables import markdown

TASKS, EVALS = ("hellaswag", "piqa", "arc_easy"), Path("data/evals")
COUNTS = {"table4": ("Table 4: the three main models", list(ALIASES.values())),
          "table5": ("Table 5: the models of the scaling laws",
                     [row["size"] for row in PAPER["table5_sizes"]])}
IMDB = {"data": "data/imdb-bytes", "lrs": 3}
REPORT = [("rivals", {}), ("rivals-flops", {}), ("claims", {}), ("neighbours", {"seeds": 5}), ("adam_lr", {}),
          ("fig12", {}), ("transfer", {}), ("table2", {}), ("table2", IMDB), ("table1", {}), ("table3", {}),
          ("fig13", {}), ("fig2", {}), ("fig3", {}), ("fig5", {}), ("fig6", {})]  # and their scale, at nano
PROTOCOL = """# Results

Every table and figure of the paper that could be run here, and the rivals beside them, made by
`python -m paper.reproduce report` from the logs in [runs/](runs/README.md). All of it is size nano (2M
parameters), in float32. The paper's numbers are of size S (94M parameters, FineWeb), so only their order and
their ratios compare.

- All arms see the same tokens in the same order, with one schedule and clipping, and a momentum of 0.7 where
  they have one. adam_lr is what its own table says: 3e-3, for Muon on factors 1e-2, for all with AdamW 3e-2.
- Each arm has six learning rates on the series 1, 2, 5, 10, and up to two more where the best is at the edge.
  They start with three in Table 3, in Figures 5, 6 and 13, at equal FLOPs, on IMDb and among the claims.
  Neighbours are a factor of 2 or 2.5 apart, so that differences of about 0.02 nats may be the grid's.
- The best learning rate of seed 0 gets the other seeds: mean ± standard deviation, n. Seed 0 counts too.
- Differences are taken seed by seed, with their 95% interval (Student's t, which three seeds leave wide).
- "lr within 5%" is the factor spanned by the learning rates that end within 5% of the arm's best loss.
- `data/imdb-bytes` is the first 8,000 lines of an IMDb reviews file:
  `python -m tools.prepare text imdb.jsonl --tokenizer bytes --out data/imdb-bytes`.
- A run has diverged if its gradient ceased to be finite, or if it ended worse than a uniform guess. None did.
- "s / step" is of two CPU cores, all methods in turn in one process: `python -m paper.seconds`. Self-guided
  training is timed with its guide, which is there for half of a run.

Elsewhere: [equilibrated Spectron](equilibrated/README.md), [sixteen metrics](geometry/README.md) of the same
models, [parameter counts of Table 4](table4/table.md) and [Table 5](table5/table.md), the scaling laws by
[parabolas](isoflop/table.md) and as [a law of N and D](parametric/table.md), Figures 8 and 9,
[the momentum](momentum/nano-800x4096/table.md), [speed](bench/README.md),
[the tasks beside lm-evaluation-harness](evals/README.md).
"""


# -------------------------------------------------- Tables --------------------------------------------------

def table(name: str, scale: Scale) -> str:
    """Every arm at its best learning rate, beside the paper, as Markdown."""
    found, paper = outcomes_of(name, scale), paper_of(name, scale)
    least, paper_least = min(o.mean for o in found), math.log(min(paper.values())) if paper else None
    tasks = [task for task in TASKS if any(f"{task}_acc_norm" in o.scores for o in found)]
    costs = EXPERIMENTS[name].memory
    head = ["", "lr", f"validation loss ({draw.unit(found)})", "n", "perplexity", "over the best",
            "lr within 5%", "steps", "FLOPs", *tasks,
            *(["parameters", "state (MB)", "training memory (MB)", "s / step"] if costs else []),
            *(["the paper's perplexity", "its loss over its best"] if paper else [])]
    rows = []
    for o in found:
        row = [o.label, best_lr(o), str(o), str(len(o.losses)), f"{math.exp(o.mean):.2f}",
               over(o.mean, least), o.width, str(o.steps or ""), f"{o.flops:.2e}" if o.flops else "",
               *(percent(o.scores.get(f"{task}_acc_norm")) for task in tasks)]
        if costs and o.logs:
            memory = o.memory
            row += [f"{memory['parameters']:,}", f"{memory['optimizer'] / 1e6:.1f}",
                    f"{o.training_memory / 1e6:.1f}",
                    f"{seconds:.2f}" if (seconds := runs.timed_seconds(o.arm, scale)) else ""]
        if paper:
            theirs = paper.get(o.arm, math.inf)
            row += [f"{theirs:.2f}", over(math.log(theirs), paper_least)]
        rows.append(row)
    return markdown(head, rows)


def differences(name: str, found) -> str:
    """How much higher the second arm of each pair ends than the first."""
    rows = []
    for a, b in EXPERIMENTS[name].pairs(found):
        difference, interval, seeds = gap(a, b)
        rows.append([f"{b.label} − {a.label}", "" if difference is None else f"{difference:+.3f}",
                     "" if interval is None else f"± {interval:.3f}", str(seeds)])
    return markdown(["difference", "nats", "95% interval", "seeds"], rows) if rows else ""


def norms(found) -> str:
    """Medians over the logged steps of seed 0, the last one left out, whose lr is nearly zero."""
    rows = []
    for o in (o for o in found if o.logs):
        def values(key):
            return [x for _, x in draw.points(o.logs[0], key)[:-1]]
        rows.append([o.label, f"{o.lr:g}", f"{statistics.median(values('dW')):.3g}",
                     f"{max(values('gauge')):.2f}", f"{statistics.median(values('dy')):.3g}",
                     f"{draw.points(o.logs[0], 'W')[-1][1]:.3g}"])
    head = ["", "lr", "median ‖dW‖₂", "largest ‖dW‖₂ / lr", "median rms of dy", "last ‖W‖₂"]
    return markdown(head, rows)


def step_ratios(low, dense) -> str:
    """Figure 2's ratio of the two steps of W."""
    rows = []
    for log, label in ((dense.logs[0], f"each at its best lr ({low.lr:g}, {dense.lr:g})"),
                       (log_of(Run(dense.arm, low.lr), runs.scale_of("nano")), f"both at {low.lr:g}")):
        if log.is_file():
            ratios = [ratio for _, ratio in draw.ratios(low.logs[0], log, "dW")]
            rows.append([label, f"{statistics.median(ratios):.1f}", f"{max(ratios):.1f}", "10 to 30"])
    return markdown(["‖dW‖₂, low-rank over dense", "median", "largest", "the paper"], rows)


def one_lr(found) -> str:
    """Of each method, the learning rate that is best for all its shapes, and what it costs them."""
    rows = []
    for method, arms in TRANSFERRED.items():
        grids = [(o.grid, o.lr) for o in found if o.arm in arms and o.lr]
        lrs = grids[0][0] if grids else ()
        above = {lr: [grid[lr] - grid[best] for grid, best in grids]
                 for lr in lrs if all(grid.get(lr) is not None for grid, _ in grids)}
        if above:
            lr = min(above, key=lambda lr: sum(above[lr]))
            rows.append([ARMS[method].label, ", ".join(f"{best:g}" for _, best in grids), f"{lr:g}",
                         f"{statistics.mean(above[lr]):.3f}", f"{max(above[lr]):.3f}"])
    return markdown(["", "best lr of each shape", "one for all", "its loss above each one's best, mean",
                     "largest"], rows)


def all_tables(name: str, scale: Scale) -> str:
    """The tables of an experiment, one below the other."""
    found = outcomes_of(name, scale)
    parts = [table(name, scale)]
    if EXPERIMENTS[name].norms:
        parts += [norms(found), step_ratios(*found) if name == "fig2" and all(o.logs for o in found) else ""]
    if name == "transfer":
        parts.append(one_lr(found))
    return "\n".join(filter(None, [*parts, differences(name, found)]))


def best_lr(o) -> str:
    edge = o.lr in (min(o.grid), max(o.grid)) if len(o.grid) > 1 else False
    return f"{o.lr:g}" + " (the edge of its grid)" * edge if o.lr else ""


def paper_of(name: str, scale: Scale) -> dict:
    return EXPERIMENTS[name].paper("S" if scale.size == "nano" else scale.size)


def percent(x: float | None) -> str:
    return "" if x is None else f"{x:.2%}"


def over(loss: float, best: float) -> str:
    return "" if math.isinf(loss) else f"{loss / best - 1:+.1%}"


def setting(scale: Scale, found) -> str:
    steps, seeds = f"{scale.steps:,}" if scale.steps else "the paper's", max(len(o.by_seed) for o in found)
    return (f"Size {scale.size}, {steps} steps of {scale.tokens_per_step:,} tokens of {scale.data}; "
            + ("seed 0" if seeds < 2 else f"up to {seeds} seeds at each arm's best learning rate"))


def report(name: str, scale: Scale) -> None:
    """table.md, table.json and figure.png of an experiment whose runs are there."""
    where, e = RESULTS / name / scale.name, EXPERIMENTS[name]
    found, paper = outcomes_of(name, scale), paper_of(name, scale)
    where.mkdir(parents=True, exist_ok=True)
    every = "\n".join(f"- {o.label}: " + ", ".join(
        f"{lr:g}: {'diverged' if loss is None else f'{loss:.3f}'}" for lr, loss in o.grid.items())
        for o in found)
    write(where / "table.md", f"# {e.title}\n\n{setting(scale, found)}. `{runs.reproduce(name, scale)}`\n\n"
          f"{all_tables(name, scale)}\n{e.note}\n\nEvery learning rate (seed 0):\n\n{every}\n\n"
          "![figure](figure.png)\n")
    arms = [{"arm": o.arm, "flags": ARMS[o.arm].flags, "steps": o.steps, "lr_grid": o.grid, "best_lr": o.lr,
             "seeds": o.by_seed, "n": len(o.losses), "mean": o.mean if o.losses else None, "sd": o.sd,
             "paper_perplexity": paper.get(o.arm), "logs": [log.as_posix() for log in o.logs]} for o in found]
    write(where / "table.json", json.dumps(
        {"name": name, "title": e.title, "command": runs.reproduce(name, scale), "scale": scale.given,
         "steps": scale.steps, "tokens_per_step": scale.tokens_per_step, "data": scale.data, "arms": arms},
        indent=1) + "\n")
    lost = [o.label for o in found if not o.logs]
    if lost and e.figure not in (draw.curves_and_gaps, draw.loss_over_lr, draw.loss_over_adam_lr):
        return print(f"{where}/table.md, table.json; no figure: no loss of {', '.join(lost)}")
    message = e.message if scale.name == "nano" else ""  # at another scale it may not hold
    draw.save(e.figure(found, paper, scale), where / "figure.png", message or e.title, setting(scale, found))
    print(f"{where}/table.md, table.json, figure.png", flush=True)


def write(path: Path, text: str) -> None:
    with replacing(path, "w") as file:
        file.write(text)


# -------------------------------------------------- Counts --------------------------------------------------

def counts(name: str) -> str:
    """Tables 4 and 5: parameters at the paper's vocabulary of 32,000, dense and at a rank ratio of 0.25."""
    title, sizes = COUNTS[name]
    paper = {row["size"]: row for row in PAPER["table5_sizes"]}
    rows = [f"# {title}\n", "Counted from model.py, without making a model: `python -m paper.reproduce "
            f"{name}`. Vocabulary 32,000, rank ratio 0.25.\n",
            "| size | width, layers, heads | dense, here | dense, paper | low-rank, here | low-rank, paper |",
            "|---|---|---|---|---|---|"]
    for size in sizes:
        c = replace(SIZES[size], vocab_size=PAPER["vocab_size"], rank_ratio=PAPER["rank_ratio"])
        low, dense = count_parameters(c), count_parameters(replace(c, rank_ratio=None))
        rows.append(f"| {size} | {c.dim}, {c.n_layers}, {c.n_heads} | {dense / 1e6:,.1f}M | {size} | "
                    f"{low / 1e6:,.1f}M | {paper[size]['lowrank']} |")
    return "\n".join(rows) + "\n"


def write_counts(name: str) -> None:
    where = RESULTS / name
    where.mkdir(parents=True, exist_ok=True)
    write(where / "table.md", counts(name))
    print(f"{where}/table.md")


def results_readme() -> str:
    """results/README.md: every table, from the logs alone."""
    parts = [PROTOCOL]
    for name, given in REPORT:
        e, scale = EXPERIMENTS[name], runs.scale_of("nano", **given)
        if not all(o.logs for o in outcomes_of(name, scale)):  # not run since the last change of the model
            continue
        parts += [f"## {e.title}" + (f", on {given['data']}" if "data" in given else ""),
                  all_tables(name, scale).strip(), f"{e.note} `{runs.reproduce(name, scale)}`, "
                  f"[figure]({name}/{scale.name}/figure.png)."]
    return "\n\n".join(parts).replace("\n\n\n", "\n\n") + "\n"


def write_report() -> None:
    write(RESULTS / "README.md", results_readme())
    draw.readme_figure(outcomes_of("fig3", runs.scale_of("nano")), RESULTS / "readme.png")
    print(f"{RESULTS}/README.md, readme.png")


# ------------------------------------------------- The runs -------------------------------------------------

def plan(name: str, scale: Scale) -> str:
    e = EXPERIMENTS[name]
    return f"{name}: {runs.estimate(arms_of(name, scale), scale, e.few, single_of(name, scale))}"


def prepare(name: str, scale: Scale) -> None:
    """Make every run that an experiment wants and that is missing. UserError for one that scores tasks whose
    files are not there."""
    e, arms = EXPERIMENTS[name], arms_of(name, scale)
    scored = e.tasks and not scale.nano
    if scored and not EVALS.is_dir():
        raise UserError(f"{name} scores HellaSwag, PIQA and ARC-Easy, and {EVALS} is not there: "
                        "python -m tools.download evals")
    print(plan(name, scale), flush=True)
    runs.sweep(arms, scale, e.few, single_of(name, scale))
    for o in outcomes_of(name, scale) if scored else []:
        if o.lr:
            runs.score(Run(o.arm, o.lr), scale, TASKS)


def equilibrated_everywhere() -> None:
    """Equilibrated Spectron in all of its settings, and results/equilibrated/README.md across them."""
    for scale in equilibrated.scales().values():
        prepare("equilibrated", scale)
        report("equilibrated", scale)
    found, where = equilibrated.pairs(), RESULTS / "equilibrated"
    write(where / "README.md", "# Equilibrated Spectron in every setting\n\n`python -m paper.reproduce "
          f"equilibrated`\n\n{equilibrated.table(found)}\n![figure](figure.png)\n\n## What else was tried\n\n"
          "Each idea at its best of at least three learning rates, with the code of "
          "[candidates.diff](candidates.diff), whose variable CAND names the idea, e.g. exact. Each "
          "[log](candidates) has its flags. The exact norm was run on a CPU, and 800 steps at three learning "
          "rates.\n\n"
          f"{equilibrated.candidates()}")
    draw.save(equilibrated.figure(found), where / "figure.png", "After 200 steps even rows have lowered the "
              "loss; after 800 little of it is left", "")
    print(f"{where}/README.md, figure.png")


def scaling_laws(args) -> None:
    """Sections 6 and D: their plan, or what runs are missing and then what was fitted."""
    if args.plan:
        rate = args.rate or (2e10 if args.scale == "nano" else 3.2e15)  # two CPU cores; 8 H100s at 40%
        return print("\n".join(isoflop.plan(args.scale, kind, args.count, args.flops, rate)
                               for kind in isoflop.KINDS))
    isoflop.make()
    {"isoflop": scaling_report.isoflop, "parametric": scaling_report.parametric}[args.name](args.count,
                                                                                          args.flops)


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("name", choices=[*EXPERIMENTS, *COUNTS, *scaling_report.WHERE, "all", "report"],
                        metavar="NAME",
                        help=f"{', '.join([*EXPERIMENTS, *COUNTS, *scaling_report.WHERE])}; all; report")
    parser.add_argument("--scale", default="nano", choices=list(SIZES), metavar="SIZE",
                        help="nano, S, M, L, or any --size of train.py (nano)")
    parser.add_argument("--seeds", type=positive, default=3, help="runs at the best learning rate (3)")
    parser.add_argument("--lrs", type=positive, help="learning rates of each arm (6 at nano, 3 above)")
    parser.add_argument("--data", help="token shards (those of train.py)")
    parser.add_argument("--steps", type=positive,
                        help="steps of each run (200 at nano, the paper's above)")
    parser.add_argument("--tokens_per_step", type=positive, help="tokens of a step (those of train.py)")
    parser.add_argument("--plan", action="store_true",
                        help="of isoflop: print its runs, and end; with --scale S those of the paper")
    parser.add_argument("--count", choices=("total", "blocks"), default="total",
                        help="of isoflop, parametric: N with or without embedding and head (total)")
    parser.add_argument("--flops", choices=("executed", "6nd"), default="executed",
                        help="of isoflop, parametric: C as executed, or the paper's 6 N D (executed)")
    parser.add_argument("--rate", type=number(), help="of --plan: FLOPs a second of the machine")
    parser.add_argument("--dry_run", action="store_true", help="say what would be run, and end")
    args = parser.parse_args(argv)
    if args.name == "report":
        return write_report()
    if args.name in COUNTS:
        return write_counts(args.name)
    if args.name in scaling_report.WHERE:
        return scaling_laws(args)
    if args.name == "equilibrated" and vars(args) == vars(parser.parse_args([args.name])):
        return equilibrated_everywhere()
    scale = runs.scale_of(args.scale, args.data, args.steps, args.tokens_per_step, args.lrs, args.seeds)
    wanted = [name for name in EXPERIMENTS if args.name in (name, "all")]
    if scale.nano and "fig7" in wanted:
        print("fig7, and table1's task columns, are not run at nano, where every model is at chance; they "
              "are at --scale S and above")
        wanted.remove("fig7")
    if not scale.nano and "transfer" in wanted:
        print("transfer is of nano's sizes alone: leave out --scale")
        wanted.remove("transfer")
    if args.dry_run:
        return print("\n".join(plan(name, scale) for name in wanted))
    for name in wanted:
        prepare(name, scale)
        report(name, scale)
    if args.name == "all":
        for name in COUNTS:
            write_counts(name)


if __name__ == "__main__":
    main()
