"""paper/: counts against the paper's, the protocol on logs that are made up, a real run that is killed, and
committed tables that are what the committed logs say."""

import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lib.methods import count_parameters
import train
from conftest import ROOT
from model import NANO_SIZES
from paper import equilibrated, experiments, logs, output, reproduce, runs, tables
from paper.methods import METHODS
from paper.runs import Run

NANO = runs.scale_of("nano")
RESULTS = ROOT / "results"
PAGES = sorted(page for name in experiments.EXPERIMENTS for page in RESULTS.glob(f"{name}/*/table.md"))
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
needs_fork = pytest.mark.skipif(FORK is None, reason="no fork here")


def command_of(page: Path) -> list[str]:
    """What comes after python -m paper.reproduce in the command that a page says it is made by."""
    return shlex.split(re.search(r"`python -m paper.reproduce (.*?)`", page.read_text("utf-8"))[1])


@pytest.fixture
def store(tmp_path, monkeypatch):
    """store(run, loss) writes a log as of a finished run into an empty directory of results; the loss may be
    a word, and then is the cause for which it diverged."""
    monkeypatch.chdir(tmp_path)

    def write(run, loss, scale=NANO):
        header = {"config": {"steps": 200, "model": {"vocab_size": 320}, "eval_tokens": 9}}
        row = {"step": 7, "diverged": loss} if isinstance(loss, str) else {
            "step": 200, "seconds": 20.0, "flops": 1e12, "val_loss": loss, "loss": loss, "lr": run.lr}
        first = {"step": 1, "seconds": 1.0, "flops": 1e10, "loss": 5.0, "val_loss": 5.0, "lr": run.lr}
        logs.add(runs.pack_of(scale), run.name, [header, first, row])
        return runs.log_of(run, scale)
    return write


# -------------------------------------------------- Counts --------------------------------------------------

