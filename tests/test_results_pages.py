"""The numbers of docs/SCALING.md and of the geometry page are those of the committed tables and values."""

import statistics

from conftest import ROOT
from paper import geometry, logs
from test_numbers import hold

MINUS = "−"


def rows(path: str) -> list[list[str]]:
    """The cells of every row of every table of a page."""
    lines = (ROOT / path).read_text("utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_scaling_says_what_its_tables_say():
    table = rows("results/isoflop/table.md")
    optima = [row for row in table if len(row) == 8 and row[3].endswith("k")]  # low-rank, then dense
    gaps = [row for row in table if len(row) == 3 and " to " in row[2]]
    exponents = {by: [row for row in table if row[0] == by] for by in ("parabolas", "parametric law")}
    passages = []
    for low, dense, (budget, gap, interval) in zip(optima, optima[len(gaps):], gaps):
        sizes = (f"{float(row[3][:-1].replace(',', '')):.0f}k" for row in (low, dense))
        cells = [f"{float(budget):.1e}".replace("e+", "e"), *sizes, f"{gap} ({interval})".replace("-", MINUS)]
        passages.append((f"| {' | '.join(cells)} |",))
    for kind, *found in zip(("low-rank, Spectron", "dense, Muon"), *exponents.values()):
        passages.append((f"| {kind} | {' | '.join(f'{row[1]} ({row[2]})' for row in found)} |",))
    values = [-float(gap) for _, gap, _ in gaps]
    noise = [row[7] for row in optima[::len(gaps)]]
    spread = next(row for row in rows("results/parametric/table.md") if row[0] == "0.01")
    hold("docs/SCALING.md", passages + [
        ("by {:.2f} to {:.2f} nats per byte", min(values), max(values)),
        ("a standard deviation of {} (low-rank) and {} (dense)", *noise),
        ("deviation of {} by parabolas and {} by the law", *(x.split(" ± ")[1] for x in spread[1:]))],
        ("0.479, 0.455", "0.479 is inside three of the four", "So 0.479 and Chinchilla's 0.49 cannot",
         "95% intervals", "Three seeds at 1.5e11 FLOPs",
         "ask for 0.3M dense and 0.4M low-rank, where nano has 3.6M and 2.0M", "momentum 0.9, not of nano's",
         "0.7: only", "rank ratio 0.25", "0.037 (Spectron) or 0.0145 (Muon)", "better by 0.010 nats at most",
         "improve by 0.06 to 0.19 nats", f"(about {MINUS}0.05 and {MINUS}0.17)",
         "it is 0.9 for both, and at nano 0.7",
         "another 2% to 73% for Spectron and 4% to 110% for Muon", "by 0.01 at most",
         "noise 0.01 nats"))


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
