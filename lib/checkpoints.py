"""Saving and loading the state of a run: a kill leaves a whole checkpoint, and a damaged one is found."""

import os
import pickle
import shlex
import shutil
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import torch

from lib.cli import UserError, rank_and_ranks
from lib.files import replacing
from lib.methods import baseline
from model import Llama, LlamaConfig

SEAL = b"CRC-32 "  # appended to a checkpoint, followed by the four bytes of its CRC
ZIP_END, ZIP_END_BYTES = b"PK\5\6", 22  # the end of a zip: without a seal, a checkpoint is one
BROKEN = (RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError, pickle.UnpicklingError)


def seal(file, size: int) -> bytes:
    """What is appended to a checkpoint: the CRC-32 of the first `size` bytes of the open file."""
    crc, _ = 0, file.seek(0)
    while block := file.read(min(2**20, size - file.tell())):
        crc = zlib.crc32(block, crc)
    return SEAL + crc.to_bytes(4, "big")


def save(c, model, optimizers, step: int, seconds: float, flops: int) -> None:
    """The whole state of a run, with a checksum at its end. A kill at any moment leaves a whole checkpoint.
    The one before stays as ckpt.old.pt, except while this one is written: the disk never holds three. With
    --keep_every it also gets a name of its own."""
    path, old = Path(c.out) / "ckpt.pt", Path(c.out) / "ckpt.old.pt"
    old.unlink(missing_ok=True)
    with replacing(path, "w+b") as file:
        torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                    "step": step, "seconds": seconds, "flops": flops, "config": vars(c)}, file)
        file.write(seal(file, file.tell()))
        if path.exists():
            with suppress(OSError):  # no hard links here: only the newest is kept
                os.link(path, old)
    if c.keep_every and step % c.keep_every == 0:
        keep(path, step)


def restore(optimizers, checkpoint: dict) -> tuple[int, float, int]:
    """Gives the optimizers their state; returns (step, seconds, FLOPs). Clears the dict, to free memory."""
    try:
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    except BROKEN as error:
        raise UserError("the checkpoint is damaged: its optimizers do not fit "
                        f"({type(error).__name__})") from None
    done = tuple(checkpoint[key] for key in ("step", "seconds", "flops"))
    checkpoint.clear()
    return done


def find(given: dict) -> dict | None:
    """The checkpoint to go on from; None where a run begins. UserError where --resume makes no sense."""
    if "resume" not in given:
        return None
    if "out" not in given or "overwrite" in given:
        raise UserError("--resume goes on with a run, and needs its directory: --resume --out out/<run>, "
                        "without --overwrite")
    if given["resume"] == "auto" and not os.path.lexists(Path(given["out"]) / "ckpt.pt"):
        return None
    if not Path(given["out"]).is_dir():
        raise UserError(f"--out {given['out']}: no such directory. Runs are in out/; make one with: "
                        "python train.py")
    return load_checkpoint(given["out"])


def is_done(saved: dict | None, c, given: dict) -> bool:
    """Whether nothing is left to do, which --resume auto takes as success; otherwise UserError."""
    stop = min(c.steps, c.stop_at or c.steps)
    if not saved or saved["step"] < stop:
        return False
    done = (f"{given['out']} has come to step {saved['step']} of {c.steps}: nothing is left "
            f"to do up to step {stop}. Its scores: python eval.py {shlex.quote(given['out'])}")
    if given["resume"] != "auto":
        raise UserError(done)
    if rank_and_ranks()[0] == 0:
        print(done)
    return True


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of train.py, on the CPU. A damaged file may raise anything."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        whole = size - len(SEAL) - 4
        sealed = whole > 0 and seal(file, whole) == file.read()
        file.seek(max(0, size - ZIP_END_BYTES))
        # One that somebody has changed and saved by hand has no seal.
        if not sealed and (file.read(4) != ZIP_END or zipfile.ZipFile(path).testzip()):
            raise ValueError("its CRC is wrong")
    # weights_only: a stranger's checkpoint cannot run code.
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    missing = ({"model", "optimizers", "step", "seconds", "flops"} - checkpoint.keys()
               | {"model", "method", "method_args", "tokenizer", "data", "seq_len", "dtype"}
               - checkpoint["config"].keys())
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return checkpoint


def load_checkpoint(path) -> dict:
    """What train.py saved in out/run/ckpt.pt. UserError where there is none, or it is damaged."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no checkpoint: {path} does not exist. {instead_of(path)}")
    try:
        return read_checkpoint(path)
    except PermissionError:
        raise
    except Exception as error:  # whatever a damaged file makes of its readers
        raise UserError(f"{path} is damaged, or not a checkpoint of train.py ({type(error).__name__}). "
                        + (older_checkpoint(path) or "Name another run, or train it again")) from None


def instead_of(path: Path) -> str:
    """What to type if this checkpoint is absent."""
    older = older_checkpoint(path)
    if older:
        return older
    if path.with_name("log.jsonl").exists():
        return "Its run ended before the first one: type its command again, with --resume auto"
    return "Runs are in out/; make one with: python train.py"


def older_checkpoint(path: Path) -> str:
    """What to type if a run's last checkpoint is lost, and another one beside it is whole: train.py keeps
    ckpt.old.pt, and with --keep_every others. No other file is ever to be written over."""
    if path.name != "ckpt.pt":
        return ""
    for older in sorted(path.parent.glob("ckpt*.pt"), key=os.path.getmtime, reverse=True):
        with suppress(Exception):
            if older != path:
                return (f"{older}, of step {read_checkpoint(older)['step']}, is whole. Go on from it: "
                        f"cp {shlex.quote(str(older))} {shlex.quote(str(path))}, and type the same again")
    return ""


def load_model(checkpoint: dict, device) -> Llama:
    """The model of a checkpoint, with the checkpoint's tensors as its own. UserError where its weights do not
    fit its config."""
    config, weights = checkpoint["config"], checkpoint["model"]
    try:
        with torch.device("meta"):  # weights that are loaded need not be drawn
            model = Llama(LlamaConfig(**config["model"]))
            if weights.keys() != model.state_dict().keys():  # the method has layers of its own
                method = baseline(config["method"], config["method_args"])
                model = Llama(LlamaConfig(**config["model"]), method.linear)
        model.load_state_dict(weights, assign=True)
    except (*BROKEN, UserError) as error:
        raise UserError("the checkpoint is damaged, or made by a method that is not here: its weights do not "
                        f"fit its config ({type(error).__name__}: {str(error)[:200]})") from None
    return model.to(device)


def keep(checkpoint: Path, step: int) -> None:
    """This checkpoint under a name of its own as well; where the disk knows no links, a copy."""
    numbered = checkpoint.with_name(f"ckpt-{step:06}.pt")
    numbered.unlink(missing_ok=True)  # a resumed run saves this step again
    try:
        os.link(checkpoint, numbered)
    except OSError:
        with open(checkpoint, "rb") as source, replacing(numbered) as copy:
            shutil.copyfileobj(source, copy)
