"""Devices and their precision, and the ranks of torchrun."""

import importlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from lib.cli import UserError, rank_and_ranks


def choose_device(device: str | None = None) -> str:
    """The device asked for; without that cuda if there is one, else the CPU: mps is untested, so that it has
    to be asked for. UserError if there is none of that kind."""
    there = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.backends.mps.is_available()}
    found = [name for name in there if there[name]]
    if device and device not in found:
        raise UserError(f"--device {device}: torch {torch.__version__} finds none here. There is: --device "
                        + " or ".join(found))
    return device or found[0]


def join_ranks(device: str) -> torch.device:
    """This rank's device. Under torchrun it returns after the ranks have found each other."""
    where = torch.device(device)
    if device == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
        if where.index >= torch.cuda.device_count():
            raise UserError(f"torchrun starts more ranks than there are GPUs: --nproc_per_node="
                            f"{torch.cuda.device_count()} at most, or --device cpu")
        torch.cuda.set_device(where)
    if rank_and_ranks()[1] > 1:
        # Import it now: imported later, by DDP or an optimizer, it would keep the group alive in default
        # arguments, and Gloo's threads would now and then abort the interpreter's exit.
        importlib.import_module("torch._dynamo")
        # After a restart torchrun's store still has the addresses of the ranks that are gone: a prefix hides
        # them. A rank that waits for another one longer than `timeout` gives up.
        store, rank, ranks = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank,
                                world_size=ranks, timeout=timedelta(minutes=10))
    return where


def my_rank() -> tuple[int, int]:
    """(rank, ranks) of the process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's tensor, on the CPU. NCCL needs it on the GPU meanwhile."""
    if dist.is_initialized():
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values)
    return values.cpu()


def precision(device, dtype: str):
    """Autocast to bfloat16 over fp32 weights, or nothing where dtype is float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def native_bf16(device: str) -> bool:
    """Whether this device multiplies bfloat16 matrices in hardware. Elsewhere torch does so too, slowly."""
    if device == "cpu":
        return any(getattr(torch.cpu, probe, lambda: False)()
                   for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return device == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_bf16_supported(False))
