"""One command from nothing to a report: which steps, what they will take, and running them.

settings    what train/speedrun.py can be told
plan        the steps: commands, results, what depends on what
fetching    what is fetched for them, before all others
estimate    time, tokens, disk, memory and money of a plan on this machine
disk        what has yet to be written, and the room for it
state       what has been done, in a file that survives a SIGKILL
runner      runs what is not done yet
nodes       the same command on several nodes
"""

from gptfast.speedrun.decide import check_folders
from gptfast.speedrun.disk import disk_needs
from gptfast.speedrun.estimate import Here, describe_plan
from gptfast.speedrun.fetching import with_fetching
from gptfast.speedrun.nodes import Followers, follow
from gptfast.speedrun.plan import Plan, launch_command, make_plan
from gptfast.speedrun.runner import StepFailedError, StoppedError, run_plan
from gptfast.speedrun.settings import SpeedrunSettings
from gptfast.speedrun.state import State

__all__ = [
    "Followers",
    "Here",
    "Plan",
    "SpeedrunSettings",
    "State",
    "StepFailedError",
    "StoppedError",
    "check_folders",
    "describe_plan",
    "disk_needs",
    "follow",
    "launch_command",
    "make_plan",
    "run_plan",
    "with_fetching",
]
