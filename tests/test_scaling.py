"""The arithmetic of the scaling laws against surfaces whose law is known, and against published fits."""

import csv
import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from paper import isoflop, logs, runs, scaling
from paper.laws import (Law, Points, bootstrap, design, fit_law, interval, power_law, profiles, simulate,
                        without_each)

TRUE = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)  # Chinchilla's, as printed by Hoffmann et al.
BUDGETS = [10.0**e for e in range(17, 22)]


def optimum(law: Law, C: float) -> tuple[float, float]:
    """(N, D) of the lowest loss with 6 N D = C."""
    G = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    return G * (C / 6) ** law.exponent, (C / 6) ** (1 - law.exponent) / G


def around_the_optimum(law, width, count=15, centre=1.0):
    """Runs without noise at each budget, sizes from 1 / width to width times the best one."""
    grid = centre * np.exp(np.linspace(-np.log(width), np.log(width), count))
    return design(BUDGETS, [optimum(law, C)[0] * grid for C in BUDGETS], law)


@pytest.mark.parametrize("width,off", [(2, -0.327), (4, -1.301), (8, -2.903), (16, -5.100)])
def test_the_bias_of_the_parabolas_on_chinchillas_surface(width, off):
    """Of D_opt at 1e24 FLOPs, in percent; the exponent is exact (Czech et al. 2026, re-derived)."""
    found = profiles(around_the_optimum(TRUE, width), BUDGETS)
    exponent, factor = power_law(BUDGETS, [C / 6 / p.N for C, p in zip(BUDGETS, found)])
    assert all(p.inside for p in found)
    assert exponent == pytest.approx(TRUE.alpha / (TRUE.alpha + TRUE.beta), abs=1e-9)
    assert 100 * (factor * 1e24**exponent / optimum(TRUE, 1e24)[1] - 1) == pytest.approx(off, abs=5e-4)


@pytest.mark.parametrize("law", [TRUE, Law(1.0, 30.0, 900.0, 0.25, 0.45), Law(0.3, 2000.0, 50.0, 0.6, 0.2)])
def test_points_of_a_known_surface_give_back_its_law(law):
    found = fit_law(around_the_optimum(law, 8))
    assert [found.E, found.A, found.B, found.alpha, found.beta] == pytest.approx(
        [law.E, law.A, law.B, law.alpha, law.beta], rel=1e-6)
    assert not found.at_bounds()


def test_the_optimum_is_one():
    """Nothing on the line 6 N D = C is lower."""
    N, D = optimum(TRUE, 1e20)
    assert 6 * N * D == pytest.approx(1e20)
    assert all(TRUE(N, D) < TRUE(N * x, D / x) for x in (0.9, 0.99, 1.01, 1.1))


def test_a_minimum_outside_its_grid_is_said_and_left_out():
    low = design(BUDGETS[:1], [optimum(TRUE, BUDGETS[0])[0] * np.geomspace(20, 90, 7)], TRUE)
    rest = around_the_optimum(TRUE, 4)
    kept = rest[rest.C > BUDGETS[0]]
    both = Points(*(np.concatenate(pair) for pair in zip(
        (low.N, low.D, low.C, low.L), (kept.N, kept.D, kept.C, kept.L))))
    found = profiles(both, BUDGETS)
    assert [p.inside for p in found] == [False, True, True, True, True]


def test_a_term_that_is_not_there_ends_at_a_bound():
    """Without an irreducible loss E falls to the edge of the search."""
    assert "E" in fit_law(around_the_optimum(Law(1e-9, 406.4, 410.7, 0.34, 0.28), 8), steps=400).at_bounds()


def test_the_bootstrap_holds_the_truth_and_knows_the_noise():
    clean, generator = around_the_optimum(TRUE, 4, 9), np.random.default_rng(0)
    noisy = Points(clean.N, clean.D, clean.C, clean.L + 0.01 * generator.standard_normal(len(clean)))
    second, third = bootstrap(noisy, BUDGETS, 200)
    for values in second, [law.exponent for law in third]:
        low, high = interval(values)
        assert low < TRUE.exponent < high and 0.005 < high - low < 0.3
    assert len(without_each(noisy, BUDGETS)) == 5
    assert all(abs(a - TRUE.exponent) < 0.1 and abs(b - TRUE.exponent) < 0.1
               for _, a, b in without_each(noisy, BUDGETS))


