"""tools/download.py against a local HTTP server that cuts connections, answers 404 and 500, and serves
bad files."""

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import data
from tools import download


@pytest.fixture
def server(tmp_path, monkeypatch):
    """files: name -> bytes; behaviour: name -> list of what to do at each request: an int to cut after so
    many bytes, a string for a status, None to serve. requests: (name, Range header)."""
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            name, wanted = self.path.rsplit("/", 1)[1], self.headers.get("Range")
            self.server.requests.append((name, wanted))
            plan = self.server.behaviour.get(name, [])
            what = plan.pop(0) if plan else None
            body = self.server.files.get(name)
            if what == "redirect":
                self.send_response(302)
                self.send_header("Location", f"/moved/{name}")
                self.send_header("X-Linked-Etag", f'"{self.server.sha256[name]}"')
                self.send_header("Content-Length", "0")
                return self.end_headers()
            if isinstance(what, str) or body is None:
                return self.send_error(int(what or 404))
            start = int(wanted.split("=")[1].rstrip("-")) if wanted and self.server.ranges else 0
            if start >= len(body) > 0 and start:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:] if what is None else body[start:start + what])
            if what is not None:
                self.close_connection = True

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.files, http.behaviour, http.requests, http.sha256, http.ranges = {}, {}, [], {}, True
    for i, name in enumerate(["fineweb_val_000000.bin", "fineweb_train_000001.bin",
                              "fineweb_train_000002.bin"]):
        data.write_shard(tmp_path / "made.bin", np.random.default_rng(i).integers(0, 50257, 5000))
        raw = (tmp_path / "made.bin").read_bytes()
        http.files[name] = raw[:12] + bytes(4) + raw[16:]  # the public files have no CRC
    (tmp_path / "made.bin").unlink()
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setattr(download.time, "sleep", lambda seconds: http.pauses.append(seconds))
    http.pauses, http.url = [], f"http://127.0.0.1:{http.server_port}/data"
    yield http
    http.shutdown()
    http.server_close()


def get(server, out, n=2):
    download.main(["fineweb", "-n", str(n), "--out", str(out), "--url", server.url])


def assert_whole(server, out, n=2):
    assert sorted(p.name for p in out.iterdir()) == sorted(server.files)[:n] + ["fineweb_val_000000.bin"]
    assert all((out / path.name).read_bytes() == server.files[path.name] for path in out.iterdir())


def test_it_fetches_the_shards_once_and_they_train(server, tmp_path, capsys):
    get(server, tmp_path / "d")
    assert_whole(server, tmp_path / "d")
    train, val = (data.open_split(tmp_path / "d", split, 64, "gpt2") for split in ("train", "val"))
    assert (train.tokens, val.tokens) == (10000, 5000)
    assert f"train.py --size S --data {tmp_path / 'd'}" in capsys.readouterr().out
    count = len(server.requests)
    get(server, tmp_path / "d")
    assert len(server.requests) == count == 3


def test_a_cut_connection_goes_on_with_a_range_request(server, tmp_path):
    server.behaviour["fineweb_train_000001.bin"] = [3000, 2000, 500]
    get(server, tmp_path / "d")
    assert_whole(server, tmp_path / "d")
    ranges = [wanted for name, wanted in server.requests if name == "fineweb_train_000001.bin"]
    assert ranges == [None, "bytes=3000-", "bytes=5000-", "bytes=5500-"]


def test_a_later_call_goes_on_and_a_server_without_ranges_starts_over(server, tmp_path):
    for ranges in (True, False):
        out, server.ranges = tmp_path / str(ranges), ranges
        out.mkdir()
        (out / "fineweb_train_000001.bin.part").write_bytes(server.files["fineweb_train_000001.bin"][:4000])
        get(server, out)
        assert_whole(server, out)
    # all there, but for its name
    (out / "fineweb_train_000002.bin").rename(out / "fineweb_train_000002.bin.part")
    server.ranges = True
    get(server, out)
    assert_whole(server, out)


def test_server_errors_are_tried_again_with_longer_and_longer_pauses(server, tmp_path, fails):
    server.behaviour["fineweb_train_000001.bin"] = ["500", "503", "429"]
    get(server, tmp_path / "d")
    assert_whole(server, tmp_path / "d")
    assert server.pauses == [1, 2, 4]
    server.behaviour["fineweb_train_000002.bin"] = ["500"] * 99
    (tmp_path / "d" / "fineweb_train_000002.bin").unlink()
    fails(download.main, ["fineweb", "-n", 2, "--out", tmp_path / "d", "--url", server.url], "gave up", "500",
          "fineweb_train_000002.bin", "same command")


def test_a_file_that_is_not_there_is_said_at_once(server, tmp_path, fails):
    fails(download.main, ["fineweb", "-n", 3, "--out", tmp_path / "d", "--url", server.url], "404",
          "fineweb_train_000003.bin", "--url", "-n")
    assert server.pauses == []


@pytest.mark.parametrize("damage", [lambda b: b[:-1000], lambda b: b"\0" * 8 + b[8:],
                                    lambda b: b + b"more", lambda b: b""])
def test_a_truncated_or_corrupt_file_never_gets_its_name(server, tmp_path, fails, damage):
    good = server.files["fineweb_train_000001.bin"]
    server.files["fineweb_train_000001.bin"] = damage(good)
    fails(download.main, ["fineweb", "-n", 1, "--out", tmp_path / "d", "--url", server.url], "gave up",
          "fineweb_train_000001.bin")
    assert not (tmp_path / "d" / "fineweb_train_000001.bin").exists()
    server.files["fineweb_train_000001.bin"] = good
    get(server, tmp_path / "d", n=1)
    assert_whole(server, tmp_path / "d", n=1)


