"""Modules that cannot be imported without their extra have no examples to run."""

from importlib.util import find_spec


NEEDS = {
    "tensorflow": ["emaopt/tf1", "emaopt/_commands/convert"],
    "tensorboardX": ["tests/helpers/eventfile.py"],
}
collect_ignore = [path for module in NEEDS if not find_spec(module) for path in NEEDS[module]]
