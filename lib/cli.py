"""What all commands share: flags and numbers, a user's mistake as one message, output that cannot fail."""

import argparse
import difflib
import os
import re
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial, wraps

import torch


class UserError(Exception):
    """A mistake that the user can mend. The message says what was found, what was expected, what to type."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; an unknown flag is refused together with the nearest known one, or with
    that of the same meaning: synonyms has answers by words, {"learning_rate": "--lr"}."""

    def __init__(self, description=None, synonyms=None, **options):
        self.synonyms = synonyms or {}
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=partial(argparse.RawTextHelpFormatter, max_help_position=36),
                         **options)

    def parse_known_args(self, args=None, namespace=None):
        args, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            same = self.synonyms.get(flag.lstrip("-").replace("-", "_")) if flag.startswith("--") else None
            near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.5)
            self.error(f"unknown flag or argument {flag}"
                       + (f"; here it is {same}" if same else f"; did you mean {near[0]}?" if near else ""))
        return args, unknown

    def error(self, message):
        raise UserError(message if "--help" in message else f"{message}; see --help")


def number(kind=float, least=0, below: float = float("inf")):
    """For add_argument(type=...): an int or a float, whichever `kind` is, of at least `least`."""
    expected = f"a {'whole number' if kind is int else 'number'} of at least {least}"
    if below < float("inf"):
        expected += f", below {below:,}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < below:
            raise argparse.ArgumentTypeError(f"{text!r} has to be {expected}")
        return value
    return parse


positive = number(int, 1)


def ratio(text: str) -> float:
    """For add_argument(type=...): a number in (0, 1]."""
    value = number()(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} has to be in (0, 1], e.g. 0.25")
    return value


def hours(seconds: float) -> str:
    """h:mm:ss"""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def say(text: str, end: str = "\n", to: str = "stdout") -> None:
    """print, at once, that cannot fail: what a closed pipe, a lost terminal or a full disk does not take is
    lost, as is all that follows. For a run, whose steps are worth more than its words."""
    stream = getattr(sys, to)
    try:
        if stream is not None:
            print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError):  # ValueError: the stream is closed
        silence(stream)


def silence(stream) -> None:
    """Sends what a stream still holds, and all that follows, nowhere: it would fail once more at the exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def any_letter():
    """Meanwhile a Latin-1 terminal shows ? for the letters it lacks."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before):
            with suppress(OSError, ValueError):  # it may be gone
                stream.reconfigure(errors=errors)


def command(main):
    """Wraps main(argv): a UserError or OSError is one message on stderr and exit code 2, not a traceback."""
    @wraps(main)
    def run(argv=None):
        with any_letter():
            try:
                result = main(argv)
                if sys.stdout is not None:
                    sys.stdout.flush()
                return result
            except KeyboardInterrupt:
                raise SystemExit(130) from None
            except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
                silence(sys.stdout)
                raise SystemExit(141) from None
            except (UserError, OSError) as error:
                # Before the ranks of torchrun have joined, all find the same mistake: one of them tells it.
                if is_first() or torch.distributed.is_initialized():
                    say(f"error: {error}", to="stderr")
                raise SystemExit(2) from None
            except RuntimeError as error:
                if not is_lost_rank(error):
                    raise
                say(f"error: another rank has ended or hangs, so that rank {rank_and_ranks()[0]} ends too "
                    f"({str(error).splitlines()[0][:150]}). torchrun's report names the first that failed. A "
                    "checkpoint that was saved is whole: type the same command with --resume auto",
                    to="stderr")
                raise SystemExit(1) from None
    return run


def is_lost_rank(error: RuntimeError) -> bool:
    return torch.distributed.is_initialized() and re.search("gloo|NCCL|[Cc]onnection", str(error)) is not None


def rank_and_ranks() -> tuple[int, int]:
    """(this process's rank, how many there are) under torchrun; (0, 1) elsewhere. A lone RANK or WORLD_SIZE
    that some other program left in the environment is ignored. UserError if they contradict each other."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
    if not all(os.environ.get(name) for name in names):
        return 0, 1
    try:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        return 0, 1
    if not 0 <= rank < ranks:
        raise UserError(f"RANK={rank} and WORLD_SIZE={ranks} contradict each other: start with torchrun, or "
                        f"alone after: unset {' '.join(names)}")
    return rank, ranks


def is_first() -> bool:
    """Whether this is rank 0, the first of another machine, where other files may be missing, or one that
    cannot tell."""
    try:
        return rank_and_ranks()[0] == 0 or os.environ["LOCAL_RANK"] == "0"
    except UserError:
        return True


class Progress:
    """progress(done, total) shows a line with the time left, where stderr is a terminal."""

    def __init__(self, what: str):
        self.what, self.started = what, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr and sys.stderr.isatty() and rank_and_ranks()[0] == 0:
            left = (time.monotonic() - self.started) / max(1, done) * (total - done)
            line = f"{self.what}: {done:,}/{total:,}, {hours(left)} left"
            say(f"\r\033[K{line if done < total else ''}", end="", to="stderr")
