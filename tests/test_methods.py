"""How --method finds a method; self-guided training against its equations; a house that stands without
baselines/."""

import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import baselines
import eval as evaluation
import train
from baselines.self_guided import SelfGuidedLinear, alpha_at, skipped
from conftest import ROOT, TINY
from lib import checkpoints
from lib.flags import key_and_value
from lib.methods import block_matrices, flops_per_token
from lib.norms import Spectra
from model import FactorizedLinear, Llama, LlamaConfig
from tools import export, plot

GUIDED = ["--method", "self-guided"]


def saved(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ------------------------------------------ Self-guided, the layer ------------------------------------------

def test_the_guide_starts_as_the_product_so_that_alpha_changes_nothing():
    """Eq. 18."""
    layer = SelfGuidedLinear(24, 40, 6)
    x = torch.randn(5, 24)
    for alpha in 1.0, 0.3, 0.0:
        layer.lead(alpha, [False])
        assert torch.allclose(layer(x), FactorizedLinear.forward(layer, x), atol=1e-5)


def test_init_dense_has_the_factors_of_its_own_weight():
    layer = SelfGuidedLinear(24, 40, 6, init="dense")
    U, S, Vh = torch.linalg.svd(layer.W.detach().double())
    best = U[:, :6] * S[:6] @ Vh[:6]
    assert torch.allclose(layer.A.double() @ layer.B.double().T, best, atol=1e-5)
    assert layer.W.abs().max() <= 24 ** -0.5 and torch.linalg.matrix_rank(layer.W) == 24


def test_the_output_is_the_mixture_in_value_and_gradient():
    """Eq. 17 in float64."""
    layer = SelfGuidedLinear(24, 40, 6, init="dense").double()
    layer.lead(0.3, [False])
    A, B, W = (p.detach().clone().requires_grad_() for p in (layer.A, layer.B, layer.W))
    x = torch.randn(5, 24, dtype=torch.float64)
    alpha = layer.alpha
    expected = alpha * (x @ W.T) + (1 - alpha) * (x @ B @ A.T)
    assert torch.allclose(layer(x), expected, atol=1e-12)
    layer(x).square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in (layer.A, A), (layer.B, B), (layer.W, W):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-10)
    assert torch.allclose(x @ layer.product().T, expected, atol=1e-12)


def test_a_skipped_guide_leaves_the_factors_alone_and_a_gradient_of_zeros():
    """Eq. 19, its second line; in evaluation the first, always."""
    layer, x = SelfGuidedLinear(24, 40, 6, init="dense"), torch.randn(5, 24)
    layer.lead(0.5, [True])
    with torch.no_grad():
        mixed = layer(x)
    y = layer(x)
    assert torch.equal(y, FactorizedLinear.forward(layer, x)) and not torch.allclose(y, mixed, atol=1e-2)
    y.sum().backward()
    assert layer.W.grad.shape == layer.W.shape and not layer.W.grad.any()
    assert layer.idle == 24 * 40


def test_alpha_falls_as_a_cosine_over_the_first_half():
    alphas = [alpha_at(step, 100) for step in range(100)]
    assert alphas[0] == 1 and alphas[25] == pytest.approx(0.5) and alphas[49] > 0 and not any(alphas[50:])
    assert alphas[10] == pytest.approx(0.5 * (1 + math.cos(0.2 * math.pi)))
    assert alphas == sorted(alphas, reverse=True) and alpha_at(0, 1) == 0


