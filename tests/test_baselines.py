"""The methods of baselines/, each against its definition, and all through train.py, eval.py and the
tools."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import eval as evaluation
import train
from baselines.cola import CoLALinear
from baselines.fira import Fira
from baselines.galore import GaLore
from baselines.relora import ReLoRALinear, before_step, envelope
from baselines.sct import SCTLinear, StiefelAdamW, retracted
from baselines.sltrain import SLTrainLinear
from baselines.tsvd import TSVDLinear, cut, rank_for
from conftest import TINY
from launch import FLOAT64, train_on
from model import FactorizedLinear
from tools import export, plot, sample

METHODS = {"cola": [], "cola-spectron": ["optimizer=spectron", "init=spectral"], "galore": ["gap=2"],
           "fira": ["gap=2"], "sct": [], "sltrain": [], "relora": ["every=2"],
           "tsvd": ["energy=0.9", "every=2"], "equilibrated": ["times=2"]}


def flags(name):
    args = METHODS[name]
    return ["--method", name.removesuffix("-spectron"), *(["--method_args", *args] if args else [])]


def weights(out):
    return torch.load(out / "ckpt.pt", weights_only=True)["model"]


# ----------------------------------------------- All of them ------------------------------------------------

@pytest.mark.parametrize("name", METHODS)
def test_it_trains_resumes_bit_for_bit_is_scored_sampled_and_exported(run, fails, capsys, name):
    whole = run(*flags(name), "--steps", 6, out="whole")
    out = run(*flags(name), "--steps", 6, "--stop_at", 3)
    train.main(["--resume", "--out", str(out)])
    assert all(torch.equal(w, weights(out)[key]) for key, w in weights(whole).items())
    rows = plot.read_log(out)[1]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2 and all(row["dW"] is not None for row in rows)
    assert rows[-1]["dW"] > 0 < rows[-1]["gauge"]  # relora has steps of lr 0
    capsys.readouterr()
    evaluation.main([str(out), "--device", "cpu"])
    assert f"val_loss: {rows[-1]['val_loss']:.5f}"[:14] in capsys.readouterr().out
    sample.main([str(out), "--tokens", "5", "--device", "cpu"])
    pytest.importorskip("safetensors")
    if name.startswith("cola"):
        fails(export.main, [out, "--to", out / "hf"], "no matrix W")
    else:
        export.main([str(out), "--to", str(out / "hf")])


def test_two_ranks_equal_one_process(run, float64, corpus, tmp_path):
    """Every layer of its own and every hook before a step, and galore's basis, in one pair of processes, one
    after the other, at a width of 64. Within four steps relora merges, tsvd cuts, and galore's basis
    changes. The other methods are optimizers that see nothing but the mean gradient."""
    methods = {name: flags(name) for name in ("cola", "sct", "sltrain", "relora", "tsvd", "galore")}
    methods["self-guided"] = ["--method", "self-guided", "--method_args", "stochastic=true"]
    argvs = {name: [*args, "--size", "nano-2x64", "--steps", 4, "--data", corpus]
             for name, args in methods.items()}
    more = "".join(f"train.main({[*TINY, *map(str, argv), '--out', str(tmp_path / ('two-' + name))]!r})\n"
                   for name, argv in argvs.items())
    once = """import functools, train, torch.distributed as dist
