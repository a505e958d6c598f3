"""Text to token shards, and the offline corpus.

    python -m tools.prepare stdlib
        Python's own standard library, as bytes: the corpus that train.py builds where there is no other
    python -m tools.prepare text FILE... --tokenizer gpt2 --out data/mine
        your .txt, .jsonl (field "text"), or their .gz
"""

import gzip
import hashlib
import json
import os
import platform
import re
import shlex
import sys
import sysconfig
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch.distributed as dist

from data import SHARD_TOKENS, encode, get_tokenizer, open_split, write_shard
from lib.cli import Parser, UserError, command, rank_and_ranks, say
from lib.files import new_directory, replacing

WINDOW = 257  # tokens that a split has at least: one window of nano
CHUNK = 4096  # characters of a document that is cut from a .txt, at least
BYTE_ORDER_MARK = "\ufeff"  # at the start of a file, or of a member of a .gz
EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "distutils", "site-packages",
            "__pycache__"}  # of the standard library: absent on many installs, or near-duplicates


# -------------------------------------------- Files to documents --------------------------------------------

def documents(path: Path):
    """The documents of a .txt (see pieces) or of a .jsonl (one a line, field "text"), plain or .gz. UserError
    names the file, and the line where there are lines."""
    plain = path.name.removesuffix(".gz")
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            yield from records(file, path) if plain.endswith(".jsonl") else pieces(file)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None


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


# ------------------------------------------- Documents to shards --------------------------------------------

class ShardWriter:
    """Collects the tokens of a split and writes a shard whenever one is full."""

    def __init__(self, directory: Path, split: str):
        self.directory, self.split = directory, split
        self.shards, self.parts, self.pending, self.total = 0, [], 0, 0

    def add(self, tokens):
        self.parts.append(tokens)
        self.pending += len(tokens)
        self.total += len(tokens)
        while self.pending >= SHARD_TOKENS:
            self.flush(SHARD_TOKENS)

    def flush(self, count: int):
        tokens = np.concatenate(self.parts)
        write_shard(self.directory / f"{self.split}_{self.shards:06d}.bin", tokens[:count])
        self.parts, self.pending, self.shards = [tokens[count:]], len(tokens) - count, self.shards + 1


def write_corpus(texts, tokenizer_name: str, out, source: str, quiet: bool = False) -> dict:
    """Tokenize texts into the shards of a new directory `out`, in parallel and in flat memory; returns its
    meta.json.

    Validation is the 2% of the documents with the lowest hashes, and at least one window of them, so that
    equal documents share a split. UserError if `out` exists, or a split comes to less than a window.
    """
    with new_directory(Path(out)) as building:
        counts = split_and_write(texts, get_tokenizer(tokenizer_name), building, quiet)
        meta = {"tokenizer": tokenizer_name, "source": source, **counts}
        with replacing(building / "meta.json", "w") as file:
            file.write(json.dumps(meta, indent=1) + "\n")
    return meta


def split_and_write(texts, tokenizer, directory: Path, quiet: bool) -> dict:
    """The shards of both splits; returns the counts for meta.json."""
    splits = {split: ShardWriter(directory, split) for split in ("train", "val")}
    documents, size, started, shown = 0, 0, time.time(), 0.0
    held = {}  # hash -> documents: the lowest so far, which together make one window, wait for the end

    def place(hashed, tokens):
        splits["val" if hashed < 0.02 * 2**64 else "train"].add(tokens)

    for data, tokens in encoded(texts, tokenizer):
        documents, size = documents + 1, size + len(data)
        hashed = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
        if held and hashed > max(held) and total(held) >= WINDOW:
            place(hashed, tokens)
        else:
            held.setdefault(hashed, []).append(tokens)
            while total(held, without=max(held)) >= WINDOW:
                highest = max(held)
                for old in held.pop(highest):
                    place(highest, old)
        seconds = time.time() - started
        if not quiet and seconds - shown > 1:
            shown = seconds
            done = sum(split.total for split in splits.values())
            print(f"\r{documents:,} documents, {size / 1e6:,.0f} MB, {done:,} tokens, "
                  f"{done / seconds:,.0f} tokens/s", end="", file=sys.stderr, flush=True)
    if shown:
        print(file=sys.stderr)
    for tokens in sum(held.values(), []):
        splits["val"].add(tokens)
    for name, split in splits.items():
        if split.pending:
            split.flush(split.pending)
        if split.total < WINDOW:
            raise UserError(f"{documents} documents ({size:,} bytes) leave {split.total} tokens for the "
                            f"{name} split, fewer than one window of {WINDOW}: give more text (a .txt is cut "
                            "at blank lines into documents of about 4 kB)")
    return {"documents": documents, "bytes": size, "train_tokens": splits["train"].total,
            "val_tokens": splits["val"].total, "seconds": round(time.time() - started, 1)}


