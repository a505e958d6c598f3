"""Figures from the logs of runs.

    python plot.py out/a out/b -o fig.png [--x step|tokens|flops|seconds] [--y val_loss|loss|dW|W|dy|gauge]
"""

import json
from pathlib import Path

import cli
from cli import UserError

LABELS = {"step": "step", "tokens": "tokens", "flops": "training FLOPs", "seconds": "seconds of training",
          "val_loss": "validation loss (nats per token)", "loss": "training loss (nats per token)",
          "dW": r"$\|\Delta W\|_2$", "W": r"$\|W\|_2$", "dy": r"$|\Delta y|_{rms}$",
          "gauge": r"$\|\Delta W\|_2\,/\,$lr"}
NORMS = "dW", "W", "dy", "gauge"  # of one matrix
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
           "#000000"]  # Okabe and Ito, colour-blind-safe
DULL = {"out", "data_tokens", "model", "stop_at", "micro_steps", "device", "resume", "overwrite", "dry_run"}
ON = {"orthogonalize", "renormalize", "nesterov"}


def read_log(run) -> tuple[dict, list[dict]]:
    """(first record, the records of the steps) of a run's directory or log. UserError where there is none."""
    path = Path(run)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no log: {path} does not exist. Runs are in out/; make one with: python train.py")
    try:
        rows = path.read_text().splitlines(keepends=True)
        records = [json.loads(row) for row in rows if row.endswith("\n")]  # the last may be torn by a kill
        return next(r for r in records if "config" in r), [r for r in records if "step" in r]
    except (ValueError, StopIteration, TypeError):
        raise UserError(f"{path} is not a log of train.py: expected JSON lines, the first one "
                        "with a config") from None


def labels(configs: list[dict]) -> list[str]:
    """A name for each run, of the settings in which the runs differ; and its directory, if two are alike."""
    values = {key: {json.dumps(c[key]) for c in configs if c.get(key) is not None} for key in configs[0]}
    keys = [key for key in configs[0] if key not in DULL and len(values[key]) > 1]

    def say(key, value):
        if isinstance(value, bool):  # what is on by default is said when it is off, and the other way round
            return "" if value == (key in ON) else key if value else f"no {key}"
        return str(value) if key == "method" else f"{key} {value}"
    names = [", ".join(filter(None, (say(key, c[key]) for key in keys if c.get(key) is not None)))
             or c.get("method", "run") for c in configs]
    return [name if names.count(name) == 1 else f"{name} ({c['out']})" for name, c in zip(names, configs)]


def figure(runs, out, x="step", y=None) -> None:
    """Draw y over x of these runs to `out`; y None draws a single run's training and validation loss."""
    import matplotlib.pyplot as plt  # a second: not before it is needed
    plt.switch_backend("Agg")  # files only: no window, no screen
    logs = [read_log(run) for run in runs]
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    fig, ax = plt.subplots(figsize=(7, 4.3), layout="constrained")
    names = labels([header["config"] for header, _ in logs])
    drawn = 0
    for i, ((_, records), name) in enumerate(zip(logs, names)):
        for key in [y] if y else ["loss", "val_loss"]:
            points = [(r[x], r[key]) for r in records if r.get(key) is not None and r.get(x) is not None]
            if not points:
                continue
            drawn += 1
            label = name if y else {"loss": "training", "val_loss": "validation"}[key]
            few = len(points) < 30 or key == "val_loss"
            ax.plot(*zip(*points), color=COLOURS[(i if y else drawn - 1) % len(COLOURS)], label=label,
                    ls=["-", "--", ":"][i // len(COLOURS) % 3], lw=1.6, marker="o" if few else None, ms=3.5)
    if not drawn:
        plt.close(fig)
        raise UserError(f"no run has both {x} and {y or 'loss'} in its log; it has "
                        f"{', '.join(logs[0][1][0]) if logs[0][1] else 'no steps'}")
    of = f" of {logs[0][0]['config']['spectra_of']}" if y in NORMS else ""
    ax.set(xlabel=LABELS[x], ylabel=LABELS[y] + of if y else "loss (nats per token)")
    ax.set_yscale("log" if y in ("dW", "dy", "gauge") else "linear")
    ax.grid(alpha=0.25)
    fig.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    fig.savefig(out, dpi=150)
    plt.close(fig)


@cli.command
def main(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="directories of runs, or their log.jsonl")
    parser.add_argument("-o", "--out", default="fig.png", help="picture to write: .png, .pdf, .svg (fig.png)")
    parser.add_argument("--x", choices=["step", "tokens", "flops", "seconds"], default="step")
    parser.add_argument("--y", choices=["val_loss", "loss", *NORMS], default="val_loss")
    args = parser.parse_args(argv)
    if Path(args.out).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {args.out}: expected a name that ends in .png, .pdf or .svg")
    figure(args.runs, args.out, args.x, args.y)
    print(args.out)


if __name__ == "__main__":
    main()
