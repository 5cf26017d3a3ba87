"""Exact play of small preference games: what SPPO and its relatives do when nothing is estimated.

A game is P with P[i, j] = P(i beats j), P + P^T = 1, diagonal 1/2, shape (n, n); its n actions are the responses to one prompt.
A policy pi has shape (n,). (P pi)_i = P(i beats pi). Pure functions on numpy arrays.

An algorithm is a function that returns the endless iterator pi_1, pi_2, ... (pi_1 is the given start):

    policies = play(mwu(P, start, eta=1.0), 100)        # pi_1 to pi_101, shape (101, n)

pi, ref and magnet have shape (n,) and give every action some probability. Updates are made in the log domain and normalised
at every step. SPPO is arXiv 2405.00675; the other numbers in brackets are arXiv's too.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.special import wrightomega

from sppo.core.errors import UserError
from sppo.preferences.estimates import sigmoid

Array = NDArray[np.float64]
Policies = Iterator[Array]
Step = float | Callable[[int], float]  # a number, or a function of t = 1, 2, ...


# --- games ---


@dataclass(frozen=True)
class Game:
    """P (n, n), the policy pi_1 (n,) that play starts from, and the names of the actions."""

    P: Array
    start: Array
    actions: tuple[str, ...]


def named_game(P: ArrayLike, start: ArrayLike | None = None, actions: tuple[str, ...] = ()) -> Game:
    """A game; without a start pi_1 is proportional to 1, 2, ..., n, which is nobody's fixed point by symmetry."""
    P = np.asarray(P, dtype=np.float64)
    ramp = np.arange(1.0, len(P) + 1)
    letters = tuple(chr(97 + i) if len(P) <= 26 else str(i + 1) for i in range(len(P)))
    return Game(
        P,
        ramp / ramp.sum() if start is None else np.asarray(start, dtype=np.float64),
        actions or letters,
    )


def bradley_terry(r: ArrayLike) -> Array:
    """P_ij = sigma(r_i - r_j) of rewards r (n,): the only games that a reward can describe; (n, n)."""
    r = np.asarray(r, dtype=np.float64)
    return sigmoid(r[:, None] - r[None, :])


def random_game(n: int, seed: int) -> Game:
    """P_ij uniform on [0, 1] for i < j."""
    above = np.triu(np.random.default_rng(seed).uniform(size=(n, n)), 1)
    return named_game(above + np.tril(1 - above.T, -1) + 0.5 * np.eye(n))


def parse_game(text: str, name: str) -> Game:
    """A game from CSV text: n lines of n probabilities; a line of names may stand above them, and then a column of names.

    `name` is the file's, for the one-line UserError of what is not a game.
    """
    rows = [
        [cell.strip() for cell in row]
        for row in csv.reader(text.splitlines())
        if any(cell.strip() for cell in row)
    ]
    actions: tuple[str, ...] = ()
    if rows and not any(map(_is_number, rows[0])):
        actions, rows = tuple(rows[0]), rows[1:]
        if rows and not any(_is_number(row[0]) for row in rows):
            actions, rows = actions[1:], [row[1:] for row in rows]
    n = len(rows)
    if n < 2:
        raise UserError(f"{name} holds {n} lines of numbers; a game has two actions or more")
    for i, row in enumerate(rows):
        if len(row) != n:
            raise UserError(
                f"{name} is not square: {n} lines, but line {i + 1} of them has {len(row)} numbers"
            )
        for j, cell in enumerate(row):
            where = f"{name}: {cell!r} in row {i + 1}, column {j + 1}"
            if not _is_number(cell):
                raise UserError(f"{where} is not a number")
            if not 0 <= float(cell) <= 1:
                raise UserError(f"{where} is not in [0, 1]; give probabilities, not per cent")
    if actions and len(actions) != n:
        raise UserError(f"{name} has {len(actions)} names over {n} columns of numbers")
    P = np.array(rows, dtype=np.float64)
    i, j = map(int, np.unravel_index(np.abs(P + P.T - 1).argmax(), P.shape))
    if abs(P[i, j] + P[j, i] - 1) > 1e-6:
        raise UserError(
            f"{name}: P + P^T is not 1: row {i + 1}, column {j + 1} is {P[i, j]:g} and its mirror {P[j, i]:g}"
        )
    return named_game((P + 1 - P.T) / 2, actions=actions)


