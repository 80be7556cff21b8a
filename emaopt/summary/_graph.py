"""Draw a function as TensorBoard's graph: one node for each equation of its jaxpr."""

import importlib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from emaopt._tree.paths import Tree, key_paths


def graph_of(function: Callable[..., Any], *args: Any) -> Any:
    """Build the GraphDef of `function(*args)`: its arguments, equations and results."""
    jaxpr, results = jax.make_jaxpr(function, return_shape=True)(*args)
    named = inspect.signature(function).bind(*args).arguments
    names = [f"arguments/{name}" for tree in named.items() for name in _leaves(*tree)]
    graph = _Graph()
    sources = [
        graph.add(name, "argument", [], [var.aval])
        for name, var in zip(names, jaxpr.jaxpr.invars, strict=True)
    ]
    outputs = graph.equations(_unwrapped(jaxpr.jaxpr), sources, "")
    named = zip(_leaves("results", results), outputs, jaxpr.jaxpr.outvars, strict=True)
    for name, source, var in named:
        graph.add(name, "result", [source], [var.aval])
    return graph.proto


def _leaves(name: str, tree: Tree) -> Iterator[str]:
    """Name every leaf of an argument or result."""
    return ("/".join((name, *path)) for path in key_paths(tree))


def _unwrapped(jaxpr: Jaxpr) -> Jaxpr:
    """Return the body of a function that is jitted as a whole; otherwise the jaxpr itself."""
    only = jaxpr.eqns[0] if len(jaxpr.eqns) == 1 else None
    if only is None or list(only.invars) != list(jaxpr.invars):
        return jaxpr
    return (list(only.outvars) == list(jaxpr.outvars) and _body(only)) or jaxpr


class _Graph:
    """Add nodes to a GraphDef, each under a unique name."""

    def __init__(self):
        self.proto = importlib.import_module("tensorboardX.proto.graph_pb2").GraphDef()
        self.taken: Counter[str] = Counter()

    def unique(self, name: str) -> str:
        """Make a name unique: a second node of the same name gets `_1`, as in TF1."""
        parts = (re.sub(r"[^\w.-]+", ".", part).strip("._") for part in name.split("/"))
        name = "/".join(filter(None, parts))
        self.taken[name] += 1
        return name if self.taken[name] == 1 else f"{name}_{self.taken[name] - 1}"

    def add(self, name: str, op: str, sources: Sequence[str | None], avals: list[Any]) -> str:
        """Add a node. A source of `None` is a constant, which is no edge. Returns the name."""
        node = self.proto.node.add(name=self.unique(name), op=op)
        node.input.extend(dict.fromkeys(source for source in sources if source))
        shapes = node.attr["_output_shapes"].list
        for aval in avals:
            shape = shapes.shape.add()
            for size in getattr(aval, "shape", ()):
                shape.dim.add(size=size)
        node.attr["dtype"].s = ", ".join(str(getattr(a, "dtype", a)) for a in avals).encode()
        return node.name

    def equations(
        self, jaxpr: Jaxpr, sources: Sequence[str | None], scope: str
    ) -> list[str | None]:
        """Add a node for each equation of a jaxpr.

        `sources` names the nodes that its arguments come from. Returns the names of the nodes that
        its results come from.
        """
        where: dict[Any, str | None] = dict(zip(jaxpr.invars, sources, strict=True))
        for var in jaxpr.constvars:
            where[var] = self.add(f"{scope}/constant", "constant", [], [var.aval])

        def source(x: Any) -> str | None:
            return None if isinstance(x, Literal) else where[x]

        for equation in jaxpr.eqns:
            inputs = [source(x) for x in equation.invars]
            at = f"{scope}/{equation.source_info.name_stack}"
            avals = [var.aval for var in equation.outvars]
            op = equation.primitive.name
            if body := _body(equation):
                inner = self.unique(f"{at}/{equation.params.get('name', op)}")
                outputs = self.equations(body, inputs, inner)
            else:
                node = self.add(f"{at}/{op}", op, inputs, avals)
                outputs = [f"{node}:{i}" if i else node for i in range(len(avals))]
            where |= zip(equation.outvars, outputs, strict=True)
        return [source(x) for x in jaxpr.outvars]


def _body(equation: Any) -> Jaxpr | None:
    """Find the jaxpr that an equation calls with its own arguments; `None` for cond and while."""
    bodies = [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in equation.params.values()]
    bodies = [x for x in bodies if isinstance(x, Jaxpr)]
    if len(bodies) != 1 or len(bodies[0].invars) != len(equation.invars):
        return None
    return bodies[0] if len(bodies[0].outvars) == len(equation.outvars) else None
