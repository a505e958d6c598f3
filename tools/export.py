"""A run as a Hugging Face Llama checkpoint, for transformers, vLLM, llama.cpp's converter,
lm-evaluation-harness.

    pip install safetensors
    python -m tools.export out/run --to DIR             A @ B.T multiplied out, as those programs need it
    python -m tools.export out/run --to DIR --factors   and A and B beside, in factors.safetensors

The padding of the vocabulary is cut off, so that scores are over the tokenizer's own entries, as in eval.py.
"""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from data import END_OF_TEXT
from eval import load_run
from lib.cli import Parser, UserError, command
from lib.files import new_directory, replacing
from lib.methods import block_matrices
from lib.outputs import own_name
from model import Llama

NAMES = {r"^blocks\.": "model.layers.", r"\.attention\.": ".self_attn.", r"\.ffn\.": ".mlp.",
         r"\.attention_norm\.": ".input_layernorm.", r"\.ffn_norm\.": ".post_attention_layernorm.",
         r"^embedding\.": "model.embed_tokens.", r"^norm\.": "model.norm.", r"^head\.": "lm_head."}
# tokenizers that ByteLevel's pattern cuts as tiktoken does
SAME_WORDS = "bytes", "gpt2", "r50k_base", "p50k_base"


def renamed(name: str) -> str:
    """A parameter's name in transformers' LlamaForCausalLM."""
    for ours, theirs in NAMES.items():
        name = re.sub(ours, theirs, name)
    return name


def weights(model: Llama, n_vocab: int) -> dict[str, Tensor]:
    """What transformers' Llama has and nothing else, float32, under its names: the seven matrices of each
    block, multiplied out, the norms, and the first n_vocab rows of embedding and head."""
    found = {f"{name}.weight": layer.product() if hasattr(layer, "product") else layer.weight
             for name, layer in block_matrices(model).items()}
    found |= {name: p for name, p in model.named_parameters() if name.endswith("norm.weight")}
    found |= {name: getattr(model, name.split(".")[0]).weight[:n_vocab]
              for name in ("embedding.weight", "head.weight")}
    return {renamed(name): tensor.detach().float().contiguous() for name, tensor in found.items()}


def config_of(model: Llama, tokenizer) -> dict:
    c, end = model.config, tokenizer.eot_token
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
            "vocab_size": tokenizer.n_vocab, "hidden_size": c.dim, "intermediate_size": c.ffn_dim,
            "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
            "num_key_value_heads": c.n_heads,
            "head_dim": c.dim // c.n_heads, "max_position_embeddings": c.seq_len, "hidden_act": "silu",
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
            "tie_word_embeddings": False, "bos_token_id": end, "eos_token_id": end}


def printable() -> dict[int, str]:
    """GPT-2's character for each byte: itself where it can be seen, else one from U+0100 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that byte pair encoding merges into this one, last."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def tokenizer_files(tokenizer) -> dict[str, dict]:
    """tokenizer.json and tokenizer_config.json, by the tokenizer's own ranks."""
    show = printable()
    tokens = {i: tokenizer.decode_single_token_bytes(i) for i in range(tokenizer.n_vocab)
              if i != tokenizer.eot_token}
    ranks = {token: i for i, token in tokens.items()}

    def text(token):
        return "".join(show[byte] for byte in token)
    merges = [" ".join(text(half) for half in halves(token, ranks)) for token in tokens.values()
              if len(token) > 1]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": tokenizer.name != "bytes"}
    end = {"id": tokenizer.eot_token, "content": END_OF_TEXT, "single_word": False, "lstrip": False,
           "rstrip": False, "normalized": False, "special": True}
    return {"tokenizer.json": {
                "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end],
                "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": level,
                "model": {"type": "BPE", "dropout": None, "unk_token": None,
                          "continuing_subword_prefix": None,
                          "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                          "vocab": {text(token): i for token, i in ranks.items()}
                          | {END_OF_TEXT: tokenizer.eot_token}, "merges": merges}},
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END_OF_TEXT,
                                      "eos_token": END_OF_TEXT, "clean_up_tokenization_spaces": False}}


@torch.no_grad()
def export(run, to: Path, factors: bool = False) -> list[str]:
    """Write the checkpoint to a new directory; returns the names of its files."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("the export needs one more package: pip install safetensors") from None
    model, tokenizer, config = load_run(run)
    pairs = {renamed(name): p.contiguous() for name, p in model.state_dict().items()
             if name[-2:] in (".A", ".B")}
    if factors and not pairs:
        raise UserError(f"{run} has dense weights and no factors: leave --factors out")
    settings = config_of(model, tokenizer)
    files = {"config.json": settings, "generation_config.json": {k: settings[k] for k in ("bos_token_id",
                                                                                       "eos_token_id")}}
    if config["tokenizer"] in SAME_WORDS:
        files |= tokenizer_files(tokenizer)
    else:
        print(f"no tokenizer files: {config['tokenizer']} cuts text into words in a way of its own")
    with new_directory(to, "--to") as building:
        for name, content in files.items():
            with replacing(building / name, "w") as file:
                file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        tensors = {"model": weights(model, tokenizer.n_vocab), **({"factors": pairs} if factors else {})}
        for name, content in tensors.items():
            path = building / f"{name}.safetensors"
            try:
                save_file(content, path, metadata={"format": "pt"})
            except SafetensorError as error:
                raise UserError(f"{to / path.name} could not be written: {error}") from None
            with suppress(OSError):  # safetensors lets the owner alone read it; the others follow the umask
                shutil.copymode(building / "config.json", path)
    if config["tokenizer"] == "bytes":
        print("not for GGUF: llama.cpp's converter does not know the pre-tokenizer of byte-level runs; a run "
              "on gpt2 tokens can be converted")
    return sorted(path.name for path in to.iterdir())


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", help="directory of a run")
    parser.add_argument("--to", required=True, help="directory to make")
    parser.add_argument("--factors", action="store_true", help="also keep A and B, in factors.safetensors")
    args = parser.parse_args(argv)
    to = own_name(args.to, "--to")
    print(f"{to}: {', '.join(export(args.run, to, args.factors))}")


if __name__ == "__main__":
    main()
