"""What each method found beside its perplexity: sixteen metrics of its checkpoints.

    python -m paper.geometry              tables and figures in results/geometry, from the values there
    python -m paper.geometry --measure    train and measure first what is missing: hours

The runs are those of the comparison, at each method's best learning rate and with numbered checkpoints. W is
multiplied out for every method that has one; CoLA, whose layers are not linear, has activations only.
"""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

from data import open_split
from lib.cli import Parser, UserError, command
from lib.checkpoints import load_checkpoint, load_model
from lib.ranks import choose_device
from lib.methods import block_matrices
from model import Llama, LlamaConfig
from paper import draw, logs, metrics, runs
from paper.arms import ARMS
from paper.experiments import outcome
from paper.output import markdown, read_json, save, write, write_json
from paper.runs import OUT, RESULTS, Run

WHERE = RESULTS / "geometry"
ARMS_HERE = ("dense-adamw", "dense", "spectron", "equilibrated", "adamw", "self-guided", "galore", "fira",
             "sltrain", "relora", "sct", "tsvd", "cola")
FULL = "dense-adamw"  # what activations are compared with: the same optimizer as most of the rivals
STEPS, KEPT, SEEDS = 200, 50, 3
SCALE = replace(runs.scale_of("nano", steps=STEPS), name="geometry", seeds=SEEDS,
                flags=("--keep_every", str(KEPT)))
RANDOM, PRINCIPAL = metrics.grid(0.003, 6), metrics.grid(0.05, 6)  # offsets; the authors' reach
DIRECTIONS, TOP = 10, 10
WINDOWS = 8  # of validation, on which every loss and activation here is taken
DIMENSIONS = {
    "landscape": {"random sharpness": "random_sharpness", "random, per tensor's norm": "normalised_sharpness",
                  "random variance": "random_variance", "PCA-1 sharpness": "pca1_sharpness",
                  f"PCA-{TOP} sharpness": "pcak_sharpness"},
    "interpolation": {"barrier to the last checkpoint": "consecutive_barrier",
                      "barrier to dense": "dense_barrier"},
    "spectra": {"effective rank of W": "W_effective_rank", "stable rank of W": "W_stable_rank",
                "gap of W": "W_gap", "effective rank of dW": "dW_effective_rank",
                "stable rank of dW": "dW_stable_rank", "norm of dW": "dW_norm",
                "norm of dW over W's": "dW_relative_norm"},
    "activations": {"distance to dense": "distance", "relative": "relative_distance", "cosine": "cosine",
                    "CKA": "cka"}}
MESSAGES = {
    "landscape": "Orthogonalized updates end where the loss is flat along principal directions; ReLoRA's is "
                 "the sharpest along random ones",
    "interpolation": "Hardly a barrier between a method's checkpoints; one to dense training, lowest "
                     "for GaLore and Fira",
    "spectra": "Orthogonalized updates move W along many directions, those of AdamW along few",
    "activations": "GaLore and Fira compute most nearly what dense training with AdamW does"}


# ------------------------------------------- Weights of a method --------------------------------------------

def checkpoint(run: Run, step: int) -> dict:
    return load_checkpoint(OUT / SCALE.name / run.name / f"ckpt-{step:06}.pt")


def materialised(model) -> dict[str, torch.Tensor] | None:
    """The weights of the densely parametrized Llama that computes the same function, float32; None where
    there is none."""
    try:
        found = {f"{name}.weight": layer.product() if hasattr(layer, "product") else layer.weight
                 for name, layer in block_matrices(model).items()}
    except UserError:  # CoLA
        return None
    names = {name for name, _ in dense_twin(model).named_parameters()}
    found |= {name: p for name, p in model.named_parameters() if name in names and name not in found}
    return {name: found[name].detach().float() for name in sorted(names)}


def dense_twin(model) -> Llama:
    with torch.device("meta"):
        return Llama(replace(model.config, rank_ratio=None))


class Loss:
    """Mean loss of a dense Llama with given weights on fixed validation tokens."""

    def __init__(self, config: LlamaConfig, data: str, tokenizer: str):
        self.split, device = open_split(data, "val", config.seq_len, tokenizer), choose_device()
        self.x, self.y = (t.to(device) for t in self.split.read(range(min(WINDOWS, self.split.windows))))
        self.model = Llama(replace(config, rank_ratio=None)).to(device)
        self.names = sorted(name for name, _ in self.model.named_parameters())

    @torch.no_grad()
    def __call__(self, weights: list[torch.Tensor]) -> float:
        logits = functional_call(self.model, dict(zip(self.names, weights)), (self.x,))
        return F.cross_entropy(logits[..., :self.split.vocab_size].flatten(0, 1).float(),
                               self.y.flatten()).item()


