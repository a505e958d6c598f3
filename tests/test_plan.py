"""tools/plan.py and tools/machine.py: what a run needs, and where it was made."""

import os
import re

import pytest

import train
from model import SIZES
from tools import machine


@pytest.mark.parametrize("size", [*SIZES])
def test_a_plan_of_every_size_is_told_without_data(capsys, tmp_path, monkeypatch, size):
    monkeypatch.chdir(tmp_path)
    train.main(["--size", size, "--dry_run"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("parameters", "FLOPs", "tokens a step", "shard", "gradients",
                                            "optimizer"))
    assert os.listdir(tmp_path) == []


def test_the_memory_of_weights_gradients_and_state_is_exact(capsys, tmp_path, monkeypatch):
    """S with GPT-2's tokens: 121.7M weights in fp32; momentum for 44.4M in factors, two moments else."""
    monkeypatch.chdir(tmp_path)
    train.main(["--size", "S", "--dry_run"])
    printed = capsys.readouterr().out.replace("\n  ", " ")
    assert re.search(r"weights 0.49 GB, gradients 0.49 GB, optimizer 0.80 GB", printed)


def test_the_peak_of_a_gpu_is_known_or_not_said():
    known = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12,
             "NVIDIA L4": 121e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA GeForce RTX 4090": 165e12,
             "NVIDIA L40": None,
             "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA GeForce RTX 3090 Ti": None, "Tesla T4": None}
    assert {gpu: machine.peak_flops(gpu) for gpu in known} == known


def test_a_log_says_where_it_was_made():
    found = machine.provenance()
    assert found["versions"]["torch"] and found["hardware"]["cores"] == os.cpu_count()
