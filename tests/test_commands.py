"""Every command and every Python snippet of README.md and docs/LESSON.md is run, in a copy of the repository.

A command that trains runs at its size for two short steps, above nano with --dry_run; all else runs as it
stands. RULES has what cannot. A command that neither covers fails.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from paper import runs
from tools import download

PAGES = "README.md", "docs/LESSON.md"
SHORT = ["--steps", "2", "--tokens_per_step", "256", "--seq_len", "32", "--eval_tokens", "64",
         "--final_eval_tokens", "64"]
STARTS = "python", "torchrun", "pip"


# ------------------------------------------ Finding the commands --------------------------------------------

def blocks(text: str) -> list[tuple[str, str]]:
    """(language, lines) of the fenced blocks, and ("", lines) of the indented ones, in their order."""
    found, lines, language = [], [], None
    for line in [*text.splitlines(), "end"]:
        indented = line.startswith("    ") or not line.strip()
        if language is None and not line.startswith("```") and (indented or not lines):
            lines += [line[4:]] if line.startswith("    ") else [""] if lines else []
        elif line.startswith("```") and language:
            found, lines, language = [*found, (language, "\n".join(lines))], [], None
        elif language:
            lines.append(line)
        else:
            found, lines = found + [("", "\n".join(lines).strip("\n"))] * bool(lines), []
            language = (line[3:].strip() or "text") if line.startswith("```") else None
    return found


def commands_of(block: str) -> list[str]:
    """Those that begin a line, without the words after two spaces or a #, and those in these words."""
    found = []
    for part in re.split(r"\n|\s{2,}|\s+#\s*", re.sub(r"\\\n\s*", "", block)):
        part = part.removeprefix("$ ")
        if part.split(" ")[0] not in STARTS:
            part = (re.search(r"\b(python (-m [\w.]+|[\w/]+\.py)|pip install) ?[^)]*", part) or [""])[0]
        found += [part] * bool(part)
    return found


def is_python(block: str) -> bool:
    try:
        compile(block, "a block", "exec")
    except SyntaxError:
        return False
    return re.search(r"^(import|from) ", block, re.M) is not None


def items(page: str) -> list[tuple[str, str]]:
    """("command", "snippet" or "diff", text), in the order of the page; then commands inside sentences."""
    text, found = (ROOT / page).read_text("utf-8"), []
    for language, block in blocks(text):
        if language == "diff":
            found.append(("diff", block))
        elif commands := commands_of(block) if language in ("", "sh", "bash", "console") else []:
            found += [("command", command) for command in commands]
        elif language == "python" or not language and is_python(block):
            found.append(("snippet", block))
    inline = re.findall(rf"`((?:{'|'.join(STARTS)}) [^`]+)`", text)
    return found + [("command", " ".join(words.split())) for words in inline]


FOUND = [(page, *item) for page in PAGES if (ROOT / page).is_file() for item in items(page)]
EDITED = [(page, edit, command) for (page, kind, edit), (_, next_kind, command) in zip(FOUND, FOUND[1:])
          if (kind, next_kind) == ("diff", "command")]
FIRST_PAGE = {text: page for page, kind, text in reversed(FOUND) if kind == "command"}
COMMANDS = [(page, text) for text, page in reversed(FIRST_PAGE.items())]
SNIPPETS = [(page, text) for page, kind, text in FOUND if kind == "snippet"]


def test_there_are_commands_and_none_stands_in_a_form_that_is_not_found():
    """Every line of a page that begins with python and a name, wherever it stands, is among them."""
    assert len(COMMANDS) > 10 and SNIPPETS and EDITED
    for page in PAGES:
        for line in (ROOT / page).read_text("utf-8").splitlines():
            if re.match(r"\s*(\$ )?(python3? (-m )?[\w.]+|torchrun|pip install)", line):
                assert any(line.strip().removeprefix("$ ").startswith(text) for _, text in COMMANDS), line


