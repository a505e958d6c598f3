"""Figures from the logs of runs.

    python -m tools.plot out/a out/b -o fig.png --x flops --y val_loss
"""

import json
import os
import sys
import textwrap
from contextlib import contextmanager, suppress
from pathlib import Path

from lib.cli import Parser, UserError, command
from lib.files import replacing
from lib.outputs import own_name

LABELS = {"step": "step", "tokens": "tokens", "flops": "training FLOPs", "seconds": "seconds of training",
          "val_loss": "validation loss", "loss": "training loss", None: "loss",
          "dW": r"$\|\Delta W\|_2$", "W": r"$\|W\|_2$", "dy": r"$|\Delta y|_{rms}$",
          "gauge": r"$\|\Delta W\|_2\,/\,$lr", "rank": "mean rank of the layers"}
NORMS = "dW", "W", "dy", "gauge"  # of one matrix
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
           "#000000"]  # Okabe and Ito, colour-blind-safe
# Settings that do not change what a run learns, or say the same as another setting
UNTOLD = {"out", "data_tokens", "model", "stop_at", "micro_steps", "device", "compile", "batch_size",
          "eval_every", "eval_tokens", "final_eval_tokens", "save_every", "keep_every", "spectra_every",
          "on_nonfinite"}
ON = {"orthogonalize", "renormalize", "nesterov"}
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


def read_log(run) -> tuple[dict, list[dict]]:
    """(first record, the records of the steps) of a run's directory or log. UserError where there is none."""
    path = Path(run)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no log: {path} does not exist. Runs are in out/; make one with: python train.py")
    try:
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        records = [json.loads(row) for row in rows if row.endswith("\n")]  # a kill may have torn the last one
        header = next(r for r in records if "config" in r)
        header["config"].keys()  # is a dictionary
        return header, [r for r in records if "step" in r]
    except (ValueError, StopIteration, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged, or not a log of train.py: expected JSON lines, the first one "
                        "with a config. Name another run") from None


def unit(configs: list[dict]) -> str:
    """Of the losses of runs with these settings. A token of one tokenizer is not that of another."""
    tokenizers = {c.get("tokenizer") for c in configs}
    if len(tokenizers) > 1:
        return "nats per token of each run's tokenizer"
    return "nats per byte" if tokenizers == {"bytes"} else "nats per token"


def other_text(records: list[dict]) -> tuple[int, int] | None:
    """(tokens of the last validation, tokens of those before), where these differ."""
    found = [r.get("val_tokens") for r in records if r.get("val_loss") is not None]
    return (found[-1], found[0]) if len(found) > 1 and None not in found and found[-1] != found[0] else None


def labels(configs: list[dict], runs: list) -> list[str]:
    """A name for each run: the settings in which the runs differ, and the path given where two are alike."""
    keys = [key for key in configs[0] if key not in UNTOLD
            and len({json.dumps(c[key]) for c in configs if c.get(key) is not None}) > 1]

    def say(key, value):
        if isinstance(value, bool):  # what is on by default is told when it is off, and the other way round
            return "" if value == (key in ON) else key if value else f"no {key}"
        return str(value) if key == "method" else f"{key} {value}"

    names = [", ".join(filter(None, (say(key, c[key]) for key in keys if c.get(key) is not None)))
             or c.get("method", "run") for c in configs]
    return [name if names.count(name) == 1 else f"{name} ({run})" for name, run in zip(names, runs)]


def import_matplotlib():
    """matplotlib, for figures that go to files only. What MPLBACKEND names, as a notebook does, is left for
    those who show figures: it may not be installed here, which would end the import."""
    if "matplotlib" not in sys.modules:
        named = os.environ.pop("MPLBACKEND", None)
        try:
            import matplotlib
        finally:
            if named is not None:
                os.environ["MPLBACKEND"] = named
        if named:
            with suppress(ValueError):  # no such backend here
                matplotlib.rcParams["backend"] = named
    import matplotlib.style
    return matplotlib


@contextmanager
def our_style():
    """Also a decorator: figures are drawn and saved in our style, whatever a user has set, who finds those
    settings as they were."""
    with import_matplotlib().style.context(["default", STYLE]):
        yield


