"""A Llama whose matrices exist only as factors, W = A @ B.T, and the twelve sizes of the paper's Table 5.

Shapes in comments: B batch, T time, D width, H heads, V vocabulary; m out features, n in features, r rank.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import LowRankSwiGLU, RMSNorm, Rotate, causal_attention, cross_entropy


FEW_ROWS = 64  # below which the factors of q, k and v are not put side by side
SAVE_MEMORY_FROM = 2**22  # elements of an FFN's activation on a CPU, from which it is made twice and not kept


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture, and with it every parameter count. rank_ratio None means dense weights."""
    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int = 50304  # gpt2's 50,257, padded up to a multiple of 64
    seq_len: int = 2048
    rank_ratio: float | None = 0.25
    factorize: str = "all"  # all: the seven matrices of a block; ffn: gate, up and down only

    @property
    def hidden(self) -> int:
        """Width of the SwiGLU: 8 D / 3, up to a multiple of 256."""
        return 256 * math.ceil(8 * self.dim / 3 / 256)


# Table 5, under the nominal number of parameters of the dense model.
SIZES = {name: LlamaConfig(dim, n_layers, n_heads) for name, dim, n_layers, n_heads in [
    ("60M", 512, 8, 8), ("92M", 640, 10, 10), ("134M", 768, 12, 12), ("150M", 768, 14, 12),
    ("220M", 896, 16, 14), ("325M", 1024, 20, 16), ("500M", 1280, 20, 20), ("780M", 1536, 24, 24),
    ("835M", 1536, 26, 24), ("1.4B", 2048, 24, 16), ("1.7B", 2048, 30, 16), ("2.7B", 2560, 32, 20)]}
# For laptops, on bytes: nano, and its neighbours under their number of parameters with dense weights.
NANO_SIZES = {name: LlamaConfig(dim, n_layers, n_heads, vocab_size=320, seq_len=256)
              for name, dim, n_layers, n_heads in [("nano-0.6M", 128, 2, 2), ("nano-1.5M", 192, 3, 3),
                                                   ("nano", 256, 4, 4), ("nano-7.3M", 384, 4, 6)]}
SIZES.update(NANO_SIZES)
ALIASES = {"S": "134M", "M": "500M", "L": "780M"}  # the three of Table 4
SIZES.update({alias: SIZES[name] for alias, name in ALIASES.items()})


########################################
#          Low-rank weights            #
########################################

def rank_of(rank_ratio: float, in_features: int, out_features: int) -> int:
    """The paper's rule: rank_ratio times the *input* width (Appendix B.2). ValueError for a ratio outside
    (0, 1]."""
    if not 0 < rank_ratio <= 1:
        raise ValueError(f"rank_ratio is {rank_ratio}, and has to be in (0, 1]")
    return max(1, min(int(rank_ratio * in_features), in_features, out_features))


