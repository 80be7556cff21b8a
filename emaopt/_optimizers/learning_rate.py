"""Schedule learning rates: functions of the number of updates before this one (0, 1, ...)."""

import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from emaopt._tree.checks import FINITE, LAST_STEP, NOT_NEGATIVE, POSITIVE, check
from emaopt._tree.numbers import is_concrete, scalar, wide


LearningRate = ArrayLike | optax.Schedule


def exponential_decay(
    learning_rate: ArrayLike,
    decay_steps: ArrayLike,
    decay_rate: ArrayLike,
    staircase: bool = False,
) -> optax.Schedule:
    """Decay a learning rate exponentially: `learning_rate * decay_rate**(step / decay_steps)`.

    TF1's `tf.train.exponential_decay`. It is computed in the dtype of `learning_rate`, float32 for
    a Python number. A 16-bit dtype cannot count steps, so then it is computed in float32 and
    rounded at the end.

    With `staircase` the quotient is rounded down in whole numbers: step `k * decay_steps` is on
    stair k, for every `decay_steps`. (TF1, and a jitted float quotient, are one step late for one
    `decay_steps` in eight.)

    Args:
        learning_rate: The learning rate at step 0, a finite number.
        decay_steps: The number of steps in which it is multiplied by `decay_rate`, above 0.
        decay_rate: The factor, 0 or above.
        staircase: Whether the learning rate falls only every `decay_steps` steps.

    Returns:
        A function of the step, which counts from 0.

    Raises:
        ValueError: An argument is out of range, or is not a number.

    Example:
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
        returned = jnp.dtype(getattr(learning_rate, "dtype", jnp.float32))
        # float16 has no steps above 65504, bfloat16 no odd ones above 256
        dtype = wide(returned)
        rate, base = scalar(learning_rate, dtype), scalar(decay_rate, dtype)
        step = jnp.asarray(step)
        if staircase:
            exponent = _stair(step, decay_steps, dtype)
        else:
            # times the reciprocal, as TF1's graph optimizer and XLA have it: the same op by op
            inverse = scalar(1, dtype) / scalar(decay_steps, dtype)
            exponent = step.astype(dtype) * inverse
        return (rate * jnp.power(base, exponent)).astype(returned)

    return schedule


def _stair(step, decay_steps: ArrayLike, dtype):
    """Return the stair that a step is on: the quotient, rounded down exactly."""
    if is_concrete(decay_steps) and np.all(np.asarray(decay_steps) > LAST_STEP):
        decay_steps = scalar(decay_steps, np.float64)  # such an integer does not fit into int32
    steps = jnp.asarray(decay_steps)
    if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in (step, steps)):
        # the remainder of floats is exact, so their floor is too
        step, steps = step.astype(dtype), steps.astype(dtype)
    return (step // steps.astype(step.dtype)).astype(dtype)
