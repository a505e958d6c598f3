"""model.py: counts against the paper, initialisation against the SVD, logits against a plain float64
restatement."""

import math
import textwrap
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train
from conftest import ROOT
from lib.methods import block_matrices, count_parameters, flops_per_token, split_parameters
from model import SIZES, FactorizedLinear, Llama, LlamaConfig, factorize_, rank_of, spectral_factors
from spectron import Spectron

# Tables 4 and 5 of the paper, in millions at 32,000 tokens of vocabulary: dense, and at rank ratio 0.25.
PARAMETERS = {"60M": (60.0, 47.5), "92M": (91.8, 67.8), "134M": (134.1, 93.6), "150M": (148.3, 101.0),
              "220M": (218.9, 143.2), "325M": (322.5, 200.9), "500M": (488.3, 296.9), "780M": (777.9, 453.8),
              "835M": (834.5, 483.5), "1.4B": (1364.3, 780.8), "1.7B": (1672.6, 943.2),
              "2.7B": (2701.6, 1495.2)}
STEPS = {"S": (1786, 2556), "M": (5664, 9537), "L": (8657, 14878)}  # Appendix E.3: dense, factorized
TINY = LlamaConfig(dim=24, n_layers=2, n_heads=3, vocab_size=50, seq_len=16, rank_ratio=0.25)


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_are_the_papers(size):
    config = replace(SIZES[size], vocab_size=32000)
    counts = [count_parameters(c) / 1e6 for c in (replace(config, rank_ratio=None), config)]
    assert [round(count, 1) for count in counts] == list(PARAMETERS[size])


@pytest.mark.parametrize("size", STEPS)
def test_step_counts_are_the_papers(size):
    assert tuple(train.paper_steps(size, dense) for dense in (True, False)) == STEPS[size]


def test_aliases_and_nano():
    assert [SIZES[alias] for alias in "SML"] == [SIZES[size] for size in ("134M", "500M", "780M")]
    assert 1.9e6 < count_parameters(SIZES["nano"]) < 2.1e6
    assert SIZES["S"].ffn_dim == 2048 and SIZES["M"].ffn_dim == 3584 and SIZES["L"].ffn_dim == 4096


def test_rank_follows_the_input_width():
    assert [rank_of(0.25, n, m) for m, n in [(768, 768), (2048, 768), (768, 2048)]] == [192, 192, 512]
    assert [rank_of(0.4, n, m) for m, n in [(768, 768), (2048, 768), (768, 2048)]] == [307, 307, 768]
    assert [rank_of(1.0, n, m) for m, n in [(768, 768), (2048, 768), (768, 2048)]] == [768, 768, 768]
    assert rank_of(0.01, 20, 20) == 1
    dense, wide = 768 * 2048, rank_of(0.4, 2048, 768) * (768 + 2048)
    assert 1.3 < wide / dense < 1.4  # the paper's rule makes the down projection larger than dense at 0.4
    for ratio in (0.0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match="rank_ratio"):
            rank_of(ratio, 8, 8)


def uniform(m, n):
    """A draw of nn.Linear(n, m)."""
    return torch.empty(m, n).uniform_(-1, 1) / n**0.5


@pytest.mark.parametrize("m, n, r", [(256, 256, 64), (704, 256, 64), (256, 704, 176)])
def test_spectral_initialisation_is_the_best_approximation_of_rank_r(m, n, r):
    W = uniform(m, n)
    A, B = spectral_factors(W, r)
    S = torch.linalg.svdvals(W.double())
    residual = torch.linalg.norm(W.double() - A.double() @ B.double().T)
    assert residual <= S[r:].norm() * (1 + 1e-5)  # Eckart and Young: nothing of rank r is closer
    for p in (A, B):  # balanced: both hold the square roots of the singular values
        assert torch.allclose(torch.linalg.vector_norm(p, dim=0).double(), S[:r].sqrt(), rtol=1e-3)
        gram = (p.T @ p).double()
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-3


@pytest.mark.parametrize("m, n, r", [(40, 24, 6), (24, 40, 10)])
def test_a_layer_starts_as_the_truncated_svd_of_nn_linears_own_draw(m, n, r):
    torch.manual_seed(7)
    layer = FactorizedLinear(n, m, r)
    torch.manual_seed(7)
    U, S, Vh = torch.linalg.svd(uniform(m, n).double())
    best = U[:, :r] * S[:r] @ Vh[:r]
    assert torch.allclose(layer.product(), best, atol=1e-6)
    for p, vectors in (layer.A, U[:, :r]), (layer.B, Vh[:r].T):
        assert torch.allclose(p.double().abs(), (vectors * S[:r].sqrt()).abs(), atol=1e-5)  # signs are free


