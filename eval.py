"""Scores of a run: perplexity and bits per byte on the validation shards, and accuracies on HellaSwag, PIQA
and ARC-Easy that are those of lm-evaluation-harness 0.4 (zero-shot).

    python eval.py out/run
    python eval.py out/run --tasks perplexity,hellaswag,piqa,arc_easy --json scores.json --items items.jsonl
    torchrun --nproc_per_node=8 eval.py out/run --tasks hellaswag
"""

import argparse
import json
import math
import pickle
from pathlib import Path

import torch
import torch.distributed as dist

import cli
import methods
from cli import UserError
from data import Split, get_tokenizer, open_data, padded_vocabulary, token_bytes
from kernels import cross_entropy
from model import FactorizedLinear, Llama, LlamaConfig
from settings import choose_device, join_ranks, my_rank, precision, sum_over_ranks
from tasks import TASKS, evaluate, trees


########################################
#         What a run has left          #
########################################

BROKEN = (RuntimeError, EOFError, LookupError, AttributeError, TypeError, ValueError, pickle.UnpicklingError)


def load_checkpoint(path) -> dict:
    """What train.py saved in out/run/ckpt.pt, on the CPU. UserError where there is none, or it is damaged."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no checkpoint: {path} does not exist. Runs are in out/; make one with: "
                        "python train.py")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = ({"model", "optimizers", "step", "seconds", "flops"} - checkpoint.keys()
                   | {"model", "method", "method_args", "tokenizer", "data",
                      "seq_len"} - checkpoint["config"].keys())
        if missing:
            raise KeyError(missing)
    except BROKEN as error:
        raise UserError(f"{path} is damaged, or not a checkpoint of train.py "
                        f"({type(error).__name__})") from None
    return checkpoint


def load_model(checkpoint: dict, device) -> Llama:
    """The model of a checkpoint, with the checkpoint's tensors as its own. UserError where its weights do not
    fit its config."""
    config, weights = checkpoint["config"], checkpoint["model"]
    try:
        guided = any(name.endswith(".W") for name in weights)  # a method's own layers, while it needs them
        linear = methods.find(config["method"], config["method_args"]).linear if guided else FactorizedLinear
        with torch.device("meta"):  # weights that are loaded need not be drawn
            model = Llama(LlamaConfig(**config["model"]), linear)
        model.load_state_dict(weights, assign=True)
    except BROKEN as error:
        raise UserError("the checkpoint is damaged: its weights do not fit its config "
                        f"({type(error).__name__})") from None
    return model.to(device)


def load_run(path, device="cpu"):
    """(model, tokenizer, config) of a finished or stopped run, the model in evaluation mode. UserError if
    there is none."""
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    model, tokenizer = load_model(checkpoint, device).eval(), get_tokenizer(config["tokenizer"])
    wanted = padded_vocabulary(config["tokenizer"])
    if model.config.vocab_size != wanted:
        raise UserError(f"{path} has weights for a vocabulary of {model.config.vocab_size}, and its "
                        f"tokenizer {config['tokenizer']!r} wants {wanted}: not what it was trained with. "
                        "Name another run, or train it again")
    return model, tokenizer, config


########################################
#              Perplexity              #
########################################

@torch.no_grad()
def validate(model, split: Split, eval_tokens: int, batch_size: int, dtype: str, byte_lengths=None,
             progress=None) -> dict:
    """Mean loss over the first eval_tokens tokens of the validation shards, and what follows from it.

    The windows are shared out among the ranks, and the sums over them reduced, so that neither the batch size
    nor the number of ranks matters; the padding of the vocabulary is left out of the softmax. byte_lengths
    (n_vocab,) from data.token_bytes gives bits_per_byte; None leaves it out. Returns val_loss in nats per
    token, perplexity, bits_per_byte, val_tokens; None where not finite or not known.
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
            logits = model(x.to(device))
        logits[..., split.vocab_size:] = -math.inf
        nats += cross_entropy(logits.flatten(0, 1), y.to(device).flatten()).item() * y.numel()
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
#             The command              #
########################################

def task_names(text: str) -> list[str]:
    """For add_argument(type=...): names with commas between."""
    known, names = ["perplexity", *TASKS], text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no task; there is {','.join(known)}")
    return list(dict.fromkeys(names))


def open_val(directory: str, config: dict) -> Split:
    """The validation shards of a directory. UserError where another tokenizer made them than the run's."""
    _, val, made_with = open_data(directory, config["seq_len"])
    if made_with != config["tokenizer"]:
        raise UserError(f"{directory} was made with tokenizer {made_with!r} and the run was trained with "
                        f"{config['tokenizer']!r}. Make the data again: python data.py text FILE... "
                        f"--tokenizer {config['tokenizer']} --out DIR")
    return val


@cli.command
def main(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("run", help="directory of a run, e.g. out/nano-spectron-00, or its ckpt.pt")
    parser.add_argument("--tasks", type=task_names, default=["perplexity"],
                        help=f"perplexity,{','.join(TASKS)}, or some of them (perplexity)")
    parser.add_argument("--limit", type=cli.positive, help="only the first items of each task")
    parser.add_argument("--eval_dir", type=Path, default=Path("data/evals"),
                        help="directory of the tasks' official files (data/evals)")
    parser.add_argument("--data", help="directory of shards (the one it was trained on)")
    parser.add_argument("--eval_tokens", type=cli.positive, default=100_000_000,
                        help="validation tokens at most (100,000,000)")
    parser.add_argument("--batch_size", type=cli.positive, default=8,
                        help="sequences of the perplexity at a time: memory only (8)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="(the run's)")
    parser.add_argument("--device", choices=["cuda", "cpu", "mps"], help="(the first that is there)")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    parser.add_argument("--items", type=Path, help="also write a JSON line for each item to this file")
    args = parser.parse_args(argv)
    for path in (args.json, args.items):
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"{path} can not be written: " + ("it is a directory" if path.is_dir() else
                                                              f"there is no directory {path.parent}"))
    items = {name: TASKS[name](args.eval_dir)[:args.limit] for name in args.tasks if name in TASKS}
    device = join_ranks(choose_device(args.device))
    model, tokenizer, config = load_run(args.run, device)
    dtype, scores, records = args.dtype or config["dtype"], {}, []
    # what can be refused is refused before the first task begins (evaluate makes the rows on its clock)
    val = open_val(args.data or config["data"], config) if "perplexity" in args.tasks else None
    for some in items.values():
        trees(some, tokenizer, model.config.seq_len)
    for name in args.tasks:
        if name == "perplexity":
            scores |= validate(model, val, args.eval_tokens, args.batch_size, dtype, token_bytes(tokenizer),
                               cli.Progress(name, "tokens"))
        else:
            found, answered = evaluate(model, name, items[name], tokenizer, dtype,
                                       cli.Progress(name, "items"))
            scores, records = scores | found, records + answered
    if my_rank()[0] == 0:
        print("\n".join(f"{key}: {value}" for key, value in scores.items()))
        if args.json:
            args.json.write_text(json.dumps(scores, indent=1) + "\n")
        if args.items:
            args.items.write_text("".join(json.dumps(record) + "\n" for record in records))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
