"""What each method found beside its perplexity: eighteen metrics of its checkpoints.

    python -m paper.geometry              tables and figures in results/geometry, from the values there
    python -m paper.geometry --measure    train and measure first what is missing: hours

Our reconstruction of the sixteen metrics of "Beyond Perplexity" (arXiv 2605.13652); README_METRIC.md of
github.com/NamrataRShivagunde/low-rank-geometry has its authors' own scripts. W is multiplied out: a direction
or a path means the same for every method. CoLA, whose layers are not linear, has activations only. The runs
are those of the comparison, at each method's best learning rate, with numbered checkpoints.
"""

from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from data import open_split
from lib.checkpoints import load_checkpoint, load_model
from lib.cli import Parser, UserError, command
from lib.methods import block_matrices
from lib.ranks import choose_device
from model import Llama
from paper import draw, logs, runs
from paper.methods import METHODS
from paper.experiments import SAID, outcome
from paper.output import markdown, read_json, save, write, write_json
from paper.runs import OUT, RESULTS, Run

WHERE = RESULTS / "geometry"
METHODS_HERE = ("dense-adamw", "dense", "spectron", "equilibrated", "adamw", "self-guided", "galore", "fira",
             "sltrain", "relora", "sct", "tsvd", "cola")
FULL = "dense-adamw"  # what activations are compared with: the same optimizer as most other methods have
STEPS, KEPT, SEEDS = 200, 50, 3
SCALE = replace(runs.scale_of("nano", steps=STEPS), name="geometry", flags=("--keep_every", str(KEPT)))
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
IN_TABLE_ONLY = "W_gap", "dW_norm"


def offsets(reach: float, half: int = 6) -> list[float]:
    return [reach * i / half for i in range(-half, half + 1)]


def random_direction(weights: list[Tensor], seed: int, normalised: bool = False) -> list[Tensor]:
    """Standard normal, of one size per entry; normalised: of each tensor's own norm."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(w.shape, generator=generator).to(w.device) for w in weights]
    return [d * w.norm() / d.norm() for d, w in zip(drawn, weights)] if normalised else drawn


def principal_directions(weights: list[Tensor], count: int) -> list[list[Tensor]]:
    """The kth has sigma_k u_k v_k^T of each matrix, and zero for the gains of the norms."""
    parts = [torch.linalg.svd(w, full_matrices=False) if w.ndim == 2 else None for w in weights]
    return [[part[1][k] * torch.outer(part[0][:, k], part[2][k]) if part and k < len(part[1]) else
             torch.zeros_like(w) for w, part in zip(weights, parts)] for k in range(count)]


def line(loss, weights: list[Tensor], direction: list[Tensor], offsets) -> list[float]:
    """loss(weights + x direction) for each offset x."""
    return [loss([w + x * d for w, d in zip(weights, direction)]) for x in offsets]


def sharpness(losses) -> float:
    """How much higher the loss is on both sides than in the middle, on average over the offsets."""
    L, c = np.asarray(losses), len(losses) // 2
    return float(np.mean([(L[c + d] + L[c - d]) / 2 - L[c] for d in range(1, c + 1)]))


def barrier(loss, start: list[Tensor], end: list[Tensor], points: int = 11) -> float:
    """How far the loss on the way from start to end rises above the straight line between its ends; the
    authors take the mean of the ends, which counts a slope as a barrier."""
    losses = line(loss, start, [b - a for a, b in zip(start, end)], [i / (points - 1) for i in range(points)])
    return float((np.asarray(losses) - np.linspace(losses[0], losses[-1], points))[1:-1].max())


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of the singular values as shares."""
    p = s[s > 1e-12] / s[s > 1e-12].sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def stable_rank(s: Tensor) -> float:
    return float(s.square().sum() / s.max().square()) if s.max() > 0 else 0.0


def gap(s: Tensor) -> float:
    return float((s[0] - s[1]) / s[0]) if s[0] > 0 else 0.0


def cka(X: Tensor, Y: Tensor) -> float:
    """Linear centred kernel alignment of X (tokens, D) and Y (tokens, E): 1 up to rotation and scale."""
    X, Y = X.double() - X.double().mean(0), Y.double() - Y.double().mean(0)
    return float((Y.T @ X).norm() ** 2 / ((X.T @ X).norm() * (Y.T @ Y).norm()))


def distance(X: Tensor, Y: Tensor) -> float:
    """The mean length of the difference of two activations of a token."""
    return float((X - Y).norm(dim=-1).mean())


def relative_distance(X: Tensor, Y: Tensor) -> float:
    """That, over the mean length of X's."""
    return distance(X, Y) / float(X.norm(dim=-1).mean())


def cosine(X: Tensor, Y: Tensor) -> float:
    return float(F.cosine_similarity(X, Y, dim=-1).mean())


