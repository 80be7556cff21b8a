"""Make an optimizer for trees from a rule for one leaf.

A rule is TF1's kernel for one array: `rule(g, p, *slots, **hyper) -> (update, *new_slots)`. It
never sees a tree. `optimizer` does the tree work, keeps the state and rounds the hyper-parameters;
it never sees a formula. The state is exactly TF1's variables: the slots under TF1's slot names,
Adam's two beta powers, and the step.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from emaopt._average.decay import Decay  # to word one error: a decay is no learning rate
from emaopt._tree.checks import (
    FINITE,
    NOT_NEGATIVE,
    SHARE,
    Range,
    check_floating,
    check_scalar,
    check_shape,
    shown,
)
from emaopt._tree.devices import beside
from emaopt._tree.leaves import map_leaves, tree_map
from emaopt._tree.numbers import is_concrete, real_dtype, scalar, wide
from emaopt._tree.paths import Tree


# The beta powers are float32 for parameters of every dtype, and Adam divides by 1 minus them.
_BELOW_ONE = Range(
    lambda x: (x >= 0) & (x.astype(np.float32) < 1),
    "a number from 0 to below 1; float32 rounds 1 - 1e-8 to 1",
)
_RANGES = {
    "beta1": _BELOW_ONE,
    "beta2": _BELOW_ONE,
    "decay": SHARE,
    "rho": SHARE,
    "epsilon": NOT_NEGATIVE,
}
_SHARES = ("beta1", "beta2", "decay", "rho")


class OptimizerState(NamedTuple):
    """Hold what TF1 keeps in variables: the state of every optimizer of emaopt.

    Attributes:
        step: int32 [], the number of updates so far, TF1's global step.
        powers: float32 [] each, Adam's `beta1_power` and `beta2_power`; empty for the others.
        slots: trees like the parameters, by TF1's slot names; float32 or wider.
    """

    step: jax.Array
    powers: dict[str, jax.Array]
    slots: dict[str, Tree]

    def __repr__(self) -> str:
        return shown(self)


def optimizer(
    rule: Callable,
    slots: Mapping[str, Any],
    powers: Mapping[str, Any] | None = None,
    *,
    needs_params: str = "",
    linear: bool = False,
    **hyper: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that applies a rule to every leaf.

    Args:
        rule: `rule(g, p, *slots, **hyper) -> (update, *new_slots)`, for arrays of one shape and
            dtype. `p` is `None` if the user passes no parameters.
        slots: the start value of each slot, in the order of the rule's arguments.
        powers: the start value of each running product; each is multiplied by it at every update.
        needs_params: why the rule needs the parameters; empty if it does not.
        linear: whether the rule is linear in gradient and slots. Only such a rule takes complex
            numbers: it is applied to real and imaginary parts.
        hyper: numbers, or schedules of the step; checked here, and passed to the rule by name.

    Raises:
        ValueError: a hyper-parameter is out of range.
    """
    powers = powers or {}
    for name, value in hyper.items():
        _check_hyper(name, value)

    def init(params):
        check_floating("params", params, complex_too=linear)
        return OptimizerState(
            step=beside(params, jnp.zeros((), jnp.int32)),
            powers={k: beside(params, jnp.array(v, jnp.float32)) for k, v in powers.items()},
            slots={
                name: tree_map(functools.partial(_slot, start), params=params)
                for name, start in slots.items()
            },
        )

    def update(updates, state, params=None, **extra):
        del extra
        if params is None and needs_params:
            raise ValueError(
                f"params is missing: {needs_params}. Call tx.update(grads, state, params)."
            )
        _check_state(state, slots)
        check_floating("updates", updates, complex_too=linear)
        trees = {"updates": updates}  # by the names that an error uses
        trees |= {f"state.slots[{name!r}]": state.slots[name] for name in slots}
        if params is not None:
            trees["params"] = params
        now = {name: _at(name, value, state.step) for name, value in hyper.items()}
        now |= state.powers  # a rule gets them beside its hyper-parameters
        step_leaf = functools.partial(_step_leaf, rule, now, tuple(trees))
        new_updates, *new_slots = map_leaves(step_leaf, 1 + len(slots), **trees)
        return new_updates, OptimizerState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            powers={k: v * scalar(powers[k], v.dtype) for k, v in state.powers.items()},
            slots=dict(zip(slots, new_slots, strict=True)),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _step_leaf(rule: Callable, hyper: dict, trees: tuple[str, ...], leaf: str, *row: Any) -> tuple:
    """Return the update and the new slots of one leaf. Without a gradient its slots stay.

    `row` holds the arrays of the leaf: the gradient, the slots, and last the parameter if given.
    """
    arrays = dict(zip(trees, row, strict=True))
    if arrays["updates"] is None:
        arrays.pop("params", None)
        return tuple(arrays.values())
    check_shape(leaf, **arrays)
    g, p = jnp.asarray(arrays.pop("updates")), arrays.pop("params", None)
    slots = list(arrays.values())
    dtype = slots[0].dtype if slots else wide(g.dtype)
    _check_not_complex(leaf, g, dtype)
    p = None if p is None else jnp.asarray(p).astype(dtype)
    scalars = {name: _rounded(name, value, real_dtype(dtype)) for name, value in hyper.items()}
    apply = functools.partial(rule, **scalars)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        apply = functools.partial(_by_parts, apply)
    update, *new_slots = apply(g.astype(dtype), p, *slots)
    return update.astype(g.dtype), *new_slots


