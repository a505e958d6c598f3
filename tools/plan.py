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
    factors, needs = sum(p.numel() for pair in model.factor_pairs() for p in pair), memory(c, model)
    lines = [f"settings: {settings}",
             f"model: {parameters:,} parameters, {factors:,} of them in factors "
             f"({count_parameters(replace(model.config, rank_ratio=None)):,} if all were dense)",
             f"batch: {c.batch_size} sequences x {c.seq_len} tokens x {ranks} rank(s) x "
             f"{c.micro_steps} micro-step(s) = {c.tokens_per_step:,} tokens a step",
             f"tokens: {c.steps:,} steps, {tokens:,} tokens, "
             f"{math.ceil(tokens / data.SHARD_TOKENS)} shard(s) of 100M{epochs(c, tokens)}",
             f"FLOPs: {round(flops):,} a token in the first step, {flops * tokens:.3e} at that rate in all "
             f"(the paper's 6 N D: {6 * parameters * tokens:.3e})",
             "memory per device: " + ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needs.items())
             + f"; together {sum(needs.values()) / 1e9:.1f} GB"]
    return "\n".join(textwrap.fill(line, 118, subsequent_indent="  ", break_on_hyphens=False)
                     for line in lines)


def epochs(c, tokens: int) -> str:
    """How often the text is seen, where it is here."""
    if not Path(c.data).is_dir():
        return ""
    split = data.open_split(c.data, "train", c.seq_len, c.tokenizer)
    return f", {tokens / (split.windows * c.seq_len):.2f} epochs of {c.data}"


def memory(c, model) -> dict[str, int]:
    """Bytes on one device. Weights, gradients and optimizer state are exact for the methods of train.py.
    Activations are an estimate: what eager autograd keeps of a block, the logits, and under autocast the
    bfloat16 copies of the weights."""
    pairs, dense, others = split_parameters(model)
    matrices = sum(p.numel() for p in [*dense, *(p for pair in pairs for p in pair)])
    total, m = matrices + sum(p.numel() for p in others), model.config
    width = 2 if c.dtype == "bfloat16" else 4
    ranks = sum(layer.rank for layer in model.modules() if isinstance(layer, FactorizedLinear))
    blocks = m.n_layers * (16 * m.dim + width * (10 * m.dim + 4 * m.hidden)) + width * ranks  # per token
    logits = m.vocab_size * (width if c.compile else 12)  # eager, the loss holds them in fp32 three times
    return {"weights": 4 * total, "gradients": 4 * total,
            "optimizer": (4 if c.method in ("spectron", "dense") else 8) * matrices + 8 * (total - matrices),
            "activations, about": c.batch_size * m.seq_len * (blocks + logits) + 2 * total * (width == 2)}
