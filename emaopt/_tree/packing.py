"""Join many small leaves into one array.

A training step of a thousand small leaves is mostly bookkeeping, some microseconds per array.
`pack` joins them into one array per dtype, and `unpack` takes them out again, bit for bit. Whatever
computes element by element has the same results on both.
"""

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import DictKey

from .calls import shows_its_call
from .checks import check, check_transformation, check_unique, describe
from .numbers import is_concrete, is_inexact
from .paths import Tree, is_none, leaf_names


class _Place(NamedTuple):
    """Say where a leaf is: in which array, and of which name and shape.

    `joined`: whether it stands in the array with others, in their order.
    """

    array: str
    name: str
    shape: tuple[int, ...]
    joined: bool


class _Layout:
    """Say where all leaves of a tree are. Static: part of the structure of a `Packed` node."""

    def __init__(self, treedef: Any, places: tuple[_Place, ...]):
        self.treedef, self.places = treedef, places
        self.arrays: dict[str, list[int]] = {}
        for i, place in enumerate(places):
            self.arrays.setdefault(place.array, []).append(i)

    def __hash__(self) -> int:
        return hash((self.treedef, self.places))

    def __eq__(self, other: Any) -> bool:
        return self is other or (
            isinstance(other, _Layout)
            and (self.treedef, self.places) == (other.treedef, other.places)
        )


@jax.tree_util.register_pytree_with_keys_class
class Packed:
    """Hold the leaves of a tree in few arrays: a pytree node in place of the tree.

    `pack` makes it, and `unpack` opens it. Its own leaves are one array `[n]` per dtype, and the
    leaves that were not joined.
    """

    def __init__(self, layout: _Layout, arrays: tuple):
        self._layout, self._arrays = layout, arrays

    def tree_flatten_with_keys(self):
        """Return the arrays by name, for JAX."""
        keys = map(DictKey, self._layout.arrays)
        return tuple(zip(keys, self._arrays, strict=True)), self._layout

    def tree_flatten(self):
        """Return the arrays, for JAX."""
        return self._arrays, self._layout

    @classmethod
    def tree_unflatten(cls, layout, arrays):
        """Return a node of arrays, or of whatever JAX puts in their place."""
        return cls(layout, tuple(arrays))

    def __repr__(self) -> str:
        arrays = dict(zip(self._layout.arrays, self._arrays, strict=True))
        return f"Packed({len(self._layout.places)} leaves in {arrays})"


def pack(tree: Tree, like: Tree = None, max_size: int = 2**16) -> Any:
    """Join the many small leaves of a tree into one array per dtype.

    Pack the parameters once, before `tx.init`, and open them in the loss:
    `loss(unpack(params), ...)`. Gradients, slots and averages are then packed as well. For what
    needs the original names (`names`, `emaopt.checkpoint`, `tf1`) unpack both,
    `unpack((params, opt_state))`, and pack them again with `like`.

    Some leaves stay alone: those above `max_size` elements, those sharded over several devices,
    and keys. These are the same arrays, not copies: a step that donates the packed parameters
    deletes them. A transformation sees the packed arrays in place of the leaves. Transformations
    that work element by element give the same results, and so does `clip_by_global_norm`. Wrap
    those that treat each leaf by its norm or its name in `on_leaves`. `heal` mends whole arrays,
    and `stochastic` draws other numbers.

    Args:
        tree: any pytree of arrays and numbers. It may have absent leaves, but no packed nodes.
        like: a tree with the packed nodes that `tree` is to get again, such as `(params,
            opt_state)` before `unpack`.
        max_size: a leaf with more elements is not joined; joining copies it.

    Returns:
        A `Packed` node, or with `like` a tree with packed nodes where `like` has them.

    Raises:
        ValueError: `tree` is packed already, has two leaves of one name, or does not fit `like`.

    Example:
        >>> pack({"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0]])})
        Packed(2 leaves in {'float32_9a5fbd5f': Array([1., 2., 3.], dtype=float32)})
    """
    if like is not None:
        if not any(map(_is_packed, jax.tree.leaves(like, is_leaf=_is_packed))):
            raise ValueError("like holds nothing packed. Pass what pack gave, or leave it out.")
        return _like(tree, like)
    check("max_size", max_size, lambda x: x >= 0, "a number of elements, 0 or more")
    check_unpacked("tree", tree, "It need not be packed again.")
    leaves, treedef = jax.tree.flatten(tree)
    there = [x is not None for x in jax.tree.leaves(tree, is_leaf=is_none)]
    names = [name for name, is_there in zip(leaf_names(tree), there, strict=True) if is_there]
    check_unique(names, leaves)
    leaves = [jnp.asarray(x) for x in leaves]
    kinds = [_kind(x, max_size) for x in leaves]
    joined: dict[Any, list] = {}
    for kind, name, x in zip(kinds, names, leaves, strict=True):
        joined.setdefault(kind, []).append((name, x.shape))
    # The name of an array has a checksum of the names and shapes in it. Without it a checkpoint of
    # other leaves with as many elements would be restored without an error, each leaf wrong.
    called = {
        kind: f"{kind[0]}_{zlib.crc32(repr(members).encode()):08x}"
        for kind, members in joined.items()
        if kind is not None
    }
    places = (
        _Place(called.get(kind, name), name, x.shape, kind is not None)
        for kind, name, x in zip(kinds, names, leaves, strict=True)
    )
    return _fill(_Layout(treedef, tuple(places)), leaves)


