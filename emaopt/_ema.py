"""The average of the parameters: one core, any decay.

`shadow -= (shadow - value) * rate`, `rate = 1 - decay(t)`, t = 1, 2, ... This form leaves a
constant value bitwise constant, and the rate near 0 keeps its precision (see `_schedules`).
`moving_average` is that core over any pytree; `ema` lifts it into an `optax.chain`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._schedules import DecayLike, as_decay
from ._tree import (
    Tree,
    apply_update,
    beside,
    check_shape,
    is_inexact,
    leaf_names,
    tree_map,
    wide,
    zip_leaves,
)


class EmaState(NamedTuple):
    """An average. `step`: int32 [], the updates so far. `shadow`: like the parameters.

    The shadow has the dtype that was decided at init: float32 or wider unless asked otherwise;
    leaves that are not averaged (integers, booleans, keys) are the newest value.
    """

    step: jax.Array
    shadow: Tree


class SwappedEmaState(NamedTuple):
    """What `swap` makes of an `EmaState`: the shadow holds the parameters.

    A type of its own, with one leaf more (int8 []), so that a checkpoint shows that it was saved
    swapped, and training on it, or restoring it as if it were not, fails.
    """

    step: jax.Array
    shadow: Tree
    emaopt_swapped: Any


class MovingAverage(NamedTuple):
    """`init(values) -> EmaState`, `update(values, state, num_updates=None) -> EmaState`."""

    init: Callable[..., EmaState]
    update: Callable[..., EmaState]


def moving_average(decay: DecayLike, *, accumulator_dtype: Any = None) -> MovingAverage:
    """The average of any pytree of values: `shadow -= (shadow - value) * (1 - decay(t))`.

    `decay`: a number, or a function of t, the number of updates with this one (1, 2, ...);
    `num_updates` replaces t, as TF1's argument does. The shadow starts as a copy of the values; in
    TF1, of a tensor, it starts at zero: `init` zeros for that. `accumulator_dtype`: the dtype of
    the shadow; by default the values' own or float32, whichever is wider. Arithmetic is in float32
    or wider in any case. TF1's `ExponentialMovingAverage.apply`.

    >>> mean = moving_average(0.5)
    >>> state = mean.init({"w": jnp.array([0.0])})
    >>> mean.update({"w": jnp.array([8.0])}, state).shadow
    {'w': Array([4.], dtype=float32)}
    """
    decay = as_decay(decay)
    if accumulator_dtype is not None and not jnp.issubdtype(accumulator_dtype, jnp.inexact):
        raise ValueError(
            f"accumulator_dtype={accumulator_dtype} cannot hold an average. Pass a floating dtype."
        )

    def copy(x):
        x = jnp.asarray(x)
        if not is_inexact(x):
            return jnp.copy(x)
        return jnp.array(x, accumulator_dtype or wide(x.dtype), copy=True)

    def init(values):
        shadow = tree_map(copy, values=values)
        return EmaState(beside(values, jnp.zeros((), jnp.int32)), shadow)

    def update(values, state, num_updates=None):
        if isinstance(state, SwappedEmaState):
            raise ValueError(
                "opt_state is swapped: its shadow holds the parameters. Call "
                "params, opt_state = emaopt.swap(params, opt_state) before training on."
            )
        if not isinstance(state, EmaState):
            raise ValueError(
                f"state is a {type(state).__name__}, not an average. Pass the EmaState that its "
                "own init made."
            )
        step = jnp.asarray(optax.safe_increment(state.step))
        rate = decay.rate(step if num_updates is None else num_updates)
        rows, treedef = zip_leaves(values=values, **{"state.shadow": state.shadow})
        names = leaf_names(values)
        leaves = [_lerp(name, x, s, rate) for name, (x, s) in zip(names, rows, strict=True)]
        return EmaState(step, treedef.unflatten(leaves))

    return MovingAverage(init, update)


def _lerp(name: str, x, s, rate):
    """One leaf of the shadow after a value; an absent value leaves it, as does a rate of 0."""
    if x is None:
        return s
    check_shape(name, values=x, **{"state.shadow": s})
    x = jnp.asarray(x)
    if not is_inexact(s):
        return x if x.dtype == s.dtype else x.astype(s.dtype)
    dtype = wide(s.dtype)
    old, x = s.astype(dtype), _widen(x, dtype)
    new = old - (old - x) * jnp.asarray(rate).astype(dtype)
    if not isinstance(rate, np.generic):
        # a copy is exact, and a value that is not taken cannot poison the average
        new = jnp.where(rate >= 1, x, jnp.where(rate <= 0, old, new))
    return new.astype(s.dtype)


def _widen(x, dtype):
    """A value in the dtype of the arithmetic, after it was rounded to its own.

    XLA leaves that rounding out where a bfloat16 sum goes on in float32, and the average would be
    of parameters that never were.
    """
    if x.dtype == jnp.bfloat16:
        x = jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def ema(
    decay: DecayLike, *, sequential_update: bool = True, accumulator_dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The average of the parameters, as the last link of an `optax.chain`.

    Last, because it averages what the updates lead to: `params + updates`, rounded as
    `optax.apply_updates` rounds it. Wrap the whole chain, this link included, in
    `optax.MultiSteps` or `optax.apply_if_finite`, so that it counts only steps that were made. The
    updates pass unchanged. `decay` and `accumulator_dtype`: see `moving_average`.

    `update(updates, state, params, num_updates=n)`: n replaces t.
    `sequential_update=False` averages the parameters from before the update, with t = 0, 1, ...
    (what TF1's option of that name does, when its race goes that way).

    TF1's `ExponentialMovingAverage` in a training step; `MovingAverageOptimizer`.

    >>> tx = optax.chain(optax.sgd(1.0), ema(0.5))
    >>> params = jnp.array([0.0])
    >>> updates, state = tx.update(jnp.array([-8.0]), tx.init(params), params)
    >>> state[-1].shadow
    Array([4.], dtype=float32)
    """
    core = moving_average(decay, accumulator_dtype=accumulator_dtype)

    def update(updates, state, params=None, *, num_updates=None, **extra):
        del extra
        if params is None:
            raise ValueError(
                "params is missing: ema averages the parameters. "
                "Call tx.update(grads, state, params)."
            )
        if sequential_update:
            values = tree_map(apply_update, params=params, updates=updates)
        else:
            values = params
            num_updates = state.step if num_updates is None else num_updates
        return updates, core.update(values, state, num_updates)

    return optax.GradientTransformationExtraArgs(core.init, update)
