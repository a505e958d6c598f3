"""A figure leaves a session's matplotlib as it was: backend, settings, MPLBACKEND, figures."""

import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from conftest import ROOT
from tools import plot


@pytest.fixture
def log(tmp_path):
    """A directory with the log of a short run."""
    rows = [{"config": {"method": "spectron", "tokenizer": "bytes"}}]
    rows += [{"step": i, "loss": 5 / i, "val_loss": 5 / i} for i in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_figures_and_settings_of_a_session_are_its_own(log, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    import matplotlib
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    with matplotlib.rc_context():
        pyplot.style.use("dark_background")
        matplotlib.rcParams.update({"font.size": 23, "axes.spines.top": True, "savefig.dpi": 30,
                                    "lines.linewidth": 9, "interactive": True})
        mine = pyplot.figure()
        mine.add_subplot().plot([1, 2])
        before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
        plot.figure([log], log / "a.png")
        fig = plot.draw([log, log], "step", "val_loss")
        assert dict(matplotlib.rcParams) == before and matplotlib.get_backend() == backend
        assert os.environ["MPLBACKEND"] == "module://matplotlib_inline.backend_inline"
        assert pyplot.get_fignums() == [mine.number] and pyplot.gcf() is mine
        assert fig.axes[0].xaxis.label.get_size() == 11 and fig.get_facecolor() == (1, 1, 1, 1)
        pyplot.close(mine)
    plain = log / "b.png"
    plot.figure([log], plain)  # whatever was set, the picture is the same
    assert plain.read_bytes() == (log / "a.png").read_bytes()


def test_a_figure_after_an_error_leaves_the_settings_too(log, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    monkeypatch.setattr(plot, "add_legend", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plot.figure([log], log / "a.png")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("named", ["no such backend", "svg"])
def test_the_first_import_of_matplotlib_leaves_the_backend_to_the_session(log, named):
    """pyplot will use what it would have used, and one that is not known here does no harm."""
    code = f"""
import os, sys
from tools import plot
plot.figure([{str(log)!r}], {str(log / "fig.png")!r})
import matplotlib
print(os.environ.get("MPLBACKEND"), "matplotlib.pyplot" in sys.modules,
      dict.get(matplotlib.rcParams, "backend") == {named!r})"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "MPLBACKEND": named})
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{named} False {named == 'svg'}\n"
    assert (log / "fig.png").stat().st_size > 1000


@pytest.mark.parametrize("kernel", [True, False])
def test_in_a_notebook_the_picture_is_shown_and_in_a_terminal_it_is_not(log, monkeypatch, kernel):
    shown, shell = [], SimpleNamespace(**{"kernel": 1} if kernel else {})
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython, ipython.version_info = lambda: shell, (9, 0)  # matplotlib asks for it
    display.Image, display.display = lambda filename: filename, shown.append
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    for name in "fig.png", "fig.svg":
        plot.figure([log], log / name)
    assert shown == ([str(log / "fig.png")] if kernel else []) and (log / "fig.svg").stat().st_size > 1000


def test_tokens_of_two_tokenizers_have_no_unit_in_common():
    runs = [{"tokenizer": "bytes", "data": "a"}, {"tokenizer": "gpt2", "data": "b"}]
    assert plot.unit(runs) == "nats per token of each run's tokenizer"
    assert plot.unit([runs[1], {"tokenizer": "p50k_base"}]) == plot.unit(runs)
    assert plot.unit(runs[:1]) == "nats per byte" and plot.unit(runs[1:] * 2) == "nats per token"
    names = plot.labels([{"method": "spectron", **run} for run in runs], ["one", "two"])
    assert all(f"tokenizer {run['tokenizer']}" in name for run, name in zip(runs, names))