def test_spectral_initialisation_does_not_depend_on_the_number_of_threads():
    """Two ranks and one process have to start alike."""
    layers, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        layers.append(FactorizedLinear(256, 768, 64))
    torch.set_num_threads(threads)
    assert torch.allclose(layers[0].A, layers[1].A, atol=1e-7)
    assert torch.allclose(layers[0].B, layers[1].B, atol=1e-7)


def test_spectral_initialisation_of_full_rank_and_of_a_rank_deficient_matrix():
    W = uniform(20, 12)
    assert torch.allclose(torch.matmul(*[f if i == 0 else f.T for i, f in enumerate(
        spectral_factors(W, 12))]), W, atol=1e-5)
    A, B = spectral_factors(torch.outer(torch.arange(6.0), torch.ones(4)), 3)
    assert A.isfinite().all() and B.isfinite().all()
    assert torch.allclose(A @ B.T, torch.outer(torch.arange(6.0), torch.ones(4)), atol=1e-4)


def test_initial_weights_depend_on_the_seed_only():
    def made(seed, config=TINY):
        torch.manual_seed(seed)
        return Llama(config)
    a, b, c = made(0), made(0), made(1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.head.weight, c.head.weight)
    assert 0.015 < a.embedding.weight.std() < 0.025 and 0.015 < a.head.weight.std() < 0.025


