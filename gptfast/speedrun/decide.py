"""What is to be done about a step: skip it, continue it, or make it anew."""

import json
from collections.abc import Sequence
from pathlib import Path

from gptfast.checkpoint.files import MANIFEST
from gptfast.errors import UserError
from gptfast.speedrun.plan import Step
from gptfast.speedrun.state import DONE, State

SKIP, CONTINUE, ANEW = "skip", "continue", "anew"


def decide(step: Step, state: State) -> str:
    """As its record and its folder say."""
    record = state.records.get(step.name)
    if record is None or record.fingerprint != state.fingerprint(step):
        return ANEW
    if record.state == DONE and is_whole(step) and not step.always:
        return SKIP
    return CONTINUE if step.resumable and _has_checkpoint(step) else ANEW


def decide_all(steps: Sequence[Step], state: State) -> dict[str, str]:
    """For each step by its name, if those before it are done as decided."""
    todo: dict[str, str] = {}
    for step in steps:
        remade = any(todo.get(name) == ANEW for name in step.after)
        todo[step.name] = ANEW if remade else decide(step, state)
    return todo


def check_folders(steps: Sequence[Step], state: State) -> None:
    """UserError if a step would overwrite what it did not begin itself, or what was finished: that
    is for the user to remove. What a step began and did not bring to a checkpoint is not asked
    for."""
    todo = decide_all(steps, state)
    for step in steps:
        if todo[step.name] != ANEW:
            continue
        remade = {name for name in step.after if todo.get(name) == ANEW}
        reason = _why_not(step, state, remade)
        if reason and step.owns and _holds_anything(step.owns):
            raise UserError(
                f"{step.owns} {reason}: name another --out, or remove {step.owns} and whatever was "
                "made from it"
            )


def _why_not(step: Step, state: State, remade: set[str]) -> str:
    """Why the step's folder must not be written anew; "" if nothing speaks against it."""
    record = state.records.get(step.name)
    if record is None:
        return "holds something that this speedrun did not make"
    if record.state != DONE and not _has_checkpoint(step):
        return ""
    if record.fingerprint != state.fingerprint(step):
        return f"was made {_difference(record.arguments, step.arguments)}"
    if remade:
        return f"was made from the {', '.join(remade)} that was there before"
    if record.state == DONE:
        return f"was finished, but lacks {lacking(step)}"
    return ""


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
    """What it was made with and is not to be made with now, or the other way round."""
    flags = _flags(before), _flags(now)
    was, asked = (
        " ".join(flag for flag in side if flag not in other) for side, other in (flags, flags[::-1])
    )
    if was and asked:
        return f"with {was}, now it is {asked}"
    if was or asked:
        return f"with {was}, now it is without" if was else f"without {asked}, now it is with it"
    return "from something else"


def _flags(arguments: Sequence[str]) -> list[str]:
    """Each flag in one piece with its values."""
    pieces: list[str] = []
    for argument in arguments:
        if pieces and pieces[-1].startswith("-") and not argument.startswith("-"):
            pieces[-1] += f" {argument}"
        else:
            pieces.append(argument)
    return pieces


def is_whole(step: Step) -> bool:
    """Whether all that it makes is there."""
    return lacking(step) is None


def lacking(step: Step) -> str | None:
    """The first of its results that is not there, or is of a run that was stopped."""
    for folder, pattern in step.outputs:
        if not any(map(_is_final, folder.glob(pattern))):
            return f"{folder}/{pattern}"
    return None


def _is_final(path: Path) -> bool:
    if path.name != "summary.json":
        return True
    try:
        return not json.loads(path.read_text(encoding="utf-8")).get("stopped", False)
    except ValueError:
        # Cut off while it was written.
        return False


def _has_checkpoint(step: Step) -> bool:
    return step.owns is not None and any(step.owns.glob(f"checkpoints/step_*/{MANIFEST}"))


def _holds_anything(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
