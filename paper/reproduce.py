"""The paper's tables and figures, one command each.

    python -m paper.reproduce table2                 its committed pages, at nano
    python -m paper.reproduce all                    every page of results/README.md but geometry's
    python -m paper.reproduce fig3 --scale S         at the paper's size, on what GPUs there are
    python -m paper.reproduce report                 results/README.md, which lists them, and its figure

table1 has figures 4 and 14a too, table2 10, table3 11, fig5 1, isoflop 8 and 9, and parametric appendix D.
Each writes results/NAME/<scale>/: table.md and figure.png. The logs behind them are in results/runs: a run
that is there is not made again, so that after a clone all of this is drawn without training. A flag asks for
another page, whose runs are trained first: hours, which may be stopped.
"""

from dataclasses import replace
from pathlib import Path

from lib.cli import Parser, UserError, command, positive
from lib.methods import count_parameters
from model import ALIASES, NANO_SIZES, SIZES
from paper import draw, equilibrated, one_gpu, runs, scaling, tuned
from paper.experiments import EXPERIMENTS, PAPER, SAID, T95, outcomes_of
from paper.output import markdown, write
from paper.runs import RESULTS
from paper.tables import prepare, report, words

COUNTS = {"table4": ("Table 4: the three main models", list(ALIASES.values())),
          "table5": ("Table 5: the models of the scaling laws", list(PAPER["table5"]))}
IMDB = {"data": "data/imdb-bytes", "lrs": 3}
REPORT = {"methods": [{}], "methods-flops": [{}], "settings": [{}], "table1": [{}], "table2": [{}, IMDB],
          "table3": [{}], "fig2": [{}], "fig3": [{}], "fig5": [{}], "fig6": [{}], "fig12": [{}],
          "fig13": [{}], "adam_lr": [{}], "equilibrated-tuned": [{"seeds": 5}],
          "momentum": [{"steps": 800}, {"steps": 200, "tokens_per_step": 2048}]}  # the scales of their pages
OTHERS = {"equilibrated": ("equilibrated/README.md", "equilibrated/figure.png"),  # their table and figure
          "shapes": ("shapes/table.md", "shapes/figure.png"),
          "norms": ("norms/table.md", ""), "lengths": ("lengths/table.md", "lengths/figure.png"),
          "isoflop": ("isoflop/table.md", "isoflop/gap.png"),
          "parametric": ("parametric/table.md", "isoflop/figure8.png"),
          "geometry": ("geometry/README.md", "geometry/spectra.png"), "table4": ("table4/table.md", "")}


def counts(name: str) -> str:
    """Tables 4 and 5: parameters at the paper's vocabulary of 32,000, dense and at a rank ratio of 0.25."""
    title, sizes = COUNTS[name]
    rows = [f"# {title}\n", "Counted from model.py, without making a model: `python -m paper.reproduce "
            f"{name}`. Vocabulary 32,000, rank ratio 0.25.\n",
            "| size | width, layers, heads | dense, here | dense, paper | low-rank, here | low-rank, paper |",
            "|---|---|---|---|---|---|"]
    for size in sizes:
        c = replace(SIZES[size], vocab_size=PAPER["vocab_size"], rank_ratio=PAPER["rank_ratio"])
        low, dense = count_parameters(c), count_parameters(replace(c, rank_ratio=None))
        rows.append(f"| {size} | {c.dim}, {c.n_layers}, {c.n_heads} | {dense / 1e6:,.1f}M | {size} | "
                    f"{low / 1e6:,.1f}M | {PAPER['table5'][size]} |")
    return "\n".join(rows) + "\n"


def index() -> str:
    """results/README.md: results.md with a row for each experiment, from their titles and messages."""
    rows = []
    for name, scales in REPORT.items():
        scales = [runs.scale_of("nano", **given) for given in scales]
        tables = [f"[{name if i == 0 else scale.name}]({name}/{scale.name}/table.md)"
                  for i, scale in enumerate(scales)]
        rows.append([words(name, scales[0]), ", ".join(tables), f"{name}/{scales[0].name}/figure.png"])
    rows += [[SAID[name], f"[{name}]({page})", figure] for name, (page, figure) in OTHERS.items()]
    table = markdown(["question", "answer, with its figure", "table"], [
        [said["title"].split(" (")[0], f"[{said['message']}]({figure})" if figure else said["message"],
         tables]
        for said, tables, figure in rows])
    return Path(__file__).with_name("results.md").read_text("utf-8").replace("TABLE\n", f"{table}\n")


@command
def main(argv=None):
    parser = Parser(__doc__)
    names = [*EXPERIMENTS, *COUNTS, *scaling.PARTS, *tuned.PARTS, "one_gpu", "all", "report"]
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--scale", default="nano", choices=list(SIZES), metavar="SIZE",
                        help="nano, S, M, L, or any --size of train.py (nano)")
    parser.add_argument("--seeds", type=positive, help="runs at the best lr (3)")
    parser.add_argument("--lrs", type=positive, help="learning rates of each method (6 at nano, 3 above)")
    parser.add_argument("--data", help="token shards (those of train.py)")
    parser.add_argument("--steps", type=positive,
                        help="steps of each run (200 at nano, the paper's above)")
    parser.add_argument("--tokens_per_step", type=positive, help="tokens of a step (those of train.py)")
    parser.add_argument("--dry_run", action="store_true", help="say what would be run, and end")
    args = parser.parse_args(argv)
    plain = vars(args) == vars(parser.parse_args([args.name]))  # no flag was given
    if args.name not in (*EXPERIMENTS, "all") and not plain:
        raise UserError(f"{args.name} takes no flags: python -m paper.reproduce {args.name}")
    if args.name not in (*EXPERIMENTS, "all") or args.name == "equilibrated" and plain:
        return redraw(args.name)
    if args.seeds and args.seeds > max(T95):
        raise UserError(f"--seeds {args.seeds}: at most {max(T95)}")
    given = {key: getattr(args, key) for key in ("data", "steps", "tokens_per_step", "lrs", "seeds")
             if getattr(args, key)}
    for name in [name for name in EXPERIMENTS if args.name in (name, "all")]:
        if name == "fig7" and args.scale in NANO_SIZES:
            print("fig7, and table1's task columns, are not run at nano, where every model is at chance; "
                  "they are at --scale S and above")
            continue
        own = REPORT.get(name, [{}]) if args.scale == "nano" and not given else [given]
        for scale in [runs.scale_of(args.scale, **more) for more in own]:
            prepare(name, scale, args.dry_run)
            if not args.dry_run:
                report(name, scale)
    if args.name == "all" and plain:
        for name in ("equilibrated", *COUNTS, *scaling.PARTS, *tuned.PARTS, "report"):
            redraw(name)


def redraw(name: str) -> None:
    """What is not a comparison of methods at one scale."""
    if name == "report":
        write(RESULTS / "README.md", index())
        draw.readme_figure(outcomes_of("fig3", runs.scale_of("nano")))
        draw.first_run_figure()
        print(f"{RESULTS}/README.md, readme.png, first-run.png")
    elif name in COUNTS:
        write(RESULTS / name / "table.md", counts(name))
        print(f"{RESULTS / name}/table.md")
    elif name == "one_gpu":
        one_gpu.main(["--report"])
    elif name == "equilibrated":
        equilibrated.everywhere()
    else:
        (scaling if name in scaling.PARTS else tuned).main([name])


if __name__ == "__main__":
    main()