# ------------------------------------------- Running them ---------------------------------------------------

@pytest.fixture(scope="module")
def copy(corpus, tmp_path_factory):
    """The repository without its history, with the short corpus and one run."""
    home = tmp_path_factory.mktemp("copy") / "nanospectron"
    shutil.copytree(ROOT, home, ignore=shutil.ignore_patterns(".*", "data", "out", "__pycache__", "*.bin"))
    shutil.copytree(corpus, home / "data/stdlib")
    return home


@pytest.fixture
def at_home(copy, monkeypatch):
    monkeypatch.chdir(copy)
    monkeypatch.setattr(sys, "path", [*sys.path, str(copy)])  # for files that a page tells to write
    monkeypatch.setattr(runs, "make_all", lambda wanted, scale: [pytest.fail(f"{run} is in no committed log")
                        for run in wanted if not runs.log_of(run, scale)])
    return copy


def split(command: str) -> tuple[str, list[str]]:
    """(module, its arguments) of python FILE.py ..., python -m MODULE ... or torchrun --... FILE.py ..."""
    launcher, *words = shlex.split(command)
    while launcher == "torchrun" and words[0].startswith("-"):
        words.pop(0)
    if words[0] == "-m":
        return words[1], words[2:]
    assert words[0].endswith(".py"), f"no rule for: {command}"
    return words[0].removesuffix(".py").replace("/", "."), words[1:]


def call(module: str, argv: list[str]) -> None:
    """What python -m MODULE ARGV does, in this process. A command that failed has raised SystemExit."""
    try:
        importlib.import_module(module).main(argv)
    except SystemExit as end:
        assert not end.code, f"{module} {argv} ended with {end.code}"


def shortened(argv: list[str]) -> list[str]:
    """For train.py: two short steps, or above nano only what would be done."""
    sizes = [size for flag, size in zip(argv, argv[1:]) if flag == "--size"]
    if "--dry_run" in argv or sizes and not sizes[-1].startswith("nano"):
        return [*argv, *["--dry_run"] * ("--dry_run" not in argv)]
    return argv + SHORT


def train(argv, capsys):
    call("train", shortened(argv))


def sigma(argv, capsys):
    call("paper.lesson", argv + ["--steps", "1"] * ("sigma" in argv))


def nano(argv, capsys):
    """With its own last lines, and fewer and smaller steps."""
    source = (ROOT / "nano.py").read_text("utf-8")
    for old, new in ("ADAM_LR = 240, 16,", "ADAM_LR = 2, 2,"), ("count: int = 200", "count: int = 2"):
        assert old in source and not argv
        source = source.replace(old, new)
    exec(compile(source, "nano.py", "exec"), {"__name__": "__main__"})
    assert "step 2/2" in capsys.readouterr().out