def _is_number(cell: str) -> bool:
    try:
        return np.isfinite(float(cell))
    except ValueError:
        return False


GAMES = {
    "rps": named_game([[0.5, 0, 1], [1, 0.5, 0], [0, 1, 0.5]]),
    "comal3": named_game(
        [[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]], start=[0.2, 0.5, 0.3]
    ),
    "transitive_nonBT": named_game([[0.5, 0.9, 0.6], [0.1, 0.5, 0.9], [0.4, 0.1, 0.5]]),
    "bt3": named_game(bradley_terry([1, 0, -1])),
}


# --- what a policy is worth ---


def kl(p: Array, q: Array) -> float:
    """KL(p || q) in nats, 0 log 0 = 0; exact to rounding also where it is far smaller than the rounding of p and q."""
    some, off = p > 0, p - q
    p, q = p[some], q[some]
    log_ratio = np.where(2 * p > q, np.log1p(np.maximum(off[some] / q, -0.5)), np.log(p / q))
    return float(p @ log_ratio - off.sum())


def duality_gap(P: Array, pi: Array) -> float:
    """max over pi' of P(pi' beats pi) - min over pi' of P(pi beats pi') = 2 (max_i (P pi)_i - 1/2).

    Not negative, and 0 exactly at a von Neumann winner: SPPO, the left side of theorem 4.1.
    """
    return 2.0 * (float((P @ pi).max()) - 0.5)


def regularised_gap(P: Array, pi: Array, ref: Array, tau: float) -> float:
    """The gap of J(pi, pi') = P(pi beats pi') - tau KL(pi || ref) + tau KL(pi' || ref), INPO's game.

    The best response is proportional to ref exp(P pi / tau), so it is
    2 (tau log sum_i ref_i exp((P pi)_i / tau) + tau KL(pi || ref) - 1/2).
    """
    best = tau * _log_sum_exp(np.log(ref) + P @ pi / tau)
    return 2.0 * (best + tau * kl(pi, ref) - 0.5)


def nash(P: Array) -> Array:
    """A von Neumann winner, (n,): maximise v with sum_i pi_i P_ij >= v for every j, a linear program."""
    n = len(P)
    found = linprog(
        np.r_[np.zeros(n), -1.0],
        A_ub=np.c_[-P.T, np.ones(n)],
        b_ub=np.zeros(n),
        A_eq=np.r_[np.ones(n), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, None)] * n + [(None, None)],
        method="highs-ds",
    )
    if found.status:
        raise ArithmeticError(f"the linear program of the equilibrium ended with: {found.message}")
    pi = np.maximum(found.x[:n], 0.0)
    return pi / pi.sum()


def regularised_nash(P: Array, ref: Array, tau: float) -> Array:
    """The one equilibrium pi*_tau of the regularised game, (n,): pi proportional to ref exp(P pi / tau).

    Newton's method on the logits; independent of the algorithms that ought to end here.
    """

    def residual(logits: Array) -> tuple[Array, Array]:
        pi = _softmax(logits)
        return logits - np.log(ref) - P @ pi / tau, np.eye(len(P)) - P @ (
            np.diag(pi) - np.outer(pi, pi)
        ) / tau

    return _softmax(_newton(residual, np.log(ref)))


def bt_rewards(P: Array, weights: Array | None = None) -> Array:
    """Bradley-Terry rewards r (n,), mean 0, of the highest likelihood sum_ij w_i w_j P_ij log sigma(r_i - r_j).

    weights (n,): how often an action is in a pair; uniform by default. This is what DPO (eq. 7) fits in the limit of all pairs.
    ValueError if no finite r is best: some actions always beat all others.
    """
    n = len(P)
    w = np.full(n, 1 / n) if weights is None else weights
    if not has_finite_rewards(P):
        raise ValueError(
            "the rewards of highest likelihood are infinite: some actions always beat all others"
        )

    def residual(r: Array) -> tuple[Array, Array]:
        # The gradient, row i divided by w_i; 1 w^T fixes the constant that rewards leave free.
        win = bradley_terry(r)
        slope = win * (1 - win) * w
        return (win - P) @ w, np.diag(slope.sum(axis=1)) - slope + np.outer(np.ones(n), w)

    r = _newton(residual, np.zeros(n))
    return r - r.mean()


