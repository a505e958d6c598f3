"""A Llama whose matrices exist only as factors, W = A @ B.T, and the twelve sizes of the paper's Table 5.
Shapes in comments: B batch, T time, D width, H heads, V vocabulary; m out features, n in features, r rank.
"""

import math
import warnings
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture, which decides every parameter count. rank_ratio None means dense weights."""
    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int = 50304  # gpt2's 50,257, padded up to a multiple of 64
    seq_len: int = 2048
    rank_ratio: float | None = 0.25
    factorize: str = "all"  # all: the seven matrices of a block; ffn: gate, up and down only

    @property
    def ffn_dim(self) -> int:
        """Width of the SwiGLU: 8 D / 3, up to a multiple of 256."""
        return 256 * math.ceil(8 * self.dim / 3 / 256)


# Table 5, under the nominal number of parameters of the dense model: width, layers, heads.
SIZES = {
    "60M": LlamaConfig(512, 8, 8), "92M": LlamaConfig(640, 10, 10), "134M": LlamaConfig(768, 12, 12),
    "150M": LlamaConfig(768, 14, 12), "220M": LlamaConfig(896, 16, 14), "325M": LlamaConfig(1024, 20, 16),
    "500M": LlamaConfig(1280, 20, 20), "780M": LlamaConfig(1536, 24, 24), "835M": LlamaConfig(1536, 26, 24),
    "1.4B": LlamaConfig(2048, 24, 16), "1.7B": LlamaConfig(2048, 30, 16), "2.7B": LlamaConfig(2560, 32, 20)}
ALIASES = {"S": "134M", "M": "500M", "L": "780M"}  # the three of Table 4
# For laptops, on bytes: by the number of parameters of the dense model, and two layers of many widths.
nano = partial(LlamaConfig, vocab_size=320, seq_len=256)
NANO_SIZES = {"nano-0.6M": nano(128, 2, 2), "nano-1.5M": nano(192, 3, 3), "nano": nano(256, 4, 4),
              "nano-7.3M": nano(384, 4, 6)}
for width in 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384:
    NANO_SIZES[f"nano-2x{width}"] = nano(width, 2, math.ceil(width / 32))
SIZES |= NANO_SIZES | {alias: SIZES[name] for alias, name in ALIASES.items()}


# --------------------------------------------- Low-rank weights ---------------------------------------------

def rank_of(rank_ratio: float, in_features: int, out_features: int) -> int:
    """The paper's rule: rank_ratio times the *input* width (Appendix B.2). ValueError outside (0, 1]."""
    if not 0 < rank_ratio <= 1:
        raise ValueError(f"rank_ratio is {rank_ratio}, and has to be in (0, 1]")
    return max(1, min(int(rank_ratio * in_features), in_features, out_features))


