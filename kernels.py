"""The slow lines of model.py, again, by fewer passes over memory; each is tested equal to the plain one.

On two CPU cores a training step moves more bytes than it multiplies. results/bench/NOTES.md has what each is worth.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d), causal) v for q, k, v (B, H, T, d), by torch's flash attention.

    On a CPU in bfloat16 its backward is replaced: torch's takes 1.5 to 2 times as long as products of blocks.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return BlockAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class BlockAttention(torch.autograd.Function):
    """Backward by blocks of keys: P = exp(S - lse) again, dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)).

    The two row vectors are subtracted inside the products, as two more columns each (high and low half).
    """
    BLOCK = 256

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):
        shape, scale = d_out.shape, d_out.size(-1) ** -0.5
        q, k, v, out, lse, d_out = (x.flatten(0, 1) for x in (*ctx.saved_tensors, d_out))  # (B H, T, d)
        T, d = q.shape[1:]
        rows_q = _with_columns(q * scale, -lse.unsqueeze(-1))
        rows_o = _with_columns(d_out, -(d_out * out).sum(-1, keepdim=True, dtype=torch.float32))
        k1, v1 = (F.pad(x, (0, 2), value=1.0) for x in (k, v))
        later = torch.ones(BlockAttention.BLOCK, BlockAttention.BLOCK, dtype=torch.bool).tril(-1)
        dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        for i in range(0, T, BlockAttention.BLOCK):
            block = slice(i, i + BlockAttention.BLOCK)  # of keys, each with the queries from i on
            P = torch.bmm(k1[:, block], rows_q[:, i:].mT).exp_()  # transposed: a row is a key
            P[:, :, :P.size(1)].masked_fill_(later[:P.size(1), :P.size(1)], 0)
            torch.bmm(P, d_out[:, i:], out=dv[:, block])
            dS = torch.bmm(v1[:, block], rows_o[:, i:].mT).mul_(P)
            torch.bmm(dS, rows_q[:, i:, :d], out=dk[:, block])
            dq[:, i:] += torch.bmm(dS.mT, k[:, block])
        return tuple(x.view(shape) for x in (dq.mul_(scale), dk, dv))


def _with_columns(x: Tensor, row: Tensor) -> Tensor:
    high = row.to(x.dtype)
    return torch.cat([x, high, (row - high).to(x.dtype)], dim=-1)


class RMSNorm(torch.nn.RMSNorm):
    """nn.RMSNorm with its result in autocast's dtype, and on a CPU with fewer passes over x."""

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if device == "cpu":
            return _RMSNorm.apply(x, self.weight, self.eps, dtype)
        return super().forward(x).to(dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        D = x.size(-1)
        rstd = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / D + eps).rsqrt()
        ctx.save_for_backward(x, weight, rstd)
        return torch.mul(x * rstd, weight, out=torch.empty_like(x, dtype=dtype))

    @staticmethod
    def backward(ctx, d_out):
        x, weight, rstd = ctx.saved_tensors
        d_out = d_out.to(x.dtype)
        d_x, d_weight, _ = torch.ops.aten.native_layer_norm_backward(  # whose mean is put back after it
            d_out, x, weight.shape, torch.zeros_like(rstd), rstd, weight, None, [True, True, False])
        return d_x.addcmul_(rstd, (d_out @ weight).unsqueeze(-1), value=1 / x.size(-1)), d_weight, None, None


class Rotate(torch.autograd.Function):
    """x cos + swap(x) sin, swap exchanging the halves of the last dimension; backward turns the other way."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)

    @staticmethod
    def backward(ctx, d_out):
        cos, sin = ctx.saved_tensors
        return torch.addcmul(d_out * cos, d_out.roll(d_out.size(-1) // 2, -1), -sin), None, None


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (N, V), targets (N,), in fp32 for some rows at a time.

    Where a gradient is wanted it is written over the logits, so they are stored once and never whole in fp32.
    """
    return _CrossEntropy.apply(logits, targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets):
        total = torch.zeros((), device=logits.device)
        rows = max(1, 2**(24 if logits.device.type == "cpu" else 28) // logits.size(1))
        for x, y in zip(logits.split(rows), targets.unsqueeze(1).split(rows)):
            log_p = F.log_softmax(x, dim=1, dtype=torch.float32)
            total -= log_p.gather(1, y).sum()
            if ctx.needs_input_grad[0]:
                x.copy_(log_p.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=torch.float32)).div_(len(targets)))
        ctx.save_for_backward(logits)
        return total / len(targets)

    @staticmethod
    def backward(ctx, d_loss):
        return ctx.saved_tensors[0].mul_(d_loss), None
