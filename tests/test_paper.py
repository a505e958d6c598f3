"""paper/: counts against the paper's, the protocol on logs that are made up, a real run that is killed, and
committed tables that are what the committed logs say."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import ROOT
from model import NANO_SIZES, SIZES, count_parameters
from paper import experiments, reproduce, runs
from paper.arms import ARMS
from paper.runs import Run

NANO = runs.scale_of("nano")
DONE = [name for name in experiments.EXPERIMENTS if (ROOT / f"results/{name}/nano/table.json").is_file()]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """store(run, loss) writes a log as of a finished run into an empty directory of results; the loss may be
    a word, and then is the cause for which it diverged."""
    monkeypatch.chdir(tmp_path)

    def write(run, loss, scale=NANO):
        log = runs.log_of(run, scale)
        log.parent.mkdir(parents=True, exist_ok=True)
        header = {"config": {"steps": 200, "model": {"vocab_size": 320}, "eval_tokens": 9}}
        row = {"step": 7, "diverged": loss} if isinstance(loss, str) else {
            "step": 200, "seconds": 20.0, "flops": 1e12, "val_loss": loss, "loss": loss, "lr": run.lr}
        first = {"step": 1, "seconds": 1.0, "flops": 1e10, "loss": 5.0, "val_loss": 5.0, "lr": run.lr}
        log.write_text("".join(json.dumps(record) + "\n" for record in (header, first, row)))
        return log
    return write


# -------------------------------------------------- Counts --------------------------------------------------

def test_tables_4_and_5_are_the_papers_counts():
    table5 = reproduce.counts("table5")
    for row in experiments.PAPER["table5_sizes"]:
        c = replace(SIZES[row["size"]], vocab_size=32000, rank_ratio=0.25)
        low, unit = count_parameters(c), {"M": 1e6, "B": 1e9}[row["lowrank"][-1]]
        assert abs(low / unit - float(row["lowrank"][:-1])) < (0.06 if unit == 1e9 else 1)
        dense = count_parameters(replace(c, rank_ratio=None)) / 1e6
        made = f"| {dense:,.1f}M | {row['size']} | {low / 1e6:,.1f}M | {row['lowrank']} |"
        assert made in table5
    rows = reproduce.counts("table4").splitlines()[6:]
    assert [row.split()[1] for row in rows] == ["134M", "500M", "780M"]


def test_the_ladder_of_nano_is_named_after_its_dense_parameters():
    for name, config in NANO_SIZES.items():
        dense = count_parameters(replace(config, rank_ratio=None))
        assert name in ("nano", f"nano-{dense / 1e6:.1f}M", f"nano-2x{config.dim}")
        assert not name.startswith("nano-2x") or config.n_layers == 2


# ----------------------------------------------- The protocol -----------------------------------------------

def test_every_arm_of_a_comparison_starts_from_as_many_learning_rates():
    for name, e in experiments.EXPERIMENTS.items():
        for scale in NANO, runs.scale_of("S"):
            grids = [runs.lrs_of(arm, scale, e.few) for arm in experiments.arms_of(name, scale)
                     if ARMS[arm].swept]
            assert {len(grid) for grid in grids} == {3 if e.few else scale.lrs}
            assert all(b / a in (2, 2.5) for grid in grids for a, b in zip(grid, grid[1:]))


def test_the_best_lr_is_that_of_seed_0_and_the_mean_is_over_the_seeds(store):
    for lr, loss in (0.05, 1.7), (0.1, 1.5), (0.2, 1.6), (0.5, "non-finite gradient"):
        store(Run("spectron", lr), loss)
    store(Run("spectron", 0.1, 1), 1.6)
    store(Run("spectron", 0.1, 2), 1.7)
    o = experiments.outcome("spectron", NANO)
    assert o.lr == 0.1 and o.losses == [1.5, 1.6, 1.7] and o.grid[0.5] is None
    assert o.mean == pytest.approx(1.6) and o.sd == pytest.approx(0.1) and str(o) == "1.600 ± 0.100"
    assert not runs.next_lr(runs.tried("spectron", NANO)[0])
    store(Run("spectron", 0.1, 1), "gone")
    o = experiments.outcome("spectron", NANO)
    assert o.by_seed == {0: 1.5, 1: None, 2: 1.7} and str(o) == "1.600 ± 0.141, 1 of 3 diverged"


def test_a_loss_above_that_of_knowing_nothing_is_a_divergence(store):
    assert runs.final_loss(store(Run("adamw", 1e-3), math.log(320) - 0.01)) is not None
    assert runs.final_loss(store(Run("adamw", 2e-3), math.log(320) + 0.01)) is None
    assert runs.final_loss(store(Run("adamw", 5e-3), None)) is None
    assert str(experiments.outcome("neither", NANO)) == "not run"
    for lr in 0.5, 1.0, 2.0:
        store(Run("neither", lr), "gone")
    o = experiments.outcome("neither", NANO)
    assert o.lr is None and str(o) == "diverged at every lr" and o.losses == []


def test_a_grid_grows_where_its_best_is_at_the_edge(store):
    assert runs.next_lr({0.05: 1.7, 0.1: 1.6, 0.2: 1.5}) == 0.5
    assert runs.next_lr({0.05: 1.7, 0.1: 1.4, 0.2: 1.5}) is None
    assert runs.next_lr({0.02: 1.4, 0.05: 1.5, 0.1: None}) == runs.next_lr({0.02: None, 0.05: None}) == 0.01


def test_of_few_learning_rates_no_more_are_looked_at_than_of_the_other_arms(store):
    for lr, loss in (0.02, 1.4), (0.05, 1.6), (0.1, 1.5), (0.2, 1.7), (0.5, 1.3):
        store(Run("spectron", lr), loss)
    assert runs.tried("spectron", NANO, few=True) == ({0.05: 1.6, 0.1: 1.5, 0.2: 1.7}, [])
    store(Run("spectron", 0.2), 1.45)
    assert runs.tried("spectron", NANO, few=True) == ({0.05: 1.6, 0.1: 1.5, 0.2: 1.45, 0.5: 1.3}, [1.0])
    store(Run("spectron", 1.0), 1.2)
    found, missing = runs.tried("spectron", NANO, few=True)
    assert runs.best_of(found) == 1.0 and not missing  # at the edge, but a grid grows twice at most
    assert runs.tried("spectron", NANO)[1] == [2.0]  # six of its own, and none outside them yet


def test_sweep_makes_what_is_missing_and_nothing_else(store, monkeypatch):
    made = []

    def make_all(wanted, scale):
        for run in wanted:
            if not runs.log_of(run, scale).is_file():
                made.append(run)
                store(run, 1.5 + abs(math.log(run.lr / ARMS[run.arm].lr / 2.5)) + run.seed / 100)
    monkeypatch.setattr(runs, "make_all", make_all)
    store(Run("adamw", 1e-3), 1.8)
    for few, wanted in (False, [2e-4, 5e-4, 2e-3, 5e-3, 1e-2]), (True, []):
        runs.sweep(["adamw"], NANO, few)
        assert sorted(run.lr for run in made if run.seed == 0) == wanted
        assert [run for run in made if run.seed] == ([] if few else [Run("adamw", 2e-3, k) for k in (1, 2)])
        made.clear()
    runs.sweep(["rank-0.4"], NANO, few=True, single=("rank-0.4",))
    assert sorted(run.lr for run in made) == [0.05, 0.1, 0.2, 0.5]  # 0.2 was at the edge


def test_equal_flops_and_equal_wall_clock_decide_the_steps(store):
    dense, spectron = (runs.flops_per_token(arm, NANO) for arm in ("dense", "spectron"))
    assert runs.steps_of("dense-flops", NANO) == round(200 * spectron / dense) < 130
    with pytest.raises(runs.UserError, match="python -m paper.seconds --scale nano"):
        runs.steps_of("dense-time", NANO)
    Path("results/seconds").mkdir(parents=True)
    Path("results/seconds/nano.json").write_text('{"seconds": {"spectron": 0.5, "dense": 1.0}}')
    assert runs.steps_of("dense-time", NANO) == 100
    assert runs.seconds_per_step("dense-flops", NANO) == 1.0  # trained as dense is
    assert runs.steps_of("spectron", runs.scale_of("S")) == 2556
    assert runs.steps_of("dense-flops", runs.scale_of("S")) == 1786


def test_differences_are_taken_seed_by_seed():
    def outcome(arm, *losses):
        return experiments.Outcome(arm, {}, 0.1, dict(enumerate(losses)), [])
    a, near = outcome("spectron", 1.5, 1.6), outcome("adamw", 1.54, 1.66)
    assert experiments.gap(a, near) == pytest.approx((0.05, 12.7 * 0.01, 2), rel=1e-6)
    assert experiments.gap(outcome("adamw", 2.5), outcome("dense", 1.5)) == (-1.0, None, 1)
    assert experiments.gap(a, outcome("neither")) == (None, None, 0)
    torn = outcome("adamw", 1.7, None, 1.9)  # the seeds that both have
    assert experiments.gap(outcome("spectron", 1.5, 1.6, 1.7), torn) == pytest.approx((0.2, 0, 2), abs=1e-9)
    table = reproduce.differences("table1", [a, near, outcome("self-guided")])
    assert "| AdamW − Spectron | +0.050 | ± 0.127 | 2 |" in table
    assert "| self-guided, AdamW − AdamW |  |  | 0 |" in table


def test_the_width_is_of_the_learning_rates_within_5_percent():
    def width(grid, lr):
        return experiments.Outcome("spectron", grid, lr, {}, []).width
    assert width({0.02: 3.0, 0.05: 1.04, 0.1: 1.0, 0.2: 1.05, 0.5: None}, 0.1) == "4x"
    assert width({0.05: 1.04, 0.1: 1.0}, 0.1) == "≥ 2x" and width({0.1: None}, None) == ""


# --------------------------------------------------- Runs ---------------------------------------------------

def test_thinning_keeps_the_first_the_validated_and_the_last():
    rows = [{"config": {}}, *({"step": i, "loss": 1 / 3, "val_loss": 1.0 if i == 777 else None}
                              for i in range(1, 1001))]
    kept = [json.loads(row) for row in runs.thinned([json.dumps(row) for row in rows])]
    steps = [row["step"] for row in kept[1:]]
    assert kept[0] == {"config": {}} and steps[0] == 1 and steps[-1] == 1000 and 777 in steps
    assert 100 <= len(steps) <= 103 and kept[1]["loss"] == 0.333333


def test_a_run_that_is_killed_goes_on_and_its_log_is_made_once(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "OUT", tmp_path / "out")
    monkeypatch.chdir(ROOT)
    scale = runs.scale_of("nano-0.6M", str(corpus), steps=60, tokens_per_step=256)
    scale = replace(scale, flags=("--seq_len", "32", "--device", "cpu"))
    run, out = Run("spectron", 0.1), tmp_path / "out" / scale.name / "spectron-lr0.1-seed0"
    process = subprocess.Popen(runs.command(run, scale), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out / "ckpt.pt").is_file() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not runs.is_finished(out / "log.jsonl") and "--resume" in runs.command(run, scale)
    runs.make_all([run], scale)
    log = runs.log_of(run, scale)
    assert runs.is_finished(log) and runs.final_loss(log) < 4.8
    assert len({row["step"] for row in runs.read_log(log)[1]}) == len(runs.read_log(log)[1])
    stamp = log.stat().st_mtime_ns
    runs.make_all([run], scale)
    assert log.stat().st_mtime_ns == stamp


def test_sigterm_lets_the_runs_save_and_leaves_none_behind(tmp_path):
    """The same command would otherwise train beside an orphan."""
    script = ("from pathlib import Path\nfrom paper import runs\n"
              f"runs.RESULTS, runs.OUT = Path({str(tmp_path / 'r')!r}), Path({str(tmp_path / 'out')!r})\n"
              "scale = runs.scale_of('nano-0.6M')\nruns.make_all([runs.Run('spectron', 0.1)], scale)\n")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    out = tmp_path / "out/nano-0.6M/spectron-lr0.1-seed0"
    while process.poll() is None and not ((out / "log.jsonl").is_file()
                                          and '"step": 1,' in (out / "log.jsonl").read_text()):
        time.sleep(0.1)
    with pytest.raises(runs.UserError, match="another process"), runs.alone(tmp_path / "out/nano-0.6M"):
        pass
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    assert process.returncode and (out / "ckpt.pt").is_file() and not runs.is_finished(out / "log.jsonl")
    with runs.alone(tmp_path / "out/nano-0.6M"):  # nobody is left
        pass


def test_a_run_that_fails_is_told_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "OUT", tmp_path / "out")
    monkeypatch.chdir(ROOT)
    scale = replace(NANO, flags=("--seq_len", "100"))
    with pytest.raises(runs.UserError, match="(?s)exit code 2.*goes on.*train.py --size nano.*--seq_len 100"):
        runs.make_all([Run("spectron", 0.1)], scale)


def test_above_nano_eval_scores_the_tasks_and_the_table_has_them(store, monkeypatch):
    asked, S = [], runs.scale_of("S", steps=9)

    def evaluate(command):
        asked.append(command)
        Path(command[-1]).write_text(json.dumps({f"{task}_acc_norm": 0.25 for task in reproduce.TASKS}))
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(runs.subprocess, "run", evaluate)
    monkeypatch.setattr(runs, "make_all", lambda wanted, scale: [
        store(run, 3 + abs(math.log(2 * run.lr / ARMS[run.arm].lr)), scale) for run in wanted])
    with pytest.raises(runs.UserError, match="tools.download evals"):
        reproduce.prepare("table1", S)
    Path("data/evals").mkdir(parents=True)
    reproduce.prepare("table1", S)
    assert len(asked) == 3 and "out/paper/S-9x1048576/spectron-lr0.05-seed0" in asked[0]
    assert "hellaswag,piqa,arc_easy" in asked[0] and reproduce.table("table1", S).count("25.00%") == 9
    reproduce.prepare("fig7", S)
    assert len(asked) == 3 + 6
    reproduce.report("fig7", S)
    assert Path("results/fig7/S-9x1048576/figure.png").stat().st_size > 10_000


def test_arms_that_diverge_are_drawn_and_said(store):
    for lr in 0.5, 1.0, 2.0:
        for name in "spectron", "orthogonalize", "renormalize":
            store(Run(name, lr / 10), 1.5 + lr)
        store(Run("neither", lr), "gone")
    reproduce.report("table2", runs.scale_of("nano", lrs=3))
    text = Path("results/table2/nano/table.md").read_text()
    assert "neither (SGD) | " in text and "diverged at every lr" in text
    assert Path("results/table2/nano/figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("argv, fragments", [
    (["table9"], ["table9", "table1"]), (["fig2", "--seeds", "0"], ["0"]),
    (["table1", "--lrs", "21"], ["--lrs 21", "at most 15"]), (["fig1"], ["fig1", "fig5"]),
    (["fig2", "--scale", "XL"], ["XL", "nano"])])
def test_wrong_commands_are_refused(fails, argv, fragments):
    fails(reproduce.main, argv, *fragments)


def test_a_plan_says_runs_flops_and_what_is_not_run_at_nano(capsys):
    reproduce.main(["all", "--dry_run", "--steps", "77"])
    printed = capsys.readouterr().out
    assert "0 of 24 runs are there; 24 and up to 8 with other seeds" in printed and "FLOPs" in printed
    assert "fig7" in printed.splitlines()[0] and "chance" in printed.splitlines()[0]
    reproduce.main(["all", "--dry_run", "--scale", "S"])  # nobody has timed S
    printed = capsys.readouterr().out
    assert "fig5: 0 of 9 runs are there" in printed and "nano's sizes" in printed.splitlines()[0]


# ----------------------------------------- What has been committed ------------------------------------------

@pytest.mark.parametrize("name", DONE)
def test_committed_tables_are_what_the_committed_logs_say(name, in_a_copy, monkeypatch):
    monkeypatch.setattr(reproduce.draw, "save", lambda *args: None)  # figures are made, and not rendered
    for directory in (path.parent for path in (ROOT / "results" / name).glob("*/table.json")):
        made = json.loads((directory / "table.json").read_text())
        reproduce.report(name, runs.scale_of(**made["scale"]))
        for file in "table.md", "table.json":
            again = Path("results") / name / directory.name / file
            assert again.read_text() == (directory / file).read_text(), f"python -m paper.reproduce {name}"
        assert (directory / "figure.png").stat().st_size > 10_000
        assert all((ROOT / log).is_file() for arm in made["arms"] for log in arm["logs"])


def test_the_results_readme_is_what_the_committed_logs_say(in_a_copy):
    text = (ROOT / "results/README.md").read_text("utf-8")
    assert reproduce.results_readme() == text, "python -m paper.reproduce report"


@pytest.mark.parametrize("count", [1, 6, 15])
def test_every_arm_has_as_many_learning_rates_as_asked_for(count):
    scale = runs.scale_of("nano", lrs=count)
    assert {len(runs.lrs_of(name, scale)) for name, arm in ARMS.items() if arm.swept} == {count}


def test_figures_are_drawn_where_there_is_no_fcntl_and_a_foreign_backend(tmp_path):
    """As on Windows, and in a notebook's child."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "runs").symlink_to(ROOT / "results" / "runs")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['fcntl'] = None; sys.path.insert(0, {str(ROOT)!r})\n"
         "from paper import reproduce; reproduce.main(['fig3'])"], cwd=tmp_path, capture_output=True,
        text=True, env={**os.environ, "MPLBACKEND": "module://not_here"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results/fig3/nano/figure.png").stat().st_size > 10_000
