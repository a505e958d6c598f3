"""Token shards: what they are, how text becomes them, and which tokens a step of training sees.

A shard is 256 int32 (magic, version, number of tokens, zeros) and then that many uint16 tokens: the format of
llm.c and modded-nanogpt, so the public pre-tokenized FineWeb files work as they are. Beside the shards a
meta.json says which tokenizer made them (none: gpt2).

    python data.py stdlib
        the offline corpus: Python's own source, as bytes
    python data.py text FILE... --tokenizer gpt2 --out data/mine
        your .txt, .jsonl (field "text"), or their .gz
"""

import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
import torch

import cli
from cli import UserError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
SHARD_TOKENS = 100_000_000
WINDOW = 257  # tokens that a split has at least: one window of nano
SEPARATOR = "<|endoftext|>"  # stands before each document
STDLIB_EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "distutils",
                   "site-packages", "__pycache__"}  # absent on many installs, or near-duplicates


########################################
#              Tokenizers              #
########################################

def get_tokenizer(name: str) -> tiktoken.Encoding:
    """A tiktoken Encoding: "bytes" (256 bytes and end-of-text, no download) or any of tiktoken's names up to
    65,536 tokens. UserError for an unknown name, for a larger vocabulary, and where tiktoken can't fetch its
    files."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]",
                                 mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={SEPARATOR: 256})
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"unknown tokenizer {name!r}; there are bytes, "
                        f"{', '.join(tiktoken.list_encoding_names())}")
    try:
        tokenizer = tiktoken.get_encoding(name)
    except Exception as error:  # whatever the network library of the day raises
        raise UserError(f"tokenizer {name!r} could not be loaded ({type(error).__name__}). tiktoken fetches "
                        "it once, over the network: run this once where there is one, or set "
                        "TIKTOKEN_CACHE_DIR to a directory with its files; --tokenizer bytes needs "
                        "neither") from error
    if tokenizer.n_vocab > 65536:
        raise UserError(f"tokenizer {name!r} has {tokenizer.n_vocab:,} tokens and a shard holds 16 bits, "
                        "65,536 of them: use gpt2 or bytes")
    return tokenizer


def vocabulary(tokenizer_name: str) -> int:
    """Tokens of a tokenizer (gpt2's are known without its files)."""
    return 50257 if tokenizer_name == "gpt2" else get_tokenizer(tokenizer_name).n_vocab


def padded_vocabulary(tokenizer_name: str) -> int:
    """Rows of the embedding: the vocabulary, up to a multiple of 64."""
    return 64 * -(-vocabulary(tokenizer_name) // 64)


def token_bytes(tokenizer: tiktoken.Encoding) -> np.ndarray:
    """Bytes of text behind each token id, (n_vocab,); 0 for end-of-text and for ids that stand for
    nothing."""
    lengths = np.zeros(tokenizer.n_vocab, dtype=np.int64)
    for token in range(tokenizer.n_vocab):
        try:
            lengths[token] = len(tokenizer.decode_single_token_bytes(token))
        except KeyError:
            pass
    lengths[[tokenizer.encode_single_token(special) for special in tokenizer.special_tokens_set]] = 0
    return lengths


########################################
#                Shards                #
########################################

def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens as one shard; the file appears whole or not at all."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    part = Path(f"{path}.part")
    with open(part, "wb") as file:
        file.write(header.tobytes())
        file.write(np.asarray(tokens).astype("<u2").tobytes())
    os.replace(part, path)


def open_shard(path: Path, rebuild: str = "python -m tools.download fineweb -n 27") -> np.ndarray:
    """The tokens of a shard, memory-mapped, uint16. UserError unless magic, version and size are what they
    should be."""
    def refuse(what):
        raise UserError(f"{path}: {what}. Build it again: {rebuild}")

    size = path.stat().st_size
    if size < HEADER_BYTES:
        refuse(f"{size} bytes, shorter than a shard's header of {HEADER_BYTES}")
    magic, version, count = (int(x) for x in np.fromfile(path, dtype="<i4", count=3))
    if magic != MAGIC:
        refuse(f"not a token shard: magic number {magic}, expected {MAGIC}")
    if version != VERSION:
        refuse(f"shard version {version}, expected {VERSION}")
    if count < 0 or size != HEADER_BYTES + 2 * count:
        refuse(f"{size:,} bytes, expected {HEADER_BYTES + 2 * count:,} for the {count:,} tokens "
               "of its header")
    return (np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,)) if count
            else np.empty(0, "<u2"))


