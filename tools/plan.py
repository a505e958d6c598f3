"""What a run is and what it needs: printed when it starts, and by `python train.py ... --dry_run`."""

import math
import textwrap
from dataclasses import replace
from pathlib import Path

import data
from model import FactorizedLinear, count_parameters, split_parameters


def describe(c, model, flops: float, ranks: int) -> str:
    """Every setting, what the model has, how a step's tokens come together, and what the run costs. `model`
    may be on the meta device; flops are those of a token in the first step."""
    settings = ", ".join(f"{key} {value}" for key, value in vars(c).items() if key not in ("model", "out"))
    parameters, tokens = sum(p.numel() for p in model.parameters()), c.steps * c.tokens_per_step
    factors = sum(p.numel() for pair in model.factor_pairs() for p in pair)
    lines = [f"settings: {settings}",
             f"model: {parameters:,} parameters, {factors:,} of them in factors "
             f"({count_parameters(replace(model.config, rank_ratio=None)):,} if all were dense)",
             f"batch: {c.batch_size} sequences x {c.seq_len} tokens x {ranks} rank(s) x "
             f"{c.micro_steps} micro-step(s) = {c.tokens_per_step:,} tokens a step",
             f"tokens: {c.steps:,} steps, {tokens:,} tokens, "
             f"{math.ceil(tokens / data.SHARD_TOKENS)} shard(s) of 100M{epochs(c, tokens)}",
             f"FLOPs: {round(flops):,} a token in the first step, {flops * tokens:.3e} at that rate in all "
             f"(the paper's 6 N D: {6 * parameters * tokens:.3e})",
             "memory per device: " + memory(c, model)]
    return "\n".join(textwrap.fill(line, 118, subsequent_indent="  ", break_on_hyphens=False)
                     for line in lines)


def epochs(c, tokens: int) -> str:
    """How often the text is seen, where it is here."""
    if not Path(c.data).is_dir():
        return ""
    split = data.open_split(c.data, "train", c.seq_len, c.tokenizer)
    return f", {tokens / (split.windows * c.seq_len):.2f} epochs of {c.data}"


def memory(c, model) -> str:
    """Bytes on one device. Weights, gradients and optimizer state are exact for the core methods; activations
    are an estimate."""
    pairs, dense, others = split_parameters(model)
    matrices = sum(p.numel() for p in [*dense, *(p for pair in pairs for p in pair)])
    total = matrices + sum(p.numel() for p in others)
    width, D = 2 if c.dtype == "bfloat16" else 4, c.model["dim"]
    ranks = sum(layer.rank for layer in model.modules() if isinstance(layer, FactorizedLinear))
    per_token = (c.model["n_layers"] * (16 * D  # the residuals, in fp32
                                        + width * (7 * D + 4 * model.config.hidden))
                 + width * ranks + (width + 4) * c.model["vocab_size"])  # logits, and in fp32 for the loss
    parts = {"weights": 4 * total, "gradients": 4 * total,
             "optimizer": (4 if c.method in ("spectron", "dense") else 8) * matrices + 8 * (total - matrices),
             "activations, about": per_token * c.batch_size * c.seq_len}
    return (", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
            + f"; {sum(parts.values()) / 1e9:.1f} GB")