def fails_with(module, argv, words, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(argv)
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message, message


def from_the_network(argv, capsys):
    """tests/test_download.py has a server. Here the address is one that refuses: the flags are read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download.time, "sleep", lambda seconds: None)
        nowhere = ["--out", "data/nothing", "--url", "http://127.0.0.1:9"]
        fails_with("tools.download", argv + nowhere, "gave up", capsys)


def evaluate(argv, capsys):
    """Where the tasks' files were not downloaded: the command that fetches them."""
    if "--tasks" in argv and not os.path.isdir("data/evals"):
        return fails_with("eval", argv, "python -m tools.download evals", capsys)
    call("eval", argv)


def prepare(argv, capsys):
    """FILE... stands for files of the user; gpt2's tokenizer comes from the network."""
    if "text" in argv:
        with open("some.txt", "w") as file:
            file.write("A line of a text that somebody has.\n" * 2000)
        argv = [{"FILE...": "some.txt", "gpt2": "bytes"}.get(word, word) for word in argv]
    call("tools.prepare", argv)


def reproduce(argv, capsys):
    """From the committed logs: at_home fails a command that would train. Above nano, what it would do."""
    large = [x for flag, x in zip(argv, argv[1:]) if flag == "--scale" and not x.startswith("nano")]
    call("paper.reproduce", argv + ["--dry_run"] * bool(large or "all" in argv))


def flags_only(module):
    def check(argv, capsys):
        call(module, ["--help"])
        assert all(word.split("=")[0] in capsys.readouterr().out for word in argv if word.startswith("-"))
    return check


RULES = {"train": train, "nano": nano, "paper.lesson": sigma, "tools.download": from_the_network,
         "eval": evaluate, "tools.prepare": prepare, "paper.reproduce": reproduce,
         "paper.bench": flags_only("paper.bench")}  # minutes
AS_IT_STANDS = {"tools.sample", "tools.plot", "tools.export"}
BY_THE_GATE = "pip install ", "python -m pytest"  # .ci/run types these, word for word


def supply(argv: list[str], home) -> None:
    """Runs and data that a page takes for granted: copies of the one that is there."""
    given = {flag: value for flag, value in zip(argv, argv[1:])}
    first = home / "out/nano-spectron-00"
    if not first.is_dir():
        call("train", ["--out", str(first), *SHORT, "--stop_at", "1"])  # one that can go on
    made = {given.get(flag) for flag in ("-o", "--to", "--out")[:2 if "--resume" in argv else 3]}
    for word in argv:
        if word.startswith("out/") and word not in made and not (home / word).exists():
            shutil.copytree(first, home / word)
    if given.get("--data") and not (home / given["--data"]).exists():
        shutil.copytree(home / "data/stdlib", home / given["--data"])


@pytest.mark.parametrize("page, command", COMMANDS, ids=[text[:60] for _, text in COMMANDS])
def test_a_command_of_a_page_runs(page, command, at_home, capsys):
    if command.startswith(BY_THE_GATE):
        start = next(start for start in BY_THE_GATE if command.startswith(start))
        assert start.strip() in (ROOT / ".ci/run").read_text("utf-8")
        return
    module, argv = split(command)
    assert module in RULES or module in AS_IT_STANDS, f"{page}: no rule for {command}"
    if module == "tools.export":
        pytest.importorskip("safetensors")
    for _, text in SNIPPETS:  # a page's own files, whose method this may be
        write_file(text, at_home)
    supply(argv, at_home)
    RULES.get(module, lambda argv, capsys: call(module, argv))(argv, capsys)


def write_file(snippet: str, home) -> bool:
    """A snippet whose first line is the comment of a path is that file."""
    named = re.match(r"# ([\w/]+\.py)\n", snippet)
    if named:
        (home / named[1]).write_text(snippet + "\n", "utf-8")
    return bool(named)


@pytest.mark.parametrize("page, snippet", SNIPPETS, ids=[page for page, _ in SNIPPETS])
def test_a_snippet_of_a_page_runs(page, snippet, at_home):
    if not write_file(snippet, at_home):
        exec(compile(snippet, page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page, edit, command", EDITED, ids=[command for *_, command in EDITED])
def test_an_edit_that_a_page_proposes_changes_one_line_and_its_command_runs(page, edit, command, at_home):
    old, new = ("\n".join(line[1:] for line in edit.splitlines() if line.startswith(sign)) for sign in "-+")
    places = [path for path in sorted(at_home.glob("*.py")) if path.read_text("utf-8").count(old) == 1]
    assert len(places) == 1, f"{page}: not in exactly one file: {old}"
    text = places[0].read_text("utf-8")
    try:
        places[0].write_text(text.replace(old, new), "utf-8")
        module, argv = split(command)
        assert module == "train"
        ran = subprocess.run([sys.executable, "train.py", *shortened(argv), "--stop_at", "1"],  # no sample
                             capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert re.search(r"^step +1/2 ", ran.stdout, re.M)
    finally:
        places[0].write_text(text, "utf-8")