def spectral_factors(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (m, r), B (n, r) with A @ B.T the best rank-r approximation of W (m, n), and
    ||A_i|| = ||B_i|| = sqrt(S_i).

    The truncated SVD of Khodak et al. 2021, from the eigenvectors of the smaller Gram matrix: several times
    faster than LAPACK's full SVD, and as close to W in norm.
    """
    if W.size(0) > W.size(1):
        B, A = spectral_factors(W.T, rank)
        return A, B
    U = torch.linalg.eigh(W @ W.T)[1][:, -rank:].flip(1)  # (m, r); eigh sorts upwards
    U = U * torch.where(U.sum(0) < 0, -1, 1)  # of the two signs always the same
    V = W.T @ U  # (n, r) = V_r S_r
    root = torch.linalg.vector_norm(V, dim=0).clamp_min(torch.finfo(W.dtype).tiny).sqrt()
    return U * root, V / root


def spectral_draw(in_features: int, out_features: int, rank: int) -> tuple[Tensor, Tensor]:
    """The spectral_factors of a random weight, drawn without it: A (m, r), B (n, r), on the CPU.

    The singular vectors of a matrix of independent entries of variance 1 / (3 n), as nn.Linear's, point
    anywhere, and where it is large its singular values follow the law of Marchenko and Pastur (1967).
    Hundreds of decompositions of full matrices, which took minutes at size L, become QRs of tall ones.
    """
    small, large = sorted((in_features, out_features))
    low, high = ((1 + sign * (small / large) ** 0.5) ** 2 for sign in (-1, 1))
    x = torch.linspace(high, low, 100_000, dtype=torch.float64, device="cpu")[1:-1]  # eigenvalues, downwards
    share = (((x - low) * (high - x)).sqrt() / x).cumsum(0)
    middle = (torch.arange(rank, dtype=torch.float64, device="cpu") + 0.5) / small
    S = (x[torch.searchsorted(share / share[-1], middle)] * large / (3 * in_features)).sqrt().float()
    return tuple(_orthonormal(rows, rank) * S.sqrt() for rows in (out_features, in_features))


def _orthonormal(rows: int, columns: int) -> Tensor:
    """Columns in no direction more than another: Q of a Gaussian matrix, of the two signs always the same."""
    Q, R = torch.linalg.qr(torch.randn(rows, columns, device="cpu"))
    return Q * R.diagonal().sign()


def uniform_weight(in_features: int, out_features: int) -> Tensor:
    """U(-1/sqrt(n), 1/sqrt(n)) of shape (m, n), as nn.Linear; on the CPU, so that a seed means the same
    everywhere."""
    return torch.empty(out_features, in_features, device="cpu").uniform_(-1, 1) / in_features**0.5


class FactorizedLinear(nn.Module):
    """y = x @ (A @ B.T).T + bias as (x @ B) @ A.T: A (m, r), B (n, r), and no m x n tensor, forward or
    backward."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Parameter(torch.empty(out_features, rank))
        self.B = nn.Parameter(torch.empty(in_features, rank))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        if not self.A.is_meta:
            self.set_factors(*spectral_draw(in_features, out_features, rank))

    @torch.no_grad()
    def set_factors(self, A: Tensor, B: Tensor) -> None:
        self.A.copy_(A)
        self.B.copy_(B)

    def set_weight(self, W: Tensor) -> None:
        """Spectral initialisation: the factors of the best approximation of W (m, n)."""
        device = "cpu" if self.A.device.type == "mps" else self.A.device  # mps has no eigh
        self.set_factors(*spectral_factors(W.detach().to(device, torch.float64), self.rank))

    def forward(self, x: Tensor) -> Tensor:  # (..., n) -> (..., m)
        return F.linear(F.linear(x, self.B.T), self.A, self.bias)

    def product(self) -> Tensor:
        """W = A B^T (m, n), in float64: for export, never for training."""
        return self.A.double() @ self.B.double().T

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


def side_by_side(layers: list[nn.Module], x: Tensor) -> list[Tensor]:
    """[layer(x) for layer in layers], low-rank ones with their B factors in one product, past their hooks.

    Not for the few rows of decoding, which would wait for the factors to be copied.
    """
    few = x.numel() < FEW_ROWS * x.size(-1)
    if few or not all(type(layer) is FactorizedLinear for layer in layers):
        return [layer(x) for layer in layers]
    z = F.linear(x, torch.cat([layer.B for layer in layers], dim=1).T)
    return [F.linear(part, layer.A, layer.bias)
            for part, layer in zip(z.split([layer.rank for layer in layers], -1), layers)]


def factorize_(module: nn.Module, rank_ratio: float) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Replace every nn.Linear inside any module, in place and from its own weights; returns the pairs for
    Spectron.

    Biases stay as they are, frozen layers frozen. Not for modules that read their Linear's weight themselves,
    as nn.TransformerEncoderLayer does in evaluation mode. ValueError for a module that is itself a Linear,
    and for weights that are tied to another module's: pass the part of the model that holds neither.
    """
    if type(module) is nn.Linear:
        raise ValueError("factorize_ works on the module that holds a Linear, not on the Linear: wrap it")
    linears = [(path, layer) for path, layer in module.named_modules(remove_duplicate=False)
               if type(layer) is nn.Linear]
    users = [id(p) for child in module.modules() for p in child.parameters(recurse=False)]
    for path, layer in linears:
        if users.count(id(layer.weight)) > 1:
            raise ValueError(f"the weight of {path} is tied to another module's: pass a part of the model "
                             "without it")
    made = {}
    for path, old in linears:  # a layer that is used twice stays one layer
        if old not in made:
            made[old] = _factorized(old, rank_ratio)
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, made[old])
    return [(new.A, new.B) for new in made.values()]


def _factorized(old: nn.Linear, rank_ratio: float) -> FactorizedLinear:
    n, m = old.in_features, old.out_features
    with torch.device("meta"):
        new = FactorizedLinear(n, m, rank_of(rank_ratio, n, m), bias=old.bias is not None)
    new.to(old.weight.dtype).to_empty(device=old.weight.device)
    new.set_weight(old.weight)
    new.bias = old.bias
    for p in (new.A, new.B):
        p.requires_grad = old.weight.requires_grad
    return new


########################################
#                Llama                 #
########################################

def rope_table(seq_len: int, head_dim: int, theta: float = 10000.0) -> Tensor:
    """cos and sin of position times frequency, (2, T, head_dim), each frequency once per half, in the first
    half with -sin (rotate-half layout)."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float64, device="cpu"), frequency)
    return torch.stack([angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], dim=1)]).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE: turns the pair (x_i, x_{i + head_dim/2}) of x (B, H, T, head_dim) by its angle; rope is the rows
    of rope_table at x's positions, (2, T, head_dim) or (2, B, 1, T, head_dim)."""
    return Rotate.apply(x, *rope.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, linear):
        super().__init__()
        self.n_heads = config.n_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            linear(config.dim, config.dim) for _ in range(4))

    def forward(self, x: Tensor, rope: Tensor, attend=causal_attention) -> Tensor:
        B, T, D = x.shape
        q, k, v = (y.view(B, T, self.n_heads, -1).transpose(1, 2)  # (B, H, T, D / H)
                   for y in side_by_side([self.q_proj, self.k_proj, self.v_proj], x))
        y = attend(rotate(q, rope), rotate(k, rope), v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, D))


