"""train.py end to end: what a run leaves behind, equal results however it is run, and every misuse with its
message."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

import data
import eval as evaluation
import train
from conftest import ROOT, SMALL_STEPS, TINY
from launch import FLOAT64, ranks_of, train_on
from lib.methods import assert_assigned, flops_per_token, split_parameters
from lib.optimizers import Muon
from lib.ranks import choose_device
from model import Llama, LlamaConfig
from spectron import Spectron
from tools import plot, prepare, sample

KEYS = {"step", "tokens", "flops", "seconds", "loss", "val_loss", "val_tokens", "lr", "dW", "W", "dy",
        "sigma_A", "sigma_B", "rho", "gauge", "divisor"}


def records(run):
    return plot.read_log(run)[1]


def records_config(run):
    return plot.read_log(run)[0]["config"]


def weights(run):
    return torch.load(run / "ckpt.pt", weights_only=True)["model"]


def largest_difference(one, two):
    return max(float((one[name] - two[name]).abs().max()) for name in one)


# --------------------------------------------- What a run does ----------------------------------------------

@pytest.mark.whole_end
def test_a_run_learns_and_leaves_a_log_a_checkpoint_and_a_figure(run, capsys):
    out = run("--steps", 30, "--eval_every", 10, "--spectra_every", 5)
    header, rows = plot.read_log(out)
    assert (header["argv"][-4:] == ["--eval_every", "10", "--spectra_every", "5"]
            and header["versions"]["torch"])
    assert header["config"]["lr"] == train.METHODS["spectron"].nano_lr and header["hardware"]["cores"] >= 1
    assert ([row["step"] for row in rows] == [1, 5, 10, 15, 20, 25, 30]
            and all(set(row) == KEYS for row in rows))
    assert [row["step"] for row in rows if row["val_loss"] is not None] == [10, 20, 30]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1 and rows[-1]["tokens"] == 30 * 256
    assert rows[-1]["flops"] == (
        rows[-1]["tokens"] * flops_per_token(Llama(LlamaConfig(**header["config"]["model"]))))
    printed = capsys.readouterr().out
    end = dict(row.split(": ", 1) for row in printed.split("---\n")[-1].strip().splitlines())
    assert float(end["val_loss"]) == pytest.approx(rows[-1]["val_loss"], abs=1e-4)
    assert float(end["perplexity"]) == pytest.approx(math.exp(rows[-1]["val_loss"]), rel=1e-3)
    assert all((out / name).stat().st_size > 0 for name in ("log.jsonl", "ckpt.pt", "loss.png"))
    assert end["log"] == str(out / "log.jsonl") and "sample:" in printed
    assert "8 sequences x 32 tokens x 1 rank(s) x 1 micro-step(s) = 256 tokens a step" in printed


@pytest.mark.parametrize("flags", [
    ["--no-orthogonalize"], ["--no-renormalize"], ["--no-orthogonalize", "--no-renormalize"],
    ["--no-nesterov"], ["--shape_scale"], ["--rank_ratio", 1.0], ["--factorize", "ffn"],
    ["--factorize", "ffn", "--muon_lr", 0.01], ["--weight_decay", 0.1],
    ["--ns_steps", 3, "--power_steps", 2], ["--method", "adamw"], ["--method", "dense"],
    ["--method", "dense-adamw"], ["--method", "adamw", "--factorize", "ffn"], ["--dtype", "bfloat16"],
    ["--spectra_of", "blocks.0.ffn.down_proj"]])
def test_every_method_and_ablation_trains_and_logs_finite_norms(run, flags):
    rows = records(run("--steps", 3, *flags))
    known = {"dW", "W", "gauge"}
    if "dense" not in str(flags) and "ffn" not in flags:
        known |= {"sigma_A", "sigma_B"}
    if known >= {"sigma_A"} and "adamw" not in flags:
        known |= {"rho"}
    for row in rows:
        assert {key for key in ("dW", "W", "gauge", "sigma_A", "sigma_B", "rho")
                if row[key] is not None} == known
        assert row["dW"] > 0 and row["lr"] > 0
    assert rows[-1]["loss"] < 6.0


@pytest.mark.parametrize("flags, name", [
    ([], "gauge"), (["--no-orthogonalize"], "gauge"), (["--method", "equilibrated"], "gauge"),
    (["--factorize", "ffn", "--spectra_of", "blocks.0.ffn.up_proj"], "gauge"),
    (["--factorize", "ffn"], "dW/lr"),
    (["--no-renormalize"], "dW/lr"), (["--weight_decay", 0.1], "dW/lr"), (["--shape_scale"], "dW/lr"),
    (["--method", "equilibrated", "--no-renormalize"], "dW/lr"), (["--method", "adamw"], "dW/lr"),
    (["--method", "dense"], "dW/lr"), (["--method", "lora-muon"], "dW/lr")])
def test_the_column_is_called_gauge_where_lr_bounds_the_step(run, capsys, flags, name):
    row = records(run("--steps", 2, *flags))[-1]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step      2/2"))
    assert f"  {name} {row['gauge']:7.4f}  " in line and line.count("gauge") == (name == "gauge")
    assert "MFU" not in line  # of a CPU no peak is known
    assert name != "gauge" or row["gauge"] <= 1.21


def test_log_and_end_say_on_how_many_tokens_the_validations_are(run, capsys):
    out = run("--steps", 4, "--eval_every", 2, "--eval_tokens", 64, "--spectra_every", 3)
    all_of_it = data.open_split(records_config(out)["data"], "val", 32, "bytes").windows * 32
    assert [row["val_tokens"] for row in records(out)] == [None, 64, None, all_of_it]
    assert f"val_tokens: {all_of_it} (64 in the validations before)\n" in capsys.readouterr().out
    run("--steps", 4, "--eval_every", 2, out="same")
    assert f"val_tokens: {all_of_it}\n" in capsys.readouterr().out


def test_the_time_left_is_that_until_stop_at(run, capsys):
    run("--steps", 10**6, "--stop_at", 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2 and lines[-1].endswith(" 0:00:00 left")


def test_the_logged_norms_are_those_of_the_products(run):
    """From the weights before and after the last step, formed in full."""
    out = run("--steps", 6, "--stop_at", 5, "--spectra_of", "blocks.0.ffn.up_proj", "--weight_decay", 0.1)
    before = weights(out)
    train.main(["--resume", "--out", str(out)])
    after, row = weights(out), records(out)[-1]
    (A0, B0), (A, B) = ([w[f"blocks.0.ffn.up_proj.{x}"].double() for x in "AB"] for w in (before, after))
    exact = {"dW": A @ B.T - A0 @ B0.T, "W": A @ B.T, "sigma_A": A0, "sigma_B": B0}
    for key, matrix in exact.items():
        norm = torch.linalg.matrix_norm(matrix, ord=2).item()
        assert row[key] == pytest.approx(norm, rel=0.05 if "sigma" in key else 1e-6)
        assert row[key] <= norm * (1 + 1e-6)  # a power iteration comes from below
    assert row["gauge"] == pytest.approx(row["dW"] / row["lr"])
    assert row["rho"] == pytest.approx(row["lr"] / (row["sigma_A"] + row["sigma_B"] + 1))


def test_the_schedule_warms_up_over_5_percent_falls_as_a_cosine_and_never_is_zero():
    for steps in (1, 2, 19, 100, 600):
        fractions = [train.schedule(step, steps) for step in range(steps)]
        warmup = math.ceil(0.05 * steps)
        assert min(fractions) > 0 and max(fractions) == fractions[warmup - 1] == 1.0
        assert fractions[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
        assert all(a >= b for a, b in zip(fractions[warmup - 1:], fractions[warmup:]))
    assert train.schedule(5 + 95 // 2, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi * 47 / 95)))


def test_every_parameter_has_one_optimizer():
    model = Llama(LlamaConfig(16, 1, 2, vocab_size=20, seq_len=8))
    pairs, dense, others = split_parameters(model)
    good = [Spectron(pairs, 0.1), torch.optim.AdamW(others)]
    assert_assigned(model, good)
    for bad in (good[:1], good + [torch.optim.AdamW(others[:1])]):
        with pytest.raises(AssertionError, match="one optimizer"):
            assert_assigned(model, bad)


def test_gradients_are_clipped_to_norm_one_before_the_step(run, monkeypatch):
    norms, clip = [], train.clip_gradients

    def norm_of(model):
        return torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()

    def spy(model, norm, *args):
        assert norm == pytest.approx(norm_of(model), rel=1e-5)
        clip(model, norm, *args)
        norms.append((norm, norm_of(model)))
    monkeypatch.setattr(train, "clip_gradients", spy)
    run("--steps", 3)
    assert len(norms) == 3 and max(before for before, _ in norms) > 1
    assert all(after == pytest.approx(min(1, before), rel=1e-4) for before, after in norms)


# ----------------------------------------- Equal, however it is run -----------------------------------------

def test_accumulation_over_1_2_and_4_micro_steps_is_alike(run, float64):
    runs = [run("--steps", 8, "--batch_size", size, *SMALL_STEPS, out=f"batch-{size}") for size in (8, 4, 2)]
    for other in runs[1:]:
        assert largest_difference(weights(runs[0]), weights(other)) < 1e-9
        for a, b in zip(records(runs[0]), records(other)):
            assert a["loss"] == pytest.approx(b["loss"], abs=2e-6)  # a loss is a float32: of 6, 5e-7 apart


@pytest.mark.parametrize("flags", [[], ["--method", "dense"]], ids=str)
def test_stop_and_resume_is_bit_for_bit_the_run_that_was_not_stopped(run, flags):
    whole = run(*flags, "--steps", 20, "--eval_every", 5, out="whole")
    out = run(*flags, "--steps", 20, "--eval_every", 5, "--stop_at", 10, out="parts")
    train.main(["--resume", "--out", str(out)])
    assert all(torch.equal(w, weights(out)[name]) for name, w in weights(whole).items())
    for a, b in zip(records(whole), records(out), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_two_ranks_equal_one_process_and_each_other(run, float64, corpus, tmp_path):
    """2 micro-steps on 2 ranks: gradients have to be averaged, and all-reduced with the last micro-step. In
    the end no thread of the process group is left: now and then it would abort the interpreter's exit."""
    flags = ["--data", corpus, "--steps", 6, "--eval_every", 3]
    run(*flags, out="one")
    before = FLOAT64 + """import train
kept, assigned = [], train.assert_assigned
train.assert_assigned = lambda model, optimizers: (kept.append(model), assigned(model, optimizers))
"""
    flags += ["--batch_size", 2, "--out", tmp_path / "two"]
    said, warned = train_on(tmp_path, 2, flags, before, after="""
import os, torch
torch.save(kept[0].state_dict(), "rank" + os.environ["RANK"] + ".pt")
tasks = "/proc/self/task"
names = [open(f"{tasks}/{task}/comm").read() for task in os.listdir(tasks)] if os.path.isdir(tasks) else []
assert not any("gloo" in name for name in names), names
""")
    assert "Warning" not in warned
    assert "2 sequences x 32 tokens x 2 rank(s) x 2 micro-step(s) = 256 tokens a step" in said
    assert weights(tmp_path / "one")["head.weight"].dtype == torch.float64
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-9
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-6)
        if a["val_loss"]:
            assert a["val_loss"] == pytest.approx(b["val_loss"], abs=2e-6)
    zero, one = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(zero[name], one[name]) for name in zero)


