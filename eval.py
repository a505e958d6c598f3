"""Scores of a run: perplexity and bits per byte on its validation shards; zero-shot accuracy on HellaSwag,
PIQA and ARC-Easy, equal to that of lm-evaluation-harness 0.4 (tests/compare_lm_eval.py runs both).

    python eval.py out/run
    python eval.py out/run --tasks perplexity,hellaswag,piqa,arc_easy --json scores.json --items items.jsonl
    torchrun --nproc_per_node=8 eval.py out/run --tasks hellaswag
"""

import argparse
import json
import math
import re
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import Split, encode, get_tokenizer, open_split, padded_vocabulary, token_bytes
from lib.checkpoints import load_checkpoint, load_model
from lib.cli import Parser, Progress, UserError, command, positive
from lib.files import replacing
from lib.ranks import choose_device, join_ranks, my_rank, precision, sum_over_ranks
from lib.tasks import Item, read_task

BATCH_TOKENS = {"cpu": 2**11, "mps": 2**12, "cuda": 2**14}  # of the tasks, in one forward pass


def load_run(path, device="cpu"):
    """(model, tokenizer, config) of a finished or stopped run, the model in evaluation mode."""
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    model, tokenizer = load_model(checkpoint, device).eval(), get_tokenizer(config["tokenizer"])
    needed = padded_vocabulary(config["tokenizer"])
    if model.config.vocab_size != needed:
        raise UserError(f"{path} has weights for a vocabulary of {model.config.vocab_size}, and its "
                        f"tokenizer {config['tokenizer']!r} needs {needed}: not what it was trained with. "
                        "Name another run, or train it again")
    return model, tokenizer, config


# ------------------------------------------------ Perplexity ------------------------------------------------

@torch.no_grad()
def validate(model, split: Split, eval_tokens: int, batch_size: int, dtype: str, byte_lengths=None,
             progress=None) -> dict:
    """Mean loss over the first eval_tokens tokens of the validation shards, and what follows from it.

    The ranks share the windows, and neither their number nor the batch size matters. The softmax leaves out
    the padding of the vocabulary. byte_lengths (n_vocab,) from data.token_bytes gives bits_per_byte. Returns
    val_loss in nats per token, perplexity, bits_per_byte and val_tokens; None if not finite or not known.
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


# ---------------------------------------- HellaSwag, PIQA, ARC-Easy -----------------------------------------

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


# A task of your own: a function like these, a line here, and where its file is in tools/download.py. Labels
# in a file beside it, as PIQA's, are read in lib/tasks.py.
TASKS = {"hellaswag": (hellaswag, "hellaswag_val.jsonl"), "piqa": (piqa, "valid.jsonl"),
         "arc_easy": (arc_easy, "ARC-Easy-Test.jsonl")}


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


def is_cut(item: Item, tokenizer, seq_len: int) -> bool:  # Does its context lose its beginning?
    return any(len(context) + len(ending) > seq_len + 1 for context, ending in (
        encode_pair(tokenizer, item.context, f" {text}") for text in item.choices))


def batches_of(rows, budget: int) -> list[list[int]]:
    """Indices of the rows, the longest first, as many to a batch as pad to `budget` tokens, or one."""
    batches, room = [], 0
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i][0])):
        if room == 0:  # the first row of a batch is its longest, to which the others are padded
            batches.append([])
            room = max(1, budget // len(rows[i][0]))
        batches[-1].append(i)
        room -= 1
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
    parts = sum_over_ranks(sums).split([len(item.choices) for item in items])
    return [part.tolist() for part in parts]


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
    cut = sum(is_cut(item, tokenizer, model.config.seq_len) for item in items)
    return {**scores, f"{task}_items": len(items), f"{task}_items_cut": cut,
            f"{task}_items_per_second": round(speed, 2)}, records


# ----------------------------------------------- The command ------------------------------------------------

def task_names(text: str) -> list[str]:
    """For add_argument(type=...): names with commas between."""
    known, names = ["perplexity", *TASKS], text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is no task; there is {','.join(known)}")
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
    parser.add_argument("--device", choices=["cuda", "cpu", "mps"], help="(cuda if there is one, else cpu)")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    parser.add_argument("--items", type=Path, help="also write a JSON line for each item to this file")
    args = parser.parse_args(argv)
    # Whatever can be refused is refused before the first task begins.
    for path in (args.json, args.items):
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"{path} cannot be written: expected a file, in a directory that is there")
    items = {name: read_task(name, *TASKS[name], args.eval_dir)[:args.limit]
             for name in args.tasks if name in TASKS}
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
