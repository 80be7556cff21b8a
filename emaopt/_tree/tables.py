"""Find the leaves of a state that belong to a table: the table, its slots and its averages."""

from collections.abc import Collection

import jax

from .checks import did_you_mean
from .paths import Tree, is_none, leaf_names


def owners_of(tree: Tree, names: list[str], tables: Collection[str]) -> list[str | None]:
    """Return the parameter that each leaf belongs to: itself, or one of its slots or averages.

    In the state, a name ends with the name of the parameter: `0/slots/m/embed/kernel`. With
    `kernel` a parameter as well, the longest name that fits is the right one.
    """
    if set(tables) <= set(names):  # parameters alone
        return [name if name in tables else None for name in names]
    is_pair = isinstance(tree, (tuple, list)) and len(tree) == 2
    of_params = leaf_names(tree[0]) if is_pair else names
    if set(tables) <= set(of_params):
        return [_longest_end(name, set(of_params)) for name in names]
    owners = _outermost(names, [_longest_end(name, set(tables)) for name in names])
    for name in tables:
        if name not in owners:
            raise ValueError(
                f"tables has {name!r}, with which no leaf of tree ends."
                f"{did_you_mean(name, of_params)} It has "
                f"{', '.join(map(repr, of_params[:8]))}. Pass names as in emaopt.names(params)."
            )
        _check_is_one(
            name, [each for each, at in zip(names, owners, strict=True) if at == name], tree
        )
    return owners


def _check_is_one(table: str, names: list[str], tree: Tree) -> None:
    """Raise if two parameters end with the name of a table. Its slots in a state do not count."""
    keys = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)[0]]
    in_fields = {
        name
        for name, path in zip(leaf_names(tree), keys, strict=True)
        if any(isinstance(key, jax.tree_util.GetAttrKey) and key.name != "value" for key in path)
    }
    params = [name for name in names if name not in in_fields]
    if len(params) > 1:
        raise ValueError(
            f"tables has {table!r}, and tree has several tables with this name: "
            f"{', '.join(map(repr, params))}. Pass the whole name, as in emaopt.names(params)."
        )


def _longest_end(name: str, known: set[str]) -> str | None:
    """Return the longest end of a name, from a slash on, that is known."""
    keys = name.split("/")
    ends = ("/".join(keys[i:]) for i in range(len(keys)))
    return next((end for end in ends if end in known), None)


def _outermost(names: list[str], owners: list[str | None]) -> list[str | None]:
    """Return the owners without leaves like `m/other/table`, where `m/table` is there as well.

    This is for a state alone, where the names of the other parameters are not known.
    """
    starts = [
        (owner, name.removesuffix(owner))
        for name, owner in zip(names, owners, strict=True)
        if owner
    ]
    inside = {
        (owner, start)
        for owner, start in starts
        if any(o == owner and s != start and start.startswith(s) for o, s in starts)
    }
    return [
        None if owner and (owner, name.removesuffix(owner)) in inside else owner
        for name, owner in zip(names, owners, strict=True)
    ]


def check_can_be_taken(table: str, name: str, names: list[str]) -> None:
    """Raise if a leaf changes in all rows at every step, because a view updates only some rows."""
    above = name.removesuffix(table).split("/")
    if "acc_grads" in above:
        raise ValueError(
            f"tree holds gradients that optax.MultiSteps adds up, at {name!r}. The views of its "
            "micro-batches have different rows, and only those of the last would be updated. Pass "
            "the ids of all micro-batches to one emaopt.rows, add up their gradients in this one "
            "view, and update once without MultiSteps."
        )
    if above[-2:-1] == ["shadow"]:
        lazy = "/".join([*above[:-2], "rows", "then", table])
        if lazy not in names:
            raise ValueError(
                f"tree has an average of {table!r} that moves every row at every step, at "
                f"{name!r}. Make it with ema(decay, rows=emaopt.matching(...)), which averages "
                "these tables lazily."
            )