def lr_of(method: str) -> float:
    return outcome(method, runs.scale_of("nano")).lr


def checkpoint(method: str, seed: int, step: int) -> dict:
    return load_checkpoint(OUT / SCALE.name / Run(method, lr_of(method), seed).name / f"ckpt-{step:06}.pt")


def materialised(model) -> dict[str, Tensor] | None:
    """Those of the dense Llama that computes the same function, in float32; None where there is none."""
    try:
        found = {f"{name}.weight": layer.product() if hasattr(layer, "product") else layer.weight
                 for name, layer in block_matrices(model).items()}
    except UserError:  # CoLA
        return None
    with torch.device("meta"):
        twin = Llama(replace(model.config, rank_ratio=None))
    names = {name for name, _ in twin.named_parameters()}
    found |= {name: p for name, p in model.named_parameters() if name in names and name not in found}
    return {name: found[name].detach().float() for name in sorted(names)}


class Loss:
    """Mean loss of a dense Llama with given weights on fixed validation tokens. c: the settings of a run."""

    def __init__(self, config, c: dict):
        self.split, device = open_split(c["data"], "val", config.seq_len, c["tokenizer"]), choose_device()
        self.x, self.y = (t.to(device) for t in self.split.read(range(min(WINDOWS, self.split.windows))))
        self.model = Llama(replace(config, rank_ratio=None)).to(device)
        self.names = sorted(name for name, _ in self.model.named_parameters())

    @torch.no_grad()
    def __call__(self, weights: list[Tensor]) -> float:
        logits = functional_call(self.model, dict(zip(self.names, weights)), (self.x,))
        return F.cross_entropy(logits[..., :self.split.vocab_size].flatten(0, 1).float(),
                               self.y.flatten()).item()


def measure(method: str, seed: int, step: int) -> dict:
    """Every metric of one checkpoint; where there is no W, those of activations."""
    saved, device = checkpoint(method, seed, step), choose_device()
    model, full = (load_model(c, device).eval() for c in (saved, checkpoint(FULL, seed, step)))
    loss = Loss(model.config, saved["config"])
    found = {"method": method, "seed": seed, "step": step} | compared(model, full, loss.x)
    here = materialised(model)
    if here is None:
        return found
    weights = list(here.values())
    found |= {"loss": loss(weights)} | landscape(loss, weights)
    found["dense_barrier"] = barrier(loss, weights, list(materialised(full).values()))
    before = materialised(load_model(checkpoint(method, seed, step - KEPT), device)) if step > KEPT else None
    if before:
        found["consecutive_barrier"] = barrier(loss, list(before.values()), weights)
    return found | spectra(here, before)


@torch.no_grad()
def compared(model, full, x) -> dict:
    """The activations after the embedding and after each block beside the dense model's, and on average."""
    def activations(model) -> list[Tensor]:  # (tokens, D) each
        found = []
        hooks = [module.register_forward_hook(lambda _, __, out: found.append(out.flatten(0, 1).float()))
                 for module in (model.embedding, *model.blocks)]
        model(x)
        for hook in hooks:
            hook.remove()
        return found
    pairs = list(zip(activations(full), activations(model)))
    by_layer = {metric.__name__: [metric(X, Y) for X, Y in pairs]
                for metric in (distance, relative_distance, cosine, cka)}
    return {name: float(np.mean(values)) for name, values in by_layer.items()} | {"by_layer": by_layer}


def landscape(loss, weights: list[Tensor]) -> dict:
    """The same directions for every method, by their seeds; the reach is the authors'."""
    raw, normalised = (
        [line(loss, weights, random_direction(weights, seed, per_tensor), offsets(reach))
         for seed in range(DIRECTIONS)] for per_tensor, reach in ((False, 0.003), (True, 0.06)))
    principal = [line(loss, weights, direction, offsets(0.05))
                 for direction in principal_directions(weights, TOP)]
    return {"random_sharpness": sharpness(np.mean(raw, 0)),
            "normalised_sharpness": sharpness(np.mean(normalised, 0)),
            "random_variance": float(np.var(raw, axis=0).mean()),
            "pca1_sharpness": sharpness(principal[0]), "pcak_sharpness": sharpness(np.mean(principal, 0)),
            "random_curve": list(np.mean(raw, 0)), "pca1_curve": list(principal[0])}


def spectra(here: dict, before: dict | None) -> dict:
    """Means over the matrices of the blocks."""
    def means(matrices, prefix):
        values = [torch.linalg.svdvals(W) for W in matrices]
        return {f"{prefix}_{metric.__name__}": float(np.mean([metric(s) for s in values]))
                for metric in (effective_rank, stable_rank, gap)}
    names = [name for name, w in here.items() if name.startswith("blocks.") and w.ndim == 2]
    found = means([here[name] for name in names], "W")
    if before:
        updates = [here[name] - before[name] for name in names]
        norm, old = (sum(float(w.square().sum()) for w in group) ** 0.5
                     for group in (updates, [before[name] for name in names]))
        found |= means(updates, "dW") | {"dW_norm": norm, "dW_relative_norm": norm / old}
    return found


