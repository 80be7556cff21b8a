"""Find TF1's names of the leaves: ready rules, and the arguments `rename` and `average_name`."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emaopt._names import AVERAGE, origin
from emaopt._tree.checks import did_you_mean
from emaopt._tree.numbers import is_inexact


Shape = tuple[int, ...]
Reshape = Callable[[Shape], Shape]
Rule = tuple[str, str] | tuple[str, str, Reshape]
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
"""The rules from Linen's names to the names of `tf.layers`.

They change `Dense_1/kernel` to `dense_1/kernel`, `Conv_0/bias` to `conv2d/bias`, and
`BatchNorm_0/scale` to `batch_normalization/gamma`. To load the moving mean and variance as well,
pass `{"params": ..., "batch_stats": ...}` as parameters.
"""

SLIM: list[Rule] = [
    *_LINEN,
    (r"\bkernel$", "weights"),
    (r"\bbias$", "biases"),
    (r"/(Dense|Conv)_0/", "/"),
    (r"\bDense_(\d+)/", r"fully_connected_\1/"),
    (r"\b(fully_connected|Conv|BatchNorm)_0/", r"\1/"),
]
"""The rules from Linen's names to the names of Slim.

In Slim, a module with one layer and its norm is one scope. So `Stem/Conv_0/kernel` becomes
`Stem/weights`, and `Stem/BatchNorm_0/scale` becomes `Stem/BatchNorm/gamma`. Outside of a module,
`Conv_1/kernel` becomes `Conv_1/weights`, and `Dense_0/bias` becomes `fully_connected/biases`. For a
scope around all names, add one rule: `[*SLIM, ("^", "Net/")]`.
"""


def depthwise(pattern: str, replacement: str, multiplier: int = 1) -> Rule:
    """Return the rule for the kernel of a depthwise convolution, which has another shape in TF1.

    The kernel is `[H, W, 1, C * multiplier]` here and `[H, W, C, multiplier]` in TF1.

    Args:
        pattern: A regular expression that finds the kernel's name here.
        replacement: What replaces the part that was found, as in `re.sub`.
        multiplier: The number of filters per channel.

    Returns:
        A rule for the argument `rename` of `load`, `load_partial` and `save`.

    Example:
        >>> *_, shape = depthwise("Conv_3/kernel$", "separable/depthwise_kernel", multiplier=2)
        >>> shape((3, 3, 1, 16))
        (3, 3, 8, 2)
    """

    def reshape(shape: Shape) -> Shape:
        return (*shape[:-2], shape[-1] // multiplier, multiplier)

    return pattern, replacement, reshape


class Naming:
    """Find the names that TF1 has for the leaves here."""

    def __init__(self, rename: Rename | None, average_name: AverageName):
        self.rename = {} if rename is None else rename
        self.average = name_of_average(average_name)
        self.rules = [] if isinstance(rename, Mapping) or callable(rename) else _rules(rename)

    def parameter(self, own: str) -> str:
        """Return TF1's name of a parameter."""
        if isinstance(self.rename, Mapping):
            return _checked(own, self.rename.get(own, own))
        if callable(self.rename):
            return _checked(own, self.rename(own))
        return _checked(own, self._apply(own)[0])

    def shape(self, own: str, shape: Shape) -> Shape:
        """Return the shape that TF1 has for a parameter, its slots and its averages."""
        for reshape in self._apply(own)[1]:
            shape = tuple(reshape(shape))
        return shape

    def of_state(self, own: str, value: Any) -> str:
        """Return TF1's name of a leaf of the state."""
        owner, kind, number = origin(own)
        if isinstance(self.rename, Mapping) and own in self.rename:
            return _checked(own, self.rename[own])
        if not kind:
            return own
        variable = self.parameter(owner)
        if kind != AVERAGE:
            return f"{variable}/{kind}{number}"
        if not is_inexact(value):
            return variable  # TF1 does not average integers: the newest value is the variable
        return _checked(own, self.average(variable)) + number

    def unknown(self, known: Sequence[str]) -> list[str]:
        """Return a complaint about each key of the dict `rename` that is the name of no leaf."""
        if not isinstance(self.rename, Mapping):
            return []
        return [
            f"rename has {key!r}, which is not a name here.{did_you_mean(key, known)}"
            for key in self.rename.keys() - set(known)
        ]

    def _apply(self, own: str) -> tuple[str, list[Reshape]]:
        """Apply each rule to the name that the rule before it made."""
        name, reshapes = own, []
        for pattern, replacement, reshape in self.rules:
            name, count = pattern.subn(replacement, name)
            if count:
                reshapes += reshape
        return name, reshapes


def _rules(rename: Any) -> list[tuple[re.Pattern, str, list[Reshape]]]:
    """Compile the rules, so that a wrong one is found before anything is read."""
    try:
        rules = [(re.compile(p), text, reshape) for p, text, *reshape in rename or ()]
        for pattern, replacement, _ in rules:
            pattern.sub(replacement, "")  # raises if the replacement names a group that is absent
    except (re.error, TypeError, ValueError) as error:
        raise ValueError(
            f"rename={rename!r} is not a dict, a function or a list of rules: {error}. Pass rules "
            "(pattern, replacement), as for re.sub."
        ) from None
    return rules


def name_of_average(average_name: AverageName) -> Callable[[str], str]:
    """Return the function from a variable's name to its average's name.

    `slow` and `{}/slow` both lead from `w` to `w/slow`.
    """
    if callable(average_name):
        return average_name
    template = average_name if "{}" in average_name else f"{{}}/{average_name}"
    return lambda name: template.replace("{}", name)


def _checked(name: str, renamed: Any) -> str:
    if not isinstance(renamed, str) or not renamed:
        raise ValueError(
            f"the leaf named {name!r} would be {renamed!r} in TF1, which is not a name. Pass "
            "rename= with a name for it."
        )
    return renamed
