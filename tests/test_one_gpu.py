"""paper/one_gpu.py, all of it at a tiny size: its variants compute the same, and it may be stopped."""

import json
import math
import shutil

import pytest
import torch

from model import NANO_SIZES, Llama
from paper import one_gpu, reproduce


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    """The directory of a whole tiny run."""
    out = tmp_path_factory.mktemp("one_gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_gpu, "LRS", {method: lrs[:1] for method, lrs in one_gpu.LRS.items()})
        one_gpu.main(["--tiny", "--data", str(corpus), "--out", str(out)])
    return out


def lines(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("how", ["side by side", "blocks", "whole"])
def test_a_variant_has_the_loss_and_the_gradients_of_the_model(how):
    torch.manual_seed(0)
    plain, other = Llama(NANO_SIZES["nano-2x32"]), Llama(NANO_SIZES["nano-2x32"])
    other.load_state_dict(plain.state_dict())
    tokens, targets = torch.randint(257, (2, 2, 32))
    network = other if how == "side by side" else one_gpu.compiled(other, how == "whole", "eager")
    if how == "side by side":
        one_gpu.side_by_side(other)
    losses = plain(tokens, targets), network(tokens, targets)
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for (name, p), q in zip(plain.named_parameters(), other.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name


def test_each_result_is_a_line_and_the_page_has_them_all(made):
    rows = {row["name"]: row for row in lines(made)}
    assert len(rows) == 6 + 1 + (4 + 2) + 3 + 4 + 6 and [*rows][6] == "steps"
    for name, row in rows.items():
        assert row["hardware"]["cpu"] and row["took"] >= 0 and row.get("tokens/s", 1) > 0
        if name.startswith("run"):
            assert math.isfinite(row["val_loss"]) and row["seconds"] > 0 and len(row["curve"]) >= 5
            assert (row["divisor"] is None) == (row["method"] == "dense")
    equal, other, of = rows["run spectron 0.1"], rows["run dense seconds"], rows["steps"]["seconds"]
    assert other["steps"] == round(equal["steps"] * of["spectron"] / of["dense"]) and other["lr"] == 0.02
    assert [rows[f"run spectron {x}"]["adam_lr"] for x in ("0.1", "adam_lr")] == [0.003, 0.01]
    page = (made / "table.md").read_text("utf-8")
    assert page.count("\n| ") == (1 + 15) + (1 + 4) + (1 + 10) + 3 and "side by side" in page


def test_the_best_learning_rate_is_that_of_the_runs_that_are_there():
    lines = {"run dense 0.02": {"val_loss": 1.5}, "run dense 0.05": {"val_loss": 1.4},
             "run dense 0.01": {"val_loss": None}, "run dense seconds": {"val_loss": 1.0}}
    assert one_gpu.best_lr("dense", lines) == 0.05 and one_gpu.best_lr("adamw", lines) == 1e-3


def test_it_goes_on_after_a_stop_and_with_a_line_that_was_cut(made, corpus, tmp_path, capsys):
    shutil.copy(made / "rows.jsonl", tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text("utf-8")[:-40], "utf-8")
    names = [row["name"] for row in lines(made)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_gpu, "LRS", {method: lrs[:1] for method, lrs in one_gpu.LRS.items()})
        one_gpu.main(["--tiny", "--data", str(corpus), "--out", str(tmp_path)])
    assert {*one_gpu.read(path)} == {*names} and "To do, in this order" in capsys.readouterr().out


def test_what_does_not_fit_into_the_minutes_is_left_out(corpus, tmp_path, capsys):
    """And a run needs the line that says how many steps it has."""
    one_gpu.make(one_gpu.TINY, tmp_path, 2 / 60)
    assert capsys.readouterr().out.count("left out") == len([*one_gpu.parts(one_gpu.TINY, {})])
    assert not (tmp_path / "rows.jsonl").exists()


def test_what_fails_does_not_stop_the_others(monkeypatch, corpus, tmp_path, capsys):
    def broken(*args):
        raise RuntimeError("no kernel")
    monkeypatch.setattr(one_gpu, "side_by_side", broken)
    monkeypatch.setattr(one_gpu, "speeds", broken)
    with pytest.raises(SystemExit, match="2"):
        one_gpu.main(["--tiny", "--data", str(corpus), "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert "RuntimeError: no kernel" in out and "tries them again" in err
    assert [*one_gpu.read(tmp_path / "rows.jsonl")] == [
        name for name, *_ in one_gpu.parts(one_gpu.TINY, {})
        if name.startswith("speed") and "side by side" not in name]
    assert (tmp_path / "table.md").is_file()


def test_what_a_run_takes_is_what_was_measured():
    about = {name: seconds for name, seconds, _ in one_gpu.parts(one_gpu.REAL, {"steps": {
        "steps": 100, "seconds": {"spectron": 0.2, "orthogonalize": 0.2, "adamw": 0.1, "dense": 0.5}}})}
    assert about["run dense 0.02"] == 8 + 50 and about["run spectron 0.1"] == 8 + 20


def test_without_a_gpu_or_a_result_it_says_what_to_do(fails, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(one_gpu.main, [], "--tiny")
    fails(one_gpu.main, ["--tiny", "--data", "data/none"], "data/none", "tools.prepare")
    fails(reproduce.main, ["one_gpu"], "python -m paper.one_gpu")