def test_the_guide_is_skipped_with_probability_one_minus_alpha_and_each_place_draws_its_own():
    draws = [skipped(0.7, 0, step, micro, name) for step in range(500) for micro in (0, 1) for name in "ab"]
    assert sum(draws) / len(draws) == pytest.approx(0.3, abs=0.04)
    for other in (1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b"):
        assert any(skipped(alpha / 50, *other) != skipped(alpha / 50, 0, 0, 0, "a") for alpha in range(50))


# ------------------------------------------ Self-guided, the runs -------------------------------------------

@pytest.mark.parametrize("args", [["init=dense"], ["optimizer=muon"], ["stochastic=true"]])
def test_every_variant_trains_and_ends_as_a_plain_low_rank_model(run, args):
    out = run(*GUIDED, "--steps", 6, "--method_args", *args)
    end = saved(out)
    plain = Llama(LlamaConfig(**end["config"]["model"])).state_dict()
    assert len(end["optimizers"]) == 2 and end["model"].keys() == plain.keys()
    assert end["config"]["method_args"] == dict(map(key_and_value, args))
    assert all(row["loss"] < 6 and row["dW"] is not None for row in plot.read_log(out)[1])


def test_the_guide_learns_and_its_optimizer_goes_with_it(run):
    half = saved(run(*GUIDED, "--steps", 8, "--stop_at", 4))
    guides = {name: W for name, W in half["model"].items() if name.endswith(".W")}
    assert len(guides) == 14 and len(half["optimizers"]) == 3
    layer = "blocks.0.ffn.up_proj."
    moved = guides[layer + "W"] - half["model"][layer + "A"] @ half["model"][layer + "B"].T
    assert moved.abs().max() > 1e-4


@pytest.mark.parametrize("args", [[], ["--method_args", "stochastic=true"], ["--factorize", "ffn"]])
def test_stop_and_resume_is_the_run_that_was_not_stopped(run, args):
    """Stopped while guided, at the guide's last step, and after it."""
    whole = run(*GUIDED, *args, "--steps", 8, out="whole")
    out = run(*GUIDED, *args, "--steps", 8, "--stop_at", 2)
    for stop in 4, 5, 8:
        train.main(["--resume", "--out", str(out), "--stop_at", str(stop)])
    assert same(saved(whole)["model"], saved(out)["model"])
    timeless = [[{**row, "seconds": 0} for row in plot.read_log(path)[1]] for path in (whole, out)]
    assert timeless[0] == timeless[1]


def test_flops_are_those_that_are_executed(run):
    """The dense products in the first half, all of them or those that were drawn, and none after it."""
    plain = Llama(LlamaConfig(**saved(run("--steps", 1))["config"]["model"]))
    low, tokens = flops_per_token(plain), 8 * 256
    W = sum(layer.in_features * layer.out_features for layer in block_matrices(plain).values())
    for args in [], ["--method_args", "stochastic=true"]:
        out = run(*GUIDED, *args, "--steps", 8, out=f"run{len(args)}")
        spent = plot.read_log(out)[1][-1]["flops"]
        if args:
            names = block_matrices(plain)
            used = sum(layer.in_features * layer.out_features for step in range(4)
                       for name, layer in names.items() if not skipped(alpha_at(step, 8), 0, step, 0, name))
            assert spent == tokens * low + 256 * 6 * used and 0 < used < 4 * W
        else:
            assert spent == tokens * low + tokens // 2 * 6 * W


def test_a_run_that_was_stopped_is_scored_and_exported_as_the_mixture(run):
    out = run(*GUIDED, "--steps", 8, "--stop_at", 3, "--method_args", "stochastic=true")
    model, tokenizer, _ = evaluation.load_run(out)
    layer = model.blocks[1].ffn.up_proj
    assert isinstance(layer, SelfGuidedLinear) and float(layer.alpha) == pytest.approx(alpha_at(2, 8))
    dense = export.weights(model, tokenizer.n_vocab)["model.layers.1.mlp.up_proj.weight"]
    x = torch.randn(3, layer.in_features)
    assert torch.allclose(x @ dense.T, layer(x), atol=1e-5)


# ------------------------------------------ How a method is found -------------------------------------------

@pytest.mark.parametrize("flags, fragments", [
    ([*GUIDED, "--method_args", "inti=dense"], ["inti", "baselines/self_guided.py", "--method_args"]),
    ([*GUIDED, "--method_args", "init=sparse"], ["init=sparse", "init=product or init=dense"]),
    ([*GUIDED, "--method_args", "stochastic=7"], ["stochastic=7", "stochastic=True"]),
    ([*GUIDED, "--method_args", "stochastic"], ["stochastic", "key=value"]),
    (["--method_args", "init=dense"], ["--method_args", "--method spectron takes none"]),
    ([*GUIDED, "--compile"], ["--compile does not go with --method self-guided"]),
    ([*GUIDED, "--no-renormalize"], ["--no-renormalize does not apply to --method self-guided"]),
    (["--method", "not-there"], ["--method not-there", "baselines/not_there.py", "There are spectron"]),
    (["--method", "../data"], ["--method ../data"]),
])
def test_wrong_methods_and_arguments_are_refused(fails, flags, fragments):
    fails(train.main, [*flags, "--dry_run"], *fragments)


def test_method_args_given_twice_add_up():
    assert train.parse(["--method_args", "a=1", "b=2", "--method_args", "c=3", "b=x"])["method_args"] == {
        "a": 1, "b": "x", "c": 3}


@pytest.mark.parametrize("name, code", [
    ("my-method", "def method(): pass"), ("mymethod", "x = 1"), ("other", "import not_installed"),
    ("fourth", "def method(rank): pass")])
def test_a_baseline_that_cannot_be_used_is_one_message(tmp_path, fails, monkeypatch, name, code):
    """A dash in the file's name; no function method(); a package that is missing; an argument not given."""
    (tmp_path / f"{name}.py").write_text(code + "\n")
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])
    error = fails(train.main, ["--method", name, "--dry_run"], f"--method {name}: ", "function method()")
    assert len(error.splitlines()) == 1


