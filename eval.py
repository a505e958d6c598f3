"""Scores of a run: perplexity and bits per byte on its validation shards; zero-shot accuracy on HellaSwag,
PIQA and ARC-Easy, equal to that of lm-evaluation-harness 0.4 (tests/compare_lm_eval.py runs both).

    python eval.py out/run
    python eval.py out/run --tasks perplexity,hellaswag,piqa,arc_easy --json scores.json --items items.jsonl
    torchrun --nproc_per_node=8 eval.py out/run --tasks hellaswag
"""

import argparse
import importlib
import json
import math
import os
import pickle
import re
import shlex
import statistics
import time
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import (Parser, Progress, Split, UserError, command, encode, get_tokenizer, open_split,
                  padded_vocabulary, positive, rank_and_ranks, replacing, token_bytes)
from model import Llama, LlamaConfig

BROKEN = (RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError, pickle.UnpicklingError)
BATCH_TOKENS = {"cpu": 2**11, "mps": 2**12, "cuda": 2**14}  # of the tasks, in one forward pass
FETCH = "Fetch the files again: python -m tools.download evals; or name a directory of yours: --eval_dir DIR"


########################################
#          Devices and ranks           #
########################################

def choose_device(device: str | None = None) -> str:
    """The device asked for, or the first that is there. UserError if there is none of that kind."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = [name for name in there if there[name]]
    if device and device not in found:
        raise UserError(f"--device {device}: torch {torch.__version__} finds none here. There is: --device "
                        + " or ".join(found))
    return device or found[0]


def join_ranks(device: str) -> torch.device:
    """This rank's device. Under torchrun it returns after the ranks have found each other."""
    where = torch.device(device)
    if device == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0))
        if where.index >= torch.cuda.device_count():
            raise UserError(f"torchrun starts more ranks than there are GPUs: --nproc_per_node="
                            f"{torch.cuda.device_count()} at most, or --device cpu")
        torch.cuda.set_device(where)
    if rank_and_ranks()[1] > 1:
        # If DDP or an optimizer imported it later, it would hold the group in default arguments. Gloo's
        # threads would then outlive destroy_process_group, and now and then abort the interpreter's exit.
        importlib.import_module("torch._dynamo")
        # After a restart torchrun's store still has the addresses of the ranks that are gone: a prefix hides
        # them. A rank that waits for another one longer than `timeout` gives up.
        store, rank, ranks = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank,
                                world_size=ranks, timeout=timedelta(minutes=10))
    return where


def my_rank() -> tuple[int, int]:
    """(rank, ranks) of the process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's tensor, on the CPU. NCCL wants it on the GPU meanwhile."""
    if dist.is_initialized():
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values)
    return values.cpu()


