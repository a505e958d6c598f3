"""The default learning rates are the best of the committed logs, for every method and flag that was swept."""

import pytest

import train
from conftest import ROOT, TINY
from paper import experiments, runs
from paper.methods import ADAM_LRS, METHODS
from tools import plot

NANO = runs.scale_of("nano")
# Commands of train.py that were swept at the scale of the tables
PLAIN = [name for name, method in METHODS.items()
         if method.swept and method.steps == "same"
         and not (method.size or method.budget or "--momentum" in method.flags)]
TIE = 0.005  # nats: a seed makes 0.01
CORNERS = {"Muon on the factors": ["--no-renormalize"], "SGD": ["--no-orthogonalize", "--no-renormalize"],
           "direction": ["--no-orthogonalize"], "rank": ["--rank_ratio", "0.4"],
           "ffn": ["--factorize", "ffn"]}


def defaults(*flags):
    return train.resolve(train.parse([*flags, "--device", "cpu"]))


@pytest.fixture(autouse=True)
def committed_logs(monkeypatch):
    """They are read once for all of these tests, where they are."""
    monkeypatch.chdir(ROOT)


def own_flags(name: str) -> list[str]:
    """Those of a method, without its --adam_lr."""
    words = METHODS[name].flags.split()
    while "--adam_lr" in words:
        at = words.index("--adam_lr")
        del words[at:at + 2]
    return words


@pytest.mark.parametrize("name", PLAIN)
def test_lr_is_the_best_of_the_logs(name):
    assert defaults(*own_flags(name)).lr == experiments.outcome(name, NANO).lr


@pytest.mark.parametrize("name", dict.fromkeys(name for name, *_ in ADAM_LRS))
def test_adam_lr_is_the_best_of_the_logs_up_to_a_tie(name):
    losses = {adam_lr: experiments.outcome(method, NANO).grid.get(lr)
              for base, lr, adam_lr, method in ADAM_LRS if base == name}
    assert len(losses) >= 5 and None not in losses.values()
    c = defaults(*own_flags(name))
    assert losses[c.adam_lr] <= min(losses.values()) + TIE
    if name not in ("equilibrated", "galore"):  # those two tie with 1e-2
        assert c.adam_lr == min(losses, key=losses.get)


def test_what_the_corners_and_the_two_other_flags_get():
    found = {name: (c.lr, c.adam_lr) for name, flags in CORNERS.items() for c in [defaults(*flags)]}
    assert found == {"Muon on the factors": (0.05, 0.01), "SGD": (1.0, 0.003), "direction": (0.2, 0.003),
                     "rank": (0.1, 0.003), "ffn": (0.1, 0.003)}
    c = defaults("--method", "equilibrated", "--no-renormalize")
    assert (c.lr, c.adam_lr) == (0.05, 0.003)  # as its table was made


def test_at_the_papers_sizes_the_ratio_to_spectron_is_that_of_nano():
    for flags in CORNERS.values():
        small, spectron, large = defaults(*flags), defaults(), defaults("--size", "S", *flags)
        assert large.lr / 0.05 == pytest.approx(small.lr / spectron.lr)
        assert large.adam_lr / 0.003 == pytest.approx(small.adam_lr / spectron.adam_lr)
    for name, lr in ("spectron", 0.05), ("adamw", 1e-3), ("dense", 0.02), ("dense-adamw", 6e-4):
        c = defaults("--size", "S", "--method", name)
        assert (c.lr, c.adam_lr) == (lr, 3e-3)


def said(capsys, *flags) -> str:
    train.main([*flags, "--device", "cpu", "--dry_run"])
    return " ".join(capsys.readouterr().out.split())


def test_a_run_says_which_default_it_took_and_why(capsys):
    assert ("lr 0.05 and adam_lr 0.01: the best at nano for Muon on the factors (results/table2); --lr and "
            "--adam_lr override") in said(capsys, "--no-renormalize")
    assert ("lr 0.1: the best at nano for a rank ratio of 0.4 (results/table3); --lr overrides"
            in said(capsys, "--rank_ratio", "0.4"))
    assert "adam_lr 0.01: the best" in said(capsys, "--no-renormalize", "--lr", "0.2")
    assert ("lr 0.0125 and adam_lr 0.01: 0.25 and 3.33 times that of spectron, untested at this size; such a "
            "ratio was the best at nano for Muon on the factors (results/table2); --lr and --adam_lr override"
            ) in said(capsys, "--no-renormalize", "--size", "S")
    for flags in ([], ["--no-orthogonalize"], ["--rank_ratio", "0.4", "--lr", "0.2"], ["--method", "adamw"]):
        assert "at nano for" not in said(capsys, *flags)


def test_the_tables_that_are_named_are_there():
    methods = [*train.METHODS, *(path.stem for path in (ROOT / "baselines").glob("*.py"))]
    found = [tuned.table for name in methods for tuned in train.find_method(name, {}).tuned]
    assert len(found) >= 6 and all((ROOT / f"results/{table}/nano/table.md").is_file() for table in found)


def test_help_has_the_defaults_of_every_corner(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    for flags in CORNERS.values():
        small, large = defaults(*flags), defaults("--size", "S", *flags)
        if small.lr != defaults().lr:
            assert f"{' '.join(flags)}: {small.lr:g}, {large.lr:g}\n" in text
    assert "0.003; of Muon on the factors 0.01; at nano 0.03 where" in " ".join(text.split())


def test_a_run_that_goes_on_keeps_what_it_had(run):
    """Also one that was begun when the defaults were others."""
    out = run("--steps", 4, "--stop_at", 2, "--no-renormalize", "--lr", 0.2, "--adam_lr", 0.003)
    train.main(["--resume", "--out", str(out)])
    header, rows = plot.read_log(out)
    assert rows[-1]["step"] == 4 and (header["config"]["lr"], header["config"]["adam_lr"]) == (0.2, 0.003)
    given = train.parse([*TINY, "--resume", "--out", str(out)])
    c = train.resolve(given, saved=header["config"])
    assert (c.lr, c.adam_lr) == (0.2, 0.003)


def test_no_command_of_an_arm_has_changed_its_meaning():
    """What a method's command gives is what its logs were made with."""
    checked = 0
    for name, method in METHODS.items():
        lr = experiments.outcome(name, NANO).lr
        if method.size or method.steps != "same" or method.budget or not lr:
            continue
        kept = runs.log_of(runs.Run(name, lr), NANO).config
        c = defaults(*runs.flags_of(method, NANO), "--lr", str(lr))
        keys = "lr", "adam_lr", "muon_lr", "momentum", "orthogonalize", "renormalize", "factorize"
        assert {key: getattr(c, key) for key in keys} == {key: kept[key] for key in keys}, name
        checked += 1
    assert checked > 80
