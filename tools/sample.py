"""Text from a run, streamed as it is drawn.

    python -m tools.sample out/run --prompt "def " --tokens 200 --temperature 0.8 --top_k 50 --seed 1 -n 3
    echo "def main" | python -m tools.sample out/run --prompt -
"""

import codecs
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from data import encode
from eval import load_run
from lib.cli import Parser, UserError, command, number, positive
from lib.ranks import choose_device
from model import Llama, causal_attention


class KVCache:
    """The keys (after RoPE) and values of one block, (B, H, seq_len, head_dim). Called in place of causal
    attention, it lets new tokens attend to all the tokens before them."""

    def __init__(self, model: Llama, rows: int):
        c, like = model.config, model.head.weight
        self.k, self.v = like.new_empty(2, rows, c.n_heads, c.seq_len, c.dim // c.n_heads)
        self.length = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start:self.length], self.v[:, :, start:self.length] = k, v
        if start == 0:
            return causal_attention(q, k, v)
        k, v = self.k[:, :, :self.length], self.v[:, :, :self.length]
        seen = torch.ones(q.size(2), self.length, dtype=torch.bool, device=q.device).tril(start)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if q.size(2) == 1 else seen)


class Decoder:
    """decoder(tokens) appends tokens (rows, T) to its texts, and returns the logits of the next one,
    (rows, V). The first call may have one row, which is then the beginning of all texts.

    Each token goes through the model once. When seq_len is full, the caches are made again from the last
    seq_len // 2 tokens, as if the text began there.
    """

    def __init__(self, model: Llama, rows: int = 1):
        self.model, self.caches = model, [KVCache(model, rows) for _ in model.blocks]
        self.context = torch.empty(rows, 0, dtype=torch.int64, device=model.head.weight.device)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        seq_len = self.model.config.seq_len
        self.context = torch.cat([self.context, tokens.expand(len(self.context), -1)], dim=1)
        if self.context.size(1) > seq_len:
            self.context = tokens = self.context[:, -max(1, seq_len // 2):]
            for cache in self.caches:
                cache.length = 0
        end = self.context.size(1)
        positions = torch.arange(end - tokens.size(1), end, device=tokens.device)
        return self.model.head(self.model.hidden(tokens, positions, self.caches)[:, -1])


def draw(logits: Tensor, temperature: float, top_k: int, generators) -> Tensor:
    """A token for each row of logits (rows, V): of its top_k, at this temperature; 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    best, ids = logits.topk(min(top_k, logits.size(-1)))
    p = ((best - best[:, :1]).double() / temperature).softmax(-1)  # no overflow, however cold
    places = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(p, generators)]
    return ids.gather(1, torch.stack(places)).squeeze(1)


def generate(model, prompt: list[int], count: int, temperature=0.8, top_k=50, seed=1, vocab=None, n=1):
    """Yields `count` times the next token of each of n texts that go on from the same prompt (at least one
    token, seq_len at most).

    Text i draws from a generator of its own, seeded with seed + i. Ids from `vocab` on (the padding of the
    vocabulary) are never drawn.
    """
    generators, decoder = [torch.Generator().manual_seed(seed + i) for i in range(n)], Decoder(model, n)
    device = decoder.context.device
    tokens = torch.tensor([prompt], device=device)
    for _ in range(count):
        logits = decoder(tokens)[:, :vocab].float().cpu().expand(n, -1)
        tokens = draw(logits, temperature, top_k, generators).unsqueeze(1).to(device)
        yield tokens.flatten().tolist()


def texts(tokenizer, steps, n: int):
    """Yields what n texts grow by at each of the steps, a list of n strings; bytes that are not yet a whole
    character wait, those that never become one end as U+FFFD."""
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(n)]
    for ids in steps:
        yield [d.decode(tokenizer.decode_single_token_bytes(i)) for d, i in zip(decoders, ids)]
    yield [d.decode(b"", final=True) for d in decoders]


def read_prompt(given: str | None, tokenizer, seq_len: int) -> tuple[str, list[int]]:
    """(prompt, its tokens after an end-of-text). "-" reads standard input; None starts a document. UserError
    for a prompt that is empty, no text, or too long."""
    if given == "-":
        try:
            given = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text: {error}") from None
    given = given and given.removeprefix("\ufeff")  # a byte-order mark
    if given == "":
        raise UserError("the prompt is empty; to start a new document, leave --prompt out")
    if given and given != given.encode("utf-8", "replace").decode("utf-8"):
        raise UserError("--prompt is not UTF-8 text; give it by standard input: --prompt -")
    tokens = [tokenizer.eot_token, *encode(tokenizer, given or "").tolist()]
    if len(tokens) > seq_len:
        raise UserError(f"the prompt has {len(tokens) - 1:,} tokens, and this model's context of {seq_len:,} "
                        f"has room for {seq_len - 1:,}: give the end of it, e.g. its last "
                        f"{len(given) * (seq_len - 1) // len(tokens):,} characters")
    return given or "", tokens


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", help="directory of a run")
    parser.add_argument("--prompt", help="text to go on from; - reads it from standard input (none: the "
                        "start of a document)")
    parser.add_argument("--tokens", type=positive, default=200, help="tokens to draw (200)")
    parser.add_argument("--temperature", type=number(), default=0.8,
                        help="0 always takes the likeliest (0.8)")
    parser.add_argument("--top_k", type=positive, default=50, help="draw among this many (50)")
    parser.add_argument("--seed", type=number(int, 0, 2**62), default=1,
                        help="of the first text; the next has seed + 1 (1)")
    parser.add_argument("-n", type=positive, default=1, help="texts to draw; the first is streamed (1)")
    parser.add_argument("--device", choices=["cuda", "cpu", "mps"],
                        help="(cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of weights and cache (float32)")
    args = parser.parse_args(argv)
    model, tokenizer, _ = load_run(args.run, choose_device(args.device))
    model.to(getattr(torch, args.dtype))
    prompt, tokens = read_prompt(args.prompt, tokenizer, model.config.seq_len)
    steps = generate(model, tokens, args.tokens, args.temperature, args.top_k, args.seed, tokenizer.n_vocab,
                     args.n)
    print(prompt, end="", flush=True)
    others = []
    for first, *rest in texts(tokenizer, steps, args.n):
        print(first, end="", flush=True)
        others.append(rest)
    print()
    for parts in zip(*others):
        print(f"---\n{prompt}{''.join(parts)}")


if __name__ == "__main__":
    main()
