"""Seconds of a step of every method, timed in turn in one process: what equal wall-clock means in the tables.

    python -m paper.seconds                nano on this machine, to results/seconds/nano.json; minutes
    python -m paper.seconds --scale S      S on a GPU
"""

from statistics import median

from lib.cli import Parser, command
from model import SIZES
from paper import runs
from paper.arms import ARMS
from paper.experiments import EXPERIMENTS
from paper.bench import Trainer, in_turn
from paper.output import write_json
from tools import machine

ROUNDS = 9


def timed(scale: runs.Scale) -> list[str]:
    """One arm for each way to train that a table compares; above nano, where all would not fit into memory,
    the two of equal wall-clock."""
    names = {name for e in EXPERIMENTS.values() if e.memory for name in e.arms} | {"self-guided-muon"}
    return [name for name in ARMS if name in (names if scale.nano else ("spectron", "dense"))
            and ARMS[name].steps == "same"]


def measure(scale: runs.Scale) -> dict[str, float]:
    """Of random tokens. What a method does between steps (cuts, merges) is not among them."""
    trainers = {name: Trainer(" ".join(runs.flags_of(ARMS[name], scale)), random=True)
                for name in timed(scale)}
    seconds = in_turn({name: trainer.step for name, trainer in trainers.items()}, ROUNDS)
    return {name: float(f"{median(times):.4g}") for name, times in seconds.items()}


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--scale", default="nano", choices=list(SIZES), metavar="SIZE", help="(nano)")
    scale = runs.scale_of(parser.parse_args(argv).scale)
    path = runs.RESULTS / "seconds" / f"{scale.size}.json"
    found = {"command": f"python -m paper.seconds --scale {scale.size}", **machine.provenance(),
             "tokens_per_step": scale.tokens_per_step, "seconds": measure(scale)}
    write_json(path, found)
    print(f"{path}: " + ", ".join(f"{name} {x:g}" for name, x in found["seconds"].items()))


if __name__ == "__main__":
    main()
