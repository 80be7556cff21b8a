"""Average as TensorFlow and Keras do."""

from emaopt._average.decay import Decay, as_decay
from emaopt._average.decays import after, debiased, power, warmup
from emaopt._tree.checks import check_flag

from ._common import check_shares, check_whole, each, named, ramp


def tf1(decay: float, num_updates: bool = False, zero_debias: bool = False) -> Decay:
    """Average as TensorFlow 1's `tf.train.ExponentialMovingAverage`, in its float32 arithmetic.

    TensorFlow 1.15.5.

    Differs: TF1 accepts both options together, and divides by `1 - d**t` with the newest d alone.

    Args:
        decay: The decay, from 0 to 1.
        num_updates: Whether TF1 was given num_updates, so that the decay is
            `min(decay, (1 + t) / (10 + t))`. t counts the updates with this one.
        zero_debias: Whether the average forgets that it started at zero:
            `(decay - decay**t) / (1 - decay**t)`. TF1 has it for tensors only.

    Returns:
        A decay.

    Example:
        >>> round(float(tf1(0.999, num_updates=True)(1)) * 11, 4)
        2.0
    """
    check_shares(decay=decay)
    check_flag("num_updates", num_updates)
    check_flag("zero_debias", zero_debias)
    if num_updates and zero_debias:
        raise ValueError(
            "zero_debias=True with num_updates=True: the ramp already forgets where it started. "
            "Leave one of them out."
        )
    if zero_debias:
        made = debiased(decay)
    elif num_updates:
        made = warmup(decay)
    else:
        made = as_decay(decay)
    return named(made, "tf1", decay, num_updates, zero_debias)


def tfa(average_decay: float = 0.99, start_step: int = 0, dynamic_decay: bool = False) -> Decay:
    """Average as TensorFlow Addons' `MovingAverage`.

    TensorFlow Addons 0.23.0.

    Differs: TensorFlow Addons reads num_updates once, in the constructor. For a count that moves
    use `tf1(decay, num_updates=True)`.

    Args:
        average_decay: The decay, from 0 to 1.
        start_step: The average copies the parameters for this many updates.
        dynamic_decay: Whether the decay is `min(average_decay, (1 + n) / (10 + n))` of n = 0, 1,
            ..., the updates before this one since start_step. It begins with 1/10, where TF1
            begins with 2/11.

    Returns:
        A decay.

    Example:
        >>> round(float(tfa(dynamic_decay=True)(1)), 4)
        0.1
    """
    check_shares(average_decay=average_decay)
    check_whole(0, start_step=start_step)
    check_flag("dynamic_decay", dynamic_decay)
    made = after(start_step, ramp(9, 0, average_decay) if dynamic_decay else average_decay)
    return named(made, "tfa", average_decay, start_step, dynamic_decay)


def tfa_swa(start_averaging: int = 0, average_period: int = 10) -> Decay:
    """Average as TensorFlow Addons' `SWA`: the mean of a snapshot every average_period updates.

    The first snapshot is taken at t = start_averaging + 1. TensorFlow Addons 0.23.0.

    Differs: before the first snapshot, the average of TensorFlow Addons is zero. Here it is a copy
    of the parameters.

    Example:
        >>> [round(float(tfa_swa(1, 2)(t)), 4) for t in (1, 2, 3, 4, 5, 6)]
        [0.0, 0.0, 1.0, 0.5, 1.0, 0.6667]
    """
    check_whole(0, start_averaging=start_averaging)
    check_whole(1, average_period=average_period)
    made = after(start_averaging, each(average_period, power(0)))
    return named(made, "tfa_swa", start_averaging, average_period)


def keras(ema_momentum: float = 0.99) -> Decay:
    """Average as Keras' optimizers with `use_ema=True`: a copy at t = 1, then ema_momentum.

    Keras 3.15.1.

    Differs: with gradient_accumulation_steps, Keras averages after every micro-step, also those
    that leave the parameters as they were. Here `optax.MultiSteps` goes around the whole chain.

    Example:
        >>> [round(float(keras(0.5)(t)), 4) for t in (1, 2, 3)]
        [0.0, 0.5, 0.5]
    """
    check_shares(ema_momentum=ema_momentum)
    return named(after(1, ema_momentum), "keras", ema_momentum)