def _by_parts(rule: Callable, *arrays: jax.Array | None) -> list[jax.Array]:
    """Apply a linear rule to real and imaginary parts.

    Real hyper-parameters stay real so: `g * lr` of a complex `lr` would be four products, and NaN
    where one part of `g` is infinite.
    """
    real = rule(*(None if x is None else jnp.real(x) for x in arrays))
    imaginary = rule(*(None if x is None else jnp.imag(x) for x in arrays))
    return [jax.lax.complex(x, y) for x, y in zip(real, imaginary, strict=True)]


def _slot(start: ArrayLike, p: Any) -> jax.Array:
    """Return a slot at its start value, sharded like its parameter, also under jit.

    The parameter may be abstract, a `jax.ShapeDtypeStruct`.
    """
    p = p if hasattr(p, "dtype") else jnp.asarray(p)
    dtype = wide(p.dtype)
    slot = jnp.full_like(p, scalar(start, real_dtype(dtype)), dtype=dtype)
    # Under jit a constant has no sharding of its own; a select on the parameter has that of it.
    # Without it, jax.jit(tx.init) of sharded parameters puts every slot whole on each device.
    return slot if is_concrete(p) else jnp.where(p == p, slot, slot)


def _at(name: str, value: Any, step: jax.Array) -> Any:
    """Return the value of a hyper-parameter at this update. Call it if it is a schedule."""
    if not callable(value):
        return value
    now: Any = value(step)
    number = isinstance(now, (bool, int, float)) or hasattr(now, "dtype")
    if not number or np.ndim(now) != 0:
        raise ValueError(
            f"{name} is a schedule that returned {now!r}, not a number. Return a scalar: "
            "`lambda step: 0.1 / (1 + step)`; a `def` needs its `return`."
        )
    if not isinstance(now, jax.Array) and not np.isfinite(now):
        raise ValueError(f"{name} is a schedule that returned {now!r}. Return a finite number.")
    return now


def _rounded(name: str, value: Any, dtype: np.dtype) -> Any:
    """Return a hyper-parameter in the dtype that a leaf is computed in."""
    rounded = scalar(value, dtype)
    if name in _SHARES and is_concrete(value) and rounded == 1 and value != 1:
        raise ValueError(
            f"{name}={value!r} is 1 in {dtype}: nothing would ever be forgotten. Pass a smaller "
            "number, or parameters of a wider dtype."
        )
    return rounded


def _check_hyper(name: str, value: Any) -> None:
    """Raise unless a hyper-parameter is a number in range; a learning rate may be a schedule."""
    if isinstance(value, Decay):
        raise ValueError(
            f"{name} is the decay of an average. Pass a number or a schedule: "
            "emaopt.exponential_decay, or Optax's optax.warmup_constant_schedule."
        )
    if name == "learning_rate" and callable(value):
        return
    dtype = getattr(value, "dtype", np.float32)
    if name in _SHARES and jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4:
        raise ValueError(
            f"{name} has dtype {dtype}, in which 0.999 is 1 or nearly so. Pass a Python number; in "
            "optax.inject_hyperparams, hyperparam_dtype=jnp.float32."
        )
    check_scalar(name, value, *_RANGES.get(name, FINITE))


def _check_state(state: Any, slots: Mapping[str, Any]) -> None:
    """Raise unless a state is one that this optimizer made."""
    if isinstance(state, OptimizerState) and set(state.slots) == set(slots):
        return
    kind = list(state.slots) if isinstance(state, OptimizerState) else type(state).__name__
    raise ValueError(
        f"state is of another transformation: it has {kind}, where this optimizer keeps "
        f"{list(slots)}. Pass the state that its own init made."
    )


def _check_not_complex(leaf: str, g: jax.Array, dtype: np.dtype) -> None:
    """Raise if a gradient is complex and its slots are real: its imaginary part would be lost."""
    if jnp.iscomplexobj(g) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(
            f"updates has dtype {g.dtype} at leaf {leaf!r} where the state has {dtype}. Pass the "
            "state that init made of complex parameters."
        )
