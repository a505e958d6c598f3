"""Where the commands write: an output needs a name of its own, and nobody else's file is lost or locked."""

import os
import shlex
import stat
from types import SimpleNamespace

import numpy as np
import pytest

import data
from lib.cli import UserError
from lib.outputs import own_name
from test_download import publishers, server  # noqa: F401, fixtures
from tools import download, export, plot, prepare

NAMELESS = ["", " ", "\t\n", ".", "..", "/", "//", "./", "../", "a/..", "./.", "...", ". .", "a\0b"]


@pytest.mark.parametrize("path", NAMELESS, ids=repr)
def test_a_path_without_a_name_of_its_own_is_refused(path):
    with pytest.raises(UserError, match="--to .*: name a directory to make"):
        own_name(path, "--to")


@pytest.mark.parametrize("path", ["a", "a/", "./a/.", "../b", ".hidden", "a b", " a", "a.b", "/x/é", "_"])
def test_a_name_is_a_name(path):
    assert str(own_name(path)) == os.path.normpath(path)


@pytest.mark.parametrize("path", ["", "   ", ".", "/", "..", "there/.."])
def test_no_command_writes_where_there_is_no_name(tmp_path, monkeypatch, fails, path):
    (tmp_path / "there").mkdir()
    (tmp_path / "a.md").write_text("some *text*\n\n" * 3000)
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.setattr(download, "fetch", lambda *args: pytest.fail("fetched"))
    for main, argv, flag in (
            (prepare.main, ["stdlib", "--out"], "--out"), (download.main, ["evals", "--out"], "--out"),
            (prepare.main, ["text", "../a.md", "--tokenizer", "bytes", "--out"], "--out"),
            (download.main, ["fineweb", "-n", 1, "--out"], "--out"), (export.main, ["run", "--to"], "--to"),
            (plot.main, ["run", "-o"], "--out")):
        fails(main, [*argv, path], f"error: {flag} ", "name a ")
    assert sorted(os.listdir(tmp_path)) == ["a.md", "there"] and not os.listdir(tmp_path / "there")


def test_an_export_is_as_readable_as_any_other_file(run, tmp_path):
    pytest.importorskip("safetensors")
    out, before = run("--steps", 1), os.umask(0o027)
    try:
        export.main([str(out), "--to", str(tmp_path / "hf"), "--factors"])
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "hf").iterdir()}
    assert set(modes) > {"model.safetensors", "factors.safetensors"} and set(modes.values()) == {0o640}


def test_an_export_does_not_need_a_file_system_that_has_modes(run, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    out = run("--steps", 1)
    monkeypatch.setattr(os, "chmod", lambda *args, **more: (_ for _ in ()).throw(PermissionError(1, "no")))
    export.main([str(out), "--to", str(tmp_path / "hf")])
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size > 1000


def test_a_file_of_the_users_that_has_the_name_of_a_task_is_kept(publishers, tmp_path, capsys):  # noqa: F811
    (tmp_path / "valid.jsonl").write_text('{"mine": 1}\n')
    (tmp_path / "valid.jsonl.1").write_text("an older one\n")
    (tmp_path / download.ARC_ZIP).write_bytes(publishers.files[download.ARC_ZIP])
    download.main(["evals", "--out", str(tmp_path), "--url", publishers.url])
    assert (tmp_path / "valid.jsonl.2").read_text() == '{"mine": 1}\n'
    assert (tmp_path / "valid.jsonl.1").read_text() == "an older one\n"
    assert all((tmp_path / name).read_bytes() == body for name, body in publishers.lines.items())
    assert "valid.jsonl.2" in capsys.readouterr().out
    # an archive that was fetched by hand is used and stays
    assert (tmp_path / download.ARC_ZIP).exists()
    assert download.ARC_ZIP not in {name for name, _ in publishers.requests}


def test_the_number_of_shards_that_is_said_to_fit_does(tmp_path, fails, monkeypatch):
    """Three are there, and the disk has room for two of the eight that are missing."""
    for name in "val_000000", "train_000001", "train_000002":
        data.write_shard(tmp_path / f"fineweb_{name}.bin", np.arange(300))
    free, fetched = 2 * download.SHARD_BYTES + 99, []
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(download, "fetch", lambda url, path, *more: fetched.append(path.name))
    fails(download.main, ["fineweb", "-n", 10, "--out", tmp_path], "8 shards", "-n 4 fits", "--out")
    download.main(["fineweb", "-n", "4", "--out", str(tmp_path)])
    assert fetched == ["fineweb_train_000003.bin", "fineweb_train_000004.bin"]
    free = download.SHARD_BYTES  # for the one of validation, and none to train on
    with pytest.raises(UserError) as caught:
        download.fineweb(5, tmp_path / "other", "https://huggingface.co/none")
    assert "fits" not in str(caught.value) and "larger disk" in str(caught.value)


def test_what_has_arrived_is_promised_only_where_something_is_kept(server, tmp_path, fails):  # noqa: F811
    server.files["fineweb_val_000000.bin"] = b"a page that says no" * 99
    fails(download.main, ["fineweb", "-n", 1, "--out", tmp_path, "--url", server.url], "gave up",
          "tries again")
    assert not list(tmp_path.glob("*.part"))


def test_a_printed_command_can_be_pasted(publishers, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "the tasks; $HOME"
    download.main(["evals", "--out", str(out), "--url", publishers.url])
    assert shlex.split(capsys.readouterr().out.split("Score a run: ")[1])[-1] == str(out)
