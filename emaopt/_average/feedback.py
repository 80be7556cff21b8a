"""Averages fed back into training."""

import jax.numpy as jnp
import optax

from emaopt._tree.checks import check_scalar, whole
from emaopt._tree.leaves import tree_map
from emaopt._tree.numbers import is_inexact, wide

from .find import average as average_of, averages


def overwrite(
    n: int, average: optax.GradientTransformation, name: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """An average that overwrites the parameters after every n updates: last in the chain.

    `average`: `ema(decay)`, or what Optax and `heal` wrap around it; the state is its own. After
    its updates n, 2n, ... the updates become `average - params`, so that `optax.apply_updates`
    leads to the averages: exactly, where an average is between half and twice its parameter, and
    otherwise to within one rounding of their difference, in the dtype of the updates. A parameter
    that is NaN stays NaN. Leaves without an average keep their update. The average itself is not
    changed, nor is the optimizer's state. `name`: which average, where a leaf has several, as for
    `emaopt.average`.

    `overwrite(n, ema(after(1, momentum)))` is Keras' `ema_overwrite_frequency`; a long n, one
    epoch, Switch EMA (arXiv:2402.09240). Lookahead (arXiv:1907.08610) with slow step size alpha is
    `overwrite(k, ema(every(k, (1 - alpha) ** (1 / k))))`.

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
    if not isinstance(average, optax.GradientTransformation):
        raise ValueError(f"average={average!r} is no transformation. Pass emaopt.ema(decay).")
    inner = optax.with_extra_args_support(average)

    def init(params):
        state = inner.init(params)
        if not averages(state):
            raise ValueError("average holds no average. Pass emaopt.ema(decay).")
        return state

    def update(updates, state, params=None, **extra):
        updates, state = inner.update(updates, state, params, **extra)
        goal = average_of(params, state, name)
        step = next(iter(averages(state).values())).step
        now = step % jnp.asarray(n, step.dtype) == 0
        feed = lambda p, u, a: u if a is p else _feed(p, u, a, now)
        return tree_map(feed, params=params, updates=updates, average=goal), state

    return optax.GradientTransformationExtraArgs(init, update)


def _feed(p, u, a, now):
    """The update of one leaf that has an average."""
    if u is None or not (is_inexact(p) and is_inexact(u)):
        return u
    dtype = wide(jnp.result_type(p))
    difference = a.astype(dtype) - jnp.asarray(p).astype(dtype)
    return jnp.where(now, difference.astype(jnp.result_type(u)), u)
