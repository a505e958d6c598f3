"""Text from a run.

    python sample.py out/run --prompt "def " --tokens 200 --temperature 0.8 --top_k 50 --seed 1
"""

import torch

import cli
from eval import load_run


@torch.no_grad()
def generate(model, tokens: list[int], count: int, temperature=0.8, top_k=50, seed=1,
             vocab=None) -> list[int]:
    """`count` tokens after `tokens` (at least one), each drawn from the top_k of its distribution at this
    temperature.

    Ids from `vocab` on (the padding of the vocabulary) are never drawn; the context is the last seq_len
    tokens.
    """
    generator, tokens = torch.Generator().manual_seed(seed), list(tokens)
    device, start = next(model.parameters()).device, len(tokens)
    for _ in range(count):
        context = torch.tensor([tokens[-model.config.seq_len:]], device=device)
        logits, ids = model(context)[0, -1, :vocab].float().cpu().div(max(temperature, 1e-5)).topk(
            min(top_k, vocab))
        tokens.append(int(ids[torch.multinomial(logits.softmax(-1), 1, generator=generator)]))
    return tokens[start:]


@cli.command
def main(argv=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("run", help="directory of a run")
    parser.add_argument("--prompt", default="", help="text to go on from (none: the start of a document)")
    parser.add_argument("--tokens", type=cli.positive, default=200, help="tokens to draw (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest (0.8)")
    parser.add_argument("--top_k", type=cli.positive, default=50, help="draw among this many (50)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    model, tokenizer, _ = load_run(args.run)
    prompt = [tokenizer.eot_token] + tokenizer.encode_ordinary(args.prompt)
    drawn = generate(model, prompt, args.tokens, args.temperature, args.top_k, args.seed, tokenizer.n_vocab)
    print(args.prompt + tokenizer.decode(drawn))


if __name__ == "__main__":
    main()
