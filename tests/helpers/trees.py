"""Parameter trees with the shapes of known networks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import emaopt


def _conv_and_norm(name, size, inputs, outputs):
    kernel = {f"{name}/kernel": (size, size, inputs, outputs)}
    return kernel | {f"{name}/{part}": (outputs,) for part in ("scale", "bias")}


def _resnet50():
    shapes = _conv_and_norm("stem", 7, 3, 64)
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            name = f"stage{stage}/block{block}"
            sizes = [(1, inputs, width), (3, width, width), (1, width, 4 * width)]
            for i, (size, before, after) in enumerate(sizes):
                shapes |= _conv_and_norm(f"{name}/conv{i}", size, before, after)
            if block == 0:
                shapes |= _conv_and_norm(f"{name}/shortcut", 1, inputs, 4 * width)
            inputs = 4 * width
    return shapes | {"head/kernel": (2048, 1000), "head/bias": (1000,)}


def _vit_b():
    width, layers = 768, 12
    dense = lambda name, n, m: {f"{name}/kernel": (n, m), f"{name}/bias": (m,)}
    norm = lambda name: {f"{name}/scale": (width,), f"{name}/bias": (width,)}
    shapes = {"class": (1, 1, width), "position": (1, 197, width)}
    shapes |= dense("patches", 16 * 16 * 3, width)
    for layer in range(layers):
        name = f"layer{layer}"
        shapes |= norm(f"{name}/norm0") | norm(f"{name}/norm1")
        shapes |= dense(f"{name}/qkv", width, 3 * width) | dense(f"{name}/out", width, width)
        shapes |= dense(f"{name}/mlp0", width, 4 * width) | dense(f"{name}/mlp1", 4 * width, width)
    return shapes | norm("norm") | dense("head", width, 1000)


RESNET50 = _resnet50()  # 25.6 million in 161 leaves
VIT_B = _vit_b()  # 86.6 million in 152 leaves

OPTIMIZERS = {
    "gradient_descent": emaopt.gradient_descent(0.1),
    "momentum": emaopt.momentum(0.1, 0.9),
    "nesterov": emaopt.momentum(0.1, 0.9, use_nesterov=True),
    "adagrad": emaopt.adagrad(0.1),
    "adadelta": emaopt.adadelta(0.1),
    "adam": emaopt.adam(0.001),
    "ftrl": emaopt.ftrl(0.1),
    "rmsprop": emaopt.rmsprop(0.1, momentum=0.9),
    "rmsprop_centered": emaopt.rmsprop(0.1, momentum=0.9, centered=True),
}
PLACES = {
    "alone": lambda tx: tx,
    "clip": lambda tx: optax.chain(emaopt.clip_by_global_norm(1.0), tx),
    "ema": lambda tx: optax.chain(tx, emaopt.ema(0.999)),
    "both": lambda tx: optax.chain(
        emaopt.clip_by_global_norm(1.0), tx, emaopt.ema(emaopt.warmup(0.999))
    ),
}


def each_shape_once(shapes):
    """The last leaf of each shape."""
    names = {shape: name for name, shape in shapes.items()}
    return {name: shape for shape, name in names.items()}


def each_rank_once(shapes):
    """The last leaf of each rank."""
    names = {len(shape): name for name, shape in shapes.items()}
    return {name: shapes[name] for name in names.values()}


def abstract(shapes, dtype=jnp.float32):
    """To compile for."""
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def full(shapes, dtype=jnp.float32):
    """To run with: numbers around one."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: 1 + 0.1 * jax.random.normal(key, shape, dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def nbytes(tree):
    """Of all leaves, also abstract ones."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# a leaf of every kind that a checkpoint can hold
EVERY_KIND = {
    "float32": jnp.linspace(-1, 1, 24).reshape(4, 6),
    "bfloat16": jnp.linspace(-1, 1, 24, dtype=jnp.bfloat16),
    "float8": jnp.arange(24.0).astype(jnp.float8_e4m3fn),
    "complex64": jnp.arange(4.0).astype(jnp.complex64),
    "int8": jnp.arange(-4, 4, dtype=jnp.int8),
    "bool": jnp.asarray([True, False, True]),
    "key": jax.random.key(3),
    "float64": np.linspace(-1, 1, 5),
    "int": 7,
    "float": 0.1,
    "str": "words",
}
