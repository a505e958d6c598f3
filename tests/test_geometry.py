"""The eighteen metrics on cases whose value is known, and their measurement on two small runs."""

import shutil

import numpy as np
import pytest
import torch

import train
from conftest import ROOT
from paper import geometry, logs
from paper.runs import Run


def test_sharpness_of_a_quadratic_is_half_the_trace_times_the_mean_square_offset():
    H, offsets = torch.tensor([1.0, 4.0, 9.0]), geometry.offsets(0.5, 4)

    def loss(weights):
        return float(0.5 * (H * weights[0].square()).sum())
    zero = [torch.zeros(3)]
    curves = [geometry.line(loss, zero, geometry.random_direction(zero, seed), offsets)
              for seed in range(4000)]
    mean_square = np.mean([x**2 for x in offsets if x])
    assert geometry.sharpness(np.mean(curves, 0)) == pytest.approx(0.5 * 14 * mean_square, rel=0.05)
    assert geometry.sharpness([3.0, 3.0, 3.0]) == 0 < geometry.sharpness([4.0, 3.0, 3.0])


def test_the_grid_is_odd_and_has_zero_in_its_middle():
    assert geometry.offsets(0.003)[6] == 0 and len(geometry.offsets(0.003)) == 13
    assert geometry.offsets(2.0, 2) == [-2.0, -1.0, 0.0, 1.0, 2.0]


def test_directions_are_the_same_for_every_method_and_leave_the_weights_alone():
    W = [torch.randn(4, 3), torch.ones(5)]
    before = [w.clone() for w in W]
    a, b = geometry.random_direction(W, 3), geometry.random_direction([2 * w for w in W], 3)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    scaled = geometry.random_direction(W, 3, normalised=True)
    assert [float(d.norm()) for d in scaled] == pytest.approx([float(w.norm()) for w in W], rel=1e-5)
    geometry.line(lambda w: 0.0, W, a, [0.1, -0.1])
    assert all(torch.equal(w, old) for w, old in zip(W, before))


def test_principal_directions_sum_to_the_matrix_and_are_zero_for_gains():
    W = [torch.randn(4, 3), torch.ones(5)]
    parts = geometry.principal_directions(W, 4)
    assert torch.allclose(sum(p[0] for p in parts), W[0], atol=1e-5)
    assert all((p[1] == 0).all() for p in parts) and (parts[3][0] == 0).all()  # its rank is 3


def test_a_convex_path_has_no_barrier_and_a_hill_has_its_height():
    start, end = [torch.tensor([-1.0])], [torch.tensor([3.0])]
    assert geometry.barrier(lambda w: float(w[0] ** 2), start, end) <= 0
    hill = geometry.barrier(lambda w: float(torch.exp(-(w[0] - 1) ** 2)), start, end)
    assert hill == pytest.approx(1 - np.exp(-4), abs=1e-6)
    assert geometry.barrier(lambda w: 2.0, start, end) == 0


def test_ranks_of_the_identity_and_of_rank_one():
    ones, single = torch.ones(7), torch.tensor([3.0, 0, 0, 0])
    assert geometry.effective_rank(ones) == pytest.approx(7) == pytest.approx(geometry.stable_rank(ones))
    assert geometry.effective_rank(single) == geometry.stable_rank(single) == geometry.gap(single) == 1
    assert geometry.gap(ones) == 0 == geometry.stable_rank(torch.zeros(3))


def test_cka_does_not_see_rotation_and_scale_and_distance_does():
    torch.manual_seed(0)
    X = torch.randn(200, 6)
    Q = torch.linalg.qr(torch.randn(6, 6))[0]
    assert geometry.cka(X, 3 * X @ Q + 2) == pytest.approx(1, abs=1e-6)
    assert geometry.cka(X, torch.randn(200, 6)) < 0.2
    assert geometry.distance(X, X) == 0 == geometry.relative_distance(X, X)
    assert geometry.relative_distance(X, 3 * X) == pytest.approx(2, rel=1e-5)
    assert geometry.cosine(X, 3 * X) == pytest.approx(1) == -geometry.cosine(X, -X)


