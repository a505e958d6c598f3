"""The numbers of docs/SCALING.md and of the geometry page are those of the committed tables and values."""

import math
import re
import statistics

from conftest import ROOT
from paper import geometry, logs
from paper.runs import scale_of, steps_of
from test_numbers import hold

MINUS = "−"


def rows(path: str) -> list[list[str]]:
    """The cells of every row of every table of a page."""
    lines = (ROOT / path).read_text("utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def tuned_on(run: str) -> float:
    """The loss of seed 0 on the half of the validation text that tunes."""
    return logs.get(ROOT / "results/runs/tuned-200.jsonl", f"{run}-seed0").steps[-1]["halves"][0]


def after_800(run: str) -> float:
    return logs.get(ROOT / "results/runs/nano-800x4096.jsonl", f"{run}-seed0").final_loss


def test_scaling_says_what_its_tables_say():
    table = rows("results/isoflop/table.md")
    optima = [row for row in table if len(row) == 8 and row[3].endswith("k")]  # low-rank, then dense
    gaps = [row for row in table if len(row) == 3 and " to " in row[2]]
    low_optima, dense_optima = optima[:len(gaps)], optima[len(gaps):]
    exponents = {by: [row for row in table if row[0] == by] for by in ("parabolas", "parametric law")}
    all_003, all_0003 = ([row[1:] for row in table if row[0] == f"{x} for all"][0] for x in ("0.03", "0.003"))
    swept = [[float(x) if x else math.inf for x in row[3:]] for row in table if "nano-2x" in row[2][:7]
             and len(row) == 9]
    best, grid = [row.index(min(row)) for row in swept], ("0.001", "0.003", "0.01", "0.03", "0.1", "0.3")
    assert len(swept) == 56 and statistics.mode(best) == 3
    page = (ROOT / "results/isoflop/table.md").read_text("utf-8")
    differences = re.search(r"minus dense: (.*) \((.*)\) by parabolas, (.*) \((.*)\) by the parametric", page)
    passages = []
    for low, dense, (budget, gap, interval) in zip(low_optima, dense_optima, gaps):
        sizes = (f"{float(row[3][:-1].replace(',', '')):.0f}k" for row in (low, dense))
        cells = [f"{float(budget):.1e}".replace("e+", "e"), *sizes, f"{gap} ({interval})".replace("-", MINUS)]
        passages.append((f"| {' | '.join(cells)} |",))
    values = [-float(gap) for _, gap, _ in gaps]
    passages += [
        ("by {:.2f} to {:.2f} nats per byte", min(values), max(values)),
        ("Low-rank minus dense is {} ({}) by parabolas and {} ({}) by the law",
         *(x.replace("-", MINUS) for x in differences.groups())),
        ("(an interval reaches {})", exponents["parametric law"][0][2].split(" to ")[1]),
        ("in {} of {} pairs (one seed)", *re.search(r"loss in (\d+) of (\d+) pairs \(seed 0", page).groups()),
        ("dense has {} steps, Spectron {}",
         *(steps_of(name, scale_of("nano")) for name in ("dense-flops", "spectron"))),
        ("the exponents are {:.2f} and {:.2f}, near the paper's, and the gap is {:.2f} to {:.2f}",
         *map(float, all_0003[:2]), *extremes(all_0003[2:])),
        ("values are {} to {}, mostly 0.03", grid[min(best)], grid[max(best)]),
        ("by up to {:.2f} nats", max(row[1] - min(row) for row in swept)),
        ("After 200 steps of nano that instead of 0.7 costs Spectron {:.3f}, dense {:.3f} (seed 0), and "
         "after 800 Spectron {:.3f}.",
         tuned_on("spectron-adam0.1-momentum0.9-lr0.1") - tuned_on("spectron-adam0.1-lr0.1"),
         tuned_on("dense-momentum0.9-lr0.05") - tuned_on("dense-lr0.05"),
         after_800("spectron-momentum0.9-lr0.05") - after_800("spectron-lr0.1"))]
    for kind, *found in zip(("low-rank, Spectron", "dense, Muon"), *exponents.values()):
        passages.append((f"| {kind} | {' | '.join(f'{row[1]} ({row[2]})' for row in found)} |",))
        assert all(float(row[1]) < 0.5 for row in found)
    spread = next(row for row in rows("results/parametric/table.md") if row[0] == "0.01")
    hold("docs/SCALING.md", passages + [
        ("Their standard deviation is {} to {} nats (low-rank) and {} to {} (dense)",
         *(x for found in (low_optima, dense_optima) for x in span(row[7] for row in found))),
        ("the gap is {:.2f} to {:.2f}. - **Momentum", *extremes(all_003[2:])),
        ("another {} to {} for Spectron and {} to {} for Muon",
         *(x for found in (low_optima, dense_optima) for x in span(row[6] for row in found))),
        ("deviation of {} by parabolas and {} by the law", *(x.split(" ± ")[1] for x in spread[1:]))],
        ("0.479, 0.455", "With nano's 0.003", "So 0.479 and Chinchilla's 0.49 cannot", "95% intervals",
         "rank ratio 0.25", "0.037 (Spectron) or 0.0145 (Muon)", "tried at `adam_lr` 0.003, are better",
         "by 0.010 nats at most", "is 0.003, 0.01 and 0.03 at", "it is 0.003, 0.03 and 0.1.",
         "With 0.03 for all", "it is 0.9 for both.", "noise 0.01 nats"))


def span(values) -> tuple:
    """The lowest and the highest, as they are written."""
    values = sorted(values, key=lambda x: float(x.strip("%")))
    return values[0], values[-1]


def extremes(gaps: list[str]) -> tuple[float, float]:
    return min(-float(x) for x in gaps), max(-float(x) for x in gaps)


def test_the_geometry_page_says_what_was_measured():
    last = {}
    for seed in logs.read(ROOT / "results/geometry/values.jsonl").values():
        last.setdefault(seed[0]["method"], []).append(seed[-1])

    def mean(method, key):
        return statistics.mean(seed[key] for seed in last[method])

    def means(key, *methods):
        return [mean(method, key) for method in methods]

    others = set(last) - {geometry.FULL, "galore", "fira"}
    between = geometry.read_json(ROOT / "results/geometry/basins.json")
    layers = [seed["by_layer"]["relative_distance"] for seed in last["spectron"]]
    depth = [statistics.mean(layer[i] for layer in layers) for i in (0, 1)]
    hold("results/geometry/README.md", [
        ("dense {:.4f}, factors {:.4f}; scaled", *means("random_sharpness", "dense-adamw", "adamw")),
        ("dense {:.4f}, Spectron {:.4f} |", *means("random_sharpness", "dense", "spectron")),
        ("dense {:.4f} and GaLore {:.4f} cannot be told apart; Spectron has {:.4f}",
         *means("pca1_sharpness", "dense-adamw", "galore", "spectron")),
        ("rises by {:.2f} or more between any two but SCT and TSVD-style ({:.2f})",
         *sorted(between.values())[1::-1]),
        ("in block 1, from {:.2f} to {:.2f}", *depth),
        ("relative distances {:.2f} and {:.2f}", *means("relative_distance", "galore", "fira")),
        ("cosines {:.2f} and {:.2f}", *means("cosine", "galore", "fira")),
        ("Next are {:.2f} and {:.2f}", min(mean(m, "relative_distance") for m in others),
         max(mean(m, "cosine") for m in others)),
        ("dW is {:.0f} with factors and {:.0f} dense, under AdamW {:.0f} and {:.0f}",
         *means("dW_stable_rank", "spectron", "dense", "adamw", "dense-adamw"))],
        ("arXiv 2605.13652", "within 0.03 nats"))
    falls = [[statistics.mean(seed["by_layer"]["cka"][i] for seed in seeds) for i in range(5)]
             for method, seeds in last.items() if method != geometry.FULL]
    assert all(a > b for cka in falls for a, b in zip(cka, cka[1:]))