def precision(device, dtype: str):
    """Autocast to bfloat16 over fp32 weights, or nothing where dtype is float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


########################################
#         What a run has left          #
########################################

def seal(file, size: int) -> bytes:
    """What stands at the end of a checkpoint: the CRC-32 of the first `size` bytes of the open file."""
    crc, _ = 0, file.seek(0)
    while block := file.read(min(2**20, size - file.tell())):
        crc = zlib.crc32(block, crc)
    return b"CRC-32 " + crc.to_bytes(4, "big")


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of train.py, on the CPU. Any exception at all where it is damaged."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        sealed = size > 11 and seal(file, size - 11) == file.read()
        file.seek(-min(size, 22), os.SEEK_END)
        # Saved by an older version, or by hand, it is a zip, which ends with a record of 22 bytes.
        if not sealed and (file.read(4) != b"PK\5\6" or zipfile.ZipFile(path).testzip()):
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
        begun = "Its run ended before the first one: type its command again, with --resume auto"
        raise UserError(f"no checkpoint: {path} does not exist. " + (
            older_checkpoint(path) or (begun if path.with_name("log.jsonl").exists() else "")
            or "Runs are in out/; make one with: python train.py"))
    try:
        return read_checkpoint(path)
    except PermissionError:
        raise
    except Exception as error:  # whatever a damaged file makes of its readers
        raise UserError(f"{path} is damaged, or not a checkpoint of train.py ({type(error).__name__}). "
                        + (older_checkpoint(path) or "Name another run, or train it again")) from None


def older_checkpoint(path: Path) -> str:
    """What to type where another checkpoint beside this one is whole: train.py keeps ckpt.old.pt, and
    with --keep_every others."""
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


def load_run(path, device="cpu"):
    """(model, tokenizer, config) of a finished or stopped run, the model in evaluation mode."""
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    model, tokenizer = load_model(checkpoint, device).eval(), get_tokenizer(config["tokenizer"])
    wanted = padded_vocabulary(config["tokenizer"])
    if model.config.vocab_size != wanted:
        raise UserError(f"{path} has weights for a vocabulary of {model.config.vocab_size}, and its "
                        f"tokenizer {config['tokenizer']!r} wants {wanted}: not what it was trained with. "
                        "Name another run, or train it again")
    return model, tokenizer, config


def baseline(name: str, args: dict):
    """The Method that the function method() of baselines/NAME.py makes from these arguments."""
    module = f"baselines.{name.replace('-', '_')}"
    try:
        return importlib.import_module(module).method(**args)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"--method {name}: {error}. It has to be a method of train.py --help, or the file "
                        f"{module.replace('.', '/')}.py with a function method(), whose arguments are "
                        "--method_args") from None


########################################
#              Perplexity              #
########################################

@torch.no_grad()
def validate(model, split: Split, eval_tokens: int, batch_size: int, dtype: str, byte_lengths=None,
             progress=None) -> dict:
    """Mean loss over the first eval_tokens tokens of the validation shards, and what follows from it.

    The windows are shared out among the ranks and the sums reduced, so neither the batch size nor the number
    of ranks matters. The softmax leaves out the padding of the vocabulary. byte_lengths (n_vocab,) from
    data.token_bytes gives bits_per_byte. Returns val_loss in nats per token, perplexity, bits_per_byte and
    val_tokens; None where not finite or not known.
    """
    device, (rank, ranks) = next(model.parameters()).device, my_rank()
    windows = max(1, min(split.windows, eval_tokens // split.seq_len))
    mine = range(rank, windows, ranks)
    nats, size = 0.0, 0
    for start in range(0, len(mine), batch_size):
        x, y = split.read(mine[start:start + batch_size])
        if byte_lengths is not None:
            size += int(byte_lengths[y.numpy()].sum())
        with precision(device, dtype):
            logits = model(x.to(device))[..., :split.vocab_size]
        nats += F.cross_entropy(logits.flatten(0, 1).float(), y.flatten().to(device), reduction="sum").item()
        if progress:
            progress(min(windows, ranks * (start + batch_size)) * split.seq_len, windows * split.seq_len)
    nats, size = sum_over_ranks(torch.tensor([nats, size], dtype=torch.float64)).tolist()
    tokens = windows * split.seq_len
    loss = nats / tokens
    known = math.isfinite(loss)
    return {"val_loss": loss if known else None,
            "perplexity": math.exp(loss) if known and loss < 700 else None,
            "bits_per_byte": nats / math.log(2) / size if known and size else None, "val_tokens": tokens}


########################################
#      HellaSwag, PIQA, ARC-Easy       #
########################################

@dataclass(frozen=True)
class Item:
    """A question. Its answer is the choice that is likeliest after the context, behind a space."""
    where: str  # file and line
    context: str
    choices: list[str]
    gold: int

    def __post_init__(self):
        if len(self.choices) < 2 or not all(isinstance(text, str) for text in (self.context, *self.choices)):
            raise ValueError("expected a text and a list of texts to choose from")
        if not (isinstance(self.gold, int) and 0 <= self.gold < len(self.choices)):
            raise ValueError(f"its label is {self.gold!r} and it has {len(self.choices)} choices")


def hellaswag(doc):
    """(context, choices, gold): how does this go on, "activity: what happened, and who"."""
    def clean(text):  # the WikiHow half of HellaSwag carries the marks [title], [header], [step]
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = doc["activity_label"] + ": " + doc["ctx_a"] + " " + doc["ctx_b"].capitalize()
    endings = [clean(text) for text in doc["endings"]] if isinstance(doc["endings"], list) else []
    label = int(doc["label"]) if isinstance(doc["label"], str) else doc["label"]  # the hub has it as text
    return clean(context), endings, label


def piqa(doc):
    """How is this goal reached, two solutions. The label stands in a file of its own."""
    return "Question: " + doc["goal"] + "\nAnswer:", [doc["sol1"], doc["sol2"]], doc["label"]


def arc_easy(doc):
    """Questions of school science, three to five choices."""
    choices = doc["question"]["choices"]
    gold = [choice["label"] for choice in choices].index(doc["answerKey"])
    return "Question: " + doc["question"]["stem"] + "\nAnswer:", [choice["text"] for choice in choices], gold


TASKS = {"hellaswag": (hellaswag, "hellaswag_val.jsonl"), "piqa": (piqa, "valid.jsonl"),
         "arc_easy": (arc_easy, "ARC-Easy-Test.jsonl")}
PIQA_LABELS = "valid-labels.lst"


def read_task(task: str, directory: Path) -> list[Item]:
    """The items of a task's official file. UserError, with the line, where one is not what it should be."""
    make, name = TASKS[task]
    path, items = find_file(task, directory, name), []
    labels = read_text(find_file(task, directory, PIQA_LABELS)).split() if task == "piqa" else None
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            doc = json.loads(line)
            if labels is not None:
                doc["label"] = int(labels[len(items)])
            items.append(Item(f"{path.name}, line {number}", *make(doc)))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not an item with its label ({type(error).__name__}: "
                            f"{error}), found {line.strip()[:60]!r}. Is a file cut short? {FETCH}") from None
    if not items or (labels and len(labels) != len(items)):
        counts = f"{len(items):,} items" + (f" and {len(labels):,} labels" if labels else "")
        raise UserError(f"{path} has {counts}: it is not whole. {FETCH}")
    return items


