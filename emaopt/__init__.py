"""Average the parameters of a model, and train as TensorFlow 1 did, with pieces for `optax.chain`.

    optax.chain(clip_by_global_norm(1.0), momentum(rate, 0.9), ema(warmup(0.999)))
                |                         |        |           |   |
                a clipping                |        |           |   a decay: a function of t
                                          |        |           the average, last in the chain
                                          |        a learning rate: a number or a schedule
                                          a rule of TF1

    average(params, opt_state)         find the average in any state, to evaluate with
    swap(params, opt_state)            exchange parameters and averages, without loss
    overwrite(n, ema(decay))           feed the average back every n updates: Switch EMA, lookahead
    primal(tx, ema(decay))             feed the average back at every update: schedule-free
    profile(decay, t)                  the weights that an average gives to past parameters
    names(opt_state)                   TF1's name of every leaf: conv/kernel/Momentum
    take(params, {"table": rows(ids)}) a view: the few rows of a table that a batch looks up
    pack(params)                       a view: many small leaves as one array

Each of these folders is loaded at first use: `checkpoint` (save and resume with Orbax), `tf1`
(TensorFlow 1's checkpoints), `posthoc` and `merge` (averages chosen after training), `presets`
(other libraries' decays), `summary` (TensorBoard). For an example see `ema`.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from ._average.decay import Decay as Decay, DecayLike as DecayLike
from ._average.decays import (
    after as after,
    debiased as debiased,
    every as every,
    half_life as half_life,
    inverse_gamma as inverse_gamma,
    power as power,
    warmup as warmup,
)
from ._average.ema import (
    EmaState as EmaState,
    MovingAverage as MovingAverage,
    SwappedEmaState as SwappedEmaState,
    ema as ema,
    moving_average as moving_average,
)
from ._average.feedback import overwrite as overwrite, primal as primal
from ._average.find import (
    PrimalState as PrimalState,
    average as average,
    averages as averages,
    reset as reset,
    stacked as stacked,
    swap as swap,
)
from ._average.healing import HealState as HealState, heal as heal
from ._average.host import on_host as on_host
from ._average.ledger import Ledger as Ledger
from ._average.meters import ledgers as ledgers, stalled as stalled
from ._average.profile import profile as profile
from ._average.rounding import (
    Rounding as Rounding,
    compensated as compensated,
    stochastic as stochastic,
)
from ._average.statistics import recalibrate as recalibrate
from ._names import (
    average_name as average_name,
    global_step as global_step,
    matching as matching,
    names as names,
    slot as slot,
    slot_names as slot_names,
    variables_to_restore as variables_to_restore,
)
from ._optimizers.builder import OptimizerState as OptimizerState
from ._optimizers.clip import (
    clip_by_average_norm as clip_by_average_norm,
    clip_by_global_norm as clip_by_global_norm,
    clip_by_norm as clip_by_norm,
    clip_by_value as clip_by_value,
    global_norm as global_norm,
)
from ._optimizers.interrupts import uninterrupted as uninterrupted
from ._optimizers.learning_rate import (
    LearningRate as LearningRate,
    exponential_decay as exponential_decay,
)
from ._optimizers.rules import (
    adadelta as adadelta,
    adagrad as adagrad,
    adam as adam,
    ftrl as ftrl,
    gradient_descent as gradient_descent,
    momentum as momentum,
    rmsprop as rmsprop,
)
from ._optimizers.steps import (
    apply_gradients as apply_gradients,
    compute_gradients as compute_gradients,
    minimize as minimize,
)
from ._tree.packing import on_leaves as on_leaves, pack as pack, unpack as unpack
from ._tree.rows import Rows as Rows, put as put, rows as rows, take as take


__version__ = _version("emaopt")

# Loaded at first use: each of them needs a package of its own, or is not needed in training.
_ROOMS = ("checkpoint", "merge", "posthoc", "presets", "summary", "tf1")

if TYPE_CHECKING:
    from . import (
        checkpoint as checkpoint,
        merge as merge,
        posthoc as posthoc,
        presets as presets,
        summary as summary,
        tf1 as tf1,
    )
else:  # a type checker that saw this would take every misspelt name for something

    def __getattr__(name):
        if name in _ROOMS:
            return _import_module(f"{__name__}.{name}")
        raise AttributeError(f"module 'emaopt' has no attribute {name!r}")


del TYPE_CHECKING

_PUBLIC = sorted({name for name in globals() if not name.startswith("_")} | set(_ROOMS))


def __dir__() -> list[str]:
    return [*_PUBLIC, "__version__"]
