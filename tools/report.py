"""The end of a run: a sample, the figure, and a block of `key: value` lines."""

import shlex
from pathlib import Path

from tools import plot, sample


def end_of_run(model, tokenizer, out: Path, c, step: int, seconds: float, scores: dict) -> None:
    """Prints what came of a run. scores has the final losses, or "diverged" with its cause."""
    if step:
        plot.figure([out], out / "loss.png")
    print("---")
    if step < c.steps and "diverged" not in scores:
        print(f"stopped after step {step} of {c.steps}. Go on: python train.py --resume "
              f"--out {shlex.quote(str(out))}")
    elif tokenizer and scores.get("val_loss") is not None:
        steps = sample.generate(model, [tokenizer.eot_token], 200, seed=c.seed, vocab=tokenizer.n_vocab)
        print(f"sample:\n{''.join(text for text, in sample.texts(tokenizer, steps, 1))}\n---")
    results = {"step": step, "seconds": seconds, **scores, "log": out / "log.jsonl"}
    results |= {key: out / file for key, file in (("checkpoint", "ckpt.pt"), ("figure", "loss.png"))
                if (out / file).exists()}
    print("\n".join(f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}"
                    for key, value in results.items()), flush=True)
