"""nano.py against the five files: the same defaults, first weights, batches and steps."""

import numpy as np
import pytest
import torch

import data
import nano
import train
from conftest import TINY
from model import SIZES, FactorizedLinear, Llama, LlamaConfig
from tools import plot


@pytest.fixture
def tiny(monkeypatch):
    """nano.py at the size of the tests' runs."""
    size = SIZES["nano-0.6M"]
    for name, value in dict(T=32, D=size.dim, HEADS=size.n_heads, LAYERS=size.n_layers, HIDDEN=size.ffn_dim,
                            STEPS=6, BATCH=8).items():
        monkeypatch.setattr(nano, name, value)


def test_its_numbers_are_the_defaults_of_train_py():
    c = train.resolve(train.parse(["--device", "cpu"]))
    size = LlamaConfig(**c.model)
    assert (nano.V, nano.T, nano.D, nano.HEADS, nano.LAYERS, nano.HIDDEN, nano.RATIO) == (
        size.vocab_size, size.seq_len, size.dim, size.n_heads, size.n_layers, size.ffn_dim, size.rank_ratio)
    assert (nano.STEPS, nano.BATCH * nano.T, nano.ETA, nano.BETA, nano.ADAM_LR, nano.WARMUP) == (
        c.steps, c.tokens_per_step, c.lr, c.momentum, c.adam_lr, train.WARMUP)
    assert [nano.lr_factor(step) for step in range(240)] == [train.schedule(step, 240) for step in range(240)]


def test_it_begins_with_the_weights_of_model_py(tiny):
    torch.manual_seed(0)
    mine = nano.Llama()
    torch.manual_seed(0)
    theirs = Llama(LlamaConfig(nano.D, nano.LAYERS, nano.HEADS, vocab_size=nano.V, seq_len=nano.T))
    products = [[layer.A @ layer.B.T for layer in model.modules() if isinstance(layer, kind)]
                for model, kind in ((mine, nano.LowRank), (theirs, FactorizedLinear))]
    assert len(products[0]) == 14
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*products, strict=True))
    assert torch.equal(mine.embedding.weight, theirs.embedding.weight)
    assert torch.equal(mine.head.weight, theirs.head.weight)
    tokens = torch.randint(0, 257, (2, nano.T))
    assert torch.allclose(mine(tokens), theirs(tokens), atol=1e-5)


def test_its_steps_are_those_of_train_py(tiny, tmp_path, capsys):
    """On the same bytes, for more than an epoch: the same losses, and the same movement of each weight."""
    tokens = np.frombuffer(nano.corpus()[:1200].tobytes(), np.uint8)
    for split in "train", "val":
        data.write_shard(tmp_path / f"{split}_000000.bin", tokens)
    (tmp_path / "meta.json").write_text('{"tokenizer": "bytes"}')
    split = data.open_split(tmp_path, "train", nano.T, "bytes")
    assert split.windows < nano.STEPS * nano.BATCH
    for step in range(nano.STEPS):
        for mine, theirs in zip(nano.batch(tokens, step), split.batch(step, nano.BATCH, 0)):
            assert torch.equal(mine, theirs)
    train.main([*TINY, "--data", str(tmp_path), "--steps", str(nano.STEPS), "--out", str(tmp_path / "run")])
    model, losses = nano.train(tokens, nano.STEPS)
    assert losses == pytest.approx([row["loss"] for row in plot.read_log(tmp_path / "run")[1]], abs=1e-4)
    weights = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["model"]
    pairs = [(layer.A, layer.B) for layer in model.modules() if isinstance(layer, nano.LowRank)]
    names = [name[:-2] for name in weights if name.endswith(".A")]
    torch.manual_seed(0)
    start = [layer.A @ layer.B.T for layer in nano.Llama().modules() if isinstance(layer, nano.LowRank)]
    for (A, B), name, W0 in zip(pairs, names, start, strict=True):
        W = weights[f"{name}.A"] @ weights[f"{name}.B"].T
        assert (A @ B.T - W).norm() < 0.01 * (W - W0).norm(), name


def test_it_writes_a_sample_after_its_corpus(tiny):
    torch.manual_seed(0)
    assert nano.sample(nano.Llama(), count=40).startswith("def ")
    assert nano.corpus().dtype == np.uint8 and len(nano.corpus()) > 1_000_000


def test_at_its_own_size_it_has_the_losses_of_train_py(monkeypatch, tmp_path):
    """Eight steps, of which only the batch is smaller."""
    monkeypatch.setattr(nano, "T", 64)
    monkeypatch.setattr(nano, "BATCH", 4)
    tokens = nano.corpus()[:50_000]
    for split, part in ("train", tokens), ("val", tokens[:300]):
        data.write_shard(tmp_path / f"{split}_000000.bin", part)
    (tmp_path / "meta.json").write_text('{"tokenizer": "bytes"}')
    train.main(["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--seq_len", "64",
                "--tokens_per_step", "256", "--stop_at", "8", "--spectra_every", "1", "--dtype", "float32",
                "--device", "cpu"])
    _, losses = nano.train(tokens, 8)
    assert losses == pytest.approx([row["loss"] for row in plot.read_log(tmp_path / "run")[1]], abs=1e-4)
    assert losses[-1] < losses[0] - 0.5


def test_its_sample_is_text_that_begins_with_the_prompt():
    assert nano.sample(nano.Llama(), b"import ", count=3).startswith("import ")