def test_validation_is_on_the_validation_text_and_independent_of_the_batch_size(trained_once, corpus):
    out = trained_once("--steps", 3)
    model, tokenizer, config = evaluation.load_run(out)
    val = data.open_split(corpus, "val", 32, "bytes")
    lengths = data.token_bytes(tokenizer)
    scores = [evaluation.validate(model, val, 10**9, size, "float32", lengths) for size in (1, 7, 64)]
    x, y = val.read(range(val.windows))
    with torch.no_grad():
        logits = model(x)[..., :tokenizer.n_vocab].double()  # without the padding of the vocabulary
        exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    text = sum(1 for token in y.flatten().tolist() if token != tokenizer.eot_token)
    for score in scores:
        assert score["val_loss"] == pytest.approx(exact.mean().item(), abs=1e-6)
        assert score["bits_per_byte"] == pytest.approx(exact.sum().item() / math.log(2) / text, rel=1e-6)
        assert (score["perplexity"] == pytest.approx(math.exp(score["val_loss"]))
                and score["val_tokens"] == y.numel())
    assert scores[0]["val_loss"] == pytest.approx(records(out)[-1]["val_loss"], abs=1e-6)
    first = evaluation.validate(model, val, 64, 8, "float32")
    assert first["val_tokens"] == 64 and first["bits_per_byte"] is None
    assert first["val_loss"] == pytest.approx(exact[:64].mean().item(), abs=1e-6)


