"""Count how often a jitted function is compiled.

`_cache_size()` of a jitted function does not tell: JAX empties that cache when many functions of a
process have been compiled. JAX reports each compilation with the name of the function.
"""

import functools
import uuid
from collections import Counter

import jax


_compiled: Counter[str] = Counter()


def _note(event, seconds, fun_name="", **_):
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled[fun_name] += 1


jax.monitoring.register_event_duration_secs_listener(_note)


def jit(f, **options):
    """Return the jitted function under a name of its own, by which it is counted."""

    @functools.wraps(f)
    def named(*args, **kwargs):
        return f(*args, **kwargs)

    named.__name__ = f"f_{uuid.uuid4().hex}"
    return jax.jit(named, **options)


def compilations(jitted):
    """Return how often a function of `jit` has been compiled.

    >>> double = jit(lambda x: 2 * x)
    >>> [float(double(x)) for x in (1.0, 2.0)], compilations(double)
    ([2.0, 4.0], 1)
    """
    return _compiled[f"jit({jitted.__name__})"]
