"""Every number of the README and the docs, computed again from the logs and the code.

A passage is a piece of a page with {} in place of its numbers. With the numbers filled in it has to stand in
the page, word for word, and every decimal and percentage of a page has to stand in a passage, or among the
numbers that no log of ours decides: constants of the method, and what other people report.
"""

import json
import math
import re
import statistics
from dataclasses import replace
from functools import cache

import pytest
import torch

from conftest import ROOT
from lib.methods import count_parameters, flops_per_token
from model import SIZES, Llama, LlamaConfig
from paper import bench, draw, logs, scaling, tuned
from paper.experiments import outcome, outcomes_of
from paper.isoflop import KINDS, gaps, noise
from paper.logs import Log
from paper.runs import scale_of
from tools.plot import read_log

NANO = scale_of("nano")
IMDB = scale_of("nano", data="data/imdb-bytes", lrs=3)
MINUS = "−"  # the pages' own sign
NUMBER = re.compile(r"\d[\d,]*\.\d+|\d+(?=%)")


@cache
def best(method: str, scale=NANO):
    return outcome(method, scale)


def told(method: str, scale) -> str:
    """How much higher it ends than Spectron; empty where it was not run for so long."""
    return tuned.over(scale, method).replace("-", MINUS)


def of(method: str) -> str:
    """A row's loss: mean and standard deviation of the seeds, three of them."""
    assert len(best(method).losses) == 3
    return str(best(method))


def single(name: str) -> Log:
    return logs.get(ROOT / "results/runs/nano.jsonl", name)


def first_run(seed: int, dtype: str = "float32") -> Log:
    name = "default" if (seed, dtype) == (0, "float32") else f"default-seed{seed}-{dtype}"
    return Log(*read_log(ROOT / f"results/nano/{name}.jsonl"))


def largest(log: Log, key: str) -> float:
    return max(x for _, x in log.points(key))


def saved(what) -> float:
    """How much less a low-rank nano has than a dense one, in percent."""
    return 100 * (1 - what(SIZES["nano"]) / what(replace(SIZES["nano"], rank_ratio=None)))


def isoflop_gaps() -> list[float]:
    """By how much the best dense model is ahead at each budget of FLOPs, in nats."""
    rows, points, budgets = scaling.collected()
    return [-x for x in gaps(points["spectron"], points["dense"], budgets["spectron"],
                             [noise(rows[kind]) for kind in KINDS], times=2)[0]]


def flops(config: LlamaConfig) -> float:
    with torch.device("meta"):
        return flops_per_token(Llama(config))


def seconds(method: str) -> float:
    return json.loads((ROOT / "results/seconds/nano.json").read_text())["seconds"][method]


def on_a_gpu(row: str) -> list[str]:
    """The cells of a row of the GPU's table: batch, tokens/s, MFU, ..., peak memory."""
    text = (ROOT / "results/bench/gpu.md").read_text("utf-8")
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return line.strip("| ").split(" | ")[1:]


ROWS = {"none | Spectron": "spectron", "| `--no-renormalize` | Muon on the factors": "orthogonalize",
        "| `--method equilibrated` | Spectron, [rows made equal first](docs/EQUILIBRATED.md)": "equilibrated",
        "| `--method adamw` | AdamW on the factors": "adamw",
        "| `--method sct` | U diag(s) Vᵀ, AdamW": "sct",
        "| `--method dense` | dense weights, Muon": "dense",
        "| `--method dense-adamw` | dense weights, AdamW": "dense-adamw"}


TUNED = {"Muon on the factors": "orthogonalize", "Spectron, equilibrated": "equilibrated",
         "Muon on the factors, equilibrated": "equilibrated-muon", "AdamW on the factors": "adamw",
         "dense Muon, 1.7 times the FLOPs": "dense", "dense Muon, same FLOPs": "dense-flops"}


def tokens_per_second(row: list[str]) -> int:
    return int(row[1].replace(",", ""))


