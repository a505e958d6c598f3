"""data.py: the shard format, what is refused, which tokens a step sees, and what all commands share."""

import argparse
import json
import os
import shlex
import sys
import zlib

import numpy as np
import pytest

import data
from launch import Child
from lib.cli import Parser, Progress, UserError, command, number, positive, rank_and_ranks
from lib.files import replacing


def open_data(directory, seq_len, tokenizer="bytes"):
    return [data.open_split(directory, split, seq_len, tokenizer) for split in ("train", "val")]


def make(directory, train=(np.arange(1000) % 250,), val=(np.arange(200) % 250,), tokenizer="bytes"):
    directory.mkdir(parents=True, exist_ok=True)
    for split, shards in ("train", train), ("val", val):
        for i, tokens in enumerate(shards):
            data.write_shard(directory / f"x_{split}_{i:06d}.bin", tokens)
    if tokenizer:
        (directory / "meta.json").write_text(json.dumps({"tokenizer": tokenizer}))
    return directory


# -------------------------------------------------- Shards --------------------------------------------------

def test_a_shard_is_256_int32_with_a_crc_and_then_uint16(tmp_path):
    tokens = np.array([0, 1, 50256, 65535])
    data.write_shard(tmp_path / "a.bin", tokens)
    raw = (tmp_path / "a.bin").read_bytes()
    header = np.frombuffer(raw[:1024], dtype="<i4")
    assert len(raw) == 1024 + 8 and list(header[:3]) == [20240520, 1, 4] and not header[4:].any()
    assert header[3:4].view("<u4")[0] == zlib.crc32(raw[1024:])
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
        open_data(tmp_path / "d", 16)
    assert (found in str(caught.value) and str(path) in str(caught.value)
            and "python -m tools.prepare text" in str(caught.value))


def test_a_token_beyond_the_vocabulary_is_refused_where_it_is_read(tmp_path):
    make(tmp_path / "d", train=[np.r_[np.zeros(40), 257, np.zeros(40)]])
    split = open_data(tmp_path / "d", 16)[0]
    split.read([0, 1])
    with pytest.raises(UserError, match="token 257 near position 32.*256"):
        split.read([2])


def test_missing_and_empty_data_name_the_command_that_builds_it(tmp_path):
    for name, command in [("stdlib", "python -m tools.prepare stdlib --out"),
                          ("fineweb", "python -m tools.download fineweb"),
                          ("fineweb100B", "tools.download fineweb --corpus fineweb100B --out"),
                          ("mine", "python -m tools.prepare text FILE... --tokenizer bytes")]:
        with pytest.raises(UserError, match=command):
            open_data(tmp_path / name, 16)
    (tmp_path / "fineweb.txt").write_text("some text")
    with pytest.raises(UserError, match="is a file.* .*fineweb.txt --tokenizer bytes --out NEW_DIRECTORY"):
        open_data(tmp_path / "fineweb.txt", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="train"):
        open_data(tmp_path / "empty", 16)
    make(tmp_path / "short", val=[np.zeros(16)])
    with pytest.raises(UserError, match="val shards hold 16 tokens and no window of 16"):
        open_data(tmp_path / "short", 16)
    (make(tmp_path / "bad") / "meta.json").write_text("{")
    with pytest.raises(UserError, match="does not say which tokenizer"):
        open_data(tmp_path / "bad", 16)


