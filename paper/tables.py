"""The tables of paper.reproduce, from the logs that are there, and the page of each experiment."""

import math
import statistics
from pathlib import Path

from lib.cli import UserError
from paper import draw, runs
from paper.experiments import EXPERIMENTS, SAID, gap, methods_and_scale, outcomes_of
from paper.output import markdown, save, write
from paper.runs import RESULTS, Run, Scale

TASKS, EVALS = ("hellaswag", "piqa", "arc_easy"), Path("data/evals")


def table(name: str, found) -> str:
    """Every method at its best learning rate, beside the paper, as Markdown."""
    least, paper = min(o.mean for o in found), [o.paper for o in found if o.paper]
    tasks = [task for task in TASKS if any(f"{task}_acc_norm" in o.scores for o in found)]
    costs = EXPERIMENTS[name].memory
    head = ["", "lr", f"validation loss ± standard deviation ({draw.unit(found)})", "n", "perplexity",
            "over the best", "lr within 5%", "steps", "FLOPs", *tasks,
            *(["parameters", "state (MB)", "training memory (MB)", "s / step"] if costs else []),
            *(["the paper's perplexity", "its loss over its best"] if paper else [])]
    rows = []
    for o in found:
        at_edge = len(o.grid) > 1 and o.lr in (min(o.grid), max(o.grid))
        lr = f"{o.lr:g}" + " (the edge of its grid)" * at_edge if o.lr else ""
        row = [o.label, lr, str(o), str(len(o.losses)), f"{math.exp(o.mean):.2f}",
               over(o.mean, least), o.width, str(o.logs[0].config["steps"] if o.logs else ""),
               f"{o.flops:.2e}" if o.flops else "",
               *(f"{o.scores[key]:.2%}" if (key := f"{task}_acc_norm") in o.scores else "" for task in tasks)]
        if costs and o.logs:
            row += [f"{o.memory['parameters']:,}", f"{o.memory['optimizer'] / 1e6:.1f}",
                    f"{o.memory['all'] / 1e6:.1f}", f"{o.seconds:.2f}" if o.seconds else ""]
        if paper:
            theirs = o.paper or math.inf
            row += [f"{theirs:.2f}", over(math.log(theirs), math.log(min(paper)))]
        rows.append(row)
    return markdown(head, rows)


def differences(name: str, found) -> str:
    """How much higher the loss of the second method of each pair is than that of the first."""
    pairs = EXPERIMENTS[name].pairs
    rows = [[f"{b.label} − {a.label}", *gap_cells(a, b)] for a, b in (pairs(found) if pairs else [])]
    return markdown(["difference", "nats", "95% interval", "seeds"], rows) if rows else ""


def gap_cells(a, b) -> list[str]:
    difference, interval, seeds = gap(a, b)
    return ["" if difference is None else f"{difference:+.3f}",
            "" if interval is None else f"± {interval:.3f}", str(seeds)]


def norms(found) -> str:
    """Medians over the logged steps of seed 0, the last one left out, whose lr is nearly zero."""
    rows = []
    for o in (o for o in found if o.logs):
        def values(key):
            return [x for _, x in o.logs[0].points(key)[:-1]]
        rows.append([o.label, f"{o.lr:g}", f"{statistics.median(values('dW')):.3g}",
                     f"{max(values('gauge')):.2f}", f"{statistics.median(values('dy')):.3g}",
                     f"{o.logs[0].points('W')[-1][1]:.3g}"])
    head = ["", "lr", "median ‖dW‖₂", "largest ‖dW‖₂ / lr", "median rms of dy", "last ‖W‖₂"]
    return markdown(head, rows)


def step_ratios(found, scale: Scale) -> str:
    """Figure 2's ratio of the two steps of W."""
    low, dense = found
    rows = {f"each at its best lr ({low.lr:g}, {dense.lr:g})": draw.ratios(low.logs[0], dense.logs[0])}
    rows |= {f"both at {lr:g}": points for lr, points in draw.step_ratios(found, scale).items()}
    return markdown(["‖dW‖₂, low-rank over dense", "median", "largest", "the paper"], [
        [label, f"{statistics.median(values):.1f}", f"{max(values):.1f}", "10 to 30"]
        for label, points in rows.items() for values in [[ratio for _, ratio in points]]])


def all_tables(name: str, found, scale: Scale) -> str:
    parts = [table(name, found)]
    if name in ("fig2", "fig3"):
        parts.append(norms(found))
    if name == "fig2" and all(o.logs for o in found):
        parts.append(step_ratios(found, scale))
    return "\n".join(filter(None, [*parts, differences(name, found)]))


def over(loss: float, best: float) -> str:
    return "" if math.isinf(loss) else f"{loss / best - 1:+.1%}"


def setting(scale: Scale, found) -> str:
    steps, seeds = f"{scale.steps:,}" if scale.steps else "the paper's", max(len(o.by_seed) for o in found)
    return (f"Size {scale.size}, {steps} steps of {scale.tokens_per_step:,} tokens of {scale.data}; "
            + ("seed 0" if seeds < 2 else f"up to {seeds} seeds at each method's best learning rate"))


def words(name: str, scale: Scale) -> dict:
    """Title, message and note of an experiment at a scale. The message of nano may not hold at another."""
    own = SAID.get(f"{name}/{scale.name}", {})
    return {"note": ""} | SAID[name] | ({} if scale.name == "nano" else {"message": ""}) | own


def prepare(name: str, scale: Scale, dry: bool = False) -> None:
    """Make every run that an experiment needs and that is missing; dry: only say how many."""
    methods, own = methods_and_scale(name, scale)
    print(f"{name}: {runs.estimate(methods, own)}", flush=True)
    if dry:
        return
    scored = EXPERIMENTS[name].tasks and not scale.nano
    if scored and not EVALS.is_dir():
        raise UserError(f"{name} scores HellaSwag, PIQA and ARC-Easy, and {EVALS} is not there: "
                        "python -m tools.download evals")
    runs.sweep(methods, own)
    for o in outcomes_of(name, scale) if scored else []:
        if o.lr:
            runs.score(Run(o.method, o.lr), scale, TASKS)


def report(name: str, scale: Scale) -> None:
    """table.md and figure.png of an experiment whose runs are there."""
    where, e, found = RESULTS / name / scale.name, EXPERIMENTS[name], outcomes_of(name, scale)
    said = words(name, scale)
    every = "\n".join(f"- {o.label}: " + ", ".join(
        f"{lr:g}: {'diverged' if loss is None else f'{loss:.3f}'}" for lr, loss in o.grid.items())
        for o in found)
    write(where / "table.md", f"# {said['title']}\n\n{setting(scale, found)}. "
          f"`{runs.reproduce(name, scale)}`\n\n{all_tables(name, found, scale)}\n{said['note']}\n\n"
          f"Every learning rate (seed 0):\n\n{every}\n\n"
          "![figure](figure.png)\n")
    lost = [o.label for o in found if not o.logs]
    if lost and e.figure not in (draw.curves_and_gaps, draw.loss_over_lr, draw.loss_over_adam_lr):
        return print(f"{where}/table.md; no figure: no loss of {', '.join(lost)}")
    save(e.figure(found, scale), where / "figure.png", said.get("message") or said["title"],
         setting(scale, found))
    print(f"{where}/table.md, figure.png", flush=True)
