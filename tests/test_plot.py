"""tools/plot.py: labels and legends, and files that are no logs."""

import json

import pytest

from tools import plot

CONFIG = {"size": "nano", "method": "spectron", "lr": 0.1, "renormalize": True, "nesterov": True,
          "eval_every": 5, "save_every": 5, "keep_every": 4, "batch_size": 16,
          "spectra_of": "blocks.0.attention.o_proj", "out": "out/x"}


@pytest.fixture
def made(tmp_path):
    """made(name, **changes) writes a run's log, whose last validation is on `last` tokens, and returns its
    directory."""
    def write(name, last=512, **changes):
        (tmp_path / name).mkdir()
        rows = [{"config": {**CONFIG, **changes}}]
        rows += [{"step": i, "tokens": 9 * i, "flops": 1e9 * i, "seconds": 2.0 * i, "loss": 5 / i,
                  "val_loss": 5 / i if i % 2 else None,
                  "val_tokens": (last if i == 7 else 512) if i % 2 else None,
                  "dW": 0.1 / i, "W": 1.0, "dy": 0.1, "gauge": 0.5}
                 for i in range(1, 9)]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name
    return write


def labels(*runs):
    return plot.labels([plot.read_log(run)[0]["config"] for run in runs], runs)


def test_a_label_is_what_differs_and_what_does_not_matter_is_left_out(made):
    a, b = made("a", lr=0.1), made("b", lr=0.2, eval_every=1, save_every=1, keep_every=2, batch_size=4)
    c = made("c", renormalize=False)
    assert labels(a, b) == ["lr 0.1", "lr 0.2"] and labels(a, c) == ["spectron", "no renormalize"]
    assert labels(a) == ["spectron"]


def test_copies_of_a_run_are_told_apart_by_the_path_given(made):
    a, b = made("a"), made("b")
    assert labels(a, b) == [f"spectron ({a})", f"spectron ({b})"]


@pytest.mark.parametrize("count, long", [(1, ""), (2, "x" * 200), (14, ""), (25, "a long name " * 9)])
def test_a_legend_never_leaves_the_picture(made, tmp_path, count, long):
    runs = [made(f"{i}", lr=i / 10, method=f"{long}{i}") for i in range(count)]
    fig = plot.draw(runs, "step", "val_loss")
    fig.canvas.draw()
    legend, page = fig.legends[0].get_window_extent(), fig.bbox
    assert page.x0 <= legend.x0 and legend.x1 <= page.x1 and page.y0 <= legend.y0 and legend.y1 <= page.y1
    assert fig.axes[0].get_window_extent().height > 150  # the curves keep their room


def test_every_axis_is_drawn(made, tmp_path):
    runs = [made("a"), made("b", lr=0.2)]
    for x in "step", "tokens", "flops", "seconds":
        for y in "val_loss", "loss", "dW", "W", "dy", "gauge":
            axes = plot.draw(runs, x, y).axes[0]
            curves = [line.get_xydata() for line in axes.get_lines() if len(line.get_xydata()) > 3]
            rows = [row for row in plot.read_log(runs[0])[1] if row[y] is not None]
            assert len(curves) >= 2 and axes.get_xlabel() and axes.get_ylabel()
            assert any(curve.tolist() == [[row[x], row[y]] for row in rows] for curve in curves), (x, y)
    plot.main([*map(str, runs), "-o", str(tmp_path / "fig.png"), "--x", "tokens", "--y", "gauge"])
    assert (tmp_path / "fig.png").stat().st_size > 5000


def legend(fig) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in fig.legends[0].get_texts()]


def curves(fig) -> list[list]:
    return [line.get_xydata().tolist() for line in fig.axes[0].get_lines()]


def test_a_last_validation_on_other_text_is_no_point_of_the_curve(made):
    a = made("a", last=103168)
    points = [[i, 5 / i] for i in (1, 3, 5, 7)]
    for y in None, "val_loss":
        fig = plot.draw([a], "step", y)
        assert points[:3] in curves(fig) and points[3:] in curves(fig) and points not in curves(fig)
        assert "validation at the end, on 103,168 tokens" in legend(fig)
    assert "validation, on 512 tokens" in legend(plot.draw([a], "step", None))
    assert len(legend(plot.draw([a, made("b", lr=0.2, last=103168)], "step", "val_loss"))) == 3  # said once


def test_where_all_validations_are_on_one_text_the_curve_is_whole(made):
    fig = plot.draw([made("a")], "step", None)
    assert [[i, 5 / i] for i in (1, 3, 5, 7)] in curves(fig) and legend(fig) == ["training", "validation"]


def test_a_loss_is_per_byte_where_all_tokens_are_bytes(made):
    a, b = made("a", tokenizer="bytes"), made("b", tokenizer="gpt2")
    for runs, per in (([a], "byte"), ([b], "token"), ([a, b], "token of each run's tokenizer")):
        assert plot.draw(runs, "step", "val_loss").axes[0].get_ylabel() == f"validation loss (nats per {per})"


@pytest.mark.parametrize("content", [b"not a log\n", b"", b"\xff\xfe\x00", b"[1, 2]\n", b'{"config": 3}\n',
                                     b"[" * 100_000 + b"\n"], ids=lambda content: repr(content[:10]))
def test_files_that_are_no_logs_are_one_message(tmp_path, fails, content):
    (tmp_path / "log.jsonl").write_bytes(content)
    fails(plot.main, [tmp_path], "not a log")


def test_a_torn_last_line_is_left_out_and_a_log_without_steps_is_said(made, tmp_path, fails):
    run = made("a")
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 9, "lo')
    assert plot.read_log(run)[1][-1]["step"] == 8
    (tmp_path / "log.jsonl").write_text(json.dumps({"config": CONFIG}) + "\n")
    fails(plot.main, [tmp_path, "-o", tmp_path / "x.png"], "no steps")
    fails(plot.main, [run, "-o", "x.xyz"], "x.xyz", ".png")
