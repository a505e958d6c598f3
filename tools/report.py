"""What a run prints: its plan, a line for each logged step, and at the end a sample and its scores."""

import shlex
from pathlib import Path

import torch

from lib.cli import UserError, hours, say
from lib.methods import block_matrices
from lib.norms import finite
from lib.ranks import my_rank
from model import FactorizedLinear
from tools import machine, plan, plot, sample


class Journal:
    """Prints the plan of a run; then writes and prints a record for each logged step. log(record) appends to
    log.jsonl. The speed is counted from the record before."""

    def __init__(self, c, model, method, topics: dict, log, step: int, seconds: float):
        self.c, self.model, self.method, self.log = c, model, method, log
        self.step_before, self.seconds_before = step, seconds
        rank, ranks = my_rank()
        peak = machine.peak_flops(torch.cuda.get_device_name()) if c.device == "cuda" else None
        self.peak = peak and peak * ranks  # FLOPs per second of all GPUs; None where not known
        low_rank = isinstance(block_matrices(model)[c.spectra_of], FactorizedLinear)
        self.gauge = "gauge" if low_rank and method.bounded(c) else "dW/lr"  # of the logged matrix
        self.val_tokens = []  # of each validation
        if rank == 0:
            say(plan.describe(c, model, method, topics, ranks))

    def step(self, step: int, flops: int, seconds: float, loss: float, scores: dict, norms: dict) -> None:
        """Logs a step, and has its line ready for show(). scores are those of eval.validate, empty where the
        step was not validated; norms are those of lib.norms.Spectra."""
        c, done = self.c, step - self.step_before
        val_loss, val_tokens = scores.get("val_loss"), scores.get("val_tokens")
        self.val_tokens += [val_tokens] if scores else []
        self.log({"step": step, "tokens": step * c.tokens_per_step, "flops": flops,
                  "seconds": round(seconds, 3), "loss": finite(loss), "val_loss": val_loss,
                  "val_tokens": val_tokens, **norms, **self.method.logged(self.model)})
        speed = done * c.tokens_per_step / (seconds - self.seconds_before)  # tokens per second
        mfu = ""
        if self.peak:
            mfu = f"MFU {speed * self.method.flops_per_token(self.model) / self.peak:>5.1%}  "
        self.step_before, self.seconds_before = step, seconds
        self.line = (
            f"step {step:>6}/{c.steps}  loss {column(finite(loss))}  val {column(val_loss)}  "
            f"lr {norms['lr']:.2e}  {self.gauge} {column(norms['gauge'])}  {speed:>9,.0f} tok/s  {mfu}"
            f"{hours((min(c.steps, c.stop_at or c.steps) - step) * c.tokens_per_step / speed)} left")

    def show(self) -> None:
        """Prints the line of the step. It comes after the log and the checkpoint: a terminal may hang."""
        say(self.line)

    def diverged(self, step: int, fraction: float, loss: float) -> dict:
        """A gradient or a loss was not finite. With --on_nonfinite record this is logged and returned;
        otherwise UserError."""
        name = next((n for n, p in self.model.named_parameters() if not p.grad.isfinite().all()), "none")
        cause = (f"non-finite gradient at step {step}, lr {fraction * self.c.lr:.3g}, loss {loss:.4g}; the "
                 f"first parameter that has one: {name}. No weight was touched, and a checkpoint that was "
                 "saved is whole. Start again with a lower --lr")
        if self.c.on_nonfinite == "stop":
            raise UserError(cause)
        if self.log:
            self.log({"step": step, "diverged": cause})
        return {"diverged": cause}

    def end(self, step: int, seconds: float, scores: dict, tokenizer) -> None:
        """A figure, a sample of text, and what came of the run: scores has the final losses, or "diverged"
        with its cause."""
        c, out = self.c, Path(self.c.out)
        if step:
            plot.figure([out], out / "loss.png")
        say("---")
        if step < c.steps and "diverged" not in scores:
            say(f"stopped after step {step} of {c.steps}. Go on: python train.py --resume "
                f"--out {shlex.quote(str(out))}")
        elif tokenizer and scores.get("val_loss") is not None:
            steps = sample.generate(self.model, [tokenizer.eot_token], 200, seed=c.seed,
                                    vocab=tokenizer.n_vocab)
            text = "".join(piece for piece, in sample.texts(tokenizer, steps, 1))
            say(f"sample:\n{text}\n---")
        results = {"step": step, "seconds": seconds, **scores, "log": out / "log.jsonl"}
        if len(set(self.val_tokens)) > 1:
            results["val_tokens"] = f"{self.val_tokens[-1]} ({self.val_tokens[0]} in the validations before)"
        results |= {key: out / file for key, file in (("checkpoint", "ckpt.pt"), ("figure", "loss.png"))
                    if (out / file).exists()}
        say("\n".join(f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}"
                      for key, value in results.items()))


def column(x: float | None) -> str:
    return "      -" if x is None else f"{x:7.4f}"
