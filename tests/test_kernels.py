"""Each kernel against the plain lines that it stands for: values and every gradient."""

import pytest
import torch
import torch.nn.functional as F

import kernels
import model
from model import FactorizedLinear, LlamaConfig, SwiGLU, rope_table, rotate, side_by_side


def gradients(function, inputs, d_out):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out.to(out.dtype))]


def distance(found, exact):
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("T", [1, 7, 256, 300, 600])
@pytest.mark.parametrize("size, d", [(1.0, 16), (6.0, 16), (3.0, 24), (3.0, 128)])
def test_attention_and_its_gradients_in_bfloat16_are_near_float64(T, size, d):
    """Up to the rounding of S - lse, P and dS, over one, some and broken blocks."""
    def plain(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    q, k, v, d_out = (torch.randn(2, T, 3, d).bfloat16().transpose(1, 2) * s for s in (size, size, 1, 1))
    exact = gradients(plain, [x.double() for x in (q, k, v)], d_out)
    if T == 1:  # one key: its probability is 1, whatever q and k are
        exact = [exact[0], *gradients(kernels.causal_attention, [q, k, v], d_out)[1:3], exact[3]]
    assert distance(gradients(kernels.causal_attention, [q, k, v], d_out), exact) < 0.03


def test_attention_survives_scores_that_overflow_where_they_are_masked():
    q = torch.zeros(1, 1, 4, 16).bfloat16()
    q[0, 0, 0], k = 100.0, torch.full_like(q, -100.0)
    k[0, 0, 3] = 100.0  # seen by the last query only; before the mask exp of it is infinite
    q, k, v = (x.requires_grad_() for x in (q, k, torch.ones_like(q)))
    kernels.causal_attention(q, k, v).sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_rms_norm_and_its_gradients(dtype, tolerance):
    x, gain, d_out = torch.randn(3, 5, 24) + 2, torch.rand(24) + 0.5, torch.randn(3, 5, 24)
    norm = kernels.RMSNorm(24, eps=1e-5)

    def ours(x, gain):
        return torch.func.functional_call(norm, {"weight": gain}, x)
    exact = gradients(lambda x, gain: F.rms_norm(x, (24,), gain, 1e-5), [x.double(), gain.double()], d_out)
    assert distance(gradients(ours, [x.to(dtype), gain.to(dtype)], d_out), exact) < tolerance


def test_rms_norm_under_autocast_gives_its_dtype_and_full_gradients():
    x, norm = torch.randn(4, 24, requires_grad=True), kernels.RMSNorm(24, eps=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and x.grad.dtype == norm.weight.grad.dtype == torch.float32


def test_rotate_turns_back_in_backward():
    rope, x, d_out = rope_table(6, 8).double(), torch.randn(2, 3, 6, 8).double(), torch.randn(2, 3, 6, 8)
    cos, sin = rope[:, :, :4]  # of the first half, where sin is stored as -sin

    def plain(x):
        x1, x2 = x.chunk(2, -1)
        return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], -1)
    assert distance(gradients(lambda x: rotate(x, rope), [x], d_out), gradients(plain, [x], d_out)) < 1e-12


@pytest.mark.parametrize("limit", [1, 150, 10**9])
def test_cross_entropy_in_chunks_equals_the_plain_one(limit, monkeypatch):
    monkeypatch.setitem(kernels.FP32_ELEMENTS, "cpu", limit)
    logits, targets, scale = torch.randn(13, 50) * 5, torch.randint(0, 50, (13,)), torch.tensor(0.3)
    exact = gradients(lambda x: F.cross_entropy(x, targets), [logits.double()], scale)
    assert distance(gradients(lambda x: kernels.cross_entropy(x * 1, targets), [logits], scale), exact) < 1e-6
    with torch.no_grad():
        kept = logits.clone()
        assert torch.isclose(kernels.cross_entropy(logits.requires_grad_(), targets).double(), exact[0])
        assert torch.equal(kept, logits)  # overwritten only where a gradient is wanted


def test_loss_never_holds_fp32_logits_whole(monkeypatch):
    monkeypatch.setitem(kernels.FP32_ELEMENTS, "cpu", 500)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,))
                           if torch.is_tensor(x) and x.dtype == torch.float32)
            return out
    logits = torch.randn(64, 50).bfloat16().requires_grad_()
    with Watch():
        kernels.cross_entropy(logits * 1, torch.zeros(64, dtype=torch.long)).backward()
    assert 0 < max(largest) <= 500


def test_layers_side_by_side_equal_each_alone():
    layers = [FactorizedLinear(24, m, r, bias=b) for m, r, b in ((16, 4, True), (24, 6, False), (8, 6, True))]
    x = torch.randn(2, 5, 24)
    for together, layer in zip(side_by_side(layers, x), layers, strict=True):
        assert torch.allclose(together, layer(x), atol=1e-6)


def test_swiglu_that_saves_memory_equals_the_plain_one(monkeypatch):
    ffn = SwiGLU(LlamaConfig(24, 1, 2), lambda n, m: FactorizedLinear(n, m, 5)).double()
    parameters = dict(ffn.named_parameters())
    x, d_out = torch.randn(2, 7, 24).double(), torch.randn(2, 7, 24)

    def run(x, *weights):
        return torch.func.functional_call(ffn, dict(zip(parameters, weights)), x)
    plain = gradients(run, [x, *parameters.values()], d_out)
    monkeypatch.setattr(model, "SAVE_MEMORY_FROM", 0)
    assert distance(gradients(run, [x, *parameters.values()], d_out), plain) < 1e-12
