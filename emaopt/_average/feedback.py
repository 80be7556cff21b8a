"""Feed averages back into training.

`overwrite` moves the parameters to their average every n updates: Switch EMA, lookahead, DiLoCo.
`primal` takes the gradients near the average at every update: schedule-free training, GPA.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from emaopt._tree.calls import shows_its_call
from emaopt._tree.checks import (
    SHARE,
    Range,
    check_own_state,
    check_scalar,
    check_transformation,
    whole,
)
from emaopt._tree.leaves import apply_updates, by_path, tree_map
from emaopt._tree.numbers import is_concrete, is_inexact, wide
from emaopt._tree.paths import Tree

from .find import PrimalState, average as average_of, averages, with_values
from .match import match, replace


@shows_its_call
def overwrite(
    n: int,
    tx: optax.GradientTransformation,
    *,
    strength: ArrayLike | Callable[[Any], Any] = 1.0,
    outer: optax.GradientTransformation | None = None,
    name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Overwrite the parameters with their average after every n updates; last in the chain.

    After its updates n, 2n, ... the updates become `strength * (average - params)`, where `params`
    are the parameters that the step led to. The average itself is not changed, nor is the state of
    the optimizer. With `strength=1`, `optax.apply_updates` leads to the averages: bit for bit where
    an average is within a factor of two of its parameter, otherwise to within one rounding of their
    difference in the dtype of the updates. A parameter that is NaN stays NaN.

    With `outer`, the average is a point that moves at these updates only, by an optimizer of its
    own: its gradient is `average - params`, and average and parameters continue from the result.
    Use `ema(1.0)` as that average: it never moves by itself.

    Switch EMA (arXiv:2402.09240), hare and tortoise (arXiv:2406.02596): `overwrite(n, ema(decay))`,
    with n of one epoch. Keras' `ema_overwrite_frequency`: `overwrite(n, ema(after(1, momentum)))`.
    Lookahead (arXiv:1907.08610): `overwrite(k, ema(1.0), outer=optax.sgd(alpha))`. DiLoCo
    (arXiv:2311.08105): `overwrite(h, ema(1.0), outer=optax.sgd(0.7, 0.9, nesterov=True))`. Several
    workers on a mesh axis take the mean of their gradients first: `outer=optax.chain(
    optax.stateless(lambda g, p: jax.lax.pmean(g, axis)), optax.sgd(...))`, inside `jax.shard_map`.

    Args:
      n: The number of updates from one overwriting to the next; 1 or more.
      tx: `ema(decay)`, or what Optax and `heal` wrap around it.
      strength: How far the parameters move to the average: a number from 0 to 1, or a schedule of
        the number of updates before this one (0, 1, ...).
      outer: An optimizer of the average, which sees `average - params` as the gradient.
      name: Which average, where a leaf has several, as for `average`.

    Returns:
      A transformation. Its state is that of `tx`; with `outer`, `(state of tx, state of outer)`.
      Leaves without an average keep their update.

    Example:
      >>> import emaopt
      >>> tx = optax.chain(optax.sgd(1.0), overwrite(2, emaopt.ema(0.5)))
      >>> params = jnp.array([0.0])
      >>> opt_state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, opt_state = tx.update(jnp.array([-8.0]), opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params, opt_state[-1].shadow)
      [8.] [4.]
      [10.] [10.]
    """
    check_scalar("n", n, *whole(1))
    if not callable(strength):
        check_scalar("strength", strength, *SHARE)
    check_transformation("tx", tx, "emaopt.ema(decay)")
    inner = optax.with_extra_args_support(tx)
    if outer is not None:
        check_transformation("outer", outer, "an optimizer such as optax.sgd(0.7)")
        inner = _with_outer(n, inner, outer, name)
    meets = not callable(strength) and is_concrete(strength) and strength == 1

    def init(params):
        return _init("tx", inner, params)

    def update(updates, state, params=None, **extra):
        old = state
        updates, state = inner.update(updates, state, params, **extra)
        now, step = _is_due(n, old, state)
        share = strength(step - 1) if callable(strength) else strength
        led_to = _widened(apply_updates(params, updates))
        goal = _averages_like(params, state, name)

        def feed(p, u, q, a):
            if a is None or u is None or not is_inexact(u):
                return u
            # all the way, and rounded first, the parameters meet what `average` returns bit for bit
            target = _as(a, p).astype(a.dtype) if meets else q + (a - q) * share
            return jnp.where(now, _difference(target, p, u), u)

        trees = {"params": params, "updates": updates, "led_to": led_to, "average": goal}
        return tree_map(feed, **trees), state

    return optax.GradientTransformationExtraArgs(init, update)


