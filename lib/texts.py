"""Files of text, read as documents, and documents that are cut into pieces."""

import codecs
import gzip
import io
import json
import re
import zlib
from pathlib import Path

from lib.cli import UserError

CHUNK = 4096  # characters of a document that is cut from a file of text, at least
BYTE_ORDER_MARK = "\ufeff"  # at the start of a file, or of a member of a .gz


def documents(path: Path):
    """The documents of a .jsonl (one a line, field "text") or of any other text (see pieces), plain or .gz.
    UserError names the file, and the line or the byte that is wrong."""
    try:
        with unpacked(path, "rt", encoding="utf-8") as file:
            try:
                yield from records(file, path) if is_jsonl(path) else pieces(file)
            except UnicodeError:
                raise UserError(first_bad_byte(path)) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def unpacked(path: Path, mode: str, **options):
    return (gzip.open if path.name.lower().endswith(".gz") else open)(path, mode, **options)


def is_jsonl(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(".jsonl")


def first_bad_byte(path: Path) -> str:
    """What is wrong with a file that is no text, and where. Python's decoder counts from the start of the
    part that it was given, so this reads the file once more."""
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)  # as records() counts lines
    position, line, rest, block = 0, 1, b"", b"all"
    with unpacked(path, "rb") as file:
        while block:
            block = file.read(1 << 16)
            data = rest + block
            try:
                text, end = codecs.utf_8_decode(data, "strict", not block)
                bad, reason = data.find(b"\0", 0, end), "there is none in text"
            except UnicodeDecodeError as error:
                bad, reason = error.start, error.reason
            if bad >= 0:
                line += line_ends.decode(data[:bad].decode("utf-8"), final=True).count("\n")
                return (f"{path}{f', line {line},' * is_jsonl(path)} is not UTF-8 text: byte "
                        f"0x{data[bad]:02x} at position {position + bad}, counted from 0 ({reason})")
            line += line_ends.decode(text).count("\n")
            position, rest = position + end, data[end:]
    return f"{path} has changed while it was read"


def records(file, path: Path):
    for number, line in enumerate(file, 1):
        line = line.replace(BYTE_ORDER_MARK, "").strip()
        if line:
            try:
                text = json.loads(line)["text"]
                text.encode("utf-8")  # a lone surrogate is no text
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f'{path}, line {number}: expected {{"text": "..."}} with a string of text, '
                                f"found {line[:60]!r} ({type(error).__name__})") from None
            yield text


def pieces(file):
    """Cut text into documents of 4 kB and more. Joined, they are the text without its byte-order marks."""
    text, more = "", True
    while more or text:
        while more and len(text) < 16 * CHUNK:  # no document is longer
            part = file.read(16 * CHUNK)
            if "\0" in part:  # UTF-16 without a mark, an archive: text has none
                raise UnicodeError
            text, more = text + part.replace(BYTE_ORDER_MARK, ""), bool(part)
        end = cut_at(text)
        yield text[:end]
        text = text[end:]


def cut_at(text: str) -> int:
    """Where the first document of text ends: at a blank line from 4 kB on, at any line end from 16 kB, at any
    white space from 32 kB, or at 64 kB."""
    start = 0
    while 0 < (end := text.find("\n", start) + 1) <= 16 * CHUNK:
        if end >= 4 * CHUNK or (end >= CHUNK and not text[start:end].strip()):
            return end
        start = end
    space = re.compile(r"\s").search(text, 8 * CHUNK, 16 * CHUNK)
    return space.end() if space else 16 * CHUNK


def cut(text: str, most: int):
    """Pieces of at most `most` characters that together are the text. Each ends after the last blank line of
    its second half; or the last line end, the last space; or where it has to."""
    start = 0
    while len(text) - start > most:
        end = start + most
        found = ((text.rfind(mark, start + most // 2, end), mark) for mark in ("\n\n", "\n", " "))
        end = next((place + len(mark) for place, mark in found if place >= 0), end)
        yield text[start:end]
        start = end
    yield text[start:]
