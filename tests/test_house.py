"""The house: six files at the root, lib/ under them, and who may import whom."""

import ast
import subprocess
import sys

import pytest

from conftest import ROOT

FIVE = {"spectron", "model", "data", "eval", "train"}
ROOMS = {"lib", "tools", "baselines", "paper"}
BELOW_TRAIN = {"spectron", "model", "data", "eval", "lib", "tools"}
MAY_IMPORT = {"nano": set(), "spectron": set(), "model": set(), "lib": {"spectron", "model", "lib"},
              "data": {"lib"}, "eval": {"model", "data", "lib"}, "tools": BELOW_TRAIN, "train": BELOW_TRAIN,
              "baselines": BELOW_TRAIN | {"train", "baselines"},
              "paper": BELOW_TRAIN | {"train", "baselines", "paper"}}
LINES = {"spectron": 135, "model": 250, "data": 220, "eval": 270, "train": 370, "nano": 175}
# What is imported by its name, inside a function: a method of baselines/, and a module that torch would
# import later than the ranks can bear.
BY_NAME = {("lib/methods.py", "baseline"), ("lib/ranks.py", "join_ranks")}
FOR_LOCKS = {"fcntl", "msvcrt"}  # each on one kind of system


def files(*rooms):
    """{module: path} of the root ("") and of these rooms."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path
            for room in rooms for path in sorted((ROOT / room).glob("*.py"))}


def imported(nodes) -> set[str]:
    """Every module that these nodes import; of `from lib import norms` both lib and lib.norms."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import that is relative"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(path) -> set[str]:
    return imported(ast.walk(ast.parse(path.read_text("utf-8"))))


def room_of(module: str) -> str:
    return module.split(".")[0]


def test_six_files_stand_at_the_root():
    assert set(files("")) == FIVE | {"nano"}
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    tracked = {name for name in listed.stdout.split() if "/" not in name}
    assert not tracked or tracked == {f"{name}.py" for name in FIVE | {"nano"}}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_run_down_only(room):
    """spectron, model <- lib <- data <- eval <- tools <- train <- baselines, paper: no tool imports train."""
    of_room = {name: path for name, path in files("", *ROOMS).items() if room_of(name) == room}
    assert of_room
    for name, path in of_room.items():
        ours = {room_of(module) for module in imports(path)} & (FIVE | ROOMS | {"nano"})
        assert ours <= MAY_IMPORT[room], name


def test_no_module_imports_itself_by_way_of_others():
    paths = files("", *ROOMS)
    edges = {name: imports(path) & set(paths) for name, path in paths.items()}
    assert {"lib.cli", "model", "tools.plan"} <= edges["train"] and "lib.norms" in edges["train"]
    while edges:
        leaves = [name for name in edges if not edges[name] & set(edges)]
        assert leaves, f"a circle among {set(edges)}"
        for name in leaves:
            del edges[name]


def test_nano_imports_torch_and_numpy_alone():
    others = {room_of(module) for module in imports(ROOT / "nano.py")} - set(sys.stdlib_module_names)
    assert others == {"torch", "numpy"}


def test_the_root_and_lib_import_at_their_tops():
    """Two calls of import_module are on purpose, and the two modules that lock a file."""
    calls = set()
    for path in files("", "lib").values():
        tree, name = ast.parse(path.read_text("utf-8")), path.relative_to(ROOT).as_posix()
        top = {id(node) for node in tree.body}
        later = imported(node for node in ast.walk(tree) if id(node) not in top)
        assert later == (FOR_LOCKS if name == "lib/files.py" else set()), name
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            calls |= {(name, function.name) for node in ast.walk(function)
                      if getattr(node, "attr", getattr(node, "id", "")) in ("import_module", "__import__")}
    assert calls == BY_NAME


def test_the_files_at_the_root_stay_short():
    found = {name: len(path.read_text("utf-8").splitlines()) for name, path in files("").items()}
    assert all(found[name] <= most for name, most in LINES.items()), found
    assert sum(found[name] for name in FIVE) <= 1240, found


def test_lines_have_at_most_110_characters_and_the_model_has_no_autograd_of_its_own():
    for path in files("", "tests", *ROOMS).values():
        assert all(len(line) <= 110 for line in path.read_text("utf-8").splitlines()), path
    assert "autograd" not in (ROOT / "model.py").read_text("utf-8")


def test_a_file_of_lib_says_in_its_first_line_what_it_is_for():
    for name, path in files("lib").items():
        text = path.read_text("utf-8")
        if name != "lib.__init__":
            first = text.splitlines()[0]
            assert first.startswith('"""') and len(first.strip('"').split()) >= 4, path
            assert first.rstrip('"')[-1] in ".:,;" or first[-1].isalpha(), path
        else:
            assert not text
