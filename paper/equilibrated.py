"""Equilibrated Spectron beside Spectron in every setting where both were tuned alike, and how even the rows
of an orthogonalized momentum are, by kind of matrix and by step. What else was tried is in ideas.md.

    python -m paper.equilibrated               all of results/equilibrated, from the logs that are there
    python -m paper.equilibrated --again       with rows.json made again, by training nano for 200 steps
"""

import shlex
import subprocess
import sys
from pathlib import Path

import torch

from baselines.equilibrated import equilibrate
from lib.checkpoints import load_checkpoint, load_model
from lib.cli import Parser, command
from lib.methods import block_matrices
from paper import draw, runs, tuned
from paper.experiments import SAID, gap, mean_and_half, outcomes_of
from paper.output import markdown, read_json, save, write, write_json
from paper.runs import RESULTS
from paper.tables import gap_cells, prepare, report
from spectron import newton_schulz

WHERE = RESULTS / "equilibrated"
HALF = {"steps": 200, "tokens_per_step": 2048, "lrs": 5, "seeds": 5}
SETTINGS = {label: runs.scale_of(**{"scale": "nano"} | given) for label, given in {
    "the offline corpus": {"seeds": 5}, "half the batch": HALF,
    "that, IMDb reviews": HALF | {"data": "data/imdb-bytes"}, "a width of 384": {"scale": "nano-7.3M"},
    "four times the steps": {"steps": 800, "seeds": 5}}.items()}


def table(found: dict) -> str:
    head = ["", "steps x tokens", "lr", "Spectron", "lr", "equilibrated", "difference", "95% interval",
            "seeds", "lr within 5%", "FLOPs of each"]
    rows = [[f"[{label}]({scale.name}/table.md)", f"{scale.steps} x {scale.tokens_per_step:,}",
             f"{plain.lr:g}", str(plain), f"{even.lr:g}", str(even), *gap_cells(plain, even),
             f"{plain.width}, {even.width}", f"{plain.flops:.2e}"]
            for (label, (plain, even)), scale in zip(found.items(), SETTINGS.values())]
    return markdown(head, rows)


def tuned_gaps() -> dict[str, tuple]:
    """label -> (mean, half of the 95% interval) of equilibrated minus not, both tuned."""
    found = {}
    for label, even, plain in (("Spectron tuned", "equilibrated", "spectron"),
                               ("Muon tuned", "equilibrated-muon", "orthogonalize")):
        for scale in tuned.SHORT, tuned.LONG, tuned.LONGER:
            gaps = tuned.above(tuned.of_length(scale, even), tuned.of_length(scale, plain))
            found[f"{label}, {scale.steps:,} steps"] = mean_and_half(gaps)
    return found


def figure(found: dict):
    """Left, the differences; right, the learning-rate curves over Spectron's best loss in each setting."""
    fig, (left, right) = draw.panels(2, 10.5, width_ratios=[1, 1.3])
    further = tuned_gaps()
    for row, (label, (plain, even)) in enumerate(found.items()):
        difference, interval, _ = gap(plain, even)
        left.errorbar(difference, row, xerr=interval or 0, color=draw.COLOURS[row], marker="o", capsize=3)
        for o, line in (plain, "--"), (even, "-"):
            shown = [(lr, loss - plain.grid[plain.lr]) for lr, loss in o.grid.items() if loss is not None]
            right.plot(*zip(*shown), color=draw.COLOURS[row], ls=line, marker="os^vD"[row], ms=4, lw=1.5)
    for row, (difference, interval) in enumerate(further.values(), len(found)):
        left.errorbar(difference, row, xerr=interval, color=draw.BLACK, marker="o", capsize=3)
    left.axvline(0, color="0.5", lw=0.8)
    labels = [*found, *further]
    left.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.4, -0.6),
             xlabel="equilibrated minus not (nats per byte)\nmean and 95% interval")
    for label, colour in zip(left.get_yticklabels(), draw.COLOURS[:len(found)]):
        label.set_color(colour)
    right.set(xscale="log", ylim=(-0.12, 0.4), xlabel="learning rate (solid: equilibrated, dashed: Spectron)",
              ylabel="final loss above Spectron's best")
    draw.name_lrs(right, {lr for pair in found.values() for o in pair for lr in o.grid})
    return fig


STEPS, TIMES = (5, 50, 200), {0: "Spectron", 1: "equilibrated", 2: "equilibrated, times=2"}
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRAIN = f"--steps {STEPS[-1]} --dtype float32 --eval_tokens 16384 --final_eval_tokens 16384"