@torch.no_grad()
def activations(model, x) -> list[torch.Tensor]:
    """(tokens, D) after the embedding and after each block."""
    found = []
    hooks = [module.register_forward_hook(lambda _, __, out: found.append(out.flatten(0, 1).float()))
             for module in (model.embedding, *model.blocks)]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


# ----------------------------------------------- Measurements -----------------------------------------------

def measure(run: Run, step: int) -> dict:
    """Every metric of one checkpoint; those over weights are left out where there is no W."""
    full = Run(FULL, lr_of(FULL), run.seed)
    device = choose_device()
    saved = {at: checkpoint(run, at) for at in (step - KEPT, step) if at > 0}
    config = saved[step]["config"]
    model = load_model(saved[step], device).eval()
    full_model = load_model(checkpoint(full, step), device).eval()
    loss = Loss(model.config, config["data"], config["tokenizer"])
    found = {"arm": run.arm, "seed": run.seed, "step": step} | compared(model, full_model, loss.x)
    here = materialised(model)
    if here is None:
        return found
    weights = list(here.values())
    found |= {"loss": loss(weights)} | landscape(loss, weights)
    found["dense_barrier"] = metrics.barrier(
        metrics.path(loss, weights, list(materialised(full_model).values())))
    before = materialised(load_model(saved[step - KEPT], device)) if step > KEPT else None
    if before:
        found["consecutive_barrier"] = metrics.barrier(metrics.path(loss, list(before.values()), weights))
    return found | spectra(here, before)


def landscape(loss, weights: list) -> dict:
    """The same directions for every method, by their seeds."""
    raw, normalised = ([metrics.line(loss, weights, metrics.random_direction(weights, seed, per_tensor),
                                     [20 * x for x in RANDOM] if per_tensor else RANDOM)
                        for seed in range(DIRECTIONS)] for per_tensor in (False, True))
    parts = metrics.svd_of(weights)
    principal = [metrics.line(loss, weights, metrics.principal_direction(weights, k, parts), PRINCIPAL)
                 for k in range(TOP)]
    return {"random_sharpness": metrics.sharpness(np.mean(raw, 0)),
            "normalised_sharpness": metrics.sharpness(np.mean(normalised, 0)),
            "random_variance": metrics.average_variance(raw),
            "pca1_sharpness": metrics.sharpness(principal[0]),
            "pcak_sharpness": metrics.sharpness(np.mean(principal, 0)),
            "random_curve": list(np.mean(raw, 0)), "pca1_curve": list(principal[0])}


def spectra(here: dict, before: dict | None) -> dict:
    """Means over the matrices of the blocks."""
    def means(matrices, prefix):
        values = [torch.linalg.svdvals(W) for W in matrices]
        return {f"{prefix}_{name}": float(np.mean([f(s) for s in values])) for name, f in (
            ("effective_rank", metrics.effective_rank), ("stable_rank", metrics.stable_rank),
            ("gap", metrics.spectral_gap))}
    names = [name for name, w in here.items() if name.startswith("blocks.") and w.ndim == 2]
    found = means([here[name] for name in names], "W")
    if before:
        updates = [here[name] - before[name] for name in names]
        norm, old = (sum(float(w.square().sum()) for w in group) ** 0.5
                     for group in (updates, [before[name] for name in names]))
        found |= means(updates, "dW") | {"dW_norm": norm, "dW_relative_norm": norm / old}
    return found


def compared(model, full_model, x) -> dict:
    """The activations beside the dense model's: over the layers, and on average."""
    pairs = list(zip(activations(full_model, x), activations(model, x)))
    by_layer = {name: [getattr(metrics, name)(X, Y) for X, Y in pairs]
                for name in ("distance", "relative_distance", "cosine", "cka")}
    return {name: float(np.mean(values)) for name, values in by_layer.items()} | {"by_layer": by_layer}


def lr_of(arm: str) -> float:
    """The best one of the comparison; where that was not made, the one its grid lies around."""
    return outcome(arm, runs.scale_of("nano", steps=STEPS)).lr or ARMS[arm].lr


