"""A leaf of a state and its variable in TF1: names, and the ready rules that lead to them."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._ema import SwappedEmaState, averages, swap
from emaopt._names import AVERAGE, STEP, names, origin
from emaopt._tree import Tree, did_you_mean, is_inexact


Shape = tuple[int, ...]
Rule = tuple[str, str] | tuple[str, str, Callable[[Shape], Shape]]
Rename = Mapping[str, str] | Callable[[str], str] | Sequence[Rule]
AverageName = str | Callable[[str], str]

_LAYERS: list[Rule] = [
    (r"^(params|batch_stats)/", ""),
    (r"\bBatchNorm_(\d+)/scale$", r"BatchNorm_\1/gamma"),
    (r"\bBatchNorm_(\d+)/bias$", r"BatchNorm_\1/beta"),
    (r"\bBatchNorm_(\d+)/mean$", r"BatchNorm_\1/moving_mean"),
    (r"\bBatchNorm_(\d+)/var$", r"BatchNorm_\1/moving_variance"),
]

TF_LAYERS: list[Rule] = [
    *_LAYERS,
    (r"\bDense_(\d+)/", r"dense_\1/"),
    (r"\bConv_(\d+)/", r"conv2d_\1/"),
    (r"\bBatchNorm_(\d+)/", r"batch_normalization_\1/"),
    (r"\b(dense|conv2d|batch_normalization)_0/", r"\1/"),
]
"""Linen's names to those of `tf.layers`: `Dense_1/kernel` is `dense_1/kernel`, `Conv_0` `conv2d`,
`BatchNorm_0/scale` `batch_normalization/gamma`, `mean` and `var` the moving ones."""

SLIM: list[Rule] = [
    *_LAYERS,
    (r"\bDense_(\d+)/kernel$", r"Dense_\1/weights"),
    (r"\bDense_(\d+)/bias$", r"Dense_\1/biases"),
    (r"\bConv_(\d+)/kernel$", r"Conv_\1/weights"),
    (r"\bConv_(\d+)/bias$", r"Conv_\1/biases"),
    (r"/(Dense|Conv)_0/", "/"),
    (r"\bDense_(\d+)/", r"fully_connected_\1/"),
    (r"\b(fully_connected|Conv|BatchNorm)_0/", r"\1/"),
]
"""Linen's names to Slim's: `weights` and `biases`. A module of one layer and its BatchNorm is one
scope: `Mixed/Conv_0/kernel` is `Mixed/weights`, `Mixed/BatchNorm_0/scale` `Mixed/BatchNorm/gamma`;
at the top, `Conv_1/kernel` is `Conv_1/weights` and `Dense_0/kernel` `fully_connected/weights`."""


def depthwise(pattern: str, replacement: str, multiplier: int = 1) -> Rule:
    """The rule of a depthwise kernel, `[H, W, 1, C * multiplier]` here: `[H, W, C, multiplier]`.

    >>> *_, shape = depthwise("Conv_3/kernel$", "separable/depthwise_kernel", multiplier=2)
    >>> shape((3, 3, 1, 16))
    (3, 3, 8, 2)
    """
    return pattern, replacement, lambda s: (*s[:-2], s[-1] // multiplier, multiplier)


class Leaf(NamedTuple):
    """A leaf here, and its variable in TF1."""

    own: str
    value: Any
    name: str
    shape: Shape
    dtype: np.dtype


def leaves_in_tf1(
    params: Tree,
    opt_state: Tree,
    swapped: bool,
    name: str | None,
    rename: Rename | None,
    average_name: AverageName,
) -> tuple[list[Leaf], list[str]]:
    """All leaves in flattening order, and what is wrong with them."""
    if any(isinstance(state, SwappedEmaState) for state in averages(opt_state).values()):
        raise ValueError(
            "opt_state is swapped already. Pass the state that training goes on with, and "
            "swapped=True."
        )
    target = _renamer(rename)
    of_average = average_name if callable(average_name) else lambda n: f"{n}/{average_name}"

    def in_tf1(own: str, value: Any) -> str:
        of, kind, number = origin(own)
        if isinstance(rename, Mapping) and own in rename:
            return _checked(own, rename[own])
        if not kind:
            return own
        if kind != AVERAGE:
            return f"{target(of)[0]}/{kind}{number}"
        if not is_inexact(value):
            return target(of)[0]  # TF1 averages no integers: the newest value is the variable
        return _checked(own, of_average(target(of)[0])) + number

    own = names(params), names(opt_state)
    tf1 = jax.tree.map(lambda n: target(n)[0], own[0]), jax.tree.map(in_tf1, own[1], opt_state)
    dtypes = dict(zip(jax.tree.leaves(tf1[0]), map(dtype_of, jax.tree.leaves(params)), strict=True))
    if swapped:
        tf1 = swap(*tf1, name)
    rows = zip(
        jax.tree.leaves(own),
        jax.tree.leaves((params, opt_state)),
        [n for n in jax.tree.leaves(tf1) if isinstance(n, str)],  # the mark of a swap is no name
        strict=True,
    )
    found: list[Leaf] = []
    problems: list[str] = []
    if isinstance(rename, Mapping):
        known = jax.tree.leaves(own)
        problems += [
            f"rename has {key!r}, which is no name here.{did_you_mean(key, known)}"
            for key in rename.keys() - set(known)
        ]
    taken: dict[str, str] = {}
    for i, (mine, value, variable) in enumerate(rows):
        of, kind, _ = origin(mine) if i >= len(dtypes) else (mine, "param", "")
        of_tf1, reshapes = target(of) if kind else (variable, [])
        shape = np.shape(value)
        for reshape in reshapes:
            shape = tuple(reshape(shape))
        if math.prod(shape) != math.prod(np.shape(value)):
            problems.append(f"{mine} has shape {np.shape(value)}; its rule in rename makes {shape}")
        counts = mine == STEP and dtype_of(value).kind == "i"
        # one step is all steps, one integer is its average
        shares = (kind or counts) and not is_inexact(value) and taken.get(variable) == of
        if variable in taken and not shares:
            problems.append(f"{taken[variable]} and {mine} would both be {variable}")
        taken.setdefault(variable, mine)
        if jnp.issubdtype(dtype_of(value), jax.dtypes.prng_key):
            problems.append(f"{mine} is a random key, which TF1 has no variable for")
        dtype = np.dtype(np.int64) if counts else dtypes.get(of_tf1, dtype_of(value))
        found.append(Leaf(mine, value, variable, shape, dtype))
    return found, problems


def _renamer(rename: Rename | None) -> Callable[[str], tuple[str, list[Callable[[Shape], Shape]]]]:
    """From a parameter's name here to its name in TF1, and the functions that make its shape."""
    if rename is None:
        rename = {}
    if isinstance(rename, Mapping):
        return lambda name: (_checked(name, rename.get(name, name)), [])
    if callable(rename):
        return lambda name: (_checked(name, rename(name)), [])
    try:
        rules = [(re.compile(p), replacement, shape) for p, replacement, *shape in rename]
        for pattern, replacement, _ in rules:
            pattern.sub(replacement, "")  # a bad replacement is found here
    except (re.error, TypeError, ValueError) as error:
        raise ValueError(
            f"rename={rename!r} is not a dict, a function or a list of rules: {error}. Pass rules "
            "(pattern, replacement), as for re.sub."
        ) from None

    def apply(given: str) -> tuple[str, list]:
        name, shapes = given, []
        for pattern, replacement, shape in rules:
            name, count = pattern.subn(replacement, name)
            shapes += shape if count else []
        return _checked(given, name), shapes

    return apply


def _checked(name: str, renamed: Any) -> str:
    if not isinstance(renamed, str) or not renamed:
        raise ValueError(
            f"the leaf named {name!r} would be {renamed!r} in TF1, which is no name. Pass rename= "
            "with a name for it."
        )
    return renamed


def dtype_of(value: Any) -> np.dtype:
    """The dtype of a leaf, which may be a Python number."""
    return value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
