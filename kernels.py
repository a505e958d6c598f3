"""The slow lines of model.py, again, by fewer passes over memory; each is tested against the plain one.

On two CPU cores a training step waits for memory more than for products. What each is worth:
results/bench/NOTES.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FP32_ELEMENTS = {"cpu": 2**20, "cuda": 2**28}  # of logits at a time: 4 MB, which a cache holds; 1 GB
BLOCK = 256  # keys at a time, in the backward of attention


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d), causal) v for q, k, v (B, H, T, d), by torch's flash attention.

    On a CPU in bfloat16 its backward is replaced: torch's takes up to 1.5 times as long as blocks do.
    They round S - lse to bfloat16: dq and dk have 1.5 to 3 times the rounding error of torch's.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return BlockAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class BlockAttention(torch.autograd.Function):
    """Backward by blocks of keys: P = exp(S - lse) again, dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)).

    The two row vectors are subtracted inside the products, as two more columns each (high and low half).
    """

    @staticmethod
    def forward(ctx, q, k, v):
        q = q * q.size(-1) ** -0.5  # here, so that backward finds the scores as they were rounded
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, is_causal=True, scale=1.0)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):
        shape = d_out.shape
        q, k, v, out, lse, d_out = (x.flatten(0, 1) for x in (*ctx.saved_tensors, d_out))  # (B H, T, d)
        T, d = q.shape[1:]
        rows_q = _with_columns(q, -lse.unsqueeze(-1))
        rows_o = _with_columns(d_out, -(d_out * out).sum(-1, keepdim=True, dtype=torch.float32))
        k1, v1 = (F.pad(x, (0, 2), value=1.0) for x in (k, v))
        later = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).tril(-1)
        dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        for i in range(0, T, BLOCK):
            block = slice(i, i + BLOCK)  # of keys, each with the queries from i on
            P = torch.bmm(k1[:, block], rows_q[:, i:].mT).exp_()  # transposed: a row is a key
            P[:, :, :P.size(1)].masked_fill_(later[:P.size(1), :P.size(1)], 0)
            torch.bmm(P, d_out[:, i:], out=dv[:, block])
            dS = torch.bmm(v1[:, block], rows_o[:, i:].mT).mul_(P)
            torch.bmm(dS, q[:, i:], out=dk[:, block])
            dq[:, i:] += torch.bmm(dS.mT, k[:, block])
        return tuple(x.view(shape) for x in (dq.mul_(d**-0.5), dk, dv))


def _with_columns(x: Tensor, row: Tensor) -> Tensor:
    high = row.to(x.dtype)
    return torch.cat([x, high, (row - high).to(x.dtype)], dim=-1)


class RMSNorm(torch.nn.RMSNorm):
    """nn.RMSNorm over the last dimension, with eps and gain; its result in autocast's dtype, and on a CPU by
    fewer passes over x."""

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if device == "cpu" and x.dtype in (torch.float32, torch.float64):
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


class LowRankSwiGLU(torch.autograd.Function):
    """(silu(x B_g A_g^T) * x B_u A_u^T) B_d A_d^T for x (N, n), B = [B_g B_u], keeping what is r wide.

    Backward makes the three wide activations again from z = x B, at r / n of what a dense layer would pay.
    """

    @staticmethod
    def forward(ctx, x, B, A_gate, A_up, B_down, A_down):
        z = x @ B
        h = _swiglu(z, A_gate, A_up)[-1] @ B_down
        ctx.save_for_backward(x, z, h, B, A_gate, A_up, B_down, A_down)
        return h @ A_down.T

    @staticmethod
    def backward(ctx, d_y):
        x, z, h, B, A_gate, A_up, B_down, A_down = ctx.saved_tensors
        gate, up, silu, wide = _swiglu(z, A_gate, A_up)
        d_h = d_y @ A_down
        d_wide, d_B_down = d_h @ B_down.T, wide.T @ d_h
        d_up = silu.mul_(d_wide)
        d_gate = torch.ops.aten.silu_backward(d_wide.mul_(up), gate)
        d_z = torch.cat([d_gate @ A_gate, d_up @ A_up], dim=1)
        z_gate, z_up = z.chunk(2, dim=1)
        return d_z @ B.T, x.T @ d_z, d_gate.T @ z_gate, d_up.T @ z_up, d_B_down, d_y.T @ h


def _swiglu(z, A_gate, A_up):
    z_gate, z_up = z.chunk(2, dim=1)
    gate, up = z_gate @ A_gate.T, z_up @ A_up.T
    silu = F.silu(gate)
    return gate, up, silu, silu * up


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (N, V), targets (N,) from 0 to V - 1; some rows at a time in fp32.

    Where a gradient is wanted it is written over the logits, so they are stored once and never whole in fp32:
    they are lost to the caller, and backward works once.
    """
    return _CrossEntropy.apply(logits, targets, logits.requires_grad and torch.is_grad_enabled())


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, differentiate):
        total = torch.zeros((), device=logits.device)
        rows = max(1, FP32_ELEMENTS.get(logits.device.type, 2**26) // logits.size(1))
        for x, y in zip(logits.split(rows), targets.unsqueeze(1).split(rows)):
            log_p = F.log_softmax(x, dim=1, dtype=torch.float32)
            total -= log_p.gather(1, y).sum()
            if differentiate:  # (softmax - one-hot) / N
                one = torch.ones((), device=y.device).expand(y.shape)
                x.copy_(log_p.exp_().scatter_add_(1, y, -one).div_(len(targets)))
        ctx.save_for_backward(logits)
        return total / len(targets)

    @staticmethod
    def backward(ctx, d_loss):
        return ctx.saved_tensors[0].mul_(d_loss), None, None