def test_the_papers_design_cannot_tell_its_exponent_from_chinchillas():
    """With 0.01 nats of noise one standard error is as large as what lies between 0.479 and 0.49."""
    spread = np.nanstd(simulate(isoflop.papers_design(), isoflop.PAPER_BUDGETS, 0.01, 100), 0)
    assert (spread > 0.011).all() and (spread < 0.02).all()


def test_the_plan_holds_the_budget(monkeypatch, tmp_path):
    """The 46 runs that the public code lists; a nano plan needs no log."""
    monkeypatch.chdir(tmp_path)
    lines = isoflop.plan("S", "spectron", 1e15).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "M |" in line]
    assert len(rows) == 46 and "46 runs" in lines[-1]
    for budget, size, N, tokens, *_ in rows:
        each = isoflop.cost(isoflop.config_of(size))["flops"]
        spent = float(tokens.rstrip("M").replace(",", "")) * 1e6 * each
        assert spent == pytest.approx(float(budget), rel=0.01)
    lines = isoflop.plan("nano", "dense", 1e10).splitlines()
    assert sum("| nano-2x" in line for line in lines) == sum(
        len(isoflop.sizes("dense", budget)) for budget in isoflop.BUDGETS) == 28


def test_the_steps_are_those_of_the_public_code(monkeypatch, tmp_path):
    """Of its smallest, its largest and S; it counts 6 N D, and rounds the two middle budgets elsewhere."""
    monkeypatch.chdir(tmp_path)
    theirs = {"60M": (7368, 18654, 47222), "134M": (3736, 9459, 23944, 60624), "2.7B": (234, 592, 1499, 3795)}
    lines = [line.split("|") for line in isoflop.plan("S", "spectron", 1e15, "total", "6nd").splitlines()]
    for size, steps in theirs.items():
        ours = [int(line[5].replace(",", "")) for line in lines if len(line) > 5 and line[2].strip() == size]
        assert ours == pytest.approx(steps, rel=2e-4, abs=1)


def test_no_run_of_the_ladder_is_missing(in_a_copy):
    wanted = {run.name for budget in isoflop.BUDGETS for run in isoflop.wanted(budget)}
    assert wanted <= set(logs.read(runs.pack_of(isoflop.LADDER)))


def a_row(size, budget, adam_lr, loss, seed=0, kind="spectron"):
    steps = runs.steps_of(isoflop.run(kind, size, budget).method, isoflop.LADDER)
    return {"kind": kind, "size": size, "budget": budget, "lr": isoflop.lr_of(kind, steps), "seed": seed,
            "adam_lr": adam_lr, "steps": steps, "loss": loss, "total": isoflop.SIZES[size].dim * 1000}


def test_the_sweep_goes_on_at_an_edge_that_is_best():
    size, budget = isoflop.sizes("spectron", isoflop.SWEPT[0])[0], isoflop.SWEPT[0]
    for losses, wanted in ((2, 1, 2), []), ((1, 2, 3), [1e-3]), ((3, 2, 1), [1e-1]), ((3, 1, None), []):
        rows = [a_row(size, budget, x, loss) for x, loss in zip(isoflop.FIRST, losses)]
        assert set(isoflop.adam_lrs(rows, size, budget)) - set(isoflop.FIRST) == set(wanted)
    assert isoflop.adam_lrs(rows[:2], size, budget) == [*isoflop.FIRST]
    falling = [a_row(size, budget, x, -i) for i, x in enumerate(isoflop.GRID[1:5])]
    assert isoflop.adam_lrs(falling, size, budget) == [*isoflop.GRID[1:]]
    assert isoflop.adam_lrs(rows, size, isoflop.BUDGETS[-1]) == [*isoflop.THREE]


