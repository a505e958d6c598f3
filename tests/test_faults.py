"""Faults done for real: kills, full disks, flipped bits, dead ranks, two runs in one directory.

tests/soak.py kills at random moments, as often as you like; tests/test_fuzz.py mutates inputs.
"""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import data
import eval as evaluation
import train
from conftest import ROOT, TINY
from launch import FLOAT64, Child, finished, ranks_of, train_on
from lib.checkpoints import load_checkpoint, read_checkpoint
from lib.cli import UserError
from lib.files import lock
from tools import export, plot, prepare

FLAGS = ["--steps", "12", "--save_every", "4", "--eval_every", "6"]
DIE = "os.kill(os.getpid(), signal.SIGKILL)"


def weights(out):
    return torch.load(out / "ckpt.pt", weights_only=True)["model"]


def assert_same(one, two):
    """The same weights bit for bit, and the same log up to the seconds."""
    assert all(torch.equal(w, weights(two)[name]) for name, w in weights(one).items())
    timeless = [[{**row, "seconds": 0} for row in plot.read_log(out)[1]] for out in (one, two)]
    assert timeless[0] == timeless[1]


def child(script: str, argv) -> Child:
    """train.main(argv) in a process of its own, after `script`, without a figure at its end."""
    return Child("import os, signal, sys, time\nimport torch\nimport data, train\n"
                 "from lib import run_directory\nfrom tools import plot, prepare\n"
                 f"plot.figure = lambda *args: None\n{script}\ntrain.main(sys.argv[1:])", argv)


def wait_for(process: Child, text: str) -> None:
    for row in process.stdout:
        if text in row:
            return
    pytest.fail(f"ended without {text!r}: {process.stderr.read()}")


# ------------------------------------------- Killed, and resumed --------------------------------------------

MOMENTS = {
    "before the first checkpoint": f"train.backward = lambda *args: {DIE}",
    "in the middle of a checkpoint": f"""save, calls = torch.save, []
def dying(obj, file):
    save(obj, file)
    calls.append(file)
    if len(calls) == 2:
        file.truncate(file.tell() // 2)
        {DIE}
torch.save = dying""",
    "between the two names of a checkpoint": f"""replace, calls = os.replace, []
def dying(part, path):
    calls.extend([path] * str(path).endswith("ckpt.pt"))
    if len(calls) == 2: {DIE}
    replace(part, path)
os.replace = dying""",
    "during a validation": f"train.validate = lambda *args: {DIE}",
    "in the middle of a line of the log": f"""append = run_directory.append
def dying(log, record):
    if record.get("step") == 7:
        log.write(b'{{"step": 7, "lo')
        {DIE}
    append(log, record)
run_directory.append = dying"""}


@pytest.fixture(scope="module")
def killed(corpus, tmp_path_factory):
    """One run that was not killed, and a child for each of the moments, all at once."""
    where = tmp_path_factory.mktemp("killed")
    argvs = {moment: [*TINY, "--data", corpus, *FLAGS, "--out", where / moment.replace(" ", "-"),
                      "--resume", "auto"] for moment in ("whole", *MOMENTS)}
    children = {moment: child(script, argvs[moment]) for moment, script in MOMENTS.items()}
    train.main(list(map(str, argvs["whole"])))
    return argvs, children


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_ends_as_the_run_that_was_not(killed, fails, moment):
    argvs, children = killed
    children[moment].communicate(timeout=120)
    assert children[moment].returncode == -signal.SIGKILL
    whole, out = (argvs[name][argvs[name].index("--out") + 1] for name in ("whole", moment))
    if moment == "before the first checkpoint":
        fails(train.main, ["--resume", "--out", out], "before the first one", "--resume auto")
    train.main(list(map(str, argvs[moment])))
    assert_same(whole, out)
    assert not list(out.glob("*.part"))


def test_a_corpus_that_was_killed_is_built_again_and_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("x\n\n" * 9000)
    argv = ["text", str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "d")]
    process = child(f"""write = prepare.write_shard
def dying(path, tokens):
    write(path, tokens)
    {DIE}
prepare.write_shard = dying
prepare.main({argv!r})""", [])
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL and (tmp_path / "d.building").is_dir()
    prepare.main(argv)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "d"]
    assert data.open_split(tmp_path / "d", "train", 64, "bytes").windows > 100


