"""Kinds of fault that are reported of programs like this one: layers that start at zero, models of others,
output that fails, signals, advice. docs/FAULTS.md has the promises."""

import json
import os
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import eval as evaluation
import train
from conftest import TINY
from launch import SHORT_END, Child
from lib.checkpoints import load_checkpoint
from lib.cli import rank_and_ranks
from lib.files import replacing
from lib.optimizers import adamw
from lib.run_directory import cut_log
from model import FactorizedLinear, factorize_
from spectron import Spectron
from tools import plot


# ------------------------------------------- Layers that start at zero --------------------------------------

class Residual(nn.Module):
    """x + W2 relu(W1 x), with W2 at zero: the identity, as modern trainers start."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def learned(model, pairs, spectron: dict | None) -> tuple[float, float]:
    """The loss at the start and at the end of learning to turn a vector around."""
    factors = [p for pair in pairs for p in pair]
    others = [p for p in model.parameters() if not any(p is f for f in factors)]
    optimizers = [torch.optim.Adam(others + (factors if spectron is None else []), lr=3e-3)]
    if spectron is not None:
        optimizers.append(Spectron(pairs, **spectron))
    x, losses = torch.randn(128, 16), []
    for _ in range(150):
        loss = (model(x) - x.flip(1)).square().mean()
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return losses[0], losses[-1]


@pytest.mark.parametrize("spectron", [None, {"lr": 0.1}, {"lr": 0.02, "renormalize": False}])
def test_a_residual_block_with_an_output_layer_at_zero_learns(spectron):
    model = Residual()
    pairs = factorize_(model, 0.5)
    start, end = learned(model, pairs, spectron)
    dense_start, _ = learned(Residual(), [], None)
    assert start == pytest.approx(dense_start, rel=0.3) and end < 0.5 * start
    assert model.down.A.norm() > 0.01 and model.down.B.norm() > 0.01


@pytest.mark.parametrize("m, n", [(30, 12), (12, 30), (16, 16)])
@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_a_weight_of_a_lower_rank_is_kept_and_leaves_no_direction_dead(m, n, true_rank):
    W = torch.randn(m, true_rank) @ torch.randn(true_rank, n)
    layer = FactorizedLinear(n, m, 6)
    layer.set_weight(W)
    assert torch.allclose(layer.A @ layer.B.T, W, atol=1e-5)
    lengths = torch.stack([layer.A.norm(dim=0), layer.B.norm(dim=0)])
    assert (lengths.max(0).values > 0.1).all() and int((lengths.min(0).values > 0).sum()) == true_rank


# ---------------------------------------------- Models of others --------------------------------------------

def test_factorize_changes_all_or_nothing_and_its_advice_returns_every_pair():
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "embedding": nn.Embedding(10, 8),
                           "head": nn.Linear(8, 10, bias=False), "watched": nn.Linear(8, 8)})
    model["head"].weight = model["embedding"].weight
    model["watched"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="skip=") as refused:
        factorize_(model, 0.5)
    assert all(type(layer) in (nn.Linear, nn.Embedding) for layer in model.values())
    advice = str(refused.value).rsplit("skip=", 1)[1]
    assert len(factorize_(model, 0.5, skip=json.loads(advice.replace("'", '"')))) == 1
    assert isinstance(model["first"], FactorizedLinear) and type(model["head"]) is nn.Linear


def test_a_module_that_reads_the_weight_of_its_linear_works():
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    with pytest.warns(UserWarning, match="NonDynamicallyQuantizableLinear"):
        assert len(factorize_(layer, 0.5)) == 2
    x = torch.randn(2, 3, 16)
    trained = layer.train()(x)
    with torch.no_grad():  # here torch's fast path reads linear1.weight
        assert torch.allclose(layer.eval()(x), trained, atol=1e-5)
    with pytest.raises((AttributeError, KeyError)):
        layer.linear1.weight = nn.Parameter(torch.zeros(32, 16))


def test_a_model_without_linear_layers_is_refused_by_their_names():
    class Conv1D(nn.Module):
        pass
    with pytest.raises(ValueError, match="Conv1D"):
        factorize_(nn.Sequential(Conv1D()), 0.5)


def test_from_the_meta_device_everything_is_initialised():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4, bias=False))
        factorize_(model, 0.5)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    for layer in model:
        layer.reset_parameters()
    assert all(p.isfinite().all() for p in model.parameters())


def test_pairs_that_the_model_has_lost_are_told_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = Spectron(factorize_(model, 0.5), lr=0.1)
    model[2].requires_grad_(False)  # frozen, which is no accident
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for step in range(8):
            if step == 2:
                model[1] = nn.Linear(8, 8)
            optimizer.zero_grad()
            model(torch.randn(4, 8)).sum().backward()
            optimizer.step()
    assert [str(w.message)[:40] for w in caught] == ["a pair had no gradient in three steps: o"]


def test_added_groups_are_checked_as_in_the_constructor():
    def pair(m=6, n=5, r=2):
        return nn.Parameter(torch.randn(m, r)), nn.Parameter(torch.randn(n, r))
    A, B = pair()
    optimizer = Spectron([(A, B)], lr=0.1)
    C, D = pair()
    optimizer.add_param_group({"params": [C, D], "lr": 0.3})
    half_frozen = pair()
    half_frozen[0].requires_grad_(False)
    for group in ({"params": [half_frozen]}, {"params": [pair()], "momentum": 1.0}, {"params": [A, B, C]},
                  {"params": [(C, A.detach()[:, :1])]}, {"params": [pair()], "ns_steps": 0}):
        with pytest.raises(ValueError):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 2
    before = [p.detach().clone() for p in (A, B, C, D)]
    for p in A, B, C, D:
        p.grad = torch.randn_like(p)
    optimizer.step()
    moved = [torch.linalg.matrix_norm(p - old, ord=2) for p, old in zip((A, B, C, D), before)]
    assert moved[2] > 1.5 * moved[0] > 0 and moved[3] > 1.5 * moved[1] > 0


# ------------------------------------------ Output that fails, signals --------------------------------------

CODE = f"{SHORT_END}import sys, train\ntrain.main(sys.argv[1:])\n"


def flags(corpus, out, steps=200):
    return [*TINY, "--data", corpus, "--out", out, "--steps", steps, "--spectra_every", 1]


def step_of(out: Path) -> int:
    return load_checkpoint(out)["step"]


def test_a_reader_that_goes_away_costs_no_step(corpus, tmp_path):
    """As in `| head`: the step is finished and saved, and the code is that of SIGPIPE."""
    child = Child(CODE, flags(corpus, tmp_path / "run"))
    while not child.stdout.readline().startswith("step      3"):
        pass
    child.stdout.close()
    assert child.wait() == 141
    done = plot.read_log(tmp_path / "run")[1][-1]["step"]
    assert 3 <= done == step_of(tmp_path / "run") < 200


def test_ctrl_c_whose_reader_is_gone_saves_and_ends_as_ctrl_c(corpus, tmp_path):
    """As with `| tee`, which dies of the same Ctrl-C."""
    child = Child(CODE, flags(corpus, tmp_path / "run"))
    while not child.stdout.readline().startswith("step      3"):
        pass
    child.send_signal(signal.SIGINT)
    child.stdout.close()
    assert child.wait() == 130 and step_of(tmp_path / "run") >= 3


@pytest.mark.parametrize("stream", ["open('/dev/full', 'w')", "None"])
def test_a_full_or_absent_stdout_does_not_stop_a_run(stream, corpus, tmp_path):
    child = Child(f"import sys\nsys.stdout = {stream}\n{CODE}", flags(corpus, tmp_path / "run", steps=3))
    _, error = child.communicate()
    assert child.returncode == 0, error
    assert step_of(tmp_path / "run") == 3 and "Traceback" not in error


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU])
def test_a_lost_terminal_and_a_scheduler_are_as_sigterm(number, corpus, tmp_path):
    child = Child(CODE.replace(SHORT_END, "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"),
                  flags(corpus, tmp_path / "run"))
    while not child.stdout.readline().startswith("step      2"):
        pass
    child.send_signal(number)
    said, error = child.communicate()
    assert child.returncode == 0, error
    done = step_of(tmp_path / "run")
    assert f"stopped after step {done} of 200. Go on: python train.py --resume" in said


def test_what_nohup_ignores_stays_ignored(corpus, tmp_path):
    child = Child(f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{CODE}",
                  flags(corpus, tmp_path / "run", steps=12))
    child.stdout.readline()
    child.send_signal(signal.SIGHUP)
    child.communicate()
    assert child.returncode == 0 and step_of(tmp_path / "run") == 12


def test_a_notebook_keeps_its_handlers_streams_and_backend(run):
    def state():
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE
        return ([signal.getsignal(n) for n in numbers], sys.stdout, sys.stderr, sys.stdout.errors,
                os.environ.get("MPLBACKEND"))
    before = state()
    run("--steps", 2)
    assert state() == before


# ------------------------------------------------- Advice ---------------------------------------------------

@pytest.mark.parametrize("name", ["log.jsonl", "loss.png", "notes.txt"])
def test_no_message_proposes_to_write_over_a_file_that_is_no_checkpoint(name, run, fails, capsys):
    out = run("--steps", 2)
    (out / "notes.txt").write_text("mine")
    before = (out / name).read_bytes() if (out / name).exists() else None
    (out / name).write_bytes(before or b"mine")
    with pytest.raises(SystemExit):
        evaluation.main([str(out / name)])
    assert "cp " not in capsys.readouterr().err


def test_a_directory_that_is_no_run_is_neither_replaced_nor_offered_to_be(run, fails, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "log.jsonl").write_text("my own log\n")
    for more in [], ["--overwrite"], ["--resume", "auto"]:
        with pytest.raises(SystemExit):
            run("--steps", 1, *more, out="other")
    assert (other / "log.jsonl").read_text() == "my own log\n"
    fails(train.main, ["--out", other, "--device", "cpu"], "is no run of train.py", "Name another")


def test_the_advice_for_a_damaged_log_works_as_printed(run, tmp_path, capsys):
    out = run("--steps", 4, "--save_every", 2, "--stop_at", 2)
    rows = (out / "log.jsonl").read_text().splitlines()
    (out / "log.jsonl").write_text("\n".join([rows[0], "no JSON", *rows[1:]]) + "\n")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", str(out)])
    advice = capsys.readouterr().err.split("elsewhere: ")[1].strip()
    copy, resume = advice.rsplit(" && ", 1)
    subprocess.run(copy, shell=True, check=True)
    train.main(shlex.split(resume)[2:])
    assert step_of(Path(f"{out}-resumed")) == 4
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("line", ["[" * 100_000, '{"step": "three"}', '{"step": null}', "7"])
def test_a_line_of_the_log_that_is_no_record_is_told(line, tmp_path):
    (tmp_path / "log.jsonl").write_text(f'{{"config": {{}}}}\n{line}\n{{"step": 1}}\n')
    with pytest.raises(Exception, match="line 2, is damaged"):
        cut_log(tmp_path / "log.jsonl", 1)


# ------------------------------------------------ The machine -----------------------------------------------

def test_a_file_system_that_cannot_sync_a_directory_is_used_as_it_is(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(number):
        if os.path.isdir(f"/proc/self/fd/{number}"):
            raise OSError(22, "Invalid argument")
        real(number)
    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(tmp_path / "file", "w") as file:
        file.write("text")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("rank, ranks", [("3", "1"), ("0", "0"), ("-1", "2")])
def test_contradictory_ranks_are_one_message(rank, ranks, monkeypatch, fails):
    for name, value in dict(RANK=rank, WORLD_SIZE=ranks, LOCAL_RANK="0", MASTER_ADDR="x",
                            MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    fails(train.main, ["--steps", "1"], f"RANK={rank} and WORLD_SIZE={ranks} contradict", "unset RANK")
    for name in "RANK", "WORLD_SIZE":
        monkeypatch.delenv(name)
    assert rank_and_ranks() == (0, 1)


# ------------------------------------------------- Methods --------------------------------------------------

def test_a_flag_that_a_method_ignores_is_refused(fails):
    fails(train.main, ["--method", "lora-muon", "--weight_decay", "0.1"], "--weight_decay does not apply")


def test_entries_of_a_matrix_that_are_kept_as_a_vector_are_decayed_and_gains_are_not():
    class C:
        weight_decay = 0.1
    matrix, gains, entries = (nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (3,), (4,)))
    decayed, kept = adamw([matrix, gains, entries], 0.01, C, entries=[entries]).param_groups
    assert [p.shape for p in decayed["params"]] == [(3, 2), (4,)] and decayed["weight_decay"] == 0.1
    assert [p.shape for p in kept["params"]] == [(3,)] and kept["weight_decay"] == 0


def test_the_log_has_the_lr_that_the_matrix_really_had(run):
    """ReLoRA restarts its own; with --factorize ffn attention is Muon's."""
    out = run("--steps", 30, "--method", "relora", "--method_args", "every=10", "--lr", "0.01", out="relora")
    lr = {row["step"]: row["lr"] for row in plot.read_log(out)[1]}  # of step - 1, counted from 0
    assert [step for step in lr if lr[step] == 0] == [1, 11, 21]
    mixed = run("--steps", 2, "--factorize", "ffn", "--muon_lr", "0.5", "--lr", "0.01", out="mixed")
    assert plot.read_log(mixed)[1][0]["lr"] == 0.5


def test_scores_say_how_many_items_lost_their_beginning(run):
    model, tokenizer, config = evaluation.load_run(run("--steps", 1))
    items = [evaluation.Item("here", context, [" a", " b"], 0) for context in ("short", "long " * 30)]
    scores, _ = evaluation.evaluate(model, "piqa", items, tokenizer, "float32")
    assert scores["piqa_items"] == 2 and scores["piqa_items_cut"] == 1