train.join_ranks = functools.cache(train.join_ranks)
end, dist.destroy_process_group = dist.destroy_process_group, lambda: None
"""
    train_on(tmp_path, 2, ["--dry_run"], FLOAT64 + once, more + "end()\n")
    for name, argv in argvs.items():
        one, two = weights(run(*argv, out=name)), weights(tmp_path / f"two-{name}")
        assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-9, name


@pytest.mark.parametrize("argv, fragments", [
    (["--method", "galore", "--method_args", "gap=0"], ["gap=0", "at least 1"]),
    (["--method", "galore", "--method_args", "rank=1.5"], ["rank=1.5", "whole number"]),
    (["--method", "fira", "--method_args", "scale=big"], ["scale=big"]),
    (["--method", "fira", "--method_args", "optimizer=x"], ["optimizer"]),
    (["--method", "sct", "--method_args", "s_lr=0"], ["s_lr=0", "positive"]),
    (["--method", "tsvd", "--method_args", "every=0"], ["every=0", "at least 1"]),
    (["--method", "tsvd", "--method_args", "energy=1.1"], ["energy=1.1", "(0, 1]"]),
    (["--method", "relora", "--method_args", "every=0"], ["every=0", "at least 2"]),
    (["--method", "sltrain", "--method_args", "delta=2"], ["delta=2", "(0, 1]"]),
    (["--method", "equilibrated", "--method_args", "times=3"], ["times=3", "times=1 or times=2"]),
    (["--method", "equilibrated", "--no-orthogonalize"], ["--no-orthogonalize does not apply"]),
    (["--method", "galore", "--rank_ratio", "0.5"], ["--rank_ratio does not apply to --method galore"]),
    (["--method", "cola", "--method_args", "activation=relu"], ["activation=silu or activation=identity"]),
    (["--method", "cola", "--no-renormalize"], ["--no-renormalize does not apply"])])
def test_arguments_that_make_no_sense_get_one_message(fails, argv, fragments):
    fails(train.main, [*argv, "--dry_run"], *fragments)


def test_a_rank_larger_than_a_matrix_is_one_message(corpus, fails, tmp_path):
    fails(train.main, [*TINY, "--data", corpus, "--out", tmp_path / "x", "--steps", 1, "--method", "galore",
                       "--method_args", "rank=999"], "rank=999 is larger", "rank=128 at most")


# --------------------------------------------------- CoLA ---------------------------------------------------

def test_the_product_of_colas_factors_starts_with_variance_1_over_m_plus_n():
    layer = CoLALinear(512, 384, 128)
    W = FactorizedLinear.product(layer).detach()
    assert float(W.var()) * (512 + 384) == pytest.approx(1, rel=0.05)
    spectral = CoLALinear(64, 48, 16, init="spectral")
    assert torch.linalg.matrix_norm(spectral.A.detach(), ord=2).item() == pytest.approx(
        torch.linalg.matrix_norm(spectral.B.detach(), ord=2).item(), rel=1e-4)


def test_cola_with_the_identity_is_a_factorized_linear_in_value_and_gradients():
    layer, x = CoLALinear(24, 40, 6, activation="identity").double(), torch.randn(5, 24, dtype=torch.float64)
    plain = FactorizedLinear(24, 40, 6).double()
    plain.load_state_dict({"A": layer.A, "B": layer.B})
    for one in layer, plain:
        one(x).square().sum().backward()
    assert torch.allclose(layer(x), plain(x)) and torch.allclose(layer.A.grad, plain.A.grad)
    assert torch.allclose(layer.B.grad, plain.B.grad)


def test_cola_has_silu_between_its_factors():
    layer, x = CoLALinear(24, 40, 6).double(), torch.randn(5, 24, dtype=torch.float64)
    z = x @ layer.B
    assert torch.allclose(layer(x), (z * torch.sigmoid(z)) @ layer.A.T)


# --------------------------------------------- SCT and SLTrain ----------------------------------------------

def sct_step(layer, **settings):
    groups = [dict(params=[layer.A, layer.B]), dict(params=[layer.s])]
    optimizer = StiefelAdamW(groups, **settings)
    optimizer.step()


def test_sct_starts_as_the_truncated_svd_and_its_columns_stay_orthonormal():
    torch.manual_seed(0)
    layer = SCTLinear(24, 40, 6)
    torch.manual_seed(0)
    plain = FactorizedLinear(24, 40, 6)
    assert torch.allclose(layer.product(), plain.product(), atol=1e-6)
    assert torch.equal(layer.s, layer.s.sort(descending=True).values)
    for _ in range(5):
        layer.zero_grad()
        layer(torch.randn(9, 24)).square().sum().backward()
        sct_step(layer, lr=0.03)
        for p in layer.A, layer.B:
            assert (p.T @ p - torch.eye(6)).abs().max() < 1e-6
    x = torch.randn(3, 24)
    assert torch.allclose(layer(x), x @ layer.product().float().T, atol=1e-5)


def test_sct_stays_at_lr_0_and_weight_decay_alone_changes_s_alone():
    layer = SCTLinear(24, 40, 6)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer(torch.randn(9, 24)).sum().backward()
    sct_step(layer, lr=0.0)
    assert all(torch.allclose(p, before[name], atol=1e-6) for name, p in layer.named_parameters())
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    sct_step(layer, lr=0.1, weight_decay=0.5)
    assert all(torch.allclose(p, before[name] * (0.95 if name == "s" else 1), atol=1e-6)
               for name, p in layer.named_parameters())


def test_scts_claim_of_199_times_less_memory_holds_by_count_and_as_measured():
    """Weight, gradient and Adam's moments of one matrix of a 70B model's MLP at rank 32; measured on one
    whose sides are 64 times smaller, as is the rank's place beside them."""
    with torch.device("meta"):
        layer = SCTLinear(8192, 28672, 32)
    assert 8192 * 28672 / sum(p.numel() for p in layer.parameters()) == pytest.approx(199.1, abs=0.05)
    sct, dense, held = SCTLinear(128, 448, 1), nn.Linear(128, 448, bias=False), {}
    optimizers = {"sct": (sct, StiefelAdamW([{"params": [sct.A, sct.B]}, {"params": [sct.s]}])),
                  "dense": (dense, torch.optim.AdamW(dense.parameters()))}
    for name, (layer, optimizer) in optimizers.items():
        layer(torch.randn(2, 128)).sum().backward()
        optimizer.step()
        held[name] = sum(x.nbytes for p in layer.parameters() for x in (
            p, p.grad, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]))
    assert held["dense"] == 16 * 128 * 448 and held["sct"] == 16 * (128 + 448 + 1)