def find_file(task: str, directory: Path, name: str) -> Path:
    for path in directory / name, directory / f"{task}_{name}":
        if path.is_file():
            return path
    part = f"only {name}.part, half of a download," if (directory / f"{name}.part").exists() else f"no {name}"
    raise UserError(f"{task}: there is {part} in {directory}. {FETCH}")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}. {FETCH}") from None


def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of both, split as the harness splits them: spaces at the end of the context belong to the
    continuation, which is what is left of the tokens of the whole; end-of-text stands for no context."""
    stripped = context.rstrip()
    continuation = context[len(stripped):] + continuation
    if not stripped:
        return [tokenizer.eot_token], encode(tokenizer, continuation).tolist()
    tokens = encode(tokenizer, stripped).tolist()
    return tokens, encode(tokenizer, stripped + continuation).tolist()[len(tokens):]


def rows_of(items: list[Item], tokenizer, seq_len: int) -> list[tuple[list[int], int]]:
    """A row for each choice of each item: (tokens of context and ending, how many of them are the ending's).
    A context that is too long loses its beginning. UserError for an ending longer than the model reads."""
    rows = []
    for item in items:
        for text in item.choices:
            context, ending = encode_pair(tokenizer, item.context, f" {text}")
            if not 0 < len(ending) <= seq_len:
                raise UserError(f"{item.where}: a choice of {len(ending):,} tokens, and this model reads 1 "
                                f"to {seq_len:,}: {text[:60]!r}. Train with a longer --seq_len, or leave the "
                                "item out with --limit")
            rows.append(((context + ending)[-seq_len - 1:], len(ending)))
    return rows


def batches_of(rows, budget: int) -> list[list[int]]:
    """Indices of the rows, the longest first, as many to a batch as pad to `budget` tokens, or one."""
    batches = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i][0])):
        if batches and (len(batches[-1]) + 1) * len(rows[batches[-1][0]][0]) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@torch.no_grad()
def log_probabilities(model, items, tokenizer, dtype: str, progress=None) -> list[list[float]]:
    """The log-probability of each choice of each item. The ranks take the batches in turn."""
    device, (rank, ranks) = next(model.parameters()).device, my_rank()
    rows = rows_of(items, tokenizer, model.config.seq_len)
    mine = batches_of(rows, BATCH_TOKENS[device.type])[rank::ranks]
    sums = torch.zeros(len(rows), dtype=torch.float64)
    for done, batch in enumerate(mine, 1):
        T = max(len(rows[i][0]) for i in batch)
        tokens = torch.zeros(len(batch), T, dtype=torch.int64)
        mask = torch.zeros(len(batch), T, dtype=torch.bool)
        for row, i in enumerate(batch):  # padding stands on the right, where causal attention never looks
            text, ending = rows[i]
            tokens[row, :len(text)] = torch.tensor(text)
            mask[row, len(text) - ending:len(text)] = True
        x, y, mask = tokens[:, :-1].to(device), tokens[:, 1:].to(device), mask[:, 1:].to(device)
        with precision(device, dtype):
            logits = model.head(model.hidden(x)[mask])[:, :tokenizer.n_vocab]  # of the endings alone
        nats = F.cross_entropy(logits.float(), y[mask], reduction="none").cpu().double()
        owners = torch.tensor(batch).repeat_interleave(mask.sum(1).cpu())
        sums.index_add_(0, owners, -nats)
        if progress:
            progress(done * len(items) // len(mine), len(items))
    values = iter(sum_over_ranks(sums).tolist())
    return [[next(values) for _ in item.choices] for item in items]


def answers(item: Item, sums: list[float]) -> tuple[int, int]:
    """The choice of the largest log-probability (acc), and of the largest per character (acc_norm)."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a choice that is nothing but marks is empty
        return int(np.argmax(sums)), int(np.argmax(np.array(sums) / [len(text) for text in item.choices]))


def evaluate(model, task: str, items: list[Item], tokenizer, dtype: str, progress=None):
    """(scores, a record for each item): both accuracies, with the standard errors of their means."""
    started = time.perf_counter()
    sums = log_probabilities(model, items, tokenizer, dtype, progress)
    speed = len(items) / (time.perf_counter() - started)
    records, scores = [], {}
    for number, (item, values) in enumerate(zip(items, sums)):
        acc, acc_norm = answers(item, values)
        records.append({"task": task, "item": number, "where": item.where, "gold": item.gold, "answer": acc,
                        "answer_norm": acc_norm,
                        "log_probabilities": [value if math.isfinite(value) else None for value in values]})
    for name, key in ("acc", "answer"), ("acc_norm", "answer_norm"):
        right = [float(record[key] == record["gold"]) for record in records]
        scores[f"{task}_{name}"] = statistics.fmean(right)
        scores[f"{task}_{name}_stderr"] = (statistics.stdev(right) / len(right)**0.5 if len(right) > 1
                                           else None)
    return {**scores, f"{task}_items": len(items), f"{task}_items_per_second": round(speed, 2)}, records


########################################
#             The command              #
########################################

def task_names(text: str) -> list[str]:
    """For add_argument(type=...): names with commas between."""
    known, names = ["perplexity", *TASKS], text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no task; there is {','.join(known)}")
    return list(dict.fromkeys(names))


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", help="directory of a run, e.g. out/nano-spectron-00, or its ckpt.pt")
    parser.add_argument("--tasks", type=task_names, default=["perplexity"],
                        help=f"perplexity,{','.join(TASKS)}, or some of them (perplexity)")
    parser.add_argument("--limit", type=positive, help="only the first items of each task")
    parser.add_argument("--eval_dir", type=Path, default=Path("data/evals"),
                        help="directory of the tasks' official files (data/evals)")
    parser.add_argument("--data", help="directory of shards (the one it was trained on)")
    parser.add_argument("--eval_tokens", type=positive, default=100_000_000,
                        help="validation tokens at most (100,000,000)")
    parser.add_argument("--batch_size", type=positive, default=8,
                        help="sequences of the perplexity at a time: memory only (8)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="(the run's)")
    parser.add_argument("--device", choices=["cuda", "cpu", "mps"], help="(the first that is there)")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    parser.add_argument("--items", type=Path, help="also write a JSON line for each item to this file")
    args = parser.parse_args(argv)
    # Whatever can be refused is refused before the first task begins.
    for path in (args.json, args.items):
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"{path} cannot be written: " + ("it is a directory" if path.is_dir() else
                                                             f"there is no directory {path.parent}"))
    items = {name: read_task(name, args.eval_dir)[:args.limit] for name in args.tasks if name in TASKS}
    device = join_ranks(choose_device(args.device))
    model, tokenizer, config = load_run(args.run, device)
    if "perplexity" in args.tasks:
        val = open_split(args.data or config["data"], "val", config["seq_len"], config["tokenizer"])
    for some in items.values():
        rows_of(some, tokenizer, model.config.seq_len)

    dtype, scores, records = args.dtype or config["dtype"], {}, []
    for name in args.tasks:
        if name == "perplexity":
            scores |= validate(model, val, args.eval_tokens, args.batch_size, dtype, token_bytes(tokenizer),
                               Progress("perplexity, tokens"))
        else:
            found, answered = evaluate(model, name, items[name], tokenizer, dtype, Progress(f"{name}, items"))
            scores, records = scores | found, records + answered
    if my_rank()[0] == 0:
        print("\n".join(f"{key}: {value}" for key, value in scores.items()))
        if args.json:
            with replacing(args.json, "w") as file:
                file.write(json.dumps(scores, indent=1) + "\n")
        if args.items:
            with replacing(args.items, "w") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
