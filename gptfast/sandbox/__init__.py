"""Programs that a model wrote, run without trusting them.

runner  one or many at a time; what this protects and what not
child   the process that shuts itself in and runs one
filter  the system calls that it may make
"""

from gptfast.sandbox.runner import SandboxResult, isolation, run_many, run_program

__all__ = ["SandboxResult", "isolation", "run_many", "run_program"]