def test_a_directory_of_another_is_not_taken_for_a_corpus_half_built(tmp_path, fails):
    (tmp_path / "a.txt").write_text("x\n\n" * 9000)
    (tmp_path / "d.building").mkdir()
    (tmp_path / "d.building" / "novel").write_text("the only copy")
    fails(prepare.main, ["text", tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "d"],
          "d.building", "is in the way")
    assert (tmp_path / "d.building" / "novel").read_text() == "the only copy"


# ------------------------------------------------- Signals --------------------------------------------------

def test_a_signal_saves_after_its_step_and_a_second_one_leaves_at_once(run, corpus, tmp_path):
    """SIGTERM exits with 0, Ctrl-C with 130; the second Ctrl-C does not wait for the step."""
    flags = ["--steps", 40, "--save_every", 1000]
    out = tmp_path / "run"
    process = child("", [*TINY, "--data", corpus, *flags, "--out", out])
    wait_for(process, "step ")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and f"Go on: python train.py --resume --out {out}" in said
    step = load_checkpoint(out)["step"]
    slow = """backward, calls = train.backward, []
def waiting(*args):
    calls.append(print("here", flush=True))
    time.sleep(600 * (len(calls) > 2) + 0.5)
    return backward(*args)
train.backward = waiting"""
    for signals, seconds, more in (1, 120, 1), (2, 20, 0):  # how often Ctrl-C, and how much is done by it
        process = child(slow, ["--resume", "--out", out])
        wait_for(process, "here")
        if signals == 2:
            [wait_for(process, "here") for _ in range(2)]
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        said, error = process.communicate(timeout=seconds)
        assert process.returncode == 130 and "Traceback" not in error
        step += more
        assert load_checkpoint(out)["step"] == step
    train.main(["--resume", "--out", str(out)])
    whole = run(*flags, out="whole")
    assert all(torch.equal(w, weights(out)[name]) for name, w in weights(whole).items())


def test_two_runs_in_one_directory_are_refused_until_the_first_is_gone(run, corpus, tmp_path, fails):
    out = run("--steps", 8, "--stop_at", 4)
    process = child("train.backward = lambda *args: (print('here', flush=True), time.sleep(600))",
                    ["--resume", "--out", out])
    wait_for(process, "here")
    before = (out / "log.jsonl").read_bytes(), (out / "ckpt.pt").read_bytes()
    new = [*TINY, "--data", corpus, "--out", out, "--steps", 8]
    for argv in ["--resume", "--out", out], [*new, "--overwrite"], [*new, "--resume", "auto"]:
        fails(train.main, argv, "another process trains in", out)
    assert before == ((out / "log.jsonl").read_bytes(), (out / "ckpt.pt").read_bytes())
    process.kill()
    process.communicate()
    train.main(["--resume", "--out", str(out)])
    assert load_checkpoint(out)["step"] == 8


# -------------------------------------------------- Ranks ---------------------------------------------------

def test_a_rank_that_dies_is_named_and_torchrun_goes_on_to_the_same_end(run, float64, corpus, tmp_path):
    """Rank 1 kills itself in the first attempt, and so does rank 0 in the second. All are real starts."""
    argv = [*TINY, "--data", corpus, *FLAGS]
    script = tmp_path / "ranks.py"
    script.write_text(f"""import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})
{FLOAT64}import train
attempt, rank = (int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
schedule = train.schedule
def dying(step, steps):
    if (attempt, rank, step) in ((0, 1, 6), (1, 0, 9)): {DIE}
    return schedule(step, steps)
train.schedule = dying
train.main(sys.argv[1:])""")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "--max-restarts=3", script, *map(str, argv), "--resume", "auto", "--out", tmp_path / "two"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "error: another rank has ended" in done.stderr and "--resume auto" in done.stderr
    assert "refused" not in done.stderr  # gloo, at the address of a rank that is gone
    one, two = weights(run(*FLAGS)), weights(tmp_path / "two")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-9
    assert [row["step"] for row in plot.read_log(tmp_path / "two")[1]] == list(range(1, 13))


def test_all_ranks_stop_at_the_step_in_which_one_is_told_to(corpus, tmp_path):
    """And the run saves, and ends with 0."""
    told = """import os, signal, sys, train
schedule = train.schedule
def told(step, steps):
    if (step, os.environ["RANK"]) == (5, "1"):
        os.kill(os.getpid(), signal.SIGTERM)
    return schedule(step, steps)
train.schedule = told
train.main(sys.argv[1:])"""
    finished(ranks_of(2, told, [*TINY, "--data", corpus, *FLAGS, "--out", tmp_path / "run"]))
    assert load_checkpoint(tmp_path / "run")["step"] == 6


