"""The methods that tables and figures compare, each with its flags, its label and its learning rates."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Method:
    """A row of a table: how it is trained, and the learning rate around which its grid lies."""
    label: str
    flags: str = ""
    lr: float = 0.1  # at nano; above, one place lower in the series
    steps: str = "same"  # or "flops", "time": as many as cost what `twin` costs
    twin: str = ""
    size: str = ""  # where it is not that of the scale
    swept: bool = True  # over learning rates; otherwise it has this one
    budget: float = 0.0  # executed FLOPs, which then decide the steps


METHODS = {
    "spectron": Method("Spectron"),
    "orthogonalize": Method("Muon on the factors", "--no-renormalize --adam_lr 0.01", 0.02),
    "renormalize": Method("renormalization only", "--no-orthogonalize", 0.05),
    "neither": Method("neither (SGD)", "--no-orthogonalize --no-renormalize", 1.0),
    "adamw": Method("AdamW", "--method adamw", 1e-3),
    "self-guided": Method("self-guided, AdamW", "--method self-guided", 1e-3),
    "self-guided-muon": Method("self-guided, Muon", "--method self-guided --method_args optimizer=muon",
                               0.02),
    "dense": Method("dense, Muon", "--method dense", 0.02),
    "dense-adamw": Method("dense, AdamW", "--method dense-adamw", 1e-3),
    "equilibrated": Method("equilibrated Spectron", "--method equilibrated"),
    "equilibrated-2": Method("equilibrated Spectron, twice", "--method equilibrated --method_args times=2"),
    "equilibrated-muon": Method("equilibrated Muon on the factors", "--method equilibrated --no-renormalize",
                             0.02),
    "lora-muon": Method("LoRA-Muon", "--method lora-muon"),
    "self-guided-muon-flops": Method("self-guided, Muon, equal FLOPs", "--method self-guided "
                                  "--method_args optimizer=muon", 0.02, "flops", "spectron"),
    "galore": Method("GaLore", "--method galore", 1e-2),
    "fira": Method("Fira", "--method fira", 1e-2),
    "sltrain": Method("SLTrain", "--method sltrain", 2e-3),
    "relora": Method("ReLoRA", "--method relora", 2e-3),
    "sct": Method("SCT", "--method sct", 1e-3),
    "tsvd": Method("TSVD-style", "--method tsvd", 1e-3),
    "cola": Method("CoLA", "--method cola", 2e-3),
    "rank-0.125": Method("Spectron, rank ratio 0.125", "--rank_ratio 0.125"),
    "rank-0.4": Method("Spectron, rank ratio 0.4", "--rank_ratio 0.4"),
    "spectron-ffn": Method("Spectron", "--factorize ffn"),
    "adamw-ffn": Method("AdamW", "--method adamw --factorize ffn", 1e-3),
    "self-guided-ffn": Method("self-guided, AdamW", "--method self-guided --factorize ffn", 1e-3),
    "dense-flops": Method("dense, equal FLOPs", "--method dense", 0.02, "flops", "spectron"),
    "dense-time": Method("dense, equal wall-clock", "--method dense", 0.02, "time", "spectron"),
}


def add(base: str, name: str, label: str = "", flags: str = "", **more) -> str:
    """A method like another, with more flags and more in its label; returns its name."""
    method = METHODS[base]
    METHODS[name] = replace(method, label=", ".join(filter(None, [method.label, label])),
                         flags=f"{method.flags} {flags}".strip(), **more)
    return name


LADDERS = {"nano": ["nano-0.6M", "nano-1.5M", "nano", "nano-7.3M"], "paper": ["134M", "500M", "780M"]}
for size in [size for ladder in LADDERS.values() for size in ladder if size != "nano"]:
    METHODS[f"spectron@{size}"] = Method(f"Spectron {size}", size=size)
    METHODS[f"dense@{size}"] = Method(f"dense {size}", "--method dense", 0.02, "flops", f"spectron@{size}",
                                      size)

SHAPES = [*((width, 0.25) for width in (32, 64, 128, 256)), (128, 0.125), (128, 0.5)]  # width, rank ratio
SHAPED = {method: [add(method, f"{method}@nano-2x{width}@{ratio:g}", f"2x{width}, rank {ratio:g}",
                       f"--rank_ratio {ratio:g}", size=f"nano-2x{width}") for width, ratio in SHAPES]
          for method in ("spectron", "orthogonalize", "lora-muon", "adamw")}
# Settings in which the factors' norms may part
PARTING = {
    short: [add(method, f"{method}-{short}", label, flags, swept=False)
            for method in ("spectron", "orthogonalize")] for short, label, flags in (
    ("decay", "factors decayed 2% a step", "--method varied --method_args decay=0.02"),
    ("thin", "rank ratio 1/16", "--rank_ratio 0.0625"),
    ("unbalanced", "attention from 8 A and B / 8", "--method varied --method_args c=8"))}

WITH_ADAM = "cola", "sltrain", "relora", "galore", "fira", "sct", "tsvd"
DEARER = "dense", "dense-adamw", "galore", "fira", "sltrain", "relora", "self-guided"  # a token costs more
for name in DEARER[1:]:
    lr = {"fira": 2e-3, "sltrain": 5e-3}.get(name, METHODS[name].lr)  # the best of equal tokens
    add(name, f"{name}-flops", steps="flops", twin="spectron", lr=lr)

SETTINGS = [  # settings of the other methods, varied
    "sct",
    *(add("sct", f"sct-rank{r}", f"rank {r}", f"--rank_ratio {r / 256}", lr=5e-3) for r in (32, 16, 8)),
    *(add("sct", f"sct-s_lr={x}", f"s at {label} the lr", f"--method_args s_lr={x}", lr=5e-3)
      for x, label in (("0.1", "a tenth of"), ("10", "ten times"))),
    "galore", *(add("galore", f"galore-gap={x}", f"gap {x}", f"--method_args gap={x}") for x in (50, 10)),
    "relora", *(add("relora", f"relora-every={x}", label, f"--method_args every={x}")
                for x, label in ((200, "no restart"), (25, "seven restarts")))]


def vary(flag: str, short: str, methods: dict, swept: bool) -> list[tuple]:
    """(name, lr, value, name with this value) of all, from (lr, the value it has, values) by name."""
    return [(name, lr, value, name if value == own else add(
        name, f"{name}-{short}{value:g}", f"{flag} {value:g}", f"--{flag} {value:g}", lr=lr, swept=swept))
            for name, (lr, own, values) in methods.items() for value in values]


FIVE, TENFOLD = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
BETAS = (0.5, 0.7, 0.8, 0.9, 0.95)
ADAM_LRS = vary("adam_lr", "adam", {
    "spectron": (0.2, 3e-3, FIVE), "equilibrated": (0.2, 3e-3, FIVE), "orthogonalize": (0.05, 1e-2, FIVE),
    "lora-muon": (0.2, 3e-3, FIVE), "self-guided-muon": (0.02, 3e-2, FIVE), "dense": (0.05, 3e-3, FIVE),
    **{name: (lr, 3e-2, TENFOLD) for name, lr in (
        ("adamw", 1e-3), ("self-guided", 1e-3), ("dense-adamw", 1e-3), ("cola", 2e-3), ("sltrain", 5e-3),
        ("relora", 5e-3), ("galore", 1e-2), ("fira", 2e-3), ("sct", 5e-3), ("tsvd", 5e-3))}}, swept=False)
MOMENTA = vary("momentum", "momentum", {name: (0.1, 0.7, BETAS) for name in ("spectron", "equilibrated")},
               swept=True)
