"""HellaSwag, PIQA and ARC-Easy, zero-shot, as lm-evaluation-harness 0.4 asks and scores them: the official
files, the prompts, and the log-probability of every choice. eval.py is the command.

tests/compare_lm_eval.py runs the harness beside it.
"""

import json
import math
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cli import UserError
from kernels import causal_attention
from model import Llama
from settings import my_rank, precision, sum_over_ranks

TREE_TOKENS = {"cpu": 2**10, "mps": 2**13, "cuda": 2**15}  # of the tasks, in one pass; what a cache likes
HEAD_ROWS = {"cpu": 2**7, "mps": 2**10, "cuda": 2**12}  # of these, those whose logits exist at a time


########################################
#          Files and prompts           #
########################################

@dataclass(frozen=True)
class Item:
    """A question whose answer is the choice that is likeliest after the context, behind a space."""
    where: str  # file and line
    context: str
    choices: list[str]
    gold: int

    def __post_init__(self):
        if len(self.choices) < 2 or not all(isinstance(text, str) for text in (self.context, *self.choices)):
            raise ValueError("expected a text and a list of texts to choose from")
        if not (isinstance(self.gold, int) and 0 <= self.gold < len(self.choices)):
            raise ValueError(f"its label is {self.gold!r} and it has {len(self.choices)} choices")


def hellaswag(directory: Path) -> list[Item]:
    """hellaswag_val.jsonl: how does this go on, "activity: what happened, and who"."""
    def item(where, doc):
        context = doc["activity_label"] + ": " + doc["ctx_a"] + " " + doc["ctx_b"].capitalize()
        endings = [clean(text) for text in doc["endings"]] if isinstance(doc["endings"], list) else []
        label = int(doc["label"]) if isinstance(doc["label"], str) else doc["label"]  # the hub has it as text
        return Item(where, clean(context), endings, label)
    return read_items(find("hellaswag", directory, "hellaswag_val.jsonl"), item)


def clean(text: str) -> str:
    """Without the marks that HellaSwag's WikiHow half carries: [title], [header], [step]."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def piqa(directory: Path) -> list[Item]:
    """valid.jsonl with valid-labels.lst: how is this goal reached, two solutions."""
    path = find("piqa", directory, "valid.jsonl", "piqa_valid.jsonl")
    labels_path = find("piqa", directory, "valid-labels.lst", "piqa_valid-labels.lst")
    labels = read_text(labels_path).split()
    items = read_items(path, lambda where, doc: Item(where, "Question: " + doc["goal"] + "\nAnswer:",
                                                     [doc["sol1"], doc["sol2"]], 0))
    if len(labels) != len(items) or not set(labels) <= {"0", "1"}:
        raise UserError(f"{labels_path} has {len(labels):,} labels ({', '.join(sorted(set(labels))[:5])}), "
                        f"and {path} has {len(items):,} items, which want one each, 0 or 1. {FETCH}")
    return [Item(item.where, item.context, item.choices, int(label)) for item, label in zip(items, labels)]


def arc_easy(directory: Path) -> list[Item]:
    """ARC-Easy-Test.jsonl: questions of school science, three to five choices."""
    def item(where, doc):
        choices = doc["question"]["choices"]
        gold = [choice["label"] for choice in choices].index(doc["answerKey"])
        return Item(where, "Question: " + doc["question"]["stem"] + "\nAnswer:",
                    [choice["text"] for choice in choices], gold)
    return read_items(find("arc_easy", directory, "ARC-Easy-Test.jsonl"), item)


TASKS = {"hellaswag": hellaswag, "piqa": piqa, "arc_easy": arc_easy}
FETCH = "Fetch the files again: python -m tools.download evals; or name a directory of yours: --eval_dir DIR"


def find(task: str, directory: Path, *names: str) -> Path:
    for name in names:
        if (directory / name).is_file():
            return directory / name
    part = next((name for name in names if (directory / f"{name}.part").exists()), None)
    found = f"only {part}.part, half of a download" if part else "no " + " or ".join(names)
    raise UserError(f"{task}: there is {found} in {directory}. {FETCH}")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}. {FETCH}") from None


def read_items(path: Path, item) -> list[Item]:
    """item(where, record) of each line. UserError, with the line, where one is not what it should be."""
    items = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path.name}, line {number}"
            try:
                items.append(item(where, json.loads(line)))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not an item with its label ({type(error).__name__}: "
                                f"{error}), found {line.strip()[:60]!r}. Is the file cut short? {FETCH}") \
                    from None
    if not items:
        raise UserError(f"{path} is empty. {FETCH}")
    return items


########################################
#           Tokens and scores          #
########################################

def encode_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of both, split as the harness splits them: spaces at the end of the context belong to the
    continuation, which is what is left of the tokens of the whole; end-of-text stands for no context."""
    stripped = context.rstrip()
    continuation = context[len(stripped):] + continuation
    if not stripped:
        return [tokenizer.eot_token], tokenizer.encode_ordinary(continuation)
    tokens = tokenizer.encode_ordinary(stripped)
    return tokens, tokenizer.encode_ordinary(stripped + continuation)[len(tokens):]