def test_what_is_fitted_is_at_the_chosen_adam_lr():
    """Of all seeds: at what was best with seed 0, or at one for all."""
    small, large, size = isoflop.BUDGETS[0], isoflop.BUDGETS[-1], "nano-2x32"
    rows = [a_row(size, budget, x, loss + seed * x, seed) for budget in (small, large) for seed in (0, 1)
            for x, loss in zip(isoflop.THREE, (2.0, 1.8, 1.9 - (budget == large)))]
    for adam_lr, expected in (None, (3e-2, 1e-1)), (3e-2, (3e-2, 3e-2)), (3e-3, (3e-3, 3e-3)):
        assert [r["adam_lr"] for r in isoflop.kept(rows, adam_lr)] == [expected[0]] * 2 + [expected[1]] * 2
    pairs = [a_row(size, C, 3e-3, loss) for C in isoflop.SWEPT for loss in (1, 1 + C / 1e12)]
    assert isoflop.noise(pairs)[:2] == pytest.approx([0.15 / 2**0.5, 0.47 / 2**0.5])


def test_the_study_makes_itself_from_nothing_smaller_budgets_first(monkeypatch, tmp_path):
    """With losses of a known surface: the sweep, and three seeds of three sizes at each budget."""
    monkeypatch.chdir(tmp_path)
    made, draw = [], np.random.default_rng(0)

    def train_all(missing, scale):
        for run in missing:
            method, kind = isoflop.METHODS[run.method], run.method.split("-")[0]
            cost = isoflop.cost(isoflop.config_of(method.size, kind))
            steps, adam_lr = runs.steps_of(run.method, scale), float(method.flags.split()[-1])
            loss = TRUE(cost["total"] * 100, steps * 2e5) / 2 + 0.02 * np.log(
                adam_lr / 2e-2 * (isoflop.SIZES[method.size].dim / 30))**2 + 0.003 * draw.normal()
            config = {"size": method.size, "lr": run.lr, "adam_lr": adam_lr, "seed": run.seed, "steps": steps,
                      "model": {"vocab_size": 320}}
            logs.add(runs.pack_of(scale), run.name, [{"config": config}, {
                "step": steps, "tokens": 512 * steps, "flops": steps * 512 * cost["flops"], "val_loss": loss,
                "seconds": 1.0}])
            made.append((method.budget, kind, method.size, adam_lr, run.seed))
    monkeypatch.setattr(runs, "make_all", train_all)
    isoflop.make()
    assert [budget for budget, *_ in made] == sorted(budget for budget, *_ in made)
    for kind in isoflop.KINDS:
        rows = isoflop.rows_of(kind)
        for budget in isoflop.BUDGETS:
            seeds = [r["size"] for r in isoflop.kept(rows) if r["budget"] == budget and r["seed"] == 2]
            assert len(seeds) == 3 or budget == isoflop.SEEDED and len(seeds) > 3
        last = isoflop.BUDGETS[3]
        swept = {(size, x) for budget, other, size, x, _ in made if (budget, other) == (last, kind)}
        assert swept == {(size, x) for size in isoflop.sizes(kind, last) for x in isoflop.THREE}
    assert "0 runs are to be made" in isoflop.missing() and " 1 runs" not in isoflop.missing()


def test_the_optimizers_products_are_counted():
    """At nano 9% of what is executed for Spectron and 24% for dense Muon."""
    for kind, share in ("spectron", 0.09), ("dense", 0.24):
        cost = isoflop.cost(isoflop.config_of("nano", kind))
        assert round(cost["optimizer"] / (4096 * cost["flops"]), 2) == share


@pytest.mark.parametrize("kind", isoflop.KINDS)
def test_each_budget_has_six_sizes_or_more_and_two_beside_its_best(in_a_copy, kind):
    """Or else it reaches to the end of the sizes that there are."""
    smallest = min(isoflop.sizes(kind, isoflop.BUDGETS[0]), key=lambda size: isoflop.SIZES[size].dim)
    for budget in isoflop.BUDGETS:
        sizes = isoflop.sizes(kind, budget)
        kept = [r for r in isoflop.kept(isoflop.rows_of(kind)) if r["budget"] == budget and r["seed"] == 0]
        best = sizes.index(min(kept, key=lambda r: r["loss"])["size"])
        assert len(sizes) >= 6 and best < len(sizes) - 2 and (best >= 2 or sizes[0] == smallest)