def _with_outer(n: int, inner: Any, outer: Any, name: str | None) -> Any:
    """Move the averages of a transformation every n updates, by an optimizer of their own."""
    outer = optax.with_extra_args_support(outer)

    def init(params):
        state = _init("tx", inner, params)
        return state, outer.init(_averages_like(params, state, name))

    def update(updates, state, params=None, **extra):
        old, of_outer = state
        updates, state = inner.update(updates, old, params, **extra)
        led_to = _widened(apply_updates(params, updates))
        now, _ = _is_due(n, old, state)
        move = lambda state, of_outer: _moved(state, of_outer, outer, led_to, name)
        stay = lambda state, of_outer: (state, of_outer)
        return updates, jax.lax.cond(now, move, stay, state, of_outer)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_due(n: int, before: Tree, state: Tree) -> tuple[jax.Array, jax.Array]:
    """Return whether t has passed one of n, 2n, ... at this update, and t."""
    last, step = (next(iter(averages(s).values())).step for s in (before, state))
    period = jnp.asarray(n, step.dtype)
    return step // period > last // period, step


@shows_its_call
def primal(
    tx: optax.GradientTransformation,
    average: optax.GradientTransformation,
    interpolation: ArrayLike = 0.9,
    *,
    pull: ArrayLike | Callable[[Any], Tree] = 0.0,
    at: str = "y",
) -> optax.GradientTransformationExtraArgs:
    """Train with gradients taken near the average: schedule-free training, primal averaging, GPA.

    There are three points. z is where the optimizer `tx` stands. x is the average of z. The
    parameters are y, between the two, and the gradient is taken there::

        z = z + (update of tx, from the gradient at y)
        x = average of z
        y = interpolation * x + (1 - interpolation) * z

    Evaluate x: `emaopt.average(params, opt_state)`. The learning rate may stay constant, for any
    length of training. `average=ema(power(0))` is schedule-free training (Defazio et al.,
    arXiv:2405.15682), a constant decay is generalized primal averaging (GPA, arXiv:2512.17131),
    `power(r)` weighs as ScheduleFree+ (arXiv:2605.19095). Choose an optimizer without momentum,
    such as `optax.adam(rate, b1=0)`: the interpolation takes the place of momentum.

    It is a bad choice with Muon, whose updates are normalized. On handwritten digits its test loss
    was 60 % above that of the best tuned decay of the learning rate, and that of `ema()` alone was
    not above it (`benchmarks/results/schedules.md`). Where data is seen many times, compare both.

    The state has one array per parameter more than that of `tx`: the average. z follows from y and
    x, with an error of one rounding of y divided by `1 - interpolation`. For parameters of 16 bits
    that would be too much, and z is kept in float32 too. Batch statistics are gathered at y:
    measure them again with the average before evaluating (`recalibrate`).

    With `pull`, z moves towards x: `z = z + tx.update(...) + pull * (x - y)`, x from before the
    update. At `interpolation=0` this is PACE (arXiv:2606.25086).

    Args:
      tx: The optimizer, any chain without an average.
      average: `ema(decay)`, or what Optax and `heal` wrap around it.
      interpolation: The weight of the average in the parameters, from 0 to below 1. With 0 the
        parameters are z, as in a chain of `tx` and `average`.
      pull: How far z moves to x at each update: a number from 0 to 1, or a function of the state of
        `tx` after its update that returns a number or a tree like the parameters.
      at: The parameters that `tx` is called with, so where its weight decay acts: "y", as in
        schedulefree and Optax, or "z". An optimizer that computes the new parameters from the old
        ones (`ftrl`, LAMB, projections) needs "z".

    Returns:
      A transformation; its updates lead from y to the next y. Put it last in a chain, and wrap
      `optax.MultiSteps` or `optax.apply_if_finite` around it.

    Example:
      >>> import emaopt
      >>> tx = primal(optax.sgd(1.0), emaopt.ema(0.5), interpolation=0.75)
      >>> params = jnp.array([0.0])
      >>> updates, opt_state = tx.update(jnp.array([-8.0]), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))  # z = 8, x = 4, y = 0.75 * 4 + 0.25 * 8
      [5.]
    """
    _check_primal(interpolation, pull, at)
    check_transformation("tx", tx, "an optimizer such as optax.sgd(0.1)")
    check_transformation("average", average, "emaopt.ema(decay)")
    base, mean = optax.with_extra_args_support(tx), optax.with_extra_args_support(average)

    def init(params):
        of_base, of_mean = base.init(params), _init("average", mean, params)
        if averages(of_base):
            raise ValueError("tx holds an average of its own. Pass the optimizer alone.")
        if any(found.rows for found in averages(of_mean).values()):
            raise ValueError("average has rows=, but primal moves every row. Leave rows= out.")
        x = _averages_like(params, of_mean)
        return PrimalState(of_base, of_mean, tree_map(_kept, params=params, x=x))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(
                "params is missing: primal computes the next parameters from them. "
                "Call tx.update(grads, state, params)."
            )
        check_own_state("primal", PrimalState, state)
        x = _averages_like(params, state.average)
        z = tree_map(partial(_z, interpolation), params=params, x=x, z=state.z)
        seen = params if at == "y" else tree_map(_as, z=z, params=params)
        updates, of_base = base.update(updates, state.base, seen, **extra)
        if callable(pull) or not is_concrete(pull) or pull != 0:
            share = pull(of_base) if callable(pull) else pull
            updates = _pulled(updates, params, x, share)
        moves = tree_map(_as, updates=updates, z=z)
        _, of_mean = mean.update(moves, state.average, z, **extra)
        z = apply_updates(z, moves)
        x = _averages_like(params, of_mean)
        kept = tree_map(lambda old, new: new, kept=state.z, z=z)
        lead = partial(_to_next_y, interpolation)
        updates = tree_map(lead, params=params, updates=updates, x=x, z=z)
        return updates, PrimalState(of_base, of_mean, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_primal(interpolation: Any, pull: Any, at: str) -> None:
    """Raise unless the numbers of `primal` are in range, and the point is one of its points."""
    below_one = Range(lambda x: (x >= 0) & (x < 1), "a number from 0 to below 1")
    check_scalar("interpolation", interpolation, *below_one)
    if not callable(pull):
        check_scalar("pull", pull, *SHARE)
    if at not in ("y", "z"):
        raise ValueError(f"at={at!r} is not a point. Pass 'y' or 'z'.")


def _init(name: str, tx: optax.GradientTransformation, params: Tree) -> Tree:
    """Make the state of a transformation that must hold an average."""
    state = tx.init(params)
    if not averages(state):
        raise ValueError(f"{name} holds no average. Pass emaopt.ema(decay).")
    return state


def _widened(params: Tree) -> Tree:
    """Convert the floating-point leaves to float32 or wider."""
    widen = lambda p: jnp.asarray(p, wide(jnp.result_type(p))) if is_inexact(p) else p
    return tree_map(widen, params=params)


def _averages_like(params: Tree, opt_state: Tree, name: str | None = None) -> Tree:
    """Collect the averages of floating-point leaves, float32 or wider; `None` at other leaves."""
    like = lambda p: jax.ShapeDtypeStruct(jnp.shape(p), wide(jnp.result_type(p)))
    wanted = tree_map(lambda p: like(p) if is_inexact(p) else p, params=params)
    found = average_of(wanted, opt_state, name)
    has_none = lambda w, a: not is_inexact(w) or a is w  # `average` returns what has none as it is
    return tree_map(lambda w, a: None if has_none(w, a) else a, wanted=wanted, average=found)


def _difference(target: jax.Array, p: Any, u: jax.Array) -> jax.Array:
    """Compute the update that leads from a parameter to a target, in the dtype of the update."""
    return (target - jnp.asarray(p).astype(target.dtype)).astype(u.dtype)


def _as(x: Any, like: Any) -> Any:
    """Convert a floating-point leaf to the dtype of another one."""
    return x.astype(jnp.result_type(like)) if is_inexact(x) and is_inexact(like) else x


def _kept(p: Any, x: Any) -> Any:
    """Start z of a leaf whose parameters are too narrow to tell z from y and x."""
    if x is None or jnp.result_type(p) == x.dtype:
        return None
    if isinstance(p, jax.ShapeDtypeStruct):
        return p.update(dtype=x.dtype)
    return jnp.array(p, x.dtype, copy=True)


def _z(interpolation: Any, y: Any, x: Any, z: Any) -> Any:
    """Find where the optimizer stands: as stored, or from y = z + (x - z) * interpolation."""
    if z is not None or x is None:
        return y if z is None else z
    y = jnp.asarray(y)
    return y + (y - x) * (interpolation / (1 - interpolation))


def _to_next_y(interpolation: Any, y: Any, u: Any, x: Any, z: Any) -> Any:
    """Compute the update of a leaf that leads from y to the y of the new x and z."""
    if x is None or u is None or not is_inexact(u):
        return u
    # Written with differences of near numbers, which are exact. Through a rounded y, z would be off
    # by that rounding times 1 / (1 - interpolation).
    step = (z - jnp.asarray(y).astype(z.dtype)) + (x - z) * interpolation
    return step.astype(u.dtype)


def _pulled(updates: Tree, y: Tree, x: Tree, share: Any) -> Tree:
    """Add `share * (x - y)` to the updates of the leaves that have an average."""

    def pull(y, u, x, share):
        if x is None or u is None or not is_inexact(u):
            return u
        return (u + share * (x - jnp.asarray(y).astype(x.dtype))).astype(u.dtype)

    if jax.tree.structure(share) == jax.tree.structure(0):
        share = jax.tree.map(lambda _: share, y)
    return tree_map(pull, params=y, updates=updates, x=x, pull=share)


def _moved(
    state: Tree, of_outer: Tree, outer: Any, led_to: Tree, name: str | None
) -> tuple[Tree, Tree]:
    """Move the averages by a step of the outer optimizer, which sees `average - params`."""
    points = _averages_like(led_to, state, name)
    distance = tree_map(lambda point, p: point - p, average=points, params=led_to)
    moves, of_outer = outer.update(distance, of_outer, points)
    values = by_path(optax.apply_updates(points, moves))
    matched = match(led_to, state, name)
    new = {}
    for found, part in zip(matched.averages, matched.parts, strict=True):
        own = {path: values.get((*part, *path)) for path in by_path(found.state.shadow)}
        new[found.path] = with_values(found.state, own)
    return replace(state, new), of_outer