def test_a_run_goes_on_with_other_ranks_and_another_batch_size(run, float64, tmp_path):
    one, two = run("--steps", 8, out="one"), run("--steps", 8, "--stop_at", 4, out="two")
    train_on(tmp_path, 2, ["--resume", "--batch_size", 2, "--out", two], tiny=())
    losses = [[row["loss"] for row in plot.read_log(out)[1]] for out in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)
    assert max(float((w - weights(two)[name]).abs().max()) for name, w in weights(one).items()) < 1e-9


def test_resume_auto_is_for_our_own_directories_and_a_run_that_is_done(run, corpus, tmp_path, fails, capsys):
    out = tmp_path / "run"
    auto = [*TINY, "--data", str(corpus), "--steps", "4", "--resume", "auto", "--out", str(out)]
    out.mkdir()
    (out / "novel.txt").write_text("the only copy")
    fails(train.main, auto, "exists", out)
    (out / "novel.txt").unlink()
    train.main(auto)
    capsys.readouterr()
    train.main(auto)
    assert "nothing is left to do" in capsys.readouterr().out
    fails(train.main, [*auto, "--lr", "0.3"], "--lr 0.3")


# -------------------------------------------------- Damage --------------------------------------------------

def flipped(raw: bytes, bit: int) -> bytes:
    return raw[:bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1:]


def test_any_flipped_bit_of_a_checkpoint_is_found_and_the_older_one_named(run, fails):
    out = run("--steps", 12, "--save_every", 4, "--stop_at", 11)
    path, raw = out / "ckpt.pt", (out / "ckpt.pt").read_bytes()
    bits = [random.Random(seed).randrange(8 * len(raw)) for seed in range(60)]
    ends = [*range(0, 64, 9), *range(8 * len(raw) - 200, 8 * len(raw), 9)]
    for bit in bits + ends:
        path.write_bytes(flipped(raw, bit))
        with pytest.raises(Exception):
            read_checkpoint(path)
    for damaged in flipped(raw, bits[0]), raw[:-1], raw[:-12], raw[:1000], b"", raw + b"x":
        path.write_bytes(damaged)
        old = out / "ckpt.old.pt"
        fails(train.main, ["--resume", "--out", out], path, "damaged", f"{old}, of step 8, is whole",
              f"cp {old}")
        fails(evaluation.main, [out], path, "damaged", old)
    path.unlink()
    fails(train.main, ["--resume", "--out", out], "does not exist", old)
    shutil.copy(old, path)  # what the message says
    train.main(["--resume", "--out", str(out)])
    assert_same(run("--steps", 12, "--save_every", 4, out="whole"), out)


def test_a_checkpoint_without_a_seal_is_read_and_checked_by_the_crc_of_its_zip(run, tmp_path):
    """As somebody saves one who has changed it by hand."""
    out = run("--steps", 1)
    torch.save(torch.load(out / "ckpt.pt", weights_only=True), tmp_path / "old.pt")
    assert load_checkpoint(tmp_path / "old.pt")["step"] == 1
    raw = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "old.pt").write_bytes(flipped(raw, 4 * len(raw)))
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path / "old.pt")


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_cannot_run_code(run, tmp_path, fails):
    out = run("--steps", 1)
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    torch.save({**checkpoint, "config": {**checkpoint["config"], "data": Code(str(tmp_path / "ran"))}},
               out / "ckpt.pt")
    fails(evaluation.main, [out], "damaged, or not a checkpoint")
    (out / "ckpt.pt").write_bytes(pickle.dumps(Code(str(tmp_path / "ran"))))
    fails(train.main, ["--resume", "--out", out], "damaged, or not a checkpoint")
    assert not (tmp_path / "ran").exists()


def test_any_flipped_bit_of_a_shard_is_found(tmp_path):
    path = tmp_path / "train_000000.bin"
    data.write_shard(path, torch.arange(3000).numpy() % 250)
    raw = path.read_bytes()
    for seed in range(300):
        path.write_bytes(flipped(raw, random.Random(seed).randrange(8 * len(raw))))
        with pytest.raises(UserError, match=str(path)):
            data.open_shard(path)
    path.write_bytes(raw)
    assert len(data.open_shard(path)) == 3000


