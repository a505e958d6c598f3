"""nano.py is train.py in one file: on the same bytes it takes the same steps."""

import numpy as np
import pytest
import torch

import data
import nano
from conftest import ROOT
from tools.plot import read_log
from train import main

STEPS, SEQ_LEN, SEQUENCES = 8, 64, 4


@pytest.fixture
def shards(tmp_path):
    """A directory of shards whose training tokens are what nano.py reads."""
    tokens = nano.corpus()[:50_000]
    (tmp_path / "bytes").mkdir()
    for split, part in ("train", tokens), ("val", tokens[:300]):
        data.write_shard(tmp_path / "bytes" / f"{split}_000000.bin", part)
    (tmp_path / "bytes" / "meta.json").write_text('{"tokenizer": "bytes"}')
    return tmp_path / "bytes", tokens


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(nano, "T", SEQ_LEN)
    monkeypatch.setattr(nano, "BATCH", SEQUENCES)


def test_nano_has_the_losses_of_train_py(tmp_path, shards):
    directory, tokens = shards
    _, losses = nano.train(tokens, STEPS)
    main(["--data", str(directory), "--out", str(tmp_path / "run"), "--seq_len", str(SEQ_LEN),
          "--tokens_per_step", str(SEQ_LEN * SEQUENCES), "--stop_at", str(STEPS), "--spectra_every", "1",
          "--dtype", "float32", "--device", "cpu"])
    logged = [record["loss"] for record in read_log(tmp_path / "run")[1]]
    assert len(logged) == STEPS and losses[-1] < losses[0] - 0.5
    assert np.abs(np.array(losses) - logged).max() < 1e-4


def test_an_epoch_sees_each_window_once_in_the_order_of_data_py(tmp_path, shards):
    directory, tokens = shards
    split = data.open_split(directory, "train", SEQ_LEN, "bytes")
    per_epoch = split.windows // SEQUENCES + 1
    for step in 0, per_epoch - 1, per_epoch:  # the middle one reaches into the second epoch
        for ours, theirs in zip(nano.batch(tokens, step), split.batch(step, SEQUENCES, seed=0)):
            assert torch.equal(ours, theirs)


def test_a_sample_is_text_that_begins_with_the_prompt():
    assert nano.sample(nano.Llama(), b"import ", count=3).startswith("import ")


def test_nano_needs_torch_and_numpy_alone():
    lines = (ROOT / "nano.py").read_text().splitlines()
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"math", "sysconfig", "pathlib", "numpy", "torch"}