def basins() -> dict:
    """The barrier between each two methods after the last step of seed 0."""
    models = {method: load_model(checkpoint(method, 0, STEPS), choose_device()) for method in METHODS_HERE}
    weights = {method: list(found.values()) for method, model in models.items()
               if (found := materialised(model))}
    loss = Loss(models[FULL].config, checkpoint(FULL, 0, STEPS)["config"])
    return {f"{a} {b}": barrier(loss, weights[a], weights[b]) for a, b in combinations(weights, 2)}


def make() -> None:
    wanted = [Run(method, lr_of(method), seed) for seed in range(SEEDS) for method in METHODS_HERE]
    runs.make_all(wanted, SCALE)
    for run in wanted:
        if run.name not in logs.read(WHERE / "values.jsonl"):
            found = [measure(run.method, run.seed, step) for step in range(KEPT, STEPS + 1, KEPT)]
            logs.add(WHERE / "values.jsonl", run.name, found)
            print(run.name, flush=True)
    if not (WHERE / "basins.json").is_file():
        write_json(WHERE / "basins.json", basins())


def cell(seeds: list, key: str) -> str:
    """Mean and standard deviation over the seeds, at the last checkpoint."""
    last = [seed[-1][key] for seed in seeds if key in seed[-1]]
    if not last:
        return "no W"
    return f"{np.mean(last):.3g}" + (f" ± {np.std(last, ddof=1):.2g}" if len(last) > 1 else "")


def barriers() -> str:
    between = read_json(WHERE / "basins.json")
    methods = [method for method in METHODS_HERE if any(method in pair.split() for pair in between)]
    return markdown(["", *(METHODS[method].label for method in methods)], [
        [METHODS[a].label, *("" if a == b else f"{between.get(f'{a} {b}', between.get(f'{b} {a}')):.2f}"
                          for b in methods)] for a in methods])


def figure(found: dict, dimension: str):
    """A row for each method and a panel for each metric: mean and standard deviation over the seeds at the
    last checkpoint, and the means before it."""
    keys = {label: key for label, key in DIMENSIONS[dimension].items() if key not in IN_TABLE_ONLY}
    found = {method: seeds for method, seeds in found.items() if set(keys.values()) & set(seeds[0][-1])}
    fig, axes = draw.panels(len(keys), 2.4 * len(keys) + 1.6, 1.3 + 0.24 * len(found), sharey=True)
    for ax, (label, key) in zip(axes, keys.items()):
        for row, (method, seeds) in enumerate(found.items()):
            values = np.array([[c[key] for c in seed if key in c] for seed in seeds])
            kind, spread = draw.family(method), values[:, -1].std(ddof=1) if len(seeds) > 1 else 0
            ax.plot(values.mean(0)[:-1], [row] * (values.shape[1] - 1), ".", color="0.6", ms=4)
            ax.errorbar(values[:, -1].mean(), row, xerr=spread, fmt="o", ms=6, capsize=3, label=kind,
                        color=draw.FAMILIES[kind])
        ax.set_xlabel(label, fontsize=10)
        ax.locator_params(axis="x", nbins=3)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes[0].set(yticks=range(len(found)), yticklabels=[METHODS[method].label for method in found],
                ylim=(len(found) - 0.5, -0.5))
    return fig


def report() -> None:
    found = {method: [] for method in METHODS_HERE}  # method -> a list of seeds, each a list of checkpoints
    for seed in logs.read(WHERE / "values.jsonl").values():
        found[seed[0]["method"]].append(seed)
    parts = ["# Eighteen metrics beside perplexity\n\nOur reconstruction of the sixteen of arXiv 2605.13652, "
             f"after {STEPS} steps, mean ± standard deviation over the seeds. `python -m paper.geometry`\n"]
    for name, keys in DIMENSIONS.items():
        rows = [[METHODS[method].label, *(cell(seeds, key) for key in keys.values())]
                for method, seeds in found.items()]
        parts += [f"## {name.capitalize()}\n", markdown(["", *keys], rows), f"![{name}]({name}.png)\n"]
        save(figure(found, name), WHERE / f"{name}.png", SAID[name]["message"], f"nano, {STEPS} steps, each "
             "method at its best learning rate (ReLoRA at 0.002, an older schedule); mean and standard "
             f"deviation of {SEEDS} seeds after the last step, grey: earlier, each {KEPT} steps")
    parts += ["## Barriers between methods, seed 0\n", barriers()]
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
