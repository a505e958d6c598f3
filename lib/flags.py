"""The command line of train.py: reading its flags, showing them, and refusing those that make no sense."""

import argparse
import json
import math
import os
import shutil
from types import SimpleNamespace

from lib.cli import Parser, UserError
from lib.methods import LOW_RANK_FLAGS, MUON_FLAGS, SPECTRON_FLAGS
from lib.outputs import own_name

MAY_CHANGE = {"batch_size", "device", "compile", "eval_every", "save_every", "keep_every", "spectra_every",
              "out", "stop_at", "on_nonfinite", "data"}  # at --resume
METAVARS = {"size": "SIZE", "method": "NAME", "method_args": "KEY=VALUE", "data": "DIR", "out": "DIR",
            "spectra_of": "NAME"}  # others are X, or their choices
# What other programs call a flag, and what it is here
SYNONYMS = {word: answer for words, answer in {
    "learning_rate peak_lr max_lr base_lr": "--lr",
    "embedding_lr embed_lr head_lr": "--adam_lr",
    "optimizer optim opt algorithm": "--method",
    "equilibrate": "--method equilibrated",  # in the commands of some of results/runs
    "max_steps num_steps total_steps train_steps iters iterations max_iters num_iterations": "--steps",
    "epochs num_epochs num_train_epochs": "--steps; a run begins by saying how many epochs they are",
    "bs micro_batch_size device_batch_size": "--batch_size for what is in memory at a time, and "
                                             "--tokens_per_step for the batch",
    "global_batch_size total_batch_size": "--tokens_per_step, in tokens",
    "wd": "--weight_decay", "beta beta1 mu": "--momentum", "precision": "--dtype",
    "width dim d_model hidden_size depth layers n_layer n_layers n_head n_heads model model_size":
        "--size, e.g. --size nano-2x64 for two blocks of width 64",
    "rank r": "--rank_ratio, the rank over the input width of each matrix",
    "context context_length block_size sequence_length max_seq_len": "--seq_len",
    "dataset data_dir data_path": "--data", "output output_dir out_dir save_dir": "--out",
    "gradient_accumulation_steps grad_accum": "decided by --tokens_per_step, the batch, and --batch_size, "
                                              "what is in memory at a time",
    "eval_interval": "--eval_every", "save_interval ckpt_every": "--save_every",
    "log_every log_interval logging_steps": "--spectra_every",
    "warmup warmup_steps scheduler": "fixed: 5% of the steps, and then a cosine towards zero",
    "grad_clip clip max_grad_norm": "fixed: a norm of 1",
}.items() for word in words.split()}


# ------------------------------------------------- Reading --------------------------------------------------

def parse(doc: str, groups: dict, nano: dict, argv) -> dict:
    """The flags that were given, and only those. groups: title -> {flag: (kind, default, help)}; nano has the
    defaults that differ at nano's sizes, which the help names."""
    parser = Parser(doc, usage="python train.py [--flag value ...]", synonyms=SYNONYMS)
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for name, (kind, default, text) in flags.items():
            shown = {True: "on", False: "off"}[default] if kind is bool and default is not None else default
            if default not in (None, {}):
                text += f" ({shown}; nano {nano[name]})" if name in nano else f" ({shown})"
            elif name in nano:
                text += f"; nano {nano[name]}"
            group.add_argument(f"--{name}", help=text, default=argparse.SUPPRESS, **reading(name, kind))
    group = parser.add_argument_group("what to do")
    for name, text, more in (
            ("resume", "go on from the checkpoint in --out; auto: or start there, where there is none yet",
             {"nargs": "?", "const": "last", "choices": ["last", "auto"]}),
            ("overwrite", "start anew in an --out that has a run", {"action": "store_true"}),
            ("dry_run", "print what would be trained and what it needs, and end", {"action": "store_true"})):
        group.add_argument(f"--{name}", help=text, default=argparse.SUPPRESS, **more)
    given = vars(parser.parse_args(argv))
    if "out" in given:
        own_name(given["out"], what="a directory, or leave the flag out")
    if given.get("data", "x").strip() == "":
        raise UserError("--data is empty: name a directory, or leave the flag out")
    if "method" in given:
        given["method"] = given["method"].replace("_", "-")
    if "method_args" in given:
        given["method_args"] = dict(given["method_args"])
    return given


def reading(name: str, kind) -> dict:
    """How argparse reads a flag whose `kind` is bool, a list of choices, or a function of text."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(kind, list):
        return {"type": type(kind[0]), "choices": kind, "metavar": METAVARS.get(name)}
    more = {"nargs": "+", "action": "extend"} if kind is key_and_value else {}
    return {"type": kind, "metavar": METAVARS.get(name, "X"), **more}


def key_and_value(text: str):
    """key=value, the value read as true, false or a number where it is one."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected key=value")
    try:
        return key, json.loads(value.lower())
    except ValueError:
        return key, value