def readme() -> list[tuple]:
    """(passage, its numbers), in the order of the page."""
    bounded, free = single("spectron-lr0.2-seed0"), single("orthogonalize-adam0.003-lr0.2-seed0")
    seeds = [first_run(seed).final_loss for seed in range(3)]
    ratio = {lr: statistics.median(value for _, value in values)
             for lr, values in draw.step_ratios(outcomes_of("fig2", NANO), NANO).items()}
    with_adam = [o.by_seed[0] for name in ("methods", "settings") for o in outcomes_of(name, NANO)
                 if draw.family(o.method) == "AdamW"]
    gaps = [f"{x:.2f}" for x in isoflop_gaps()]
    compiled, dense = on_a_gpu("S, spectron, compiled"), on_a_gpu("S, dense, compiled")
    return [
        ("At Spectron's learning rate, {:g}, steps without renormalization grow to {:.1f} times that, "
         "and the loss ends at {:.3f} instead of {:.3f}", best("spectron").lr, largest(free, "gauge"),
         free.final_loss, bounded.final_loss),
        ("saves {:.0f}% of the parameters here, {:.0f}% of the FLOPs and {:.0f}% of a step's time",
         saved(count_parameters), saved(flops), 100 * (1 - seconds("spectron") / seconds("dense"))),
        ("peak memory ({}, dense {}, at size S with 16 sequences)", compiled[-1], dense[-1]),
        ("a model of {:.1f}M parameters", count_parameters(SIZES["nano"]) / 1e6),
        ("val_loss: {:.4f}", seeds[0]),
        ("a uniform guess is {:.2f}", math.log(257)),
        ("Seeds 0, 1 and 2 end at {:.3f}, {:.3f} and {:.3f}, and bf16 (the default where hardware has it) "
         "moves seed 0 to {:.3f}", *seeds, first_run(0, "bfloat16").final_loss),
        ("step {}/240 loss {:.4f} val {:.4f} lr {:.2e} gauge {:.4f}", *(first_run(0).steps[-1][key] for key in
         ("step", "loss", "val_loss", "lr", "gauge"))),
        ("at Spectron's: {:.1f} worse", free.final_loss - bounded.final_loss),
        ("train.py --no-orthogonalize {:.2f} worse", best("renormalize").mean - best("spectron").mean),
        ("dense: {:.2f} better, {:.1f} times the FLOPs",
         best("spectron").mean - best("dense").mean, best("dense").flops / best("spectron").flops),
        ("/ eta of one matrix: at most {:.2f} above", largest(first_run(0), "gauge")),
        *((f"{flags} | {{}} | {{:.2g}} |", of(name), best(name).flops / best("spectron").flops)
          for flags, name in ROWS.items()),
        *((f"| {row} | {{}} | {{}} | {{}} |",
           *(told(method, scale) for scale in (tuned.SHORT, tuned.LONG, tuned.LONGER)))
          for row, method in TUNED.items()),
        ("moves {:.1f} times as far (median, one seed) at the best `lr`, {:.1f} at ten times that",
         ratio[best("adamw").lr], ratio[10 * best("adamw").lr]),
        ("end {:.2f} or more above (seed 0)", min(with_adam) - best("spectron").by_seed[0]),
        ("Muon on the factors minus Spectron is {}; where attention starts as [8A, B/8]"
         "(results/norms/table.md), {}",
         tuned.over_spectron_of_shapes("orthogonalize").replace("-", MINUS), tuned.parted("unbalanced")),
        ("leads at equal FLOPs, at [best sizes](docs/SCALING.md): {} to {}",
         *(MINUS + x for x in (min(gaps), max(gaps)))),
        *(("| {:.4g}M | {} | {:.2g} h | {} | {} | {:.0f} GB |", *row) for row in predicted()),
        ("the {:.0f}% of the peak FLOPs that S reached; S compiled was {:.2f} times as fast as dense",
         float(compiled[2].rstrip("%")), tokens_per_second(compiled) / tokens_per_second(dense)),
    ]


def predicted() -> list[tuple]:
    """Parameters, tokens, hours on one GPU and on eight, download and memory of S, M and L."""
    found = []
    for line in bench.predict(0.3, 989e12, 25e9):
        size, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if size in ("S", "M", "L"):
            _, tokens, one, eight, _, memory = cells
            one, eight, memory = (float(cell.split()[0]) for cell in (one, eight, memory))
            shards = math.ceil(10 * float(tokens[:-1]))  # of 100M tokens, 2 bytes each
            eight = f"{60 * eight:.0f} min" if eight < 1 else f"{eight:.2g} h"
            found.append((count_parameters(SIZES[size]) / 1e6, tokens, one, eight,
                          f"{0.2 * shards:.2g} GB", memory))
    return found


def test_s_beside_dense_without_the_optimizers_is_the_gpus_table():
    low, dense = (tokens_per_second(row) / (1 - float(row[3].rstrip("%")) / 100)
                  for row in (on_a_gpu("S, spectron, compiled"), on_a_gpu("S, dense, compiled")))
    text = " ".join((ROOT / "results/bench/README.md").read_text("utf-8").split())
    assert f"without the optimizers S would be {low / dense:.2f} times as fast" in text


PAGES = {"README.md": readme}
# Those that no log of ours decides. 10 to 30 times is the paper's.
CONSTANTS = {"README.md": (
    "abs/2602.12429", "Python 3.10", "1.21 eta for eta ≤ 0.5", "the 95% interval",
    "|200 steps|800 steps|1,600 steps|", "--no-renormalize --lr 0.2", "rank_ratio=0.25", "lr=0.05",
    "0.03 between single runs means nothing", "Differences below 0.05 at this size")}


@pytest.mark.parametrize("page", PAGES)
def test_every_number_of_a_page_is_its_logs(page):
    hold(page, PAGES[page](), CONSTANTS[page])


def hold(page: str, passages: list[tuple], constants: tuple) -> None:
    def plain(text):
        return re.sub(r" ?\| ?", "|", " ".join(text.split()))
    text = rest = plain((ROOT / page).read_text("utf-8"))
    for passage, *numbers in passages:
        said = plain(passage.format(*numbers))
        assert said in text, f"{page} should say: {said}"
        rest = rest.replace(said, " ")
    for constant in constants:
        assert constant in text, f"{page} has no {constant!r} any more"
        rest = rest.replace(constant, " ")
    assert not (left := NUMBER.findall(rest)), f"{page}: no log is named for {left}"