def test_a_file_is_replaced_when_it_is_whole_also_behind_a_link_and_a_device_is_written_to(tmp_path, capfd):
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_text("before")
    link.symlink_to(path)
    with pytest.raises(ZeroDivisionError), replacing(link, "w") as file:
        file.write("half")
        1 / 0
    assert path.read_text() == "before" and sorted(os.listdir(tmp_path)) == ["a", "link"]
    with replacing(link, "w") as file:
        file.write("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and link.is_symlink() and sorted(os.listdir(tmp_path)) == ["a", "link"]
    with replacing("/dev/stdout", "w") as file:
        file.write("said")
    assert capfd.readouterr().out == "said"


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "no" / "fig.png"
    with pytest.raises(FileNotFoundError) as caught, replacing(path):
        pytest.fail("was opened")
    assert caught.value.filename == str(path)


def test_no_message_proposes_to_delete_and_paths_to_type_are_quoted(tmp_path, monkeypatch):
    """A directory with somebody's texts, nanoGPT's headerless train.bin, `.`, a name with a space."""
    texts = tmp_path / "my texts; rm -r x"
    texts.mkdir()
    (texts / "novel.txt").write_text("the only copy")
    (texts / "nanogpt").mkdir()
    np.arange(900, dtype=np.uint16).tofile(texts / "nanogpt" / "train.bin")
    monkeypatch.chdir(texts)
    for directory in texts, texts / "nanogpt", ".", texts / "not there":
        with pytest.raises(UserError) as caught:
            open_data(directory, 16)
        command = str(caught.value).split(": python ")[1]
        assert "rm " not in command.replace(shlex.quote(str(texts / "not there")), "")
        assert "tools.prepare" in command and "delete" not in str(caught.value)
    assert shlex.split(command)[-1] == str(texts / "not there")
    assert (texts / "novel.txt").read_text() == "the only copy"


@pytest.mark.parametrize("prefix", ["pretrain_", "medieval-", "", "x_val_train_", "x_train_val_"])
def test_a_prefix_does_not_put_a_shard_into_the_other_split(tmp_path, prefix):
    for split, value in ("train", 1), ("val", 2):
        data.write_shard(tmp_path / f"{prefix}{split}_000000.bin", np.full(300, value))
    (tmp_path / "meta.json").write_text('{"tokenizer": "bytes"}')
    train, val = open_data(tmp_path, 16)
    assert train.tokens == val.tokens == 300
    assert train.read([0])[0].unique().tolist() == [1] and val.read([0])[0].unique().tolist() == [2]


def test_shards_without_meta_are_gpt2(tmp_path):
    open_data(make(tmp_path / "d", tokenizer=None), 16, "gpt2")
    with pytest.raises(UserError, match="made with tokenizer 'gpt2', and 'bytes' is needed"):
        open_data(tmp_path / "d", 16)
    (tmp_path / "d" / "meta.json").write_text('{"tokenizer": "bytes"}', encoding="utf-8-sig")
    open_data(tmp_path / "d", 16)
    assert data.padded_vocabulary("gpt2") == 50304 and data.padded_vocabulary("bytes") == 320


# ------------------------------------------------- Batches --------------------------------------------------

def numbered(directory, T=8):
    """Shards whose windows can be told apart: 3 shards, of 10, 1 and 12 windows and a tail."""
    shards = [np.arange(start, start + windows * T + 1 + tail) for start, windows, tail in
              [(0, 10, 3), (100, 1, 0), (120, 12, 7)]]
    return make(directory, train=shards), shards


def test_window_i_holds_tokens_iT_to_iT_plus_T_and_the_tail_is_dropped(tmp_path):
    directory, shards = numbered(tmp_path / "d")
    split = open_data(directory, 8)[0]
    assert split.windows == 23 and split.tokens == sum(map(len, shards))
    expected = [shard[i * 8:i * 8 + 9] for shard in shards for i in range((len(shard) - 1) // 8)]
    x, y = split.read(range(23))
    assert np.array_equal(x, [w[:-1] for w in expected]) and np.array_equal(y, [w[1:] for w in expected])


def test_an_epoch_visits_each_window_once_in_an_order_from_seed_and_epoch(tmp_path):
    split = open_data(numbered(tmp_path / "d")[0], 8)[0]
    firsts = [int(row[0]) for step in range(23)  # two epochs of 23 windows
              for row in split.batch(step, 2, seed=5)[0]]
    everything = sorted(int(row[0]) for row in split.read(range(23))[0])
    one, two = firsts[:23], firsts[23:]
    assert sorted(one) == sorted(two) == everything and one != two and one != everything
    other = [int(row[0]) for step in range(12) for row in split.batch(step, 2, seed=6)[0]][:23]
    assert other != one and sorted(other) == everything


def test_the_batch_of_a_step_depends_on_seed_and_step_and_not_on_the_ranks(tmp_path):
    split = open_data(numbered(tmp_path / "d")[0], 8)[0]
    for step in (0, 3, 11, 40):
        whole = split.batch(step, 8, seed=1)
        for ranks in (2, 4, 8):
            parts = [open_data(tmp_path / "d", 8)[0].batch(step, 8, 1, rank, ranks)
                     for rank in range(ranks)]
            for i in range(2):
                assert np.array_equal(whole[i], np.concatenate([part[i] for part in parts]))


# ------------------------------------------------ Tokenizers ------------------------------------------------

def test_bytes_is_a_tiktoken_encoding_of_256_bytes_and_end_of_text():
    encoding = data.get_tokenizer("bytes")
    assert encoding.encode_ordinary("é\n<|endoftext|>") == list("é\n<|endoftext|>".encode())
    assert encoding.decode([104, 105]) == "hi" and encoding.n_vocab == 257 and encoding.eot_token == 256
    lengths = data.token_bytes(encoding)
    assert lengths[:256].tolist() == [1] * 256 and lengths[256] == 0


def test_a_tokenizer_that_can_not_be_fetched_says_what_to_do(tmp_path):
    """In a process of its own: no cache, and a proxy that refuses."""
    (tmp_path / "a.txt").write_text("words\n\n" * 3000)
    done = Child("import sys\nfrom tools import prepare\nprepare.main(sys.argv[1:])",
                 ["text", "a.txt", "--tokenizer", "gpt2", "--out", "d"], tmp_path,
                 {"TIKTOKEN_CACHE_DIR": str(tmp_path / "none"), "https_proxy": "http://127.0.0.1:9",
                  "HTTPS_PROXY": "http://127.0.0.1:9"})
    error = done.communicate()[1]
    assert done.returncode == 2 and "TIKTOKEN_CACHE_DIR" in error and "Traceback" not in error
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("space", [" ", "\n", "\t", " \n", "\u00a0"])
def test_a_million_white_space_characters_are_encoded(space):
    """tiktoken's own stack overflows on them."""
    try:
        gpt2 = data.get_tokenizer("gpt2")
    except UserError:
        pytest.skip("gpt2's files are not here: set TIKTOKEN_CACHE_DIR")
    text = "a" + space * (1_000_000 // len(space)) + "b"
    assert gpt2.decode(data.encode(gpt2, text).tolist()) == text
    ordinary = "Hello world, <|endoftext|> naïve café" + " " * 500 + "x\n\n"
    assert data.encode(gpt2, ordinary).tolist() == gpt2.encode_ordinary(ordinary)


# ----------------------------------------- What the commands share ------------------------------------------

def test_ranks_are_those_of_torchrun_alone(monkeypatch):
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    for name in torchrun:
        monkeypatch.delenv(name, raising=False)
    for missing in [None, *torchrun]:
        for name, value in torchrun.items():
            monkeypatch.setenv(name, "" if name == missing else value)
        assert rank_and_ranks() == ((0, 1) if missing else (1, 2))
    monkeypatch.setenv("WORLD_SIZE", "two")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert rank_and_ranks() == (0, 1)


def test_a_misspelt_flag_names_its_neighbour():
    parser = Parser()
    parser.add_argument("--tokenizer")
    for argv, said in (["--tokeniser", "x"], "did you mean --tokenizer"), (["--tok", "x"], "--tok"):
        with pytest.raises(UserError, match=said):
            parser.parse_args(argv)


@pytest.mark.parametrize("text, good", [("1", True), ("0", False), ("-1", False), ("1.5", False),
                                        ("x", False)])
def test_positive_and_number_read_what_they_say(text, good):
    for read, value in (positive, 1), (number(int, 0, 2), 1), (number(below=1.2), 1.0):
        if good:
            assert read(text) == value
        elif read is positive or text in ("-1", "1.5", "x"):
            with pytest.raises(argparse.ArgumentTypeError, match=repr(text)):
                read(text)


def test_a_large_limit_is_said_in_digits():
    with pytest.raises(argparse.ArgumentTypeError, match="'0' has to be a whole number .* below 1,048,577"):
        number(int, 1, 2**20 + 1)("0")


@pytest.mark.parametrize("error, code, said", [
    (UserError("mistake"), 2, "error: mistake"), (OSError(28, "No space left", "/x/y"), 2, "/x/y"),
    (KeyboardInterrupt(), 130, "")])
def test_a_command_ends_a_users_mistake_in_one_message(capsys, error, code, said):
    @command
    def main(argv):
        raise error
    with pytest.raises(SystemExit) as caught:
        main([])
    err = capsys.readouterr().err
    assert caught.value.code == code and said in err and "Traceback" not in err


def test_progress_is_a_line_on_a_terminal_and_nothing_elsewhere(monkeypatch, capsys):
    for terminal in True, False:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        progress = Progress("hellaswag, items")
        progress.started -= 10
        for done in 0, 5, 20:
            progress(done, 20)
        shown = capsys.readouterr().err
        assert ("hellaswag, items: 5/20, 0:00:30 left" in shown) == terminal
        assert shown.endswith("\033[K") == terminal and (terminal or not shown)
