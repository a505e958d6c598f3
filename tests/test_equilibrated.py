"""baselines/equilibrated.py: rows of one length, the bound that stays, and checkpoints of the version in
which it was a flag of the method spectron."""

from functools import partial

import pytest
import torch

import eval as evaluation
import spectron
import train
from baselines.equilibrated import EquilibratedSpectron, equilibrate
from lib.checkpoints import load_checkpoint, seal
from spectron import newton_schulz
from test_spectron import adversarial_pairs, dW_over_eta, norm, random_pair
from tools import plot


def uneven(m=96, r=24):
    """A momentum whose rows differ in length by factors of e, as real ones do."""
    return torch.randn(m, r, dtype=torch.float64) * torch.randn(m, 1, dtype=torch.float64).exp()


def row_norms(O):
    return torch.linalg.vector_norm(O, dim=-1) * (O.size(-2) / O.size(-1)) ** 0.5


def test_equilibrated_rows_are_even_and_singular_values_stay_near_one():
    for _ in range(10):
        M = uneven()
        spread = [row_norms(newton_schulz(equilibrate(M, times, 5) if times else M)).std()
                  for times in (0, 1, 2)]
        assert spread[0] > 0.25 > 0.1 > spread[1] > 0.04 > spread[2]
        for times in 1, 2:
            s = torch.linalg.svdvals(newton_schulz(equilibrate(M, times, 5)))
            assert 0.67 < s.min() and s.max() < 1.21


def test_equilibrate_commutes_with_a_rotation_of_the_rank():
    """A Q, B Q is the same W: the r axis must not be normalised."""
    M, Q = uneven(), torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0]
    for times in 1, 2:
        assert torch.allclose(equilibrate(M @ Q, times, 5), equilibrate(M, times, 5) @ Q)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equilibrate_is_finite_with_rows_of_zeros_and_at_any_scale(times, dtype):
    M = uneven().to(dtype)
    M[::3] = 0
    M[1] *= 1e-30
    for scale in 0.0, 1e-20, 1.0, 1e15:
        O = newton_schulz(equilibrate(scale * M, times, 5))
        assert O.isfinite().all() and not O[::3].any()
        assert scale != 1 or O[1].norm() < 1e-3  # and a row of next to nothing does not become a step


@pytest.mark.parametrize("times", [1, 2])
def test_a_step_of_an_equilibrated_optimizer(times):
    A, B = random_pair(40, 30, 4)
    old, M = [A.detach().clone(), B.detach().clone()], [0.1 * A.grad, 0.1 * B.grad]
    optimizer = EquilibratedSpectron([(A, B)], times, lr=0.2, momentum=0.9, nesterov=False)
    optimizer.step()
    for p, q, m in zip(old, (A, B), M):
        expected = optimizer.state[A]["rho"] * newton_schulz(equilibrate(m, times, 5))
        assert torch.allclose(p - q, expected, atol=1e-12)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("eta", [0.01, 0.1, 0.5])
def test_dW_is_within_1_21_eta_for_the_five_step_iteration(eta, times, monkeypatch):
    monkeypatch.setattr(spectron, "power_iteration", lambda W, u, steps=1: (norm(W), u))
    kind = partial(EquilibratedSpectron, times=times)
    assert max(dW_over_eta(pair, eta, kind=kind) for pair in adversarial_pairs()) <= 1.21


# -------------------------------------- Checkpoints with --equilibrate --------------------------------------

EQUILIBRATED = ["--method", "equilibrated", "--method_args"]


def as_it_was_saved(out) -> None:
    """Writes the checkpoint of a run as it was while --equilibrate was a flag: in the settings of every run,
    and in the group of its Spectron."""
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    config = checkpoint["config"]
    times = config["method_args"].pop("times", 0)
    config["equilibrate"] = times
    if times:
        config["method"] = "spectron"
    for optimizer in checkpoint["optimizers"]:
        for group in optimizer["param_groups"]:
            if "renormalize" in group:
                group["equilibrate"] = times
    with open(out / "ckpt.pt", "w+b") as file:
        torch.save(checkpoint, file)
        file.write(seal(file, file.tell()))


@pytest.mark.parametrize("flags", [
    [], ["--method", "dense"], ["--method", "self-guided"], [*EQUILIBRATED, "times=1"],
    [*EQUILIBRATED, "times=2", "--no-renormalize"]], ids=str)
def test_a_checkpoint_of_that_version_is_scored_and_resumes_bit_for_bit(run, capsys, flags):
    """The guided one is stopped while it has its guide."""
    whole = run(*flags, "--steps", 8, out="whole")
    out = run(*flags, "--steps", 8, "--stop_at", 3)
    said = []
    for change in (lambda out: None, as_it_was_saved):
        change(out)
        capsys.readouterr()
        evaluation.main([str(out), "--device", "cpu"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "val_loss" in said[0]
    train.main(["--resume", "--out", str(out)])
    one, two = (load_checkpoint(path) for path in (whole, out))
    assert one["config"] == {**two["config"], "out": str(whole)} and "equilibrate" not in two["config"]
    assert all(torch.equal(w, two["model"][name]) for name, w in one["model"].items())
    timeless = [[{**row, "seconds": 0} for row in plot.read_log(path)[1]] for path in (whole, out)]
    assert timeless[0] == timeless[1]


def test_the_settings_of_that_version_are_still_kept_at_resume(run, fails):
    out = run(*EQUILIBRATED, "times=1", "--steps", 4, "--stop_at", 2)
    as_it_was_saved(out)
    fails(train.main, ["--resume", "--out", out, "--method_args", "times=2"],
          "--method_args", "(was {'times': 1})")
    fails(train.main, ["--resume", "--out", out, "--equilibrate", "1"], "--method equilibrated")
