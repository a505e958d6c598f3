"""Measurements, as ratios of two things timed in turn in one process; each prints a table.

    python -m tools.bench tokenize FILE... [--tokenizer gpt2]    data.py text beside tiktoken's batch encoding
"""

import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import cli
import data


def tokenize(files: list[Path], tokenizer: str, repeats: int = 3) -> str:
    """Tokens per second of write_corpus (documents in, shards on disk out) and of encode_ordinary_batch on
    the same documents and threads, in turn; and the memory that write_corpus adds at most."""
    texts = [text for path in files for text in data.documents(path)]
    encoding, threads = data.get_tokenizer(tokenizer), os.cpu_count()
    ours, theirs, grown = [], [], 0
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as directory:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            started = time.perf_counter()
            meta = data.write_corpus(texts, tokenizer, Path(directory) / "shards", "bench", quiet=True)
            ours.append((meta["train_tokens"] + meta["val_tokens"]) / (time.perf_counter() - started))
            grown = max(grown, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        started = time.perf_counter()
        tokens = sum(len(row) for i in range(0, len(texts), 256)
                     for row in encoding.encode_ordinary_batch(texts[i:i + 256], num_threads=threads))
        theirs.append(tokens / (time.perf_counter() - started))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs))
    return (f"| {len(texts):,} documents, {threads} threads | tokens/s, median of {repeats} |\n|---|---|\n"
            f"| write_corpus: to shards on disk | {statistics.median(ours):,.0f} |\n"
            f"| tiktoken encode_ordinary_batch, 256 documents a call: to lists in memory | "
            f"{statistics.median(theirs):,.0f} |\n"
            f"| ratio | {ratio:.2f} |\n| memory that write_corpus added | {grown / 1024:.0f} MB |")


@cli.command
def main(argv=None):
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.Parser)
    command = commands.add_parser("tokenize")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".txt, .jsonl, or their .gz")
    command.add_argument("--tokenizer", default="gpt2", help="(gpt2)")
    args = parser.parse_args(argv)
    print(tokenize(args.files, args.tokenizer))


if __name__ == "__main__":
    main()
