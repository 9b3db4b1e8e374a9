"""`train/speedrun.py --check`: does everything that a run needs work here?

checks   what is tried, a line each
kernels  every kernel against its reference
links    how fast GPUs reach each other
"""

from gptfast.selfcheck.checks import FAILED, OK, SKIPPED, run_checks

__all__ = [
    "FAILED",
    "OK",
    "SKIPPED",
    "run_checks",
]
