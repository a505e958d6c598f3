"""How tools/prepare.py splits few, long and repeated documents: validation is near 2% of the text."""

import hashlib
import json
import random

import numpy as np
import pytest

import data
from lib.cli import UserError
from lib.texts import cut
from tools import prepare

WORDS = ["".join(random.Random(i).choices("etaoinshrdlu", k=3 + i % 5)) for i in range(700)]


def prose(seed: int, characters: int) -> str:
    """Words in lines and paragraphs."""
    choose, text = random.Random(seed), []
    while characters > 0:
        space = choose.choices([" ", "\n", "\n\n"], [100, 8, 1])[0]
        text.append(choose.choice(WORDS) + space)
        characters -= len(text[-1])
    return "".join(text)


def split(texts, out) -> tuple[str, str, float, dict]:
    """(text of training, text of validation, validation's share of the tokens, meta.json)"""
    meta = prepare.write_corpus(texts, "bytes", out, "test", quiet=True)
    both = []
    for name in "train", "val":
        tokens = np.concatenate([data.open_shard(path) for path in sorted(out.glob(f"{name}_*.bin"))])
        assert tokens[0] == 256 and len(tokens) == meta[f"{name}_tokens"] >= prepare.WINDOW
        both.append(bytes(tokens[tokens < 256].astype(np.uint8)).decode())
    share = meta["val_tokens"] / (meta["train_tokens"] + meta["val_tokens"])
    assert json.loads((out / "meta.json").read_text()) == meta
    return *both, share, meta


@pytest.mark.parametrize("sizes", [[50_000], [40_000] * 2, [300_000, 300], [300, 300_000], [20_000] * 7,
                                   [200_000, *[1500] * 120], [9000] * 30, [150_000, 40_000, 9000, 700]],
                         ids=lambda sizes: f"{len(sizes)} of {max(sizes)}")
def test_few_and_unequal_documents_leave_validation_near_2_percent(tmp_path, sizes):
    texts = [prose(i, size) for i, size in enumerate(sizes)]
    train, val, share, meta = split(texts, tmp_path / "d")
    assert 0.01 < share < 0.03 and meta["documents"] == len(texts)
    assert sorted(train + val) == sorted("".join(texts))  # nothing is lost, nothing twice
    assert split(texts, tmp_path / "again")[:2] == (train, val)


