"""Fetch the pre-tokenized data and the files of the tasks, once and whole.

    python -m tools.download fineweb -n 27          27 training shards of 100M GPT-2 tokens,
                                                    and the validation shard
    python -m tools.download fineweb -n 157 --corpus fineweb100B        for size L and up
    python -m tools.download evals                  HellaSwag, PIQA and ARC-Easy, for eval.py --tasks

The shards are the ones that the modded-nanogpt project publishes; the tasks come from their publishers,
ARC-Easy in a zip file of 681 MB. A download that was cut goes on where it stopped; a file gets its name only
after its size, its header or lines, and (where it is known) its SHA-256 were found right.
"""

import errno
import hashlib
import http.client
import itertools
import json
import shlex
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from data import open_shard
from lib.cli import Parser, UserError, command, say
from lib.outputs import own_name

URL = "https://huggingface.co/datasets/kjj0/{corpus}-gpt2/resolve/main"
SHARDS = {"fineweb10B": 103, "fineweb100B": 1030}  # training shards that are published
SHARD_BYTES, BLOCK, ATTEMPTS, TIMEOUT = 200_001_024, 1 << 20, 6, 60

EVALS = {  # file: where its publisher keeps it, items, and the SHA-256 where one is known
    "hellaswag_val.jsonl": ("https://raw.githubusercontent.com/rowanz/hellaswag/master/data", 10042,
                            "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"),
    "valid.jsonl": ("https://yonatanbisk.com/piqa/data", 1838, None),
    "valid-labels.lst": ("https://yonatanbisk.com/piqa/data", 1838, None),
    "ARC-Easy-Test.jsonl": ("https://ai2-public-datasets.s3.amazonaws.com/arc", 2376, None)}
ARC_ZIP, ARC_MEMBER = "ARC-V1-Feb2018.zip", "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the SHA-256 that stands in the header of one."""
    sha256 = None

    def redirect_request(self, request, answer, code, message, headers, url):
        self.sha256 = self.sha256 or headers.get("X-Linked-Etag")
        return super().redirect_request(request, answer, code, message, headers, url)


def fetch(url: str, path: Path, check, keep: bool = False,
          hint="Is --url right, and -n no larger than what is published?") -> None:
    """Download url to path, through path.part, which a later call goes on with. check(part) raises UserError
    for a bad file; hint is what to do about one that is not there. With `keep`, a file that was there stays,
    under another name.

    Cut connections, server errors and bad files are tried again, ATTEMPTS times without progress, waiting
    twice as long each time. UserError where it does not help, and at once for a file that is not there.
    """
    part, failures, problem = Path(f"{path}.part"), 0, ""
    while failures < ATTEMPTS:
        before = part.stat().st_size if part.exists() else 0
        try:
            sha256 = _receive(url, part, before)
            check(part)
            if sha256 and _sha256(part) != sha256:
                raise UserError(f"{path.name}: its SHA-256 is not the {sha256} that the server gives")
            if keep and path.exists():
                set_aside(path)
            return part.replace(path)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404, 410):
                raise UserError(f"{url}: the server answers {error.code} {error.reason}. {hint}") from None
            problem = f"the server answers {error.code} {error.reason}"
        except ValueError as error:
            raise UserError(f"{url} is no address that can be fetched ({error}): is --url right?") from None
        except UserError as error:
            part.unlink(missing_ok=True)
            problem = str(error)
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):  # the disk is full
                raise OSError(error.errno, error.strerror, str(part)) from None
            problem = str(error) or type(error).__name__
        progress = part.exists() and part.stat().st_size > before
        failures = 1 if progress else failures + 1
        if failures < ATTEMPTS:
            say(f"\n{problem}; again in {2 ** (failures - 1)} s", to="stderr")
            time.sleep(2 ** (failures - 1))
    raise UserError(f"{url}: gave up after {ATTEMPTS} tries; the last one: {problem}. The same command "
                    f"{'goes on from what has arrived' if part.exists() else 'tries again'}")


def set_aside(path: Path) -> None:
    """Another's file of this name, such as valid.jsonl, gets the next free one: valid.jsonl.1."""
    names = (path.with_name(f"{path.name}.{i}") for i in itertools.count(1))
    other = next(name for name in names if not name.exists())
    path.replace(other)
    print(f"{path} was there and is not what its publisher has: it is {other} now", flush=True)


