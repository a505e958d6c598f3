"""tools/prepare.py: how text becomes documents and shards, and every bad input with its message."""

import gzip
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest

import data
from conftest import ROOT, SHARED
from lib.cli import UserError
from tools import prepare

GPT2_CACHE = SHARED / "data" / "tiktoken_cache"


def decoded(directory, tokenizer="bytes"):
    """The documents of each split."""
    encoding = data.get_tokenizer(tokenizer)
    return [[encoding.decode(list(map(int, piece)))
             for piece in np.split(tokens, np.flatnonzero(tokens == encoding.eot_token))
             for piece in [piece[1:]] if len(piece)] for split in ("train", "val")
            for tokens in [np.concatenate([data.open_shard(p)
                                           for p in sorted(directory.glob(f"{split}_*.bin"))])]]


def test_text_round_trips_and_no_document_is_in_both_splits(tmp_path):
    texts = ([f"document {i} " + "é€𝄞 naïve\n" * (i % 7) for i in range(400)]
             + ["the same"] * 50 + ["", "  \n"])
    meta = prepare.write_corpus(texts, "bytes", tmp_path / "d", "test", quiet=True)
    train, val = decoded(tmp_path / "d")
    assert sorted(train + val) == sorted(text for text in texts if text.strip())
    assert not set(train) & set(val) and 1 <= len(val) <= 0.1 * len(texts)
    assert (meta["documents"], meta["tokenizer"]) == (450, "bytes")
    assert meta["train_tokens"] + meta["val_tokens"] == sum(len(t.encode()) + 1 for t in texts if t.strip())
    again = prepare.write_corpus(texts, "bytes", tmp_path / "e", "test", quiet=True)
    assert decoded(tmp_path / "e") == [train, val] and again["val_tokens"] == meta["val_tokens"]


@pytest.mark.parametrize("documents", [2, 3, 10, 60])
def test_the_smallest_corpora_have_both_splits(tmp_path, documents):
    texts = (f"number {i} " * 99 for i in range(documents))
    prepare.write_corpus(texts, "bytes", tmp_path / "d", "test", quiet=True)
    train, val = decoded(tmp_path / "d")
    assert len(train) >= 1 and len(val) >= 1
    assert sum(map(len, train + val)) == sum(len(f"number {i} ") * 99 for i in range(documents))


def test_an_empty_corpus_and_a_single_document_are_refused_and_leave_nothing(tmp_path):
    for texts in ([], ["", "\n"], ["only one"], ["twice", "twice"]):
        with pytest.raises(UserError, match="split"):
            prepare.write_corpus(texts, "bytes", tmp_path / "d", "test", quiet=True)
        assert os.listdir(tmp_path) == []


def test_short_documents_add_up_to_a_window_of_validation(tmp_path):
    texts = (f"short {i}" for i in range(200))
    meta = prepare.write_corpus(texts, "bytes", tmp_path / "d", "test", quiet=True)
    assert 257 <= meta["val_tokens"] < 257 + 10
    train, val = decoded(tmp_path / "d")
    assert sorted(train + val) == sorted(f"short {i}" for i in range(200))


def test_shards_are_full_but_for_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 1000)
    texts = [f"{i:04d}" * 30 for i in range(60)]
    meta = prepare.write_corpus(texts, "bytes", tmp_path / "d", "test", quiet=True)
    sizes = [len(data.open_shard(path)) for path in sorted((tmp_path / "d").glob("train_*.bin"))]
    assert len(sizes) > 5 and set(sizes[:-1]) == {1000} and sum(sizes) == meta["train_tokens"]
    assert sorted(sum(decoded(tmp_path / "d"), [])) == sorted(texts)


