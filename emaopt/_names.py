"""Names: of parameters, of TF1's variables in a state, and of leaves by pattern.

A state of emaopt is exactly TF1's variables, so its *name tree* has one TF1 name at every leaf:
`conv/kernel/Adam_1`, `beta1_power`, `conv/kernel/ExponentialMovingAverage`, `global_step`.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax

from emaopt._average.ema import EmaState, SwappedEmaState
from emaopt._optimizers.builder import OptimizerState
from emaopt._optimizers.rules import KINDS
from emaopt._tree.checks import check_unique, did_you_mean
from emaopt._tree.numbers import is_inexact
from emaopt._tree.packing import check_unpacked
from emaopt._tree.paths import Tree, is_none, leaf_names


AVERAGE = "ExponentialMovingAverage"
STEP = "global_step"
_OF_A_VARIABLE = re.compile(
    rf"(.*)/({'|'.join([kind for slots, kind in KINDS.items() if slots])}|{AVERAGE})(_\d+)?",
    re.DOTALL,
)


def names(tree: Tree) -> Tree:
    """The tree with its name at every leaf: key path, joined with a slash.

    In an emaopt state, TF1's variable names: `w/Adam`, `w/Adam_1`, `beta1_power`, `global_step`
    (the steps of all states are TF1's one global step), `w/ExponentialMovingAverage`. As in TF1, a
    second variable of one name gets `_1`.

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
    """What TF1 does not have stands below the variable, or, of the whole average, by itself."""
    shadow = jax.tree.map(lambda name: unique(average_name(name)), _plain(state.shadow))
    below = lambda name: unique(f"{average_name(name)}/residue")
    residue = jax.tree.map(below, _plain(state.residue))
    ledger = jax.tree.map(lambda name: unique(f"ledger/{name}"), _plain(state.ledger))
    own = {"step": _all(state.step, STEP), "shadow": shadow, "residue": residue, "ledger": ledger}
    return type(state)(**{field: own.get(field, field) for field in state._fields})


def _optimizer_names(state: OptimizerState, unique: Callable[[str], str]) -> OptimizerState:
    declared = next(s for s in KINDS if set(s) == set(state.slots))
    kind = KINDS[declared]
    powers = {name: _all(state.powers[name], unique(name)) for name in sorted(state.powers)}
    slots = {
        slot: jax.tree.map(lambda name: unique(f"{name}/{kind}"), _plain(state.slots[slot]))
        for slot in declared
    }
    ordered = {slot: slots[slot] for slot in state.slots}
    return OptimizerState(_all(state.step, STEP), powers, ordered)


def _all(tree: Any, name: str) -> Any:
    return jax.tree.map(lambda _: name, tree)


def _plain(tree: Tree) -> Tree:
    """The names by key path, absent leaves absent; two of the same name are an error."""
    check_unpacked(
        "tree", tree, "Its leaves have names in emaopt.unpack(tree); for a mask, emaopt.unpacked."
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
    """The name under which TF1 keeps the average of a variable.

    >>> average_name("conv/kernel")
    'conv/kernel/ExponentialMovingAverage'
    """
    return f"{name}/{AVERAGE}"


def origin(name: str) -> tuple[str, str, str]:
    """The inverse of `names`: the variable that a slot or an average belongs to, kind and number.

    A name that is none of these belongs to itself.

    >>> origin("conv/kernel/Adam_1"), origin("conv/kernel")
    (('conv/kernel', 'Adam', '_1'), ('conv/kernel', '', ''))
    """
    found = _OF_A_VARIABLE.fullmatch(name)
    return (found[1], found[2], found[3] or "") if found else (name, "", "")


def role(name: str, known: Collection[str]) -> tuple[str, str]:
    """What TF1 keeps under a name, beside the other names; and the path that it has in emaopt.

    A slot, an average, a power or a step may be in a scope: `train/w/Adam` is a slot of `w`.

    >>> role("w/Adam_1", ["w", "w/Adam", "w/Adam_1"])
    ('slot v of w', 'opt_state: slots/v/w')
    """
    if name.split("/")[-1] == STEP:
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
    """The known variable that a name ends with, the longest one.

    >>> variable_of("train/conv/kernel", ["conv/kernel", "kernel"])
    'conv/kernel'
    """
    keys = name.split("/")
    ends = ("/".join(keys[i:]) for i in range(len(keys)))
    return next((end for end in ends if end in known), None)


def matching(pattern: str) -> Callable[[Tree], Tree]:
    """A mask function: true where the regular expression is found in the leaf's name.

    For `optax.masked` and for `var_list`.

    >>> matching("kernel$")({"conv": {"kernel": 1.0, "bias": 2.0}})
    {'conv': {'bias': False, 'kernel': True}}
    """
    try:
        found = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"pattern={pattern!r} is not a regular expression: {error}. Pass one, as for re.search."
        ) from None
    return lambda tree: jax.tree.map(lambda name: bool(found.search(name)), _plain(tree))


def slot_names(opt_state: Tree) -> list[str]:
    """The names of all slots in the state, sorted. TF1's `get_slot_names`.

    >>> import emaopt, jax.numpy as jnp
    >>> slot_names(emaopt.rmsprop(0.1).init(jnp.zeros(2)))
    ['momentum', 'rms']
    """
    return sorted({name for state in _states(opt_state, OptimizerState) for name in state.slots})


def slot(opt_state: Tree, name: str) -> Tree:
    """One slot of all parameters: a tree like the parameters. TF1's `get_slot`.

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
    """The number of updates so far, int32 []. TF1's `get_global_step`.

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
    """What to read for evaluation: name in the checkpoint -> name of the variable it goes into.

    A variable in `moving_average_variables` (names; by default every floating-point leaf of
    `params`) is read from its average, every other one from itself. As in TF1, the averages are
    expected whether the state has them or not. TF1's method of that name.

    >>> variables_to_restore({"w": 1.0, "steps": 7})
    {'w/ExponentialMovingAverage': 'w', 'steps': 'steps'}
    """
    leaves = jax.tree.leaves(params)
    own = jax.tree.leaves(_plain(params))
    stored = jax.tree.leaves(names(opt_state))
    if not _states(opt_state, OptimizerState) and any(not is_inexact(leaf) for leaf in leaves):
        stored = [name for name in stored if name != STEP]  # the average counts that leaf's steps
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
                f"moving_average_variables holds {name!r}, which is no variable."
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