def _receive(url: str, part: Path, have: int) -> str | None:
    """Append what is missing to part; the SHA-256 of the whole, if the server says it."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "nanospectron"}
                                     if have else {"User-Agent": "nanospectron"})
    redirects = _Redirects()
    try:
        answer = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        if error.headers.get("Content-Range") != f"bytes */{have}":
            part.unlink()
            raise ConnectionError(f"{part.name} is longer than the file; starting over") from None
        return _wanted(redirects, error)  # all of it had arrived
    with answer:
        resumed = answer.status == 206
        length = answer.headers.get("Content-Length")
        total = (have if resumed else 0) + int(length) if length else None
        with open(part, "ab" if resumed else "wb") as file:
            _copy(answer, file, part.name.removesuffix(".part"), have if resumed else 0, total)
        if total is not None and part.stat().st_size < total:
            raise ConnectionError(f"connection cut after {part.stat().st_size:,} of {total:,} bytes")
        return _wanted(redirects, answer)


def _wanted(redirects: _Redirects, answer) -> str | None:
    sha256 = (redirects.sha256 or answer.headers.get("X-Linked-Etag") or "").strip('"')
    return sha256 if len(sha256) == 64 else None


def _copy(answer, file, name: str, have: int, total: int | None) -> None:
    """Copy the body with one line of progress: rate and time left."""
    started, shown, size = time.time(), 0.0, have
    while block := answer.read(BLOCK):
        file.write(block)
        size += len(block)
        seconds = time.time() - started
        if seconds - shown > 0.5:
            shown, rate = seconds, (size - have) / seconds
            left = f"{(total - size) / rate:.0f} s left" if total else ""
            say(f"\r{name}: {size / 1e6:,.0f} of {(total or 0) / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, "
                f"{left}  ", end="", to="stderr")
    if shown:
        say("", to="stderr")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fineweb(count: int, out: Path, url: str) -> None:
    """The validation shard and `count` training shards in `out`; what is there and whole is left as it is."""
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1)]
    out.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not _whole(out / name)]
    room = shutil.disk_usage(out).free // SHARD_BYTES  # in shards
    if url.startswith("https://huggingface.co") and len(missing) > room:
        fits = names.index(missing[room]) - 1
        raise UserError(f"{len(missing)} shards need {len(missing) * SHARD_BYTES / 1e9:.1f} GB and {out} has "
                        f"room for {room}: " + (f"-n {fits} fits, or " * (fits > 0))
                        + "name a directory on a larger disk with --out")
    for number, name in enumerate(missing, 1):
        print(f"[{number}/{len(missing)}] {name}", flush=True)
        fetch(f"{url}/{name}", out / name, open_shard)
    print(f"{out}: {count} training shards and one for validation. Train: torchrun --nproc_per_node=8 "
          f"train.py --size S --data {shlex.quote(str(out))}")


def _whole(path: Path, check=open_shard) -> bool:
    try:
        if path.exists():
            check(path)
            return True
    except UserError:
        pass
    return False


def evals(out: Path, url: str | None) -> None:
    """The tasks' files in `out`; what is there and whole is left as it is. url stands for all publishers'."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (base, lines, sha256) in EVALS.items():
        def check(path, name=name, lines=lines, sha256=sha256):
            _check_lines(path, name, lines, sha256)
        if _whole(out / name, check):
            continue
        print(name, flush=True)
        hint = (f"Has its publisher moved it? Name the address of a directory that has {name} with --url "
                f"({ARC_ZIP} for ARC-Easy), or an --out that has it")
        if name != "ARC-Easy-Test.jsonl":
            fetch(f"{url or base}/{name}", out / name, check, True, hint)
            continue
        archive = out / ARC_ZIP
        fetched = not _whole(archive, _check_zip)
        if fetched:
            fetch(f"{url or base}/{ARC_ZIP}", archive, _check_zip, True, hint)
        part = out / f"{name}.part"
        part.write_bytes(zipfile.ZipFile(archive).read(ARC_MEMBER))
        check(part)
        if (out / name).exists():
            set_aside(out / name)
        part.replace(out / name)
        if fetched:  # one that was there before stays
            archive.unlink()
    print(f"{out}: {', '.join(EVALS)}. Score a run: python eval.py out/run --tasks hellaswag,piqa,arc_easy "
          f"--eval_dir {shlex.quote(str(out))}")


def _check_lines(path: Path, name: str, lines: int, sha256: str | None) -> None:
    """UserError unless the file has so many lines of JSON, and this SHA-256."""
    try:
        found = len([json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")
                     if line.strip()])
    except ValueError as error:
        raise UserError(f"{name} is not what its publisher has: {error}") from None
    if found != lines:
        raise UserError(f"{name} has {found:,} lines, expected {lines:,}")
    if sha256 and _sha256(path) != sha256:
        raise UserError(f"{name}: its SHA-256 is {_sha256(path)}, expected {sha256}")


def _check_zip(path: Path) -> None:
    try:
        zipfile.ZipFile(path).read(ARC_MEMBER)  # which checks its CRC
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise UserError(f"{ARC_ZIP} is damaged ({error}), or not the one with {ARC_MEMBER}") from None


@command
def main(argv=None):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    command = commands.add_parser("fineweb", description="pre-tokenized FineWeb, GPT-2 tokens")
    command.add_argument("-n", type=int, default=27,
                         help="training shards of 100M tokens (27: size S needs 2.7B tokens)")
    command.add_argument("--corpus", choices=list(SHARDS), default="fineweb10B", help="(fineweb10B)")
    command.add_argument("--out", help="directory (data/fineweb, or data/fineweb100B)")
    command.add_argument("--url", help=f"base of the files' addresses ({URL.format(corpus='<corpus>')})")
    command = commands.add_parser("evals", description="HellaSwag, PIQA and ARC-Easy, from their publishers")
    command.add_argument("--out", default="data/evals", help="directory (data/evals)")
    command.add_argument("--url", help="base of all files' addresses (each publisher's own)")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = "data/fineweb" if args.corpus == "fineweb10B" else "data/fineweb100B"
    out = own_name(args.out, what="a directory to fill")
    if args.command == "evals":
        return evals(out, args.url and args.url.rstrip("/"))
    if not 1 <= args.n <= SHARDS[args.corpus]:
        raise UserError(f"-n is {args.n}, and {args.corpus} has 1 to {SHARDS[args.corpus]} training shards"
                        + ("; --corpus fineweb100B has more" if args.corpus == "fineweb10B" and args.n > 0
                           else ""))
    fineweb(args.n, out, (args.url or URL.format(corpus=args.corpus)).rstrip("/"))


if __name__ == "__main__":
    main()
