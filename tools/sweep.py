"""Learning rates at nano: every corner of the ablation, and the baselines, over a grid wide enough that the
best is inside.

    python -m tools.sweep             run what is missing (one run per core, one thread each), then the table
    python -m tools.sweep --table     only the table, from the logs in results/nano

A run is train.py as a user calls it. Its log goes to results/nano/<arm>-<lr>.jsonl; a run whose log is there
is not made again, so a sweep that was stopped goes on. The best lr of a grid's edge asks for a wider grid,
and the table says so.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt

import cli
from plot import COLOURS, read_log

RESULTS, STEPS = Path("results/nano"), 300
SHOWN = {"both": "Spectron", "orthogonalize": "orthogonalize only (Muon on the factors)",
         "renormalize": "renormalize only", "neither": "neither (SGD)", "adamw": "AdamW on the factors",
         "dense": "dense, Muon", "dense-adamw": "dense, AdamW"}
CLOSE, SEEDS = ("both", "orthogonalize"), (0, 1, 2)  # so near each other that a seed could turn them
TOP = 2.4  # nats: the figure ends here
ARMS = {  # name -> (flags, learning rates)
    "both": ([], [0.0125, 0.025, 0.05, 0.1, 0.2, 0.4]),
    "orthogonalize": (["--no-renormalize"], [0.005, 0.01, 0.02, 0.04, 0.08]),
    "renormalize": (["--no-orthogonalize"], [0.0125, 0.025, 0.05, 0.1, 0.2, 0.4]),
    "neither": (["--no-orthogonalize", "--no-renormalize"], [0.1, 0.3, 1, 3, 10]),
    "adamw": (["--method", "adamw"], [3e-4, 1e-3, 2e-3, 3e-3, 1e-2]),
    "dense": (["--method", "dense"], [0.005, 0.01, 0.02, 0.04, 0.08]),
    "dense-adamw": (["--method", "dense-adamw"], [3e-4, 1e-3, 3e-3, 1e-2]),
    "momentum-0.95": (["--momentum", "0.95"], [0.05, 0.1, 0.2]),
    "no-nesterov": (["--no-nesterov"], [0.05, 0.1, 0.2]),
    "rank-0.125": (["--rank_ratio", "0.125"], [0.1]),
    "rank-0.4": (["--rank_ratio", "0.4"], [0.1]),
}


def log_of(arm: str, lr: float, seed: int = 0) -> Path:
    return RESULTS / (f"{arm}-{lr:g}" + (f"-seed{seed}" if seed else "") + ".jsonl")


def run(arm: str, lr: float, seed: int = 0) -> None:
    """One run, unless its log is there; a diverged run keeps the log it has, and its message."""
    log = log_of(arm, lr, seed)
    if log.exists():
        return
    out = Path("out/sweep") / log.stem
    flags = [*ARMS[arm][0], "--lr", f"{lr:g}", "--seed", str(seed), "--steps", str(STEPS), "--overwrite",
             "--eval_every", str(STEPS // 3), "--save_every", str(STEPS), "--out", str(out)]
    done = subprocess.run([sys.executable, "train.py", *flags], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode and "non-finite" not in done.stderr:
        raise RuntimeError(f"train.py {' '.join(flags)}\n{done.stderr}")
    text = (out / "log.jsonl").read_text()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(text + (json.dumps({"diverged": done.stderr.strip()}) + "\n" if done.returncode else ""))
    print(f"{arm} lr {lr:g} seed {seed}: {final_loss(log) or 'diverged'}", flush=True)


def final_loss(log: Path) -> float | None:
    """The validation loss after the last step, or None for a run that did not get there."""
    header, records = read_log(log)
    last = records[-1] if records else {}
    return last["val_loss"] if last.get("step") == header["config"]["steps"] else None


def grid(arm: str) -> dict[float, float | None]:
    """The learning rates that were run, and what each came to."""
    return {lr: final_loss(log_of(arm, lr)) for lr in ARMS[arm][1] if log_of(arm, lr).exists()}


def best(arm: str) -> float:
    losses = {lr: loss for lr, loss in grid(arm).items() if loss is not None}
    return min(losses, key=losses.get)


def table() -> str:
    """Each arm at each learning rate, and at its best with the seeds that were run, as Markdown."""
    rows = [f"Validation loss (nats per byte) of nano after {STEPS} steps of 4,096 tokens (tools/sweep.py).\n"
            "Mean and standard deviation over the seeds at the best lr; the grid is seed 0.\n",
            "| arm | best lr | seeds | loss at best | every lr: loss |", "|---|---|---|---|---|"]
    for arm in ARMS:
        losses, lr = grid(arm), best(arm)
        seeds = [final_loss(log_of(arm, lr, seed)) for seed in SEEDS if log_of(arm, lr, seed).exists()]
        spread = f" ± {statistics.stdev(seeds):.3f}" if len(seeds) > 1 else ""
        edge = " (edge of the grid)" if len(losses) > 1 and lr in (min(losses), max(losses)) else ""
        every = ", ".join(f"{x:g}: " + ("diverged" if y is None else f"{y:.3f}") for x, y in losses.items())
        mean = f"{statistics.mean(seeds):.3f}{spread}"
        rows.append(f"| {arm} | {lr:g}{edge} | {len(seeds)} | {mean} | {every} |")
    return "\n".join(rows) + "\n"


def figure(path: Path) -> None:
    """Loss after the last step over the learning rate, a line for each arm; diverged runs at the top."""
    plt.switch_backend("Agg")  # files only: no window, no screen
    fig, ax = plt.subplots(figsize=(9, 4.3), layout="constrained")
    for i, arm in enumerate(SHOWN):
        losses = [(lr, min(loss or TOP, TOP)) for lr, loss in grid(arm).items()]
        ax.plot(*zip(*losses), "osD^vPX"[i] + "-", color=COLOURS[i], label=SHOWN[arm], ms=5)
    ax.axhline(TOP, color="0.6", lw=0.8, ls=":")
    ax.set(xscale="log", xlabel="learning rate of the block matrices", ylim=(None, TOP + 0.05),
           ylabel=f"validation loss after {STEPS} steps (nats per byte)")
    ax.text(0.01, TOP - 0.01, f"{TOP} and above, or diverged", transform=ax.get_yaxis_transform(), va="top",
            fontsize=8, color="0.4")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    fig.savefig(path, dpi=150)


@cli.command
def main(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("--table", action="store_true", help="only make the table")
    args = parser.parse_args(argv)
    if not args.table:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: run(*job), [(arm, lr) for arm, (_, lrs) in ARMS.items() for lr in lrs]))
            list(pool.map(lambda job: run(*job), [(arm, best(arm), seed) for arm in CLOSE for seed in SEEDS]))
    text = table()
    (RESULTS / "table.md").write_text(text)
    figure(RESULTS / "lr.png")
    print(text)


if __name__ == "__main__":
    main()
