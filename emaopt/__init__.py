"""The average of the parameters, clipping, and TF1's optimizers, for `optax.chain`.

See the README; each name says where it comes from.
"""

import importlib.metadata

from ._averages import (
    average as average,
    averages as averages,
    describe as describe,
    on_host as on_host,
    stacked as stacked,
    swap as swap,
)
from ._clip import (
    clip_by_average_norm as clip_by_average_norm,
    clip_by_global_norm as clip_by_global_norm,
    clip_by_norm as clip_by_norm,
    clip_by_value as clip_by_value,
    global_norm as global_norm,
)
from ._ema import (
    EmaState as EmaState,
    MovingAverage as MovingAverage,
    SwappedEmaState as SwappedEmaState,
    ema as ema,
    moving_average as moving_average,
)
from ._feedback import overwrite as overwrite
from ._healing import HealState as HealState, heal as heal
from ._ledger import Ledger as Ledger
from ._names import (
    average_name as average_name,
    global_step as global_step,
    matching as matching,
    names as names,
    slot as slot,
    slot_names as slot_names,
    variables_to_restore as variables_to_restore,
)
from ._optimizers import (
    adadelta as adadelta,
    adagrad as adagrad,
    adam as adam,
    ftrl as ftrl,
    gradient_descent as gradient_descent,
    momentum as momentum,
    rmsprop as rmsprop,
)
from ._packing import pack as pack, unpack as unpack, unpacked as unpacked
from ._rounding import compensated as compensated, stochastic as stochastic
from ._rule import OptimizerState as OptimizerState
from ._schedules import (
    Decay as Decay,
    after as after,
    debiased as debiased,
    every as every,
    exponential_decay as exponential_decay,
    half_life as half_life,
    inverse_gamma as inverse_gamma,
    power as power,
    profile as profile,
    warmup as warmup,
)
from ._statistics import recalibrate as recalibrate
from ._training import (
    apply_gradients as apply_gradients,
    compute_gradients as compute_gradients,
    minimize as minimize,
)


__version__ = importlib.metadata.version("emaopt")
