"""What the commands share: a user's mistake is one message and exit code 2, and a misspelt flag names its
neighbour."""

import argparse
import difflib
import functools
import os
import sys
import time


class UserError(Exception):
    """A mistake that the user can mend. The message names the thing, what was found, what was expected, what
    to type."""


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


def positive(text: str) -> int:
    """For add_argument(type=...): an int of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has to be a whole number of at least 1")
    return int(text)


def number(kind, below):
    """For add_argument(type=...): an int or a float, whichever kind is, in [0, below)."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not 0 <= value < below:
            raise argparse.ArgumentTypeError(f"{text!r} has to be {'a whole' if kind is int else 'a'} number "
                                             f"of at least 0, below {below:g}")
        return value
    return parse


class Progress:
    """progress(done, total): a line on the terminal of rank 0 with the rate and the time left, if there is a
    terminal; it goes when all is done."""

    def __init__(self, what: str, unit: str):
        self.what, self.unit, self.started, self.shown = what, unit, time.monotonic(), 0.0
        self.silent = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self.silent or (done < total and now - self.shown < 0.5):
            return
        self.shown, rate = now, done / max(now - self.started, 1e-9)
        left = round((total - done) / rate) if rate else 0
        print(f"\r\033[K{self.what}: {done:,}/{total:,} {self.unit}, {rate:,.1f} a second, {left // 3600}:"
              f"{left // 60 % 60:02}:{left % 60:02} left" if 0 < done < total else "\r\033[K", end="",
              file=sys.stderr, flush=True)


def command(main):
    """A main(argv) whose UserError ends the program: its message on stderr (once, before the ranks have
    joined) and exit code 2. Ctrl-C, or a reader of its output that goes away, ends it without a traceback."""
    @functools.wraps(main)
    def run(argv=None):
        try:
            result = main(argv)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
            raise SystemExit(141) from None
        except (UserError, OSError) as error:  # an OSError names its file and what is wrong with it
            rank = os.environ.get("RANK", "0") if "WORLD_SIZE" in os.environ else "0"
            joined = "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized()
            if rank == "0" or joined:  # before that, all ranks see the same mistake
                print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    return run