def test_an_underscore_is_as_good_as_a_dash(run):
    assert saved(run("--method", "self_guided", "--steps", 1))["config"]["method"] == "self-guided"


def test_resume_refuses_other_arguments_and_to_compile_what_changes(run, fails):
    out = run(*GUIDED, "--steps", 4, "--stop_at", 1, "--method_args", "init=dense")
    fails(train.main, ["--resume", "--out", out, "--compile"], "--compile", "--method self-guided")
    fails(train.main, ["--resume", "--out", out, "--method_args", "init=product"], "method_args", "init")


def test_without_the_folder_everything_else_works(corpus, tmp_path):
    house = tmp_path / "house"
    shutil.copytree(ROOT, house, ignore=shutil.ignore_patterns("baselines", "data", "out", "results", ".*"))

    argv = [*TINY, "--data", str(corpus), "--steps", "1"]
    script = f"""import train, eval
train.main({[*argv, "--out", "run"]!r})
eval.main(["run"])
train.main({[*argv, "--method", "self-guided"]!r})"""
    done = subprocess.run([sys.executable, "-c", script], cwd=house, capture_output=True, text=True)
    assert done.stdout.count("val_loss: ") == 2 and "Traceback" not in done.stderr
    assert done.returncode == 2 and "baselines" in done.stderr


def test_a_finished_guided_run_needs_no_baselines(run, monkeypatch):
    out = run(*GUIDED, "--steps", 4)

    def gone(*args):
        raise AssertionError("asked for a baseline")
    monkeypatch.setattr(checkpoints, "baseline", gone)
    assert type(evaluation.load_run(out)[0].blocks[0].ffn.up_proj) is FactorizedLinear


# ---------------------------------------- What else a run can record ----------------------------------------

def test_a_run_that_diverges_can_be_recorded_as_such(run, capsys):
    out = run("--steps", 20, "--lr", 1e30, "--adam_lr", 1e30, "--on_nonfinite", "record")
    header, rows = plot.read_log(out)
    assert "non-finite gradient at step" in rows[-1]["diverged"] and rows[-1]["step"] == len(rows)
    assert all("diverged" not in row for row in rows[:-1])
    assert f"diverged: {rows[-1]['diverged']}" in capsys.readouterr().out
    assert all(not math.isnan(x) for row in rows for x in row.values() if isinstance(x, float))
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize("flags", [[], ["--method", "dense"], GUIDED])
def test_dy_is_the_rms_of_what_the_step_does_to_the_layers_output(flags):
    c = train.resolve(train.parse([*TINY, *flags, "--steps", "9"]))
    method = train.find_method(c.method, c.method_args)
    model = Llama(LlamaConfig(**c.model), method.linear)
    optimizers, probe = method.optimizers(model, c), torch.randint(0, 257, (1, 32))
    spectra = Spectra(model, "blocks.1.attention.o_proj", optimizers, probe)
    layer, x = model.blocks[1].attention.o_proj, []
    if method.before_step:
        method.before_step(model, optimizers, SimpleNamespace(steps=9, seed=0, micro_steps=1), 1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()
    hook = layer.register_forward_pre_hook(lambda _, inputs: x.append(inputs[0].double()))
    with torch.no_grad():
        model.hidden(probe)
        hook.remove()
        W0 = layer.weight.double().clone() if c.method == "dense" else FactorizedLinear.product(layer)
        spectra.before()
        for optimizer in optimizers:
            optimizer.step()
        W = layer.weight.double() if c.method == "dense" else FactorizedLinear.product(layer)
        expected = (x[0] @ (W - W0).T).square().mean().sqrt()
    assert spectra.after()["dy"] == pytest.approx(float(expected), rel=1e-6) and expected > 0
