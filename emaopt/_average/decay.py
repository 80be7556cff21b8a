"""Define what a decay is: a function of t, the number of updates with this one.

Two kinds of functions depend on the step. They count differently:

* A *schedule* gives a learning rate. It sees the number of updates before this one: 0, 1, 2, ...
  This is the convention of Optax and of TF1. See `emaopt._optimizers.learning_rate`.
* A *decay* gives the share of an average that one update keeps. It sees the number of updates with
  this one: t = 1, 2, 3, ...

An average computes with the *rate*, `1 - decay`. Near a decay of 1 the subtraction loses all digits
in float32: `1 - (1 - 1/t)` is wrong by 19 % at t = 1e7. So every decay of emaopt is a `Decay`,
which is made from its rate. Users may also pass a number, for a constant decay, or any function
`t -> decay`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._tree.calls import show
from emaopt._tree.checks import SHARE, check, check_scalar
from emaopt._tree.numbers import is_concrete, scalar


# The logarithm of a decay of 0, in place of -infinity: exp of it is 0 in float64 too, and no
# product with a number of updates is infinite or NaN (0 * infinity), which jax_debug_infs reports.
LOG_OF_ZERO = -1e4
_COUNTED = (
    "the number of updates with this one, 1 or more. Optax's schedules count from 0: a decay in "
    'optax.inject_hyperparams needs static_args="decay". To start later: emaopt.after(n, decay)'
)


@dataclasses.dataclass(frozen=True, repr=False)
class Decay:
    """Make a decay from its rate: `decay(t) = 1 - rate(t)`.

    Args:
        rate: A function of t, the number of updates with this one (1, 2, ...). It returns the share
            of the new value in the average, from 0 to 1.
        over: A function of t and n. It returns the combined rate of the n updates that end at t:
            `1 - decay(t) * decay(t - 1) * ... * decay(t - n + 1)`. `every`, `after`, `debiased` and
            `update(..., advance=n)` are computed from it.
        exact: False if `over` is an approximation that treats the decay as constant over the n
            updates.
        text: What `repr` shows.

    Example:
        >>> mean = Decay(lambda t: 1 / t, lambda t, n: n / t)
        >>> mean(4)
        0.75
    """

    rate: Callable[[Any], Any]
    over: Callable[[Any, Any], Any]
    exact: bool = True
    text: str = ""

    def __call__(self, t: Any) -> Any:
        check("t", t, lambda t: t >= 1, _COUNTED)
        return 1 - self.rate(t)

    def __repr__(self) -> str:
        return self.text or f"Decay(rate={show(self.rate)})"


DecayLike = float | jax.Array | Callable[[Any], Any]


def as_decay(decay: DecayLike) -> Decay:
    """Return the `Decay` that a user's argument stands for.

    For a number or a function of the user the rate is `1 - float32(decay)`, as in TF1.
    """
    if isinstance(decay, Decay):
        if not decay.text:
            _check_function("the rate of decay", decay.rate, show(decay))
        return decay
    if callable(decay):
        _check_function("decay", decay, show(decay))
        rate = lambda t: 1 - jnp.asarray(decay(t)).astype(jnp.float32)
        return pointwise(rate, show(decay))
    _check_number(decay)
    if is_concrete(decay) and decay < 1 and np.float32(decay) == 1:
        raise ValueError(
            f"decay={decay} is 1 in float32: the average would never move. Pass emaopt.half_life("
            f"{math.log(0.5) / math.log(float(decay)):.4g}), which keeps 1 - decay exact."
        )
    rate = 1 - scalar(decay, jnp.float32)
    return Decay(lambda t: rate, lambda t, n: together(_log(rate), n), text=show(decay))


def as_inner(decay: DecayLike) -> Decay:
    """Return the `Decay` of an argument of another decay, `every(10, 0.9)`, in full precision.

    For a number, `1 - decay` is computed in float64, and only then rounded to float32.
    """
    if callable(decay) or not is_concrete(decay):
        return as_decay(decay)
    _check_number(decay)
    kept = float(decay)
    rate = 1 - kept
    log = max(math.log(kept), LOG_OF_ZERO) if kept else LOG_OF_ZERO
    return Decay(lambda t: number(rate), lambda t, n: together(log, n), text=show(decay))


def pointwise(rate: Callable[[Any], Any], text: str) -> Decay:
    """Return a decay from its rate at each t, where no formula for n updates is known.

    Over n updates the last decay is treated as constant.
    """
    return Decay(rate, lambda t, n: together(_log(rate(t)), n), exact=False, text=text)


def together(log: Any, n: Any) -> jax.Array:
    """Return `1 - exp(log)**n`, the rate of n updates, without a subtraction that loses digits."""
    return -jnp.expm1(number(n) * number(log))


def number(x: Any) -> jax.Array:
    """Return x in JAX's own precision: float32, or float64 where the user enabled it."""
    return jnp.asarray(x).astype(float)


