"""Average as other libraries do: a decay for each, under that library's argument names.

`emaopt.ema(presets.diffusers(use_ema_warmup=True))` gives diffusers' averages, update by update. A
preset is a decay like any other. t = 1 is the library's first averaging call, after the first
optimizer step. A preset only averages: what a library does beside (overwriting, copying buffers) is
not part of it. Where a library does not do what it documents, the preset does what is documented;
its docstring says so under "Differs", and so does docs/peers.md. In bfloat16 nearly all libraries
differ: at a decay near 1 their averages do not move. Averages of 16-bit parameters are float32.
"""

from ._jax import nnx as nnx, optax as optax
from ._pytorch import (
    diffusers as diffusers,
    edm2 as edm2,
    edm2_traditional as edm2_traditional,
    ema_pytorch as ema_pytorch,
    ema_pytorch_karras as ema_pytorch_karras,
    timm as timm,
    torch as torch,
    torch_swa as torch_swa,
)
from ._tensorflow import keras as keras, tf1 as tf1, tfa as tfa, tfa_swa as tfa_swa
from ._trainers import (
    bema as bema,
    composer as composer,
    lightning as lightning,
    mmengine as mmengine,
    nemo as nemo,
    torchtitan as torchtitan,
)
