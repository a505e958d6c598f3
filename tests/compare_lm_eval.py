"""Ours beside lm-evaluation-harness: the same checkpoint, the same local files, its own code for prompts,
tokens, truncation, batches and metrics.

    pip install -r tests/requirements-compare.txt
    python tests/compare_lm_eval.py out/run --eval_dir data/evals [--limit N]

In float32, one task after the other: how fast both are on the first 512 items, in turn, the harness at the
fastest of --batch_sizes; then all items. Prints both; ends with an error where a log-probability differs by
1e-3 or more, an answer on an item that is not a tie, or an accuracy in its fourth digit.
"""

import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import lm_eval
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM

import eval as evaluation
from eval import load_run, task_names
from lib.cli import Parser, command, positive
from lib.tasks import PIQA_LABELS, find_file, read_task

TOLERANCE, SPEED_ITEMS = 1e-3, 512


class Adapter(HFLM):
    """A run of ours as the harness sees a model: tokens, logits without the padding, and no more."""

    def __init__(self, model, tokenizer, batch_size: int):
        TemplateLM.__init__(self)
        self.llama, self.tiktoken, self.batch_size_per_gpu = model, tokenizer, batch_size
        self.backend, self.logits_cache, self.softmax_dtype, self.enable_thinking = (
            "causal", True, None, False)
        self._max_length, self._device, self._rank, self._world_size = (
            model.config.seq_len, torch.device("cpu"), 0, 1)

    prefix_token_id = eot_token_id = property(lambda self: self.tiktoken.eot_token)
    tokenizer_name = property(lambda self: self.tiktoken.name)

    def get_model_info(self):
        return {}

    def tok_encode(self, string, **options):
        return self.tiktoken.encode_ordinary(string)

    def _model_call(self, tokens, **options):
        with torch.no_grad():
            return self.llama(tokens)[..., :self.tiktoken.n_vocab]


def readable(items, tokenizer, seq_len: int) -> list[int]:
    """The items all of whose choices the model can read; the harness stops at others, and so do we."""
    return [i for i, item in enumerate(items)
            if all(len(evaluation.encode_pair(tokenizer, item.context, f" {text}")[1]) <= seq_len
                   for text in item.choices)]


def converted(task: str, directory: Path, out: Path, kept: list[int]) -> str:
    """A YAML file with the harness's task on local files: the official ones, in the columns of the hub's
    copies."""
    if task == "hellaswag":
        rows = [json.loads(line) for line in (directory / "hellaswag_val.jsonl").open()]
    elif task == "piqa":
        labels = find_file(task, directory, PIQA_LABELS).read_text().split()
        path = find_file(task, directory, "valid.jsonl")
        rows = [json.loads(line) | {"label": int(label)}
                for line, label in zip(path.open(), labels, strict=True)]
    else:
        rows = [json.loads(line) for line in (directory / "ARC-Easy-Test.jsonl").open()]
        rows = [{"id": r["id"], "question": r["question"]["stem"], "answerKey": r["answerKey"],
                 "choices": {key: [choice[key] for choice in r["question"]["choices"]]
                             for key in ("text", "label")}}
                for r in rows]
    path = out / f"{task}.jsonl"
    path.write_text("".join(json.dumps(rows[i]) + "\n" for i in kept))
    split = "test" if task == "arc_easy" else "validation"
    folder = Path(lm_eval.__file__).parent / "tasks" / {"arc_easy": "arc"}.get(task, task)
    config = {"include": str(folder / f"{task}.yaml"), "task": task, "dataset_path": "json",
              "dataset_name": None, "training_split": None, "validation_split": None, "test_split": None,
              f"{split}_split": split, "dataset_kwargs": {"data_files": {split: str(path)}}}
    (out / f"{task}.yaml").write_text(json.dumps(config))
    return str(out / f"{task}.yaml")


def harness(model, tokenizer, task: str, config: str, batch_size: int, limit):
    """(scores, samples in the files' order, seconds in the model's part) by the harness."""
    adapter = Adapter(model, tokenizer, batch_size)
    taken, method = [], adapter.loglikelihood

    def timed(*args, **options):
        started = time.perf_counter()
        result = method(*args, **options)
        taken.append(time.perf_counter() - started)
        return result
    adapter.loglikelihood = timed
    found = lm_eval.simple_evaluate(adapter, tasks=[config], num_fewshot=0, limit=limit,
                                    batch_size=batch_size,
                                    bootstrap_iters=1, log_samples=True, verbosity="ERROR")
    return found["results"][task], sorted(found["samples"][task], key=lambda s: s["doc_id"]), sum(taken)


