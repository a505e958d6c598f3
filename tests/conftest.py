"""What the tests share: the offline corpus, small runs of train.py in this process, and how errors end."""

import os
from pathlib import Path
from types import SimpleNamespace

# Tiny tensors are as fast on one thread, and children that share the cores do not slow each other down.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import data
import train
from tools import prepare, report

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("SPECTRON_SHARED", ROOT.parent / "shared"))

TINY = ["--size", "nano-0.6M", "--seq_len", "32", "--tokens_per_step", "256", "--eval_every", "1000",
        "--save_every", "1000", "--dtype", "float32", "--device", "cpu", "--spectra_every", "1"]
# Adam divides a rare token's tiny gradient by its own size, which turns rounding into steps of adam_lr:
# small ones here.
SMALL_STEPS = ["--lr", "0.02", "--adam_lr", "0.001"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Everything in this process in float64, where the order of sums makes no difference that matters."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The offline corpus, cut short."""
    directory = tmp_path_factory.mktemp("data") / "stdlib"
    prepare.build_stdlib(directory, quiet=True)
    for split, count in ("train", 200_000), ("val", 1200):
        path = directory / f"{split}_000000.bin"
        data.write_shard(path, data.open_shard(path)[:count].copy())
    return directory


def without_its_end(patch):
    """The sample and the figure at the end of a run take longer than a tiny run: most tests do without."""
    patch.setattr(report, "plot", SimpleNamespace(figure=lambda runs, path: None))
    patch.setattr(report, "sample", SimpleNamespace(generate=lambda *args, **more: [],
                                                    texts=lambda *args: []))


@pytest.fixture(autouse=True)
def short_end(request, monkeypatch):
    if not request.node.get_closest_marker("whole_end"):
        without_its_end(monkeypatch)


@pytest.fixture(scope="session")
def trained_once(corpus, tmp_path_factory):
    """trained_once(*flags) is the directory of a tiny run that several tests read, and none changes."""
    runs = {}

    def call(*flags):
        if flags not in runs:
            out = tmp_path_factory.mktemp("trained") / "run"
            with pytest.MonkeyPatch.context() as patch:
                without_its_end(patch)
                torch.manual_seed(0)
                train.main([*TINY, "--data", str(corpus), "--out", str(out), *map(str, flags)])
            runs[flags] = out
        return runs[flags]
    return call


@pytest.fixture
def run(corpus, tmp_path, monkeypatch):
    """run(*flags) trains a tiny model in this process and returns the directory of the run."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, out="run"):
        train.main([*TINY, "--data", str(corpus), "--out", str(tmp_path / out), *map(str, flags)])
        return tmp_path / out
    return call


@pytest.fixture
def fails(capsys):
    """fails(main, argv, *fragments): exit code 2, one message on stderr that has every fragment,
    no traceback. Returns the message."""
    def call(main, argv, *fragments):
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in argv])
        message = capsys.readouterr().err
        assert caught.value.code == 2, message
        assert "Traceback" not in message
        for fragment in fragments:
            assert str(fragment) in message, f"{fragment!r} is not in: {message}"
        return message
    return call


@pytest.fixture
def in_a_copy(tmp_path, monkeypatch):
    """A working directory with the committed logs and no other results."""
    (tmp_path / "results").mkdir()
    for room in "runs", "seconds":
        (tmp_path / "results" / room).symlink_to(ROOT / "results" / room)
    monkeypatch.chdir(tmp_path)