def test_any_flipped_bit_of_meta_json_is_refused_or_leaves_the_tokenizer(tmp_path):
    path = tmp_path / "meta.json"
    raw = json.dumps({"tokenizer": "bytes", "source": "x", "train_tokens": 3}).encode()
    for bit in range(8 * len(raw)):
        path.write_bytes(flipped(raw, bit))
        try:
            assert data.read_meta(tmp_path)["tokenizer"] == "bytes"
        except UserError as error:
            assert str(path) in str(error)
    for content in b"", raw[:9], b"[]", b"{}", b'{"tokenizer": 3}', b"[" * 10000:
        path.write_bytes(content)
        with pytest.raises(UserError, match=str(path)):
            data.read_meta(tmp_path)


def test_a_damaged_log_is_refused_by_its_name(run, fails):
    out = run("--steps", 6, "--stop_at", 4)
    rows = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
    (out / "log.jsonl").write_bytes(b"".join([rows[0], rows[1][:40], *rows[2:]]))
    fails(train.main, ["--resume", "--out", out], out / "log.jsonl", "line 2", "the checkpoint is whole")
    fails(plot.main, [out], out / "log.jsonl", "damaged")


# ----------------------------------------------- A full disk ------------------------------------------------

@pytest.fixture
def at_most():
    """at_most(size) makes every file of this process that grows beyond it fail, as a full disk does."""
    resource = pytest.importorskip("resource", reason="no file-size limits here")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_while_saving_keeps_the_checkpoint_before(run, fails, at_most):
    out = run("--steps", 8, "--stop_at", 4)
    size = (out / "ckpt.pt").stat().st_size
    for limit in size - 5, size // 2, 50_000:
        at_most(limit)
        fails(train.main, ["--resume", "--out", out], out / "ckpt.pt", "File too large")
        assert load_checkpoint(out)["step"] == 4 and not list(out.glob("*.part"))


def test_a_disk_that_is_full_while_logging_is_said_and_the_log_goes_on_later(run, fails, at_most):
    out = run("--steps", 40, "--stop_at", 4, "--save_every", 4)
    at_most((out / "log.jsonl").stat().st_size + 2500)
    fails(train.main, ["--resume", "--out", out], "log.jsonl", "File too large")
    at_most(2**40)
    train.main(["--resume", "--out", str(out)])
    assert_same(run("--steps", 40, "--save_every", 4, out="whole"), out)


def test_a_disk_that_is_full_while_making_shards_or_an_export_leaves_nothing(run, tmp_path, fails, at_most):
    pytest.importorskip("safetensors")
    out = run("--steps", 1)
    (tmp_path / "a.txt").write_text("some text\n\n" * 20_000)
    at_most(100_000)
    before = sorted(os.listdir(tmp_path))
    fails(prepare.main, ["text", tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / "d"],
          "000000.bin", "File too large")
    fails(export.main, [out, "--to", tmp_path / "hf"], tmp_path / "hf", "File too large")
    fails(plot.main, [out, "-o", tmp_path / "no" / "fig.png"], "fig.png")
    at_most(1000)
    fails(plot.main, [out, "-o", tmp_path / "fig.png"], tmp_path / "fig.png", "File too large")
    assert sorted(os.listdir(tmp_path)) == before


# -------------------------------------------- Numbers, long runs --------------------------------------------

def test_a_loss_that_is_not_finite_stops_before_the_weights(run, fails, monkeypatch):
    out = run("--steps", 6, "--stop_at", 2)
    backward, models = train.backward, []

    def poisoned(network, *args):
        models.append((network, {name: p.detach().clone() for name, p in network.named_parameters()}))
        return backward(network, *args) * float("inf")
    monkeypatch.setattr(train, "backward", poisoned)
    fails(train.main, ["--resume", "--out", out], "step 3", "loss inf", "No weight was touched")
    network, kept = models[0]
    assert all(torch.equal(p, kept[name]) for name, p in network.named_parameters())


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_open_files_do_not_grow(run):
    run("--steps", 2, out="first")
    before = len(os.listdir("/proc/self/fd"))
    for name in "second", "third":
        run("--steps", 20, "--eval_every", 2, "--save_every", 2, out=name)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_lock_ends_with_its_holder(tmp_path):
    with lock(tmp_path / "lock"):
        with pytest.raises(BlockingIOError):
            lock(tmp_path / "lock")
    lock(tmp_path / "lock").close()
