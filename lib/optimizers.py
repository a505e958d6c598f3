"""AdamW and Muon, for what Spectron does not train: dense matrices, embedding, head and norms."""

import torch

from spectron import Spectron, newton_schulz


def adamw(params, lr, c, entries=()):
    """AdamW for these parameters. Matrices are decayed, and so are `entries` of a matrix that are kept as a
    vector; the gains of the norms are not."""
    kept = {id(p) for p in entries}
    groups = [dict(params=[p for p in params if p.ndim > 1 or id(p) in kept], weight_decay=c.weight_decay),
              dict(params=[p for p in params if p.ndim < 2 and id(p) not in kept], weight_decay=0.0)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95),
                             fused=params[0].device.type in ("cpu", "cuda") or None)


class Muon(torch.optim.Optimizer):
    """Muon for dense matrices, with the steps of torch.optim.Muon. That one always multiplies in bfloat16: on
    a CPU without bfloat16 hardware it is 28 times slower."""

    def __init__(self, params, ns_dtype=None, **settings):
        super().__init__(params, settings)
        self.ns_dtype = ns_dtype

    momentum = Spectron.momentum

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # on a GPU, which waits for each small product, matrices of one shape are one batch
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                alike.setdefault(p.shape if p.is_cuda else p, []).append(p)
            for matrices in alike.values():
                self.update(matrices, group)

    def update(self, matrices, group):
        """One step of k matrices of one shape (m, n)."""
        (m, n), M = matrices[0].shape, self.momentum(matrices, group)
        O = newton_schulz(M.squeeze(0).to(self.ns_dtype or M.dtype), group["ns_steps"]).to(M.dtype)
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, O.expand_as(M).unbind(), alpha=-group["lr"] * max(1, m / n) ** 0.5)


def muon(params, lr, c):
    return Muon(params, torch.bfloat16 if c.dtype == "bfloat16" else None, lr=lr, momentum=c.momentum,
                nesterov=c.nesterov, ns_steps=c.ns_steps, weight_decay=c.weight_decay)
