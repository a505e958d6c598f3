"""How even are the rows of an orthogonalized momentum? Those of a real run, by kind of matrix and by step.

    python -m paper.rows       results/equilibrated/rows.json, rows.md and rows.png

Trains nano as `python -m paper.reproduce equilibrated` does, stops after steps 5, 50 and 200, and takes the
momenta from the checkpoints. A row's length is given over the root mean square of all rows of its factor.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from lib.cli import Parser, command
from lib.checkpoints import load_checkpoint, load_model
from paper.draw import save
from paper.reproduce import markdown, write
from paper.runs import RESULTS
from baselines.equilibrated import equilibrate
from spectron import newton_schulz
from tools.plot import COLOURS, new_figure

STEPS, TIMES = (5, 50, 200), (0, 1, 2)
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRAIN = f"--steps {STEPS[-1]} --dtype float32 --eval_tokens 16384 --final_eval_tokens 16384"
from lib.methods import block_matrices


def momenta(checkpoint: dict) -> dict:
    """(kind, "A" or "B") -> the momenta of all blocks, (blocks, rows, rank), in float64."""
    model = load_model(checkpoint, "cpu")
    states, found = iter(checkpoint["optimizers"][0]["state"].values()), {}
    assert [p for pair in model.factor_pairs() for p in pair][0] is list(block_matrices(model).values())[0].A
    for name in block_matrices(model):
        for factor in "AB":
            M = next(states)["momentum_buffer"].double()
            found.setdefault((name.split(".")[-1], factor), []).append(M)
    return {key: torch.stack(Ms) for key, Ms in found.items()}


def lengths(M: torch.Tensor, times: int) -> torch.Tensor:
    """The lengths of the rows of newton_schulz, over their root mean square, (blocks, rows)."""
    O = newton_schulz(equilibrate(M, times, 5) if times else M)
    rows = torch.linalg.vector_norm(O, dim=-1)
    return rows / rows.square().mean(-1, keepdim=True).sqrt()


def balance(checkpoint: dict) -> list[dict]:
    """sigma_A / sigma_B of each matrix, the least and the most of each kind; 1 at the start."""
    model, found = load_model(checkpoint, "cpu"), {}
    for name, layer in block_matrices(model).items():
        A, B = (torch.linalg.matrix_norm(p.detach().double(), ord=2) for p in (layer.A, layer.B))
        found.setdefault(name.split(".")[-1], []).append(float(A / B))
    return [{"step": checkpoint["step"], "kind": kind, "min_ratio": min(x), "max_ratio": max(x)}
            for kind, x in found.items()]


def measure(out: Path) -> list[dict]:
    """A record for each step, kind, factor and number of times; and the balance at the end."""
    records = []
    for step in STEPS:
        flags = f"{TRAIN} --stop_at {step} --resume auto --out {shlex.quote(str(out))}"
        subprocess.run([sys.executable, "train.py", *shlex.split(flags)], check=True)
        for (kind, factor), M in momenta(load_checkpoint(out)).items():
            for times in TIMES:
                rows = lengths(M, times)
                records.append({"step": step, "kind": kind, "factor": factor, "times": times,
                                "min": float(rows.min()), "max": float(rows.max()),
                                "std": float(rows.std(-1).mean())})
    return records + balance(load_checkpoint(out))


def figure(records):
    fig = new_figure(9, 4.6)
    axes = fig.subplots(1, len(STEPS), sharey=True)
    for ax, step in zip(axes, STEPS):
        for times, colour in zip(TIMES, COLOURS):
            some = [r for r in records if (r["step"], r.get("times")) == (step, times)]
            places = [2.6 * KINDS.index(r["kind"]) + 1.3 * (r["factor"] == "B") + 0.3 * times for r in some]
            ax.vlines(places, [r["min"] for r in some], [r["max"] for r in some], color=colour, lw=1.8,
                      label=f"--equilibrate {times}")
        ax.axhline(1, color="0.6", lw=0.8, zorder=0)
        ax.set(xlabel=f"step {step}")
        ax.set_xticks([2.6 * i + 0.95 for i in range(len(KINDS))],
                      [kind.removesuffix("_proj") for kind in KINDS], rotation=60)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("length of a row of O over their RMS:\nfrom the shortest to the longest")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False)
    return fig


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--again", action="store_true", help="train again, although rows.json is there")
    args = parser.parse_args(argv)
    where = RESULTS / "equilibrated"
    where.mkdir(parents=True, exist_ok=True)
    if args.again or not (where / "rows.json").exists():
        records = measure(Path("out/paper/rows"))
        write(where / "rows.json", "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    records = json.loads((where / "rows.json").read_text("utf-8"))
    head = ["step", "times", "kinds, A and B: standard deviation of the rows' lengths"]
    rows = [[str(step), str(times), ", ".join(
        f"{kind.removesuffix('_proj')} " + "/".join(f"{r['std']:.2f}" for r in records if (
            r["step"], r.get("times"), r["kind"]) == (step, times, kind)) for kind in KINDS)]
        for step in STEPS for times in TIMES]
    ratios = ", ".join(f"{r['kind'].removesuffix('_proj')} {r['min_ratio']:.2f} to {r['max_ratio']:.2f}"
                       for r in records if "min_ratio" in r)
    write(where / "rows.md", "# How even the rows are\n\n`python -m paper.rows`. Nano, 200 steps, lr 0.2, "
          f"momentum 0.7, seed 0; all four blocks.\n\n{markdown(head, rows)}\n"
          f"sigma_A / sigma_B after the last step, the least and the most of four blocks: {ratios}.\n\n"
          "![figure](rows.png)\n")
    save(figure(records), where / "rows.png", "The rows of A of gate and up and of B of down are the uneven "
         "ones; dividing once makes the even ones less even, and correcting once evens all",
         "Size nano; two groups of bars for each matrix, A left and B right, over all blocks")
    print(f"{where}/rows.json, rows.md, rows.png")


if __name__ == "__main__":
    main()