class SwiGLU(nn.Module):
    def __init__(self, config: LlamaConfig, linear):
        super().__init__()
        self.gate_proj, self.up_proj = linear(config.dim, config.hidden), linear(config.dim, config.hidden)
        self.down_proj = linear(config.hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        wide = x.numel() // x.size(-1) * gate.out_features
        plain = all(type(w) is FactorizedLinear and w.bias is None for w in (gate, up, down))
        if x.device.type == "cpu" and wide >= SAVE_MEMORY_FROM and plain and gate.rank == up.rank:
            factors = torch.cat([gate.B, up.B], dim=1), gate.A, up.A, down.B, down.A
            return LowRankSwiGLU.apply(x.flatten(0, -2), *(w.to(x.dtype) for w in factors)).view(x.shape)
        gate, up = side_by_side([gate, up], x)
        return down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, attention_linear, ffn_linear):
        super().__init__()
        self.attention_norm, self.attention = (RMSNorm(config.dim, eps=1e-5),
                                               Attention(config, attention_linear))
        self.ffn_norm, self.ffn = RMSNorm(config.dim, eps=1e-5), SwiGLU(config, ffn_linear)

    def forward(self, x: Tensor, rope: Tensor, attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, attend)
        return x + self.ffn(self.ffn_norm(x))


def _drawn(draw, *shape: int) -> Tensor:
    """draw(*shape) on the default device; where that is meta, nothing is drawn."""
    device = torch.get_default_device()
    return torch.empty(shape) if device.type == "meta" else draw(*shape).to(device)


def _dense(n: int, m: int, draw) -> nn.Linear:
    layer = nn.Linear(n, m, bias=False, device="meta")  # without torch's own draw
    layer.weight = nn.Parameter(_drawn(draw, m, n))
    return layer


