"""The paper's tables and figures, one command each.

    python -m paper.reproduce table2                 at nano, on the offline corpus
    python -m paper.reproduce all --scale nano       all that two cores can do: hours, and it may be stopped
    python -m paper.reproduce fig3 --scale S         at the paper's size, on what GPUs there are
    python -m paper.reproduce readme                 the results section of README.md, from results/

NAME is one of table1 (with figures 4 and 14a), table2 (10), table3 (11), table4, table5, fig1, fig2, fig3,
fig5, fig6, fig7, fig12, fig13. Each writes results/NAME/<scale>/: table.md, table.json, figure.png. The logs
behind them are in results/runs/<scale>: a run that is there is not made again, so that after a clone
everything can be drawn without training.
"""

import json
import math
import textwrap
from dataclasses import replace
from pathlib import Path

import cli
from cli import UserError
from model import ALIASES, SIZES, count_parameters
from paper import draw, runs
from paper.experiments import EXPERIMENTS, PAPER, SAYS, STANDS_FOR, arms_of, compared, outcomes_of, single_of
from paper.runs import ARMS, RESULTS, Run, Scale

MARKS = "<!-- results: made by python -m paper.reproduce readme -->", "<!-- end of results -->"
TASKS, EVALS = ("hellaswag", "piqa", "arc_easy"), Path("data/evals")
COUNTS = {"table4": ("Table 4: the three main models", list(ALIASES.values())),
          "table5": ("Table 5: the models of the scaling laws",
                     [row["size"] for row in PAPER["table5_sizes"]])}
IMDB = {"data": "data/imdb-bytes", "lrs": 3}
README = [("fig12", {}), ("table2", {}), ("table2", IMDB), ("table1", {}), ("table3", {}), ("fig13", {}),
          ("fig2", {}), ("fig3", {}), ("fig5", {}), ("fig6", {})]  # and what makes their scale, at nano
DRAWN = "fig2", "fig3"  # by the picture, where the others are by their table


########################################
#                Tables                #
########################################

def table(name: str, scale: Scale) -> str:
    """Every arm at its best learning rate, beside the paper, as Markdown."""
    found, paper = outcomes_of(name, scale), paper_of(name, scale)
    least, paper_least = min(o.mean for o in found), math.log(min(paper.values())) if paper else None
    tasks = [task for task in TASKS if any(f"{task}_acc_norm" in o.scores for o in found)]
    loss = f"validation loss ({draw.unit(found)})"
    head = ["", "lr", loss, "n", "perplexity", "loss over the best", *tasks]
    head += ["the paper's perplexity", "its loss over its best"] if paper else []
    rows = [head, ["---"] * len(head)]
    for o in found:
        row = [o.label, best_lr(o), str(o), str(len(o.losses)), f"{math.exp(o.mean):.2f}",
               over(o.mean, least)]
        row += [percent(o.scores.get(f"{task}_acc_norm")) for task in tasks]
        if paper:
            theirs = paper.get(o.arm, math.inf)
            row += [f"{theirs:.2f}", over(math.log(theirs), paper_least)]
        rows.append(row)
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def best_lr(o) -> str:
    edge = o.lr in (min(o.grid), max(o.grid)) if len(o.grid) > 1 else False
    return f"{o.lr:g}" + " (the edge of its grid)" * edge if o.lr else ""


def paper_of(name: str, scale: Scale) -> dict:
    return EXPERIMENTS[name].paper(STANDS_FOR.get(scale.size, scale.size))


def percent(x: float | None) -> str:
    return "" if x is None else f"{x:.2%}"


def over(loss: float, best: float) -> str:
    return "" if math.isinf(loss) else f"{loss / best - 1:+.1%}"


def sentence(name: str, scale: Scale) -> str:
    """Does the paper's order hold, by how much, against what spread; what differs."""
    e, found = EXPERIMENTS[name], outcomes_of(name, scale)
    order = [compared(a, b) for a, b in zip(found, found[1:])] if e.ordered else []
    own = SAYS[name](found, scale) if name in SAYS else ""
    ranks = order and f"The paper's order, in nats: {'; '.join(order)}."
    return " ".join(filter(None, [own, ranks, e.differs]))


def setting(scale: Scale) -> str:
    steps = f"{scale.steps:,}" if scale.steps else "the paper's"
    return (f"Size {scale.size}, {steps} steps of {scale.tokens_per_step:,} tokens of {scale.data}; up to "
            f"{scale.seeds} seeds at each arm's best learning rate")


