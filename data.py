"""Token shards: tokenizers, the files, and which tokens a step of training sees.

A shard is 256 int32 (magic, version, number of tokens, CRC-32 of the tokens, zeros) and then that many uint16
tokens. This is the format of llm.c and modded-nanogpt, so the public pre-tokenized FineWeb files, which have
no CRC, work as they are. A meta.json beside the shards names the tokenizer that made them; without one it is
gpt2.

Text becomes shards by `python -m tools.prepare`; FineWeb comes by `python -m tools.download`.
"""

import json
import math
import re
import shlex
import zlib
from pathlib import Path

import numpy as np
import tiktoken
import torch

from lib.cli import UserError, rank_and_ranks
from lib.files import replacing

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
SHARD_TOKENS = 100_000_000
END_OF_TEXT = "<|endoftext|>"  # stands before each document
LONG_SPACE = re.compile(r"(\s{10000})")  # tiktoken's stack overflows on a run of a million


# ------------------------------------------------ Tokenizers ------------------------------------------------

def get_tokenizer(name: str) -> tiktoken.Encoding:
    """A tiktoken Encoding: "bytes" (256 bytes and end-of-text, no download) or one of tiktoken's own names.
    UserError for an unknown name, for more than 65,536 tokens, and where tiktoken cannot fetch its files."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]",
                                 mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={END_OF_TEXT: 256})
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
        raise UserError(f"tokenizer {name!r} has {tokenizer.n_vocab:,} tokens, and a shard's 16 bits hold "
                        "65,536: use gpt2 or bytes")
    return tokenizer


def encode(tokenizer: tiktoken.Encoding, text: str) -> np.ndarray:
    """The tokens of text, special tokens read as plain text. A run of white space is cut every 10,000
    characters."""
    parts = [tokenizer.encode_to_numpy(part, disallowed_special=())
             for part in LONG_SPACE.split(text) if part]
    return np.concatenate(parts) if parts else np.empty(0, np.uint32)


def vocabulary(tokenizer_name: str) -> int:
    """Tokens of a tokenizer. gpt2's are known without its files."""
    return 50257 if tokenizer_name == "gpt2" else get_tokenizer(tokenizer_name).n_vocab


def padded_vocabulary(tokenizer_name: str) -> int:
    """Rows of the embedding: the vocabulary, up to a multiple of 64."""
    return 64 * math.ceil(vocabulary(tokenizer_name) / 64)


def token_bytes(tokenizer: tiktoken.Encoding) -> np.ndarray:
    """Bytes of text behind each token id, (n_vocab,); 0 for special tokens and for ids without a token."""
    lengths = np.zeros(tokenizer.n_vocab, dtype=np.int64)
    special = {tokenizer.encode_single_token(name) for name in tokenizer.special_tokens_set}
    for token in set(range(tokenizer.n_vocab)) - special:
        try:
            lengths[token] = len(tokenizer.decode_single_token_bytes(token))
        except KeyError:
            pass
    return lengths


# -------------------------------------------------- Shards --------------------------------------------------

def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens as one shard. The file appears whole or not at all."""
    tokens = np.asarray(tokens).astype("<u2")
    header = np.zeros(256, dtype="<u4")
    header[:4] = MAGIC, VERSION, len(tokens), zlib.crc32(tokens)
    with replacing(path) as file:
        file.write(header.tobytes())
        file.write(tokens.tobytes())


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, memory-mapped, uint16. UserError unless magic, version and size are right, and
    the CRC where there is one, which rank 0 looks at."""
    def refuse(what):
        raise UserError(f"{path}: {what}. {how_to_build(path.parent)}")

    size = path.stat().st_size
    if size < HEADER_BYTES:
        refuse(f"{size} bytes, shorter than a shard's header of {HEADER_BYTES}")
    header = np.fromfile(path, dtype="<u4", count=256)
    magic, version, count, crc = header[:4].tolist()
    if magic != MAGIC:
        refuse(f"not a token shard: magic number {magic}, expected {MAGIC} (nanoGPT's .bin files have none)")
    if version != VERSION:
        refuse(f"shard version {version}, expected {VERSION}")
    if size != HEADER_BYTES + 2 * count:
        refuse(f"{size:,} bytes, expected {HEADER_BYTES + 2 * count:,} for the {count:,} tokens "
               "of its header")
    if not count:
        return np.empty(0, "<u2")  # which cannot be mapped
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    if crc and rank_and_ranks()[0] == 0 and (header[4:].any() or zlib.crc32(tokens) != crc):
        refuse("damaged: its tokens are not those that were written (CRC-32)")
    return tokens


