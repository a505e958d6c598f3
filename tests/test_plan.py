"""tools/plan.py and tools/machine.py: what a run needs, and where it was made."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from model import SIZES, Llama
from tools import machine, plan


def planned(capsys, *flags) -> str:
    """What --dry_run prints, on one line."""
    train.main([*flags, "--dry_run"])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("size", [*SIZES])
def test_a_dry_run_of_every_size_needs_no_data_and_writes_nothing(capsys, tmp_path, monkeypatch, size):
    monkeypatch.chdir(tmp_path)
    printed = planned(capsys, "--size", size)
    assert all(word in printed for word in ("parameters", "FLOPs", "tokens a step", "shard", "gradients",
                                            "optimizer"))
    assert os.listdir(tmp_path) == []


def test_the_plan_of_S_has_the_numbers_of_the_paper_and_of_its_memory(capsys, tmp_path, monkeypatch):
    """S with GPT-2's tokens: 121.7M weights in fp32; momentum for 44.4M in factors, two moments else."""
    monkeypatch.chdir(tmp_path)
    printed = planned(capsys, "--size", "S")
    assert "121,719,552 parameters" in printed and "2,556 steps" in printed and "27 shard(s)" in printed
    assert "weights 0.49 GB, gradients 0.49 GB, optimizer 0.80 GB" in printed


@pytest.mark.parametrize("flags, there, absent", [
    ([], ["renormalize on", "ns_steps", "power_steps"], ["muon_lr", "method_args", "stop_at", "None"]),
    (["--no-renormalize"], ["renormalize off", "ns_steps"], ["power_steps"]),
    (["--factorize", "ffn"], ["muon_lr 0.02"], []),
    (["--method", "adamw"], ["adam_lr", "rank_ratio"], ["renormalize", "momentum", "ns_steps", "muon_lr"]),
    (["--method", "dense"], ["momentum", "ns_steps 5"], ["renormalize", "rank_ratio", "factorize"]),
    (["--method", "lora-muon"], ["momentum"], ["weight_decay", "renormalize", "shape_scale"]),
    (["--method", "galore", "--method_args", "gap=10"], ["method_args gap=10", "lr 0.02"], ["rank_ratio"])])
def test_the_settings_are_in_groups_and_those_that_this_method_has(capsys, flags, there, absent):
    settings = planned(capsys, *flags, "--device", "cpu").split(" model: ")[0]
    starts = [settings.index(f"{title}: ") for title in train.FLAGS_BY_TOPIC]
    assert starts == sorted(starts) and starts[0] == 0
    assert all(text in settings for text in there) and not any(text in settings for text in absent)


def test_the_memory_of_a_matrix_says_what_it_adds(capsys):
    assert ("each matrix of a block, in MB of weights + gradients + optimizer state: q_proj, k_proj, v_proj, "
            "o_proj 0.131 + 0.131 + 0.131" in planned(capsys, "--device", "cpu"))


@pytest.mark.parametrize("method, size", [("spectron", "0.80"), ("adamw", "0.97")])
def test_adamw_keeps_two_moments_of_every_parameter(capsys, tmp_path, monkeypatch, method, size):
    monkeypatch.chdir(tmp_path)
    assert f"optimizer {size} GB" in planned(capsys, "--size", "S", "--method", method)


@pytest.mark.parametrize("method, o_proj, down_proj", [
    ("spectron", (2 * 256 * 64,) * 3, (192 * (768 + 256),) * 3),
    ("galore", (256 * 256, 256 * 256, 3 * 64 * 256), (768 * 256, 768 * 256, 64 * (256 + 2 * 768))),
    ("relora", (256 * 256 + 2 * 256 * 64, 2 * 256 * 64, 4 * 256 * 64),
     (768 * 256 + 192 * 1024, 192 * 1024, 2 * 192 * 1024)),
    ("self-guided", (256 * 256 + 2 * 256 * 64,) * 2 + (2 * 256 * 256 + 4 * 256 * 64,),
     (768 * 256 + 192 * 1024,) * 2 + (2 * 768 * 256 + 2 * 192 * 1024,))])
def test_each_method_says_what_weights_gradients_and_state_each_matrix_keeps(method, o_proj, down_proj):
    """In floats, but for Adam's count of steps; the random numbers of the run are not touched."""
    c = train.resolve(train.parse(["--method", method, "--device", "cpu"]))
    with torch.device("meta"):
        model = Llama(train.LlamaConfig(**c.model), train.find_method(method, {}).linear)
    before = torch.get_rng_state()
    found = plan.block_memory(c, model)
    assert torch.equal(before, torch.get_rng_state())
    for name, expected in ("attention.o_proj", o_proj), ("ffn.down_proj", down_proj):
        assert [x / 4 for x in found[name]] == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", ["S", "L"])
def test_the_estimate_of_activations_is_what_autograd_keeps_and_the_copies_of_the_loss(size, dtype):
    """Within a fifth, for an eager step: the loss is on top of what is kept with two copies of the logits."""
    config, kept = SIZES[size], {}

    def keep(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Llama(config)
        tokens = torch.zeros(2, config.seq_len, dtype=torch.int64)
        with (torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
              torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")):
            model(tokens, tokens)
    for p in [*model.parameters(), model.rope]:
        kept.pop(p.untyped_storage()._cdata, None)
    c = SimpleNamespace(dtype=dtype, compile=False, method="spectron", batch_size=2)
    expected = sum(kept.values()) + 8 * config.vocab_size * tokens.numel()
    assert plan.memory(c, model)["activations, about"] == pytest.approx(expected, rel=0.2)


def test_the_peak_of_a_gpu_is_known_or_not_said():
    known = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12,
             "NVIDIA L4": 121e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA GeForce RTX 4090": 165e12,
             "NVIDIA H200 NVL": 835e12, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None, "NVIDIA L40": None,
             "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA GeForce RTX 3090 Ti": None, "Tesla T4": None}
    assert {gpu: machine.peak_flops(gpu) for gpu in known} == known


def test_a_log_says_where_it_was_made():
    found = machine.provenance()
    assert found["versions"]["torch"] and found["hardware"]["cores"] == os.cpu_count()
