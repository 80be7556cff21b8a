"""Check arguments, and word the errors about them."""

import difflib
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .leaves import by_path, map_leaves
from .numbers import is_concrete
from .paths import KeyPath, Tree, printable


DEEPEST = 256  # levels; Orbax reads its metadata by recursion and fails between 300 and 500


class Range(NamedTuple):
    """Say which values an argument may have: a test of an array, and the words for it."""

    holds: Callable[[np.ndarray], Any]
    wanted: str


# State and hyper-parameters are float32 unless asked otherwise, and steps are int32. A number
# outside of their range would become 0, infinity or another number.
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
LAST_STEP = 2**31 - 1

SHARE = Range(lambda x: (x >= 0) & (x <= 1), "a number from 0 to 1")
NUMBER = Range(lambda x: ~(abs(x) < 0), "a number")
FINITE = Range(lambda x: abs(x) <= _LARGEST, "a finite number")
NOT_NEGATIVE = Range(lambda x: (x >= 0) & (x <= _LARGEST), "a number, 0 or above")
POSITIVE = Range(lambda x: (x >= _SMALLEST) & (x <= _LARGEST), "a number above 0")


def whole(least: int) -> Range:
    """Return the range of whole numbers that fit into a step, from `least` on; 3.0 is one."""
    holds = lambda x: (x >= least) & (x <= LAST_STEP) & (np.floor(x) == x)
    return Range(holds, f"a whole number from {least} to 2**31 - 1")


def check_shape(leaf: str, **arrays) -> None:
    """Raise unless all arrays are present and have the shape of the first one."""
    (first, array), *others = arrays.items()
    for name, other in others:
        if isinstance(other, optax.MaskedNode):
            other = None
        if other is None or np.shape(other) != np.shape(array):
            has = "nothing" if other is None else f"shape {np.shape(other)}"
            raise ValueError(
                f"{name} has {has} at leaf {leaf!r} where {first} has {np.shape(array)}. "
                f"Pass {first} and {name} made from the same parameters."
            )


def check_floating(name: str, tree: Tree, complex_too: bool = False) -> None:
    """Raise unless all leaves are floating-point numbers, or complex ones if allowed.

    Leaves may be absent.
    """
    allowed = jnp.inexact if complex_too else jnp.floating

    def look(leaf: str, x) -> None:
        if x is None:
            return
        check_array(leaf, x, name)
        dtype = jnp.result_type(x)
        if jnp.issubdtype(dtype, jnp.complexfloating) and not complex_too:
            raise ValueError(
                f"{name} has dtype {dtype} at leaf {leaf!r}; gradient_descent and momentum take "
                "complex numbers, this optimizer does not. Wrap it, and real and imaginary parts "
                "are trained as real numbers: optax.contrib.split_real_and_imaginary(optimizer)."
            )
        if not jnp.issubdtype(dtype, allowed):
            raise ValueError(
                f"{name} has dtype {dtype} at leaf {leaf!r}; an optimizer needs "
                "floating-point numbers. Pass parameters alone (nnx.state(model, nnx.Param), "
                'variables["params"]), or leave it out: optax.masked(optimizer, mask).'
            )

    map_leaves(look, 0, **{name: tree})


def check_array(leaf: str, x, name: str) -> None:
    """Raise unless a leaf is an array or a number. A module may hold strings and functions."""
    if not (hasattr(x, "dtype") or isinstance(x, (bool, int, float, complex))):
        raise ValueError(
            f"{name} has a {type(x).__name__} at leaf {leaf!r}, which is not an array. Pass the "
            "arrays alone: of an Equinox module, eqx.filter(model, eqx.is_inexact_array); of an "
            "NNX one, nnx.state(model, nnx.Param)."
        )


def check(name: str, value, good: Callable, wanted: str) -> None:
    """Raise unless all numbers of an argument are in range. Traced numbers are not checked."""
    if not is_concrete(value):
        return
    try:
        array = np.asarray(float(value) if type(value) is int else value)
        if jnp.issubdtype(array.dtype, jnp.floating):
            array = array.astype(np.float64)  # float16 does not know the bounds of float32
        fine = array.dtype.kind not in "bc" and np.all(good(array))
    except (TypeError, OverflowError):  # not a number, or one with hundreds of digits
        fine = False
    if not fine:
        shown_ = repr(value)
        shown_ = shown_ if len(shown_) <= 200 else shown_[:200] + "..."
        raise ValueError(f"{name}={shown_} is out of range. Pass {wanted}.")