def plain_logits(model, tokens):
    """The paper's decoder in float64, position by position and head by head, from the model's parameters."""
    P = {name: p.detach().double() for name, p in model.named_parameters()}
    config, T = model.config, len(tokens)
    width = config.dim // config.n_heads

    def weight(name):
        return P[f"{name}.A"] @ P[f"{name}.B"].T if f"{name}.A" in P else P[f"{name}.weight"]

    def rms(x, gain):
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * gain

    def turn(x, position):  # rotate-half: component i pairs with i + width / 2
        out = x.clone()
        for i in range(width // 2):
            angle = torch.tensor(position * 10000.0 ** (-2 * i / width), dtype=torch.float64)
            out[i] = x[i] * angle.cos() - x[i + width // 2] * angle.sin()
            out[i + width // 2] = x[i + width // 2] * angle.cos() + x[i] * angle.sin()
        return out

    x = P["embedding.weight"][tokens]
    for b in range(config.n_layers):
        name = f"blocks.{b}"
        h = rms(x, P[f"{name}.attention_norm.weight"])
        q, k, v = (h @ weight(f"{name}.attention.{part}_proj").T for part in "qkv")
        heads = torch.zeros_like(q)
        for head in range(config.n_heads):
            s = slice(head * width, (head + 1) * width)
            qs, ks = (torch.stack([turn(z[t, s], t) for t in range(T)]) for z in (q, k))
            for t in range(T):
                p = torch.softmax(qs[t] @ ks[:t + 1].T / math.sqrt(width), 0)
                heads[t, s] = p @ v[:t + 1, s]
        x = x + heads @ weight(f"{name}.attention.o_proj").T
        h = rms(x, P[f"{name}.ffn_norm.weight"])
        gate, up = (h @ weight(f"{name}.ffn.{part}_proj").T for part in ("gate", "up"))
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ weight(f"{name}.ffn.down_proj").T
    return rms(x, P["norm.weight"]) @ P["head.weight"].T


@pytest.mark.parametrize("change", [{}, {"rank_ratio": None}, {"factorize": "ffn"}])
def test_logits_and_loss_equal_a_plain_float64_restatement(change):
    model = Llama(replace(TINY, **change))
    for name, p in model.named_parameters():  # gains of one and small embeddings would hide mistakes
        p.data += 0.3 * torch.randn_like(p) if "norm" in name or "embedding" in name else 0
    tokens, targets = torch.randint(50, (2, 16)), torch.randint(50, (2, 16))
    exact = torch.stack([plain_logits(model, row) for row in tokens])
    assert torch.allclose(model(tokens).double(), exact, atol=1e-5)
    log_p = exact - exact.exp().sum(-1, keepdim=True).log()
    loss = -log_p.gather(-1, targets.unsqueeze(-1)).mean()
    assert abs(model(tokens, targets).item() - loss.item()) < 1e-5
    # a shorter text has the same logits: no token sees what comes after it
    assert torch.allclose(model(tokens[:, :5]), model(tokens)[:, :5], atol=1e-6)


def test_a_loss_written_beside_ours_reads_the_logits_as_they_are():
    """The logits stay what they are, so that a reader can add a z-loss after the cross-entropy."""
    model, tokens = Llama(TINY), torch.randint(50, (2, 16))
    logits = model(tokens)
    before = logits.detach().clone()
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    (loss + logits.logsumexp(-1).square().mean()).backward()
    assert torch.equal(logits.detach(), before) and all(p.grad.isfinite().all() for p in model.parameters())


class Shapes(TorchDispatchMode):
    """Every shape that an operation returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.seen.add(tuple(x.shape))
        return out


def test_the_factorized_layer_never_forms_an_m_by_n_matrix():
    m, n, r = 40, 48, 4
    layer, x = FactorizedLinear(n, m, r), torch.randn(7, n, requires_grad=True)
    with Shapes() as probe:
        layer(x).sum().backward()
    assert (m, r) in probe.seen and (n, r) in probe.seen and (7, m) in probe.seen  # the probe sees
    assert all(math.prod(shape) < m * n for shape in probe.seen)
    with Shapes() as probe:
        nn.Linear(n, m)(x).sum().backward()
    assert (m, n) in probe.seen


def test_factorize_and_spectron_train_a_model_that_is_not_ours():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 64), nn.ReLU()),
                          nn.Linear(64, 8))
    x, biases = torch.randn(256, 32), [m.bias.detach().clone() for m in model.modules()
                                       if isinstance(m, nn.Linear)]
    y = (x[:, :8] * x[:, 8:16]).tanh()
    weights = [m.weight.detach().clone() for m in model.modules() if isinstance(m, nn.Linear)]

    pairs = factorize_(model, rank_ratio=0.25)
    optimizer = Spectron(pairs, lr=0.05)

    assert [tuple(p.shape) for pair in pairs for p in pair] == [(64, 8), (32, 8), (64, 16), (64, 16),
                                                                (8, 8), (64, 8)]
    layers = [m for m in model.modules() if isinstance(m, FactorizedLinear)]
    assert len(layers) == 3 and not any(isinstance(m, nn.Linear) for m in model.modules())
    for layer, W, bias in zip(layers, weights, biases):
        best = torch.linalg.svdvals(W)[layer.rank:].norm()
        assert torch.isclose(torch.linalg.norm(W - layer.A @ layer.B.T), best, atol=1e-4)
        assert torch.equal(layer.bias, bias)
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        model.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_lines_of_the_readme_train_a_sequential():
    readme = (ROOT / "README.md").read_text()
    start = readme.index("    from torch import nn")
    names = {}
    exec(textwrap.dedent(readme[start:readme.index("\n\nDistributedDataParallel", start)]), names)
    model, optimizer = names["model"], names["optimizer"]
    assert all(isinstance(model[i], FactorizedLinear) for i in (0, 2)) and len(names["pairs"]) == 2
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    for _ in range(100):
        loss = (model(x) - x[:, :8]).square().mean()
        model.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.6  # from about 1, the variance of x


def test_factorize_keeps_shared_layers_shared_and_refuses_tied_weights():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert len(factorize_(model, 0.5)) == 1 and model[0] is model[2]
    embedding, head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
    head.weight = embedding.weight
    with pytest.raises(ValueError, match="tied"):
        factorize_(nn.Sequential(embedding, head), 0.5)
    with pytest.raises(ValueError, match="wrap it"):
        factorize_(nn.Linear(4, 4), 0.5)
    with pytest.raises(ValueError, match="rank_ratio"):
        factorize_(nn.Sequential(nn.Linear(4, 4)), 1.5)
    frozen = nn.Sequential(nn.Linear(8, 8).requires_grad_(False))
    factorize_(frozen, 0.5)
    assert not any(p.requires_grad for p in frozen.parameters())
    half = nn.Sequential(nn.Linear(8, 8).bfloat16())
    factorize_(half, 0.5)
    assert (half[0].A.dtype == torch.bfloat16
            and half(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16)


@pytest.mark.parametrize("skip, unknown", [(["haed"], "haed"), ("head", "head"), (["2", "0.1"], "0.1")])
def test_a_name_to_skip_that_is_no_layer_is_refused_and_a_single_one_needs_no_list(skip, unknown):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), *(nn.Linear(8, 8) for _ in range(8)))
    with pytest.raises(ValueError, match=f"no nn.Linear of Sequential is '{unknown}'"):
        factorize_(model, 0.5, skip=skip)
    assert not any(isinstance(layer, FactorizedLinear) for layer in model)
    assert len(factorize_(model, 0.5, skip="10")) == 9 and type(model[10]) is nn.Linear


def test_parameters_split_into_factors_dense_matrices_and_the_rest():
    for change, n_pairs, n_dense in [({}, 14, 0), ({"factorize": "ffn"}, 6, 8),
                                     ({"rank_ratio": None}, 0, 14)]:
        model = Llama(replace(TINY, **change))
        pairs, dense, others = split_parameters(model)
        assert (len(pairs), len(dense)) == (n_pairs, n_dense) and len(block_matrices(model)) == 14
        assert len(others) == 2 + 2 * 2 + 1
        held = [id(p) for p in [*dense, *others, *(p for pair in pairs for p in pair)]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_flops_count_every_weight_but_the_embedding_and_half_of_the_scores():
    with torch.device("meta"):
        model = Llama(TINY)
    weights = count_parameters(TINY) - 50 * 24
    assert flops_per_token(model) == 6 * weights + 6 * 2 * 16 * 24
