"""Sixteen ways to look at what a method found, beyond its perplexity.

Our reconstruction of the sixteen metrics of "Beyond Perplexity" (arXiv 2605.13652), whose abstract names four
dimensions and not their members: the landscape around the weights, the paths between them, the spectra of W
and of its updates, and the activations beside a densely trained model's. Everything is over materialised
weights, so that one direction, or one path, means the same for every method. Weights are lists of tensors in
one order.
"""

import numpy as np
import torch
from torch import Tensor


# ------------------------------------------------ Landscape -------------------------------------------------

def random_direction(weights: list[Tensor], seed: int, normalised: bool = False) -> list[Tensor]:
    """Standard normal, of one size per entry; normalised: of each tensor's own norm."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(w.shape, generator=generator).to(w.device) for w in weights]
    return [d * w.norm() / d.norm() for d, w in zip(drawn, weights)] if normalised else drawn


def principal_direction(weights: list[Tensor], k: int, decomposed=None) -> list[Tensor]:
    """sigma_k u_k v_k^T of each matrix, the kth part of its SVD from 0, and zero for the gains of the norms.
    decomposed: what torch.linalg.svd has said of each matrix, to be used again for another k."""
    parts = decomposed or svd_of(weights)
    return [torch.zeros_like(w) if w.ndim < 2 or k >= len(part[1]) else
            part[1][k] * torch.outer(part[0][:, k], part[2][k]) for w, part in zip(weights, parts)]


def svd_of(weights: list[Tensor]) -> list:
    return [torch.linalg.svd(w, full_matrices=False) if w.ndim == 2 else None for w in weights]


def line(loss, weights: list[Tensor], direction: list[Tensor], offsets) -> list[float]:
    """loss(weights + x direction) for each offset x."""
    return [loss([w + x * d for w, d in zip(weights, direction)]) for x in offsets]


def grid(reach: float, half: int) -> list[float]:
    """An odd number of offsets, with zero exactly in the middle."""
    return [reach * i / half for i in range(-half, half + 1)]


def sharpness(losses) -> float:
    """How much higher the loss is on both sides than in the middle, on average over the offsets."""
    L, c = np.asarray(losses), len(losses) // 2
    return float(np.mean([(L[c + d] + L[c - d]) / 2 - L[c] for d in range(1, c + 1)]))


def average_variance(curves) -> float:
    """The variance between directions at each offset, averaged over the offsets."""
    return float(np.var(np.asarray(curves), axis=0).mean())


# ---------------------------------------------- Interpolation -----------------------------------------------

def barrier(losses) -> float:
    """How far the loss inside a path rises above the straight line between its ends; 0 or less without a
    barrier, as on every convex path. The authors take the mean of the ends, which counts a slope as a
    barrier."""
    chord = np.linspace(losses[0], losses[-1], len(losses))
    return float((np.asarray(losses) - chord)[1:-1].max())


def path(loss, start: list[Tensor], end: list[Tensor], points: int = 11) -> list[float]:
    return line(loss, start, [b - a for a, b in zip(start, end)], [i / (points - 1) for i in range(points)])


# ------------------------------------------------- Spectra --------------------------------------------------

def effective_rank(s: Tensor) -> float:
    """exp of the entropy of the singular values as shares."""
    p = s[s > 1e-12] / s[s > 1e-12].sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def stable_rank(s: Tensor) -> float:
    return float(s.square().sum() / s.max().square()) if s.max() > 0 else 0.0


def spectral_gap(s: Tensor) -> float:
    """(s1 - s2) / s1."""
    return float((s[0] - s[1]) / s[0]) if s[0] > 0 else 0.0


# ----------------------------------------------- Activations ------------------------------------------------

def cka(X: Tensor, Y: Tensor) -> float:
    """Linear centred kernel alignment of X (tokens, D) and Y (tokens, E): 1 up to rotation and scale."""
    X, Y = X.double() - X.double().mean(0), Y.double() - Y.double().mean(0)
    return float((Y.T @ X).norm() ** 2 / ((X.T @ X).norm() * (Y.T @ Y).norm()))


def distance(X: Tensor, Y: Tensor) -> float:
    """The mean length of the difference of two activations of a token."""
    return float((X - Y).norm(dim=-1).mean())


def relative_distance(X: Tensor, Y: Tensor) -> float:
    """That, over the mean length of X's."""
    return distance(X, Y) / float(X.norm(dim=-1).mean())


def cosine(X: Tensor, Y: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(X, Y, dim=-1).mean())
