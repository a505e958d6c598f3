"""What the commands share: a user's mistake is one message and exit code 2, and a misspelt flag names its
neighbour."""

import argparse
import difflib
import functools
import os
import sys


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


def command(main):
    """A main(argv) whose UserError ends the program: its message on stderr (once, from rank 0) and exit
    code 2."""
    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except (UserError, OSError) as error:  # an OSError names its file and what is wrong with it
            if os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ:
                print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    return run