class Llama(nn.Module):
    """The paper's decoder: RMSNorm, RoPE, multi-head attention, SwiGLU, no biases, untied embedding and head.

    Inside the blocks every matrix is a `linear`, called with (in_features, out_features, rank), or an
    nn.Linear where the config says dense; embedding and head are dense. torch.manual_seed before building it
    decides the weights, whatever the device.
    """

    def __init__(self, config: LlamaConfig, linear=FactorizedLinear):
        super().__init__()
        if config.dim % (2 * config.n_heads):
            raise ValueError(f"dim {config.dim} does not divide into {config.n_heads} heads of even width")
        self.config = config

        V, D = config.vocab_size, config.dim

        def factorized(n, m):
            return linear(n, m, rank_of(config.rank_ratio, n, m))

        def dense(n, m):
            return _dense(n, m, lambda m, n: uniform_weight(n, m))

        def normal(rows, columns):
            return torch.empty(rows, columns, device="cpu").normal_(std=0.02)

        ffn_linear = dense if config.rank_ratio is None else factorized
        attention_linear = ffn_linear if config.factorize == "all" else dense
        # with _weight, torch does not import a second's worth of modules to draw on meta
        self.embedding = nn.Embedding(V, D, _weight=_drawn(normal, V, D))
        self.blocks = nn.ModuleList(Block(config, attention_linear, ffn_linear)
                                    for _ in range(config.n_layers))
        self.norm = RMSNorm(D, eps=1e-5)
        self.head = _dense(D, V, normal)
        rope, device = rope_table(config.seq_len, D // config.n_heads), torch.get_default_device()
        # real even on meta, where load_state_dict(assign=True) brings everything else
        self.register_buffer("rope", rope if device.type == "meta" else rope.to(device), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V); with targets (B, T), their mean cross-entropy in nats
        instead."""
        logits = self.head(self.hidden(tokens))
        return logits if targets is None else cross_entropy(logits.flatten(0, 1), targets.flatten())

    def hidden(self, tokens: Tensor, positions=None, attends=None) -> Tensor:
        """What the head reads, (B, T, D), of tokens (B, T).

        positions, (T,) or (B, 1, T), are those of the tokens, where not 0 to T - 1; attends, a function
        (q, k, v) -> y of (B, H, T, head_dim) for each block, stands for causal_attention.
        """
        x = self.embedding(tokens)
        rope = self.rope[:, slice(tokens.size(1)) if positions is None else positions]
        for block, attend in zip(self.blocks, attends or [causal_attention] * len(self.blocks), strict=True):
            x = block(x, rope, attend)
        return self.norm(x)

    def factor_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(A, B) of every factorized matrix, in the order of the modules."""
        return [(layer.A, layer.B) for layer in self.modules() if isinstance(layer, FactorizedLinear)]

    def flops_per_token(self) -> int:
        """Executed matmul FLOPs of one token, forward and backward: 6 per weight but the embedding's, and
        attention. What a layer calls idle is left out.

        Attention is counted causally, as half of the T x T scores: 6 * n_layers * T * D.
        """
        weights = sum(p.numel() for p in self.parameters()) - self.embedding.weight.numel()
        weights -= sum(getattr(layer, "idle", 0) for layer in self.modules())
        return 6 * weights + 6 * self.config.n_layers * self.config.seq_len * self.config.dim


def block_matrices(model: Llama) -> dict[str, nn.Module]:
    """The seven linear layers of each block, factorized or dense, under their names in the model."""
    return {name: layer for name, layer in model.named_modules()
            if name.startswith("blocks.") and isinstance(layer, (nn.Linear, FactorizedLinear))}


def split_parameters(model: Llama):
    """(factor pairs, dense matrices of the blocks, all others: embedding, head, norms), which wants three
    optimizers."""
    pairs = model.factor_pairs()
    dense = [layer.weight for layer in block_matrices(model).values() if isinstance(layer, nn.Linear)]
    taken = {id(p) for p in [*dense, *(p for pair in pairs for p in pair)]}
    return pairs, dense, [p for p in model.parameters() if id(p) not in taken]


def count_parameters(config: LlamaConfig) -> int:
    """Parameters of a model, embedding and head included, without making it."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())
