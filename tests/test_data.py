"""data.py: the shard format, what is refused, how text becomes documents, and which tokens a step sees."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import data
from cli import UserError
from conftest import ROOT, SHARED

GPT2_CACHE = SHARED / "data" / "tiktoken_cache"


def make(directory, train=(np.arange(1000) % 250,), val=(np.arange(200) % 250,), tokenizer="bytes"):
    directory.mkdir(parents=True, exist_ok=True)
    for split, shards in ("train", train), ("val", val):
        for i, tokens in enumerate(shards):
            data.write_shard(directory / f"x_{split}_{i:06d}.bin", tokens)
    if tokenizer:
        (directory / "meta.json").write_text(json.dumps({"tokenizer": tokenizer}))
    return directory


########################################
#                Shards                #
########################################

def test_a_shard_is_256_int32_and_then_uint16(tmp_path):
    tokens = np.array([0, 1, 50256, 65535])
    data.write_shard(tmp_path / "a.bin", tokens)
    raw = (tmp_path / "a.bin").read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert len(raw) == 1024 + 8 and list(header[:3]) == [20240520, 1, 4] and not header[3:].any()
    assert (list(np.frombuffer(raw[1024:], dtype="<u2")) == list(tokens)
            == list(data.open_shard(tmp_path / "a.bin")))
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("damage, found", [
    (lambda raw: raw[:-2], "expected 3,024"), (lambda raw: raw + b"xx", "expected 3,024"),
    (lambda raw: b"\1" + raw[1:], "magic number"),
    (lambda raw: raw[:4] + b"\2" + raw[5:], "shard version 2, expected 1"),
    (lambda raw: raw[:100], "100 bytes"), (lambda raw: b"", "0 bytes")])
def test_a_damaged_shard_is_refused_with_what_was_found_and_the_command_that_rebuilds_it(
        tmp_path, damage, found):
    make(tmp_path / "d")
    path = tmp_path / "d" / "x_train_000000.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        data.open_data(tmp_path / "d", 16)
    assert (found in str(caught.value) and str(path) in str(caught.value)
            and "python data.py text" in str(caught.value))


def test_a_token_beyond_the_vocabulary_is_refused_where_it_is_read(tmp_path):
    make(tmp_path / "d", train=[np.r_[np.zeros(40), 257, np.zeros(40)]])
    split = data.open_data(tmp_path / "d", 16)[0]
    split.read([0, 1])
    with pytest.raises(UserError, match="token 257 near position 32.*256"):
        split.read([2])


def test_missing_and_empty_data_name_the_command_that_builds_it(tmp_path):
    for name, command in [("stdlib", "python data.py stdlib"),
                          ("fineweb", "python -m tools.download fineweb"), ("mine", "python data.py text")]:
        with pytest.raises(UserError, match=command):
            data.open_data(tmp_path / name, 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="train"):
        data.open_data(tmp_path / "empty", 16)
    make(tmp_path / "short", val=[np.zeros(16)])
    with pytest.raises(UserError, match="val shards hold 16 tokens and no window of 16"):
        data.open_data(tmp_path / "short", 16)
    (make(tmp_path / "bad") / "meta.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        data.open_data(tmp_path / "bad", 16)


@pytest.mark.parametrize("prefix", ["pretrain_", "medieval-", "", "x_val_train_", "x_train_val_"])
def test_a_prefix_does_not_put_a_shard_into_the_other_split(tmp_path, prefix):
    for split, value in ("train", 1), ("val", 2):
        data.write_shard(tmp_path / f"{prefix}{split}_000000.bin", np.full(300, value))
    (tmp_path / "meta.json").write_text('{"tokenizer": "bytes"}')
    train, val, _ = data.open_data(tmp_path, 16)
    assert train.tokens == val.tokens == 300
    assert train.read([0])[0].unique().tolist() == [1] and val.read([0])[0].unique().tolist() == [2]


def test_shards_without_meta_are_gpt2(tmp_path):
    assert data.open_data(make(tmp_path / "d", tokenizer=None), 16)[2] == "gpt2"
    assert data.padded_vocabulary("gpt2") == 50304 and data.padded_vocabulary("bytes") == 320


########################################
#               Batches                #
########################################

def numbered(directory, T=8):
    """Shards whose windows can be told apart: 3 shards, of 10, 1 and 12 windows and a tail."""
    shards = [np.arange(start, start + windows * T + 1 + tail) for start, windows, tail in
              [(0, 10, 3), (100, 1, 0), (120, 12, 7)]]
    return make(directory, train=shards), shards


def test_window_i_holds_tokens_iT_to_iT_plus_T_and_the_tail_is_dropped(tmp_path):
    directory, shards = numbered(tmp_path / "d")
    split = data.open_data(directory, 8)[0]
    assert split.windows == 23 and split.tokens == sum(map(len, shards))
    expected = [shard[i * 8:i * 8 + 9] for shard in shards for i in range((len(shard) - 1) // 8)]
    x, y = split.read(range(23))
    assert np.array_equal(x, [w[:-1] for w in expected]) and np.array_equal(y, [w[1:] for w in expected])


def test_an_epoch_visits_each_window_once_in_an_order_from_seed_and_epoch(tmp_path):
    split = data.open_data(numbered(tmp_path / "d")[0], 8)[0]
    firsts = [int(row[0]) for step in range(23)  # two epochs of 23 windows
              for row in split.batch(step, 2, seed=5)[0]]
    everything = sorted(int(row[0]) for row in split.read(range(23))[0])
    one, two = firsts[:23], firsts[23:]
    assert sorted(one) == sorted(two) == everything and one != two and one != everything
    other = [int(row[0]) for step in range(12) for row in split.batch(step, 2, seed=6)[0]][:23]
    assert other != one and sorted(other) == everything


def test_the_batch_of_a_step_depends_on_seed_and_step_and_not_on_the_ranks(tmp_path):
    split = data.open_data(numbered(tmp_path / "d")[0], 8)[0]
    for step in (0, 3, 11, 40):
        whole = split.batch(step, 8, seed=1)
        for ranks in (2, 4, 8):
            parts = [data.open_data(tmp_path / "d", 8)[0].batch(step, 8, 1, rank, ranks)
                     for rank in range(ranks)]
            for i in range(2):
                assert np.array_equal(whole[i], np.concatenate([part[i] for part in parts]))


########################################
#            Text to shards            #
########################################

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
    meta = data.write_corpus(texts, "bytes", tmp_path / "d", "test", quiet=True)
    train, val = decoded(tmp_path / "d")
    assert sorted(train + val) == sorted(text for text in texts if text.strip())
    assert not set(train) & set(val) and 1 <= len(val) <= 0.1 * len(texts)
    assert (meta["documents"], meta["tokenizer"]) == (450, "bytes")
    assert meta["train_tokens"] + meta["val_tokens"] == sum(len(t.encode()) + 1 for t in texts if t.strip())
    again = data.write_corpus(texts, "bytes", tmp_path / "e", "test", quiet=True)
    assert decoded(tmp_path / "e") == [train, val] and again["val_tokens"] == meta["val_tokens"]


@pytest.mark.parametrize("documents", [2, 3, 10, 60])
def test_the_smallest_corpora_have_both_splits(tmp_path, documents):
    texts = (f"number {i} " * 99 for i in range(documents))
    data.write_corpus(texts, "bytes", tmp_path / "d", "test", quiet=True)
    train, val = decoded(tmp_path / "d")
    assert len(train) >= 1 and len(val) >= 1 and len(train) + len(val) == documents


def test_an_empty_corpus_and_a_single_document_are_refused_and_leave_nothing(tmp_path):
    for texts in ([], ["", "\n"], ["only one"], ["twice", "twice"]):
        with pytest.raises(UserError, match="split"):
            data.write_corpus(texts, "bytes", tmp_path / "d", "test", quiet=True)
        assert os.listdir(tmp_path) == []


def test_short_documents_add_up_to_a_window_of_validation(tmp_path):
    meta = data.write_corpus((f"short {i}" for i in range(200)), "bytes", tmp_path / "d", "test", quiet=True)
    assert 257 <= meta["val_tokens"] < 257 + 10
    train, val = decoded(tmp_path / "d")
    assert sorted(train + val) == sorted(f"short {i}" for i in range(200))


def test_shards_are_full_but_for_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_TOKENS", 1000)
    texts = [f"{i:04d}" * 30 for i in range(60)]
    meta = data.write_corpus(texts, "bytes", tmp_path / "d", "test", quiet=True)
    sizes = [len(data.open_shard(path)) for path in sorted((tmp_path / "d").glob("train_*.bin"))]
    assert len(sizes) > 5 and set(sizes[:-1]) == {1000} and sum(sizes) == meta["train_tokens"]
    assert sorted(sum(decoded(tmp_path / "d"), [])) == sorted(texts)


def test_txt_is_cut_at_blank_lines_into_documents_of_about_4_kB(tmp_path):
    paragraph = "a line of text\n" * 20
    text = "".join(f"{i} {paragraph}\n" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write(text)
    pieces = list(data.documents(tmp_path / "a.txt"))
    assert "".join(pieces) == text and pieces == list(data.documents(tmp_path / "b.txt.gz"))
    assert all(4096 <= len(piece) < 4096 + 400 and piece.endswith("\n\n") for piece in pieces[:-1])
    (tmp_path / "dense.txt").write_text("no blank line\n" * 5000)
    assert max(map(len, data.documents(tmp_path / "dense.txt"))) < 5 * 4096


def test_jsonl_is_one_document_a_line(tmp_path):
    rows = [{"text": "one\n\ntwo", "id": 3}, {"text": "three"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(data.documents(tmp_path / "a.jsonl")) == ["one\n\ntwo", "three"]


@pytest.mark.parametrize("name, content, expected", [
    ("a.jsonl", b'{"text": "x"}\nnot json\n', "line 2"), ("a.jsonl", b'{"body": "x"}\n', "line 1"),
    ("a.jsonl", b'{"text": 3}\n', "line 1"), ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
    ("a.txt.gz", b"not gzip", "can't be read"),
    ("a.txt.gz", gzip.compress(b"x" * 9999)[:-9], "can't be read"),
    ("a.csv", b"x", "expected .txt"), ("a.txt", b"", "0 tokens for the train split")])
def test_bad_text_gets_one_message_and_makes_nothing(tmp_path, fails, name, content, expected):
    (tmp_path / name).write_bytes(content)
    fails(data.main, ["text", tmp_path / name, "--tokenizer", "bytes", "--out", tmp_path / "d"], name if
          "split" not in expected else "", expected)
    assert os.listdir(tmp_path) == [name]


def test_misuse_of_the_command_gets_one_message(tmp_path, fails):
    (tmp_path / "a.txt").write_text("x\n\n" * 9000)
    fails(data.main, ["text", tmp_path / "none.txt", "--out", tmp_path / "d"], "none.txt", "no such file")
    fails(data.main, ["text", tmp_path / "a.txt", "--out", tmp_path], "exists")
    fails(data.main, ["text", tmp_path / "a.txt", "--tokenizer", "gpt9", "--out", tmp_path / "d"],
          "gpt9", "gpt2")
    fails(data.main, ["text", tmp_path / "a.txt", "--tokeniser", "gpt2", "--out", tmp_path / "d"],
          "--tokenizer")
    data.main(["text", str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "d")])
    assert data.open_data(tmp_path / "d", 64)[2] == "bytes"


########################################
#              Tokenizers              #
########################################

def test_bytes_is_a_tiktoken_encoding_of_256_bytes_and_end_of_text():
    encoding = data.get_tokenizer("bytes")
    assert encoding.encode_ordinary("é\n<|endoftext|>") == list("é\n<|endoftext|>".encode())
    assert encoding.decode([104, 105]) == "hi" and encoding.n_vocab == 257 and encoding.eot_token == 256
    lengths = data.token_bytes(encoding)
    assert lengths[:256].tolist() == [1] * 256 and lengths[256] == 0


def test_a_tokenizer_that_can_not_be_fetched_says_what_to_do(tmp_path):
    """In a process of its own: no cache, and a proxy that refuses."""
    code = "import data; data.main(['text', 'a.txt', '--tokenizer', 'gpt2', '--out', 'd'])"
    (tmp_path / "a.txt").write_text("words\n\n" * 3000)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TIKTOKEN_CACHE_DIR": str(tmp_path / "none"),
                   "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "TIKTOKEN_CACHE_DIR" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "d").exists()


@pytest.mark.skipif(not GPT2_CACHE.is_dir(), reason="needs the GPT-2 BPE files of the shared data")
def test_gpt2_tokens_are_tiktokens_and_large_vocabularies_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_CACHE))
    encoding = data.get_tokenizer("gpt2")
    texts = ["Hello world, <|endoftext|> naïve café"] * 3 + [f"text number {i}" for i in range(300)]
    data.write_corpus(texts, "gpt2", tmp_path / "d", "test", quiet=True)
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
    data.main(["text", *map(str, files), "--tokenizer", "gpt2", "--out", str(tmp_path / "d")])
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    assert meta["train_tokens"] > 300_000 and 0.005 < meta["val_tokens"] / meta["train_tokens"] < 0.05
    assert "Train on it: python train.py --data" in capsys.readouterr().out
