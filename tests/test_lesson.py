"""docs/LESSON.md: its numbers are the logs', its quotations nano.py's, its outputs those of its commands."""

import re

import pytest
import torch

import train
from conftest import ROOT
from paper import lesson
from spectron import newton_schulz
from test_commands import blocks, commands_of

TEXT = (ROOT / "docs/LESSON.md").read_text("utf-8")
WORDS = " ".join(TEXT.split())
PROSE = re.sub(r"```.*?```|^    .*?$|\]\([^)]*\)|`[^`]*`", " ", TEXT, flags=re.S | re.M)
# Numbers that are chosen, not computed: rank ratios, steps and learning rates that the commands have, the
# polynomial, and names.
CHOSEN = set("""0 1 2 3 4 5 6 8 10 16 20 30 40 200 240 0.01 0.001 0.05 0.1 0.2 0.25 0.5 0.7 1.0 1.21 175 256
    3.4445 4.7750 2.0315 485 0.47 1.446 1.2024""".split())


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def sentences():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return lesson.sentences()


def test_every_computed_sentence_stands_in_the_lesson(sentences):
    missing = [sentence for sentence in sentences if sentence not in WORDS]
    assert not missing, "docs/LESSON.md has other numbers than the logs: " + "; ".join(missing)


def test_every_other_number_is_one_that_was_chosen(sentences):
    """So that no number stands in the text that nothing holds."""
    rest = " ".join(PROSE.split())
    for sentence in sentences:
        rest = rest.replace(" ".join(re.sub(r"`[^`]*`", " ", sentence).split()), " ")
    numbers = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?[%M]?", re.sub(r"\[[^\]]*\]", " ", rest))
    unheld = [number for number in numbers if number.rstrip(",") not in CHOSEN]
    assert not unheld, unheld


def test_derived_numbers_that_are_said_to_be_chosen():
    assert round(3.4445**5) == 485 and round(1.2024**2, 3) == 1.446
    assert f"{float(lesson.polynomial(torch.tensor(0.001, dtype=torch.float64))):.2f}" == "0.47"
    assert f"{float(lesson.polynomial(torch.tensor(1.0, dtype=torch.float64), 1)):.1f}" == "0.7"
    before = lesson.SPECTRUM / lesson.SPECTRUM.norm()
    after = newton_schulz(lesson.SPECTRUM.diag()).diagonal()
    assert torch.allclose(after, lesson.polynomial(before), atol=1e-6)  # the optimizer's own polynomial


def test_the_lines_it_quotes_are_nanos():
    nano = (ROOT / "nano.py").read_text("utf-8")
    code = {line.strip().split("  #")[0] for line in nano.splitlines()}
    quoted = [line.strip() for language, block in blocks(TEXT) if not language and not commands_of(block)
              for line in block.splitlines() if "ᵀ" not in line]
    assert len(quoted) > 5 and set(quoted) <= code, set(quoted) - code
    assert all(re.search(rf"(def|class) {name}\b", nano)
               for name in ("newton_schulz", "power_iteration", "Spectron", "LowRank"))


def test_it_is_short_and_has_six_chapters_with_a_picture_a_run_and_a_question():
    chapters = re.split(r"^## (?=\d)", TEXT, flags=re.M)[1:]
    assert len(chapters) == 6
    for chapter in chapters:
        for wanted in "![", "**Run**", "<details><summary><b>Question.</b>":
            assert wanted in chapter, (wanted, chapter[:40])
    assert len(TEXT.split()) <= 2185
    assert all(len(line) <= 150 for line in TEXT.splitlines())


def test_the_command_draws_every_picture_and_prints_the_sentences(monkeypatch, capsys):
    drawn = {}
    monkeypatch.setattr(lesson, "save", lambda fig, path, message, setting: drawn.update({path: fig}))
    lesson.main([])
    assert "44% of the parameters" in capsys.readouterr().out
    shown = re.findall(r"\]\((lesson/[\w-]+\.png)\)", TEXT)
    assert [str(path) for path in drawn] == [f"docs/{name}" for name in shown] and len(shown) == 6
    assert all((ROOT / path).stat().st_size < 80_000 for path in drawn)


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+\.\d+|\d+", text)]


def test_the_output_of_newton_schulz_is_what_it_shows(capsys):
    (code, shown), = [(block, then) for (kind, block), (_, then) in zip(blocks(TEXT), blocks(TEXT)[1:])
                      if kind == "python" and "newton_schulz(G, steps)" in block]
    exec(compile(code, "the lesson", "exec"), {})
    assert numbers(capsys.readouterr().out) == pytest.approx(numbers(shown), abs=0.002)


def test_the_sizes_that_it_shows_are_those_of_its_dry_runs(capsys):
    chapter = TEXT.split("## 1.")[1].split("## 2.")[0]
    commands = [command for language, block in blocks(chapter) for command in commands_of(block)]
    shown = next(block for language, block in blocks(chapter) if language == "text").splitlines()
    for command, line in zip(commands, shown, strict=True):
        train.main(command.split()[2:])
        assert line in capsys.readouterr().out


def test_the_output_of_bound_is_what_it_shows(capsys):
    shown = next(block for language, block in blocks(TEXT) if "exact polar factors" in block)
    lesson.main(["bound"])
    printed = capsys.readouterr().out
    assert re.sub(r"[\d.]+", "#", printed).split() == re.sub(r"[\d.]+", "#", shown).split()
    assert numbers(printed) == pytest.approx(numbers(shown), abs=0.02)


def test_watching_sigma_trains_as_train_py_does_and_sigma_comes_from_below(corpus, tmp_path, capsys):
    file = tmp_path / "sigma.json"
    lesson.sigma(3, file, "--size", "nano-0.6M", "--seq_len", "32", "--tokens_per_step", "256",
                 "--data", str(corpus))
    found = lesson.read_json(file)
    assert len(found["lowest"]) == len(found["median"]) == 3 and "versions" in found["made"]
    assert all(0.5 < low <= middle <= 1 + 1e-6 for low, middle in zip(found["lowest"], found["median"]))
    assert "step   3" in capsys.readouterr().out
    kept = lesson.read_json(ROOT / "docs/lesson/sigma.json")
    assert max(kept["median"]) <= 1 + 1e-6 and len(kept["median"]) == 100


def test_unlucky_pairs_reach_the_bound_and_no_more():
    found = lesson.gauges()
    assert 0.99 < found["exact polar factors"] <= 1
    assert 1.19 < found["five Newton-Schulz steps"] <= 1.21
    assert all(gauge <= 1.21 for _, gauge, _ in lesson.splits().values())