# ------------------------------------------------ Divergence ------------------------------------------------

def test_a_non_finite_gradient_stops_before_the_weights_and_keeps_the_checkpoint(run, fails, monkeypatch):
    out = run("--steps", 10, "--stop_at", 4, "--save_every", 1000)
    checkpoint = (out / "ckpt.pt").read_bytes()
    models, backward = [], train.backward

    def poisoned(network, *args):
        loss = backward(network, *args)
        models.append(({n: p.detach().clone() for n, p in network.named_parameters()}, network))
        if len(models) == 3:
            dict(network.named_parameters())["blocks.0.ffn.up_proj.B"].grad[0, 0] = math.nan
            dict(network.named_parameters())["blocks.1.ffn.up_proj.B"].grad[0, 0] = math.inf
        return loss
    monkeypatch.setattr(train, "backward", poisoned)
    fails(train.main, ["--resume", "--out", out], "step 7", "lr ", "blocks.0.ffn.up_proj.B", "checkpoint")
    kept, network = models[-1]
    assert all(torch.equal(p, kept[name]) for name, p in network.named_parameters())
    assert (out / "ckpt.pt").read_bytes() == checkpoint


def test_a_run_that_diverges_at_its_end_still_ends_with_its_results(run, capsys):
    out = run("--steps", 1, "--lr", 1e30)
    assert records(out)[-1]["val_loss"] is None and "val_loss: None" in capsys.readouterr().out


