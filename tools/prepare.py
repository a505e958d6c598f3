"""Text to token shards, and the offline corpus.

    python -m tools.prepare stdlib
        Python's own standard library, as bytes: the corpus that train.py builds where there is no other
    python -m tools.prepare text FILE... --tokenizer gpt2 --out data/mine
        your text: any files of UTF-8, .jsonl (field "text"), or their .gz
"""

import hashlib
import json
import os
import platform
import shlex
import sysconfig
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from itertools import count, groupby, islice
from pathlib import Path

import numpy as np
import torch.distributed as dist

from data import SHARD_TOKENS, encode, get_tokenizer, open_split, write_shard
from lib.cli import Parser, UserError, command, rank_and_ranks, say
from lib.files import new_directory, replacing
from lib.outputs import own_name
from lib.texts import cut, documents

VALIDATION = 0.02  # of the text
WINDOW = 257  # tokens that a split has at least: one window of nano
SHORTEST = 64  # characters that a piece of a document may be cut to: at most one window in any tokenizer
EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "distutils", "site-packages",
            "__pycache__"}  # of the standard library: absent on many installs, or near-duplicates


# ------------------------------------------- Documents to shards --------------------------------------------

class ShardWriter:
    """Collects the tokens of a split and writes a shard whenever one is full."""

    def __init__(self, directory: Path, split: str):
        self.directory, self.split = directory, split
        self.shards, self.parts, self.pending, self.total, self.bytes = 0, [], 0, 0, 0

    def add(self, tokens, size: int):
        """The tokens of a document of `size` bytes."""
        self.parts.append(tokens)
        self.pending += len(tokens)
        self.total += len(tokens)
        self.bytes += size
        while self.pending >= SHARD_TOKENS:
            self.flush(SHARD_TOKENS)

    def flush(self, count: int):
        tokens = np.concatenate(self.parts)
        write_shard(self.directory / f"{self.split}_{self.shards:06d}.bin", tokens[:count])
        self.parts, self.pending, self.shards = [tokens[count:]], len(tokens) - count, self.shards + 1

    def finish(self):
        if self.pending:
            self.flush(self.pending)


def write_corpus(texts, tokenizer_name: str, out, source: str, quiet: bool = False) -> dict:
    """Tokenize texts into the shards of a new directory `out`, in parallel and in flat memory; returns its
    meta.json. texts may be read several times; an iterator, which cannot, is kept in memory.

    Validation is about 2% of the text and at least one window: the documents of the lowest hashes, so that
    equal documents share a split. Where they are too few or too unequal for this, they are cut
    (write_pieces). UserError if `out` exists, or a split comes to less than a window.
    """
    with new_directory(Path(out)) as building:
        counts = split_and_write(texts, get_tokenizer(tokenizer_name), building, quiet)
        meta = {"tokenizer": tokenizer_name, "source": source, **counts}
        with replacing(building / "meta.json", "w") as file:
            file.write(json.dumps(meta, indent=1) + "\n")
    return meta


def split_and_write(texts, tokenizer, directory: Path, quiet: bool) -> dict:
    """The shards of both splits; returns the counts for meta.json."""
    started, texts = time.time(), list(texts) if iter(texts) is texts else texts
    train, val, documents, longest = write_documents(texts, tokenizer, directory, quiet)
    size, cuts = train.bytes + val.bytes, {}
    if train.total + val.total >= 2 * WINDOW and not is_near(train, val, longest / size):
        for shard in directory.glob("*.bin"):
            shard.unlink()
        train, val, cuts = write_pieces(texts, tokenizer, directory, size, quiet)
    for split in train, val:
        if split.total < WINDOW:
            raise UserError(f"{size:,} bytes of text leave {split.total} tokens for the {split.split} split, "
                            f"fewer than one window of {WINDOW}: give more text")
    return {"documents": documents, "bytes": size, "train_tokens": train.total, "val_tokens": val.total,
            **cuts, "seconds": round(time.time() - started, 1)}