def test_a_whole_looking_file_is_held_against_the_sha256_of_the_redirect(server, tmp_path, fails):
    name = "fineweb_train_000001.bin"
    good, bad = server.files[name], server.files[name][:-2] + b"\1\1"
    server.sha256[name], server.files[name], server.behaviour[name] = (
        hashlib.sha256(good).hexdigest(), bad, ["redirect", None] * 9)
    fails(download.main, ["fineweb", "-n", 1, "--out", tmp_path / "d", "--url", server.url], "SHA-256", name)
    server.files[name], server.behaviour[name] = good, ["redirect", None]
    get(server, tmp_path / "d", n=1)
    assert_whole(server, tmp_path / "d", n=1)


def test_a_part_that_had_arrived_whole_is_held_against_the_sha256_too(server, tmp_path):
    name = "fineweb_train_000001.bin"
    good = server.files[name]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / f"{name}.part").write_bytes(good[:-2] + b"\1\1")
    server.sha256[name], server.behaviour[name] = hashlib.sha256(good).hexdigest(), ["redirect", None] * 9
    get(server, tmp_path / "d", n=1)
    assert_whole(server, tmp_path / "d", n=1)


def test_a_damaged_shard_that_is_there_is_fetched_again(server, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "fineweb_train_000001.bin").write_bytes(b"half")
    get(server, tmp_path / "d")
    assert_whole(server, tmp_path / "d")


def test_a_disk_that_is_full_ends_it_at_once_and_a_later_call_goes_on(server, tmp_path, fails):
    resource = pytest.importorskip("resource", reason="no file-size limits here")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        fails(download.main, ["fineweb", "-n", 1, "--out", tmp_path / "d", "--url", server.url],
              "fineweb_val_000000.bin.part", "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not server.pauses
    get(server, tmp_path / "d", n=1)
    assert_whole(server, tmp_path / "d", n=1)


def test_misuse_gets_one_message(server, tmp_path, fails):
    fails(download.main, ["fineweb", "-n", 104], "104", "103", "fineweb100B")
    fails(download.main, ["fineweb", "--number", 3], "--number")
    fails(download.main, ["fineweb", "--outt", "x"], "--outt", "--out")
    fails(download.main, ["fineweb", "-n", 1, "--out", tmp_path / "d", "--url", "foo/bar"], "foo/bar")
    fails(download.main, ["fineweb", "-n", 1, "--out", tmp_path / "d", "--url", "http://127.0.0.1:9"],
          "gave up", "refused")


# ------------------------------------------ The files of the tasks ------------------------------------------

@pytest.fixture
def publishers(server, monkeypatch):
    """The server with small files of the tasks, and the numbers that download.py holds them against."""
    lines = {"hellaswag_val.jsonl": b'{"ind": 0}\n{"ind": 1}\n', "valid.jsonl": b'{"goal": "g"}\n' * 3,
             "valid-labels.lst": b"0\n1\n1\n", "ARC-Easy-Test.jsonl": b'{"id": 0}\n{"id": 1}'}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("ARC-V1-Feb2018-2/ARC_Corpus.txt", np.random.default_rng(0).bytes(9000))
        file.writestr(download.ARC_MEMBER, lines["ARC-Easy-Test.jsonl"])
    server.files = {name: body for name, body in lines.items() if name != "ARC-Easy-Test.jsonl"}
    server.files[download.ARC_ZIP] = archive.getvalue()
    digest = hashlib.sha256(lines["hellaswag_val.jsonl"]).hexdigest()
    monkeypatch.setattr(download, "EVALS", {
        name: (base, body.count(b"{") or body.count(b"\n"), digest if name.startswith("hella") else None)
        for (name, (base, _, _)), body in zip(download.EVALS.items(), lines.values())})
    server.lines = lines
    return server


def test_the_files_of_the_tasks_are_fetched_once_and_whole(publishers, tmp_path, capsys):
    publishers.behaviour[download.ARC_ZIP] = [4000, 3000]
    flags = ["evals", "--out", str(tmp_path / "evals"), "--url", publishers.url]
    download.main(flags)
    assert {path.name: path.read_bytes() for path in (tmp_path / "evals").iterdir()} == publishers.lines
    assert "--tasks hellaswag,piqa,arc_easy" in capsys.readouterr().out
    assert [wanted for name, wanted in publishers.requests if name == download.ARC_ZIP] == [
        None, "bytes=4000-", "bytes=7000-"]
    count = len(publishers.requests)
    download.main(flags)
    assert len(publishers.requests) == count
    (tmp_path / "evals/valid.jsonl").write_bytes(b'{"goal": "g"}\n{"go')
    download.main(flags)
    assert (tmp_path / "evals/valid.jsonl").read_bytes() == publishers.lines["valid.jsonl"]


@pytest.mark.parametrize("name, body, said", [
    ("hellaswag_val.jsonl", b'{"ind": 0}\n{"ind": 2}\n', "SHA-256"),
    ("valid.jsonl", b'{"goal"', "valid.jsonl"),
    ("valid-labels.lst", b"0\n1\n", "2 lines, expected 3"), (download.ARC_ZIP, b"not a zip", "damaged")])
def test_a_bad_file_of_a_task_never_gets_its_name(publishers, tmp_path, fails, name, body, said):
    publishers.files[name] = body
    fails(download.main, ["evals", "--out", tmp_path, "--url", publishers.url], "gave up", name, said)
    assert not (tmp_path / name).exists() and not (tmp_path / "ARC-Easy-Test.jsonl").exists()