def rows_of(checkpoint: dict) -> list[dict]:
    """The lengths of the rows of the orthogonalized momentum over their root mean square, over all blocks."""
    momenta, records = {}, []
    states = iter(checkpoint["optimizers"][0]["state"].values())  # A and B of each matrix, in this order
    for name in block_matrices(load_model(checkpoint, "cpu")):
        for factor in "AB":
            M = next(states)["momentum_buffer"].double()
            momenta.setdefault((name.split(".")[-1], factor), []).append(M)
    for (kind, factor), Ms in momenta.items():
        for times in TIMES:
            M = torch.stack(Ms)  # (blocks, rows, rank)
            rows = torch.linalg.vector_norm(newton_schulz(equilibrate(M, times, 5) if times else M), dim=-1)
            rows = rows / rows.square().mean(-1, keepdim=True).sqrt()
            records.append({"step": checkpoint["step"], "kind": kind, "factor": factor, "times": times,
                            "min": float(rows.min()), "max": float(rows.max()),
                            "std": float(rows.std(-1).mean())})
    return records


def balance(checkpoint: dict) -> list[dict]:
    """sigma_A / sigma_B of each matrix, the least and the most of each kind; 1 at the start."""
    model, found = load_model(checkpoint, "cpu"), {}
    for name, layer in block_matrices(model).items():
        A, B = (torch.linalg.matrix_norm(p.detach().double(), ord=2) for p in (layer.A, layer.B))
        found.setdefault(name.split(".")[-1], []).append(float(A / B))
    return [{"step": checkpoint["step"], "kind": kind, "min_ratio": min(x), "max_ratio": max(x)}
            for kind, x in found.items()]


def measure(out: Path) -> list[dict]:
    """The rows after some steps of a run, and the balance at its end."""
    records = []
    for step in STEPS:
        flags = f"{TRAIN} --stop_at {step} --resume auto --out {shlex.quote(str(out))}"
        subprocess.run([sys.executable, "train.py", *shlex.split(flags)], check=True)
        records += rows_of(load_checkpoint(out))
    return records + balance(load_checkpoint(out))


def rows_figure(records):
    """A row for each factor: the standard deviation of its rows' lengths, for each method."""
    factors = [(kind, factor) for kind in KINDS for factor in "AB"]
    fig, axes = draw.panels(len(STEPS), 9.5, 4.6, sharey=True)
    for ax, step in zip(axes, STEPS):
        for (times, label), colour, marker in zip(TIMES.items(), draw.COLOURS, "os^"):
            by = {(r["kind"], r["factor"]): r["std"] for r in records
                  if (r["step"], r.get("times")) == (step, times)}
            ax.plot([by[factor] for factor in factors], range(len(factors)), marker, color=colour, ms=5,
                    label=label)
        ax.set(xlabel=f"step {step}", xlim=(0, 0.55))
    names = [f"{kind.removesuffix('_proj')}, {factor}" for kind, factor in factors]
    axes[0].set(yticks=range(len(factors)), yticklabels=names, ylim=(len(factors) - 0.5, -0.5))
    return fig


def rows_page(records) -> str:
    rows = [[str(step), str(times), ", ".join(
        f"{kind.removesuffix('_proj')} " + "/".join(f"{r['std']:.2f}" for r in records if (
            r["step"], r.get("times"), r["kind"]) == (step, times, kind)) for kind in KINDS)]
        for step in STEPS for times in TIMES]
    ratios = ", ".join(f"{r['kind'].removesuffix('_proj')} {r['min_ratio']:.2f} to {r['max_ratio']:.2f}"
                       for r in records if "min_ratio" in r)
    table = markdown(["step", "times", "kinds, A and B: standard deviation of the rows' lengths"], rows)
    return ("# How even the rows are\n\n`python -m paper.equilibrated`. Nano, 200 steps, lr 0.2, momentum "
            f"0.7, seed 0; all four blocks.\n\n{table}\nsigma_A / sigma_B after the last step, the least and "
            f"the most of four blocks: {ratios}.\n\n![figure](rows.png)\n")


def everywhere(again: bool = False) -> None:
    for scale in SETTINGS.values():
        prepare("equilibrated", scale)
        report("equilibrated", scale)
    found = {label: outcomes_of("equilibrated", scale) for label, scale in SETTINGS.items()}
    write(WHERE / "README.md", "# Equilibrated Spectron in every setting\n\n`python -m paper.reproduce "
          f"equilibrated`\n\n{table(found)}\n![figure](figure.png)\n\n"
          + Path(__file__).with_name("ideas.md").read_text("utf-8"))
    save(figure(found), WHERE / "figure.png", SAID["equilibrated"]["message"],
         "Size nano and adam_lr 3e-3 where not said; coloured: the settings at the left")
    if again or not (WHERE / "rows.json").is_file():
        write_json(WHERE / "rows.json", measure(Path("out/paper/rows")))
    records = read_json(WHERE / "rows.json")
    write(WHERE / "rows.md", rows_page(records))
    save(rows_figure(records), WHERE / "rows.png",
         "Equilibrated Spectron evens the most uneven rows but disturbs the even ones; times=2 does not",
         "Size nano, seed 0. Standard deviation of the lengths of the orthogonalized momentum's rows, over "
         "their root mean square (0: all alike), mean of four blocks")
    print(f"{WHERE}/README.md, figure.png, rows.md, rows.png")


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--again", action="store_true", help="train again, although rows.json is there")
    everywhere(parser.parse_args(argv).again)


if __name__ == "__main__":
    main()