def resumed(given: dict, saved: dict, flags: dict, device: str) -> SimpleNamespace:
    """The settings of a run that goes on: its own, with what was given. UserError where that would change its
    result."""
    changed = [f"--{flag} {value} (was {saved.get(flag)})" for flag, value in given.items()
               if flag not in MAY_CHANGE and saved.get(flag) != value]
    if changed:
        raise UserError(f"a resumed run keeps its settings, and these differ: {', '.join(changed)}. Leave "
                        "them out, or start another run without --resume. What may change: "
                        + ", ".join(sorted(MAY_CHANGE)))
    c = SimpleNamespace(**saved)
    for flag, (_, default, _) in flags.items():
        vars(c).setdefault(flag, default)  # a flag that is newer than the run
    c.stop_at = None  # it was for the other command alone
    c.compile = c.compile and device == c.device
    vars(c).update(given)
    c.device = device
    return c


# -------------------------------------------------- Showing -------------------------------------------------

def typed(flag: str, value) -> str:
    """As it is typed: --no-renormalize, --rank_ratio 0.4."""
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def learning_rates(methods: dict) -> str:
    """The defaults of lr at nano and at the paper's sizes, of each method and of what it is tuned for."""
    lines = []
    for name, method in methods.items():
        for tuned in (None, *method.tuned):
            flags = " ".join(typed(*flag) for flag in tuned.flags.items()) if tuned else name
            nano, above = (method.learning_rates(size, tuned)["lr"] for size in ("nano", "S"))
            lines.append(f"{'  ' * bool(tuned)}{flags}: {nano:g}, {above:g}")
    return "\n".join(lines)


def settings(c, groups: dict, method) -> list[str]:
    """A line for each group, with the flags that have an effect in this run."""
    idle, on_off = without_effect(c, method), {True: "on", False: "off"}
    lines = []
    for title, flags in groups.items():
        values = {flag: getattr(c, flag) for flag in flags if flag not in idle}
        if "method_args" in values:
            values["method_args"] = " ".join(f"{key}={value}" for key, value in c.method_args.items())
        lines.append(f"{title}: " + ", ".join(
            f"{flag} {on_off[value] if isinstance(value, bool) else value}" for flag, value in values.items()
            if value not in (None, "")))
    return lines


# ------------------------------------------------- Refusing -------------------------------------------------

def without_effect(c, method) -> dict[str, str]:
    """The flags that do nothing in a run with these settings, and the flag that would change this; "" where
    the method has no such thing."""
    optional = {*LOW_RANK_FLAGS, *MUON_FLAGS, *SPECTRON_FLAGS} - set(method.flags)
    needed = {flag: other for flag, other, there in (
        ("ns_steps", "--orthogonalize", c.orthogonalize), ("power_steps", "--renormalize", c.renormalize),
        ("muon_lr", "--factorize ffn", c.factorize == "ffn")) if not there}
    return needed | dict.fromkeys([*optional, *method.ignores], "")


def check(given: dict, c, method, core: dict) -> None:
    """UserError for a flag that would have no effect. `core` are the methods of train.py by their names."""
    for flag, needed in sorted(without_effect(c, method).items()):
        others = [name for name, other in core.items() if flag in other.flags]
        if flag not in given or flag in method.ignores and not given[flag]:
            continue
        if needed:
            raise UserError(f"--{flag} has no effect without {needed}: add that, or leave --{flag} out")
        word = f"--no-{flag}" if given[flag] is False else f"--{flag}"
        raise UserError(f"{word} does not apply to --method {c.method}"
                        + (f"; it is a flag of --method {' or '.join(others)}" if others else
                           ", which has none: leave it out"))


def check_compiler(c, method) -> None:
    if c.compile and not method.compiles:
        raise UserError(f"--compile does not go with --method {c.method}, whose forward pass changes from "
                        "step to step: leave it out")
    if c.compile and not any(shutil.which(x) for x in (os.environ.get("CXX") or "g++", "clang++", "cl")):
        raise UserError("--compile needs a C++ compiler, and the path has none: install g++, or --no-compile")


def split_batch(c, chosen: bool, ranks: int) -> None:
    """Sets micro_steps so that batch_size x seq_len x ranks x micro_steps = tokens_per_step; batch_size too
    unless the user chose it. UserError with the nearest valid value where nothing does."""
    unit = c.seq_len * ranks
    if c.tokens_per_step % unit:
        raise UserError(f"--tokens_per_step {c.tokens_per_step} is not a multiple of {unit} = "
                        f"--seq_len {c.seq_len} x {ranks} rank(s); the nearest that is: --tokens_per_step "
                        f"{max(1, round(c.tokens_per_step / unit)) * unit}")
    sequences = c.tokens_per_step // unit
    small = [d for d in range(1, math.isqrt(sequences) + 1) if sequences % d == 0]
    valid = small + [sequences // d for d in small]
    if not chosen:
        c.batch_size = max(d for d in valid if d <= c.batch_size)
    if c.batch_size not in valid:
        raise UserError(f"--batch_size {c.batch_size} does not divide the {sequences} sequences that a step "
                        f"gives each of {ranks} rank(s); the nearest that does: --batch_size "
                        f"{min(valid, key=lambda d: abs(d - c.batch_size))}")
    c.micro_steps = sequences // c.batch_size
