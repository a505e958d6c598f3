"""sample.py: the KV cache against the uncached model, what is drawn, and how it reaches the terminal."""

import io
import signal
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
from launch import Child
from lib.cli import UserError
from model import FactorizedLinear, Llama, LlamaConfig
from tools import sample

BYTES = data.get_tokenizer("bytes")


def small(seq_len=24, **more):
    return Llama(LlamaConfig(dim=48, n_layers=3, n_heads=4, vocab_size=320, seq_len=seq_len, **more)).eval()


# ----------------------------------------------- The KV cache -----------------------------------------------

@pytest.mark.parametrize("config", [{}, {"rank_ratio": None}, {"factorize": "ffn"}])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("parts", [[1] * 24, [24], [7] + [1] * 17, [1, 5, 1, 9, 8]])
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones(config, rows, parts):
    model, decoder = (model := small(**config)), sample.Decoder(model, rows)
    tokens, end = torch.randint(0, 257, (rows, 24)), 0
    whole = model(tokens)
    for part in tokens.split(parts, dim=1):
        end += part.size(1)
        assert (decoder(part) - whole[:, end - 1]).abs().max() < 1e-5


@torch.no_grad()
def test_at_nanos_size_too():
    model, tokens = (Llama(LlamaConfig(256, 4, 4, vocab_size=320, seq_len=256)).eval(),
                     torch.randint(0, 257, (3, 256)))
    decoder, whole = sample.Decoder(model, 3), model(tokens)
    parts = tokens.split([100] + [1] * 156, dim=1)
    found = [decoder(part) for part in parts]
    assert max((a - whole[:, 99 + i]).abs().max() for i, a in enumerate(found)) < 1e-5


@pytest.mark.parametrize("seq_len", [24, 7, 2, 1])
@torch.no_grad()
def test_past_seq_len_the_cache_is_that_of_the_last_half(seq_len):
    model, tokens = small(seq_len), torch.randint(0, 257, (2, 4 * seq_len + 3))
    decoder, start = sample.Decoder(model, 2), 0
    for end in range(1, tokens.size(1) + 1):
        if end - start > seq_len:
            start = end - max(1, seq_len // 2)
        found, wanted = decoder(tokens[:, end - 1:end]), model(tokens[:, start:end])[:, -1]
        assert (found - wanted).abs().max() < 1e-5
        assert decoder.caches[0].length == end - start


@torch.no_grad()
def test_a_prompt_is_run_once_for_all_rows():
    model, prompt = small(), torch.randint(0, 257, (1, 9))
    decoder, rows = sample.Decoder(model, 4), torch.randint(0, 257, (4, 1))
    assert decoder(prompt).shape == (1, 320)
    wanted = model(torch.cat([prompt.expand(4, -1), rows], dim=1))[:, -1]
    assert (decoder(rows) - wanted).abs().max() < 1e-5


def test_decoding_never_forms_the_product():
    model = small(rank_ratio=0.1)  # at which no factor has the shape of a product
    forbidden = {shape for layer in model.modules() if isinstance(layer, FactorizedLinear)
                 for shape in [(layer.out_features, layer.in_features),
                               (layer.in_features, layer.out_features)]}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            assert not (isinstance(out, torch.Tensor) and tuple(out.shape) in forbidden), function
            return out
    decoder = sample.Decoder(model, 2)
    with Watch():
        for _ in range(30):
            decoder(torch.ones(2, 1, dtype=torch.int64))


# ---------------------------------------------- What is drawn -----------------------------------------------

def drawn(model, count=20, **options):
    return list(zip(*sample.generate(model, [256, 100], count, **{"vocab": 257, **options})))


def test_text_i_of_n_is_what_the_seed_after_i_draws():
    model = small()
    three = drawn(model, n=3, seed=5)
    assert three == [drawn(model, seed=5 + i)[0] for i in range(3)]
    assert len(set(three)) == 3 and len(three[0]) == 20


def test_temperature_zero_and_top_k_one_take_the_likeliest():
    model, tokens = small(64), [256, 100]
    with torch.no_grad():
        for _ in range(20):
            tokens.append(model(torch.tensor([tokens]))[0, -1, :257].argmax().item())
    for options in {"temperature": 0}, {"top_k": 1}, {"temperature": 1e-300}:
        assert list(drawn(model, **options)[0]) == tokens[2:]


def test_draws_follow_the_top_k_of_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).repeat(20_000, 1)
    ids = sample.draw(logits, 0.5, 3, [torch.Generator().manual_seed(i) for i in range(20_000)])
    found = torch.bincount(ids, minlength=4) / 20_000
    assert (found - torch.cat([(logits[0, :3] / 0.5).softmax(0), torch.zeros(1)])).abs().max() < 0.01


