"""Ranks of train.py in processes of their own, for tests."""

import os
import subprocess
import sys

from conftest import ROOT, TINY

FLOAT64 = "import torch; torch.set_default_dtype(torch.float64)\n"
SHORT_END = "from tools import report\nreport.end_of_run = lambda *args: None\n"


def torchrun(where, ranks: int, flags, before: str = FLOAT64, after: str = "", tiny=TINY,
             whole_end=False):
    """train.main(tiny + flags) on so many gloo ranks, one thread each. It runs in float64 unless `before`
    says otherwise: sums over ranks and over micro-steps round in another order, and optimizers like Adam
    turn the rounding of a tiny gradient into a whole step."""
    script = where / f"rank_of_{ranks}.py"
    argv = [*tiny, *map(str, flags)]
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{before}import train\n"
                      f"{'' if whole_end else SHORT_END}"
                      f"train.main({argv!r})\n{after}")
    ranked = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = subprocess.run([sys.executable, *ranked, str(script)], cwd=where, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done
