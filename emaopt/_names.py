"""Name parameters and TF1's variables in a state, and make masks by name.

An emaopt state is exactly TF1's variables. So its *name tree* has one TF1 name at every leaf:
`conv/kernel/Adam_1`, `beta1_power`, `conv/kernel/ExponentialMovingAverage`, `global_step`.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import optax

from emaopt._average.ema import EmaState, SwappedEmaState
from emaopt._average.lazy import Rested
from emaopt._optimizers.builder import OptimizerState
from emaopt._optimizers.rules import KINDS
from emaopt._tree.checks import check_unique, did_you_mean
from emaopt._tree.leaves import by_path
from emaopt._tree.numbers import is_inexact
from emaopt._tree.packing import check_unpacked
from emaopt._tree.paths import Tree, few, is_none, leaf_names


AVERAGE = "ExponentialMovingAverage"
GLOBAL_STEP = "global_step"
_OF_A_VARIABLE = re.compile(
    rf"(.*)/({'|'.join([kind for slots, kind in KINDS.items() if slots])}|{AVERAGE})(_\d+)?",
    re.DOTALL,
)


def names(tree: Tree) -> Tree:
    """Return the tree with the name of each leaf in its place: its key path, joined with a slash.

    Wrappers of one array are no part of a name: Linen's `Partitioned`, NNX's `Variable`, haliax's
    `NamedArray`. The tree of names keeps these wrappers.

    In an emaopt state the names are those of TF1's variables: `w/Adam`, `w/Adam_1`, `beta1_power`,
    `w/ExponentialMovingAverage`. The steps of all states have one name, as TF1 has one
    `global_step`. As in TF1, a second variable of one name gets `_1`.

    Raises:
        ValueError: two leaves have the same name, or the tree is packed.

    >>> names({"conv": {"kernel": 1.0, "bias": 2.0}})
    {'conv': {'bias': 'conv/bias', 'kernel': 'conv/kernel'}}
    >>> import emaopt, jax.numpy as jnp
    >>> names(emaopt.adam().init({"w": jnp.zeros(2)})).slots
    {'m': {'w': 'w/Adam'}, 'v': {'w': 'w/Adam_1'}}
    """
    taken: Counter[str] = Counter()

    def unique(name: str) -> str:
        taken[name] += 1
        return name if taken[name] == 1 else f"{name}_{taken[name] - 1}"

    nodes, treedef = jax.tree.flatten(tree, is_leaf=lambda x: x is None or _is_state(x))
    others = _plain(treedef.unflatten([None if _is_state(node) else node for node in nodes]))
    named = []
    for node, path in zip(nodes, jax.tree.leaves(others, is_leaf=is_none), strict=True):
        if isinstance(node, (EmaState, SwappedEmaState)):
            named.append(_average_names(node, unique))
        elif isinstance(node, OptimizerState):
            named.append(_optimizer_names(node, unique))
        else:
            named.append(path)
    return treedef.unflatten(named)


def _average_names(state: Any, unique: Callable[[str], str]) -> Any:
    """Return the names of an average's leaves.

    TF1 has no residue and no ledger. A residue is named below its average, a ledger by itself.
    """
    shadow = jax.tree.map(lambda name: unique(average_name(name)), _plain(state.shadow))
    below = lambda name: unique(f"{average_name(name)}/residue")
    residue = jax.tree.map(below, _plain(state.residue))
    ledger = jax.tree.map(lambda name: unique(f"ledger/{name}"), _plain(state.ledger))
    own = {
        "step": _all(state.step, GLOBAL_STEP),
        "shadow": shadow,
        "residue": residue,
        "ledger": ledger,
        "rows": _rested_names(state.rows, unique),
    }
    return type(state)(**{field: own.get(field, field) for field in state._fields})


def _rested_names(rested: Rested | None, unique: Callable[[str], str]) -> Rested | None:
    if rested is None:
        return None
    then = jax.tree.map(lambda name: unique(f"{average_name(name)}/then"), _plain(rested.then))
    return Rested(_all(rested.now, unique("rows/now")), then)


def _optimizer_names(state: OptimizerState, unique: Callable[[str], str]) -> OptimizerState:
    declared = next(s for s in KINDS if set(s) == set(state.slots))
    kind = KINDS[declared]
    powers = {name: _all(state.powers[name], unique(name)) for name in sorted(state.powers)}
    slots = {
        slot: jax.tree.map(lambda name: unique(f"{name}/{kind}"), _plain(state.slots[slot]))
        for slot in declared
    }
    ordered = {slot: slots[slot] for slot in state.slots}
    return OptimizerState(_all(state.step, GLOBAL_STEP), powers, ordered)


def _all(tree: Any, name: str) -> Any:
    return jax.tree.map(lambda _: name, tree)


def _plain(tree: Tree) -> Tree:
    """Return the names by key path. Absent leaves stay absent; two equal names are an error."""
    check_unpacked(
        "tree", tree, "Its leaves have names in emaopt.unpack(tree); for a mask, emaopt.on_leaves."
    )
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_none)
    found = leaf_names(tree)
    check_unique(found, leaves)
    return treedef.unflatten(
        [None if x is None else name for name, x in zip(found, leaves, strict=True)]
    )


def _is_state(node: Any) -> bool:
    return isinstance(node, (EmaState, SwappedEmaState, OptimizerState))


def average_name(name: str) -> str:
    """Return the name under which TF1 keeps the average of a variable.

    >>> average_name("conv/kernel")
    'conv/kernel/ExponentialMovingAverage'
    """
    return f"{name}/{AVERAGE}"


def origin(name: str) -> tuple[str, str, str]:
    """Return the variable that a slot or an average belongs to, its kind and its number.

    It is the inverse of `names`. Any other name belongs to itself.

    >>> origin("conv/kernel/Adam_1"), origin("conv/kernel")
    (('conv/kernel', 'Adam', '_1'), ('conv/kernel', '', ''))
    """
    found = _OF_A_VARIABLE.fullmatch(name)
    return (found[1], found[2], found[3] or "") if found else (name, "", "")


def role(name: str, known: Collection[str]) -> tuple[str, str]:
    """Return what a TF1 variable is, and where it goes in emaopt.

    A slot, an average, a power or a step may be in a scope: `train/w/Adam` is a slot of `w`.

    Args:
        name: the name of the variable.
        known: all names in the checkpoint. They tell whose slot it is.

    >>> role("w/Adam_1", ["w", "w/Adam", "w/Adam_1"])
    ('slot v of w', 'opt_state: slots/v/w')
    """
    if name.split("/")[-1] == GLOBAL_STEP:
        return "global step", f"opt_state: {OptimizerState._fields[0]}"
    if power := re.fullmatch(r"(?:.*/)?(beta[12]_power(_\d+)?)", name):
        return "power", f"opt_state: {OptimizerState._fields[1]}/{power[1]}"
    of, kind, number = origin(name)
    variable = variable_of(of, known)
    if kind == AVERAGE:
        of = variable or of
        return f"average of {of}", f"opt_state: {EmaState._fields[1]}/{of}"
    if not kind or variable is None:
        return "variable", f"params: {name}"
    declared = [slots for slots, other in KINDS.items() if other == kind]
    last = {slots: f"{of}/{kind}_{len(slots) - 1}" for slots in declared}  # RMSProp has 2 or 3
    slots = next((s for s in reversed(declared) if last[s] in known), declared[0])
    slot = slots[int(number[1:] or 0) % len(slots)]
    return f"slot {slot} of {variable}", f"opt_state: {OptimizerState._fields[2]}/{slot}/{variable}"


def variable_of(name: str, known: Collection[str]) -> str | None:
    """Return the longest known variable that a name ends with, or `None`.

    >>> variable_of("train/conv/kernel", ["conv/kernel", "kernel"])
    'conv/kernel'
    """
    keys = name.split("/")
    ends = ("/".join(keys[i:]) for i in range(len(keys)))
    return next((end for end in ends if end in known), None)


def matching(pattern: str) -> Callable[[Tree], Tree]:
    """Return a mask function: true where the regular expression is found in the leaf's name.

    Use it with `optax.masked` (weight decay, averages, frozen parameters), for `var_list` and for
    `rows`. The names are those of `names`, and the mask has the wrappers of the tree (Linen's
    `Partitioned`).

    Args:
        pattern: a regular expression, as for `re.search`: `"kernel$"`, `"^encoder/"`.

    Returns:
        A function from a tree to a tree of booleans. It raises a `ValueError` if no name of the
        tree matches the pattern, because a mask that is true nowhere decays, averages or trains
        nothing. It also looks at leaves that are absent or masked out already.

    Example:
        >>> matching("kernel$")({"conv": {"kernel": 1.0, "bias": 2.0}})
        {'conv': {'bias': False, 'kernel': True}}
    """
    try:
        found = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"pattern={pattern!r} is not a regular expression: {error}. Pass one, as for re.search."
        ) from None

    def mask(tree: Tree) -> Tree:
        named = _plain(tree)
        there = jax.tree.leaves(named)
        if there and not any(map(found.search, [*there, *_left_out(tree)])):
            raise ValueError(
                f"pattern={pattern!r} is found in no name of the tree, so the mask would be true "
                f"nowhere. Pass a pattern of names that are there: {few(map(repr, there))}."
            )
        return jax.tree.map(lambda name: found.search(name) is not None, named)

    return mask


def _left_out(tree: Tree) -> list[str]:
    """Return the names of the leaves that are absent or masked out."""
    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    absent = jax.tree.map(lambda x: None if is_masked(x) else x, tree, is_leaf=is_masked)
    return ["/".join(path) for path, x in by_path(absent).items() if x is None]


def slot_names(opt_state: Tree) -> list[str]:
    """Return the names of all slots in the state, sorted. TF1's `get_slot_names`.

    >>> import emaopt, jax.numpy as jnp
    >>> slot_names(emaopt.rmsprop(0.1).init(jnp.zeros(2)))
    ['momentum', 'rms']
    """
    return sorted({name for state in _states(opt_state, OptimizerState) for name in state.slots})


def slot(opt_state: Tree, name: str) -> Tree:
    """Return one slot of all parameters, a tree like the parameters. TF1's `get_slot`.

    The arrays are those of the state itself: a later step that donates the state deletes them.

    >>> import emaopt, jax.numpy as jnp
    >>> slot(emaopt.adagrad(0.1).init({"w": jnp.zeros(1)}), "accumulator")
    {'w': Array([0.1], dtype=float32)}
    """
    known = slot_names(opt_state)
    holders = [s.slots[name] for s in _states(opt_state, OptimizerState) if name in s.slots]
    if not holders:
        raise ValueError(
            f"name={name!r} is not a slot.{did_you_mean(name, known)} Pass one of: {known}."
        )
    if len(holders) > 1:
        raise ValueError(
            f"name={name!r} is a slot of {len(holders)} optimizers in this state. Pass the state "
            "of one of them."
        )
    return holders[0]


def global_step(opt_state: Tree) -> jax.Array:
    """Return the number of updates so far, int32 []. TF1's `get_global_step`.

    >>> import emaopt, jax.numpy as jnp
    >>> global_step(emaopt.adagrad(0.1).init(jnp.zeros(1)))
    Array(0, dtype=int32)
    """
    states = _states(opt_state, OptimizerState) or _states(opt_state, (EmaState, SwappedEmaState))
    if not states:
        raise ValueError(
            "opt_state has no step: it holds neither an optimizer nor an average of emaopt. Pass "
            "the state of a chain with one."
        )
    return jax.tree.leaves(states[0].step)[0]


def variables_to_restore(
    params: Tree, opt_state: Tree = None, moving_average_variables: Iterable[str] | None = None
) -> dict[str, str]:
    """Return which names of a TF1 checkpoint to read for evaluation, each with its variable.

    An averaged variable is read from its average, every other one from itself. As in TF1, the
    averages are expected whether the state has them or not. This is TF1's method of that name.

    Args:
        params: the parameters.
        opt_state: the state, whose slots and steps are read as well.
        moving_average_variables: the names of the averaged variables; by default every
            floating-point leaf of `params`.

    Returns:
        A dict from names in the checkpoint to names of variables.

    Raises:
        ValueError: `moving_average_variables` is one string, or holds an unknown name.

    Example:
        >>> variables_to_restore({"w": 1.0, "steps": 7})
        {'w/ExponentialMovingAverage': 'w', 'steps': 'steps'}
    """
    leaves = jax.tree.leaves(params)
    own = jax.tree.leaves(_plain(params))
    stored = jax.tree.leaves(names(opt_state))
    if not _states(opt_state, OptimizerState) and any(not is_inexact(leaf) for leaf in leaves):
        # an integer leaf may be the step itself, so the step of the average is left out
        stored = [name for name in stored if name != GLOBAL_STEP]
    everything = own + stored
    if moving_average_variables is None:
        averaged = [name for name, leaf in zip(own, leaves, strict=True) if is_inexact(leaf)]
    else:
        if isinstance(moving_average_variables, str):
            raise ValueError(
                f"moving_average_variables={moving_average_variables!r} is one string. "
                "Pass a list of names."
            )
        averaged = list(moving_average_variables)
    for name in averaged:
        if name not in everything:
            raise ValueError(
                f"moving_average_variables holds {name!r}, which is not a variable."
                f"{did_you_mean(name, everything)} Pass names of leaves."
            )
    restored = {average_name(name): name for name in averaged}
    for name in everything:
        if name not in averaged:
            restored.setdefault(name, name)
    return restored


def _states(opt_state: Tree, kind: type | tuple[type, ...]) -> list:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [node for node in nodes if isinstance(node, kind)]
