"""tools/bench.py: its instruments and messages. What it measures is in results/bench, and in no assertion."""

import pytest

from conftest import ROOT
from tools import bench


def test_in_turn_calls_every_arm_alike_and_faster_is_a_ratio():
    calls = []
    seconds = bench.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == list("ab" * 4) and [len(s) for s in seconds.values()] == [3, 3]
    assert bench.faster({"a": [1.0, 2.0, 1.0], "b": [2.0, 4.0, 9.0]}, "a", "b") == 2.0


def test_the_plain_gpt_is_what_the_table_calls_it():
    assert sum(p.numel() for p in bench.PlainGPT().parameters()) == pytest.approx(3.3e6, rel=0.02)


def test_quality_finds_the_promised_singular_values(capsys):
    gaussian, worst = (line.split("|")[2] for line in bench.quality(None))
    low, high = map(float, gaussian.split(" to "))
    assert 0.65 <= low < high <= 1.21
    assert float(worst.split()[2].rstrip(",")) <= 1.21 and "all finite" in worst


def test_predicted_hours_follow_the_formula(capsys):
    bench.main(["predict", "--mfu", "0.5", "--peak", "1e15", "--link", "1e30"])
    hours = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 6 and cells[4].endswith(" h"):
            hours[cells[1]] = [float(cell.split()[0].replace(",", "")) for cell in cells[4:7]]
    with bench.torch.device("meta"):
        flops = (bench.Llama(bench.SIZES["L"]).flops_per_token()
                 * bench.train.paper_steps("L", False) * 2**20)
    assert hours["L"][0] == pytest.approx(flops / 5e14 / 3600, abs=0.06)
    assert hours["L"][1] == pytest.approx(hours["L"][0] / 8, abs=0.1)


def test_misuse_is_named(fails, monkeypatch):
    fails(bench.main, ["speed"], "'speed'", "optimizer", "predict")
    fails(bench.main, ["tokenize"], "--text")
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    fails(bench.main, ["--gpu"], "CUDA", "python -m tools.bench")


def test_decoding_is_timed_beside_dense_weights(run, capsys, fails, monkeypatch):
    monkeypatch.chdir(ROOT)
    bench.main(["decoding", "--run", str(run("--steps", 1, "--size", "nano-0.6M"))])
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split("|")[1].strip() for row in rows] == ["1", "16"] and all("x |" in row for row in rows)
    dense = run("--steps", 1, "--size", "nano-0.6M", "--method", "dense", out="dense")
    fails(bench.main, ["decoding", "--run", dense], "no factors", "low-rank run")
    fails(bench.main, ["decoding"], "--run")