def new_figure(width: float, height: float):
    """An empty matplotlib figure that is only ever written to a file; pyplot does not know it. Our style is
    set, and stays after it unless this is called inside our_style()."""
    import_matplotlib().style.use(["default", STYLE])
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def add_legend(fig, handles, names) -> None:
    """A legend below the axes. The picture grows by what it needs, and long names are wrapped."""
    width = fig.get_figwidth()
    columns = 1 if max(map(len, names)) > 6 * width else 2
    names = [textwrap.fill(name, int(11 * width / columns) - 2) for name in names]
    lines = sum(1 + name.count("\n") for name in names) / columns
    fig.set_figheight(fig.get_figheight() + 0.22 * lines)
    fig.legend(handles, names, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)


def figure(runs, out, x="step", y=None) -> None:
    """Draw y over x of these runs to `out`. Without y: a single run's training and validation loss. In a
    notebook the picture is shown, too."""
    with replacing(out) as file, our_style():
        draw(runs, x, y).savefig(file, format=Path(out).suffix[1:], dpi=150)
    if in_notebook() and Path(out).suffix == ".png":
        from IPython.display import Image, display
        display(Image(filename=str(out)))


def in_notebook() -> bool:
    """Whether a kernel runs this, which can show a picture; a terminal's IPython cannot."""
    return hasattr(sys.modules["IPython"].get_ipython(), "kernel") if "IPython" in sys.modules else False


@our_style()
def draw(runs, x, y):
    """The figure itself. UserError where no run has both x and y."""
    logs = [read_log(run) for run in runs]
    configs = [header["config"] for header, _ in logs]
    names, of = labels(configs, runs), configs[0].get("spectra_of")
    fig = new_figure(7, 4.3)
    ax, curves = fig.subplots(), []
    ends = {}  # by the tokens of the last validations: a marker of one of them, for the legend
    for i, ((_, records), name) in enumerate(zip(logs, names)):
        for key in [y] if y else ["loss", "val_loss"]:
            points = [(r[x], r[key]) for r in records if r.get(key) is not None and r.get(x) is not None]
            if points:
                name = name if y else {"loss": "training", "val_loss": "validation"}[key]
                colour = COLOURS[(i if y else len(curves)) % len(COLOURS)]
                few = len(points) < 30 or key == "val_loss"
                # After the last step the validation may be on more text: no point of the same curve.
                other = other_text(records) if key == "val_loss" else None
                if other:
                    end, = ax.plot(*points.pop(), color=colour, marker="D", ms=6, mfc="none", ls="none")
                    ends[other[0]] = end
                    name += f", on {other[1]:,} tokens" * (y is None)
                curve, = ax.plot(*zip(*points), color=colour, ls=["-", "--", ":"][i // len(COLOURS) % 3],
                                 lw=1.6, marker="o" if few else None, ms=3.5)
                curves.append((curve, name))
    curves += [(end, f"validation at the end, on {tokens:,} tokens") for tokens, end in ends.items()]
    if not curves:
        raise UserError(f"no run has both {x} and {y or 'loss'} in its log; it has "
                        f"{', '.join(logs[0][1][0]) if logs[0][1] else 'no steps'}")
    loss = y in (None, "loss", "val_loss")
    ax.set(xlabel=LABELS[x], ylabel=LABELS[y] + f" ({unit(configs)})" * loss,
           title=f"{names[0]}: loss" if not y else f"{LABELS[y]} of {of}" if y in NORMS else "")
    ax.set_yscale("log" if y in ("dW", "dy", "gauge") else "linear")
    ax.grid(alpha=0.25)
    add_legend(fig, *zip(*curves))
    return fig


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="directories of runs, or their log.jsonl")
    parser.add_argument("-o", "--out", default="fig.png", help="picture to write: .png, .pdf, .svg (fig.png)")
    parser.add_argument("--x", choices=["step", "tokens", "flops", "seconds"], default="step")
    parser.add_argument("--y", choices=["val_loss", "loss", *NORMS, "rank"], default="val_loss")
    args = parser.parse_args(argv)
    if own_name(args.out, what="a picture to write").suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {args.out}: expected a name that ends in .png, .pdf or .svg")
    figure(args.runs, args.out, args.x, args.y)
    print(args.out)


if __name__ == "__main__":
    main()