@pytest.mark.parametrize("name", ["spectron", "sltrain", "relora", "sct", "dense"])
def test_materialised_weights_compute_what_the_method_computes(run, name):
    out = run("--method", name, "--steps", 2)
    model = geometry.load_model(geometry.load_checkpoint(out), "cpu").eval()
    weights = geometry.materialised(model)
    x = torch.randint(0, 250, (2, 16))
    twin = geometry.Llama(geometry.replace(model.config, rank_ratio=None))
    assert torch.allclose(geometry.functional_call(twin, weights, (x,)), model(x), atol=2e-5)


def test_every_metric_is_measured_and_a_method_without_w_says_so(run, monkeypatch, tmp_path):
    """Two short runs with numbered checkpoints, measured, written and drawn."""
    scale = geometry.replace(geometry.SCALE, name="g")
    for key, value in dict(KEPT=2, STEPS=4, SEEDS=1, SCALE=scale, OUT=tmp_path, WHERE=tmp_path / "r",
                           DIRECTIONS=2, TOP=2, METHODS_HERE=("dense-adamw", "spectron", "cola")).items():
        monkeypatch.setattr(geometry, key, value)
    monkeypatch.setattr(geometry, "lr_of", lambda method: 1e-3)
    made = []
    for method in geometry.METHODS_HERE:
        r = Run(method, 1e-3)
        run("--method", method, "--steps", 4, "--keep_every", 2, "--lr", 1e-3, "--adam_lr", 3e-3,
            out=f"g/{r.name}")
        assert sorted(p.name for p in (tmp_path / "g" / r.name).glob("ckpt-*")) == [
            "ckpt-000002.pt", "ckpt-000004.pt"]
        made.append((r, [geometry.measure(method, 0, step) for step in (2, 4)]))
    keys = {key for group in geometry.DIMENSIONS.values() for key in group.values()}
    assert keys <= set(made[1][1][1]) and all(np.isfinite(made[1][1][1][key]) for key in keys)
    without = made[2][1][1]
    assert set(geometry.DIMENSIONS["activations"].values()) <= set(without) and "loss" not in without
    assert made[0][1][1]["distance"] == 0 and made[0][1][1]["cka"] == pytest.approx(1)
    for r, found in made:
        logs.add(tmp_path / "r/values.jsonl", r.name, found)
    between = geometry.basins()
    assert list(between) == ["dense-adamw spectron"] and between["dense-adamw spectron"] > 0
    geometry.write_json(tmp_path / "r/basins.json", between)
    geometry.report()
    table = (tmp_path / "r/table.md").read_text("utf-8")
    assert "| CoLA | no W" in table and len(list((tmp_path / "r").glob("*.png"))) == 4


def test_kept_checkpoints_are_replaced_with_the_run_and_resumed_over(run):
    out = run("--steps", 4, "--keep_every", 2, "--stop_at", 2)
    train.main(["--resume", "--out", str(out)])
    assert {p.name for p in out.glob("ckpt-[0-9]*.pt")} == {"ckpt-000002.pt", "ckpt-000004.pt"}
    assert torch.load(out / "ckpt-000002.pt", weights_only=True)["step"] == 2
    run("--steps", 3, "--keep_every", 3, "--overwrite")
    assert [p.name for p in out.glob("ckpt-[0-9]*.pt")] == ["ckpt-000003.pt"]


def test_the_committed_page_is_what_the_committed_values_say(tmp_path, monkeypatch):
    where = tmp_path / "results/geometry"
    shutil.copytree(ROOT / "results/geometry", where)
    monkeypatch.chdir(tmp_path)
    geometry.main([])
    for path in (ROOT / "results/geometry").iterdir():
        assert (where / path.name).read_bytes() == path.read_bytes(), path


def test_the_committed_values_are_of_each_methods_best_learning_rate(in_a_copy):
    """So that --measure has nothing to make but ReLoRA, whose schedule is another since, as the page says."""
    assert "ReLoRA has its older schedule here" in (ROOT / "results/geometry/README.md").read_text("utf-8")
    wanted = {Run(method, 2e-3 if method == "relora" else geometry.lr_of(method), seed).name
              for method in geometry.METHODS_HERE for seed in range(geometry.SEEDS)}
    assert wanted == set(logs.read(ROOT / "results/geometry/values.jsonl"))