def total(held: dict, without=None) -> int:
    return sum(len(tokens) for hashed, group in held.items() if hashed != without for tokens in group)


def encoded(texts, tokenizer):
    """(bytes, tokens) of each text, in order. One thread per core encodes the texts of a batch."""
    def encode_one(text):
        data = text.encode("utf-8")
        tokens = np.frombuffer(data, np.uint8) if tokenizer.name == "bytes" else encode(tokenizer, text)
        return data, np.concatenate([[tokenizer.eot_token], tokens]).astype(np.uint16)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = (text for text in texts if text.strip())
        while batch := list(islice(texts, 256)):
            yield from pool.map(encode_one, batch)


def build_stdlib(out="data/stdlib", quiet=False) -> dict:
    """The offline corpus: the source of Python's standard library, a file a document, one token a byte.
    About 8 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py")
                   if not EXCLUDED & set(path.relative_to(root).parts))

    def texts():
        for path in files:
            try:
                yield path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # a file that this machine keeps broken is no reason to train on nothing
    return write_corpus(texts(), "bytes", out, f"Python {platform.python_version()} standard library", quiet)


def open_corpus(c, offline: str):
    """(train, validation, tokenizer or None). It builds the offline corpus where that is what is missing."""
    rank = rank_and_ranks()[0]
    if c.data == offline and not Path(c.data).is_dir() and rank == 0:
        say(f"building the offline corpus in {c.data}")
        try:
            build_stdlib(c.data)
        except (UserError, OSError):
            if not Path(c.data).is_dir():  # otherwise another run has built it meanwhile
                raise
    if dist.is_initialized():
        dist.barrier()
    train, val = (open_split(c.data, split, c.seq_len, c.tokenizer) for split in ("train", "val"))
    found = {"train": train.tokens, "val": val.tokens}
    if vars(c).setdefault("data_tokens", found) != found:
        raise UserError(f"{c.data} holds {found} tokens, and this run was trained on {c.data_tokens}: "
                        "put those shards back, or name where they are now with --data")
    try:
        return train, val, get_tokenizer(c.tokenizer)
    except UserError as error:  # training needs none, so a machine without a network can go on
        if rank == 0:
            say(f"there will be no bits per byte and no sample: {error}")
        return train, val, None


@command
def main(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    stdlib = commands.add_parser("stdlib")
    stdlib.add_argument("--out", default="data/stdlib", help="directory to make (data/stdlib)")
    text = commands.add_parser("text")
    text.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".txt, .jsonl, or their .gz")
    text.add_argument("--tokenizer", default="gpt2",
                      help="bytes, gpt2, or another of tiktoken's names (gpt2)")
    text.add_argument("--out", required=True, help="directory to make")
    args = parser.parse_args(argv)
    if not args.out.strip():
        raise UserError("--out is empty: name a directory to make")
    if args.command == "stdlib":
        meta = build_stdlib(args.out)
    else:
        for path in args.files:
            if not path.is_file():
                raise UserError(f"{path}: no such file")
            if not path.name.removesuffix(".gz").endswith((".txt", ".jsonl")):
                raise UserError(f"{path}: expected .txt, .jsonl, .txt.gz or .jsonl.gz")
        texts = (text for path in args.files for text in documents(path))
        meta = write_corpus(texts, args.tokenizer, args.out, ", ".join(path.name for path in args.files))
    print(f"{args.out}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens "
          f"({meta['tokenizer']}) from {meta['documents']:,} documents, {meta['bytes'] / 1e6:,.1f} MB, in "
          f"{meta['seconds']} s. Train on it: python train.py --data {shlex.quote(args.out)}")


if __name__ == "__main__":
    main()
