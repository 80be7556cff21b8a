"""Train the Optax way: TF1's `compute_gradients`, `apply_gradients` and `minimize`."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emaopt._tree.checks import describe
from emaopt._tree.devices import is_deleted
from emaopt._tree.leaves import apply_updates, leaves, zip_leaves
from emaopt._tree.numbers import is_inexact
from emaopt._tree.paths import Params, State, Tree, leaf_names

from .interrupts import flat, keep_interrupt, raise_interrupt, unflat


def compute_gradients(
    loss: Callable[..., Any],
    params: Tree,
    *args: Any,
    var_list: Tree | Callable[[Tree], Tree] | None = None,
    grad_loss: Any = None,
    has_aux: bool = False,
) -> tuple[Any, Tree]:
    """Compute a loss and its gradients: TF1's `Optimizer.compute_gradients`.

    It does what `jax.value_and_grad(loss)(params, *args)` does. Some parameters may be integers,
    booleans, keys or absent: their gradient is `None`. The gradient of a complex parameter is that
    of JAX, the conjugate of the direction in which a real loss grows.

    Args:
        loss: `loss(params, *args)` returns an array of floating-point numbers. An array of many
            elements counts as their sum, as in TF1.
        params: the parameters, any pytree.
        args: the other arguments of the loss.
        var_list: which leaves to train: a tree of booleans like `params`, or a function that makes
            one, such as `emaopt.matching("kernel$")`. The gradient of the others is `None`.
        grad_loss: the gradient that comes into the loss, of its shape; ones by default. TF1's
            `tf.gradients(..., grad_ys)`.
        has_aux: whether the loss returns `(value, aux)`.

    Returns:
        `(value, grads)`, or `((value, aux), grads)` with `has_aux`. `grads` is a tree like
        `params`.

    Raises:
        ValueError: `var_list` is not a mask or leaves nothing to train; the loss returns no
            floating-point array, or no pair with `has_aux`; `grad_loss` has another shape.

    Example:
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


def _cotangent(value: Any, grad_loss: Any) -> jax.Array:
    """Return the gradient that comes into a loss: ones, or what the user passes."""
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
    """Raise unless `tx` is a transformation. A common mistake is to pass `adam` for `adam()`."""
    if not hasattr(tx, "init"):
        raise ValueError(
            f"tx is a {type(tx).__name__}, not a gradient transformation. Pass what a call made, "
            "such as optax.chain(...) or emaopt.adam()."
        )


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: Tree,
    params: Params,
    opt_state: State,
    **extra: Any,
) -> tuple[Params, State]:
    """Take one step: TF1's `Optimizer.apply_gradients`.

    A leaf whose gradient is `None` stays, and so do its slots.

    Args:
        tx: the transformation, such as `optax.chain(...)` or `emaopt.adam()`.
        grads: a tree like `params`, from `compute_gradients` or `jax.grad`.
        params: the parameters.
        opt_state: the state, from `tx.init(params)` or the last step.
        extra: further arguments of the links of the chain: `value=`, `grad=` and `value_fn=` for
            Optax's line searches, `num_updates=` for `ema`, `use_norm=` for `clip_by_global_norm`.
            Links ignore arguments that they do not know, as in `optax.chain`.

    Returns:
        `(params, opt_state)` after the step.

    Raises:
        ValueError: `tx` is not a transformation, or every gradient is `None`.

    Example:
        >>> tx = optax.sgd(1.0)
        >>> apply_gradients(tx, jnp.array(2.0), jnp.array(5.0), tx.init(jnp.array(5.0)))[0]
        Array(3., dtype=float32)
    """
    _check_transformation(tx)
    if all(g is None for _, g in zip_leaves(params=params, grads=grads)[0]):
        raise ValueError(
            "grads holds no gradient: every leaf is None. Pass the grads of compute_gradients."
        )
    # Optax types what trees hold, and nothing is known here of these
    update: Any = optax.with_extra_args_support(tx).update
    updates, opt_state = update(grads, opt_state, params, **extra)
    return apply_updates(params, updates), opt_state