def is_near(train: ShardWriter, val: ShardWriter, longest: float) -> bool:
    """Whether whole documents put about 2% of the text into validation; `longest` is the share of one.

    1% to 3% is near. Where no document is longer than 2%, chance may also have added two of them.
    """
    most = 0.03 if longest > VALIDATION else max(0.03, VALIDATION + 2 * longest)
    return min(train.total, val.total) >= WINDOW and 0.01 <= val.bytes / (train.bytes + val.bytes) <= most


def write_documents(texts, tokenizer, directory: Path, quiet: bool):
    """Whole documents go to validation that have the lowest 2% of all hashes, and as many as make a window.
    Returns the writers of both splits, how many documents there are, and the bytes of the longest."""
    train, val = (ShardWriter(directory, split) for split in ("train", "val"))
    documents, longest = 0, 0
    held = {}  # hash -> documents: the lowest so far, which together make one window, wait for the end

    def place(hashed, tokens, size):
        (val if hashed < VALIDATION * 2**64 else train).add(tokens, size)

    for _, data, tokens in encoded(((None, text) for text in texts), tokenizer, quiet):
        documents, longest, hashed = documents + 1, max(longest, len(data)), hash_of(data)
        if held and hashed > max(held) and total(held) >= WINDOW:
            place(hashed, tokens, len(data))
        else:
            held.setdefault(hashed, []).append((tokens, len(data)))
            while total(held, without=max(held)) >= WINDOW:
                highest = max(held)
                for old in held.pop(highest):
                    place(highest, *old)
    for old in sum(held.values(), []):
        val.add(*old)
    train.finish()
    val.finish()
    return train, val, documents, longest


def total(held: dict, without=None) -> int:
    return sum(len(tokens) for hashed, group in held.items() if hashed != without for tokens, _ in group)


