"""Write summaries for TensorBoard: scalars, histograms, texts and the graph of a run::

    @jax.jit
    def step(params, opt_state, *batch):
        loss, grads = emaopt.compute_gradients(loss_of, params, *batch)
        params, opt_state = emaopt.apply_gradients(tx, grads, params, opt_state)
        return params, opt_state, summary.scalars(params, opt_state, grads=grads, loss=loss)

    with summary.writer("logs") as log:
        for i, batch in enumerate(batches):
            params, opt_state, scalars = step(params, opt_state, *batch)
            if i % 100 == 0:
                log.write(scalars)

`scalars` is a pure function. Its results stay on the device until they are written. The counterpart
of TF1's `tf.summary`.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey

from emaopt._average.decay import DecayLike, as_decay
from emaopt._average.find import average, averages
from emaopt._average.meters import ledgers
from emaopt._names import GLOBAL_STEP, global_step
from emaopt._optimizers.builder import OptimizerState
from emaopt._optimizers.clip import global_norm
from emaopt._tree.checks import did_you_mean
from emaopt._tree.numbers import wide
from emaopt._tree.paths import Tree, key_name

from ._writer import Writer as Writer, check_scalars, writer as writer


# the fields in which optax.inject_hyperparams and optax.monitor keep dicts of values
_KEPT = (GetAttrKey("hyperparams"), GetAttrKey("measurements"))
# Unclipped gradients are still multiplied and divided by the bound, as in TF1. They may differ in
# the last bits, which must not count as clipped.
_ROUNDING = 2.0**-20


def scalars(
    params: Tree,
    opt_state: Tree,
    *,
    grads: Tree = None,
    clip: optax.GradientTransformation | None = None,
    learning_rate: Any = None,
    decay: DecayLike | Mapping[str, DecayLike] | None = None,
    **values: Any,
) -> dict[str, jax.Array]:
    """Compute the scalars that describe a run after an update, by tag.

    The tags:

    * `global_step`: the number of updates so far.
    * `params/norm`, `slots/<slot>`: global norms of the parameters and of each optimizer slot.
    * `average/distance`: the global norm of the average minus `params`. Beside it stands what the
      ledger of the average says. With several averages: `average/<name>/distance`.
    * `average/decay`, `learning_rate`: the values of the last update, if you pass the functions.
    * `gradients/norm`, and with `clip` also `gradients/clipped_norm` and `gradients/clipped`: 1 if
      any element was clipped, else 0. Its mean over many steps is the fraction of clipped steps.
    * What `optax.inject_hyperparams` and `optax.monitor` keep, under its own name.

    The counterpart of TF1's `tf.summary.scalar`, called for each of these.

    Args:
      params: The parameters.
      opt_state: The state of the optimizer, with or without averages in it.
      grads: The gradients, before clipping.
      clip: The clipping transformation in the chain, such as `clip_by_global_norm(1.0)`. Needs
        `grads`.
      learning_rate: The learning rate that the optimizer was given: a number or a schedule.
      decay: The decay that `ema` was given: a number or a function. With several averages, a dict
        by their names in `averages`.
      **values: More scalars, such as `loss=loss`. `None` is left out.

    Returns:
      A dict from tag to an array of shape []. Nothing waits for the device, so the function may be
      called inside `jax.jit`.

    Raises:
      ValueError: If a value is not a scalar, if `clip` comes without `grads`, or if `decay` names
        an average that is not in the state.

    Example:
      >>> import emaopt
      >>> opt_state = emaopt.ema(0.5).init({"w": jnp.array([3.0, 4.0])})
      >>> found = scalars({"w": jnp.array([0.0, 0.0])}, opt_state, loss=jnp.array(0.5))
      >>> {tag: float(x) for tag, x in found.items()}
      {'global_step': 0.0, 'params/norm': 0.0, 'average/distance': 5.0, 'loss': 0.5}
    """
    step = global_step(opt_state)
    found = {GLOBAL_STEP: step, "params/norm": _norm(params)}
    found |= _of_slots(opt_state) | _of_averages(params, opt_state, decay) | _kept(opt_state)
    if grads is not None:
        found |= _of_gradients(grads, clip, params)
    elif clip is not None:
        raise ValueError("clip is given without grads. Pass grads=, the gradients before clipping.")
    if callable(learning_rate):
        learning_rate = learning_rate(jnp.maximum(step - 1, 0))
    values = {"learning_rate": learning_rate, **values}
    found |= {tag: x for tag, x in values.items() if x is not None}
    check_scalars(found)
    return {tag: jnp.asarray(x) for tag, x in found.items()}


def _of_slots(opt_state: Tree) -> dict[str, Any]:
    """Compute the global norm of each slot, over all optimizers in the state."""
    slots: dict[str, list[Tree]] = {}
    for node in jax.tree.leaves(opt_state, is_leaf=_is_optimizer):
        if _is_optimizer(node):
            for name, tree in sorted(node.slots.items()):
                slots.setdefault(name, []).append(tree)
    return {f"slots/{name}": _norm(trees) for name, trees in slots.items()}


def _is_optimizer(node: Any) -> bool:
    return isinstance(node, OptimizerState)


def _of_averages(params: Tree, opt_state: Tree, decay: Any) -> dict[str, Any]:
    """Compute the scalars of each average: distance, decay, and those of its ledger."""
    known = averages(opt_state)
    of_each = dict(decay) if isinstance(decay, Mapping) else dict.fromkeys(known, decay)
    for name in of_each:
        if name not in known:
            raise ValueError(
                f"decay has {name!r}, which is not an average.{did_you_mean(name, known)} Pass "
                f"keys of emaopt.averages(opt_state): {', '.join(map(repr, known))}."
            )
    exact = jax.tree.map(_widened, params)
    minus = lambda p, a: p - a if _is_floating(p) else None
    found = {}
    for name, state in known.items():
        below = f"average/{name}" if len(known) > 1 else "average"
        averaged = average(exact, opt_state, name)
        found[f"{below}/distance"] = _norm(jax.tree.map(minus, exact, averaged))
        if state.ledger is not None:
            found |= {f"{below}/{what}": x for what, x in ledgers(opt_state)[name].items()}
        if (given := of_each.get(name)) is not None:
            found[f"{below}/decay"] = as_decay(given)(jnp.maximum(state.step, 1))
    return found


def _kept(opt_state: Tree) -> dict[str, Any]:
    """Collect the hyper-parameters and measurements that Optax keeps in the state.

    Two of the same name are told apart by their places in the state. Arrays of more than one
    element are left out.
    """
    paths = [
        (keys, x)
        for keys, x in jax.tree_util.tree_flatten_with_path(opt_state)[0]
        if len(keys) > 1 and keys[-2] in _KEPT and jnp.shape(x) == ()
    ]
    times = Counter(key_name(keys[-1]) for keys, _ in paths)
    found = {}
    for keys, x in paths:
        name = key_name(keys[-1])
        if times[name] > 1:
            name = "/".join(key_name(key) for key in keys if not isinstance(key, GetAttrKey))
        found[name] = x
    return found


def _of_gradients(grads: Tree, clip: Any, params: Tree) -> dict[str, Any]:
    """Compute the norm of the gradients, and what clipping does to them."""
    found = {"gradients/norm": _norm(grads)}
    if clip is not None:
        clipped, _ = clip.update(grads, clip.init(params), params)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(clipped), strict=True)
        changed = [jnp.any(jnp.abs(g - c) > _ROUNDING * jnp.abs(c)) for g, c in pairs]
        found["gradients/clipped_norm"] = _norm(clipped)
        found["gradients/clipped"] = jnp.any(jnp.stack(changed)).astype(jnp.float32)
    return found


def _norm(tree: Tree) -> jax.Array:
    """Compute the global norm of the floating-point leaves."""
    return global_norm([x for x in jax.tree.leaves(tree) if _is_floating(x)])


def _widened(x: Any) -> Any:
    """Convert a floating-point leaf to float32 or wider, in which distances are exact enough."""
    return jnp.asarray(x, wide(jnp.result_type(x))) if _is_floating(x) else x


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)