def has_finite_rewards(P: Array) -> bool:
    """Whether Bradley-Terry's likelihood has a maximum: from every action a chain of possible wins leads to every other (Ford 1957)."""
    beats = np.eye(len(P), dtype=bool) | (P > 0)
    for _ in range(len(P).bit_length()):
        beats = beats.astype(float) @ beats > 0
    return bool(beats.all())


# --- algorithms: endless iterators of policies ---


def play(policies: Policies, steps: int) -> Array:
    """pi_1 and what follows from it in `steps` steps, shape (steps + 1, n)."""
    return np.array(list(itertools.islice(policies, steps + 1)))


def mwu(P: Array, pi: Array, eta: float) -> Policies:
    """Multiplicative weights, SPPO eq. (4.1): pi_{t+1} proportional to pi_t exp(eta P pi_t)."""
    return _iterate(pi, lambda log_pi, pi, t: log_pi + eta * (P @ pi))


def mwu_bound(start: Array, eta: float, T: int) -> float:
    """What the gap of `mwu`'s average over T policies cannot exceed: 2 (ln(1 / min pi_1) / (eta T) + eta / 8), theorem 4.1 in numbers."""
    return 2 * (float(np.log(1 / start.min())) / (eta * T) + eta / 8)


def mwu_step(start: Array, T: int) -> float:
    """The eta that makes `mwu_bound` smallest, sqrt(8 ln(1 / min pi_1) / T); the bound is then sqrt(2 ln(1 / min pi_1) / T)."""
    return float(np.sqrt(8 * np.log(1 / start.min()) / T))


def sppo_l2(P: Array, pi: Array, eta: float) -> Policies:
    """SPPO's loss solved exactly, eq. (4.6): argmin over policies of E_{y ~ pi_t} (log pi/pi_t - eta (P pi_t - 1/2))^2."""
    return _iterate(pi, lambda log_pi, pi, t: log_pi + l2_log_ratio(pi, eta * (P @ pi - 0.5)))


def l2_log_ratio(pi: Array, c: Array) -> Array:
    """u (n,) that minimises sum_y pi_y (u_y - c_y)^2 among the log-ratios log pi'/pi of policies, sum_y pi_y exp(u_y) = 1.

    With a multiplier mu >= 0, u + mu exp(u) = c, so u = c - omega(c + log mu) with Wright's omega; mu is found by bisection.
    Needs E_pi c >= 0, which E_pi P pi = 1/2 gives; without the constraint u would be c.
    """
    if c.max() <= 0:
        return np.zeros_like(c)
    low, high = -745.0, float(np.log(c.max()))  # at mu = max c no u is above 0
    for _ in range(70):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if pi @ np.exp(c - wrightomega(c + middle)) > 1 else (low, middle)
        )
    return c - wrightomega(c + high)


def omwu(P: Array, pi: Array, eta: float) -> Policies:
    """Optimistic multiplicative weights (1807.04252): pi_{t+1} proportional to pi_t exp(eta (2 P pi_t - P pi_{t-1})), with pi_0 = pi_1."""
    before = P @ pi

    def update(log_pi: Array, pi: Array, t: int) -> Array:
        nonlocal before
        now, last = P @ pi, before
        before = now
        return log_pi + eta * (2 * now - last)

    return _iterate(pi, update)


def inpo(P: Array, pi: Array, ref: Array, eta: Step, tau: float) -> Policies:
    """INPO (2407.00617), online mirror descent: pi_{t+1} proportional to exp(P pi_t / eta) ref^(tau/eta) pi_t^(1 - tau/eta).

    eta is an inverse step here, as in the paper. Fixed point, with a constant eta: `regularised_nash`.
    """
    return _iterate(
        pi, lambda log_pi, pi, t: _inpo_step(P, log_pi, pi, np.log(ref), _at(eta, t), tau)
    )