def test_the_retraction_keeps_the_span_and_the_direction():
    p = torch.randn(40, 6, dtype=torch.float64)
    Q = retracted(p)
    assert torch.allclose(Q @ (Q.T @ p), p) and (Q.T @ p).diagonal().min() > 0


def test_sltrain_starts_as_its_sparse_part_and_its_gradient_is_the_dense_one_there():
    torch.manual_seed(0)
    layer = SLTrainLinear(30, 50, 4, 0.03, 32.0).double()
    index = layer.index
    assert len(index) == int(0.03 * 1500) == len(index.unique()) and 0 <= index.min() <= index.max() < 1500
    S = torch.zeros(1500, dtype=torch.float64)
    S[index] = layer.values.detach()
    assert torch.equal(layer.dense().detach(), S.view(50, 30))
    layer.A.data.normal_()
    W = layer.dense().detach().requires_grad_()
    x = torch.randn(7, 30, dtype=torch.float64)
    (x @ W.T).square().sum().backward()
    layer(x).square().sum().backward()
    assert torch.allclose(layer.values.grad, W.grad.flatten()[index])
    assert torch.allclose(layer.A.grad, 8.0 * W.grad @ layer.B)  # alpha / r


def test_with_all_of_the_energy_tsvd_is_sct_exactly(run):
    one = run("--method", "sct", "--steps", 6, out="sct")
    two = run("--method", "tsvd", "--method_args", "energy=1", "every=1", "--steps", 6, out="tsvd")
    assert all(torch.equal(w, weights(two)[name]) for name, w in weights(one).items())
    assert [row["loss"] for row in plot.read_log(one)[1]] == [row["loss"] for row in plot.read_log(two)[1]]


def test_a_cut_changes_the_function_by_no_more_than_the_energy_it_discards_and_keeps_adams_state():
    layer, x = TSVDLinear(24, 40, 8).double(), torch.randn(5, 24, dtype=torch.float64)
    optimizer = StiefelAdamW([dict(params=[layer.A, layer.B]), dict(params=[layer.s])], lr=0.01)
    layer(x).square().sum().backward()
    optimizer.step()
    s, W, momentum = layer.s.detach(), layer.product().detach(), optimizer.state[layer.A]["exp_avg"].clone()
    lost = s.abs().sort().values[:3]
    cut(layer, 5, optimizer)
    assert torch.linalg.matrix_norm(W - layer.product()).item() == pytest.approx(lost.norm().item())
    assert optimizer.state[layer.A]["exp_avg"].shape == (40, 5) and len(optimizer.state) == 3
    assert all(any(torch.equal(column, old) for old in momentum.T)
               for column in optimizer.state[layer.A]["exp_avg"].T)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in layer.parameters()}
    layer.zero_grad()
    layer(x).square().sum().backward()
    optimizer.step()


