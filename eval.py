"""Scores of a run: perplexity and bits per byte on the validation shards.

    python eval.py out/run [--data DIR] [--eval_tokens N] [--json FILE]
"""

import json
import math
import pickle
from pathlib import Path

import torch
import torch.distributed as dist

import cli
from cli import UserError
from data import Split, get_tokenizer, open_data, token_bytes
from model import Llama, LlamaConfig
from settings import choose_device


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
        missing = ({"model", "optimizers", "step", "seconds"} - checkpoint.keys()
                   | {"model", "method", "tokenizer", "data", "seq_len"} - checkpoint["config"].keys())
        if missing:
            raise KeyError(missing)
    except BROKEN as error:
        raise UserError(f"{path} is damaged, or not a checkpoint of train.py "
                        f"({type(error).__name__})") from None
    return checkpoint


def load_model(checkpoint: dict, device) -> Llama:
    """The model of a checkpoint, with the checkpoint's tensors as its own. UserError where its weights do not
    fit its config."""
    try:
        with torch.device("meta"):  # weights that are loaded need not be drawn
            model = Llama(LlamaConfig(**checkpoint["config"]["model"]))
        model.load_state_dict(checkpoint["model"], assign=True)
    except BROKEN as error:
        raise UserError("the checkpoint is damaged: its weights do not fit its config "
                        f"({type(error).__name__})") from None
    return model.to(device)


def load_run(path, device="cpu"):
    """(model, tokenizer, config) of a finished or stopped run, the model in evaluation mode. UserError if
    there is none."""
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    return load_model(checkpoint, device).eval(), get_tokenizer(config["tokenizer"]), config


def precision(device, dtype: str):
    """Autocast to bfloat16 over fp32 weights, or nothing where dtype is float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


@torch.no_grad()
def validate(model, split: Split, eval_tokens: int, batch_size: int, dtype: str, byte_lengths=None) -> dict:
    """Mean loss over the first eval_tokens tokens of the validation shards, and what follows from it.

    The windows are shared out among the ranks, and the sums over them reduced, so that neither the batch size
    nor the number of ranks matters. byte_lengths (n_vocab,) from data.token_bytes gives bits_per_byte; None
    leaves it out. Returns val_loss in nats per token, perplexity, bits_per_byte, val_tokens; None where not
    finite or not known.
    """
    device = next(model.parameters()).device
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    windows = max(1, min(split.windows, eval_tokens // split.seq_len))
    mine = range(rank, windows, ranks)
    nats, size = 0.0, 0
    for start in range(0, len(mine), batch_size):
        x, y = split.read(mine[start:start + batch_size])
        if byte_lengths is not None:
            size += int(byte_lengths[y.numpy()].sum())
        with precision(device, dtype):
            nats += model(x.to(device), y.to(device)).item() * y.numel()
    if ranks > 1:
        sums = torch.tensor([nats, size], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        nats, size = sums.tolist()
    tokens = windows * split.seq_len
    loss = nats / tokens
    known = math.isfinite(loss)
    return {"val_loss": loss if known else None,
            "perplexity": math.exp(loss) if known and loss < 700 else None,
            "bits_per_byte": nats / math.log(2) / size if known and size else None, "val_tokens": tokens}


@cli.command
def main(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("run", help="directory of a run, e.g. out/nano-spectron-00, or its ckpt.pt")
    parser.add_argument("--data", help="directory of shards (the one it was trained on)")
    parser.add_argument("--eval_tokens", type=cli.positive, default=100_000_000,
                        help="validation tokens at most (100,000,000)")
    parser.add_argument("--batch_size", type=cli.positive, default=8, help="memory only (8)")
    parser.add_argument("--device", choices=["cuda", "cpu", "mps"], help="(the first that is there)")
    parser.add_argument("--json", help="also write the scores to this file")
    args = parser.parse_args(argv)
    model, tokenizer, config = load_run(args.run, choose_device(args.device))
    directory = args.data or config["data"]
    _, val, made_with = open_data(directory, config["seq_len"])
    if made_with != config["tokenizer"]:
        raise UserError(f"{directory} was made with tokenizer {made_with!r} and the run was trained with "
                        f"{config['tokenizer']!r}. Make the data again: python data.py text FILE... "
                        f"--tokenizer {config['tokenizer']} --out DIR")
    scores = validate(model, val, args.eval_tokens, args.batch_size, config["dtype"], token_bytes(tokenizer))
    print("\n".join(f"{key}: {value}" for key, value in scores.items()))
    if args.json:
        Path(args.json).write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