def write_pieces(texts, tokenizer, directory: Path, size: int, quiet: bool):
    """Pieces of documents go to validation: of `size` bytes of text, of which few documents are a large part.

    A piece is at most a 500th of the text, so that short documents stay whole. Where too much of the text is
    the same, pieces are shorter; and where that does not help either, equal ones no longer share a split.
    What validation leaves of a document stays together up to the next gap. Returns the writers of both
    splits, and for meta.json how documents were cut.
    """
    lengths = sorted({max(SHORTEST, size // parts) for parts in (500, 4000, 32000)}, reverse=True)
    for most, alike in [*((most, True) for most in lengths), (lengths[0], False)]:
        chosen = choose_pieces(texts, tokenizer, most, alike, quiet)
        if chosen:
            break

    def parts():
        for pieces in hashed_pieces(texts, most, alike):
            for is_chosen, group in groupby(pieces, lambda pair: pair[0] in chosen):
                group = [piece for _, piece in group]
                if is_chosen:  # one by one, so that validation has the tokens that were counted
                    yield from ((val, piece) for piece in group)
                else:
                    yield train, "".join(group)

    train, val = (ShardWriter(directory, split) for split in ("train", "val"))
    for split, data, tokens in encoded(parts(), tokenizer, quiet):
        split.add(tokens, len(data))
    train.finish()
    val.finish()
    return train, val, {"longest_piece": most, "equal_pieces_share_a_split": alike}


def choose_pieces(texts, tokenizer, most: int, alike: bool, quiet: bool) -> set:
    """The hashes of the pieces for validation: the lowest, until they make 2% of the tokens and a window.
    Equal pieces that together are much more are left out; the set is empty if less than 1% is left then."""
    hashes, lengths = array("Q"), array("L")
    pairs = (pair for pieces in hashed_pieces(texts, most, alike) for pair in pieces)
    for hashed, _, tokens in encoded(pairs, tokenizer, quiet):
        hashes.append(hashed)
        lengths.append(len(tokens))
    lengths = np.asarray(lengths)
    different, which = np.unique(np.asarray(hashes), return_inverse=True)
    val, chosen, wanted = 0, set(), max(WINDOW, VALIDATION * lengths.sum())
    limit = wanted + max(WINDOW, 0.01 * lengths.sum())
    for hashed, tokens in zip(different, np.bincount(which, lengths)):
        if val < wanted and val + tokens <= limit:
            val += tokens
            chosen.add(int(hashed))
    return chosen if val >= max(WINDOW, 0.01 * lengths.sum()) else set()


def hashed_pieces(texts, most: int, alike: bool):
    """For each text its pieces of at most `most` characters: (hash, piece), one by one. Equal pieces have one
    hash if they are `alike`, and otherwise each its own."""
    numbers = count()
    for text in texts:
        yield ((hash_of(piece.encode("utf-8") + (b"" if alike else b"%d" % next(numbers))), piece)
               for piece in cut(text, most))


def hash_of(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def encoded(texts, tokenizer, quiet: bool):
    """(label, bytes, tokens) of each (label, text) that is not blank, in order. One thread per core encodes
    the texts of a batch. It shows its progress, unless `quiet`."""
    def encode_one(pair):
        label, text = pair
        data = text.encode("utf-8")
        tokens = np.frombuffer(data, np.uint8) if tokenizer.name == "bytes" else encode(tokenizer, text)
        return label, data, np.concatenate([[tokenizer.eot_token], tokens]).astype(np.uint16)

    started, shown, documents, size, done = time.time(), 0.0, 0, 0, 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = (pair for pair in texts if pair[1].strip())
        while batch := list(islice(texts, 256)):
            for label, data, tokens in pool.map(encode_one, batch):
                yield label, data, tokens
                documents, size, done = documents + 1, size + len(data), done + len(tokens)
                seconds = time.time() - started
                if not quiet and seconds - shown > 1:
                    shown = seconds
                    say(f"\r{documents:,} documents, {size / 1e6:,.0f} MB, {done:,} tokens, "
                        f"{done / seconds:,.0f} tokens/s", end="", to="stderr")
    if shown:
        say("", to="stderr")


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
                        "name the directory that holds those with --data")
    try:
        return train, val, get_tokenizer(c.tokenizer)
    except UserError as error:  # training needs none, so a machine without a network can go on
        if rank == 0:
            say(f"there will be no bits per byte and no sample: {error}")
        return train, val, None


class Texts:
    """The documents of these files. They can be read more than once."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __iter__(self):
        for path in self.paths:
            yield from documents(path)


@command
def main(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    stdlib = commands.add_parser("stdlib")
    stdlib.add_argument("--out", default="data/stdlib", help="directory to make (data/stdlib)")
    text = commands.add_parser("text")
    text.add_argument("files", nargs="+", type=Path, metavar="FILE", help="text, .jsonl, or their .gz")
    text.add_argument("--tokenizer", default="gpt2",
                      help="bytes, gpt2, or another of tiktoken's names (gpt2)")
    text.add_argument("--out", required=True, help="directory to make")
    args = parser.parse_args(argv)
    own_name(args.out)
    if args.command == "stdlib":
        meta = build_stdlib(args.out)
    else:
        for path in args.files:
            if not path.is_file():
                raise UserError(f"{path}: no such file")
        names = ", ".join(path.name for path in args.files)
        meta = write_corpus(Texts(args.files), args.tokenizer, args.out, names)
    print(f"{args.out}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens "
          f"({meta['tokenizer']}) from {meta['documents']:,} documents, {meta['bytes'] / 1e6:,.1f} MB, in "
          f"{meta['seconds']} s. {how_split(meta)}. Train on it: python train.py --data "
          f"{shlex.quote(args.out)}")


def how_split(meta: dict) -> str:
    """Validation's share of the tokens, and how it came about."""
    share = meta["val_tokens"] / (meta["train_tokens"] + meta["val_tokens"])
    said = f"Validation is {share:.1%} of them"
    if share > 0.03 and meta["val_tokens"] < 2 * WINDOW:
        said += f" (at least one window of {WINDOW})"
    if "longest_piece" in meta:
        said += f", from documents cut to at most {meta['longest_piece']:,} characters"
        if not meta["equal_pieces_share_a_split"]:
            said += ". The text repeats itself: equal pieces are in both splits"
    return said


if __name__ == "__main__":
    main()