def nash_md(P: Array, pi: Array, ref: Array, eta: Step, tau: float) -> Policies:
    """Nash-MD (2312.00886): m proportional to pi_t^(1 - tau/eta) ref^(tau/eta); pi_{t+1} proportional to m exp(P m / eta).

    eta as in `inpo`. With a constant eta the fixed point is not `regularised_nash`, but near it.
    """

    def update(log_pi: Array, pi: Array, t: int) -> Array:
        inverse = _at(eta, t)
        log_m = (1 - tau / inverse) * log_pi + tau / inverse * np.log(ref)
        return log_m + P @ _softmax(log_m) / inverse

    return _iterate(pi, update)


def egpo(P: Array, pi: Array, ref: Array, eta: float, tau: float) -> Policies:
    """EGPO (2503.08942): b = pi_t^(1 - eta tau) ref^(eta tau), h = b exp(eta P pi_t), pi_{t+1} = b exp(eta P h), each normalised.

    Fixed point: `regularised_nash`.
    """

    def update(log_pi: Array, pi: Array, t: int) -> Array:
        b = (1 - eta * tau) * log_pi + eta * tau * np.log(ref)
        return b + eta * (P @ _softmax(b + eta * (P @ pi)))

    return _iterate(pi, update)


def mmd(P: Array, pi: Array, magnet: Array, eta: float, alpha: float) -> Policies:
    """Magnetic mirror descent (2206.05825): pi_{t+1} proportional to (pi_t magnet^(eta alpha) exp(eta P pi_t))^(1 / (1 + eta alpha)).

    Fixed point: `regularised_nash` with ref = magnet, tau = alpha. INPO with eta_I = (1 + eta alpha)/eta, tau = alpha is the same.
    """
    return _iterate(pi, lambda log_pi, pi, t: _mmd_step(P, log_pi, pi, np.log(magnet), eta, alpha))


def mpo(P: Array, pi: Array, eta: float, alpha: float, every: int) -> Policies:
    """MPO (2410.16714): `mmd`, whose magnet becomes the current policy every `every` steps; it starts at pi.

    A policy that is its own magnet and stays where it is has P pi constant, as at an equilibrium of full support: no bias is left.
    """
    return _moving(
        pi, every, lambda log_pi, pi, log_magnet: _mmd_step(P, log_pi, pi, log_magnet, eta, alpha)
    )


def comal(P: Array, pi: Array, eta: float, tau: float, every: int = 6) -> Policies:
    """COMAL (2410.23223): `inpo`, whose reference becomes the current policy every `every` steps; it starts at pi."""
    return _moving(
        pi, every, lambda log_pi, pi, log_ref: _inpo_step(P, log_pi, pi, log_ref, eta, tau)
    )


def iterative_dpo(P: Array, pi: Array, beta: float, ref: Array | None = None) -> Policies:
    """Iterative DPO (2305.18290) on all on-policy pairs: r = bt_rewards(P, pi_t); pi_{t+1} proportional to pi_t exp(r / beta).

    With `ref` it is ref exp(r / beta): the fixed reference.
    """
    return _iterate(
        pi,
        lambda log_pi, pi, t: (log_pi if ref is None else np.log(ref)) + bt_rewards(P, pi) / beta,
    )


def offline_dpo(P: Array, ref: Array, beta: float, weights: Array | None = None) -> Array:
    """What DPO makes of `ref` with pairs drawn by `weights`: proportional to ref exp(r / beta), r = bt_rewards(P, weights)."""
    return _softmax(np.log(ref) + bt_rewards(P, weights) / beta)


def iterative_ipo(P: Array, pi: Array, beta: float) -> Policies:
    """IPO (2310.12036) with reference pi_t on all on-policy pairs: log pi_{t+1}/pi_t = (P pi_t - 1/2) / beta + constant.

    The minimiser of E_{y, y' ~ pi_t} ((u_y - u_y') - (P(y beats y') - 1/2) / beta)^2 over log-ratios u.
    """
    return _iterate(pi, lambda log_pi, pi, t: log_pi + (P @ pi - 0.5) / beta)


def dno(P: Array, pi: Array, eta: float) -> Policies:
    """DNO's population target (2404.03715): pi_{t+1} proportional to pi_t exp(r_t / eta) with r_t = P pi_t."""
    return _iterate(pi, lambda log_pi, pi, t: log_pi + P @ pi / eta)