def unpack(tree: Tree) -> Tree:
    """Return the tree with every packed node opened: the original leaves, bit for bit.

    `tree` is anything with packed nodes in it: parameters, a state, both. Inside a loss it is
    cheap: its derivative joins the gradients once. A single value in place of a packed array (a
    mask, a count) is repeated for every leaf of it.

    Example:
        >>> unpack((pack({"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0]])}), 7))
        ({'a': Array([1., 2.], dtype=float32), 'b': Array([[3.]], dtype=float32)}, 7)
    """
    return jax.tree.map(
        lambda node: _open(node) if _is_packed(node) else node, tree, is_leaf=_is_packed
    )


@shows_its_call
def on_leaves(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return a transformation that sees the leaves, in a chain that works on packed arrays.

    Wrap a `tx` that treats each leaf by its norm or its name. Its state is not packed.

    Example:
        >>> import emaopt
        >>> tx = optax.chain(on_leaves(emaopt.clip_by_norm(2.5)), emaopt.momentum(0.1, 0.9))
        >>> decay = optax.add_decayed_weights(1e-4)
        >>> weights = on_leaves(optax.masked(decay, emaopt.matching("kernel")))
    """
    check_transformation("tx", tx, "one, such as clip_by_norm(1.0)")
    inner = optax.with_extra_args_support(tx)

    def init(params):
        return inner.init(unpack(params))

    def update(updates, state, params=None, **extra):
        new, state = inner.update(unpack(updates), state, unpack(params), **extra)
        return _like(new, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def check_unpacked(name: str, tree: Tree, fix: str) -> None:
    """Raise if there is a packed node in a tree; `fix` ends the error message."""
    if any(map(_is_packed, jax.tree.leaves(tree, is_leaf=_is_packed))):
        raise ValueError(f"{name} is packed. {fix}")


def _is_packed(node: Any) -> bool:
    """Return whether a node is one that `pack` made."""
    return isinstance(node, Packed)


def _kind(x: jax.Array, max_size: int) -> Any:
    """Return the key under which leaves are joined: dtype and devices; `None` to stay alone."""
    if x.size > max_size or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return None
    if not is_concrete(x):
        return None if any(jax.typeof(x).sharding.spec) else (x.dtype, None)
    if not x.sharding.is_fully_replicated:
        return None
    return x.dtype, (frozenset(x.sharding.device_set), x.sharding.memory_kind)


def _like(tree: Tree, like: Tree) -> Tree:
    """Return the tree with packed nodes where `like` has them."""
    nodes, treedef = jax.tree.flatten(like, is_leaf=_is_packed)
    parts = _up_to(treedef, tree)
    return treedef.unflatten(
        _fill(node._layout, _up_to(node._layout.treedef, part), node._arrays)
        if _is_packed(node)
        else part
        for node, part in zip(nodes, parts, strict=True)
    )


def _up_to(treedef: Any, tree: Tree) -> list:
    """Return the parts of a tree at the leaves of a structure."""
    try:
        return treedef.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"tree does not have the structure of unpack(like): {str(error).rstrip('.')}. Pass a "
            "tree like the one that was packed."
        ) from None


def _fill(layout: _Layout, leaves: list, like: tuple | None = None) -> Packed:
    """Put leaves into their arrays. Where `like` has one value for all leaves, keep one value."""
    arrays = []
    for n, members in enumerate(layout.arrays.values()):
        rows = [leaves[i] for i in members]
        whole = like is None or getattr(like[n], "ndim", 0) > 0
        joined = layout.places[members[0]].joined and whole
        arrays.append(_join([layout.places[i] for i in members], rows) if joined else rows[0])
    return Packed(layout, tuple(arrays))


def _join(places: list[_Place], leaves: list) -> jax.Array:
    """Join leaves one after the other, `[n]`. Leading axes, as of `jax.vmap`, stay in front."""
    leaves = [x if x is None else jnp.asarray(x) for x in leaves]
    first = leaves[0]
    for place, x in zip(places, leaves, strict=True):
        lead = max(np.ndim(x) - len(place.shape), 0)
        if x is None or x.shape[lead:] != place.shape or x.dtype != first.dtype:
            raise ValueError(
                f"leaf {place.name!r} is {describe(x)}; it was packed in the shape {place.shape}, "
                f"beside {describe(first)}. Pack the tree anew."
            )
    flat = [
        jnp.reshape(x, (*x.shape[: x.ndim - len(place.shape)], math.prod(place.shape)))
        for place, x in zip(places, leaves, strict=True)
    ]
    return jnp.concatenate(flat, axis=-1)


def _open(packed: Packed) -> Tree:
    """Return the tree of a packed node. A single value in place of an array goes to each leaf."""
    layout = packed._layout
    leaves: list[Any] = [None] * len(layout.places)
    for name, x in zip(layout.arrays, packed._arrays, strict=True):
        members = layout.arrays[name]
        places = [layout.places[i] for i in members]
        opened = [x] * len(members)
        if places[0].joined and getattr(x, "ndim", 0) > 0:
            shapes = tuple(place.shape for place in places)
            if x.shape[-1] != sum(map(math.prod, shapes)):
                raise ValueError(
                    f"tree has shape {x.shape} in the packed array {name!r}, of leaves with "
                    f"{sum(map(math.prod, shapes))} elements. Pass arrays like those of pack."
                )
            opened = _split(x, shapes)
        for i, leaf in zip(members, opened, strict=True):
            leaves[i] = leaf
    return layout.treedef.unflatten(leaves)


@functools.partial(jax.jit, static_argnums=1)
def _split(x: jax.Array, shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    """Return the leaves of an array, cut along its last axis.

    It is jitted, so that outside of `jit` it is one call instead of two per leaf.
    """
    sizes = tuple(map(math.prod, shapes))
    parts = (_differentiable if is_inexact(x) else _read)(x, sizes)
    lead = x.shape[:-1]
    return [part.reshape(lead + shape) for part, shape in zip(parts, shapes, strict=True)]


def _read(x: jax.Array, sizes: tuple[int, ...]) -> Sequence[jax.Array]:
    """Cut an array along its last axis, in the way that compiles fastest on the platform."""
    return lax.platform_dependent(
        x, cpu=lambda x: _sliced(x, sizes), default=lambda x: lax.split(x, sizes, axis=x.ndim - 1)
    )


def _sliced(x: jax.Array, sizes: tuple[int, ...]) -> list[jax.Array]:
    """Cut an array as `lax.split` does, with the offsets hidden from the compiler.

    XLA's CPU backend compiles a separate kernel for every constant offset. With hidden offsets all
    slices of one shape share a kernel. The barrier hides them, because it keeps XLA from folding
    constants.
    """
    ends = np.cumsum(sizes, dtype=np.int32)
    starts = [np.array([end - size, 0]) for end, size in zip(ends, sizes, strict=True)]
    starts = lax.optimization_barrier([jnp.asarray(start, jnp.int32) for start in starts])
    return [
        lax.dynamic_slice_in_dim(x, start[0], size, axis=-1)
        for start, size in zip(starts, sizes, strict=True)
    ]


def _derivative(sizes, primals, tangents):
    """Differentiate by `lax.split`, whose transpose is one concatenation.

    The transpose of a slice is an array of zeros as long as the whole, for each leaf: without this
    the gradient of a thousand leaves would write a thousand packed arrays and add them up.
    """
    (x,), (tangent,) = primals, tangents
    return _read(x, sizes), lax.split(tangent, sizes, axis=x.ndim - 1)


_differentiable = jax.custom_jvp(_read, nondiff_argnums=(1,))
_differentiable.defjvp(_derivative)