def check_flag(name: str, value: Any) -> None:
    """Raise unless an argument is True or False. The text "False" would be taken for True."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}={value!r} is neither True nor False. Pass one of them.")


def check_path(name: str, value: Any) -> None:
    """Raise unless an argument is a path: a text, or what the system takes for one."""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{name}={value!r} is no path. Pass a str or a pathlib.Path.")


def check_transformation(name: str, value: Any, wanted: str) -> None:
    """Raise unless an argument is a transformation of Optax."""
    if not isinstance(value, optax.GradientTransformation):
        raise ValueError(f"{name}={value!r} is not a transformation. Pass {wanted}.")


def check_own_state(maker: str, kind: type, state: Any) -> None:
    """Raise unless a state is of the kind that the `init` of a transformation makes."""
    if not isinstance(state, kind):
        raise ValueError(
            f"state is a {type(state).__name__}, not that of {maker}. Pass the state that its own "
            "init made."
        )


def check_scalar(name: str, value, good: Callable, wanted: str) -> None:
    """Raise unless an argument is one number, and in range. A traced number is not checked."""
    check(name, value, lambda x: x.ndim == 0 and good(x), wanted)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the closest known one, if one is close."""
    close = difflib.get_close_matches(name, known, 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_unique(names: Iterable[str], leaves: Iterable[Any], separator: str = "/") -> None:
    """Raise if two leaves have the same name, showing both."""
    seen: dict[str, Any] = {}
    for name, leaf in zip(names, leaves, strict=True):
        if name in seen:
            raise ValueError(
                f"two leaves are named {name!r}: {describe(seen[name])} and {describe(leaf)}. "
                f"Rename one: a {separator!r} inside a dict key collides with nesting."
            )
        seen[name] = leaf


def written_names(
    paths: Iterable[KeyPath], leaves: Iterable[Any], separator: str = "/"
) -> list[str]:
    """Return the names under which leaves are written: their key paths, joined.

    Every writer (a checkpoint, safetensors, TF1) calls this before it writes anything, so that no
    leaf is lost under the name of another one.

    Args:
        paths: the key path of each leaf.
        leaves: the leaves, which an error describes by dtype and shape.
        separator: what the writer puts between two steps of a path.

    Raises:
        ValueError: two names are the same or no text, or a path has more steps than a reader can
            follow.
    """
    paths = list(paths)
    for path in paths:
        if len(path) > DEEPEST:
            start = separator.join(path[:3])
            raise ValueError(
                f"a leaf lies {len(path)} levels deep, below {start!r}; a checkpoint of more than "
                f"{DEEPEST} levels cannot be read again. Flatten that part of the tree."
            )
    names = [separator.join(path) for path in paths]
    for name in names:
        if re.search("[\ud800-\udfff]", name):
            raise ValueError(
                f"the name {name!r} has half a character (a surrogate), which no file can hold. "
                "Rename that leaf."
            )
    check_unique(names, leaves, separator)
    return names


def describe(leaf) -> str:
    """Return the text by which an error describes a leaf: dtype and shape."""
    if hasattr(leaf, "dtype"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return repr(leaf)


def shown(state: Any) -> str:
    """Return a named tuple of trees as a notebook shows it: dtypes and shapes, not the numbers.

    Scalars are shown as numbers, and at most eight leaves of a tree.
    """
    fields = zip(state._fields, state, strict=True)
    inside = ", ".join(f"{name}={_shown(tree)}" for name, tree in fields if tree is not None)
    return f"{type(state).__name__}({inside})"


def _shown(tree: Tree) -> str:
    named = by_path(tree)
    if list(named) == [()]:
        return shown_leaf(named[()])
    shown_ = [f"{printable('/'.join(path))}: {shown_leaf(x)}" for path, x in named.items()]
    more = [f"... {len(shown_) - 8} more"] if len(shown_) > 8 else []
    return "{" + ", ".join(shown_[:8] + more) + "}"


def shown_leaf(x: Any) -> str:
    """Return a scalar as its number, any other leaf as its dtype and shape."""
    is_number = isinstance(x, (jax.Array, np.ndarray)) and np.ndim(x) == 0 and is_concrete(x)
    # an array of other processes cannot be read, nor one that was donated
    if is_number and not (
        isinstance(x, jax.Array) and (x.is_deleted() or not x.is_fully_addressable)
    ):
        return str(x)
    return describe(x)