def online_ipo_gradient(P: Array, pi: Array, ref: Array, beta: float, on_policy: bool) -> Array:
    """Gradient (n,) in the logits of pi of EGPO's two contrastive losses, E (d_y - d_y' - target)^2 with d = log pi / ref.

    Version 1: y, y' uniform, target ((P pi)_y - (P pi)_y') / beta. Version 2 (`on_policy`): y, y' ~ pi, target (P_yy' - 1/2) / beta.
    What draws the pairs and what the targets are made of is held fixed.
    """
    d, wins, w = np.log(pi / ref), P @ pi, pi if on_policy else np.full(len(pi), 1 / len(pi))
    target = (P - 0.5) / beta if on_policy else (wins[:, None] - wins[None, :]) / beta
    return 4 * w * ((d[:, None] - d[None, :] - target) @ w)


def sampled_ipo_gradient(
    P: Array,
    pi: Array,
    ref: Array,
    beta: float,
    on_policy: bool,
    samples: int,
    draw: np.random.Generator,
) -> Array:
    """Unbiased estimates of `online_ipo_gradient`, one a row (samples, n), from pairs and, in version 1, an opponent each from pi."""
    n, d = len(pi), np.log(pi / ref)
    y, other = draw.choice(n, size=(2, samples), p=pi if on_policy else None)
    opponent = draw.choice(n, size=samples, p=pi)
    target = (
        (P[y, other] - 0.5) / beta if on_policy else (P[y, opponent] - P[other, opponent]) / beta
    )
    return 2 * (d[y] - d[other] - target)[:, None] * (np.eye(n)[y] - np.eye(n)[other])


# --- what they share ---


def _iterate(pi: Array, update: Callable[[Array, Array, int], Array]) -> Policies:
    """pi, and then what `update` makes of (log pi_t, pi_t, t), normalised."""
    log_pi = np.log(pi)
    for t in itertools.count(1):
        log_pi = log_pi - _log_sum_exp(log_pi)
        pi = np.exp(log_pi)
        yield pi
        log_pi = update(log_pi, pi, t)


def _moving(pi: Array, every: int, step: Callable[[Array, Array, Array], Array]) -> Policies:
    """pi, and then `step` of (log pi_t, pi_t, log magnet); the magnet is pi_t at t = 1, every + 1, 2 every + 1, ..."""
    log_magnet = np.log(pi)

    def update(log_pi: Array, pi: Array, t: int) -> Array:
        nonlocal log_magnet
        log_magnet = log_pi if (t - 1) % every == 0 else log_magnet
        return step(log_pi, pi, log_magnet)

    return _iterate(pi, update)


def _inpo_step(P: Array, log_pi: Array, pi: Array, log_ref: Array, eta: float, tau: float) -> Array:
    return (P @ pi + tau * log_ref) / eta + (1 - tau / eta) * log_pi


def _mmd_step(
    P: Array, log_pi: Array, pi: Array, log_magnet: Array, eta: float, alpha: float
) -> Array:
    return (log_pi + eta * alpha * log_magnet + eta * (P @ pi)) / (1 + eta * alpha)


def _newton(residual: Callable[[Array], tuple[Array, Array]], x: Array) -> Array:
    """The root of a function that returns value (n,) and Jacobian (n, n), by Newton's method with halved steps until it stops falling."""
    value, jacobian = residual(x)
    for _ in range(200):
        if np.linalg.norm(value) < 1e-15:
            break
        step = np.linalg.solve(jacobian, value)
        for size in 0.5 ** np.arange(40):
            new = residual(x - size * step)
            if np.linalg.norm(new[0]) < np.linalg.norm(value):
                break
        else:
            break
        x, (value, jacobian) = x - size * step, new
    return x


def _at(step: Step, t: int) -> float:
    return step(t) if callable(step) else step


def _log_sum_exp(x: Array) -> float:
    top = x.max()
    return float(top + np.log(np.exp(x - top).sum()))


def _softmax(x: Array) -> Array:
    return np.exp(x - _log_sum_exp(x))


def read_game(path: Path) -> Game:
    """A user's game."""
    try:
        return parse_game(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a CSV of probabilities") from None