def tie(values, width: float) -> bool:
    """Whether the two largest are within what two agreeing tools may differ by."""
    second, first = sorted(values)[-2:]
    return first - second < 2 * TOLERANCE / width


def speeds(model, tokenizer, task: str, config: str, items, batch_sizes, rounds: int = 3) -> str:
    """Items per second of ours and of the harness at its best batch size, in turn, on the first items."""
    items = items[:SPEED_ITEMS]

    def theirs(size, count):
        return count / harness(model, tokenizer, task, config, size, count)[-1]
    tried = {size: theirs(size, min(64, len(items))) for size in batch_sizes}
    best = max(tried, key=tried.get)
    pairs = [(evaluation.evaluate(model, task, items, tokenizer, "float32")[0][f"{task}_items_per_second"],
              theirs(best, len(items))) for _ in range(rounds)]
    mine, its = (statistics.median(column) for column in zip(*pairs))
    ratio = statistics.median(a / b for a, b in pairs)
    return (f"  items a second   ours {mine:.1f}  the harness {its:.1f} at its best batch size, {best} "
            f"({', '.join(f'{size}: {speed:.1f}' for size, speed in tried.items())})  ratio {ratio:.2f}")


def compare(model, tokenizer, task: str, args, out: Path) -> bool:
    items = read_task(task, *evaluation.TASKS[task], args.eval_dir)[:args.limit]
    kept = readable(items, tokenizer, model.config.seq_len)
    config, left_out = converted(task, args.eval_dir, out, kept), len(items) - len(kept)
    items = [items[i] for i in kept]
    speed = speeds(model, tokenizer, task, config, items, args.batch_sizes)
    theirs, samples, _ = harness(model, tokenizer, task, config, 16, args.limit)
    if args.prompts:
        prompts = [[request[:2] for request in sample["arguments"]] for sample in samples]
        args.prompts.write_text(json.dumps(prompts, indent=0, ensure_ascii=False) + "\n")
    scores, records = evaluation.evaluate(model, task, items, tokenizer, "float32")
    largest, other, ties, prompts = 0.0, 0, 0, 0
    for item, record, sample in zip(items, records, samples, strict=True):
        asked = [request[:2] for request in sample["arguments"]]
        prompts += asked != [(item.context, f" {text}") for text in item.choices]
        values = [float(response[0][0]) for response in sample["resps"]]
        mine = record["log_probabilities"]
        largest = max(largest, *(abs(a - b) for a, b in zip(mine, values, strict=True)))
        normed = [value / len(text) if text else -math.inf for value, text in zip(values, item.choices)]
        width = max(1, min(map(len, item.choices)))
        for kind, right, by, width in (("answer", sample["acc"], values, 1),
                                       ("answer_norm", sample["acc_norm"], normed, width)):
            if record[kind] != by.index(max(by)) or (record[kind] == item.gold) != bool(right):
                other, ties = other + (not tie(by, width)), ties + tie(by, width)
    good = largest < TOLERANCE and other == prompts == 0
    print(f"{task}: {len(items):,} items{f' ({left_out} left out: too long)' if left_out else ''}, "
          f"{sum(len(item.choices) for item in items):,} choices; prompts that differ: {prompts}; largest "
          f"difference of a log-probability: {largest:.2e}; other answers: {other}, and {ties} between "
          "choices that tie")
    for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
        mine, its = scores[f"{task}_{key}"], theirs[f"{key},none"]
        shown = [f"{value:.6f}" if isinstance(value, float) else "-" for value in (mine, its)]  # of one item
        print(f"  {key:16} ours {shown[0]}  the harness {shown[1]}")
        good &= shown[0][:6] == shown[1][:6]
    print(speed, "\n  agree" if good else "\n  DIFFER", flush=True)
    return good


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run")
    parser.add_argument("--tasks", type=task_names, default=list(evaluation.TASKS))
    parser.add_argument("--eval_dir", type=Path, default=Path("data/evals"))
    parser.add_argument("--limit", type=positive)
    parser.add_argument("--batch_sizes", type=lambda text: [int(size) for size in text.split(",")],
                        default=[1, 4, 16, 64])
    parser.add_argument("--prompts", type=Path,
                        help="also write the harness's prompts of one task to this file")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    model, tokenizer, config = load_run(args.run)
    print(f"{args.run}: tokenizer {config['tokenizer']}, seq_len {config['seq_len']}; lm-eval "
          f"{lm_eval.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32",
          flush=True)
    with tempfile.TemporaryDirectory() as out:
        os.environ["HF_DATASETS_CACHE"] = out
        good = [compare(model, tokenizer, task, args, Path(out)) for task in args.tasks]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