# -------------------------------------------------- Misuse --------------------------------------------------

@pytest.mark.parametrize("flags, fragments", [
    (["--rank_rato", "0.5"], ["--rank_rato", "--rank_ratio"]), (["--step", "3"], ["--step", "--steps"]),
    (["--no-renorm"], ["--no-renorm", "--no-renormalize"]), (["extra"], ["extra"]),
    (["--rank_ratio", "0"], ["--rank_ratio: '0'", "(0, 1]"]),
    (["--rank_ratio", "1.5"], ["--rank_ratio", "1.5"]),
    (["--tokens_per_step", "1000"], ["--tokens_per_step 1000", "--tokens_per_step 1024"]),
    (["--batch_size", "3"], ["--batch_size 3", "16 sequences", "--batch_size 2"]),
    (["--method", "adamw", "--no-orthogonalize"],
     ["--no-orthogonalize does not apply to --method adamw", "spectron"]),
    (["--method", "dense", "--rank_ratio", "0.5"], ["--rank_ratio does not apply to --method dense"]),
    (["--method", "dense-adamw", "--ns_steps", "3"], ["--ns_steps", "spectron or dense"]),
    (["--no-orthogonalize", "--ns_steps", "3"], ["--ns_steps has no effect without --orthogonalize"]),
    (["--seed", str(2**70)], ["--seed", "whole number"]),
    (["--resume", "--overwrite", "--out", "x"], ["--overwrite"]),
    (["--muon_lr", "0.1"], ["--muon_lr", "--factorize ffn"]),
    (["--momentum", "1"], ["--momentum", "below 1"]),
    (["--steps", "0"], ["--steps", "at least 1"]), (["--lr", "-1"], ["--lr", "at least 0"]),
    (["--lr", "nan"], ["--lr", "nan"]), (["--lr", "inf"], ["--lr", "inf"]),
    (["--data", "nowhere"], ["nowhere", "python -m tools.prepare text"]),
    (["--size", "S"], ["data/fineweb", "tools.download"]),
    (["--spectra_of", "blocks.9.x"], ["blocks.9.x", "blocks.2.attention.o_proj"]),
    (["--size", "XL"], ["XL", "nano"]),
    (["--resume"], ["--out"]), (["--resume", "--out", "nowhere"], ["nowhere", "python train.py"]),
    (["--equilibrate", "1"], ["it is --method equilibrated"]),
    (["--learning_rate", "0.1"], ["unknown flag or argument --learning_rate; here it is --lr"]),
    (["--learning-rate=0.1"], ["--learning-rate; here it is --lr"]),
    (["--optimizer", "adamw"], ["here it is --method"]), (["--epochs", "3"], ["here it is --steps"]),
    (["--max_steps", "3"], ["here it is --steps"]), (["--iters", "3"], ["here it is --steps"]),
    (["--log_every", "5"], ["it is --spectra_every"]), (["--logging_steps", "5"], ["it is --spectra_every"]),
    (["--grad_accum", "4"], ["--tokens_per_step", "--batch_size"]),
    (["--bs", "3"], ["--batch_size", "--tokens_per_step"]), (["--wd", "0.1"], ["it is --weight_decay"]),
    (["--width", "64"], ["--size nano-2x64"]), (["--rank", "64"], ["--rank_ratio", "input width"]),
    (["--method", "muon"], ["--method muon: no such method", "Muon on dense weights is --method dense",
                            "on the factors --no-renormalize", "spectron, adamw", "sltrain",
                            "baselines/muon.py"]),
    *((["--method", wrong], [f"Did you mean --method {right}?", "There are spectron"])
      for wrong, right in (("adam", "adamw"), ("galore-", "galore"), ("spectro", "spectron"))),
    (["--method", "sgd"], ["SGD on the factors is --no-orthogonalize --no-renormalize", "spectron, adamw"]),
    (["--out", ""], ["--out is empty"]),
    (["--data", ""], ["--data is empty"]), (["--steps", "many"], ["many"])])
