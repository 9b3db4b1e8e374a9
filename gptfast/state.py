"""Everything that must survive a run's end for it to go on bit for bit, in one place."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from gptfast.checkpoint import Checkpointer
from gptfast.errors import UserError
from gptfast.model import GPT
from gptfast.optim import Optimizer
from gptfast.parallel import World


class ResumableLoader(Protocol):
    """What is asked of data that a run can go on with where it stopped; see data.BatchLoader."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    def load_resharded(self, states: Sequence[dict]) -> str: ...


class RunState:
    """Model, optimizer, data position and random states of a run, and how they are saved."""

    def __init__(
        self,
        *,
        world: World,
        model: GPT,
        optimizer: Optimizer,
        loader: ResumableLoader,
        folder: Path,
        keep: int,
        meta: dict,
        say: Callable[[str], None],
    ) -> None:
        """folder: of the checkpoints, of which the newest `keep` stay; meta: JSON that tells what
        they belong to, "model_config" and "tokenizer" among it; say: told what `restore` finds, and
        of a save that the disk refused."""
        self.world, self.model, self.optimizer = world, model, optimizer
        self.loader, self.meta = loader, meta
        self.checkpointer = Checkpointer(
            folder,
            keep=keep,
            process_group=world.new_host_group(),
            rank=world.rank,
            world_size=world.size,
            say=say,
        )
        self.say = say

    def save(self, step: int, summary: dict) -> None:
        """Start writing a checkpoint; returns as soon as training may change the tensors. summary:
        JSON, what the run has come to."""
        rank_state = {"loader": self.loader.state_dict(), **_random_states(self.world.device)}
        meta = {**self.meta, "step": step, "summary": summary}
        self.checkpointer.save(step, self._tensors(), rank_state, meta)

    def restore(self, *, total_steps: int) -> tuple[int, dict]:
        """Load the newest complete checkpoint; the number of steps done, and the summary of them.
        UserError if none is complete, if it belongs to another architecture, tokenizer or text, or
        if a run of `total_steps` ends before it."""
        step, warnings = self.checkpointer.latest()
        for warning in warnings:
            self.say(warning)
        if step is None:
            raise UserError(
                f"--resume: no complete checkpoint in {self.checkpointer.folder}; "
                "start without --resume, with another --out"
            )
        if step > total_steps:
            raise UserError(
                f"--resume: {step} steps are done, but the run is to end after {total_steps}: "
                f"give --num-iterations {step} or more"
            )
        rank_state, meta = self.checkpointer.load(
            step, self._tensors(), model_config=self.meta["model_config"]
        )
        if meta["tokenizer"] != self.meta["tokenizer"]:
            raise UserError(
                f"the checkpoint was trained with tokenizer {meta['tokenizer'][:12]}, this run "
                f"has {self.meta['tokenizer'][:12]}: give the first run's --tokenizer"
            )
        if isinstance(rank_state, dict):
            self.loader.load_state_dict(rank_state["loader"])
            _set_random_states(rank_state, self.world.device)
        else:
            where = self.loader.load_resharded([each["loader"] for each in rank_state])
            self.say(f"checkpoint of {len(rank_state)} processes on {self.world.size}: {where}")
        self.say(f"resumed after step {step}")
        if "summary" not in meta:
            self.say("the checkpoint does not tell seconds and energy so far: they begin anew")
        return step, meta.get("summary", {})

    def _tensors(self) -> dict[str, torch.Tensor]:
        model = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        return {**model, **{f"optim.{n}": t for n, t in self.optimizer.state_dict().items()}}


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu_rng": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda_rng"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict, device: torch.device) -> None:
    torch.set_rng_state(states["cpu_rng"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda_rng"], device)
