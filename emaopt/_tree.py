"""The tree conventions, each one function.

* `None` is an absent leaf: a gradient that was not asked for, a bound that is not set. `tree_map`
  leaves it absent.
* State is never narrower than float32 unless the user asks: `wide`.
* A leaf is named by its key path, joined with a slash: `leaf_names`.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec


Tree = Any
Params = TypeVar("Params")  # a tree that comes back of the type that it was
State = TypeVar("State")


def is_none(x) -> bool:
    """Whether a node is an absent leaf."""
    return x is None


def zip_leaves(**trees: Tree) -> tuple[list[tuple], Any]:
    """The leaves of several trees side by side, and the structure of the first tree.

    The keywords are the names that an error uses. A leaf may be `None` in any tree.
    """
    (first, tree), *others = trees.items()
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_none)
    columns = [leaves]
    for name, other in others:
        try:
            columns.append(treedef.flatten_up_to(other))
        except (ValueError, TypeError) as error:
            raise ValueError(_mismatch(first, tree, name, other, error)) from None
    return list(zip(*columns, strict=True)), treedef


def tree_map(f: Callable, **trees: Tree) -> Tree:
    """`f` of the leaves side by side; absent where the leaf of the first tree is absent."""
    rows, treedef = zip_leaves(**trees)
    return treedef.unflatten([None if row[0] is None else f(*row) for row in rows])


def _mismatch(first: str, tree: Tree, name: str, other: Tree, error: Exception) -> str:
    ours, theirs = set(leaf_names(tree)), set(leaf_names(other))
    only = [
        f"only in {where}: {', '.join(sorted(names))}"
        for where, names in ((first, ours - theirs), (name, theirs - ours))
        if names
    ]
    return (
        f"{name} does not have the tree structure of {first}: "
        + ("; ".join(only) or str(error).rstrip("."))
        + f". Pass {first} and {name} made from the same parameters."
    )


def check_shape(leaf: str, **arrays) -> None:
    """Raise unless all arrays are there and have the shape of the first."""
    (first, array), *others = arrays.items()
    for name, other in others:
        if other is None or np.shape(other) != np.shape(array):
            has = "nothing" if other is None else f"shape {np.shape(other)}"
            raise ValueError(
                f"{name} has {has} at leaf {leaf!r} where {first} has {np.shape(array)}. "
                f"Pass {first} and {name} made from the same parameters."
            )


def check_floating(name: str, tree: Tree) -> None:
    """Raise unless all leaves are floating-point numbers; absent ones may be."""
    for leaf, x in zip(leaf_names(tree), jax.tree.leaves(tree, is_leaf=is_none), strict=True):
        if x is None:
            continue
        check_array(leaf, x, name)
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise ValueError(
                f"{name} has dtype {jnp.result_type(x)} at leaf {leaf!r}; an optimizer needs "
                "floating-point numbers. Pass parameters alone (nnx.state(model, nnx.Param), "
                'variables["params"]), or leave it out: optax.masked(optimizer, mask).'
            )


def check_array(leaf: str, x, name: str) -> None:
    """Raise unless a leaf is an array or a number; a module may have strings and functions."""
    if not (hasattr(x, "dtype") or isinstance(x, (bool, int, float, complex))):
        raise ValueError(
            f"{name} has a {type(x).__name__} at leaf {leaf!r}, which is no array. Pass the arrays "
            "alone: of an Equinox module, eqx.filter(model, eqx.is_inexact_array); of an NNX one, "
            "nnx.state(model, nnx.Param)."
        )


def check(name: str, value, good: Callable, wanted: str) -> None:
    """Raise unless a hyper-parameter is in range; a traced one cannot be looked at."""
    if not is_concrete(value):
        return
    try:
        fine = np.all(good(np.asarray(value)))
    except TypeError:  # not a number
        fine = False
    if not fine:
        raise ValueError(f"{name}={value!r} is out of range. Pass {wanted}.")


def is_inexact(x) -> bool:
    """Whether a leaf holds floating-point or complex numbers: no integer, boolean or key."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def dtype_of(leaf) -> Any:
    """The dtype of a leaf, which may be a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def wide(dtype) -> np.dtype:
    """The dtype of state and arithmetic for values of `dtype`: float32 or wider."""
    enough = jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize >= 4
    return jnp.dtype(dtype if enough else jnp.float32)


def is_concrete(x) -> bool:
    """Whether a value is known now, so that it can be checked: a number or array, not traced."""
    return not isinstance(x, Tracer)


def scalar(x, dtype):
    """A hyper-parameter rounded to `dtype` before anything is computed with it."""
    return x.astype(dtype) if isinstance(x, jax.Array) else np.asarray(x, dtype)[()]


def beside(params: Tree, x: jax.Array) -> jax.Array:
    """A scalar of a new state, on every device that the parameters are sharded over.

    Left on one device, it would come back from the first step on all of them, and the second step
    would be compiled again.
    """
    for p in jax.tree.leaves(params):
        sharding = p.sharding if isinstance(p, jax.Array) and is_concrete(p) else None
        if isinstance(sharding, NamedSharding):
            return jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec()))
    return x


def in_memory(x, space: Any = jax.memory.Space.Device):
    """A leaf in that memory: of its devices, to compute with, or of the host."""
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def stay(before, after):
    """A leaf computed from one that may be in the memory of the host, where that one is."""
    return in_memory(after, jax.typeof(before).memory_space)


def apply_update(p, u):
    """One parameter after its update, rounded as `optax.apply_updates` rounds it.

    An absent update (`None`, or the float0 that JAX gives integers) leaves the parameter.
    """
    if u is None or getattr(u, "dtype", None) == jax.dtypes.float0:
        return p
    if jnp.issubdtype(jnp.result_type(p), jax.dtypes.prng_key):
        return p
    return optax.apply_updates(p, u)


def leaf_names(tree: Tree) -> list[str]:
    """The name of every leaf, absent ones too, in flattening order: `conv/kernel`."""
    return ["/".join(path) for path in leaf_paths(tree)]


def key_paths(tree: Tree) -> list[tuple[str, ...]]:
    """The whole key path of every leaf that is there, as Orbax names it on disk."""
    return [tuple(map(key_name, keys)) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def leaf_paths(tree: Tree) -> list[tuple[str, ...]]:
    """The key path of every leaf as strings; an NNX Variable's own `value` is not part of it."""
    variables = {keys for keys, _ in _variables(tree)}
    return [
        tuple(map(key_name, keys[:-1] if keys[:-1] in variables else keys))
        for keys, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)[0]
    ]