def test_the_rank_for_an_energy():
    s = torch.tensor([3.0, -4.0, 0.1, 0.0])
    assert [rank_for(s, energy, 1) for energy in (0.5, 0.65, 0.9, 0.9999, 1.0)] == [2, 2, 2, 3, 3]
    assert rank_for(s, 0.5, 3) == 3 and rank_for(s, 0.5, 9) == 4  # at most half at once; least


def test_the_rank_falls_and_is_logged_and_drawn(run, tmp_path):
    out = run("--method", "tsvd", "--method_args", "energy=0.5", "every=1", "--steps", 8)
    ranks = [row["rank"] for row in plot.read_log(out)[1]]
    assert ranks == sorted(ranks, reverse=True) and ranks[-1] < 0.6 * ranks[0]
    flops = [row["flops"] for row in plot.read_log(out)[1]]
    assert flops[-1] - flops[-2] < flops[0]
    plot.main([str(out), "--y", "rank", "-o", str(tmp_path / "rank.png")])
    model = evaluation.load_run(out)[0]
    assert model.blocks[0].ffn.up_proj.rank == model.blocks[0].ffn.up_proj.s.numel()


# -------------------------------------------------- ReLoRA --------------------------------------------------

def test_reloras_schedule_is_the_authors():
    points = {0: 0, 250: .5, 500: 1, 2500: .976841, 4999: .886878, 5000: 0, 5050: .440989, 5099: .873159,
              5100: .881979, 10000: 0, 10001: .005609, 10050: .280437, 10100: .560874, 15050: .116543,
              19999: .1}
    for step, expected in points.items():
        assert envelope(step, 20000, 500, 5000, 100) == pytest.approx(expected, abs=2e-6)


def test_relora_warms_up_over_five_steps_and_does_not_restart_at_the_end(run):
    out = run("--method", "relora", "--method_args", "every=15", "--steps", 46, "--spectra_every", 1)
    lr = [row["lr"] for row in plot.read_log(out)[1]]
    assert [step for step, x in enumerate(lr) if x == 0] == [0, 15, 30]  # 45 would leave one step
    for start in 15, 30:
        climb = lr[start:start + 7]
        assert climb[:6] == sorted(climb[:6]) and climb[6] < climb[5]


def test_a_merge_leaves_the_output_and_empties_a_and_the_moments():
    layer, x = ReLoRALinear(24, 40, 6, 32.0).double(), torch.randn(5, 24, dtype=torch.float64)
    assert layer.W.std() > 0.1 and not layer.A.any()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    c, merges, drawn = SimpleNamespace(steps=11, seed=0, lr=0.01), [], layer.B.detach().clone()
    for step in range(11):
        y, W = layer(x).detach(), layer.W.clone()
        before_step(layer, [optimizer], c, step, 3)
        assert torch.allclose(layer(x), y, atol=1e-12)
        if not torch.equal(W, layer.W):
            merges.append(step)
            assert not layer.A.any() and not torch.equal(layer.B, drawn)
            assert all(not state["exp_avg"].any() and not state["exp_avg_sq"].any()
                       for state in optimizer.state.values())
            drawn = layer.B.detach().clone()
        layer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert merges == [4, 7, 10] and len(merges) == (11 - 1) // 3


# --------------------------------------------- GaLore and Fira ----------------------------------------------