def test_tables_4_and_5_are_the_papers_counts():
    lines = reproduce.counts("table5").splitlines()[6:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [(row[0], row[5]) for row in rows] == list(experiments.PAPER["table5"].items()) and len(rows) == 12
    for size, _, dense, theirs, low, theirs_low in rows:
        unit, off = {"M": (1.0, 1), "B": (1e3, 0.06)}[theirs_low[-1]]
        assert abs(float(low[:-1].replace(",", "")) / unit - float(theirs_low[:-1])) < off
        assert theirs == size and float(dense[:-1].replace(",", "")) == pytest.approx(
            float(size[:-1]) * {"M": 1.0, "B": 1e3}[size[-1]], rel=0.03)
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
            methods, own = experiments.methods_and_scale(name, scale)
            grids = [runs.lrs_of(method, own) for method in methods if METHODS[method].swept]
            assert {len(grid) for grid in grids} == {3 if e.few else scale.lrs}
            assert own.seeds == (1 if e.single else scale.seeds)
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
    assert store(Run("adamw", 1e-3), math.log(320) - 0.01).final_loss is not None
    assert store(Run("adamw", 2e-3), math.log(320) + 0.01).final_loss is None
    assert store(Run("adamw", 5e-3), None).final_loss is None
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
    few = replace(NANO, lrs=3)
    for lr, loss in (0.02, 1.4), (0.05, 1.6), (0.1, 1.5), (0.2, 1.7), (0.5, 1.3):
        store(Run("spectron", lr), loss)
    assert runs.tried("spectron", few) == ({0.05: 1.6, 0.1: 1.5, 0.2: 1.7}, [])
    store(Run("spectron", 0.2), 1.45)
    assert runs.tried("spectron", few) == ({0.05: 1.6, 0.1: 1.5, 0.2: 1.45, 0.5: 1.3}, [1.0])
    store(Run("spectron", 1.0), 1.2)
    found, missing = runs.tried("spectron", few)
    assert runs.best_of(found) == 1.0 and not missing  # at the edge, but a grid grows twice at most
    assert runs.tried("spectron", NANO)[1] == [2.0]  # six of its own, and none outside them yet


def test_sweep_makes_what_is_missing_and_nothing_else(store, monkeypatch):
    made = []

    def make_all(wanted, scale):
        for run in wanted:
            if not runs.log_of(run, scale):
                made.append(run)
                store(run, 1.5 + abs(math.log(run.lr / METHODS[run.method].lr / 2.5)) + run.seed / 100)
    monkeypatch.setattr(runs, "make_all", make_all)
    store(Run("adamw", 1e-3), 1.8)
    for lrs, wanted in (6, [2e-4, 5e-4, 2e-3, 5e-3, 1e-2]), (3, []):
        runs.sweep(["adamw"], replace(NANO, lrs=lrs))
        assert sorted(run.lr for run in made if run.seed == 0) == wanted
        assert [run for run in made if run.seed] == ([] if lrs == 3 else
                                                     [Run("adamw", 2e-3, k) for k in (1, 2)])
        made.clear()
    runs.sweep(["rank-0.4"], replace(NANO, lrs=3, seeds=1))
    assert sorted(run.lr for run in made) == [0.05, 0.1, 0.2, 0.5]  # 0.2 was at the edge


def test_equal_flops_and_equal_wall_clock_decide_the_steps(store):
    dense, spectron = (runs.flops_per_token(method, NANO) for method in ("dense", "spectron"))
    assert runs.steps_of("dense-flops", NANO) == round(200 * spectron / dense) < 130
    guided = runs.flops_per_token("self-guided", NANO)  # whose guide is there for half of the steps
    assert spectron < guided < runs.flops_per_token("dense", NANO) + spectron
    with pytest.raises(runs.UserError, match="python -m paper.bench seconds --scale nano"):
        runs.steps_of("dense-time", NANO)
    Path("results/seconds").mkdir(parents=True)
    Path("results/seconds/nano.json").write_text('{"seconds": {"spectron": 0.5, "dense": 1.0}}')
    assert runs.steps_of("dense-time", NANO) == 100
    assert runs.seconds_per_step("dense-flops", NANO) == 1.0  # trained as dense is
    assert runs.steps_of("spectron", runs.scale_of("S")) == 2556
    assert runs.steps_of("dense-flops", runs.scale_of("S")) == 1786


def test_differences_are_taken_seed_by_seed():
    def outcome(method, *losses):
        return experiments.Outcome(method, {}, 0.1, dict(enumerate(losses)), [])
    a, near = outcome("spectron", 1.5, 1.6), outcome("adamw", 1.54, 1.66)
    assert experiments.gap(a, near) == pytest.approx((0.05, 12.7 * 0.01, 2), rel=1e-6)
    assert experiments.gap(outcome("adamw", 2.5), outcome("dense", 1.5)) == (-1.0, None, 1)
    assert experiments.gap(a, outcome("neither")) == (None, None, 0)
    torn = outcome("adamw", 1.7, None, 1.9)  # the seeds that both have
    assert experiments.gap(outcome("spectron", 1.5, 1.6, 1.7), torn) == pytest.approx((0.2, 0, 2), abs=1e-9)
    table = tables.differences("table1", [a, near, outcome("self-guided")])
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
    kept = logs.thinned(rows)
    steps = [row["step"] for row in kept[1:]]
    assert kept[0] == {"config": {}} and steps[0] == 1 and steps[-1] == 1000 and 777 in steps
    assert 100 <= len(steps) <= 103 and kept[1]["loss"] == 0.333333


def test_packing_loses_nothing(tmp_path):
    """Missing keys, nulls, the order of keys, integers beside floats, a second header in the middle: the text
    of every record is the same afterwards."""
    draw, path, kept = random.Random(0), tmp_path / "pack.jsonl", {}
    values = [None, 0, 0.0, -1.5, 1e-300, 123456789012, "non-finite gradient", True, [1, None], {"a": 1}]
    for i in range(30):
        records = [{"argv": [], "config": {"steps": 3}}]
        for step in range(draw.randrange(40)):
            keys = draw.sample(["loss", "lr", "val_loss", "rank", "dW"], draw.randrange(5))
            records.append({"step": step, **{key: draw.choice(values) for key in keys}} if draw.random() < 0.9
                           else {"config": {"resumed": True}, "git": None})
        kept[f"run {i}, é"] = [json.dumps(record) for record in records]
        logs.add(path, f"run {i}, é", records)
    found = {name: [json.dumps(record) for record in records] for name, records in logs.read(path).items()}
    assert found == kept and list(found) == sorted(kept)
    before = path.read_bytes()
    logs.add(path, "run 7, é", [json.loads(row) for row in kept["run 7, é"]])
    assert path.read_bytes() == before


def test_what_another_process_adds_is_seen_and_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "pack.jsonl"
    assert logs.read(path) == {} and logs.get(path, "a") is None
    logs.add(path, "a", [{"config": {"steps": 1}}, {"step": 1}])
    assert logs.get(path, "a").is_finished and logs.get(path, "b") is None
    path.write_text(path.read_text() + '{"run": "b", "log": [{"step": [1, 2')
    with pytest.raises(runs.UserError, match="pack.jsonl is damaged.*git checkout"):
        logs.read(path)


def add_many(path, writer, count, pipe=None):
    for i in range(count):
        logs.add(path, f"{writer}-{i}", [{"config": {}}, {"step": i, "loss": i / 3}])
        if pipe:
            pipe.send(i)


@needs_fork
def test_two_writers_at_once_lose_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("runs/pack.jsonl")
    writers = [FORK.Process(target=add_many, args=(path, name, 20)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert set(logs.read(path)) == {f"{name}-{i}" for name in "ab" for i in range(20)}


@needs_fork
def test_a_kill_in_the_middle_of_writing_leaves_a_whole_file(tmp_path, monkeypatch):
    """With every run that had been added, and no lock that stays behind."""
    monkeypatch.chdir(tmp_path)
    path, draw, added = Path("runs/pack.jsonl"), random.Random(0), set()
    for attempt in range(8):
        receiving, sending = FORK.Pipe(duplex=False)
        writer = FORK.Process(target=add_many, args=(path, f"w{attempt}", 1000, sending))
        writer.start()
        added.add(f"w{attempt}-{receiving.recv()}")
        time.sleep(0.05 * draw.random())
        writer.kill()
        writer.join()
        while receiving.poll():
            added.add(f"w{attempt}-{receiving.recv()}")
        assert added <= set(logs.read(path))
    logs.add(path, "after", [{"config": {}}])
    assert added < set(logs.read(path))


@needs_fork
def test_a_run_that_is_killed_goes_on_and_its_log_is_made_once(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "OUT", tmp_path / "out")
    monkeypatch.chdir(ROOT)
    scale = runs.scale_of("nano-0.6M", str(corpus), steps=60, tokens_per_step=256)
    scale = replace(scale, flags=("--seq_len", "32", "--device", "cpu"))
    run, out = Run("spectron", 0.1), tmp_path / "out" / scale.name / "spectron-lr0.1-seed0"
    flags = runs.command(run, scale)
    process = FORK.Process(target=train.main, args=(flags[flags.index("train.py") + 1:],))
    process.start()
    while not (out / "ckpt.pt").is_file() and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not runs.is_finished(out / "log.jsonl") and "--resume" in runs.command(run, scale)
    runs.make_all([run], scale)
    log, pack = runs.log_of(run, scale), runs.pack_of(scale)
    assert log.is_finished and log.final_loss < 4.8
    assert len({row["step"] for row in log.steps}) == len(log.steps)
    assert sum("config" in record for record in logs.read(pack)[run.name]) == 2  # where each part was made
    stamp = pack.stat().st_mtime_ns
    runs.make_all([run], scale)
    assert pack.stat().st_mtime_ns == stamp


@needs_fork
def test_sigterm_lets_the_runs_save_and_leaves_none_behind(tmp_path, monkeypatch):
    """The same command would otherwise train beside an orphan."""
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "OUT", tmp_path / "out")
    monkeypatch.chdir(ROOT)
    scale, out = runs.scale_of("nano-0.6M"), tmp_path / "out/nano-0.6M/spectron-lr0.1-seed0"
    process = FORK.Process(target=runs.make_all, args=([Run("spectron", 0.1)], scale))
    process.start()
    while process.is_alive() and not ((out / "log.jsonl").is_file()
                                      and '"step": 1,' in (out / "log.jsonl").read_text()):
        time.sleep(0.1)
    with pytest.raises(runs.UserError, match="another process"), runs.alone(tmp_path / "out/nano-0.6M"):
        pass
    process.terminate()
    process.join(60)
    assert process.exitcode and (out / "ckpt.pt").is_file() and not runs.is_finished(out / "log.jsonl")
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
        Path(command[-1]).write_text(json.dumps({f"{task}_acc_norm": 0.25 for task in tables.TASKS}))
        return subprocess.CompletedProcess(command, 0)
    monkeypatch.setattr(runs.subprocess, "run", evaluate)
    monkeypatch.setattr(runs, "make_all", lambda wanted, scale: [
        store(run, 3 + abs(math.log(2 * run.lr / METHODS[run.method].lr)), scale) for run in wanted])
    with pytest.raises(runs.UserError, match="tools.download evals"):
        tables.prepare("table1", S)
    Path("data/evals").mkdir(parents=True)
    tables.prepare("table1", S)
    assert len(asked) == 3 and "out/paper/S-9x1048576/spectron-lr0.05-seed0" in asked[0]
    assert "hellaswag,piqa,arc_easy" in asked[0]
    assert tables.table("table1", experiments.outcomes_of("table1", S)).count("25.00%") == 9
    tables.prepare("fig7", S)
    assert len(asked) == 3 + 6
    tables.report("fig7", S)
    assert Path("results/fig7/S-9x1048576/figure.png").stat().st_size > 10_000


def test_arms_that_diverge_are_drawn_and_said(store):
    for lr in 0.5, 1.0, 2.0:
        for name in "spectron", "orthogonalize", "renormalize":
            store(Run(name, lr / 10), 1.5 + lr)
        store(Run("neither", lr), "gone")
    tables.report("table2", runs.scale_of("nano", lrs=3))
    text = Path("results/table2/nano/table.md").read_text()
    assert "neither (SGD) | " in text and "diverged at every lr" in text
    assert Path("results/table2/nano/figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("argv, fragments", [
    (["table9"], ["table9", "table1"]), (["fig2", "--seeds", "0"], ["0"]),
    (["table1", "--lrs", "21"], ["--lrs 21", "at most 15"]), (["fig1"], ["fig1", "fig5"]),
    (["fig2", "--scale", "XL"], ["XL", "nano"]), (["fig2", "--seeds", "9"], ["--seeds 9", "at most 8"]),
    (["table4", "--dry_run"], ["table4 takes no flags", "python -m paper.reproduce table4"])])
def test_wrong_commands_are_refused(fails, argv, fragments):
    fails(reproduce.main, argv, *fragments)


def test_a_plan_says_runs_flops_and_what_is_not_run_at_nano(capsys):
    reproduce.main(["all", "--dry_run", "--steps", "77"])
    printed = capsys.readouterr().out
    assert "0 of 24 runs are there; 24 and up to 8 with other seeds" in printed and "FLOPs" in printed
    assert "fig7, and table1's task columns, are not run at nano, where every model is at chance" in printed
    reproduce.main(["fig5", "--dry_run", "--scale", "S"])  # nobody has timed S
    assert "fig5: 0 of 9 runs are there" in capsys.readouterr().out


# ----------------------------------------- What has been committed ------------------------------------------

@pytest.fixture
def drawn(monkeypatch):
    """Figures are made and not rendered: the path and the title of each."""
    found = {}
    for module in tables, equilibrated:
        monkeypatch.setattr(module, "save", lambda fig, path, *words: found.update({path: words[0]}))
    return found


def title_of(figure: Path) -> str:
    with Image.open(figure) as picture:
        return picture.info["Title"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.parent.name}-{page.parent.name}")
def test_committed_tables_are_what_the_committed_logs_say(page, in_a_copy, drawn):
    """And the command that makes a page is the one that it names."""
    reproduce.main(command_of(page))
    again = Path("results") / page.parent.parent.name / page.parent.name / "table.md"
    assert again.read_text("utf-8") == page.read_text("utf-8"), command_of(page)
    assert drawn[again.with_name("figure.png")] == title_of(page.with_name("figure.png"))


def test_the_page_of_equilibrated_spectron_is_what_the_committed_logs_say(tmp_path, monkeypatch, drawn):
    shutil.copytree(RESULTS / "equilibrated", tmp_path / "results/equilibrated")
    for room in "runs", "seconds":
        (tmp_path / "results" / room).symlink_to(RESULTS / room)
    monkeypatch.chdir(tmp_path)
    reproduce.main(["equilibrated"])
    for name in "README.md", "rows.md":
        made = Path("results/equilibrated", name)
        assert made.read_bytes() == (ROOT / made).read_bytes()
    assert len(drawn) == 7 and all(title == title_of(ROOT / path) for path, title in drawn.items())


@pytest.mark.parametrize("name", reproduce.COUNTS)
def test_committed_counts_are_what_the_code_says(name):
    assert (RESULTS / name / "table.md").read_text("utf-8") == reproduce.counts(name)


def test_the_index_has_a_row_for_every_experiment_in_few_words():
    text = (RESULTS / "README.md").read_text("utf-8")
    pages = [page.relative_to(RESULTS).as_posix() for page in PAGES]
    assert all(f"({page})" in text for page in pages if not page.startswith("equilibrated/"))
    assert reproduce.index() == text and len(text.replace("|", " ").split()) <= 560


@pytest.mark.parametrize("argv", [["table2"], ["fig5"], ["report"]], ids=lambda argv: argv[0])
def test_a_command_leaves_what_is_committed_as_it_is(argv, tmp_path, monkeypatch):
    """Byte by byte, figures too, where they are the same to the eye."""
    shutil.copytree(RESULTS, tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    reproduce.main(argv)
    for path in (path for path in RESULTS.rglob("*") if path.is_file() and path.suffix != ".part"):
        assert (tmp_path / "results" / path.relative_to(RESULTS)).read_bytes() == path.read_bytes(), path


def test_a_figure_is_written_again_only_where_it_looks_different(tmp_path):
    def save(height):
        fig, (ax,) = tables.draw.panels(1, 4, 3)
        ax.plot([0, 1], [0, height], label="a line")
        ax.set_ylim(0, 2)
        output.save(fig, path, "A message", "a setting")
        return path.stat().st_mtime_ns, path.read_bytes()
    path = tmp_path / "figure.png"
    first, other = save(1.0), save(1.3)
    assert first[1] != other[1] and save(1.3 + 1e-9) == other
    assert b"Software" not in other[1] and b"Date" not in other[1]
    path.write_text("no picture")
    assert save(1.0)[1] == first[1]


def test_every_file_of_the_results_is_named_by_a_page_or_read_by_a_command():
    """And the results stay small."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *RESULTS.rglob("*.md")]
    linked = {(page.parent / link).resolve() for page in pages
              for link in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8"))}
    said = (RESULTS / "runs/README.md").read_text("utf-8") + "".join(
        path.read_text("utf-8") for path in (ROOT / "paper").glob("*.py"))
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    idle = [path for path in files if path.resolve() not in linked and path != RESULTS / "README.md"
            and not (path.suffix != ".md" and f"{path.name}" in said) and path.parent != RESULTS / "seconds"]
    assert not idle
    assert len(files) <= 180 and sum(path.stat().st_size for path in files) <= 8_000_000


def test_links_into_the_results_lead_to_a_file():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *RESULTS.rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            if "results/" in link or RESULTS in page.parents and "://" not in link:
                assert (page.parent / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize("count", [1, 6, 15])
def test_every_arm_has_as_many_learning_rates_as_asked_for(count):
    scale = runs.scale_of("nano", lrs=count)
    assert {len(runs.lrs_of(name, scale)) for name, method in METHODS.items() if method.swept} == {count}


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
