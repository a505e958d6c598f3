"""A step on fake CUDA tensors: `python tests/fake_cuda_step.py FAKE_CUDA.so`, a child of test_gpu.py.

Prints how often the CPU waited for the device. A tensor on the wrong device is an error by itself."""

import ctypes
import importlib.util
import sys
from pathlib import Path

TORCH = Path(importlib.util.find_spec("torch").origin).parent / "lib"
for library in TORCH / "libc10.so", TORCH / "libtorch_cpu.so", sys.argv[1]:
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from lib.norms import Spectra
from model import Llama, LlamaConfig

torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # else autocast is off without a GPU
torch.cuda.is_bf16_supported = lambda *args: True
waits, blocking = [], []


class Watch(TorchDispatchMode):
    """Counts reads of a device tensor by the CPU, and copies to the device that are not asynchronous."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            waits.append(name)
            return 1.0
        out = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and isinstance(out, torch.Tensor):
            source = args[1] if name == "copy_" else args[0]
            if (source.device.type, out.device.type) == ("cuda", "cpu"):
                waits.append(name)
            elif (source.device.type, out.device.type) == ("cpu", "cuda") and source.ndim:
                asynchronous = (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
                blocking.extend([] if asynchronous else [name])
        return out


def tolist(x):
    waits.append("tolist")
    return [0.5] * x.numel()


FakeTensor.tolist, FakeTensor.pin_memory = tolist, lambda x: x.clone()
c = train.resolve(train.parse("--size nano-0.6M --device cuda --dry_run --dtype bfloat16 "
                              "--tokens_per_step 8192 --batch_size 16".split()))
device = torch.device("cuda", 0)
with FakeTensorMode(), Watch():
    with torch.device(device):
        model = Llama(LlamaConfig(**c.model))
    model.rope = model.rope.to(device)  # train.py calls model.to(device); fake parameters cannot be moved
    assert all(x.device == device for x in [*model.parameters(), *model.buffers()])
    optimizers = train.METHODS["spectron"].optimizers(model, c)
    probe = torch.zeros(1, 64, dtype=torch.int64, device=device)
    spectra = Spectra(model, c.spectra_of, optimizers, probe)
    x, y = (torch.zeros(32, 256, dtype=torch.int64) for _ in range(2))
    for _ in range(2):  # the first step makes the optimizers' state
        waits.clear(), blocking.clear()
        loss = train.backward(model, x, y, c)
        norm, loss, stops = train.read_back(model, loss, False)
        train.clip_gradients(model, 2.0)
        train.update(optimizers, 0.5)
    print(f"waits: {waits}; blocking copies: {blocking}")
    spectra.before()
    assert len(spectra.after()) == 9