def spectral_factors(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (m, r), B (n, r): the truncated SVD of W (m, n), A = U_r sqrt(S_r) and B = V_r sqrt(S_r). It is taken
    from the eigenvectors of the smaller Gram matrix, which costs a fraction of LAPACK's SVD."""
    if W.size(0) > W.size(1):
        return spectral_factors(W.T, rank)[::-1]
    U = torch.linalg.eigh(W @ W.T)[1][:, -rank:].flip(1)  # (m, r); eigh sorts upwards
    U = U * torch.where(U.sum(0) < 0, -1, 1)  # an eigenvector has two signs: always take the same one
    V = W.T @ U  # (n, r) = V_r S_r
    S = torch.linalg.vector_norm(V, dim=0)
    absent = S <= 1e-6 * S[0]  # where the rank of W ends: one factor is zero, not both, so that they can move
    root = S.masked_fill(absent, 1).sqrt()
    return U * root, (V / root).masked_fill(absent, 0)


class FactorizedLinear(nn.Module):
    """y = W x + bias for W = A @ B.T, A (m, r), B (n, r). No m x n tensor is formed, forward or backward."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Parameter(torch.empty(out_features, rank))
        self.B = nn.Parameter(torch.empty(in_features, rank))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        if not self.A.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Spectral initialization from nn.Linear's own draw, U(-1/sqrt(n), 1/sqrt(n))."""
        W = torch.empty(self.out_features, self.in_features, device=self.A.device).uniform_(-1, 1)
        self.set_weight(W / self.in_features**0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def set_weight(self, W: Tensor) -> None:
        """The best factors of this rank for W (m, n). They are computed in float64, so that one draw gives
        the same factors on any number of threads, on the device of W where it can (mps has no float64)."""
        A, B = spectral_factors((W.cpu() if W.device.type == "mps" else W).double(), self.rank)
        self.A.copy_(A)
        self.B.copy_(B)

    def forward(self, x: Tensor) -> Tensor:  # (..., n) -> (..., m)
        return F.linear(F.linear(x, self.B.T), self.A, self.bias)

    @property
    def weight(self) -> Tensor:
        """W (m, n), for modules that read the weight of their nn.Linear. It cannot be set."""
        return self.product().to(self.A.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """X (m, k) and Y (n, k), of which W is the product X Y^T."""
        return self.A, self.B

    def product(self) -> Tensor:
        """W (m, n), in float64: for export, never for training."""
        X, Y = self.factors()
        return X.double() @ Y.double().T


def factorize_(module: nn.Module, rank_ratio: float, skip=()) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Replace every nn.Linear inside any module, in place, from its own weights, but for the names in `skip`.
    Biases stay, and frozen layers stay frozen. Returns the (A, B) pairs for Spectron. ValueError, nothing
    replaced, where a layer cannot be, or `skip` names none; a warning for other kinds, which stay dense."""
    layers = {name: layer for name, layer in module.named_modules(remove_duplicate=False)
              if type(layer) is nn.Linear}
    for name in {skip} if isinstance(skip, str) else set(skip):
        if not layers.pop(name, None):
            raise ValueError(f"skip: no nn.Linear of {type(module).__name__} is {name!r}: see named_modules")
    kinds = sorted({type(layer).__name__ for layer in module.modules() if type(layer) is not nn.Linear
                    and (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D")})
    if not layers or "" in layers:
        raise ValueError(f"no nn.Linear inside {type(module).__name__} (to replace one alone, wrap it in "
                         f"nn.Sequential); other kinds: {', '.join(kinds) or 'none'}")
    users = [id(p) for child in module.modules() for p in child.parameters(recurse=False)]
    bad = [name for name, layer in layers.items() if users.count(id(layer.weight)) > 1
           or layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks]
    if bad:
        raise ValueError(f"a tied weight, or a hook, would be lost. Leave those layers dense: skip={bad}")
    if kinds:
        warnings.warn(f"factorize_ replaces nn.Linear alone; dense stay {', '.join(kinds)}")
    made = {layer: low_rank(layer, rank_ratio) for layer in layers.values()}  # one for a layer used twice
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, made[layer])
    return [(new.A, new.B) for new in made.values()]


def low_rank(old: nn.Linear, rank_ratio: float) -> FactorizedLinear:
    n, m = old.in_features, old.out_features
    with torch.device("meta"):
        new = FactorizedLinear(n, m, rank_of(rank_ratio, n, m)).to(old.weight.dtype)
    new.to_empty(device=old.weight.device).set_weight(old.weight)
    new.bias = old.bias
    new.A.requires_grad = new.B.requires_grad = old.weight.requires_grad
    return new


# -------------------------------------------------- Llama ---------------------------------------------------

def rope_table(seq_len: int, head_dim: int, theta: float = 10000.0) -> Tensor:
    """cos and sin of position times frequency, (2, T, head_dim / 2)."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float64, device="cpu"), frequency)
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE: turns the pair (x_i, x_{i + head_dim/2}) of x (B, H, T, head_dim) by its angle."""
    cos, sin = rope.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


causal_attention = partial(F.scaled_dot_product_attention, is_causal=True)  # q, k, v (B, H, T, head_dim) -> y


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, linear):
        super().__init__()
        D, self.n_heads = config.dim, config.n_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(D, D) for _ in range(4))

    def forward(self, x: Tensor, rope: Tensor, attend) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, T, D / H)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        y = attend(rotate(q, rope), rotate(k, rope), v)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, config: LlamaConfig, linear):
        super().__init__()
        self.gate_proj, self.up_proj = (linear(config.dim, config.ffn_dim) for _ in range(2))
        self.down_proj = linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, attention_linear, ffn_linear):
        super().__init__()
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(config.dim, eps=1e-5) for _ in range(2))
        self.attention, self.ffn = Attention(config, attention_linear), SwiGLU(config, ffn_linear)

    def forward(self, x: Tensor, rope: Tensor, attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, attend)
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """The paper's decoder: RMSNorm, RoPE, multi-head attention, SwiGLU, no biases, untied embedding and head.
    `linear(in_features, out_features, rank)` makes the matrices of the blocks that the config does not make
    dense. The embedding and the head are dense."""

    def __init__(self, config: LlamaConfig, linear=FactorizedLinear):
        super().__init__()
        if config.dim % (2 * config.n_heads):
            raise ValueError(f"dim {config.dim} does not divide into {config.n_heads} heads of even width")
        self.config, dense = config, partial(nn.Linear, bias=False)

        def factorized(n, m):
            return linear(n, m, rank_of(config.rank_ratio, n, m))

        ffn_linear = dense if config.rank_ratio is None else factorized
        attention_linear = ffn_linear if config.factorize == "all" else dense
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, attention_linear, ffn_linear)
                                    for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.head = dense(config.dim, config.vocab_size)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        self.register_buffer("rope", rope_table(config.seq_len, config.dim // config.n_heads),
                             persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V). With targets (B, T): their mean cross-entropy, in nats."""
        logits = self.head(self.hidden(tokens))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, attends=None) -> Tensor:
        """The activations that the head reads, (B, T, D). positions (T,) are the places of the tokens in the
        text: 0 to T - 1. attends is a function like causal_attention for each block, where a cache enters."""
        x = self.embedding(tokens)
        rope = self.rope[:, :tokens.size(1)] if positions is None else self.rope[:, positions]
        for block, attend in zip(self.blocks, attends or [causal_attention] * len(self.blocks)):
            x = block(x, rope, attend)
        return self.norm(x)

    def factor_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:  # in the order of the modules
        return [(layer.A, layer.B) for layer in self.modules() if isinstance(layer, FactorizedLinear)]
