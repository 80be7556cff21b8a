"""Merge checkpoints: a sum of the parameters or the averages of a run, written block by block.

A model that was trained at a constant learning rate gets most of what bringing the rate down would
give, if its last checkpoints are averaged. And from recorded averages follows one of any other
length. `emaopt.posthoc` has the mathematics; here it is done on disk, without ever holding a model
in memory::

    run = Run.open("/run")
    plan = run.plan(posthoc.anneal(lambda x: 1 - np.sqrt(x), at=run.at, on=run.steps[-8:]))
    plan.write("/merged")
    soup(["/run/1", "/run/2"]).write("/soup")

On the command line: `emaopt merge`.
"""

from ._plan import Plan as Plan
from ._run import Run as Run, Snapshot as Snapshot, soup as soup