class Tree:
    """A context and the endings that go on from it, in one row, each token once: what endings begin with
    alike is shared as the context is. A token attends to those that stand before it in its own text.

    Of the row: tokens, their positions, and after[i], where the texts that go through token i end. Of what is
    scored: sources, the places that predict; targets, the tokens; choices, whose they are.
    """

    def __init__(self, context: list[int], endings: list[tuple[list[int], int]]):
        self.tokens, self.positions, self.after = [], [], []
        self.sources, self.targets, self.choices = [], [], []
        path, last = [], []  # the row's places of the last text's tokens, and these tokens
        endings = sorted(endings)  # those that begin alike follow each other
        if len(endings[-1][0]) > len(endings[0][0]):
            endings.reverse()
        self.chain = len(context) + len(endings[0][0]) - 1  # so many tokens, the most, are one text
        for ending, choice in endings:
            text = context + ending[:-1]  # the last token is only predicted
            shared = next((i for i, (a, b) in enumerate(zip(text, last)) if a != b),
                          min(len(text), len(last)))
            path, last = path[:shared], text
            for token in text[shared:]:
                self.tokens.append(token)
                self.positions.append(len(path))
                self.after.append(0)
                path.append(len(self.tokens) - 1)
            for place in path:
                self.after[place] = len(self.tokens)
            self.sources += path[len(context) - 1:]
            self.targets += ending
            self.choices += [choice] * len(ending)


def trees(items: list[Item], tokenizer, seq_len: int) -> list[Tree]:
    """The rows that score all items, the longest first; choices are numbered through the items. A context
    that is too long with an ending loses its beginning, as in the harness. UserError for an ending that is
    longer than seq_len."""
    rows, choice = [], 0
    for item in items:
        endings = {}  # by context; those of one item differ only where they were cut
        for text in item.choices:
            context, ending = encode_pair(tokenizer, item.context, f" {text}")
            if not 0 < len(ending) <= seq_len:
                raise UserError(f"{item.where}: a choice of {len(ending):,} tokens, and this model reads 1 "
                                f"to {seq_len:,}: {text[:60]!r}. Train with a longer --seq_len, or leave the "
                                "item out with --limit")
            context = context[max(0, len(context) + len(ending) - seq_len - 1):]
            endings.setdefault(tuple(context), []).append((ending, choice))
            choice += 1
        rows += [Tree(list(context), some) for context, some in endings.items()]
    return sorted(rows, key=lambda row: -len(row.tokens))


