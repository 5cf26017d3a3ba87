"""Exact play of small preference games: SPPO and related methods without any estimation.

A game is a matrix P (n, n) with P[i, j] = P(i beats j), so P + P^T = 1 and the diagonal is 1/2.
Its n actions are the responses to one prompt. A policy pi has shape (n,), and (P pi)_i is the
probability that action i beats a response drawn from pi. All functions are pure, on numpy arrays.

An algorithm is a function that returns an endless iterator of policies pi_1, pi_2, ...; pi_1 is
the start that it is given:

    policies = play(mwu(P, start, eta=1.0), 100)        # pi_1 to pi_101, shape (101, n)

pi, ref and magnet have shape (n,) and only positive entries. Updates are computed with log
probabilities, which are normalised at every step. Numbers in brackets are arXiv numbers; SPPO is
arXiv 2405.00675.
"""

from __future__ import annotations

import csv
import itertools
import string
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
    """P (n, n), the first policy pi_1 (n,), and the names of the n actions."""

    P: Array
    start: Array
    actions: tuple[str, ...]


def named_game(P: ArrayLike, start: ArrayLike | None = None, actions: tuple[str, ...] = ()) -> Game:
    """A game; the actions are called a, b, c, ... (1, 2, 3, ... if they are more than 26).

    Without a start, pi_1 is proportional to 1, 2, ..., n. It has no symmetry, so that it is not a
    fixed point by symmetry.
    """
    P = np.asarray(P, dtype=np.float64)
    n = len(P)
    if start is None:
        ramp = np.arange(1.0, n + 1)
        start = ramp / ramp.sum()
    if not actions and n <= 26:
        actions = tuple(string.ascii_lowercase[:n])
    elif not actions:
        actions = tuple(str(number) for number in range(1, n + 1))
    return Game(P, np.asarray(start, dtype=np.float64), actions)


def bradley_terry(r: ArrayLike) -> Array:
    """P (n, n) with P_ij = sigma(r_i - r_j) for rewards r (n,).

    Rewards can describe games of this form only.
    """
    r = np.asarray(r, dtype=np.float64)
    return sigmoid(r[:, None] - r[None, :])


def random_game(n: int, seed: int) -> Game:
    """A game with P_ij uniform on [0, 1] for i < j."""
    above = np.triu(np.random.default_rng(seed).uniform(size=(n, n)), 1)
    return named_game(above + np.tril(1 - above.T, -1) + 0.5 * np.eye(n))


