"""Ends a training run at random moments (SIGKILL, SIGTERM, SIGHUP, or nobody reads its output any more) and
resumes it, until it is done; then compares it with the run that was not ended. And: does memory grow?

    python tests/soak.py --kills 50
    python tests/soak.py --memory 2000

The moments are uniform over the first seconds of each life, so that they fall into imports, the making of
the model, steps, validations and checkpoints alike. docs/FAULTS.md has what it printed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

import data
from lib.cli import Parser, command, number, positive
from tools import plot, prepare

SIZE = ["--size", "nano-0.6M", "--seq_len", "64", "--tokens_per_step", "512", "--device", "cpu", "--dtype",
        "float32"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(where: Path, corpus: Path, out: str, steps: int, *flags) -> subprocess.Popen:
    argv = [sys.executable, str(ROOT / "train.py"), *SIZE, "--data", str(corpus), "--steps", str(steps),
            "--out", str(where / out), *map(str, flags)]
    return subprocess.Popen(argv, cwd=where, env=ENV, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def soak(where: Path, kills: int, steps: int, seed: int) -> None:
    """Kill `kills` times; a run that is done before starts again in another directory."""
    flags = "--save_every", 7, "--eval_every", 25, "--eval_tokens", 4096, "--final_eval_tokens", 65536
    prepare.build_stdlib(where / "corpus", quiet=True)
    whole = start(where, where / "corpus", "whole", steps, *flags)
    said = whole.communicate()[0]
    assert whole.returncode == 0, said
    moments, done, lives, began = random.Random(seed), 0, 0, time.time()
    equal, struck = [], {}
    while done < kills or lives:
        out = f"killed-{len(equal)}"
        process = start(where, where / "corpus", out, steps, *flags, "--resume", "auto")
        lives += 1
        try:
            said = process.communicate(timeout=moments.uniform(0, 8) if done < kills else None)[0]
            assert process.returncode == 0, said
            equal.append(same(where / "whole", where / out))
            print(f"run {len(equal)}: {lives - 1} kills, then done; equal: {equal[-1]}", flush=True)
            lives = 0
        except subprocess.TimeoutExpired:
            way = moments.choice(["SIGKILL", "SIGTERM", "SIGHUP", "closed pipe"])
            if way == "closed pipe":
                process.stdout.close()
            else:
                process.send_signal(getattr(signal, way))
            process.wait(timeout=120)
            struck[way] = struck.get(way, 0) + 1
            done += 1
    ways = ", ".join(f"{way}: {count}" for way, count in sorted(struck.items()))
    print(f"{done} kills in {time.time() - began:.0f} s ({ways}). {sum(equal)} of {len(equal)} runs of "
          f"{steps} steps ended with the weights and the log of the run that was not killed, bit for bit.")
    assert all(equal)


def same(one: Path, two: Path) -> bool:
    """The same weights bit for bit, the same log up to the seconds, and no part file. A run that was told to
    stop has logged its last step as well."""
    states = [torch.load(out / "ckpt.pt", weights_only=True)["model"] for out in (one, two)]
    logs = [{row["step"]: {**row, "seconds": 0} for row in plot.read_log(out)[1]} for out in (one, two)]
    return (all(torch.equal(w, states[1][name]) for name, w in states[0].items())
            and logs[0] == {step: row for step, row in logs[1].items() if step in logs[0]}
            and list(logs[1]) == sorted(logs[1]) and not list(two.glob("*.part")))


def memory(where: Path, steps: int) -> None:
    """Anonymous memory and open files of nano over `steps` steps, on a corpus of 20 shards."""
    tokens = np.random.default_rng(0).integers(0, 256, 1_000_000)
    for i in range(20):
        data.write_shard(where / f"train_{i:06d}.bin", tokens)
    data.write_shard(where / "val_000000.bin", tokens[:100_000])
    (where / "meta.json").write_text(json.dumps({"tokenizer": "bytes"}))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--tokens_per_step", "1024", "--steps", str(steps),
         "--data", str(where), "--out", str(where / "out"), "--eval_tokens", "4096",
         "--final_eval_tokens", "65536", "--device", "cpu"],
        cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print("| step | anonymous memory, MB | open files |\n|---|---|---|")
    for row in process.stdout:
        if row.startswith("step "):
            step = int(row.split()[1].split("/")[0])
            if step % (steps // 10) == 0 or step == 10:
                status = Path(f"/proc/{process.pid}/status").read_text()
                anonymous = int(status.split("RssAnon:")[1].split()[0]) / 1024
                files = len(os.listdir(f"/proc/{process.pid}/fd"))
                print(f"| {step} | {anonymous:.1f} | {files} |", flush=True)
    assert process.wait() == 0


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=positive, help="how often to kill")
    parser.add_argument("--memory", type=positive, metavar="STEPS", help="watch the memory meanwhile")
    parser.add_argument("--steps", type=positive, default=1200, help="of the run that is killed (1200)")
    parser.add_argument("--seed", type=number(int), default=0, help="of the moments (0)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as where:
        if args.kills:
            soak(Path(where), args.kills, args.steps, args.seed)
        if args.memory:
            memory(Path(where), args.memory)


if __name__ == "__main__":
    main()
