"""A leaf of a state and its variable in TF1: names, and the ready rules that lead to them."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emaopt._average.ema import SwappedEmaState
from emaopt._average.find import averages
from emaopt._names import AVERAGE, STEP, names, origin
from emaopt._tree.checks import did_you_mean
from emaopt._tree.numbers import dtype_of, is_inexact
from emaopt._tree.paths import Tree


Shape = tuple[int, ...]
Rule = tuple[str, str] | tuple[str, str, Callable[[Shape], Shape]]
Rename = Mapping[str, str] | Callable[[str], str] | Sequence[Rule]
AverageName = str | Callable[[str], str]

_LINEN: list[Rule] = [
    (r"^(params|batch_stats)/", ""),
    (r"(?i)((norm|bn)[^/]*)/bias$", r"\1/beta"),
    (r"\bscale$", "gamma"),
    (r"\bmean$", "moving_mean"),
    (r"\bvar$", "moving_variance"),
]

TF_LAYERS: list[Rule] = [
    *_LINEN,
    (r"\bDense_(\d+)/", r"dense_\1/"),
    (r"\bConv_(\d+)/", r"conv2d_\1/"),
    (r"\bBatchNorm_(\d+)/", r"batch_normalization_\1/"),
    (r"\b(dense|conv2d|batch_normalization)_0/", r"\1/"),
]
"""From Linen's names to those of `tf.layers`: `Dense_1/kernel` to `dense_1/kernel`, `Conv_0/bias`
to `conv2d/bias`, `BatchNorm_0/scale` to `batch_normalization/gamma`. Pass
`{"params": ..., "batch_stats": ...}` for the moving mean and variance."""

SLIM: list[Rule] = [
    *_LINEN,
    (r"\bkernel$", "weights"),
    (r"\bbias$", "biases"),
    (r"/(Dense|Conv)_0/", "/"),
    (r"\bDense_(\d+)/", r"fully_connected_\1/"),
    (r"\b(fully_connected|Conv|BatchNorm)_0/", r"\1/"),
]
"""From Linen's names to Slim's. A module of one layer and its norm is one scope:
`Stem/Conv_0/kernel` goes to `Stem/weights`, `Stem/BatchNorm_0/scale` to `Stem/BatchNorm/gamma`;
outside of any module `Conv_1/kernel` goes to `Conv_1/weights`, `Dense_0/bias` to
`fully_connected/biases`. A scope around it all is one rule more: `[*SLIM, ("^", "Net/")]`."""


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
    of_average = name_of_average(average_name)

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
        exchange = _exchange(own[1], tf1[1], lambda n: target(n)[0], name)
        tf1 = jax.tree.map(lambda n: exchange.get(n, n), tf1)
    rows = zip(*map(jax.tree.leaves, (own, (params, opt_state), tf1)), strict=True)
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


def _exchange(
    own: Tree, tf1: Tree, target: Callable[[str], str], name: str | None
) -> dict[str, str]:
    """The names of variables to those of their averages, and back."""
    known = averages(own)
    if not known or name not in {None, *known}:
        raise ValueError(
            f"name={name!r} is no average of opt_state, which has {list(known)}. Pass the state of "
            "a chain with emaopt.ema in it, or swapped=False."
        )
    pairs: dict[str, str] = {}
    for each in known if name is None else [name]:
        shadows = jax.tree.leaves(known[each].shadow), jax.tree.leaves(averages(tf1)[each].shadow)
        for mine, average in zip(*shadows, strict=True):
            variable = target(origin(mine)[0])
            if variable in pairs:
                raise ValueError(
                    f"name is missing: {variable!r} has several averages. Pass name=, one of: "
                    f"{', '.join(map(repr, known))}."
                )
            pairs[variable] = average
    return pairs | {average: variable for variable, average in pairs.items()}


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


def name_of_average(average_name: AverageName) -> Callable[[str], str]:
    """From a variable's name to its average's: `slow` and `{}/slow` lead from `w` to `w/slow`."""
    if callable(average_name):
        return average_name
    template = average_name if "{}" in average_name else f"{{}}/{average_name}"
    return lambda name: template.replace("{}", name)


def _checked(name: str, renamed: Any) -> str:
    if not isinstance(renamed, str) or not renamed:
        raise ValueError(
            f"the leaf named {name!r} would be {renamed!r} in TF1, which is no name. Pass rename= "
            "with a name for it."
        )
    return renamed