def shared_paths(tree: Tree) -> list[list[tuple[str, ...]]]:
    """The key paths of every NNX Variable that a module has in several places: tied weights."""
    places: dict[int, list[tuple[str, ...]]] = {}
    for keys, variable in _variables(tree):
        places.setdefault(id(variable), []).append(tuple(map(key_name, keys)))
    return [paths for paths in places.values() if len(paths) > 1]


def _variables(tree: Tree) -> list[tuple[Any, Any]]:
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: x is None or _is_variable(x)
    )
    return [(keys, node) for keys, node in nodes if _is_variable(node)]


def _is_variable(x) -> bool:
    return any(
        base.__name__ == "Variable" and base.__module__.startswith("flax.nnx")
        for base in type(x).__mro__
    )


def key_name(key) -> str:
    """One step of a key path: a dict key, a position or a field."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about a name that is not known."""
    close = difflib.get_close_matches(name, known, 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_unique(names: Iterable[str], leaves: Iterable[Any]) -> None:
    """Raise if two leaves have the same name, showing both."""
    seen: dict[str, Any] = {}
    for name, leaf in zip(names, leaves, strict=True):
        if name in seen:
            raise ValueError(
                f"two leaves are named {name!r}: {describe(seen[name])} and {describe(leaf)}. "
                "Rename one: a '/' inside a dict key collides with nesting."
            )
        seen[name] = leaf


def describe(leaf) -> str:
    """A leaf in an error message: dtype and shape."""
    if hasattr(leaf, "dtype"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return repr(leaf)
