"""One step's kernels into named rows, beside what the hardware could do.

job        what a step trained
trace      a profile as events, each with the operators that launched it
kinds      which row an event belongs to
costs      FLOPs, bytes, measured ceilings, floors
book       the ledger: rows that add up to the step
kept       the ledger as JSON, written and read
text       table, waterfall, comparison
profiler   StepProfiler, which takes the profile within a run
"""

from gptfast.ledger.book import Ledger, build
from gptfast.ledger.costs import Ceilings, measure_ceilings
from gptfast.ledger.job import Job
from gptfast.ledger.kept import read_json, to_json
from gptfast.ledger.profiler import LEDGER_FILE, StepProfiler, parse_steps, write
from gptfast.ledger.text import compare, draw, table

__all__ = [
    "LEDGER_FILE",
    "Ceilings",
    "Job",
    "Ledger",
    "StepProfiler",
    "build",
    "compare",
    "draw",
    "measure_ceilings",
    "parse_steps",
    "read_json",
    "table",
    "to_json",
    "write",
]
