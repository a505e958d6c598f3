"""Token shards: tokenizers, the files, and which tokens a step of training sees.

A shard is 256 int32 (magic, version, number of tokens, CRC-32 of the tokens, zeros) and then that many uint16
tokens. This is the format of llm.c and modded-nanogpt, so the public pre-tokenized FineWeb files, which have
no CRC, work as they are. A meta.json beside the shards names the tokenizer that made them; without one it is
gpt2.

Text becomes shards by `python -m tools.prepare`; FineWeb comes by `python -m tools.download`.
"""

import argparse
import difflib
import functools
import json
import os
import re
import shlex
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tiktoken
import torch

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
SHARD_TOKENS = 100_000_000
END_OF_TEXT = "<|endoftext|>"  # stands before each document
LONG_SPACE = re.compile(r"(\s{10000})")  # tiktoken's stack overflows on a run of a million


########################################
#        Errors and commands           #
########################################

class UserError(Exception):
    """A mistake that the user can mend. The message says what was found, what was expected, what to type."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; an unknown flag is refused together with the nearest known one."""

    def __init__(self, description=None, **options):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawTextHelpFormatter, **options)

    def parse_known_args(self, args=None, namespace=None):
        args, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.5)
            self.error(f"unknown flag or argument {flag}" + (f"; did you mean {near[0]}?" if near else ""))
        return args, unknown

    def error(self, message):
        raise UserError(message if "--help" in message else f"{message}; see --help")


def number(kind=float, least=0, below: float = float("inf")):
    """For add_argument(type=...): an int or a float, whichever `kind` is, of at least `least`."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = least - 1
        if not least <= value < below:
            raise argparse.ArgumentTypeError(f"{text!r} has to be a{' whole' * (kind is int)} number of at "
                                             f"least {least}" + f", below {below:g}" * (below < float("inf")))
        return value
    return parse


positive = number(int, 1)


def command(main):
    """Wraps main(argv): a UserError or OSError is one message on stderr and exit code 2, not a traceback."""
    @functools.wraps(main)
    def run(argv=None):
        for stream in sys.stdout, sys.stderr:
            if hasattr(stream, "reconfigure"):  # a Latin-1 terminal shows ? for what it does not have
                stream.reconfigure(errors="replace")
        try:
            result = main(argv)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except (UserError, OSError) as error:
            # Before the ranks of torchrun have joined, all of them find the same mistake: rank 0 tells it.
            if rank_and_ranks()[0] == 0 or torch.distributed.is_initialized():
                print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except RuntimeError as error:
            if not (torch.distributed.is_initialized() and re.search("gloo|NCCL|[Cc]onnection", str(error))):
                raise
            print(f"error: another rank has ended or hangs, so that rank {rank_and_ranks()[0]} ends too "
                  f"({str(error).splitlines()[0][:150]}). torchrun's report names the first that failed. A "
                  "checkpoint that was saved is whole: type the same command with --resume auto",
                  file=sys.stderr)
            raise SystemExit(1) from None
    return run


def rank_and_ranks() -> tuple[int, int]:
    """(this process's rank, how many there are) under torchrun; (0, 1) elsewhere. A lone RANK or WORLD_SIZE
    that some other program has left in the environment counts for nothing."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
    if not all(os.environ.get(name) for name in names):
        return 0, 1
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        return 0, 1


@contextmanager
def replacing(path, mode: str = "wb"):
    """An open file that takes the place of `path` once it is whole and on the disk; what was there stays
    until then, and an error removes what was written. OSError names the path."""
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if str(path).startswith("/dev/") or os.path.exists(path) and not os.path.isfile(path):
        with open(path, mode, **text) as file:  # a device or a pipe has no place to be taken
            yield file
        return
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # the name is on the disk when the directory is
            directory = os.open(path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
    except BaseException as error:
        part.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save says RuntimeError
        if isinstance(cause, OSError) and cause.filename is None:
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


class Progress:
    """progress(done, total) shows a line with the time left, where stderr is a terminal."""

    def __init__(self, what: str):
        self.what, self.started = what, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty() and rank_and_ranks()[0] == 0:
            left = round((time.monotonic() - self.started) / max(1, done) * (total - done))
            line = f"{self.what}: {done:,}/{total:,}, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
            print(f"\r\033[K{line if done < total else ''}", end="", file=sys.stderr, flush=True)


########################################
#              Tokenizers              #
########################################

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
    return 64 * -(-vocabulary(tokenizer_name) // 64)


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


########################################
#                Shards                #
########################################

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
    out = shlex.quote(str(directory))
    if "fineweb" in directory.name:
        return f"Fetch it: python -m tools.download fineweb --out {out}"
    if directory.is_dir():
        out = "NEW_DIRECTORY"
        if (directory / "meta.json").is_file():
            tokenizer = read_meta(directory)["tokenizer"]
    make = "stdlib" if directory.name == "stdlib" else f"text FILE... --tokenizer {tokenizer}"
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
        if self._order[0] != (seed, epoch):
            self._order = (seed, epoch), np.random.default_rng([seed, epoch]).permutation(self.windows)
        return self._order[1][place]


def open_split(directory, split: str, seq_len: int, tokenizer: str) -> Split:
    """The "train" or "val" split of a directory of shards. UserError unless this tokenizer made them."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"no data in {directory}: there is no such directory. Name another with --data. "
                        f"{how_to_build(directory, tokenizer)}")
    opened, made_with = Split(directory, split, seq_len, tokenizer), read_meta(directory)["tokenizer"]
    if made_with != tokenizer:
        raise UserError(f"{directory} was made with tokenizer {made_with!r}, and {tokenizer!r} is needed: "
                        f"python -m tools.prepare text FILE... --tokenizer {tokenizer} --out DIR")
    return opened