def call(name: str, *arguments: Any, **keywords: Any) -> str:
    """Return the text of a call: `call("every", 10, 0.9)` is "every(10, 0.9)"."""
    given = [f"{key}={show(value)}" for key, value in keywords.items()]
    return f"{name}({', '.join([*map(show, arguments), *given])})"


def _log(rate: Any) -> jax.Array:
    """Return log(1 - rate), and `LOG_OF_ZERO` for a rate of 1."""
    copies = rate >= 1
    return jnp.where(copies, LOG_OF_ZERO, jnp.log1p(-jnp.where(copies, 0, rate)))


def _check_number(decay: Any) -> None:
    """Raise unless a constant decay is from 0 to 1 and is not 1 by rounding alone."""
    check_scalar("decay", decay, *SHARE)
    if not is_concrete(decay):
        return
    dtype = jnp.dtype(getattr(decay, "dtype", jnp.float32))
    if _is_16_bit(dtype) and decay == 1:
        raise ValueError(
            f"decay={decay} has dtype {dtype}, in which 0.9999 is 1: the average would never move. "
            "Pass a Python number; in optax.inject_hyperparams, hyperparam_dtype=jnp.float32."
        )


def _is_16_bit(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4


def _check_function(name: str, function: Callable[[Any], Any], text: str) -> None:
    """Call a user's function at small and large t and under a trace. Raise if it is no decay."""
    try:
        value = jax.eval_shape(function, jax.ShapeDtypeStruct((), jnp.int32))
    except jax.errors.JAXTypeError as error:
        raise ValueError(
            f"{name} is a function that looks at the value of t in Python, so it cannot be jitted. "
            "Use jax.numpy: jnp.where(t < ..., a, b) instead of `if`."
        ) from error
    except TypeError as error:
        raise ValueError(
            f"decay={text} is a function that does not make a number of t. Pass a number or a "
            "function of t; call those of emaopt first: warmup(0.999)."
        ) from error
    if getattr(value, "shape", None) != ():
        raise ValueError(f"{name}(t) is {value}, not a scalar. Return a number from 0 to 1.")
    found = []
    for t in (1, 2, 3, 10, 100, 1000, 10**4, 10**5, 10**6):
        with jax.ensure_compile_time_eval():
            one = function(jnp.int32(t))
        if not is_concrete(one):
            return
        if not 0 <= float(one) <= 1:
            raise ValueError(f"{name}(t) is {float(one)} at t={t}. Return a number from 0 to 1.")
        found.append(one)
    if name == "decay":
        _check_moves(found, value.dtype)


def _check_moves(found: list[Any], dtype: Any) -> None:
    """Raise if a decay below 1 was rounded to 1 by its dtype at every t that was tried."""
    means_less = _is_16_bit(dtype) or any(float(one) < 1 for one in found)
    if means_less and all(np.float32(one) == 1 for one in found):
        raise ValueError(
            f"decay(t) has dtype {dtype} and is rounded to 1: the average would never move. Return "
            "float32, or pass emaopt.Decay(rate, over), which is made from 1 - decay."
        )