class Split:
    """The windows of one split. Window i of a shard holds its tokens iT to iT + T inclusive; the tail is
    dropped."""

    def __init__(self, directory: Path, split: str, seq_len: int, vocab_size: int, rebuild: str):
        name = re.compile(rf"(.*[_-])?{split}([_-]?\d+)?\.bin")  # train_000000.bin, fineweb_train_000001.bin
        self.paths = sorted(path for path in directory.glob("*.bin") if name.fullmatch(path.name))
        if not self.paths:
            raise UserError(f"{directory} has no shard like {split}_000000.bin. Build it: {rebuild}")
        self.shards = [open_shard(path, rebuild) for path in self.paths]
        self.seq_len, self.vocab_size, self.rebuild = seq_len, vocab_size, rebuild
        self.tokens = sum(len(shard) for shard in self.shards)
        self.ends = np.cumsum([max(0, len(shard) - 1) // seq_len  # of each shard's windows
                               for shard in self.shards])
        self.windows = int(self.ends[-1])
        if self.windows == 0:
            raise UserError(f"{directory}: its {split} shards hold {self.tokens:,} tokens and no window of "
                            f"{seq_len} + 1; give it more text, or train with a smaller --seq_len")
        self._order = None, None

    def read(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, (len(indices), T) int64, of these windows. UserError for a token beyond the
        vocabulary."""
        T, batch = self.seq_len, np.empty((len(indices), self.seq_len + 1), dtype=np.int64)
        for row, index in zip(batch, indices):
            shard = int(np.searchsorted(self.ends, index, side="right"))
            start = (int(index) - (int(self.ends[shard - 1]) if shard else 0)) * T
            row[:] = self.shards[shard][start:start + T + 1]
            if row.max() >= self.vocab_size:
                raise UserError(f"{self.paths[shard]}: token {row.max()} near position {start:,}, and the "
                                f"tokenizer's vocabulary ends at {self.vocab_size - 1}: made with another "
                                f"tokenizer than meta.json says? Build it again: {self.rebuild}")
        batch = torch.from_numpy(batch)
        return batch[:, :-1], batch[:, 1:]

    def batch(self, step: int, windows_per_step: int, seed: int, rank: int = 0, ranks: int = 1):
        """The rank's slice of the batch of a step (from 0), as read() gives it: a pure function of
        (seed, step).

        An epoch visits each window once, in an order from (seed, epoch); the steps of all ranks together walk
        along it.
        """
        share = windows_per_step // ranks
        first = step * windows_per_step + rank * share
        return self.read([self._permuted(i, seed) for i in range(first, first + share)])

    def _permuted(self, i: int, seed: int) -> int:
        epoch, place = divmod(i, self.windows)
        if self._order[0] != (seed, epoch):
            self._order = (seed, epoch), np.random.default_rng([seed, epoch]).permutation(self.windows)
        return self._order[1][place]


def read_meta(directory: Path) -> dict:
    """meta.json beside the shards; {"tokenizer": "gpt2"} where there is none, as with the public FineWeb
    files."""
    path = directory / "meta.json"
    try:
        return {"tokenizer": "gpt2", **(json.loads(path.read_text()) if path.exists() else {})}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not JSON ({error}); expected e.g. {{\"tokenizer\": \"gpt2\"}}") from None


def rebuild_command(directory: Path) -> str:
    """What to type so that these shards exist (again)."""
    if "fineweb" in directory.name:
        return f"python -m tools.download fineweb -n 27 --out {directory}"
    remove = f"rm -r {directory} && " if directory.exists() else ""
    if directory.name == "stdlib":
        return f"{remove}python data.py stdlib --out {directory}"
    tokenizer = read_meta(directory)["tokenizer"] if directory.exists() else "gpt2"
    return f"{remove}python data.py text FILE... --tokenizer {tokenizer} --out {directory}"


def open_data(directory, seq_len: int) -> tuple[Split, Split, str]:
    """(train, validation, tokenizer name) of a directory of shards."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"no data in {directory}: there is no such directory. Build it: "
                        f"{rebuild_command(directory)}")
    tokenizer = read_meta(directory)["tokenizer"]
    train, val = (Split(directory, s, seq_len, vocabulary(tokenizer), rebuild_command(directory))
                  for s in ("train", "val"))
    return train, val, tokenizer


########################################
#            Text to shards            #
########################################

def documents(path: Path, chunk: int = 4096):
    """The documents of a .txt (cut at blank lines, about `chunk` characters each; at any line end where there
    is no blank line for four times as long) or a .jsonl (field "text"), plain or .gz. UserError names the
    file and line."""
    plain = path.name.removesuffix(".gz")
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            yield from (_records(file, path) if plain.endswith(".jsonl") else _pieces(file, chunk))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None


def _records(file, path):
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
                text.encode("utf-8", "strict")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f'{path}, line {number}: expected {{"text": "..."}} with a string of text, '
                                f"found {line.strip()[:60]!r} ({type(error).__name__})") from None
            yield text


def _pieces(file, chunk):
    lines, size = [], 0
    for line in file:
        lines.append(line)
        size += len(line)
        if size >= chunk and (not line.strip() or size >= 4 * chunk):
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)


