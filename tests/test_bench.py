"""paper/bench.py: its instruments, its messages, and that each part runs. No assertion is about a time."""

import json
from pathlib import Path

import pytest
import torch

import eval as evaluation
from conftest import ROOT, TINY
from lib.methods import flops_per_token
from paper import bench

SMALL = "nano-0.6M"


@pytest.fixture
def once(monkeypatch):
    """Every method is called once, without a warm-up, and takes a second."""
    def in_turn(methods, rounds):
        for method in methods.values():
            method()
        return {name: [1.0] for name in methods}
    monkeypatch.setattr(bench, "in_turn", in_turn)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)


@pytest.fixture
def flags(corpus):
    return f"{' '.join(TINY)} --data {corpus}"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_in_turn_calls_every_arm_alike_and_once_without_a_clock():
    calls = []
    seconds = bench.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == list("ab" * 4) and [len(s) for s in seconds.values()] == [3, 3]


def test_rows_compare_the_first_arm_with_the_others_by_medians():
    seconds = {"a": [1.0, 2.0, 1.0], "b": [2.0, 4.0, 9.0], "c": [0.5, 0.5, 0.5]}
    assert [*bench.rows(seconds)] == ["| a | 1 s | b: 4 s | 2.00x |", "| a | 1 s | c: 0.5 s | 0.50x |"]
    assert next(bench.rows(seconds, 3000, "tokens")) == "| a | 3,000.0 tokens/s | b: 750.0 tokens/s | 2.00x |"


def test_a_step_of_the_bench_is_a_step_of_train_py(run, flags):
    """The weights after it are those of a run, bit for bit."""
    trained, _, _ = evaluation.load_run(run("--steps", 1))
    trainer = bench.Trainer(f"{flags} --steps 1")
    trainer.step()
    for name, p in trained.named_parameters():
        assert torch.equal(p, trainer.model.get_parameter(name)), name


def test_the_plain_gpt_has_the_parameters_that_the_bench_says():
    assert sum(p.numel() for p in bench.PlainGPT().parameters()) == pytest.approx(3.3e6, rel=0.02)


def test_the_plain_gpt_is_causal():
    gpt, tokens, out = bench.PlainGPT(), torch.randint(320, (1, 16)), []
    other = tokens.clone()
    other[0, 8:] = 0
    gpt.blocks.register_forward_hook(lambda module, inputs, output: out.append(output))
    for text in tokens, other:
        gpt(text, text)
    assert torch.allclose(out[0][:, :8], out[1][:, :8], atol=1e-5)
    assert not torch.allclose(out[0][:, 8:], out[1][:, 8:], atol=1e-5)


@pytest.mark.parametrize("part", ["optimizer", "sequence", "init", "memory"])
def test_a_part_that_needs_no_corpus_makes_its_rows(once, part):
    rows = [*bench.CPU[part](SMALL)]
    assert rows and all(len(cells(row)) == 4 and SMALL in row for row in rows)


@pytest.mark.parametrize("part, against", [("nano", ["dense", "GPT"]), ("batches", ["a step"]),
                                           ("start", ["import torch"])])
def test_a_part_that_reads_the_corpus_makes_its_rows(once, flags, part, against):
    rows = [cells(row) for row in bench.CPU[part](flags)]
    assert [len(row) for row in rows] == [4] * len(against)
    assert all(word in row[2] for word, row in zip(against, rows))


def test_seconds_are_those_of_every_way_to_train_that_a_table_compares(monkeypatch, tmp_path):
    made = []

    class Trainer:
        def __init__(self, flags, random):
            made.append(flags)

        def step(self):
            pass
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "Trainer", Trainer)
    assert "results/seconds/nano.json: " in next(bench.seconds("nano", 1))
    written = json.loads(Path("results/seconds/nano.json").read_text())
    committed = json.loads((ROOT / "results/seconds/nano.json").read_text())
    assert list(written["seconds"]) == list(committed["seconds"]) and len(made) == len(written["seconds"])
    assert written["command"] == committed["command"] == "python -m paper.bench seconds --scale nano"
    next(bench.seconds("S", 1))
    assert list(json.loads(Path("results/seconds/S.json").read_text())["seconds"]) == ["spectron", "dense"]


def test_tokenize_writes_shards_beside_tiktoken(once, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A sentence of seven words stands here.\n\n" * 1000, encoding="utf-8")
    row, = bench.tokenize([text], "bytes")
    assert "documents" in row and "tiktoken" in row and "MB/s" in row
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_decoding_is_timed_beside_dense_weights(once, run, capsys, fails):
    bench.main(["decoding", "--run", str(run("--steps", 1))])
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert all("float32, cpu" in row and "dense: " in row for row in rows)
    assert "decoding 1 text" in rows[0] and "decoding 16 text" in rows[1]
    dense = run("--steps", 1, "--method", "dense", out="dense")
    fails(bench.main, ["decoding", "--run", dense], "no factors", "low-rank run")


def test_the_parts_of_a_gpu_run_on_any_device(once):
    head, low_rank, dense = bench.gpu((SMALL,), "cpu", (False,), batch=2)
    titles, = {len(cells(row)) for row in (head.splitlines()[0], low_rank, dense)}
    assert titles == 7 and "2 x 256" in low_rank and "n/a" in low_rank and f"{SMALL}, dense" in dense


def test_a_batch_that_does_not_fit_a_gpu_is_halved(monkeypatch):
    def row(size, method, compile, device, batch, rounds):
        if batch > (4 if method == "spectron" else 0):
            raise torch.OutOfMemoryError
        return f"{method} {batch}"
    monkeypatch.setattr(bench, "gpu_row", row)
    assert [*bench.gpu((SMALL,), "cpu", (False,), batch=16)][1:] == ["spectron 4"]


def test_predicted_hours_follow_the_formula(capsys):
    bench.main(["predict", "--mfu", "0.5", "--peak", "1e15", "--link", "1e30"])
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if " h |" in line]
    hours = {row[0]: [float(cell.split()[0].replace(",", "")) for cell in row[3:6]] for row in rows}
    with torch.device("meta"):
        flops = flops_per_token(bench.Llama(bench.SIZES["L"])) * bench.train.paper_steps("L", False) * 2**20
    assert hours["L"][0] == pytest.approx(flops / 5e14 / 3600, abs=0.01)
    assert hours["L"][1] == pytest.approx(hours["L"][0] / 8, abs=0.01)


def test_all_parts_together_write_a_table_and_some_of_them_do_not(capsys, monkeypatch, tmp_path):
    def part():
        yield bench.row("what", 1, 2, "0.50x")
    monkeypatch.setattr(bench, "CPU", {"optimizer": part, "nothing": part})
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "bench")
    bench.main(["optimizer"])
    assert not (tmp_path / "bench").exists()
    capsys.readouterr()
    bench.main([])
    written = (tmp_path / "bench" / "cpu.md").read_text("utf-8")
    assert written.startswith("commit ") and written.count("| what | 1 | 2 | 0.50x |") == 2
    assert capsys.readouterr().out.startswith(written)


def test_misuse_is_named(fails, monkeypatch):
    fails(bench.main, ["speed"], "'speed'", "optimizer", "predict")
    fails(bench.main, ["tokenize"], "--text FILE")
    fails(bench.main, ["decoding"], "--run out/run")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(bench.main, ["--gpu"], "CUDA", "python -m paper.bench")
