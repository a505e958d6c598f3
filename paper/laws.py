"""Compute-optimal sizes from runs: the arithmetic of Section 6 and Appendix D.

A run is a model of N parameters that saw D tokens, cost C FLOPs and ended at a loss L. Approach 2 of Hoffmann
et al. 2022 fits a parabola in log N to the runs of each budget; its minimum is N_opt(C), and N_opt = k C^a is
fitted through the budgets. Approach 3 fits L = E + A / N^alpha + B / D^beta to all runs at once, from which a
= beta / (alpha + beta). It minimizes the *sum* of Huber losses: with their mean optimizers stop early.
"""

from dataclasses import dataclass, replace

import numpy as np

DELTA = 1e-3  # of the Huber loss, in log L
STUDIES = 400  # bootstraps, and simulated studies
PAPER = dict(E=1.777, A=1000.0, B=1000.0, alpha=0.398, beta=0.332)  # Eqs. 21 to 23
LEAST = np.array([-30, -30, np.log(0.01), 0.02, 0.02])  # of log A, log B, log E, alpha, beta
MOST = np.array([30, 30, 30, 2.0, 2.0])


@dataclass
class Points:
    """Runs, as arrays of one length."""
    N: np.ndarray
    D: np.ndarray
    C: np.ndarray
    L: np.ndarray

    def __getitem__(self, rows) -> "Points":
        return Points(self.N[rows], self.D[rows], self.C[rows], self.L[rows])

    def __len__(self) -> int:
        return len(self.N)


@dataclass
class Profile:
    """The parabola of one budget."""
    C: float
    points: Points
    coefficients: np.ndarray  # of (log N)^2, log N and 1

    @property
    def N(self) -> float:
        """Where the parabola is level."""
        return float(np.exp(-self.coefficients[1] / (2 * self.coefficients[0])))

    @property
    def inside(self) -> bool:
        """Whether that is a minimum, and between the smallest and the largest size."""
        return self.coefficients[0] > 0 and self.points.N.min() < self.N < self.points.N.max()

    @property
    def D(self) -> float:
        """The tokens there: between those of the sizes beside it, in logs."""
        order = self.points.N.argsort()
        return float(np.exp(np.interp(np.log(self.N), *np.log([self.points.N[order], self.points.D[order]]))))

    @property
    def L(self) -> float:
        return float(np.polyval(self.coefficients, np.log(self.N)))


def nearest(points: Points, budgets) -> np.ndarray:
    """For each run the index of its budget."""
    return np.abs(np.log(points.C)[:, None] - np.log(budgets)).argmin(1)


def profiles(points: Points, budgets) -> list[Profile]:
    """One for each budget that has runs of three sizes or more."""
    rows = [(C, points[nearest(points, budgets) == i]) for i, C in enumerate(budgets)]
    return [Profile(C, some, np.polyfit(np.log(some.N), some.L, 2)) for C, some in rows
            if len(set(some.N)) > 2]


def power_law(C, y) -> tuple[float, float]:
    """(exponent, factor) of y = factor C^exponent, by least squares in logs."""
    exponent, log_factor = np.polyfit(np.log(C), np.log(y), 1)
    return float(exponent), float(np.exp(log_factor))


def isoflop(points: Points, budgets, of: str = "N") -> float:
    """The exponent a of N_opt = k C^a, or of D_opt; nan where fewer than two budgets have a minimum."""
    found = [p for p in profiles(points, budgets) if p.inside]
    return power_law([p.C for p in found], [getattr(p, of) for p in found])[0] if len(found) > 1 else np.nan


@dataclass
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    huber: float = 0.0  # summed over the runs

    def __call__(self, N, D):
        return self.E + self.A / np.asarray(N)**self.alpha + self.B / np.asarray(D)**self.beta

    @property
    def exponent(self) -> float:
        """a of N_opt = k C^a, for C proportional to N D."""
        return self.beta / (self.alpha + self.beta)

    def at_bounds(self) -> list[str]:
        """Those of E, alpha and beta that the search ended at the edge of."""
        values = np.log(self.E), self.alpha, self.beta
        return [name for name, value, low, high in zip(("E", "alpha", "beta"), values, LEAST[2:], MOST[2:])
                if min(value - low, high - value) < 1e-3]


def huber(residual):
    size = np.abs(residual)
    return np.where(size < DELTA, residual**2 / 2, DELTA * (size - DELTA / 2))