def test_the_padding_of_the_vocabulary_is_never_drawn():
    model = small()
    with torch.no_grad():
        model.head.weight[257:] *= 100
    assert max(drawn(model, 200, temperature=5.0, top_k=320)[0]) < 257


def test_bytes_wait_until_they_are_a_character():
    data = "a\u00e9\U0001f3ac".encode()
    grown = list(sample.texts(BYTES, ([byte, 0xff] for byte in data), 2))
    assert [text for text, _ in grown] == ["a", "", "é", "", "", "", "🎬", ""]
    cut = list(sample.texts(BYTES, ([byte] for byte in data[:-1]), 1))
    assert "".join(text for text, in cut) == "aé\ufffd"


# ----------------------------------------------- The command ------------------------------------------------

@pytest.fixture(scope="module")
def trained(trained_once):
    return trained_once("--steps", 1)


def test_prompt_and_texts_are_printed(trained, capsys, monkeypatch):
    sample.main([str(trained), "--prompt", "def ", "--tokens", "12", "-n", "2"])
    first, second = capsys.readouterr().out.split("\n---\n")[-2:]
    assert first.rsplit("---\n")[-1].startswith("def ") and second.startswith("def ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def ")))
    sample.main([str(trained), "--prompt", "-", "--tokens", "12"])
    assert capsys.readouterr().out == first + "\n"


def test_it_streams_and_ctrl_c_and_a_reader_that_goes_away_leave_no_traceback(trained):
    """As `python -m tools.sample` does it. One that does not stream would write nothing."""
    code = ("import runpy, sys\ndel sys.modules['tools.sample']\n"
            "runpy.run_module('tools.sample', run_name='__main__', alter_sys=True)")
    for stop, code_of_end in (lambda p: p.send_signal(signal.SIGINT), 130), (lambda p: p.stdout.close(), 141):
        process = Child(code, [trained, "--tokens", "100000000", "--top_k", "200"])
        timer = threading.Timer(60, process.kill)
        timer.start()
        assert len(process.stdout.read(300)) == 300 and process.poll() is None
        stop(process)
        assert process.wait(60) == code_of_end and process.stderr.read() == ""
        timer.cancel()


def test_a_byte_order_mark_and_a_million_spaces_are_no_trouble(trained, fails, monkeypatch):
    for prompt in "def ", "\ufeffdef ":
        assert sample.read_prompt(prompt, BYTES, 32) == ("def ", [256, *b"def "])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfdef ")))
    assert sample.read_prompt("-", BYTES, 32)[0] == "def "
    fails(sample.main, [trained, "--prompt", " " * 1_000_000], "1,000,000 tokens", "room for 31")
    try:
        gpt2 = data.get_tokenizer("gpt2")
    except UserError:
        pytest.skip("gpt2's files are not here: set TIKTOKEN_CACHE_DIR")
    for space in " ", "\n", "\t", " \n":
        with pytest.raises(UserError, match="room for 31"):
            sample.read_prompt("a" + space * 1_000_000, gpt2, 32)


def test_a_terminal_without_utf8_shows_what_it_can(trained, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    sample.main([str(trained), "--prompt", "\u00e9\u263a ", "--tokens", "9"])
    assert terminal.buffer.getvalue().startswith("\u00e9? ".encode("latin-1"))


def test_misuse_is_one_message(trained, fails, monkeypatch):
    fails(sample.main, [trained, "--prompt", ""], "empty", "leave --prompt out")
    fails(sample.main, [trained, "--prompt", "x" * 32], "32 tokens", "context of 32", "room for 31",
          "last 30 characters")
    for text in b"", b"\xff\xfe":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        fails(sample.main, [trained, "--prompt", "-"], "empty" if not text else "not UTF-8")
    for bad in "nan", "-1", "inf", "warm":
        fails(sample.main, [trained, "--temperature", bad], "--temperature")
    for bad in "-1", "99999999999999999999":
        fails(sample.main, [trained, "--seed", bad], "--seed")
    fails(sample.main, [trained, "--prompt", "a\udcff"], "not UTF-8")
    fails(sample.main, [trained, "-n", 0], "-n", "at least 1")
