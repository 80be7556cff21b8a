"""The average of the parameters: one core, any decay.

`shadow -= (shadow - value) * rate`, `rate = 1 - decay(t)`, t = 1, 2, ... This form leaves a
constant value bitwise constant, and the rate near 0 keeps its precision (see `_schedules`).
`moving_average` is that core over any pytree; `ema` lifts it into an `optax.chain`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from emaopt._tree.checks import check_array, check_shape
from emaopt._tree.devices import beside, in_memory, stay
from emaopt._tree.leaves import apply_update, tree_map, zip_leaves
from emaopt._tree.numbers import is_inexact, wide
from emaopt._tree.paths import Tree, leaf_names

from .decays import DecayLike, as_decay
from .ledger import advance, start as start_ledger
from .rounding import Accumulator, add, add_stochastically, as_accumulator


class EmaState(NamedTuple):
    """An average. `step`: int32 [], the updates so far. `shadow`: like the parameters.

    The shadow has the dtype that was decided at init: float32 or wider unless asked otherwise;
    leaves that are not averaged (integers, booleans, keys) are the newest value. `residue`: what
    rounding took from the shadow, like it, if it is `compensated`. `ledger`: if it was asked for.
    """

    step: jax.Array
    shadow: Tree
    residue: Tree = None
    ledger: Tree = None


class SwappedEmaState(NamedTuple):
    """What `swap` makes of an `EmaState`: the shadow holds the parameters.

    A type of its own, with one leaf more (int8 []), so that a checkpoint shows that it was saved
    swapped, and training on it, or restoring it as if it were not, fails.
    """

    step: jax.Array
    shadow: Tree
    emaopt_swapped: Any
    residue: Tree = None
    ledger: Tree = None


class _Update(Protocol):
    def __call__(
        self, values: Tree, state: EmaState, num_updates: ArrayLike | None = None
    ) -> EmaState: ...


class MovingAverage(NamedTuple):
    """`init(values) -> EmaState`, `update(values, state, num_updates=None) -> EmaState`."""

    init: Callable[..., EmaState]
    update: _Update


def moving_average(
    decay: DecayLike,
    *,
    accumulator_dtype: DTypeLike | Accumulator | None = None,
    ledger: bool = False,
) -> MovingAverage:
    """The average of any pytree of values: `shadow -= (shadow - value) * (1 - decay(t))`.

    `decay`: a number, or a function of t, the number of updates with this one (1, 2, ...);
    `num_updates` replaces t, as TF1's argument does. The shadow starts as a copy of the values; in
    TF1, of a tensor, it starts at zero: `init` zeros for that. `accumulator_dtype`: the dtype of
    the shadow, by default the values' own or float32, whichever is wider; or `compensated()`, which
    loses nothing to rounding, or `stochastic()`, in 2 bytes. Arithmetic is in float32 or wider in
    any case. `ledger`: keep a record of the weights, for `describe`. TF1's
    `ExponentialMovingAverage.apply`.

    >>> mean = moving_average(0.5)
    >>> state = mean.init({"w": jnp.array([0.0])})
    >>> mean.update({"w": jnp.array([8.0])}, state).shadow
    {'w': Array([4.], dtype=float32)}
    """
    decay = as_decay(decay)
    accumulator = as_accumulator(accumulator_dtype)
    compensated = accumulator.rounding == "compensated"

    def init(values):
        rows, treedef = zip_leaves(values=values)
        names = leaf_names(values)
        leaves = [_copy(name, x, accumulator) for name, (x,) in zip(names, rows, strict=True)]
        shadow, residue = (treedef.unflatten(leaf[i] for leaf in leaves) for i in range(2))
        step, record = jax.tree.map(
            lambda x: beside(values, x),
            (jnp.zeros((), jnp.int32), start_ledger() if ledger else None),
        )
        return EmaState(step, shadow, residue if compensated else None, record)

    def update(values, state, num_updates=None):
        _check_state(state, compensated, ledger)
        before, state = state, jax.tree.map(in_memory, state)
        step = jnp.asarray(optax.safe_increment(state.step))
        rate = decay.rate(step if num_updates is None else num_updates)
        residue = state.residue if compensated else jax.tree.map(lambda _: None, state.shadow)
        rows, treedef = zip_leaves(
            values=values, **{"state.shadow": state.shadow, "state.residue": residue}
        )
        names = leaf_names(values)
        leaves = [
            _lerp(name, x, s, low, rate, accumulator, step, i)
            for i, (name, (x, s, low)) in enumerate(zip(names, rows, strict=True))
        ]
        shadow, residue = (treedef.unflatten(leaf[i] for leaf in leaves) for i in range(2))
        record = advance(state.ledger, rate, _share(leaf[2] for leaf in leaves)) if ledger else None
        after = EmaState(step, shadow, residue if compensated else None, record)
        return jax.tree.map(stay, before, after)

    return MovingAverage(init, update)


def _copy(name: str, x, accumulator: Accumulator):
    """A value as the shadow starts: what is stored of it, and what is left over."""
    if x is None:
        return None, None
    check_array(name, x, "params")
    x = jnp.asarray(x)
    if not is_inexact(x):
        return jnp.copy(x), None
    dtype = accumulator.dtype or wide(x.dtype)
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(
            f"leaf {name!r} is {x.dtype}, and accumulator_dtype={dtype} has no imaginary part. "
            "Pass a complex dtype, or none."
        )
    stored = jnp.array(x, dtype, copy=True)
    if accumulator.rounding != "compensated":
        return stored, None
    return stored, (x - stored.astype(x.dtype)).astype(dtype)


def _lerp(name: str, x, s, low, rate, accumulator: Accumulator, step, place: int):
    """One leaf of the shadow and what is left over, after a value; and where rounding held it.

    An absent value leaves it, as does a rate of 0.
    """
    if x is None:
        return s, low, None
    check_shape(name, values=x, **{"state.shadow": s})
    x = jnp.asarray(x)
    if not is_inexact(s):
        return x if x.dtype == s.dtype else x.astype(s.dtype), None, None
    dtype = wide(s.dtype)
    old, x = s.astype(dtype), _widen(x, dtype)
    share = jnp.asarray(rate).astype(dtype)
    difference = old - x if low is None else (old - x) + low.astype(dtype)
    increment = -difference * share
    if accumulator.rounding == "stochastic":
        increment = _taken(rate, increment, 0, x)
        new = add_stochastically(_taken(rate, old, old, 0), increment, step, place)
        return new, None, lambda: (difference != 0) & (increment == 0)
    if low is None:
        new = _taken(rate, old + increment, old, x).astype(s.dtype)
        return new, None, lambda: (difference != 0) & (new == s)
    kept = low.astype(dtype)
    total, lost = add(old, kept, increment)
    total, lost = _taken(rate, total, old, x), _taken(rate, lost, kept, 0)
    new = total.astype(s.dtype)
    left = ((total - new.astype(dtype)) + lost).astype(s.dtype)
    return new, left, lambda: (difference != 0) & (new == s) & (left == low)


def _taken(rate, new, old, value):
    """A copy is exact, and a value that is not taken cannot poison the average."""
    if isinstance(rate, np.floating) and 0 < rate < 1:
        return new
    return jnp.where(rate >= 1, value, jnp.where(rate <= 0, old, new))


def _share(held):
    """The share of true elements, float32 []."""
    held = [x() for x in held if x is not None]
    number = float(sum(x.size for x in held))  # an integer beside an array must fit into 32 bits
    true = sum((jnp.sum(x, dtype=jnp.float32) for x in held), jnp.zeros((), jnp.float32))
    return true / max(number, 1.0)


def _check_state(state: Any, compensated: bool, ledger: bool) -> None:
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
    for field, wanted, argument in (
        ("residue", compensated, "accumulator_dtype=compensated()"),
        ("ledger", ledger, "ledger=True"),
    ):
        if (getattr(state, field) is not None) != wanted:
            raise ValueError(
                f"state has {'no' if wanted else 'a'} {field}: it was made "
                f"{'without' if wanted else 'with'} {argument}. Pass the EmaState that its own "
                "init made."
            )


def _widen(x, dtype):
    """A value in the dtype of the arithmetic, after it was rounded to its own.

    XLA leaves that rounding out where a bfloat16 sum goes on in float32, and the average would be
    of parameters that never were.
    """
    if x.dtype == jnp.bfloat16:
        x = jax.lax.reduce_precision(x.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def ema(
    decay: DecayLike,
    *,
    sequential_update: bool = True,
    accumulator_dtype: DTypeLike | Accumulator | None = None,
    ledger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The average of the parameters, as the last link of an `optax.chain`.

    Last, because it averages what the updates lead to: `params + updates`, rounded as
    `optax.apply_updates` rounds it. Wrap the whole chain, this link included, in
    `optax.MultiSteps` or `optax.apply_if_finite`, so that it counts only steps that were made. The
    updates pass unchanged. `decay`, `accumulator_dtype` and `ledger`: see `moving_average`.

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
    core = moving_average(decay, accumulator_dtype=accumulator_dtype, ledger=ledger)

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
