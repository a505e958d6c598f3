"""tools/export.py against transformers: logits with and without a KV cache, greedy text, the tokenizer.

    pip install transformers safetensors
    python -m pytest tests/test_export.py -s        also prints the differences

SPECTRON_RUNS="out/a out/b" takes these runs instead of small ones that are made here.
"""

import json
import os
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
from conftest import ROOT
from lib.cli import UserError
from tools import export, sample

TEXTS = ["def f(x):\n    return x + 1\n",
         "It's a film, isn't it?  Two  spaces,\ttabs \n\n and 12345 numbers.",
         "élan vital — 機を織る 🎬", " starts and ends with a space ", "<|endoftext| >", "..."]


RUNS = [Path(path).resolve() for path in os.environ.get("SPECTRON_RUNS", "").split()]
LONG = ["--seq_len", 128, "--tokens_per_step", 256]


@pytest.fixture
def runs(trained_once):
    """Directories of a low-rank run of bytes, and of one whose attention is dense."""
    return RUNS or [trained_once("--steps", 8, *LONG),
                    trained_once("--steps", 2, *LONG, "--factorize", "ffn", "--rank_ratio", 0.5)]


def loaded(run, to, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    export.export(run, to, **options)
    return transformers, transformers.LlamaForCausalLM.from_pretrained(to).eval()


@torch.no_grad()
def test_logits_and_greedy_text_are_those_of_transformers(runs, tmp_path):
    for number, run in enumerate(runs):
        _, theirs = loaded(run, tmp_path / str(number))
        model, tokenizer, _ = evaluation.load_run(run)
        V, T = tokenizer.n_vocab, model.config.seq_len
        assert theirs.config.vocab_size == theirs.lm_head.weight.size(0) == V < model.config.vocab_size
        tokens = torch.randint(0, V, (2, T))
        whole = (model(tokens)[..., :V] - theirs(tokens).logits).abs().max().item()
        decoder, cache, stepwise = sample.Decoder(model, 2), None, 0.0
        for part in tokens.split([T // 2] + [1] * (T - T // 2), dim=1):
            found = theirs(part, past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            stepwise = max(stepwise, (decoder(part)[:, :V] - found.logits[:, -1]).abs().max().item())
        steps = 100
        start = torch.tensor([[tokenizer.eot_token]])
        greedy = [ids[0] for ids in sample.generate(model, start[0].tolist(), steps, temperature=0, vocab=V)]
        text = theirs.generate(start, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
                               eos_token_id=None, pad_token_id=0)[0, 1:].tolist()
        print(f"\n{run}: seq_len {T}, logits differ by {whole:.1e} over 2 x {T} tokens, by {stepwise:.1e} "
              f"with both KV caches; greedy: {sum(a == b for a, b in zip(greedy, text))} of {steps} "
              "tokens agree")
        assert whole < 1e-4 and stepwise < 1e-4 and greedy == text and len(text) == steps


def test_the_tokenizer_is_ours(runs, tmp_path):
    for number, run in enumerate(runs):
        transformers, _ = loaded(run, tmp_path / str(number))
        theirs, ours = (transformers.AutoTokenizer.from_pretrained(tmp_path / str(number)),
                        evaluation.load_run(run)[1])
        assert theirs.eos_token_id == theirs.bos_token_id == ours.eot_token and len(theirs) == ours.n_vocab
        for text in TEXTS:
            tokens = ours.encode_ordinary(text)
            assert theirs.encode(text, add_special_tokens=False) == tokens
            assert theirs.decode(tokens) == text
        assert theirs.encode(f"a{data.END_OF_TEXT}b")[1:2] == [ours.eot_token]


@pytest.mark.parametrize("name", ["bytes", "gpt2", "r50k_base", "p50k_base"])
def test_every_tokenizer_that_is_written_reads_as_it_did(name):
    tokenizers = pytest.importorskip("tokenizers")
    try:
        ours = data.get_tokenizer(name)
    except UserError:
        pytest.skip(f"{name}'s files are not here: set TIKTOKEN_CACHE_DIR")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(export.tokenizer_files(ours)["tokenizer.json"]))
    assert theirs.token_to_id(data.END_OF_TEXT) == ours.eot_token and theirs.get_vocab_size() == ours.n_vocab
    python = (ROOT / "train.py").read_text()
    for text in [*TEXTS, *(python[i:i + 200] for i in range(0, len(python), 200))]:
        assert theirs.encode(text).ids == ours.encode_ordinary(text) or data.END_OF_TEXT in text


def test_factors_multiply_to_the_weights(trained_once, tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file
    out = trained_once("--steps", 1)
    export.main([str(out), "--to", str(tmp_path / "hf"), "--factors"])
    weights, factors = (load_file(tmp_path / "hf" / f"{name}.safetensors") for name in ("model", "factors"))
    assert len(factors) == 2 * 7 * 2 and len(weights) == 7 * 2 + 2 * 2 + 3
    for name in {name[:-2] for name in factors}:
        product = factors[f"{name}.A"] @ factors[f"{name}.B"].T
        assert torch.allclose(product, weights[f"{name}.weight"], atol=1e-6)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == 257


def test_misuse_of_export_is_one_message(run, tmp_path, fails):
    pytest.importorskip("safetensors")
    dense = run("--steps", 1, "--method", "dense", out="dense")
    fails(export.main, [dense, "--to", tmp_path / "hf", "--factors"], "dense weights", "--factors")
    fails(export.main, [dense, "--to", dense], dense, "not an empty directory")
    fails(export.main, [tmp_path / "none", "--to", tmp_path / "hf"], "no checkpoint")
    export.main([str(dense), "--to", str(tmp_path / "hf")])


def test_a_missing_safetensors_is_one_message(tmp_path, fails, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    fails(export.main, [tmp_path, "--to", tmp_path / "hf"], "pip install safetensors")


def test_a_run_that_a_guide_still_leads_exports_what_llama_has_and_nothing_more(run):
    """Its W and alpha are in the weights that are multiplied out, and not beside them."""
    def exported(*flags, out):
        model, tokenizer, _ = evaluation.load_run(run("--steps", 4, "--stop_at", 1, *flags, out=out))
        return export.weights(model, tokenizer.n_vocab)
    guided, plain = exported("--method", "self-guided", out="guided"), exported(out="plain")
    assert {name: x.shape for name, x in guided.items()} == {name: x.shape for name, x in plain.items()}