def read_game(path: Path) -> Game:
    """A user's game from a CSV file; see `parse_game`. UserError if the file cannot be read."""
    try:
        return parse_game(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a CSV of probabilities") from None


def parse_game(text: str, name: str) -> Game:
    """A game from CSV text: n lines of n probabilities that the row beats the column.

    The text may have a header line with the names of the actions. If it has one, it may also have
    the names in the first column. `name` is the file's name for errors. UserError if the numbers
    are not a game.
    """
    actions, rows = _split_header(text)
    n = len(rows)
    if n < 2:
        raise UserError(f"{name} holds {n} lines of numbers; give a game of two or more actions")
    for i, row in enumerate(rows, 1):
        if len(row) != n:
            raise UserError(
                f"{name} is not square: {n} lines, but line {i} of them has {len(row)} numbers; "
                "give n lines of n numbers"
            )
        for j, cell in enumerate(row, 1):
            where = f"{name}: {cell!r} in row {i}, column {j}"
            if not _is_number(cell):
                raise UserError(f"{where} is not a number; give a probability")
            if not 0 <= float(cell) <= 1:
                raise UserError(f"{where} is not in [0, 1]; give probabilities, not per cent")
    if actions and len(actions) != n:
        raise UserError(
            f"{name} has {len(actions)} names over {n} columns of numbers; give one per column"
        )
    P = np.array(rows, dtype=np.float64)
    i, j = map(int, np.unravel_index(np.abs(P + P.T - 1).argmax(), P.shape))
    if abs(P[i, j] + P[j, i] - 1) > 1e-6:
        raise UserError(
            f"{name}: P + P^T is not 1: row {i + 1}, column {j + 1} is {P[i, j]:g} and its mirror "
            f"{P[j, i]:g}; correct one of them"
        )
    return named_game((P + 1 - P.T) / 2, actions=actions)


def _split_header(text: str) -> tuple[tuple[str, ...], list[list[str]]]:
    """Names of the actions (none without a header line), and the cells below, without names."""
    rows = []
    for line in csv.reader(text.splitlines()):
        cells = [cell.strip() for cell in line]
        if any(cells):
            rows.append(cells)
    if not rows or any(_is_number(cell) for cell in rows[0]):
        return (), rows
    header, *rows = rows
    names_in_first_column = rows and not any(_is_number(row[0]) for row in rows)
    if names_in_first_column:
        return tuple(header[1:]), [row[1:] for row in rows]
    return tuple(header), rows


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


# --- gaps, equilibria and rewards ---


def kl(p: Array, q: Array) -> float:
    """KL(p || q) in nats, with 0 log 0 = 0.

    It is accurate even if it is much smaller than the rounding errors of p and q.
    """
    support, difference = p > 0, p - q
    p, q = p[support], q[support]
    relative = difference[support] / q
    # log1p is accurate where p is close to q. The maximum keeps its unused values finite.
    log_ratio = np.where(2 * p > q, np.log1p(np.maximum(relative, -0.5)), np.log(p / q))
    # The sum of p - q is 0 except for rounding, so that subtracting it cancels rounding errors.
    return float(p @ log_ratio - difference.sum())


def duality_gap(P: Array, pi: Array) -> float:
    """max over pi' of P(pi' beats pi) - min over pi' of P(pi beats pi') = 2 (max_i (P pi)_i - 1/2).

    It is not negative, and 0 exactly at a von Neumann winner. Theorem 4.1 of SPPO bounds it.
    """
    return 2.0 * (float((P @ pi).max()) - 0.5)


def regularised_gap(P: Array, pi: Array, ref: Array, tau: float) -> float:
    """The duality gap of INPO's regularised game.

    Its payoff is J(pi, pi') = P(pi beats pi') - tau KL(pi || ref) + tau KL(pi' || ref). The best
    response is proportional to ref exp(P pi / tau), so the gap is
    2 (tau log sum_i ref_i exp((P pi)_i / tau) + tau KL(pi || ref) - 1/2).
    """
    best = tau * np.logaddexp.reduce(np.log(ref) + P @ pi / tau)
    return 2.0 * (best + tau * kl(pi, ref) - 0.5)


def nash(P: Array) -> Array:
    """A von Neumann winner (n,), by a linear program: maximise v with (pi P)_j >= v for every j.

    ArithmeticError if the solver fails.
    """
    n = len(P)
    # The variables are pi_1, ..., pi_n and v.
    solution = linprog(
        np.append(np.zeros(n), -1.0),
        A_ub=np.column_stack([-P.T, np.ones(n)]),
        b_ub=np.zeros(n),
        A_eq=np.append(np.ones(n), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * n + [(None, None)],
        method="highs-ds",
    )
    if solution.status:
        raise ArithmeticError(f"the linear program of the equilibrium failed: {solution.message}")
    pi = np.maximum(solution.x[:n], 0.0)
    return pi / pi.sum()


def regularised_nash(P: Array, ref: Array, tau: float) -> Array:
    """The unique equilibrium pi*_tau (n,) of the regularised game.

    It solves pi proportional to ref exp(P pi / tau). Newton's method on the logits finds it, which
    shares no code with the algorithms that should converge to it.
    """

    def residual(logits: Array) -> tuple[Array, Array]:
        pi = _softmax(logits)
        softmax_jacobian = np.diag(pi) - np.outer(pi, pi)
        value = logits - np.log(ref) - P @ pi / tau
        return value, np.eye(len(P)) - P @ softmax_jacobian / tau

    return _softmax(_newton(residual, np.log(ref)))


def bt_rewards(P: Array, weights: Array | None = None) -> Array:
    """Bradley-Terry rewards r (n,), the maximum of sum_ij w_i w_j P_ij log sigma(r_i - r_j).

    Their mean is 0. weights (n,): how often each action is in a pair; uniform by default.
    DPO (eq. 7 of 2305.18290) fits these rewards in the limit of infinitely many pairs.
    ValueError if the best rewards are infinite because some actions always beat all others.
    """
    n = len(P)
    w = np.full(n, 1 / n) if weights is None else weights
    if not has_finite_rewards(P):
        raise ValueError(
            "the rewards of highest likelihood are infinite: some actions always beat all others"
        )

    def residual(r: Array) -> tuple[Array, Array]:
        # The gradient with row i divided by w_i. Rewards are determined up to a constant; the
        # outer product 1 w^T makes the Jacobian invertible.
        win = bradley_terry(r)
        slope = win * (1 - win) * w
        jacobian = np.diag(slope.sum(axis=1)) - slope + np.outer(np.ones(n), w)
        return (win - P) @ w, jacobian

    r = _newton(residual, np.zeros(n))
    return r - r.mean()


def has_finite_rewards(P: Array) -> bool:
    """Whether Bradley-Terry's likelihood has a maximum (Ford 1957).

    This is so if and only if a chain of possible wins leads from every action to every other.
    """
    reaches = np.eye(len(P), dtype=bool) | (P > 0)
    for _ in range(len(P).bit_length()):
        reaches = reaches.astype(float) @ reaches > 0  # chains of twice the length
    return bool(reaches.all())


# --- algorithms: endless iterators of policies ---


def play(policies: Policies, steps: int) -> Array:
    """pi_1 and the policies of the next `steps` steps, shape (steps + 1, n)."""
    return np.array(list(itertools.islice(policies, steps + 1)))


def mwu(P: Array, pi: Array, eta: float) -> Policies:
    """Multiplicative weights, SPPO eq. (4.1): pi_{t+1} proportional to pi_t exp(eta P pi_t)."""
    return _iterate(pi, lambda log_pi, pi, t: log_pi + eta * (P @ pi))


def mwu_bound(start: Array, eta: float, T: int) -> float:
    """Upper bound on the gap of `mwu`'s average over T policies, theorem 4.1 with its constants.

    It is 2 (ln(1 / min pi_1) / (eta T) + eta / 8).
    """
    return 2 * (float(np.log(1 / start.min())) / (eta * T) + eta / 8)


def mwu_step(start: Array, T: int) -> float:
    """The eta that minimises `mwu_bound`: sqrt(8 ln(1 / min pi_1) / T).

    The bound is then sqrt(2 ln(1 / min pi_1) / T).
    """
    return float(np.sqrt(8 * np.log(1 / start.min()) / T))


def sppo_l2(P: Array, pi: Array, eta: float) -> Policies:
    """SPPO's loss solved exactly, eq. (4.6).

    pi_{t+1} minimises E_{y ~ pi_t} (log pi/pi_t - eta (P pi_t - 1/2))^2 over policies pi.
    """
    return _iterate(pi, lambda log_pi, pi, t: log_pi + l2_log_ratio(pi, eta * (P @ pi - 0.5)))


def l2_log_ratio(pi: Array, c: Array, weights: Array | None = None) -> Array:
    """The log-ratios u = log pi'/pi (n,) of the policy pi' that minimises sum_y w_y (u_y - c_y)^2.

    pi' must satisfy sum_y pi_y exp(u_y) <= 1. Without `weights` (n,), w is pi. pi may be a part of
    a policy: its sum may be below 1, and the other responses may lose all their probability.

    If u = c satisfies the constraint, it is the result. Otherwise, with a multiplier mu > 0 of the
    constraint and a = mu pi/w, u + a exp(u) = c, so u = c - omega(c + log a), where omega is
    Wright's function. Bisection finds log mu.
    """
    if c.max() <= 0 or pi @ np.exp(c) <= 1:
        return c
    log_share = np.zeros_like(c) if weights is None else np.log(pi / weights)
    low = -745.0  # exp(low) is the smallest positive number
    # At this mu, every u is at most 0.
    high = float((np.log(c[c > 0]) - log_share[c > 0]).max())
    for _ in range(70):
        middle = (low + high) / 2
        if pi @ np.exp(c - wrightomega(c + middle + log_share)) > 1:
            low = middle
        else:
            high = middle
    return c - wrightomega(c + high + log_share)


def omwu(P: Array, pi: Array, eta: float) -> Policies:
    """Optimistic multiplicative weights (1807.04252).

    pi_{t+1} is proportional to pi_t exp(eta (2 P pi_t - P pi_{t-1})), with pi_0 = pi_1.
    """
    previous_wins = P @ pi

    def update(log_pi: Array, pi: Array, t: int) -> Array:
        nonlocal previous_wins
        wins, previous = P @ pi, previous_wins
        previous_wins = wins
        return log_pi + eta * (2 * wins - previous)

    return _iterate(pi, update)


def onpo(P: Array, pi: Array, eta: float) -> Policies:
    """ONPO (2502.16852), optimistic mirror descent with an auxiliary policy pi'.

    pi'_{t+1} is proportional to pi'_t exp(eta P pi_t), and pi_{t+1} to pi'_{t+1} exp(eta P pi_t),
    with pi'_1 = pi_1. The paper's two trainings on the responses of pi_t fit these two steps.
    """
    log_auxiliary = np.log(pi)

    def update(log_pi: Array, pi: Array, t: int) -> Array:
        nonlocal log_auxiliary
        log_auxiliary = log_auxiliary + eta * (P @ pi)
        return log_auxiliary + eta * (P @ pi)

    return _iterate(pi, update)


def inpo(P: Array, pi: Array, ref: Array, eta: Step, tau: float) -> Policies:
    """INPO (2407.00617), online mirror descent.

    pi_{t+1} is proportional to exp(P pi_t / eta) ref^(tau/eta) pi_t^(1 - tau/eta). As in the paper,
    eta is an inverse step size. With a constant eta, the fixed point is `regularised_nash`.
    """

    def update(log_pi: Array, pi: Array, t: int) -> Array:
        return _inpo_step(P, log_pi, pi, np.log(ref), _at(eta, t), tau)

    return _iterate(pi, update)


def nash_md(P: Array, pi: Array, ref: Array, eta: Step, tau: float) -> Policies:
    """Nash-MD (2312.00886).

    The mixture m is proportional to pi_t^(1 - tau/eta) ref^(tau/eta), and pi_{t+1} is proportional
    to m exp(P m / eta). As in `inpo`, eta is an inverse step size. With a constant eta, the fixed
    point is close to `regularised_nash` but not equal to it.
    """

    def update(log_pi: Array, pi: Array, t: int) -> Array:
        inverse = _at(eta, t)
        log_m = (1 - tau / inverse) * log_pi + tau / inverse * np.log(ref)
        return log_m + P @ _softmax(log_m) / inverse

    return _iterate(pi, update)


def egpo(P: Array, pi: Array, ref: Array, eta: float, tau: float) -> Policies:
    """EGPO (2503.08942), an extragradient method.

    With b = pi_t^(1 - eta tau) ref^(eta tau), the half step is h = b exp(eta P pi_t) and the full
    step is pi_{t+1} = b exp(eta P h), each normalised. The fixed point is `regularised_nash`.
    """

    def update(log_pi: Array, pi: Array, t: int) -> Array:
        b = (1 - eta * tau) * log_pi + eta * tau * np.log(ref)
        return b + eta * (P @ _softmax(b + eta * (P @ pi)))

    return _iterate(pi, update)


def mmd(P: Array, pi: Array, magnet: Array, eta: float, alpha: float) -> Policies:
    """Magnetic mirror descent (2206.05825).

    pi_{t+1} is proportional to (pi_t magnet^(eta alpha) exp(eta P pi_t))^(1 / (1 + eta alpha)). The
    fixed point is `regularised_nash` with ref = magnet and tau = alpha. `inpo` with
    eta_I = (1 + eta alpha)/eta and tau = alpha has the same update.
    """

    def update(log_pi: Array, pi: Array, t: int) -> Array:
        return _mmd_step(P, log_pi, pi, np.log(magnet), eta, alpha)

    return _iterate(pi, update)


def nash_mp(P: Array, pi: Array, ref: Array, eta: float, tau: float) -> Policies:
    """Nash Mirror Prox (2505.19731): `mmd` with an extra half step.

    The half step h is a step of `mmd` from pi_t. The full step starts from pi_t too, but has P h
    instead of P pi_t. The fixed point is `regularised_nash`.
    """

    def update(log_pi: Array, pi: Array, t: int) -> Array:
        half = _softmax(_mmd_step(P, log_pi, pi, np.log(ref), eta, tau))
        return _mmd_step(P, log_pi, half, np.log(ref), eta, tau)

    return _iterate(pi, update)


def mpo(P: Array, pi: Array, eta: float, alpha: float, every: int) -> Policies:
    """MPO (2410.16714): `mmd` whose magnet is replaced by the current policy every `every` steps.

    The first magnet is pi. A fixed point that is its own magnet has a constant P pi, as an
    equilibrium of full support has: the magnet leaves no bias.
    """

    def update(log_pi: Array, pi: Array, log_magnet: Array) -> Array:
        return _mmd_step(P, log_pi, pi, log_magnet, eta, alpha)

    return _iterate_with_moving_reference(pi, every, update)


def comal(P: Array, pi: Array, eta: float, tau: float, every: int = 6) -> Policies:
    """COMAL (2410.23223): `inpo` whose reference is replaced by the current policy.

    This happens every `every` steps. The first reference is pi.
    """

    def update(log_pi: Array, pi: Array, log_ref: Array) -> Array:
        return _inpo_step(P, log_pi, pi, log_ref, eta, tau)

    return _iterate_with_moving_reference(pi, every, update)


def iterative_dpo(P: Array, pi: Array, beta: float) -> Policies:
    """Iterative DPO (2305.18290) on all on-policy pairs, with reference pi_t.

    pi_{t+1} is proportional to pi_t exp(r / beta) with r = bt_rewards(P, pi_t).
    """
    return _iterate(pi, lambda log_pi, pi, t: log_pi + bt_rewards(P, pi) / beta)


def offline_dpo(P: Array, ref: Array, beta: float, weights: Array | None = None) -> Array:
    """The policy (n,) that DPO gives for reference `ref` and pairs drawn with `weights`.

    It is proportional to ref exp(r / beta) with r = bt_rewards(P, weights).
    """
    return _softmax(np.log(ref) + bt_rewards(P, weights) / beta)


def iterative_ipo(P: Array, pi: Array, beta: float) -> Policies:
    """IPO (2310.12036) on all on-policy pairs, with reference pi_t.

    log pi_{t+1}/pi_t = (P pi_t - 1/2) / beta + constant. These log-ratios u minimise
    E_{y, y' ~ pi_t} ((u_y - u_y') - (P(y beats y') - 1/2) / beta)^2.
    """
    return _iterate(pi, lambda log_pi, pi, t: log_pi + (P @ pi - 0.5) / beta)


def online_ipo_gradient(P: Array, pi: Array, ref: Array, beta: float, on_policy: bool) -> Array:
    """Gradient (n,) of one of EGPO's two contrastive losses (2503.08942) in the logits of pi.

    The loss is E (d_y - d_y' - target)^2 with d = log pi / ref.
    Version 1: y and y' are uniform, the target is ((P pi)_y - (P pi)_y') / beta.
    Version 2 (`on_policy`): y and y' are drawn from pi, the target is (P_yy' - 1/2) / beta.
    The gradient does not pass through the distribution of the pairs or through the targets.
    """
    d = np.log(pi / ref)
    if on_policy:
        w = pi
        target = (P - 0.5) / beta
    else:
        w = np.full(len(pi), 1 / len(pi))
        wins = P @ pi
        target = (wins[:, None] - wins[None, :]) / beta
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
    """Unbiased estimates of `online_ipo_gradient`, one in each row, (samples, n).

    Each estimate uses one pair, and in version 1 also one opponent drawn from pi.
    """
    n, d = len(pi), np.log(pi / ref)
    y, other = draw.choice(n, size=(2, samples), p=pi if on_policy else None)
    opponent = draw.choice(n, size=samples, p=pi)  # not used in version 2
    if on_policy:
        target = (P[y, other] - 0.5) / beta
    else:
        target = (P[y, opponent] - P[other, opponent]) / beta
    return 2 * (d[y] - d[other] - target)[:, None] * (np.eye(n)[y] - np.eye(n)[other])


# --- shared helpers ---


def _iterate(pi: Array, update: Callable[[Array, Array, int], Array]) -> Policies:
    """pi_1, pi_2, ...: `update` maps (log pi_t, pi_t, t) to log pi_{t+1}, up to a constant."""
    log_pi = np.log(pi)
    for t in itertools.count(1):
        log_pi = log_pi - np.logaddexp.reduce(log_pi)
        pi = np.exp(log_pi)
        yield pi
        log_pi = update(log_pi, pi, t)


def _iterate_with_moving_reference(
    pi: Array, every: int, update: Callable[[Array, Array, Array], Array]
) -> Policies:
    """pi_1, pi_2, ...: `update` maps (log pi_t, pi_t, log ref) to log pi_{t+1}, up to a constant.

    ref becomes pi_t at t = 1, every + 1, 2 every + 1, ...
    """
    log_ref = np.log(pi)

    def update_at(log_pi: Array, pi: Array, t: int) -> Array:
        nonlocal log_ref
        if (t - 1) % every == 0:
            log_ref = log_pi
        return update(log_pi, pi, log_ref)

    return _iterate(pi, update_at)


def _inpo_step(P: Array, log_pi: Array, pi: Array, log_ref: Array, eta: float, tau: float) -> Array:
    return (P @ pi + tau * log_ref) / eta + (1 - tau / eta) * log_pi


def _mmd_step(
    P: Array, log_pi: Array, pi: Array, log_magnet: Array, eta: float, alpha: float
) -> Array:
    return (log_pi + eta * alpha * log_magnet + eta * (P @ pi)) / (1 + eta * alpha)


def _newton(residual: Callable[[Array], tuple[Array, Array]], x: Array) -> Array:
    """A root of `residual`, which returns a value (n,) and its Jacobian (n, n), by Newton's method.

    Each step is halved until the norm of the value falls. The search ends when no step lowers it.
    """
    value, jacobian = residual(x)
    for _ in range(200):
        if np.linalg.norm(value) < 1e-15:
            break
        direction = np.linalg.solve(jacobian, value)
        for size in 0.5 ** np.arange(40):
            candidate = x - size * direction
            new_value, new_jacobian = residual(candidate)
            if np.linalg.norm(new_value) < np.linalg.norm(value):
                break
        else:
            break
        x, value, jacobian = candidate, new_value, new_jacobian
    return x


def _at(step: Step, t: int) -> float:
    return step(t) if callable(step) else step


def _softmax(x: Array) -> Array:
    # Every step of every method calls this. On so few actions, scipy's softmax is slower.
    return np.exp(x - np.logaddexp.reduce(x))