def test_misuse_gets_one_message_before_anything_is_written(fails, tmp_path, monkeypatch, flags, fragments):
    monkeypatch.chdir(tmp_path)
    fails(train.main, flags, *fragments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size, device, expected", [("L", "cuda", 8), ("L", "cpu", 1), ("nano", "cuda", 16)])
def test_the_default_batch_size_is_one_that_fits_into_memory(size, device, expected):
    c = train.resolve(train.parse(["--size", size, "--device", device, "--dry_run"]))
    assert c.batch_size == expected and c.micro_steps * expected * c.seq_len == c.tokens_per_step


def test_two_ranks_without_data_say_so_once(tmp_path):
    ranks = ranks_of(2, "import sys, train\ntrain.main(sys.argv[1:])", [*TINY, "--data", "nowhere"], tmp_path)
    said = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2] and "nowhere" in said[0] and not said[1]


def test_mps_which_is_untested_has_to_be_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (choose_device(), choose_device("mps")) == ("cpu", "mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
def test_cuda_that_is_not_there_is_said(fails):
    fails(train.main, ["--device", "cuda"], "--device cuda", "--device cpu")


def test_a_directory_that_has_something_in_it_is_kept(run, fails, corpus, tmp_path):
    out = run("--steps", 2)
    again = [*TINY, "--data", corpus, "--out", out, "--steps", 2]
    fails(train.main, again, str(out), "--resume", "--overwrite")
    fails(train.main, ["--resume", "--out", out], "step 2 of 2", "python eval.py")
    fails(train.main, ["--resume", "--out", out, "--lr", "0.3", "--seed", "4", "--batch_size", "4"],
          "--lr 0.3 (was 0.2)", "--seed 4 (was 0)")
    train.main([str(flag) for flag in again] + ["--overwrite"])
    assert [row["step"] for row in records(out)] == [1, 2]


def test_resume_takes_data_that_has_moved_and_refuses_other_data(run, fails, corpus, tmp_path):
    (tmp_path / "d").symlink_to(corpus)
    out = run("--steps", 4, "--stop_at", 2, "--data", tmp_path / "d")
    (tmp_path / "d").unlink()
    fails(train.main, ["--resume", "--out", out], tmp_path / "d", "tools.prepare text", "--data",
          "--tokenizer bytes")
    fails(evaluation.main, [out], tmp_path / "d", "--data")
    train.main(["--resume", "--out", str(out), "--data", str(corpus), "--stop_at", "3"])
    assert records(out)[-1]["step"] == 3
    other = [f"other {i} " * 99 for i in range(99)]
    prepare.write_corpus(other, "bytes", tmp_path / "d", "test", quiet=True)
    fails(train.main, ["--resume", "--out", out, "--data", tmp_path / "d"], "the directory that holds those")
    (tmp_path / "d" / "meta.json").write_text('{"tokenizer": "gpt2"}')
    fails(train.main, ["--resume", "--out", out, "--data", tmp_path / "d"], "made with tokenizer 'gpt2'",
          "'bytes' is needed")
    fails(evaluation.main, [out, "--data", tmp_path / "d"], "made with tokenizer 'gpt2'", "'bytes'")


def test_eval_reads_validation_shards_alone(trained_once, corpus, tmp_path):
    out = trained_once("--steps", 1)
    (tmp_path / "val").mkdir()
    for name in "val_000000.bin", "meta.json":
        (tmp_path / "val" / name).symlink_to(corpus / name)
    evaluation.main([str(out), "--data", str(tmp_path / "val"), "--device", "cpu"])


@pytest.mark.parametrize("left", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": ""}, {"LOCAL_RANK": "x"},
                                  {"RANK": "1", "WORLD_SIZE": "2"}, {"MASTER_ADDR": "host"}])
