"""Training, the optax way: TF1's `compute_gradients`, `apply_gradients` and `minimize`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emaopt._tree.checks import describe
from emaopt._tree.leaves import apply_update, tree_map, zip_leaves
from emaopt._tree.numbers import is_inexact
from emaopt._tree.paths import Params, State, Tree


def compute_gradients(
    loss: Callable[..., Any],
    params: Tree,
    *args: Any,
    var_list: Tree | Callable[[Tree], Tree] | None = None,
    grad_loss: Any = None,
    has_aux: bool = False,
) -> tuple[Any, Tree]:
    """`(value, grads)` of `loss(params, *args)`, as `jax.value_and_grad` gives them.

    `var_list`: a mask, a tree of booleans like `params` or a function that makes one (`matching`);
    the leaves left out get the gradient `None`, as do integers, booleans and keys. `grad_loss`:
    the gradient coming into the loss, like its value; ones by default, so that a loss of many
    elements counts as their sum, as in TF1. `has_aux`: the loss returns `(value, aux)`, and so
    does this. TF1's `Optimizer.compute_gradients`, `tf.gradients(..., grad_ys)`.

    >>> loss = lambda p, x: p["a"] * p["b"] * x
    >>> compute_gradients(loss, {"a": 2.0, "b": 3.0}, 10.0, var_list={"a": True, "b": False})[1]
    {'a': Array(30., dtype=float32, weak_type=True), 'b': None}
    """
    mask = var_list(params) if callable(var_list) else var_list
    if mask is None:
        mask = jax.tree.map(lambda _: True, params)
    rows, treedef = zip_leaves(params=params, var_list=mask)
    for _, chosen in rows:
        if chosen is not None and not isinstance(chosen, (bool, jnp.bool_)):
            raise ValueError(
                f"var_list holds {describe(chosen)}; it is a mask. Pass a tree of booleans like "
                "params, or emaopt.matching(pattern)."
            )
    chosen = [p is not None and bool(m) and is_inexact(p) for p, m in rows]
    if not any(chosen):
        raise ValueError(
            "var_list leaves out every floating-point leaf of params: there is nothing to train. "
            "Pass a mask that is true somewhere."
        )

    def of_chosen(leaves):
        leaves = iter(leaves)
        merged = [next(leaves) if c else p for c, (p, _) in zip(chosen, rows, strict=True)]
        value = loss(treedef.unflatten(merged), *args)
        if has_aux and not (isinstance(value, tuple) and len(value) == 2):
            raise ValueError(
                f"has_aux=True, but loss returns {describe(value)}. Return (value, aux)."
            )
        return value

    inputs = [jnp.asarray(p) for c, (p, _) in zip(chosen, rows, strict=True) if c]
    if has_aux:
        value, vjp, aux = jax.vjp(of_chosen, inputs, has_aux=True)
    else:
        (value, vjp), aux = jax.vjp(of_chosen, inputs), None
    grads = iter(vjp(_cotangent(value, grad_loss))[0])
    tree = treedef.unflatten([next(grads) if c else None for c in chosen])
    return ((value, aux) if has_aux else value), tree


def _cotangent(value, grad_loss):
    if not (isinstance(value, jax.Array) and is_inexact(value)):
        raise ValueError(
            f"loss returns {describe(value)}, which has no gradient. Return a floating-point "
            "array, or pass has_aux=True for (value, aux)."
        )
    if grad_loss is None:
        return jnp.ones_like(value)
    grad_loss = jnp.asarray(grad_loss).astype(value.dtype)
    if grad_loss.shape != value.shape:
        raise ValueError(
            f"grad_loss has shape {grad_loss.shape} where the loss has {value.shape}. Pass an "
            "array like the loss."
        )
    return grad_loss


def _check_transformation(tx: Any) -> None:
    if not hasattr(tx, "init"):
        raise ValueError(
            f"tx is a {type(tx).__name__}, not a gradient transformation. Pass what a call made, "
            "such as optax.chain(...) or emaopt.adam()."
        )


def apply_gradients(
    tx: optax.GradientTransformation, grads: Tree, params: Params, opt_state: State
) -> tuple[Params, State]:
    """`(params, opt_state)` after one step. TF1's `Optimizer.apply_gradients`.

    A leaf whose gradient is `None` stays, and so do its slots.

    >>> tx = optax.sgd(1.0)
    >>> apply_gradients(tx, jnp.array(2.0), jnp.array(5.0), tx.init(jnp.array(5.0)))[0]
    Array(3., dtype=float32)
    """
    _check_transformation(tx)
    if all(g is None for _, g in zip_leaves(params=params, grads=grads)[0]):
        raise ValueError(
            "grads holds no gradient: every leaf is None. Pass the grads of compute_gradients."
        )
    update: Any = tx.update  # Optax says what trees hold, and nothing is known here of these
    updates, opt_state = update(grads, opt_state, params)
    return tree_map(apply_update, params=params, updates=updates), opt_state


def minimize(
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    var_list: Tree | Callable[[Tree], Tree] | None = None,
    has_aux: bool = False,
) -> Callable[..., tuple[Tree, Tree, Any]]:
    """One jitted training step: `step(params, opt_state, *args) -> (params, opt_state, value)`.

    `params` and `opt_state` are donated: their buffers become the new ones, so use only what the
    step returns. TF1's `Optimizer.minimize`; with `ema` in the chain, `tf.group(train_op, ema_op)`.

    >>> tx = optax.sgd(0.25)
    >>> step = minimize(lambda p: p**2, tx)
    >>> params = jnp.array(4.0)
    >>> step(params, tx.init(params))[0]
    Array(2., dtype=float32)
    """
    _check_transformation(tx)

    def step(params, opt_state, *args):
        value, grads = compute_gradients(loss, params, *args, var_list=var_list, has_aux=has_aux)
        params, opt_state = apply_gradients(tx, grads, params, opt_state)
        return params, opt_state, value

    return jax.jit(step, donate_argnums=(0, 1))
