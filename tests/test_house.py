"""The house: five files at the root, and who may import whom."""

import ast
import subprocess

import pytest

from conftest import ROOT

FIVE = {"spectron", "model", "data", "eval", "train"}
ROOMS = {"tools", "baselines", "paper"}
MAY_IMPORT = {"spectron": set(), "model": set(), "data": set(), "eval": {"model", "data"},
              "train": {"spectron", "model", "data", "eval"}}


def imports(path) -> tuple[set, set]:
    """(modules of ours that the file imports when it is loaded, those that it imports inside functions)."""
    tree, ours = ast.parse(path.read_text("utf-8")), FIVE | ROOMS
    top, all_of_them = set(), set()
    for nodes, found in (tree.body, top), (ast.walk(tree), all_of_them):
        for node in nodes:
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return top & ours, (all_of_them - top) & ours


def test_five_files_stand_at_the_root():
    assert {path.stem for path in ROOT.glob("*.py")} == FIVE
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    tracked = listed.stdout.split()
    assert not tracked or {name for name in tracked if "/" not in name} == {f"{name}.py" for name in FIVE}


@pytest.mark.parametrize("name", sorted(FIVE))
def test_the_arrows_of_the_five_hold(name):
    """train.py alone reaches into a room, when it is needed and never when it is loaded."""
    top, later = imports(ROOT / f"{name}.py")
    assert top <= MAY_IMPORT[name] and later <= ({"tools"} if name == "train" else set())


def test_no_room_is_imported_by_another_that_it_imports():
    """baselines/ imports the five and, as Fira does of GaLore, its own; tools/ too; paper/ the five and
    tools/."""
    for room, allowed in (("baselines", FIVE | {"baselines"}), ("tools", FIVE | {"tools"}),
                          ("paper", FIVE | {"tools", "paper"})):
        for path in (ROOT / room).glob("*.py"):
            top, later = imports(path)
            assert top | later <= allowed, path


def test_modules_of_a_room_do_not_import_each_other_in_a_circle():
    for room in "tools", "paper", "baselines":
        edges = {}
        for path in (ROOT / room).glob("*.py"):
            tree = ast.parse(path.read_text("utf-8"))
            edges[path.stem] = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom)
                                and node.module == room for alias in node.names}
            edges[path.stem] |= {node.module.split(".")[1] for node in tree.body if isinstance(
                node, ast.ImportFrom) and (node.module or "").startswith(f"{room}.")}
        while edges:
            leaves = [name for name in edges if not edges[name] & set(edges)]
            assert leaves, f"a circle among {set(edges)}"
            for name in leaves:
                del edges[name]


def test_lines_have_at_most_110_characters_and_the_model_has_no_autograd_of_its_own():
    rooms = [ROOT, *(ROOT / room for room in ("tools", "baselines", "paper", "tests"))]
    for path in (path for room in rooms for path in room.glob("*.py")):
        assert all(len(line) <= 110 for line in path.read_text("utf-8").splitlines()), path
    assert "autograd" not in (ROOT / "model.py").read_text("utf-8")


def test_what_train_reaches_for_when_it_runs_does_not_import_train():
    """Else sample -> bench -> train -> sample would be a circle again."""
    for name in "plan", "report", "machine", "prepare", "sample", "plot":
        assert "train" not in set.union(*imports(ROOT / "tools" / f"{name}.py")), name
