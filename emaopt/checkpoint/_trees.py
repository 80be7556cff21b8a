"""Convert trees to what lies on disk: key paths, and `nnx.state` of an NNX module."""

import copy
from typing import Any

import jax

from emaopt._tree.leaves import by_path
from emaopt._tree.paths import KeyPath, Tree, key_name, key_paths, logical


def leaves_by_path(tree: Tree) -> dict[KeyPath, Any]:
    """Return the leaves by their key path on disk, in flattening order."""
    return dict(zip(key_paths(tree), jax.tree.leaves(tree), strict=True))


def merged(a: Tree, b: Tree) -> Tree:
    """Return the union of two trees of dicts and lists: `b`, where `a` has nothing."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {key: merged(a.get(key), b.get(key)) for key in a | b}
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [merged(x, y) for x, y in zip(a, b, strict=True)]
    return b if a is None else a


def named_leaves(tree: Tree) -> dict[KeyPath, Any]:
    """Return the leaves by name: the key path without what wraps an array."""
    return {logical(path): leaf for path, leaf in by_path(tree).items() if leaf is not None}


def plain(tree: Tree) -> Tree:
    """Return a tree with dicts in place of NNX modules, and of the lists and dicts in them.

    Orbax saves a module whose list has an entry without arrays, as `nnx.Sequential` with a function
    has, but cannot read it again: the positions have a gap. The dicts are those of `nnx.state`.
    """
    if not any(map(_is_module, jax.tree.leaves(tree, is_leaf=_is_module))):
        return tree
    children, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if treedef == jax.tree.structure(0):
        return tree
    if not _is_module(tree):
        return treedef.unflatten([plain(child) for _, child in children])
    there = {key_name(keys[0]): child for keys, child in children if jax.tree.leaves(child)}
    return {name: plain(child) for name, child in there.items()}


def without_model(params: Tree, opt_state: Tree) -> Tree:
    """Return the state without the model, which an `nnx.ModelAndOptimizer` holds as well.

    Args:
        params: the model; `None` if it is not asked for.
        opt_state: the state.

    Raises:
        ValueError: it holds another model than the one that was passed.
    """
    if not _holds_model(opt_state):
        return opt_state
    if params is not None and opt_state.model is not params:
        raise ValueError(
            "opt_state is an nnx.ModelAndOptimizer, and params is not its model. Pass "
            "optimizer.model as params, or optimizer.opt_state as opt_state."
        )
    return {"opt_state": opt_state.opt_state, "step": opt_state.step}


def with_model(params: Tree, loaded: Tree, opt_state: Tree) -> Tree:
    """Return the state that was loaded, as an `nnx.ModelAndOptimizer` of these parameters."""
    if not _holds_model(opt_state):
        return loaded
    optimizer = copy.copy(opt_state)
    optimizer.model = params
    optimizer.opt_state, optimizer.step = loaded["opt_state"], loaded["step"]
    return optimizer


def _holds_model(opt_state: Tree) -> bool:
    return any(base.__name__ == "ModelAndOptimizer" for base in type(opt_state).__mro__)


def _is_module(node: Any) -> bool:
    """Return whether a node is an NNX module, list or dict, not a Variable."""
    names = {base.__name__ for base in type(node).__mro__ if base.__module__.startswith("flax.nnx")}
    return "Pytree" in names and "Variable" not in names
