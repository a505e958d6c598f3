"""What a run is and what it needs: printed when it starts, and by `python train.py ... --dry_run`."""

import math
import textwrap
from dataclasses import replace
from pathlib import Path

import torch

import data
from lib import flags
from lib.methods import Method, baseline, block_matrices, count_parameters
from model import NANO_SIZES, FactorizedLinear, Llama

STATE = {"spectron": 4, "dense": 4, "adamw": 8, "dense-adamw": 8}  # bytes for each weight of a block's matrix


def describe(c, model, method: Method, topics: dict, ranks: int) -> str:
    """Every setting, what the model has, how a step's tokens come together, and what the run costs. `model`
    may be on the meta device; topics are the groups of flags."""
    flops = method.flops_per_token(model)
    parameters, tokens = sum(p.numel() for p in model.parameters()), c.steps * c.tokens_per_step
    factors, needs = sum(p.numel() for pair in model.factor_pairs() for p in pair), memory(c, model)
    lines = [*flags.settings(c, topics, method), *tuned_rates(c, method),
             f"model: {parameters:,} parameters, {factors:,} of them in factors "
             f"({count_parameters(replace(model.config, rank_ratio=None)):,} if all were dense)",
             f"batch: {c.batch_size} sequences x {c.seq_len} tokens x {ranks} rank(s) x "
             f"{c.micro_steps} micro-step(s) = {c.tokens_per_step:,} tokens a step",
             f"tokens: {c.steps:,} steps, {tokens:,} tokens, "
             f"{math.ceil(tokens / data.SHARD_TOKENS)} shard(s) of 100M{epochs(c, tokens)}",
             f"FLOPs: {round(flops):,} a token in the first step, {flops * tokens:.3e} at that rate in all "
             f"(the paper's 6 N D: {6 * parameters * tokens:.3e})",
             "memory per device: " + ", ".join(f"{name} {bytes_in_words(x)}" for name, x in needs.items())
             + f"; together {sum(needs.values()) / 1e9:.1f} GB"]
    alike = {}
    for name, sizes in block_memory(c, model).items():
        alike.setdefault(sizes, []).append(name.rpartition(".")[2])
    lines += ["each matrix of a block, in MB of weights + gradients + optimizer state: " + "; ".join(
        f"{', '.join(names)} " + " + ".join(f"{x / 1e6:.3g}" for x in sizes)
        for sizes, names in alike.items())]
    return "\n".join(textwrap.fill(line, 118, subsequent_indent="  ", break_on_hyphens=False)
                     for line in lines)


def tuned_rates(c, method: Method) -> list[str]:
    """A sentence on each learning rate that is a default, but not that of the method without other flags."""
    tuned = method.tuned_for(c)
    own, rates = method.learning_rates(c.size), method.learning_rates(c.size, tuned)
    taken = [name for name, rate in rates.items() if getattr(c, name) == rate != own[name]]
    if not taken:
        return []
    values = " and ".join(f"{name} {rates[name]:g}" for name in taken)
    why = f"the best at nano for {tuned.name} (results/{tuned.table})"
    if c.size not in NANO_SIZES:
        ratios = " and ".join(f"{rates[name] / own[name]:.3g}" for name in taken)
        why = f"{ratios} times that of {c.method}, untested at this size; such a ratio was {why}"
    verb = "override" if len(taken) > 1 else "overrides"
    return [f"{values}: {why}; {' and '.join(f'--{name}' for name in taken)} {verb}"]


def epochs(c, tokens: int) -> str:
    """How often the text is seen, where it is here."""
    if not Path(c.data).is_dir():
        return ""
    split = data.open_split(c.data, "train", c.seq_len, c.tokenizer)
    return f", {tokens / (split.windows * c.seq_len):.2f} epochs of {c.data}"


def memory(c, model) -> dict[str, int]:
    """Bytes on one device: weights, gradients and optimizer state, exactly but for the vectors u of Spectron,
    1% of its state at nano and less above. Activations are an estimate: what eager autograd keeps of a block,
    the logits, and under autocast the bfloat16 copies of the weights."""
    m, matrices = model.config, block_matrices(model)
    in_blocks = {id(p) for layer in matrices.values() for p in layer.parameters()}
    others = sum(p.numel() for p in model.parameters() if id(p) not in in_blocks)
    sums = [m.n_layers * sum(sizes) for sizes in zip(*block_memory(c, model).values())]
    width = 2 if c.dtype == "bfloat16" else 4
    ranks = sum(layer.rank for layer in matrices.values() if isinstance(layer, FactorizedLinear))
    blocks = m.n_layers * (16 * m.dim + width * (10 * m.dim + 4 * m.ffn_dim)) + width * ranks  # per token
    logits = m.vocab_size * (width if c.compile else 12)  # eager, the loss holds them in fp32 three times
    copies = 2 * sum(p.numel() for p in model.parameters()) * (width == 2)
    return {"weights": sums[0] + 4 * others, "gradients": sums[1] + 4 * others,
            "optimizer": sums[2] + 8 * others,
            "activations, about": c.batch_size * m.seq_len * (blocks + logits) + copies}


def block_memory(c, model) -> dict[str, tuple[int, int, int]]:
    """Bytes of weights, gradients and optimizer state of each matrix of the first block. What a method of
    baselines/ keeps comes out of a step of its own optimizers on one block."""
    state = {}
    if c.method not in STATE:
        method = baseline(c.method, c.method_args)
        with torch.random.fork_rng(devices=[]):
            model = Llama(replace(model.config, n_layers=1, vocab_size=1), method.linear)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
        for optimizer in method.optimizers(model, c):
            optimizer.step()
            state |= {id(p): sum(map(size, kept.values())) for p, kept in optimizer.state.items()}
    found = {}
    for name, layer in block_matrices(model).items():
        if name.startswith("blocks.0."):
            weights = [*layer.parameters(), *layer.buffers()]
            found[name.removeprefix("blocks.0.")] = (
                sum(map(size, weights)), sum(size(p) for p in layer.parameters()),
                sum(state.get(id(p), STATE.get(c.method, 0) * p.numel()) for p in layer.parameters()))
    return found


def bytes_in_words(x: float) -> str:
    return f"{x / 1e9:.2f} GB" if x > 1e8 else f"{x / 1e6:.2f} MB"


def size(x) -> int:
    return x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0