def read_meta(directory: Path) -> dict:
    """meta.json beside the shards; {"tokenizer": "gpt2"} where there is none, as with the public files."""
    path = directory / "meta.json"
    if not path.exists():
        return {"tokenizer": "gpt2"}
    try:
        meta = json.loads(path.read_text("utf-8-sig"))
        if meta["tokenizer"] in ("bytes", *tiktoken.list_encoding_names()):
            return meta
        raise ValueError(f"unknown tokenizer {meta['tokenizer']!r}")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{path} does not say which tokenizer made the shards ({type(error).__name__}: "
                        f'{error}); expected e.g. {{"tokenizer": "gpt2"}}') from None


def how_to_build(directory: Path, tokenizer: str = "gpt2") -> str:
    """The command that makes such shards. It never removes anything that the user may have put there."""
    out, files = shlex.quote(str(directory)), "FILE..."
    if directory.is_file():  # a text where a directory was to be named
        out, files = "NEW_DIRECTORY", out
    elif "fineweb" in directory.name:
        corpus = " --corpus fineweb100B" * ("100B" in directory.name)
        return f"Fetch it: python -m tools.download fineweb{corpus} --out {out}"
    elif directory.is_dir():
        out = "NEW_DIRECTORY"
        if (directory / "meta.json").is_file():
            tokenizer = read_meta(directory)["tokenizer"]
    make = "stdlib" if directory.name == "stdlib" else f"text {files} --tokenizer {tokenizer}"
    return f"Make shards: python -m tools.prepare {make} --out {out}"


class Split:
    """The windows of one split. Window i of a shard holds its tokens iT to iT + T inclusive; the tail is
    dropped. UserError where there is no shard, a damaged one, or no whole window."""

    def __init__(self, directory: Path, split: str, seq_len: int, tokenizer: str):
        name = re.compile(rf"(.*[_-])?{split}([_-]?\d+)?\.bin")  # train_000000.bin, fineweb_train_000001.bin
        self.paths = sorted(path for path in directory.glob("*.bin") if name.fullmatch(path.name))
        if not self.paths:
            raise UserError(f"{directory} has no shard like {split}_000000.bin. "
                            f"{how_to_build(directory, tokenizer)}")
        self.shards = [open_shard(path) for path in self.paths]
        self.seq_len, self.vocab_size = seq_len, vocabulary(tokenizer)
        self.tokens = sum(len(shard) for shard in self.shards)
        self.ends = np.cumsum([max(0, len(shard) - 1) // seq_len for shard in self.shards])  # in windows
        self.windows = int(self.ends[-1])
        if self.windows == 0:
            raise UserError(f"{directory}: its {split} shards hold {self.tokens:,} tokens and no window of "
                            f"{seq_len} + 1; give it more text, or train with a smaller --seq_len")
        self._epoch, self._order = None, None  # (seed, epoch) and the order of its windows

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
                                f"tokenizer than meta.json says? {how_to_build(self.paths[shard].parent)}")
        batch = torch.from_numpy(batch)
        return batch[:, :-1], batch[:, 1:]

    def batch(self, step: int, windows_per_step: int, seed: int, rank: int = 0, ranks: int = 1):
        """The rank's slice of the batch of a step (from 0), as read() gives it: a pure function of
        (seed, step). An epoch visits each window once, in an order from (seed, epoch)."""
        share = windows_per_step // ranks
        first = step * windows_per_step + rank * share
        return self.read([self._permuted(i, seed) for i in range(first, first + share)])

    def _permuted(self, i: int, seed: int) -> int:
        epoch, place = divmod(i, self.windows)
        if self._epoch != (seed, epoch):
            self._order = np.random.default_rng([seed, epoch]).permutation(self.windows)
            self._epoch = seed, epoch
        return self._order[place]


def open_split(directory, split: str, seq_len: int, tokenizer: str) -> Split:
    """The "train" or "val" split of a directory of shards. UserError unless this tokenizer made them."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"no data: {directory} is {'a file' if directory.is_file() else 'not there'}. "
                        f"Name a directory with --data. {how_to_build(directory, tokenizer)}")
    opened, made_with = Split(directory, split, seq_len, tokenizer), read_meta(directory)["tokenizer"]
    if made_with != tokenizer:
        raise UserError(f"{directory} was made with tokenizer {made_with!r}, and {tokenizer!r} is needed: "
                        f"python -m tools.prepare text FILE... --tokenizer {tokenizer} --out DIR")
    return opened