def test_the_public_chinchilla_points_give_the_published_fit():
    """Needs data/svg_extracted_data.csv of epoch-research/analyzing-chinchilla, which has no licence."""
    path = os.environ.get("CHINCHILLA_CSV", ROOT / "data/svg_extracted_data.csv")
    if not os.path.isfile(path):
        pytest.skip("CHINCHILLA_CSV does not name the 245 points; they have no licence, so they are not here")
    with open(path, "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest().startswith("193478df4e90f040")
    with open(path, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    N, C, L = (np.array([float(row[key]) for row in rows]) for key in ("Model Size", "Training FLOP", "loss"))
    kept = np.argsort(L)[:-5]  # the five largest are left out, as by those who published the fit
    law = fit_law(Points(N, C / (6 * N), C, L)[kept])
    assert law.huber <= 0.0010183
    assert [law.alpha, law.beta] == pytest.approx([0.34731, 0.36718], abs=2e-3)
    assert law.E == pytest.approx(1.81724, abs=1e-3)


def test_a_run_of_the_ladder_has_the_steps_that_its_budget_pays_for():
    """As paper.runs counts them from the flags of train.py."""
    for kind, size in ("spectron", "nano-2x48"), ("dense", "nano-2x128"):
        made = isoflop.run(kind, size, isoflop.BUDGETS[2])
        steps = runs.steps_of(made.method, isoflop.LADDER)
        assert made.lr == isoflop.lr_of(kind, steps)
        spent = steps * isoflop.LADDER.tokens_per_step * isoflop.cost(isoflop.config_of(size, kind))["flops"]
        assert spent == pytest.approx(isoflop.BUDGETS[2], rel=0.01)


@pytest.mark.parametrize("kind,low,high", [("spectron", 0.12, 0.31), ("dense", 0.10, 0.21)])
def test_what_6_n_d_leaves_out_of_the_ladders_models_is_what_the_docs_say(in_a_copy, kind, low, high):
    """The embedding is a look-up and no product, so that it does not count."""
    shares = []
    for size in {row["size"] for row in isoflop.rows_of(kind)}:
        config = isoflop.config_of(size, kind)
        cost = isoflop.cost(config)
        shares.append(1 - 6 * (cost["total"] - config.vocab_size * config.dim) / cost["flops"])
    assert (round(min(shares), 2), round(max(shares), 2)) == (low, high)


@pytest.fixture
def no_run(monkeypatch):
    """A command without --make draws from the logs that are there, complete or not."""
    monkeypatch.setattr(runs, "make_all", lambda *_: pytest.fail("it trains"))


def test_committed_laws_are_what_the_committed_logs_say(in_a_copy, no_run):
    """Word by word and number by number, which may differ by what another machine's rounding does; and to the
    eye the figures are the same, so that they are left alone."""
    number = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
    for name in scaling.PARTS:
        shutil.copytree(ROOT / "results" / name, Path("results") / name)
        scaling.main([name])
        for path in (ROOT / "results" / name).iterdir():
            if path.suffix == ".png":
                assert Path("results", name, path.name).read_bytes() == path.read_bytes(), path
                continue
            made, committed = Path("results", name, path.name).read_text("utf-8"), path.read_text("utf-8")
            assert number.sub("#", made) == number.sub("#", committed), f"python -m paper.scaling {name}"
            values = [[float(x.replace(",", "")) for x in number.findall(text)] for text in (made, committed)]
            assert values[0] == pytest.approx(values[1], rel=0.02, abs=2e-3), path


def test_runs_are_counted_and_planned_in_the_papers_way_too(monkeypatch, capsys, tmp_path):
    """6 N D at a budget gives the tokens of N; without embedding and head N is smaller, D larger."""
    monkeypatch.chdir(tmp_path)
    tokens = {}
    for count in "total", "blocks":
        line = next(x for x in isoflop.plan("S", "dense", 1e15, count, "6nd").splitlines() if "| 134M" in x)
        _, _, N, D, *_ = [cell.strip(" M").replace(",", "") for cell in line.split("|")[1:-1]]
        assert 6 * float(N) * float(D) * 1e12 == pytest.approx(2.2e18, rel=0.01)
        tokens[count] = float(D)
    assert tokens["blocks"] > 1.5 * tokens["total"]


def test_another_count_is_printed_and_written_nowhere(in_a_copy, no_run, capsys):
    scaling.main(["parametric", "--count", "blocks", "--flops", "6nd"])
    assert "N blocks" in capsys.readouterr().out
    assert not os.path.exists("results/parametric")