def minimize(
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    var_list: Tree | Callable[[Tree], Tree] | None = None,
    has_aux: bool = False,
    donate: bool = True,
    static_argnames: str | Sequence[str] = (),
) -> Callable[..., tuple[Any, Any, Any]]:
    """Return a jitted training step: TF1's `Optimizer.minimize`.

    With `ema` in the chain it is TF1's `tf.group(train_op, ema_op)`. The chain is given `value`,
    `grad` and `value_fn`, or `grad_fn` for `optax.contrib.sam`, so that Optax's line searches,
    `optax.polyak_sgd` and `optax.contrib.reduce_on_plateau` work in it. Complex gradients are
    conjugated, so that the step descends.

    A donated step takes over the memory of `params` and `opt_state`. Go on with what it returns,
    and keep copies of what you need later (`emaopt.average` returns one). Ctrl-C waits until a step
    is finished, so an interrupted loop `params, opt_state, value = step(params, opt_state, x)`
    keeps all three.

    Args:
        loss: `loss(params, *args, **kwargs)`, as for `compute_gradients`.
        tx: the transformation, such as `optax.chain(emaopt.adam(), emaopt.ema(0.999))`.
        var_list: which leaves to train, a mask or a function that makes one; all by default.
        has_aux: whether the loss returns `(value, aux)`. Then the `value` that the step returns is
            this pair.
        donate: whether the step takes over the memory of `params` and `opt_state`. `False` keeps
            them, and takes twice the memory.
        static_argnames: keyword arguments of the loss that are static, as for `jax.jit`: they must
            be hashable, and each new value compiles the step again. Python's booleans and strings
            are always static, so that a loss may say `if train:`.

    Returns:
        `step(params, opt_state, *args, **kwargs) -> (params, opt_state, value)`; `args` and
        `kwargs` go to the loss. `step.lower(...)` lowers it, as for `jax.jit`.

    Raises:
        ValueError: `tx` is not a transformation. The step raises what `compute_gradients` and
            `apply_gradients` raise.
        RuntimeError: the step is called with arrays that an earlier step took over.

    Example:
        >>> tx = optax.sgd(0.25)
        >>> step = minimize(lambda p: p**2, tx)
        >>> params = jnp.array(4.0)
        >>> step(params, tx.init(params))[0]
        Array(2., dtype=float32)
    """
    _check_transformation(tx)
    names = {static_argnames} if isinstance(static_argnames, str) else set(static_argnames)

    def step(params, opt_state, *args, **kwargs):
        of_params = lambda params: loss(params, *args, **kwargs)

        def value_and_grads(params):
            value, grads = compute_gradients(of_params, params, var_list=var_list, has_aux=has_aux)
            return value, jax.tree.map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)

        value, grads = value_and_grads(params)
        extra = {"value": _scalar(value, has_aux), "grad": grads}
        extra["value_fn"] = lambda params: _scalar(of_params(params), has_aux)
        grad_fn = lambda params, *_: value_and_grads(params)[1]
        return *_take(tx, grads, params, opt_state, extra, grad_fn), value

    @functools.wraps(step)
    def flat_step(*args, **kwargs):
        return flat(step(*args, **kwargs))

    @functools.cache
    def jitted(f: Callable, numbers: tuple[int, ...], names: tuple[str, ...]) -> Any:
        donated = (0, 1) if donate else ()
        return jax.jit(f, static_argnums=numbers, static_argnames=names, donate_argnums=donated)

    def lower(params, opt_state, *args, **kwargs):
        compiled = jitted(step, *_static(names, args, kwargs))
        return compiled.lower(params, opt_state, *args, **kwargs)

    run = _finishing(lambda args, kwargs: jitted(flat_step, *_static(names, args, kwargs)))
    run.__dict__["lower"] = lower
    return run


def _take(
    tx: Any, grads: Tree, params: Params, opt_state: State, extra: dict, grad_fn: Callable
) -> tuple[Params, State]:
    """Take one step, with the further arguments that the chain takes.

    Links ignore arguments that they do not know; that is Optax's convention. `optax.contrib.sam`
    does not follow it: it accepts `grad_fn` alone, which Optax's line searches refuse.
    """
    try:
        return apply_gradients(tx, grads, params, opt_state, **extra)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
    return apply_gradients(tx, grads, params, opt_state, grad_fn=grad_fn)


def _finishing(jitted: Callable[[tuple, dict], Any]) -> Callable[..., tuple[Any, Any, Any]]:
    """Return the step that a user calls. It finishes although the user interrupts it.

    `jitted` returns the jitted step for the arguments of the loss. The result of that is `flat`.
    """

    def step(params, opt_state, *args, **kwargs):
        raise_interrupt()
        call = functools.partial(jitted(args, kwargs), params, opt_state, *args, **kwargs)
        made: list[Any] = []
        try:
            # `extend` and `starmap` run in C: there is no instruction of Python between the end of
            # the computation and its results being in the list, where an interrupt finds them.
            made.extend(itertools.starmap(call, [()]))
            return unflat(made[0])
        except KeyboardInterrupt:
            if not made:
                raise
            keep_interrupt()
            return unflat(made[0])
        except (RuntimeError, ValueError) as error:  # of a deleted array JAX raises both
            _explain_deleted(error, params=params, opt_state=opt_state)
            once = _once_each((params, opt_state))
            if once is None:
                raise
            return step(*once, *args, **kwargs)

    return step


def _once_each(trees: Any) -> Any:
    """Return trees in which every array stands once; `None` if that is so already.

    The memory of an array cannot be taken over twice. The first state of `optax.lbfgs` has the same
    array of zeros in two places.
    """
    found, structure = jax.tree.flatten(trees)
    seen: set[int] = set()
    copied = False
    for i, x in enumerate(found):
        if isinstance(x, jax.Array) and id(x) in seen:
            found[i], copied = jnp.copy(x), True
        seen.add(id(x))
    return structure.unflatten(found) if copied else None


def _static(names: set[str], args: tuple, kwargs: dict) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return positions and names of the static arguments: booleans, strings, and `names`."""
    fixed = lambda x: isinstance(x, (bool, str))
    numbers = tuple(i for i, x in enumerate(args, start=2) if fixed(x))
    return numbers, tuple(name for name, x in kwargs.items() if name in names or fixed(x))


def _scalar(value: Any, has_aux: bool) -> jax.Array:
    """Return the number that a line search compares: the loss, summed over its elements."""
    return jnp.sum(value[0] if has_aux else value)


def _explain_deleted(error: Exception, **trees: Tree) -> None:
    """Raise an error that says why an array is deleted, if one is."""
    for name, tree in trees.items():
        for leaf, x in zip(leaf_names(tree), leaves(tree), strict=True):
            if is_deleted(x):
                raise RuntimeError(
                    f"{name} has a deleted array at leaf {leaf!r}: a step took over its memory. "
                    "Pass what that step returned, `params, opt_state, value = "
                    "step(params, opt_state, ...)`. To keep values beyond a step, copy them, "
                    "jax.tree.map(jnp.copy, params), or pass donate=False to emaopt.minimize."
                ) from error