@pytest.mark.parametrize("size", [30_000, 300_000])
def test_a_single_line_leaves_validation_near_2_percent(tmp_path, capsys, size):
    """Like text8: the alphabet and spaces, and no line end."""
    (tmp_path / "line.txt").write_text(" ".join(prose(0, size).split()))
    prepare.main(["text", str(tmp_path / "line.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "d")])
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    share = meta["val_tokens"] / (meta["train_tokens"] + meta["val_tokens"])
    said = capsys.readouterr().out
    assert 0.018 < share < 0.03 and f"Validation is {share:.1%} of them" in said
    assert f"cut to at most {meta['longest_piece']:,} characters" in said


def test_equal_documents_share_a_split_however_often_they_are_there(tmp_path):
    """Half of the text is one document, forty times."""
    texts = [prose(0, 10_000)] * 40 + [prose(i, 100_000) for i in range(1, 5)]
    train, val, share, meta = split(texts, tmp_path / "d")
    assert 0.01 < share < 0.032 and meta["equal_pieces_share_a_split"]
    pieces = [piece for text in texts for piece in cut(text, meta["longest_piece"])]
    assert all((piece in val) != (piece in train) for piece in pieces if len(piece) > 100)


@pytest.mark.parametrize("text", ["the same line\n" * 9000, "x" * 200_000, "two words \n\n" * 3000])
def test_text_that_only_repeats_itself_is_split_too_and_this_is_said(tmp_path, capsys, text):
    (tmp_path / "a.txt").write_text(text)
    prepare.main(["text", str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "d")])
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    assert 0.01 < meta["val_tokens"] / meta["train_tokens"] < 0.032
    said = "equal pieces are in both splits" in capsys.readouterr().out
    assert said == (not meta["equal_pieces_share_a_split"])


def test_a_short_text_has_one_window_of_validation_and_a_shorter_one_is_refused(tmp_path, capsys, fails):
    (tmp_path / "a.md").write_text(prose(1, 2000))
    prepare.main(["text", str(tmp_path / "a.md"), "--tokenizer", "bytes", "--out", str(tmp_path / "d")])
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    assert 257 <= meta["val_tokens"] <= 257 + prepare.SHORTEST
    assert "at least one window of 257" in capsys.readouterr().out
    (tmp_path / "b.md").write_text(prose(1, 480))
    fails(prepare.main, ["text", tmp_path / "b.md", "--tokenizer", "bytes", "--out", tmp_path / "e"],
          "bytes of text leave", "split", "fewer than one window", "give more text")
    assert not list(tmp_path.glob("e*"))


def test_characters_of_many_bytes_are_never_cut(tmp_path):
    texts = ["".join(chr(0x1F300 + (i * i + k) % 700) for i in range(9000)) for k in range(3)]
    train, val, share, _ = split(texts, tmp_path / "d")
    assert 0.018 < share < 0.03 and sorted(train + val) == sorted("".join(texts))


def test_whole_documents_are_kept_where_they_come_to_2_percent(tmp_path):
    """A digest of such a split, which has to stay: that of the runs whose numbers are committed."""
    texts = [f"document {i} " + "word " * (i * 37 % 90) for i in range(3000)]
    train, val, share, meta = split(texts, tmp_path / "d")
    assert "longest_piece" not in meta and 0.01 < share < 0.03
    lowest = [text for text in texts if prepare.hash_of(text.encode()) < 0.02 * 2**64]
    assert sorted(val) == sorted("".join(lowest))
    digest = hashlib.sha256((tmp_path / "d" / "val_000000.bin").read_bytes()).hexdigest()
    assert digest.startswith("7001a60fbbe5f449")


@pytest.mark.parametrize("thousandths, longest, near", [
    (20, 0.001, True), (9, 0.001, False), (31, 0.001, False), (12, 0.5, True), (51, 0.018, True),
    (60, 0.018, False), (46, 0.045, False)])
def test_what_is_near_2_percent(tmp_path, thousandths, longest, near):
    """Of 61 documents of 1.6% chance may take three: the public sample of FineWeb-Edu is split so. One of 22
    is cut, as it is longer than validation."""
    train, val = (prepare.ShardWriter(tmp_path, split) for split in ("train", "val"))
    for writer, size in (val, thousandths), (train, 1000 - thousandths):
        writer.bytes = writer.total = 1000 * size
    assert prepare.is_near(train, val, longest) == near


def test_a_corpus_is_read_as_often_as_needed_and_an_iterator_once(tmp_path):
    texts = [prose(i, 30_000) for i in range(3)]

    class Counted:
        times = 0

        def __iter__(self):
            self.times += 1
            return iter(texts)
    counted = Counted()
    assert split(counted, tmp_path / "a")[:3] == split(iter(texts), tmp_path / "b")[:3]
    assert counted.times > 1


def test_shards_of_the_first_try_do_not_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 5000)
    texts = [prose(i, 60_000) for i in range(2)]  # 30 shards
    *_, meta = split(texts, tmp_path / "d")
    assert len(list((tmp_path / "d").glob("val_*.bin"))) == 1
    assert len(list((tmp_path / "d").glob("train_*.bin"))) == -(-meta["train_tokens"] // 5000)


def test_an_error_while_documents_are_cut_leaves_nothing(tmp_path):
    class Vanishing:
        times = 0

        def __iter__(self):
            self.times += 1
            yield prose(0, 50_000)
            if self.times > 1:
                raise UserError("gone")
    with pytest.raises(UserError, match="gone"):
        prepare.write_corpus(Vanishing(), "bytes", tmp_path / "d", "test", quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("most", [1, 2, 64, 1000, 10**6])
def test_pieces_are_the_text_and_no_longer_than_said(most):
    for text in prose(3, 5000), "", "a", "\n" * 300, "x" * 999, "αβγ δ" * 99:
        pieces = list(cut(text, most))
        assert "".join(pieces) == text and max(map(len, pieces)) <= most
    ends = [piece[-1] for piece in list(cut(prose(3, 9000), 100))[:-1]]
    assert set(ends) <= {" ", "\n"}
