"""An optimizer of a rule for one leaf.

`rule(g, p, *slots, **hyper) -> (update, *slots)` never sees a tree; `optimizer` never sees a
formula. It does the tree work, keeps the state, and rounds every hyper-parameter to the dtype that
the leaf is computed in. The state is exactly TF1's variables: the slots under TF1's slot names,
Adam's two beta powers, and the step.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from emaopt._average.decays import Decay
from emaopt._tree.checks import FINITE, NOT_NEGATIVE, SHARE, check, check_floating, check_shape
from emaopt._tree.devices import beside
from emaopt._tree.leaves import tree_map, zip_leaves
from emaopt._tree.numbers import is_concrete, scalar, wide
from emaopt._tree.paths import Tree, leaf_names


_RANGES = dict.fromkeys(("beta1", "beta2", "decay", "rho"), SHARE) | {"epsilon": NOT_NEGATIVE}


class OptimizerState(NamedTuple):
    """What TF1 keeps in variables.

    `step`: int32 [], TF1's global step. `powers`: float32 [] each, Adam's `beta1_power` and
    `beta2_power`, else empty. `slots`: by TF1's slot names, trees like the parameters, float32 or
    wider.
    """

    step: jax.Array
    powers: dict[str, jax.Array]
    slots: dict[str, Tree]


def optimizer(
    rule: Callable,
    slots: Mapping[str, Any],
    powers: Mapping[str, Any] | None = None,
    *,
    needs_params: str = "",
    **hyper: Any,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of a rule. `slots`: start values, in the order of the rule's arguments."""
    powers = powers or {}
    for name, value in hyper.items():
        if isinstance(value, Decay):
            raise ValueError(
                f"{name} is the decay of an average. Pass a number or a schedule: "
                "emaopt.exponential_decay, or Optax's optax.warmup_constant_schedule."
            )
        if not (name == "learning_rate" and callable(value)):
            check(name, value, *_RANGES.get(name, FINITE))

    def init(params):
        check_floating("params", params)
        return OptimizerState(
            step=beside(params, jnp.zeros((), jnp.int32)),
            powers={k: beside(params, jnp.array(v, jnp.float32)) for k, v in powers.items()},
            slots={
                name: tree_map(lambda p, start=start: _slot(p, start), params=params)
                for name, start in slots.items()
            },
        )

    def update(updates, state, params=None, **extra):
        del extra
        if params is None and needs_params:
            raise ValueError(
                f"params is missing: {needs_params}. Call tx.update(grads, state, params)."
            )
        if not isinstance(state, OptimizerState) or set(state.slots) != set(slots):
            kind = list(state.slots) if isinstance(state, OptimizerState) else type(state).__name__
            raise ValueError(
                f"state is of another transformation: it has {kind}, where this optimizer keeps "
                f"{list(slots)}. Pass the state that its own init made."
            )
        check_floating("updates", updates)
        now = {k: v(state.step) if callable(v) else v for k, v in hyper.items()} | state.powers
        given = {"updates": updates} | {f"state.slots[{k!r}]": state.slots[k] for k in slots}
        if params is not None:
            given["params"] = params
        rows, treedef = zip_leaves(**given)

        def leaf(name, g, *rest):
            old, p = (rest, None) if params is None else (rest[:-1], rest[-1])
            if g is None:
                return None, *old
            g = jnp.asarray(g)
            check_shape(name, **dict(zip(given, (g, *rest), strict=True)))
            dtype = old[0].dtype if old else wide(g.dtype)
            p = None if p is None else jnp.asarray(p).astype(dtype)
            scalars = {k: scalar(v, dtype) for k, v in now.items()}
            update, *new = rule(g.astype(dtype), p, *old, **scalars)
            return update.astype(g.dtype), *new

        columns = [leaf(name, *row) for name, row in zip(leaf_names(updates), rows, strict=True)]
        new_updates, *new_slots = (
            treedef.unflatten([column[i] for column in columns]) for i in range(1 + len(slots))
        )
        return new_updates, OptimizerState(
            step=jnp.asarray(optax.safe_increment(state.step)),
            powers={
                name: power * scalar(powers[name], power.dtype)
                for name, power in state.powers.items()
            },
            slots=dict(zip(slots, new_slots, strict=True)),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _slot(p, start: ArrayLike) -> jax.Array:
    """A slot at its start value, sharded as its parameter is, also when made under jit."""
    p = jnp.asarray(p)
    slot = jnp.full_like(p, scalar(start, wide(p.dtype)), dtype=wide(p.dtype))
    # a constant has no sharding of its own; a select on the parameter takes the parameter's
    return slot if is_concrete(p) else jnp.where(p == p, slot, slot)
