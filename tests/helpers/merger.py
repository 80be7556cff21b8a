"""Merge a run in several processes: `python merger.py OUT RUN`, see `processes.together`."""

import os
import sys


os.environ["JAX_PLATFORMS"] = "cpu"

from processes import join

from emaopt.merge import soup


if __name__ == "__main__":
    runs = sys.argv.pop(2).split(":")
    args = join(60)
    seen = []
    try:
        soup(runs).write(args.out, seen.append)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    else:
        print(sum(seen))