def test_txt_is_cut_at_blank_lines_into_documents_of_about_4_kB(tmp_path):
    paragraph = "a line of text\n" * 20
    text = "".join(f"{i} {paragraph}\n" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write(text)
    pieces = list(prepare.documents(tmp_path / "a.txt"))
    assert "".join(pieces) == text and pieces == list(prepare.documents(tmp_path / "b.txt.gz"))
    assert all(4096 <= len(piece) < 4096 + 400 and piece.endswith("\n\n") for piece in pieces[:-1])
    (tmp_path / "dense.txt").write_text("no blank line\n" * 5000)
    assert max(map(len, prepare.documents(tmp_path / "dense.txt"))) < 5 * 4096


def test_jsonl_is_one_document_a_line(tmp_path):
    rows = [{"text": "one\n\ntwo", "id": 3}, {"text": "three"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(prepare.documents(tmp_path / "a.jsonl")) == ["one\n\ntwo", "three"]


@pytest.mark.parametrize("name, content, expected", [
    ("a.jsonl", b'{"text": "x"}\nnot json\n', "line 2"), ("a.jsonl", b'{"body": "x"}\n', "line 1"),
    ("a.jsonl", b'{"text": 3}\n', "line 1"), ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
    ("a.txt.gz", b"not gzip", "cannot be read"),
    ("a.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:-9], "cannot be read"),
    ("a.txt", b"", "0 tokens for the train split")])
def test_bad_text_gets_one_message_and_makes_nothing(tmp_path, fails, name, content, expected):
    (tmp_path / name).write_bytes(content)
    fails(prepare.main, ["text", tmp_path / name, "--tokenizer", "bytes", "--out", tmp_path / "d"], name if
          "split" not in expected else "", expected)
    assert os.listdir(tmp_path) == [name]


def test_misuse_of_the_command_gets_one_message(tmp_path, fails):
    (tmp_path / "a.txt").write_text("x\n\n" * 9000)
    fails(prepare.main, ["text", tmp_path / "none.txt", "--out", tmp_path / "d"], "none.txt", "no such file")
    fails(prepare.main, ["text", tmp_path / "a.txt", "--out", tmp_path], "exists")
    fails(prepare.main, ["text", tmp_path / "a.txt", "--tokenizer", "gpt9", "--out", tmp_path / "d"],
          "gpt9", "gpt2")
    fails(prepare.main, ["text", tmp_path / "a.txt", "--tokeniser", "gpt2", "--out", tmp_path / "d"],
          "--tokenizer")
    prepare.main(["text", str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "d")])
    assert data.open_split(tmp_path / "d", "train", 64, "bytes").windows > 100


def pieces_as_before(text, chunk=4096):
    """The rule for text with line ends: after a blank line from 4 kB on, after any line end from 16 kB on."""
    lines, size = [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= chunk and (not line.strip() or size >= 4 * chunk):
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def test_text_is_cut_at_blank_lines_then_line_ends_then_spaces_then_anywhere(tmp_path):
    random = np.random.default_rng(0)
    lines = ["" if random.random() < 0.02 else "w" * int(random.integers(1, 300)) for _ in range(4000)]
    texts = {"lines": ("\n".join(lines), None), "spaces": ("word " * 60_000, 8 * 4096 + 5),
             "nothing": ("x" * 300_000, 16 * 4096), "two lines": (("y" * 2_000_000 + "\n") * 2, 16 * 4096)}
    for name, (text, most) in texts.items():
        (tmp_path / "a.txt").write_text(text)
        found = list(prepare.documents(tmp_path / "a.txt"))
        assert "".join(found) == text, name
        if most:
            assert max(map(len, found)) <= most and len(found) >= len(text) // most
        else:
            assert [piece for piece in found if piece] == list(pieces_as_before(text))
    found = prepare.documents(tmp_path / "a.txt")
    meta = prepare.write_corpus(found, "bytes", tmp_path / "d", "test", quiet=True)
    assert meta["val_tokens"] < 0.2 * meta["train_tokens"]  # equal pieces share a split; two lines did not


def test_a_byte_order_mark_never_reaches_the_tokens(tmp_path):
    mark, text = b"\xef\xbb\xbf", "a line\n" * 9
    record = json.dumps({"text": text}).encode()
    (tmp_path / "a.txt").write_bytes(mark + text.encode())
    (tmp_path / "a.jsonl").write_bytes(mark + record + b"\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(mark + text.encode()))
    (tmp_path / "b.jsonl.gz").write_bytes(2 * gzip.compress(mark + record + b"\n"))  # two members
    for name in "a.txt", "a.jsonl", "b.txt.gz", "b.jsonl.gz":
        found = "".join(prepare.documents(tmp_path / name))
        assert found in (text, text + text), name


def test_an_out_that_cannot_be_made_is_found_before_the_work(tmp_path, fails, monkeypatch):
    (tmp_path / "a.txt").write_text("x\n\n" * 9000)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(prepare, "split_and_write", lambda *args: pytest.fail("worked first"))
    for out in "link", "file", "file/sub":
        argv = ["text", tmp_path / "a.txt", "--tokenizer", "bytes", "--out", tmp_path / out]
        fails(prepare.main, argv, out)
    fails(prepare.main, ["text", tmp_path / "a.txt", "--out", ""], "--out is empty")
    fails(prepare.main, ["text", tmp_path, "--out", tmp_path / "d"], "no such file")


@pytest.mark.parametrize("name", ["100%d", "%s", "a b'c", "{x}"])
def test_any_name_of_a_directory_is_taken_literally(tmp_path, capsys, name):
    (tmp_path / "a.txt").write_text("x\n\n" * 9000)
    prepare.main(["text", str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / name)])
    assert sorted(os.listdir(tmp_path / name)) == ["meta.json", "train_000000.bin", "val_000000.bin"]
    assert shlex.split(capsys.readouterr().out.split("Train on it: ")[1])[-1] == str(tmp_path / name)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": ' + "[" * 100_000, '{"text": "\\ud800"}',
                                  "3" * 10_000, '{"text": null}', '"text"', "[]"], ids=lambda line: line[:12])
def test_a_record_that_is_no_text_is_named_by_its_line(tmp_path, fails, line):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    fails(prepare.main, ["text", tmp_path / "a.jsonl", "--tokenizer", "bytes", "--out", tmp_path / "d"],
          "a.jsonl, line 2")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    def texts():
        yield "some text " * 999
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        prepare.write_corpus(texts(), "bytes", tmp_path / "d", "test", quiet=True)
    assert os.listdir(tmp_path) == []


def test_the_locale_does_not_matter(tmp_path):
    (tmp_path / "a.txt").write_text("naïve é€𝄞\n\n" * 3000, encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "tools.prepare", "text", tmp_path / "a.txt", "--tokenizer",
                           "bytes", "--out", tmp_path / "d"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 0, done.stderr
    assert "naïve é€𝄞" in "".join(sum(decoded(tmp_path / "d"), []))


@pytest.mark.parametrize("space", [" ", "\n", "\t"])
def test_a_million_white_space_characters_make_a_corpus(tmp_path, space):
    try:
        data.get_tokenizer("gpt2")
    except UserError:
        pytest.skip("gpt2's files are not here: set TIKTOKEN_CACHE_DIR")
    rows = [{"text": f"{i}" + space * 1_000_000} for i in range(2)]
    rows += [{"text": f"{i} words " * 90} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare.main(["text", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "d")])


# ------------------------------------------------ Real text -------------------------------------------------

@pytest.mark.skipif(not GPT2_CACHE.is_dir(), reason="needs the GPT-2 BPE files of the shared data")
def test_gpt2_tokens_are_tiktokens_and_large_vocabularies_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_CACHE))
    encoding = data.get_tokenizer("gpt2")
    texts = ["Hello world, <|endoftext|> naïve café"] * 3 + [f"text number {i}" for i in range(300)]
    prepare.write_corpus(texts, "gpt2", tmp_path / "d", "test", quiet=True)
    train, val = decoded(tmp_path / "d", "gpt2")
    tokens = np.concatenate([data.open_shard(tmp_path / "d" / f"{split}_000000.bin")
                             for split in ("train", "val")])
    assert (set(train + val) >= set(texts[3:])
            and len(tokens) == sum(1 + len(encoding.encode_ordinary(t)) for t in texts))
    lengths = data.token_bytes(encoding)
    assert sum(lengths[t] for t in encoding.encode_ordinary("naïve café")) == len("naïve café".encode())
    monkeypatch.setattr(data.tiktoken, "get_encoding", lambda name: type("Large", (), {"n_vocab": 200_000}))
    with pytest.raises(UserError, match="65,536"):
        data.get_tokenizer("o200k_base")


@pytest.mark.skipif(not (SHARED / "data/text").is_dir(), reason="needs the texts of the shared data")
def test_real_text_through_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_CACHE))
    with (gzip.open(SHARED / "data/text/imdb_train.jsonl.gz", "rt") as file,
          gzip.open(tmp_path / "a.jsonl.gz", "wt") as part):
        part.writelines(row for row, _ in zip(file, range(500)))
    files = [SHARED / "data/text/fineweb_edu_sample.txt", tmp_path / "a.jsonl.gz"]
    prepare.main(["text", *map(str, files), "--tokenizer", "gpt2", "--out", str(tmp_path / "d")])
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    assert meta["train_tokens"] > 300_000 and 0.005 < meta["val_tokens"] / meta["train_tokens"] < 0.05
    assert "Train on it: python train.py --data" in capsys.readouterr().out