def make() -> None:
    """Train and measure what is missing."""
    wanted = [Run(arm, lr_of(arm), seed) for seed in range(SEEDS) for arm in ARMS_HERE]
    runs.make_all(wanted, SCALE)
    for run in wanted:
        if run.name not in logs.read(WHERE / "values.jsonl"):
            found = [measure(run, step) for step in range(KEPT, STEPS + 1, KEPT)]
            logs.add(WHERE / "values.jsonl", run.name, found)
            print(run.name, flush=True)
    if not (WHERE / "basins.json").is_file():
        write_json(WHERE / "basins.json", basins())


def basins() -> dict:
    """The barrier between each two methods after the last step of seed 0."""
    models = {arm: load_model(checkpoint(Run(arm, lr_of(arm)), STEPS), choose_device()) for arm in ARMS_HERE}
    weights = {arm: list(found.values()) for arm, model in models.items() if (found := materialised(model))}
    config = checkpoint(Run(FULL, lr_of(FULL)), STEPS)["config"]
    loss = Loss(models[FULL].config, config["data"], config["tokenizer"])
    return {f"{a} {b}": metrics.barrier(metrics.path(loss, weights[a], weights[b]))
            for a, b in combinations(weights, 2)}


# -------------------------------------------- Tables and figures --------------------------------------------

def values() -> dict:
    """arm -> a list of seeds, each a list of checkpoints."""
    found = {arm: [] for arm in ARMS_HERE}
    for seed in logs.read(WHERE / "values.jsonl").values():
        found[seed[0]["arm"]].append(seed)
    return {arm: seeds for arm, seeds in found.items() if seeds}


def cell(seeds: list, key: str) -> str:
    """Mean and standard deviation over the seeds, at the last checkpoint."""
    last = [seed[-1][key] for seed in seeds if key in seed[-1]]
    if not last:
        return "no W"
    return f"{np.mean(last):.3g}" + (f" ± {np.std(last, ddof=1):.2g}" if len(last) > 1 else "")


def barriers(arms: list) -> str:
    """Each method against each."""
    between = read_json(WHERE / "basins.json")
    arms = [arm for arm in arms if any(arm in pair.split() for pair in between)]
    return markdown(["", *(ARMS[arm].label for arm in arms)], [
        [ARMS[a].label, *("" if a == b else f"{between.get(f'{a} {b}', between.get(f'{b} {a}')):.2f}"
                          for b in arms)] for a in arms])


def figure(found: dict, dimension: str):
    """Each metric of a dimension over the checkpoints, a line for each method."""
    keys = DIMENSIONS[dimension]
    rows = math.ceil(len(keys) / 4)
    columns = math.ceil(len(keys) / rows)
    fig = draw.new_figure(3.2 * columns, 1 + 2.8 * rows)
    axes = list(fig.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[len(keys):]:
        ax.remove()
    for ax, (label, key) in zip(axes, keys.items()):
        for arm, seeds in found.items():
            steps = [c["step"] for c in seeds[0] if key in c]
            ys = [[c[key] for c in seed if key in c] for seed in seeds]
            if steps:
                ax.plot(steps, np.mean(ys, 0), ms=4, lw=1.4, label=ARMS[arm].label, **draw.look(arm))
        ax.set(xlabel="step", ylabel=label)
    draw.legend_below(fig, *fig.axes, columns=2 * columns - 1)
    return fig


def report() -> None:
    found = values()
    if not found:
        raise UserError(f"{WHERE} has no values: python -m paper.geometry --measure")
    parts = ["# Sixteen metrics beside perplexity\n\nOur reconstruction of the sixteen of arXiv 2605.13652, "
             f"after {STEPS} steps, mean ± standard deviation over the seeds. `python -m paper.geometry`\n"]
    for name, keys in DIMENSIONS.items():
        rows = [[ARMS[arm].label, *(cell(seeds, key) for key in keys.values())]
                for arm, seeds in found.items()]
        parts += [f"## {name.capitalize()}\n", markdown(["", *keys], rows), f"![{name}]({name}.png)\n"]
        save(figure(found, name), WHERE / f"{name}.png", MESSAGES[name], f"nano, {STEPS} steps, each "
                  "method at its best learning rate, mean of the seeds")
    if (WHERE / "basins.json").is_file():
        parts += ["## Barriers between methods, seed 0\n", barriers(list(found))]
    write(WHERE / "table.md", "\n".join(parts))
    print(f"{WHERE}/table.md and a figure for each dimension")


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--measure", action="store_true", help="train and measure what is missing first")
    if parser.parse_args(argv).measure:
        make()
    report()


if __name__ == "__main__":
    main()