# ||d||, sum of d, d[0, 0] of d = W - W0 after steps 1 and 5, from the authors' classes. The rows: class,
# shape, scale, weight decay, size of the gradients.
ORACLE = {
    (GaLore, 12, 8, 0.25, 0, 0.1): [.017308, -.021401, -.0014093, .047964, -.053656, -.0040957],
    (GaLore, 12, 8, 1.0, 0, 0.1): [.069232, -.085602, -.0056373, .191855, -.214625, -.0163826],
    (GaLore, 8, 12, 0.25, 0, 0.1): [.017288, -.020677, .0001541, .042935, -.029543, -.0040951],
    (GaLore, 8, 12, 1.0, 0, 0.1): [.069152, -.082707, .0006168, .171739, -.118173, -.0163795],
    (GaLore, 8, 8, 0.25, 0, 0.1): [.014129, .003742, -.0026634, .040396, .021132, -.0099741],
    (Fira, 12, 8, 0.25, 0, 0.1): [.079718, -.070779, -.0087417, .147423, -.075975, -.0144569],
    (Fira, 12, 8, 1.0, 0, 0.1): [.081426, -.103238, -.0085555, .204194, -.189178, -.0212672],
    (Fira, 8, 12, 0.25, 0, 0.1): [.073934, -.060691, -.0114930, .128398, -.047928, -.0170223],
    (Fira, 8, 12, 1.0, 0, 0.1): [.076340, -.079098, -.0012654, .178386, -.102583, -.0194721],
    (Fira, 8, 8, 0.25, 0, 0.1): [.086760, .024457, -.0092641, .159154, .059480, -.0211722],
    (GaLore, 12, 8, 0.25, 0.1, 0.1): [.0203042, -.0250347],
    (GaLore, 12, 8, 0.25, 0, 1e-5): [.0041100, -.0020298, -.00048959, .0146169, -.0048769, -.00156212],
    (Fira, 12, 8, 0.25, 0, 1e-5): [.0182071, -.0139865, -.00294340, .0357111, -.0060801, -.00519478]}


@pytest.mark.parametrize("case", ORACLE)
def test_galore_and_fira_make_the_authors_steps(case):
    kind, m, n, scale, decay, size = case
    start = torch.from_numpy(np.random.RandomState(0).standard_normal((m, n)).astype("f4"))
    W, found = torch.nn.Parameter(start.clone()), []
    optimizer = kind([W], 0.01, 4, scale, 10**9, weight_decay=decay)
    for t in range(5):
        W.grad = torch.from_numpy((size * np.random.RandomState(t + 1).standard_normal((m, n))).astype("f4"))
        optimizer.step()
        if t in (0, 4):
            d = W.detach() - start
            found += [d.norm().item(), d.sum().item(), d[0, 0].item()]
    expected = ORACLE[case]
    assert found[:len(expected)] == pytest.approx(expected, rel=2e-4, abs=2e-6)


def rotated_adam(G, steps=5):
    """The authors' Adam on a gradient in the basis of its own right singular vectors."""
    _, _, Vh = torch.linalg.svd(G[0], full_matrices=False)
    m = v = torch.zeros_like(G[0] @ Vh.T)
    moved = 0
    for t, g in enumerate(G[:steps]):
        R = g @ Vh.T
        m, v = 0.9 * m + 0.1 * R, 0.999 * v + 0.001 * R * R
        moved = moved - 0.01 * (1 - 0.999**(t + 1))**.5 / (1 - 0.9**(t + 1)) * m / (v.sqrt() + 1e-6) @ Vh
    return moved


def test_with_full_rank_and_scale_1_galore_is_adam_in_a_rotated_basis():
    G = [torch.randn(12, 8, dtype=torch.float64) for _ in range(5)]
    W = torch.nn.Parameter(torch.zeros(12, 8, dtype=torch.float64))
    optimizer = GaLore([W], 0.01, 8, 1.0, 10**9)
    for g in G:
        W.grad = g.clone()
        optimizer.step()
    assert torch.allclose(W.detach(), rotated_adam(G), atol=1e-6)


def test_fira_without_its_residual_is_galore(monkeypatch):
    monkeypatch.setattr(Fira, "residual", lambda *args: 0.0)
    found = []
    for kind in GaLore, Fira:
        torch.manual_seed(0)
        W = torch.nn.Parameter(torch.randn(12, 8))
        optimizer = kind([W], 0.01, 4, gap=2)
        for _ in range(5):
            W.grad = torch.randn(12, 8)
            optimizer.step()
        found.append(W.detach())
    assert torch.equal(*found)