class _ShardWriter:
    """Collects the tokens of a split and writes a shard whenever one is full."""

    def __init__(self, directory, split):
        self.pattern, self.shards, self.parts, self.pending, self.total = (
            f"{directory}/{split}_%06d.bin", 0, [], 0, 0)

    def add(self, tokens):
        self.parts.append(tokens)
        self.pending += len(tokens)
        self.total += len(tokens)
        while self.pending >= SHARD_TOKENS:
            self._flush(SHARD_TOKENS)

    def _flush(self, count):
        tokens = np.concatenate(self.parts)
        write_shard(Path(self.pattern % self.shards), tokens[:count])
        self.parts, self.pending, self.shards = [tokens[count:]], len(tokens) - count, self.shards + 1

    def close(self):
        if self.pending:
            self._flush(self.pending)


def write_corpus(texts, tokenizer_name: str, out, source: str, quiet: bool = False) -> dict:
    """Tokenize texts into the shards of a new directory `out`, in parallel and in flat memory; returns its
    meta.json.

    Validation is the 2% of the documents with the lowest hashes, and at least one window of them, so that
    equal documents share a split. Everything is written beside `out` and renamed at the end. UserError if
    `out` exists, or a split comes to less than a window.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists: give another --out, or delete it first")
    tokenizer = get_tokenizer(tokenizer_name)
    building = out.with_name(f"{out.name}.building.{os.getpid()}")
    building.mkdir(parents=True)
    try:
        meta = _tokenize(texts, tokenizer, building, quiet)
        meta = {"tokenizer": tokenizer_name, "source": source, **meta}
        (building / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        os.replace(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return meta


def _tokenize(texts, tokenizer, directory, quiet):
    splits = {split: _ShardWriter(directory, split) for split in ("train", "val")}
    documents, size, started, shown = 0, 0, time.time(), 0.0
    held = {}  # hash -> documents: the lowest so far, which together make one window, wait for the end

    def place(hashed, tokens):
        splits["val" if hashed < 0.02 * 2**64 else "train"].add(tokens)

    for data, tokens in _encoded(texts, tokenizer):
        documents, size = documents + 1, size + len(data)
        hashed = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
        if held and hashed > max(held) and _total(held) >= WINDOW:
            place(hashed, tokens)
        else:
            held.setdefault(hashed, []).append(tokens)
            while _total(held, without=max(held)) >= WINDOW:
                highest = max(held)
                for old in held.pop(highest):
                    place(highest, old)
        seconds = time.time() - started
        if not quiet and seconds - shown > 1:
            shown = seconds
            total = sum(s.total for s in splits.values())
            print(f"\r{documents:,} documents, {size / 1e6:,.0f} MB, {total:,} tokens, "
                  f"{total / seconds:,.0f} tokens/s", end="", file=sys.stderr, flush=True)
    if shown:
        print(file=sys.stderr)
    for tokens in sum(held.values(), []):
        splits["val"].add(tokens)
    for name, split in splits.items():
        split.close()
        if split.total < WINDOW:
            raise UserError(f"{documents} documents ({size:,} bytes) leave {split.total} tokens for the "
                            f"{name} split, fewer than one window of {WINDOW}: give more text (a .txt is cut "
                            "at blank lines into documents of about 4 kB)")
    return {"documents": documents, "bytes": size, "train_tokens": splits["train"].total,
            "val_tokens": splits["val"].total, "seconds": round(time.time() - started, 1)}


def _total(held: dict, without=None) -> int:
    return sum(len(tokens) for hashed, group in held.items() if hashed != without for tokens in group)


def _encoded(texts, tokenizer):
    """(bytes, tokens) of each text, in order; one thread per core encodes the texts of a batch."""
    separator = np.array([tokenizer.eot_token], dtype=np.uint16)

    def encode(text):
        data = text.encode("utf-8")
        if tokenizer.name == "bytes":
            tokens = np.frombuffer(data, dtype=np.uint8)
        else:
            tokens = tokenizer.encode_to_numpy(text, disallowed_special=())
        return data, np.concatenate([separator, tokens.astype(np.uint16)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = (text for text in texts if text.strip())
        while batch := list(islice(texts, 256)):
            yield from pool.map(encode, batch)


def build_stdlib(out="data/stdlib", quiet=False) -> dict:
    """The offline corpus: the source of Python's standard library, a file a document, one token a byte.
    About 8 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py")
                   if not STDLIB_EXCLUDED & set(path.relative_to(root).parts))

    def texts():
        for path in files:
            try:
                yield path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # a file that this machine keeps broken is no reason to train on nothing
    return write_corpus(texts(), "bytes", out, f"Python {platform.python_version()} standard library", quiet)


@cli.command
def main(argv=None):
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True,
                                     parser_class=cli.Parser)
    stdlib = commands.add_parser("stdlib")
    stdlib.add_argument("--out", default="data/stdlib", help="directory to make (data/stdlib)")
    text = commands.add_parser("text")
    text.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".txt, .jsonl, or their .gz")
    text.add_argument("--tokenizer", default="gpt2",
                      help="bytes, gpt2, or another of tiktoken's names (gpt2)")
    text.add_argument("--out", required=True, help="directory to make")
    args = parser.parse_args(argv)
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
          f"{meta['seconds']} s. Train on it: python train.py --data {args.out}")


if __name__ == "__main__":
    main()
