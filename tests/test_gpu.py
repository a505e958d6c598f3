"""What a GPU will need and a CPU can show: one compiled graph, and a whole step on fake CUDA tensors."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from launch import FLOAT64, train_on
from model import SIZES
from tools import plot

SMALL = FLOAT64 + """import dataclasses, model
model.SIZES["nano-0.6M"] = dataclasses.replace(model.SIZES["nano-0.6M"], n_layers=1)
"""
COMPILE = """import torch, torch._dynamo
torch._dynamo.config.error_on_recompile = True
real, torch.compile = torch.compile, lambda model: real(model, fullgraph=True, backend=BACKEND)
"""
needs_gcc = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler, g++")


@pytest.fixture
def same_losses_compiled(run, float64, corpus, tmp_path, monkeypatch):
    """same_losses_compiled(ranks, batch_size, backend): through train.py, with validation, the probe and a
    sample between."""
    def check(ranks, batch_size, backend):
        flags = ["--size", "nano-0.6M", "--steps", 4, "--eval_every", 2, "--lr", 0.02, "--adam_lr", 0.001,
                 "--data", corpus]
        monkeypatch.setitem(SIZES, "nano-0.6M", dataclasses.replace(SIZES["nano-0.6M"], n_layers=1))
        run(*flags, out="plain")
        train_on(tmp_path, ranks, [*flags, "--compile", "--batch_size", batch_size, "--out", tmp_path / "c"],
                 f"import os\nos.environ['TORCHINDUCTOR_CACHE_DIR'] = {str(tmp_path / 'kernels')!r}\n"
                 f"BACKEND = {backend!r}\n{SMALL}{COMPILE}", whole_end=True)
        plain, compiled = ([(row["loss"], row["val_loss"]) for row in plot.read_log(tmp_path / name)[1]]
                           for name in ("plain", "c"))
        for found, expected in zip(compiled, plain, strict=True):
            assert found == pytest.approx(expected, abs=1e-5)
    return check


@needs_gcc
def test_compiled_training_is_one_graph_that_never_recompiles_also_with_ranks(same_losses_compiled):
    """With no_sync, and 2 micro-steps on each of two ranks."""
    same_losses_compiled(2, 2, "aot_eager")


@needs_gcc
@pytest.mark.inductor
def test_compiled_training_has_the_same_losses_with_the_kernels_of_inductor(same_losses_compiled):
    same_losses_compiled(1, 8, "inductor")


@needs_gcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")
def test_a_step_on_a_gpu_stays_on_it_and_waits_for_it_once(tmp_path):
    """On fake CUDA tensors a tensor on the wrong device is an error. The one wait is for the clip's norm."""
    found, library = Path(torch.__file__).parent, tmp_path / "fake_cuda.so"
    built = subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{found}/include", ROOT / "tests/fake_cuda.cpp", "-o",
         library, f"-L{found}/lib", "-lc10", "-ltorch_cpu"], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"this torch has other headers: {built.stderr[-200:]}")
    done = subprocess.run([sys.executable, ROOT / "tests/fake_cuda_step.py", library], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "waits: ['tolist']; blocking copies: []\n"
