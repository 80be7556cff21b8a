"""Learning rates: functions of the number of updates before this one, 0, 1, ..."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from emaopt._tree.checks import FINITE, NOT_NEGATIVE, POSITIVE, check
from emaopt._tree.numbers import scalar


LearningRate = ArrayLike | optax.Schedule


def exponential_decay(
    learning_rate: ArrayLike,
    decay_steps: ArrayLike,
    decay_rate: ArrayLike,
    staircase: bool = False,
) -> optax.Schedule:
    """TF1's schedule: `learning_rate * decay_rate**(step / decay_steps)`.

    With `staircase` the quotient is rounded down, in whole numbers: step `k * decay_steps` is on
    stair k, for every `decay_steps`. (TF1, and a jitted float quotient, are one step late for one
    `decay_steps` in eight.) In the dtype of `learning_rate`; for a Python number, float32.

    >>> [round(float(exponential_decay(1.0, 2, 0.25)(step)), 4) for step in (0, 1, 2)]
    [1.0, 0.5, 0.25]
    >>> [round(float(exponential_decay(1.0, 2, 0.25, True)(step)), 4) for step in (0, 1, 2)]
    [1.0, 1.0, 0.25]
    """
    check("learning_rate", learning_rate, *FINITE)
    check("decay_steps", decay_steps, *POSITIVE)
    check("decay_rate", decay_rate, *NOT_NEGATIVE)
    if staircase not in (False, True):
        raise ValueError(
            f"staircase={staircase!r} is neither True nor False. Pass (learning_rate, decay_steps, "
            "decay_rate, staircase): there is no global_step here."
        )

    def schedule(step):
        dtype = getattr(learning_rate, "dtype", jnp.float32)
        rate, base = scalar(learning_rate, dtype), scalar(decay_rate, dtype)
        step, stair = jnp.asarray(step), jnp.asarray(decay_steps)
        if not staircase:
            # times the reciprocal, as TF1's graph optimizer and XLA have it: the same op by op
            inverse = scalar(1, dtype) / scalar(decay_steps, dtype)
            return rate * jnp.power(base, step.astype(dtype) * inverse)
        if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in (step, stair)):
            # the remainder of floats is exact, so their floor is too
            step, stair = step.astype(dtype), stair.astype(dtype)
        return rate * jnp.power(base, (step // stair.astype(step.dtype)).astype(dtype))

    return schedule
