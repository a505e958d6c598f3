"""lib/texts.py: any UTF-8 text is read, and a bad byte is told by its place in the whole file."""

import gzip
import json
import re

import pytest

from conftest import ROOT
from lib.cli import UserError
from lib.texts import documents
from tools import prepare


def refused(path) -> str:
    with pytest.raises(UserError) as caught:
        list(documents(path))
    return str(caught.value)


def written(path, content: bytes):
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["model.py", "README.md", "notes", "a.csv", "a.tex", "a.py.gz", "B.TXT"])
def test_any_file_of_utf8_is_text(tmp_path, name):
    text = "# é, 漢字: text\n" * 400 + "\tand\x0cmore\x1b[0m\n"
    assert "".join(documents(written(tmp_path / name, text.encode()))) == text


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.jsonl.gz", "A.Jsonl.GZ"])
def test_jsonl_is_what_is_called_so(tmp_path, name):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
    assert list(documents(written(tmp_path / name, rows.encode()))) == ["one", "two"]


def test_source_and_markdown_become_a_corpus(tmp_path, capsys):
    prepare.main(["text", str(ROOT / "train.py"), str(ROOT / "README.md"), "--tokenizer", "bytes", "--out",
                  str(tmp_path / "d")])
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    assert meta["source"] == "train.py, README.md"
    assert meta["bytes"] == sum((ROOT / name).stat().st_size for name in ("train.py", "README.md"))


LINE = "a line, naïve 漢字\n".encode()


@pytest.mark.parametrize("name", ["a.txt", "a.md.gz", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("lines", [0, 1, 411, 3000, 7777])  # in the decoder's first part, and far beyond
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf0\x9f\x98"], ids=repr)
def test_a_bad_byte_has_its_place_in_the_whole_unpacked_file(tmp_path, name, lines, bad):
    line = b'{"text": "' + LINE[:-1] + b'"}\n' if "jsonl" in name else LINE
    before = lines * line + line[:12]
    message = refused(written(tmp_path / name, before + bad + line[12:] + 50 * line))
    assert "\n" not in message and message.startswith(str(tmp_path / name))
    assert f"byte 0x{bad[0]:02x} at position {len(before)}, counted from 0" in message
    assert re.findall(r", line (\d+),", message) == ([str(lines + 1)] if "jsonl" in name else [])


def test_a_character_that_the_end_of_the_file_cuts_has_its_place_too(tmp_path):
    assert "position 65536," in refused(written(tmp_path / "a.txt", b"x" * 65536 + "漢".encode()[:2]))
    assert "position 65534," in refused(written(tmp_path / "a.txt", b"x" * 65534 + "漢".encode()[:2]))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=repr)
def test_lines_are_counted_as_they_are_read(tmp_path, end):
    rows = (b'{"text": "x"}' + end) * 20_000
    message = refused(written(tmp_path / "a.jsonl", rows + b'{"text": "\xe9"}' + end))
    assert "line 20001," in message and f"position {len(rows) + 10}," in message


@pytest.mark.parametrize("content, position", [
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(90), 0), ("text in UTF-16".encode("utf-16-be"), 0),
    ("text in UTF-16".encode("utf-16"), 0), (b"\x7fELF\2\1\1\0" + bytes(99), 7),
    (b"notes.txt" + bytes(91) + b"0000644", 9), ("café ".encode("latin-1") * 9000, 3),
    (LINE * 9000 + b"\0" + LINE, 9000 * len(LINE))], ids=range(7))
def test_a_file_that_is_no_text_is_one_message_with_the_place(tmp_path, fails, content, position):
    (tmp_path / "a.bin").write_bytes(content)
    fails(prepare.main, ["text", tmp_path / "a.bin", "--tokenizer", "bytes", "--out", tmp_path / "d"],
          f"{tmp_path / 'a.bin'} is not UTF-8 text: byte 0x{content[position]:02x} at position {position},")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_bad_byte_just_before_a_cut_archive_is_one_message(tmp_path):
    packed = gzip.compress(b"x" * 10_000 + b"\xff", compresslevel=0)
    (tmp_path / "a.txt.gz").write_bytes(packed[:-4])
    assert "cannot be read" in refused(tmp_path / "a.txt.gz") or "10000" in refused(tmp_path / "a.txt.gz")
