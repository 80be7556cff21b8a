"""Modules that cannot be imported without their extra have no examples to run."""

from importlib.util import find_spec


collect_ignore = [] if find_spec("tensorflow") else ["emaopt/tf1", "emaopt/convert"]
