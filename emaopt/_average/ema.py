"""Average the parameters: one core, any decay.

`shadow -= (shadow - value) * rate`, `rate = 1 - decay(t)`, t = 1, 2, ... This form leaves a
constant value bitwise constant, and the rate near 0 keeps its precision (see `decay`).
`moving_average` is that core over any pytree. `ema` makes it a link of an `optax.chain`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from emaopt._tree.calls import shows_its_call, text_of
from emaopt._tree.checks import check_array, check_flag, check_shape, shown
from emaopt._tree.devices import beside, in_memory, stay
from emaopt._tree.leaves import apply_updates, by_path, zip_leaves
from emaopt._tree.numbers import is_inexact, wide
from emaopt._tree.paths import Tree, leaf_names

from .clock import advanced, as_advance, as_count, rate_of_update
from .decay import DecayLike, as_decay
from .decays import SCALE_FREE
from .lazy import Mask, settled, start as start_rest, touch
from .ledger import record, start as start_ledger
from .rounding import Draw, Rounding, Stored, as_rounding, widen


class EmaState(NamedTuple):
    """Hold an average. `step`: int32 [], t: the updates so far. `shadow`: like the parameters.

    With `advance`, t counts what `advance` counts. The shadow keeps the dtype that it got at init:
    float32 or wider unless asked otherwise. Leaves that are not averaged (integers, booleans, keys)
    hold the newest value. `residue`: with `compensated()`, what rounding took from the shadow, a
    tree like it. `ledger`: with `ledger=True`, the record of the weights. `rows`: with `rows=mask`,
    how long each row of the tables has rested. The shadow of such a row is its average when it was
    last touched; `average` brings it up to date.
    """

    step: jax.Array
    shadow: Tree
    residue: Tree = None
    ledger: Tree = None
    rows: Tree = None

    def __repr__(self) -> str:
        return shown(self)


class SwappedEmaState(NamedTuple):
    """Hold an average that `swap` has exchanged with the parameters: the shadow is the parameters.

    It is a type of its own with one leaf more (int8 []). So a checkpoint shows that it was saved
    swapped. It is an error to train on it, or to restore it as if it were not swapped.
    """

    step: jax.Array
    shadow: Tree
    residue: Tree = None
    ledger: Tree = None
    rows: Tree = None
    emaopt_swapped: Any = np.ones((), np.int8)

    def __repr__(self) -> str:
        return shown(self)


class _Update(Protocol):
    def __call__(
        self,
        values: Tree,
        state: EmaState,
        num_updates: ArrayLike | None = None,
        advance: ArrayLike = 1,
        before: Tree = None,
    ) -> EmaState: ...


class MovingAverage(NamedTuple):
    """Hold `init(values)` and `update(values, state, num_updates=None, advance=1)`.

    Both return an `EmaState`. With `rows=mask`, call `update(values, state, before=values_before)`.
    """

    init: Callable[..., EmaState]
    update: _Update

    def __repr__(self) -> str:
        return text_of(self)


@shows_its_call
def moving_average(
    decay: DecayLike,
    *,
    accumulator_dtype: DTypeLike | Rounding | None = None,
    ledger: bool = False,
    rows: Mask | None = None,
) -> MovingAverage:
    """Average any pytree of values: `shadow -= (shadow - value) * (1 - decay(t))`.

    The shadow starts as a copy of the first values. In TF1 the average of a tensor starts at zero:
    pass zeros to `init` for that. Arithmetic is in float32 or wider. This is TF1's
    `ExponentialMovingAverage.apply`.

    Args:
        decay: A number from 0 to 1, or a function of t, the number of updates with this one
            (1, 2, ...).
        accumulator_dtype: The dtype of the shadow, by default the wider one of float32 and the
            dtype of the values. Or `compensated()`, which loses nothing to rounding, or
            `stochastic()`, which takes 2 bytes per parameter.
        ledger: Whether to keep a record of the weights, for `ledgers`.
        rows: A mask, true for the tables that `take` takes rows of; see `ema`.

    Returns:
        `init(values) -> EmaState` and `update(values, state, ...) -> EmaState`. Arguments of
        `update`:

        `num_updates` replaces t, as TF1's argument does. It counts updates; a count of images or
        tokens belongs into `advance`.

        `advance=n` moves t by n, a whole number, which may be traced: a clock in samples or tokens.
        The update has the rate of n updates in a row, `Decay.over(t, n)`. The average is then as
        long in tokens for every size of a batch, and `every(n, decay)` is due when t passes a
        multiple of n. Warm-ups and functions are treated as constant over the n units. Inside of
        `optax.MultiSteps` pass the sum over its batches. t is int32 and stops at 2**31 - 1: count
        sequences or thousands of tokens, or pass your own count as `num_updates`, in float32.

        `before`, only with `rows=mask`: the rows as `take` returned them, before the step. It is
        the value that a row had while no batch looked it up. Without it, such a row becomes NaN.

    Example:
        >>> mean = moving_average(0.5)
        >>> state = mean.init({"w": jnp.array([0.0])})
        >>> mean.update({"w": jnp.array([8.0])}, state).shadow
        {'w': Array([4.], dtype=float32)}
    """
    decay = as_decay(decay)
    check_flag("ledger", ledger)
    rounding = as_rounding(accumulator_dtype)

    def init(values: Tree) -> EmaState:
        columns, treedef = zip_leaves(values=values)
        names = leaf_names(values)
        leaves = [start_leaf(name, x, rounding) for name, (x,) in zip(names, columns, strict=True)]
        own = jnp.zeros((), jnp.int32), start_ledger() if ledger else None
        step, its_ledger = jax.tree.map(lambda x: beside(values, x), own)
        rested = None if rows is None else start_rest(values, rows)
        return EmaState(step, *_trees(treedef, leaves, rounding), its_ledger, rested)

    def update(
        values: Tree,
        state: EmaState,
        num_updates: ArrayLike | None = None,
        advance: ArrayLike = 1,
        before: Tree = None,
    ) -> EmaState:
        _check_state(state, rounding, ledger, rows is not None)
        stored, state = state, jax.tree.map(in_memory, state)  # from the host, if it is there
        rested = state.rows
        if rested is not None:
            resting = values if before is None else before
            state = settled(by_path(resting), state, rounding, is_known=before is not None)
        units = as_advance(advance)
        step = advanced(state.step, units)
        rate = rate_of_update(decay, step if num_updates is None else as_count(num_updates), units)
        trees = {"state.shadow": state.shadow}
        if rounding.has_residue:
            trees["state.residue"] = state.residue
        columns, treedef = zip_leaves(values=values, **trees)
        leaves = []
        for name, (x, *own) in zip(leaf_names(values), columns, strict=True):
            draw = Draw(step, len(leaves))
            leaves.append(update_leaf(name, x, Stored(*own), rate, rounding, draw))
        its_ledger = record(state.ledger, rate, units) if ledger else None
        rested = None if rested is None else touch(values, rested, rate)
        after = EmaState(step, *_trees(treedef, leaves, rounding), its_ledger, rested)
        return jax.tree.map(stay, stored, after)  # back to where it was

    return MovingAverage(init, update)


def start_leaf(name: str, x: Any, rounding: Rounding) -> Stored:
    """Return the first leaf of an average: a copy of a value. An abstract value stays abstract."""
    if x is None:
        return Stored(None)
    check_array(name, x, "params")
    if isinstance(x, jax.ShapeDtypeStruct):
        stored = jax.eval_shape(lambda x: start_leaf(name, x, rounding), x)
        return jax.tree.map(lambda s: s.update(sharding=x.sharding), stored)
    x = jnp.asarray(x)
    if not is_inexact(x):
        return Stored(jnp.copy(x))
    dtype = rounding.dtype
    if jnp.iscomplexobj(x) and dtype and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(
            f"leaf {name!r} is {x.dtype}, and accumulator_dtype={dtype} has no imaginary part. "
            "Pass a complex dtype, or none."
        )
    return rounding.start(x)


def update_leaf(
    name: str, x: Any, before: Stored, rate: Any, rounding: Rounding, draw: Draw
) -> Stored:
    """Return one leaf of the average after a new value. Without a value it stays as it is."""
    if x is None:
        return before
    check_shape(name, values=x, **{"state.shadow": before.shadow})
    x = jnp.asarray(x)
    if not is_inexact(before.shadow):  # not averaged: the newest value. A key has no astype.
        dtype = before.shadow.dtype
        return Stored(x if x.dtype == dtype else x.astype(dtype))
    return rounding.move(before, widen(x, wide(before.shadow.dtype)), rate, draw)


def _trees(treedef: Any, leaves: list[Stored], rounding: Rounding) -> tuple[Tree, Tree]:
    """Return the shadow and the residue of all leaves; no residue where the rounding has none."""
    shadow = treedef.unflatten([leaf.shadow for leaf in leaves])
    if not rounding.has_residue:
        return shadow, None
    return shadow, treedef.unflatten([leaf.residue for leaf in leaves])


def _check_state(state: Any, rounding: Rounding, ledger: bool, rows: bool) -> None:
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
    for found, wanted, article, field, argument in (
        (state.residue, rounding.has_residue, "a", "residue", "accumulator_dtype=compensated()"),
        (state.ledger, ledger, "a", "ledger", "ledger=True"),
        (state.rows, rows, "the", "rows", "rows=mask"),
    ):
        if (found is not None) != wanted:
            raise ValueError(
                f"state has {'no' if wanted else article} {field}: it was made "
                f"{'without' if wanted else 'with'} {argument}. Pass the EmaState that its own "
                "init made."
            )


@shows_its_call
def ema(
    decay: DecayLike = SCALE_FREE,
    *,
    sequential_update: bool = True,
    accumulator_dtype: DTypeLike | Rounding | None = None,
    ledger: bool = False,
    rows: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Average the parameters, as the last link of an `optax.chain`.

    It must be the last link, because it averages the parameters after the update: `params +
    updates`, rounded as `optax.apply_updates` rounds it. Wrap the whole chain, this link included,
    in `optax.MultiSteps` or `optax.apply_if_finite`, so that it counts only steps that were made.
    The updates pass unchanged. This is TF1's `ExponentialMovingAverage` in a training step, and its
    `MovingAverageOptimizer`.

    Without an argument the average needs no tuning for any length of training: it is always over
    about the last tenth of the updates so far (`power` of a relative width of 0.10; the mean age of
    what it averages is 11 % of t). Pass another decay where the length is known
    (`half_life(1000)`), and for target networks and teachers (a constant such as 0.99). A run whose
    learning rate goes to zero hardly needs an average. Early in training every average lags: as
    long as the loss falls fast, the parameters themselves are better.

    Args:
        decay: A number from 0 to 1, or a function of t, the number of updates with this one
            (1, 2, ...). By default `power(gamma(0.10))`.
        sequential_update: False averages the parameters from before the update, with t = 0, 1, ...
            In TF1 that option leaves the order to chance; here it is fixed.
        accumulator_dtype: How the average is stored; see `moving_average`.
        ledger: Whether to keep a record of the weights, for `ledgers`.
        rows: A mask, a tree of booleans like the parameters or a function that makes one
            (`matching("embedding")`), true for the tables that `take` takes rows of. Their averages
            have the numbers of TF1, where every row moves at every step, but a step costs only the
            rows of its batch. Other rows are brought up to date when a batch looks them up, or when
            `average`, `swap` and what is built on them read the table.

    Returns:
        A transformation: `update(updates, state, params, num_updates=None, advance=1)`.
        `num_updates` replaces t, and `advance` is by how much t moves; see `moving_average`.

    Example:
        >>> tx = optax.chain(optax.sgd(1.0), ema(0.5))
        >>> params = jnp.array([0.0])
        >>> updates, state = tx.update(jnp.array([-8.0]), tx.init(params), params)
        >>> state[-1].shadow
        Array([4.], dtype=float32)
    """
    check_flag("sequential_update", sequential_update)
    core = moving_average(decay, accumulator_dtype=accumulator_dtype, ledger=ledger, rows=rows)

    def update(updates, state, params=None, *, num_updates=None, advance=1, **extra):
        del extra
        if params is None:
            raise ValueError(
                "params is missing: ema averages the parameters. "
                "Call tx.update(grads, state, params)."
            )
        if sequential_update:
            values = apply_updates(params, updates)
        else:
            if isinstance(advance, jax.Array) or advance != 1:
                raise ValueError(
                    f"advance={advance} with sequential_update=False: these parameters are from "
                    "before the update, which advance counts. Use sequential_update=True."
                )
            values = params
            num_updates = state.step if num_updates is None else num_updates
        return updates, core.update(values, state, num_updates, advance, before=params)

    return optax.GradientTransformationExtraArgs(core.init, update)