def report(name: str, scale: Scale) -> None:
    """table.md, table.json and figure.png of an experiment whose runs are there."""
    where, e = RESULTS / name / scale.name, EXPERIMENTS[name]
    found, paper = outcomes_of(name, scale), paper_of(name, scale)
    where.mkdir(parents=True, exist_ok=True)
    every = "\n".join(f"- {o.label}: " + ", ".join(
        f"{lr:g}: {'diverged' if loss is None else f'{loss:.3f}'}" for lr, loss in o.grid.items())
        for o in found)
    (where / "table.md").write_text(
        f"# {e.title}\n\n{setting(scale)}. `{runs.reproduce(name, scale)}`\n\n"
        f"{table(name, scale)}\n{sentence(name, scale)}\n\nEvery learning rate (seed 0):\n\n{every}\n\n"
        "![figure](figure.png)\n")
    arms = [{"arm": o.arm, "flags": ARMS[o.arm].flags, "steps": o.steps, "lr_grid": o.grid, "best_lr": o.lr,
             "seeds": o.by_seed, "n": len(o.losses), "mean": o.mean if o.losses else None, "sd": o.sd,
             "paper_perplexity": paper.get(o.arm), "logs": [str(log) for log in o.logs]} for o in found]
    (where / "table.json").write_text(json.dumps(
        {"name": name, "title": e.title, "command": runs.reproduce(name, scale), "scale": scale.given,
         "steps": scale.steps, "tokens_per_step": scale.tokens_per_step, "data": scale.data, "arms": arms},
        indent=1) + "\n")
    lost = [o.label for o in found if not o.logs]
    if lost and e.figure not in (draw.curves_and_gaps, draw.loss_over_lr):
        return print(f"{where}/table.md, table.json; no figure: {', '.join(lost)} diverged at every lr")
    draw.save(e.figure(found, paper, scale), where / "figure.png", setting(scale))
    print(f"{where}/table.md, table.json, figure.png", flush=True)


########################################
#                Counts                #
########################################

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
    (where / "table.md").write_text(counts(name))
    print(f"{where}/table.md")


########################################
#                README                #
########################################

def readme_section() -> str:
    """What README.md says of the experiments, from results/ alone."""
    parts = []
    for name, given in README:
        e, scale = EXPERIMENTS[name], runs.scale_of("nano", **given)
        where, drawn = f"results/{name}/{scale.name}", name in DRAWN
        made_by = f"`{runs.reproduce(name, scale)}`"
        parts += [f"### {e.title}" + (f", on {given['data']}" if given else ""),
                  f"![{e.title}]({where}/figure.png)" if drawn else table(name, scale).strip(),
                  wrapped(f"{sentence(name, scale)} {made_by}; [table]({where}/table.md), "
                          f"[figure]({where}/figure.png).")]
    return "\n\n".join([wrapped(setting(runs.scale_of("nano")) + "."), *parts])


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def with_section(text: str, section: str) -> str:
    """A README with its results replaced. UserError where the two marks are not there."""
    head, first, rest = text.partition(MARKS[0])
    _, second, tail = rest.partition(MARKS[1])
    if not (first and second):
        raise UserError(f"README.md has no results section: expected the lines {MARKS[0]} and {MARKS[1]}")
    return f"{head}{first}\n\n{section}\n{second}{tail}"


########################################
#               The runs               #
########################################

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


@cli.command
def main(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("name", choices=[*EXPERIMENTS, *COUNTS, "all", "readme"], metavar="NAME",
                        help=f"{', '.join([*EXPERIMENTS, *COUNTS])}; all; readme")
    parser.add_argument("--scale", default="nano", choices=list(SIZES), metavar="SIZE",
                        help="nano, S, M, L, or any --size of train.py (nano)")
    parser.add_argument("--seeds", type=cli.positive, default=3, help="runs at the best learning rate (3)")
    parser.add_argument("--lrs", type=cli.positive, help="learning rates of each arm (6 at nano, 3 above)")
    parser.add_argument("--data", help="token shards (those of train.py)")
    parser.add_argument("--steps", type=cli.positive,
                        help="steps of each run (200 at nano, the paper's above)")
    parser.add_argument("--tokens_per_step", type=cli.positive, help="tokens of a step (those of train.py)")
    parser.add_argument("--dry_run", action="store_true", help="say what would be run, and end")
    args = parser.parse_args(argv)
    if args.name == "readme":
        readme = Path("README.md")
        readme.write_text(with_section(readme.read_text(), readme_section()))
        return print(readme)
    if args.name in COUNTS:
        return write_counts(args.name)
    scale = runs.scale_of(args.scale, args.data, args.steps, args.tokens_per_step, args.lrs, args.seeds)
    wanted = [name for name in EXPERIMENTS if args.name in (name, "all")]
    if scale.nano and "fig7" in wanted:
        print("fig7, and table1's task columns, are not run at nano, where every model is at chance; they "
              "are at --scale S and above")
        wanted.remove("fig7")
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