def test_an_environment_left_over_from_elsewhere_changes_nothing(run, monkeypatch, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert records(run("--steps", 1))[-1]["step"] == 1


def test_a_run_survives_a_foreign_plot_backend_and_a_terminal_without_utf8(corpus, tmp_path):
    """As a notebook's child or a Latin-1 terminal starts it, and with a method whose file imports train.py;
    and no run begins with a warning."""
    out = tmp_path / "r\u00fcn"
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *TINY, "--data", corpus, "--steps", "2", "--out", out,
         "--method", "equilibrated"], text=True, capture_output=True, encoding="latin-1", env={
            **os.environ, "MPLBACKEND": "module://not_here", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0",
            "LC_ALL": "C", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (out / "loss.png").stat().st_size > 1000 and "r?" in done.stdout


def test_unnamed_runs_get_the_next_free_directory(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train.main([*TINY, "--data", str(corpus), "--steps", "1"])
    assert sorted(os.listdir("out")) == ["nano-0.6M-spectron-00", "nano-0.6M-spectron-01"]


def test_files_that_are_no_runs_are_refused(tmp_path, fails):
    (tmp_path / "log.jsonl").write_text("not a log\n")
    fails(plot.main, [tmp_path], "not a log")
    fails(plot.main, [tmp_path / "none"], "no log")
    fails(evaluation.main, [tmp_path / "none"], "no checkpoint")
    for content in (b"", b"not a checkpoint"):
        (tmp_path / "ckpt.pt").write_bytes(content)
        fails(evaluation.main, [tmp_path], "damaged", "ckpt.pt")
        fails(train.main, ["--resume", "--out", tmp_path], "damaged")
    fails(train.main, ["--resume", "--out", tmp_path / "ckpt.pt"], "no such directory")


def test_a_damaged_checkpoint_is_refused(run, fails):
    out = run("--steps", 4, "--stop_at", 2)
    whole = torch.load(out / "ckpt.pt", weights_only=True)
    for damage in ({"optimizers": whole["optimizers"][:1]}, {"model": {}}, {"config": {}},
                   {"model": torch.zeros(3)}):
        torch.save({**whole, **damage}, out / "ckpt.pt")
        fails(train.main, ["--resume", "--out", out], "damaged")
    torch.save(torch.zeros(3), out / "ckpt.pt")
    fails(evaluation.main, [out], "damaged")


@pytest.mark.parametrize("main, flags, fragments", [
    (evaluation.main, ["--batch_size", "-1"], ["--batch_size", "at least 1"]),
    (evaluation.main, ["--eval_tokens", "0"], ["--eval_tokens", "at least 1"]),
    (sample.main, ["--top_k", "0"], ["--top_k", "at least 1"]),
    (plot.main, ["-o", "fig.xyz"], ["fig.xyz", ".png"]),
    (plot.main, ["-o", "no/such/fig.png"], ["no/such/fig.png"])])
def test_misuse_of_the_other_commands_gets_one_message(trained_once, fails, main, flags, fragments):
    fails(main, [trained_once("--steps", 1), *flags], *fragments)


def test_out_that_can_not_be_made_is_one_message(fails, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "sub"):
        fails(train.main, [*TINY, "--data", corpus, "--steps", 1, "--out", out, "--overwrite"], out)


# ----------------------------------------- Flags reach their place ------------------------------------------

def optimizers_of(*flags):
    c = train.resolve(train.parse([*TINY, *map(str, flags)]))
    return train.METHODS[c.method].optimizers(Llama(LlamaConfig(**c.model)), c)


def test_every_flag_of_spectron_reaches_it():
    flags = {"lr": 0.3, "momentum": 0.7, "weight_decay": 0.01, "ns_steps": 4, "power_steps": 2}
    given = [x for flag, value in flags.items() for x in (f"--{flag}", value)]
    spectron, adam = optimizers_of(*given, "--no-nesterov", "--shape_scale", "--adam_lr", 0.004)
    group = spectron.param_groups[0]
    assert {key: group[key] for key in flags} == flags and group["ns_dtype"] is None
    toggles = {"nesterov": False, "shape_scale": True, "orthogonalize": True, "renormalize": True}
    assert {key: group[key] for key in toggles} == toggles
    assert [g["lr"] for g in adam.param_groups] == [0.004, 0.004]
    assert [g["weight_decay"] for g in adam.param_groups] == [0.01, 0.0]
    assert adam.param_groups[0]["betas"] == (0.9, 0.95)
    group = optimizers_of("--no-orthogonalize", "--dtype", "bfloat16")[0].param_groups[0]
    assert (group["orthogonalize"], group["renormalize"], group["ns_dtype"]) == (False, True, torch.bfloat16)
    assert optimizers_of("--no-renormalize")[0].param_groups[0]["renormalize"] is False


def test_every_flag_of_the_other_methods_reaches_its_optimizer():
    flags = {"lr": 0.3, "momentum": 0.7, "weight_decay": 0.01, "ns_steps": 4}
    given = [x for flag, value in flags.items() for x in (f"--{flag}", value)]
    muon, adam = optimizers_of("--method", "dense", *given, "--no-nesterov", "--adam_lr", 0.004)
    group = muon.param_groups[0]
    assert {key: group[key] for key in flags} == flags and group["nesterov"] is False
    assert isinstance(muon, Muon) and adam.param_groups[0]["lr"] == 0.004
    spectron, muon, adam = optimizers_of("--factorize", "ffn", "--lr", 0.3, "--muon_lr", 0.05)
    assert (spectron.param_groups[0]["lr"], muon.param_groups[0]["lr"]) == (0.3, 0.05)
    assert [len(o.param_groups[0]["params"]) for o in (spectron, muon)] == [2 * 3 * 2, 4 * 2]
    for method in ("adamw", "dense-adamw"):
        matrices, others = optimizers_of("--method", method, "--lr", 0.3, "--adam_lr", 0.004)
        assert (matrices.param_groups[0]["lr"], others.param_groups[0]["lr"]) == (0.3, 0.004)


def test_seed_decides_the_data_and_eval_tokens_the_validation(run, monkeypatch):
    first = [records(run("--steps", 1, "--seed", seed, out=f"seed-{seed}"))[0]["loss"] for seed in (0, 1)]
    assert first[0] != first[1]
    seen, validate = [], train.validate
    monkeypatch.setattr(train, "validate", lambda *args: seen.append(args[2]) or validate(*args))
    run("--steps", 2, "--eval_every", 1, "--eval_tokens", 64, out="eval")
    assert seen == [64, 100_000_000]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon to compare with")
@pytest.mark.parametrize("shape", [(40, 20), (20, 40)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs_muon_up_to_the_rounding_of_its_products(shape, nesterov):
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    settings = dict(lr=0.1, momentum=0.9, nesterov=nesterov, ns_steps=5, weight_decay=0.1)
    one, other = Muon([ours], **settings), torch.optim.Muon([theirs], **settings)
    start = ours.detach().clone()
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()  # theirs is rounded to 8 bits


@pytest.mark.parametrize("shape", [(40, 20), (20, 40)])
def test_muon_moves_a_batch_of_matrices_as_it_moves_each(shape):
    """A batch is what it makes on a GPU."""
    each, batch = ([torch.nn.Parameter(torch.randn(shape)) for _ in range(3)] for _ in range(2))
    one, other = (Muon(p, lr=0.1, momentum=0.9, nesterov=True, ns_steps=5, weight_decay=0.1)
                  for p in (each, batch))
    for p, q in zip(each, batch):
        q.data.copy_(p.data)
        p.grad = torch.randn(shape)
        q.grad = p.grad.clone()
        other.state[q]["momentum_buffer"] = torch.zeros(shape)
    one.step()
    with torch.no_grad():
        other.update(batch, other.param_groups[0])
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(each, batch))


# ------------------------------------------ Plans, scores, figures ------------------------------------------

def test_a_dry_run_trains_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--size", "S", "--dry_run"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("121,7", "2,556 steps", "27 shard(s)", "FLOPs", "tokens a step"))
    assert os.listdir(tmp_path) == []


def test_eval_repeats_the_score_of_the_run(trained_once, capsys, tmp_path):
    out = trained_once("--steps", 3)
    capsys.readouterr()
    evaluation.main([str(out), "--json", str(tmp_path / "scores.json"), "--device", "cpu"])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["val_loss"] == pytest.approx(records(out)[-1]["val_loss"], abs=1e-6)
    assert f"val_loss: {scores['val_loss']}" in capsys.readouterr().out
