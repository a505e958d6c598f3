"""Where a run was made: the CPU, the GPU and its peak, the commit of this code."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

# By the data sheets, without sparsity. A longer name stands before a shorter one that it begins with.
PEAK_BF16_FLOPS = {"B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12,
                   "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
                   "RTX 4090": 165e12, "RTX 3090": 71e12}


def provenance() -> dict:
    """Commit, versions and hardware, for the first record of a log."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"git": commit(), "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                         "gpu": gpu}}


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.machine()


def commit() -> str | None:
    """The commit of this code, with -dirty where a .py file differs from it. None without git."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True,
                              encoding="utf-8", errors="replace")

    found = git("rev-parse", "HEAD").stdout.strip() if shutil.which("git") else ""
    if found and git("diff", "--quiet", "HEAD", "--", ":/*.py").returncode:
        found += "-dirty"
    return found or None


def peak_flops(gpu: str) -> float | None:
    """bf16 FLOPs per second of this GPU by its data sheet; None for one that is not in the table, and for a
    part of one (MIG)."""
    return next((flops for name, flops in PEAK_BF16_FLOPS.items()
                 if re.search(rf"\b{name}\b(?! (Laptop|Ti|SUPER|D\b)|.*\bMIG\b)", gpu)), None)