@torch.no_grad()
def score(model: Llama, rows: list[Tree], n_vocab: int, dtype: str) -> tuple[Tensor, Tensor]:
    """(choices, their log-probabilities) of every predicted token of these rows, in one pass of the model;
    the softmax is over the first n_vocab entries."""
    device = next(model.parameters()).device
    T = max(len(row.tokens) for row in rows)
    tokens, positions, after = (
        torch.tensor([values + [0] * (T - len(values)) for values in column], device=device)
        for column in zip(*((row.tokens, row.positions, row.after) for row in rows)))
    chain, key = min(row.chain for row in rows), torch.arange(T, device=device)
    query = key[chain:].unsqueeze(1)
    seen = ((key <= query) & (query < after.unsqueeze(1)) | (key == query)).unsqueeze(1)  # padding: itself
    mask = torch.zeros(seen.shape, device=device, dtype=getattr(torch, dtype)).masked_fill_(~seen, -math.inf)

    def attend(q, k, v):
        y = causal_attention(*(x[:, :, :chain] for x in (q, k, v)))
        return y if chain == T else torch.cat(
            [y, F.scaled_dot_product_attention(q[:, :, chain:], k, v, attn_mask=mask)], dim=2)

    places = torch.tensor([T * i + source for i, row in enumerate(rows) for source in row.sources])
    targets = torch.tensor([target for row in rows for target in row.targets], device=device)
    choices = torch.tensor([choice for row in rows for choice in row.choices])
    with precision(device, dtype):
        hidden = model.hidden(tokens, positions.unsqueeze(1), [attend] * len(model.blocks))
        hidden = hidden.flatten(0, 1)[places.to(device)]  # the head reads what is scored, nothing else
        head, rows_at_once = model.head.weight[:n_vocab].to(hidden.dtype), HEAD_ROWS[device.type]
        found = [F.linear(x, head).float().log_softmax(1).gather(1, y.unsqueeze(1))
                 for x, y in zip(hidden.split(rows_at_once), targets.split(rows_at_once))]
    return choices, torch.cat(found).squeeze(1).cpu().double()


def batched(rows: list[Tree], budget: int) -> list[list[Tree]]:
    """The rows in their order, the longest first, as many at a time as pad to `budget` tokens, or one."""
    batches = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].tokens) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def a_batch_a_core(device, function, batches):
    """map(function, batches); on a CPU each core takes batches of its own, which are too small to share."""
    if device.type != "cpu":
        return (yield from map(function, batches))
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores) as pool:
            yield from pool.map(function, batches)
    finally:
        torch.set_num_threads(cores)


def log_probabilities(model, items, tokenizer, dtype: str, progress=None) -> list[list[float]]:
    """The log-probability of each choice of each item, on every rank. The batches do not depend on the number
    of ranks, which take them in turn."""
    (rank, ranks), device = my_rank(), next(model.parameters()).device
    batches = batched(trees(items, tokenizer, model.config.seq_len), TREE_TOKENS[device.type])
    mine, sums = batches[rank::ranks], torch.zeros(sum(len(item.choices) for item in items)).double()
    scored = a_batch_a_core(device, lambda rows: score(model, rows, tokenizer.n_vocab, dtype), mine)
    for done, (choices, log_p) in enumerate(scored, 1):
        sums.index_add_(0, choices, log_p)
        if progress:
            progress(done * len(items) // len(mine), len(items))
    values = iter(sum_over_ranks(sums).tolist())
    return [[next(values) for _ in item.choices] for item in items]


def answers(item: Item, sums: list[float]) -> tuple[int, int]:
    """The choice of the largest log-probability, and of the largest per character."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a choice that clean() left empty
        return int(np.argmax(sums)), int(np.argmax(np.array(sums) / [len(text) for text in item.choices]))


def evaluate(model, task: str, items: list[Item], tokenizer, dtype: str, progress=None):
    """(scores, a record for each item): accuracies of both kinds of answer, with the standard errors of their
    means."""
    started = time.perf_counter()
    sums = log_probabilities(model, items, tokenizer, dtype, progress)
    speed = len(items) / (time.perf_counter() - started)
    records = []
    for number, (item, values) in enumerate(zip(items, sums)):
        acc, acc_norm = answers(item, values)
        records.append({"task": task, "item": number, "where": item.where, "gold": item.gold, "answer": acc,
                        "answer_norm": acc_norm,
                        "log_probabilities": [value if math.isfinite(value) else None for value in values]})
    scores = {}
    for name, key in ("acc", "answer"), ("acc_norm", "answer_norm"):
        right = [float(record[key] == record["gold"]) for record in records]
        scores[f"{task}_{name}"] = statistics.fmean(right)
        scores[f"{task}_{name}_stderr"] = (statistics.stdev(right) / len(right)**0.5 if len(right) > 1
                                           else None)
    return {**scores, f"{task}_items": len(items), f"{task}_items_per_second": round(speed, 2)}, records
