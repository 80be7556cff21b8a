"""Show what a function made as the call that made it: `ema(warmup(0.999))`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
import optax

from .checks import shown_leaf
from .numbers import is_concrete


Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


class _Plain(optax.GradientTransformation):
    def __repr__(self) -> str:
        return text_of(self)


class _Extra(optax.GradientTransformationExtraArgs):
    def __repr__(self) -> str:
        return text_of(self)


def shows_its_call(function: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Decorate a function, so that the transformation that it makes is shown as the call.

    The text is made when it is asked for: a learning rate may be an array on a device.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def make(*args, **kwargs):
        made: Any = function(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        made.update.call = function.__name__, signature, given.arguments
        if isinstance(made, optax.GradientTransformationExtraArgs):
            return _Extra(*made)
        return _Plain(*made) if isinstance(made, optax.GradientTransformation) else made

    as_before: Any = make
    return as_before


def text_of(made: Any) -> str:
    """Return the text of the call that made something: the first argument, and what is no default.

    >>> text_of(shows_its_call(optax.scale)(0.5))
    'scale(0.5)'
    """
    if not hasattr(made.update, "call"):  # someone has replaced it
        return f"{type(made).__mro__[1].__name__}(...)"
    name, signature, arguments = made.update.call
    shown = []
    for i, (key, parameter) in enumerate(signature.parameters.items()):
        value = arguments[key]
        if i == 0 or parameter.default is inspect.Parameter.empty:
            shown.append(show(value))
        elif not _same(value, parameter.default):
            shown.append(f"{key}={show(value)}")
    return f"{name}({', '.join(shown)})"


def show(x: Any) -> str:
    """Return the text of an argument. It is short, and has no address in it.

    >>> show(0.5), show("y"), show(optax.sgd(0.1)), show({"w": True}), show(np.ones(3))
    ('0.5', "'y'", 'optax.chain(...)', '{...}', 'float64[3]')
    """
    if isinstance(x, optax.GradientTransformation):
        return _show_transformation(x)
    if isinstance(x, functools.partial):
        return show(x.func)
    if callable(x) and hasattr(x, "__name__"):
        return x.__name__
    if callable(x) and type(x).__repr__ is object.__repr__:
        return type(x).__name__
    if not is_concrete(x):
        return "<traced>"
    if isinstance(x, (jax.Array, np.ndarray)):
        return shown_leaf(x)
    if isinstance(x, dict):
        return "{...}"
    return repr(x) if isinstance(x, str) else str(x)


def _show_transformation(tx: optax.GradientTransformation) -> str:
    """Return a transformation of Optax, which does not know how it was made, by the name of it."""
    if isinstance(tx, (_Plain, _Extra)):
        return repr(tx)
    update: Any = tx.update
    if not hasattr(update, "__qualname__"):
        return f"{type(tx).__name__}(...)"
    package, maker = update.__module__.split(".")[0], update.__qualname__.split(".")[0]
    return f"{package}.{maker}(...)"


def _same(value: Any, default: Any) -> bool:
    """Tell whether an argument is its default, without looking into arrays."""
    plain = isinstance(value, (bool, int, float, str))
    return value is default or (plain and type(value) is type(default) and value == default)