def fit_law(points: Points, weights=None, start: Law | None = None, steps: int = 100) -> Law | list[Law]:
    """The law of the lowest Huber loss on log L: from many starts at once, or from one.

    weights (b, n) say how often each of the n runs counts in each of b fits; losses L (b, n) are those of b
    studies. With either it returns b laws. The method is Levenberg and Marquardt's on log A, log B, log E,
    alpha, beta. N and D are divided by their geometric means first, so that A and alpha correlate less."""
    n, d, y = np.log(points.N), np.log(points.D), np.log(points.L)
    single = weights is None and y.ndim == 1
    y, w = np.broadcast_arrays(np.atleast_2d(y), np.ones((1, len(n))) if weights is None else weights)
    n0, d0 = n.mean(), d.mean()
    n, d = n - n0, d - d0
    # 27 starts: how much of the lowest loss the two terms have each, and their exponents
    starts = np.array([
        (y.min() + np.log(part), y.min() + np.log(part), y.min() + np.log(1 - 2 * part), alpha, beta)
        for part in (0.05, 0.2, 0.4) for alpha in (0.2, 0.5, 1.0) for beta in (0.2, 0.5, 1.0)
    ] if start is None else [
        (np.log(start.A) - start.alpha * n0, np.log(start.B) - start.beta * d0, np.log(start.E), start.alpha,
         start.beta)])
    fits, (y, w) = len(w), (np.repeat(x, len(starts), 0) for x in (y, w))  # (fits * starts, n)
    theta = np.tile(starts, (fits, 1))

    def terms(theta):
        a, b, e, alpha, beta = theta.T[:, :, None]
        three = np.stack([a - alpha * n, b - beta * d, e + 0 * n])
        total = np.logaddexp.reduce(three, 0)
        return np.exp(three - total), total - y  # the share of each term, and the residual

    loss, damping = (w * huber(terms(theta)[1])).sum(1), np.full(len(theta), 1e-2)
    for _ in range(steps):
        (a, b, e), residual = terms(theta)
        J = np.stack([a, b, e, -a * n, -b * d], -1)
        JW = J * (w * np.minimum(1, DELTA / np.maximum(np.abs(residual), 1e-12)))[..., None]
        H, slope = J.mT @ JW, (JW * residual[..., None]).sum(1)
        H += np.eye(5) * (damping[:, None] * (H.diagonal(axis1=1, axis2=2) + 1e-12))[:, None]
        new = np.clip(theta - np.linalg.solve(H, slope[..., None])[..., 0], LEAST, MOST)
        new_loss = (w * huber(terms(new)[1])).sum(1)
        better = new_loss < loss
        theta, loss = np.where(better[:, None], new, theta), np.where(better, new_loss, loss)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-10, 1e8)
    best = loss.reshape(fits, -1).argmin(1) + len(starts) * np.arange(fits)
    laws = [Law(float(np.exp(e)), float(np.exp(a + alpha * n0)), float(np.exp(b + beta * d0)), float(alpha),
                float(beta), float(value)) for (a, b, e, alpha, beta), value in zip(theta[best], loss[best])]
    return laws[0] if single else laws


def interval(values) -> tuple[float, float]:
    """The middle 95% of a bootstrap, those left out where the fit found no minimum."""
    return tuple(np.nanpercentile(np.asarray(values, float), [2.5, 97.5]))


def bootstrap(points: Points, budgets, times: int = STUDIES) -> tuple[list[float], list[Law]]:
    """Approach 2's exponents and Approach 3's laws, over runs drawn again with replacement in each budget."""
    counts = drawn_again(points, budgets, times)
    second = [isoflop(repeated(points, count), budgets) for count in counts]
    return second, fit_law(points, counts, start=fit_law(points))


def drawn_again(points: Points, budgets, times: int = STUDIES) -> np.ndarray:
    """(times, runs): how often each run counts in each study of the bootstrap."""
    generator, counts = np.random.default_rng(0), np.zeros((times, len(points)))
    for i in range(len(budgets)):
        rows = np.flatnonzero(nearest(points, budgets) == i)
        for count in counts if len(rows) else ():
            np.add.at(count, generator.choice(rows, len(rows)), 1)
    return counts


def repeated(points: Points, count) -> Points:
    return points[np.repeat(np.arange(len(points)), count.astype(int))]


def without_a_minimum(points: Points, budgets) -> float:
    """The share of the bootstrap's studies that have no minimum at some budget, which is then left out."""
    return np.mean([sum(p.inside for p in profiles(repeated(points, count), budgets)) < len(budgets)
                    for count in drawn_again(points, budgets)])


def without_each(points: Points, budgets) -> list[tuple[float, float, float]]:
    """(the budget left out, Approach 2's exponent, Approach 3's) for each."""
    rest = [(C, points[nearest(points, budgets) != i], [c for c in budgets if c != C])
            for i, C in enumerate(budgets)]
    return [(C, isoflop(kept, others), fit_law(kept).exponent) for C, kept, others in rest]


def design(budgets, sizes, law: Law) -> Points:
    """What runs of these sizes end at under a law, without noise; sizes is a list for each budget."""
    N = np.concatenate([np.asarray(s, float) for s in sizes])
    C = np.concatenate([np.full(len(s), float(c)) for c, s in zip(budgets, sizes)])
    return Points(N, C / (6 * N), C, law(N, C / (6 * N)))


def simulate(points: Points, budgets, sigma: float, times: int = STUDIES) -> np.ndarray:
    """(times, 2): the exponents that the two approaches find when each run has noise of sigma nats."""
    noise = sigma * np.random.default_rng(0).standard_normal((times, len(points)))
    studies = replace(points, L=points.L + noise)
    laws = fit_law(studies, start=fit_law(points))
    return np.array([(isoflop(replace(points, L=L), budgets), law.exponent)
                     for L, law in zip(studies.L, laws)])
