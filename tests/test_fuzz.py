"""Mutated shards, checkpoints, texts and command lines: each is read, or refused with one message. No
traceback, no hang, no memory that grows.

    python -m pytest tests/test_fuzz.py              some hundred inputs of each kind
    FUZZ=2500 python -m pytest tests/test_fuzz.py    so many of each (docs/FAULTS.md)
"""

import contextlib
import gzip
import io
import os
import resource

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import train
from lib import checkpoints
from lib.cli import UserError
from model import Llama, LlamaConfig
from tools import export, plot, prepare, sample

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

fuzz = settings(max_examples=int(os.environ.get("FUZZ", 60)), deadline=20_000, derandomize=True,
                database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def memory():
    """No input may need more than some hundred MB beyond what this process has used so far."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB


def mutations(raw: bytes):
    """Flipped bytes, a cut, an insertion, a repetition, several of them; or other bytes altogether."""
    place = st.integers(0, len(raw))
    one = st.one_of(
        st.tuples(place, st.integers(1, 255)).map(lambda x: ("flip", *x)),
        st.tuples(place, place).map(lambda x: ("cut", *x)),
        st.tuples(place, st.binary(min_size=1, max_size=30)).map(lambda x: ("insert", *x)),
        st.tuples(place, place).map(lambda x: ("repeat", *x)))

    def apply(changes):
        out = raw
        for kind, at, what in changes:
            at = min(at, max(0, len(out) - 1))
            if kind == "flip" and out:
                out = out[:at] + bytes([out[at] ^ what]) + out[at + 1:]
            elif kind == "cut":
                out = out[:min(at, what)] + out[max(at, what):]
            elif kind == "insert":
                out = out[:at] + what + out[at:]
            elif kind == "repeat":
                out = out[:max(at, what)] + out[min(at, what):]
        return out
    return st.one_of(st.lists(one, min_size=1, max_size=4).map(apply), st.binary(max_size=2000))


SHARD = np.concatenate([np.array([data.MAGIC, 1, 2000] + [0] * 253, "<i4").view("<u2"),
                        (np.arange(2000) % 250).astype("<u2")]).tobytes()


@fuzz
@given(raw=mutations(SHARD[:60]).map(lambda head: head + SHARD[60:]) | mutations(SHARD))
def test_a_shard_is_read_or_refused(tmp_path_factory, raw):
    """Without a CRC, as the public files are."""
    where = tmp_path_factory.getbasetemp() / "shards"
    where.mkdir(exist_ok=True)
    (where / "train_000000.bin").write_bytes(raw)
    (where / "meta.json").write_text('{"tokenizer": "bytes"}')
    try:
        split = data.open_split(where, "train", 16, "bytes")
        x, y = split.read(range(split.windows))
        assert x.max() < 257 and y.shape == (split.windows, 16)
    except UserError as error:
        assert str(where) in str(error)


@fuzz
@given(raw=mutations(b'{"tokenizer": "bytes", "source": "x", "train_tokens": 3, "seconds": 0.1}'))
def test_a_meta_json_is_read_or_refused(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "meta.json"
    path.write_bytes(raw)
    try:
        data.get_tokenizer(data.read_meta(path.parent)["tokenizer"])
    except UserError as error:
        assert "meta.json" in str(error) or "could not be loaded" in str(error) or "16 bits" in str(error)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small one, whole."""
    path = tmp_path_factory.mktemp("run") / "ckpt.pt"
    c = train.resolve(train.parse(["--size", "nano-0.6M", "--device", "cpu", "--dtype", "float32"]))
    c.model |= dict(dim=16, n_layers=1, n_heads=2, vocab_size=320, seq_len=8)
    model = Llama(LlamaConfig(**c.model))
    c.out = str(path.parent)
    checkpoints.save(c, model, train.find_method("adamw", {}).optimizers(model, c), 3, 1.0, 10)
    return path


@fuzz
@given(draw=st.data())
def test_a_checkpoint_is_refused_or_the_same(checkpoint, draw):
    raw = checkpoint.read_bytes()
    sealed = draw.draw(st.booleans())
    changed = draw.draw(mutations(raw if sealed else raw[:-11]))
    path = checkpoint.with_name("changed.pt")
    path.write_bytes(changed)
    try:
        state = evaluation.load_run(path)[0].state_dict()
    except UserError as error:
        assert "damaged" in str(error)
    else:
        assert changed == raw or all(torch.equal(w, state[name]) for name, w
                                     in evaluation.load_run(checkpoint)[0].state_dict().items())


TEXT = '{"text": "a b\\u00e9 c", "id": 3}\n\n{"text": "second"}\n'.encode()


@fuzz
@given(raw=mutations(TEXT), name=st.sampled_from(["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz"]),
       zipped=st.booleans(), whole=st.booleans())
def test_a_text_is_read_or_refused(tmp_path_factory, raw, name, zipped, whole):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(gzip.compress(raw if whole else TEXT)[:None if whole else len(raw)] if zipped else raw)
    try:
        for text in prepare.documents(path):
            assert isinstance(text, str)
            text.encode("utf-8")
    except UserError as error:
        assert str(path) in str(error)


FLAGS = [f"--{name}" for name in train.FLAGS] + ["--resume", "--overwrite", "--no-renormalize"]
POWERS = st.integers(0, 70).map(lambda n: str(2**n))
VALUES = (st.text(max_size=12) | st.integers(-9, 10**30).map(str) | POWERS | st.floats().map(str)
          | st.floats(0, 1).map(str)
          | st.sampled_from(["nano", "S", "2.7B", "dense", "self-guided", "auto", "all", "out", "-", "--",
                             "a=b", "init=dense", "cpu", "cuda", "float32", "nan", "1e400", "\0", "%s",
                             "\ud800"]))
WORDS = st.sampled_from(FLAGS) | VALUES


def good(name: str):
    """A value that fits this flag, or might."""
    kind = train.FLAGS[name][0]
    if isinstance(kind, list):
        return st.sampled_from([[f"--{name}", value] for value in kind])
    if kind is bool:
        return st.sampled_from([[f"--{name}"], [f"--no-{name}"]])
    return (POWERS | st.floats(0, 2).map(str) | VALUES).map(lambda value: [f"--{name}", value])


PAIRS = st.sampled_from(list(train.FLAGS)).flatmap(good)


def quiet(main, argv) -> tuple[int, str]:
    """(exit code, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(argv)
            return 0, err.getvalue()
        except SystemExit as error:
            return error.code or 0, err.getvalue()


@fuzz
@given(argv=st.lists(WORDS, max_size=6) | st.lists(PAIRS, max_size=5).map(lambda pairs: sum(pairs, [])))
def test_a_command_line_of_train_is_planned_or_refused(argv, tmp_path_factory):
    os.chdir(tmp_path_factory.getbasetemp())
    code, said = quiet(train.main, [*argv, "--dry_run"])
    assert code in (0, 2) and (code == 0 or said.startswith("error: "))


@fuzz
@given(main=st.sampled_from([evaluation.main, sample.main, plot.main, export.main, prepare.main]),
       argv=st.lists(WORDS | st.sampled_from(["text", "stdlib", "--out", "--to", "--tasks", "--limit", "-o",
                                              "--tokens", "--prompt"]), max_size=5))
def test_a_command_line_of_the_others_is_refused(main, argv, tmp_path_factory):
    """Nothing that they could read is there."""
    os.chdir(tmp_path_factory.mktemp("empty"))
    code, said = quiet(main, [x for x in argv if x != "stdlib"])
    assert code == 2 and said.startswith("error: ") or code == 0
