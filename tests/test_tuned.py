"""paper/tuned.py: its search on losses that are made up, its pages, and what it needs of train.py."""

import json
import math
import shutil

import pytest
import torch

import data
import eval as evaluation
import train
from conftest import ROOT
from lib import norms
from paper import logs, runs, tuned
from paper.methods import METHODS
from paper.runs import Run, Scale
from tools.plot import read_log

BEST = dict(lr=0.5, adam_lr=3e-2, momentum=0.5, beta1=0.95)


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Runs end at a distance from BEST, in log units; which they were is kept in order."""
    monkeypatch.chdir(tmp_path)
    made = []

    def make_all(missing, scale):
        for run in missing:
            c = train.resolve(train.parse(runs.flags_of(METHODS[run.method], scale)))
            found = dict(lr=run.lr, adam_lr=c.adam_lr, momentum=c.momentum,
                         beta1=c.method_args.get("beta1", 0.9))
            loss = 1.5 + run.seed / 100 + sum(
                abs(tuned.GRIDS[axis].index(x) - tuned.GRIDS[axis].index(BEST[axis])) / 10
                for axis, x in found.items() if x in tuned.GRIDS[axis])
            logs.add(runs.pack_of(scale), run.name, [
                {"config": {"steps": 5, "model": {"vocab_size": 320}}},
                {"step": 5, "val_loss": loss, "halves": [loss, loss + 1], "divisor": [3.0, 3.5, 4.0],
                 "flops": 1e9, "seconds": 10.0}])
            made.append(run)
    monkeypatch.setattr(runs, "make_all", make_all)
    return made


def finish(study):
    while left := tuned.missing(study.scale, study.wanted):
        runs.make_all(left, study.scale)
    return study.search


@pytest.mark.parametrize("method, axes", [("spectron", ("lr", "adam_lr", "momentum")),
                                       ("adamw", ("lr", "adam_lr", "beta1")), ("dense", ("lr",))])
def test_the_search_ends_at_the_best_with_its_neighbours_run(made_up, method, axes):
    usual = dict(lr=0.1, adam_lr=3e-3, momentum=0.7, beta1=0.9)
    start = {axis: usual[axis] for axis in axes}
    study = tuned.Study(method, start, tuned.SHORT, axes)
    point, missing, tried = finish(study)
    assert point == {axis: BEST[axis] for axis in axes} and not missing
    for axis in axes:
        assert all(study.loss(p) >= study.loss(point) for p in study.beside(point, axis))
    assert tried == len([run for run in made_up if run.seed == 0])
    assert {run for run in made_up if run.seed == 1} == {study.run(point, 1)}


def test_a_diverged_run_is_no_minimum(made_up):
    study = tuned.Study("spectron", dict(lr=0.2), tuned.SHORT, ("lr",))
    logs.add(runs.pack_of(tuned.SHORT), study.run(dict(lr=0.5)).name, [
        {"config": {"steps": 5, "model": {"vocab_size": 320}}}, {"step": 2, "diverged": "a gradient"}])
    assert finish(study)[0] == dict(lr=0.2) and study.loss(dict(lr=0.5)) == math.inf


def test_what_one_seed_does_not_order_is_tuned_by_two(made_up):
    study = tuned.Study("spectron", dict(lr=0.5), tuned.SHORT, ("lr",), tuning=(0, 5))
    for lr, seed, loss in (0.5, 0, 1.50), (0.2, 0, 1.51), (0.5, 5, 1.60), (0.2, 5, 1.50):
        logs.add(runs.pack_of(tuned.SHORT), study.run(dict(lr=lr), seed).name, [
            {"config": {"steps": 5, "model": {"vocab_size": 320}}}, {"step": 5, "val_loss": loss,
                                                                    "halves": [loss, loss]}])
    point, missing, tried = finish(study)
    assert point == dict(lr=0.2) and not missing and tried == 6
    assert {(run.lr, run.seed) for run in made_up if run.seed == 0} == {(1.0, 0), (0.1, 0)}


@pytest.mark.parametrize("name", tuned.PARTS)
def test_each_part_makes_its_runs_and_its_page_from_nothing_and_then_none(made_up, name, fails):
    before = tuned.plan(name, 1e10)
    assert "hours" in before and " 0 runs" not in before.splitlines()[0]
    fails(tuned.main, [name], "no part of", f"python -m paper.tuned {name} --make")
    tuned.main([name, "--make"])
    page = (tuned.RESULTS / name / "table.md").read_text("utf-8")
    assert f"`python -m paper.reproduce {name}`" in page.replace("\n", " ")
    assert "3.00, 3.50, 4.00" in page and "None" not in page and " nan " not in page
    assert " 0 runs" in tuned.plan(name, 1e10).splitlines()[-1]
    if name == "lengths":  # tuned on seed 0 and the first half, told on the others and the second
        assert "2.625 ± 0.013" in page and page.count("| 1,600 |") == page.count("| 800 |") == 5
        assert {run.seed for run in made_up} == set(range(9))
    made = len(made_up)
    tuned.main([name, "--make"])
    tuned.main([name])
    assert len(made_up) == made


def test_a_page_has_the_stages_that_are_complete_up_to_the_first_that_is_not(made_up, fails):
    for method in "adamw", "spectron":  # Spectron is the first, with which the others are compared
        fails(tuned.main, ["shapes"], "no part of shapes has all its runs")
        scale, wanted = tuned.PARTS["shapes"][0][method]
        while left := tuned.missing(scale, wanted):
            runs.make_all(left, scale)
    made = len(made_up)
    tuned.main(["shapes"])
    page = (tuned.RESULTS / "shapes" / "table.md").read_text("utf-8")
    assert "| Spectron |" in page and "| AdamW |" not in page and len(made_up) == made


@pytest.mark.parametrize("name", tuned.PARTS)
def test_the_committed_page_is_what_the_committed_logs_say(name, in_a_copy, monkeypatch):
    monkeypatch.setattr(runs, "make_all", lambda *_: pytest.fail("it trains"))
    committed = ROOT / "results" / name
    if not committed.is_dir():
        pytest.skip(f"nobody has made its runs yet: python -m paper.tuned {name} --make")
    shutil.copytree(committed, tuned.RESULTS / name)
    tuned.main([name])
    for path in committed.iterdir():
        assert (tuned.RESULTS / name / path.name).read_bytes() == path.read_bytes(), path


def test_a_run_with_the_flags_of_a_committed_arm_has_its_name():
    """So that it is not made again."""
    study = tuned.of_shapes("spectron")[0]
    assert study.run(dict(lr=0.2, adam_lr=3e-3)) == Run("spectron@nano-2x32@0.25", 0.2)
    assert study.run(dict(lr=0.2, adam_lr=1e-2)).name == "spectron@nano-2x32@0.25-adam0.01-lr0.2-seed0"
    study = tuned.of_length(tuned.LONG, "spectron")
    assert study.run(dict(lr=0.1, adam_lr=3e-3, momentum=0.5)).method == "spectron-momentum0.5"


@pytest.mark.parametrize("factor", [dict(c=4), dict(beta1=0.8), dict(decay=0.02)])
def test_what_is_varied_is_that_alone(factor):
    def made(argv):
        c = train.resolve(train.parse(["--size", "nano-0.6M", "--device", "cpu", *argv]))
        method = train.find_method(c.method, c.method_args)
        torch.manual_seed(0)
        model = train.Llama(train.LlamaConfig(**c.model), method.linear)
        return model, method.optimizers(model, c)
    (key, value), = factor.items()
    model, (factors, others) = made(["--method", "varied", "--method_args", f"{key}={value}"])
    plain, (own, _) = made(["--method", "adamw" if key == "beta1" else "spectron"])
    for (A, B), (A0, B0) in zip(model.factor_pairs(), plain.factor_pairs()):
        c = factor.get("c", 1) if A.size(0) == B.size(0) else 1  # attention
        assert torch.allclose(A, A0 * c) and torch.allclose(B, B0 / c)
    group, others, own = factors.param_groups[0], others.param_groups[0], own.param_groups[0]
    assert others["betas"] == (0.9, 0.95) and others["weight_decay"] == 0 and group["lr"] == own["lr"]
    assert key != "beta1" or group["betas"] == (0.8, 0.95)
    assert group["lr"] * group["weight_decay"] == pytest.approx(factor.get("decay", 0))


def test_varied_takes_one_of_the_three(fails):
    for args in [], ["--method_args", "c=2", "beta1=0.5"]:
        fails(train.main, ["--method", "varied", *args, "--dry_run"], "--method varied", "beta1")


def test_the_log_has_the_divisor_of_all_matrices(run):
    """Against exact norms; from below, and in every step once the power iteration has started."""
    out = run("--steps", 12)
    model = evaluation.load_run(out)[0]
    exact = torch.stack([norms.spectral_norm(A) + norms.spectral_norm(B) + 1
                         for A, B in model.factor_pairs()])
    rows = read_log(out)[1]
    assert rows[-1]["divisor"] == pytest.approx(
        [exact.min().item(), exact.median().item(), exact.max().item()], rel=0.01)
    assert all(a <= b <= c for a, b, c in (row["divisor"] for row in rows))
    assert all(row["divisor"] is None for row in read_log(run("--method", "dense", "--steps", 1, out="d"))[1])


def test_a_log_has_the_loss_on_each_half_of_the_validation_text(corpus, tmp_path, monkeypatch):
    """Of a real run; the mean of both is the final loss, each half by its windows."""
    monkeypatch.chdir(runs.Path(__file__).parent.parent)
    monkeypatch.setattr(runs, "OUT", tmp_path / "out")
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    scale = Scale({}, "nano-0.6M", "halved", 2, 256, str(corpus), 1, 1, ("--seq_len", "32"), halves=True)
    run = Run("spectron", 0.1)
    runs.make(run, scale, [])
    last = runs.log_of(run, scale).steps[-1]
    windows = data.open_split(corpus, "val", 32, "bytes").windows
    first = windows // 2
    mean = (last["halves"][0] * first + last["halves"][1] * (windows - first)) / windows
    assert mean == pytest.approx(last["val_loss"], rel=1e-5) and last["halves"][0] != last["halves"][1]
    assert json.loads(runs.pack_of(scale).read_text("utf-8"))["run"] == run.name
