"""How much faster is supervised fine-tuning packed, with our kernels, than the reference's way?

    python -m bench.sft                                        d20 on one GPU, made-up conversations
    python -m bench.sft --train my.jsonl --tokenizer runs/sft-d20/tokenizer --out sft.json

Both ways train the same model on the same conversations, as many a step, with the same optimizer
and the same loop, in turns:

    packed      rows of several conversations, compiled, Triton kernels, variable-length attention
    reference   one conversation a row, four rows a pass, padded to the longest of them, plain
                PyTorch with SDPA's FlashAttention-2, not compiled

Useful tokens are those of conversations, supervised ones those that are learned, computed ones all
that go through the model, padding included. MFU counts 6 FLOPs a parameter but the embedding's, and
attention's over the length of each conversation (useful) or padded row (computed). Figures are of
the timed steps of all rounds together. The last line is JSON.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import tyro

from bench.mfu_step import NoCheckpoints
from gptfast import hardware, parallel
from gptfast.attention import choose_attention
from gptfast.batch import Batch
from gptfast.chat_data import PackedRows, RowLoader, Tokens, open_mixtures, tokenise
from gptfast.config import LearningSettings, ModelSettings, SystemSettings
from gptfast.config_chat import CPU_SYSTEM, MixtureSettings
from gptfast.errors import UserError
from gptfast.loop import Trainer
from gptfast.memory import GIB
from gptfast.metrics import MetricsLog, read_rows
from gptfast.model import GPT, GPTConfig, flops_per_token
from gptfast.optim import build_optimizer
from gptfast.parallel import World
from gptfast.plan import Plan
from gptfast.run import environment, exit_code, prepare_to_write, write_json
from gptfast.tokenizer import Tokenizer

# Rows of one pass of the reference (nanochat d6d86cb, scripts/chat_sft.py).
_REFERENCE_ROWS = 4


@dataclass(frozen=True)
class MeasureSettings:
    examples_per_step: int = 32
    """Conversations in a step."""
    rounds: int = 3
    """Of both ways, in turns."""
    warmup: int = 10
    """Steps of a round before those that are timed."""
    timed: int = 30
    """Steps of a round that are timed."""
    tokenizer: Path | None = None
    """Folder of the tokenizer for --train; the model has its vocabulary then."""
    out: Path | None = None
    """Also write the JSON here."""

    @property
    def steps(self) -> int:
        return self.rounds * (self.warmup + self.timed)


@dataclass(frozen=True)
class SFTBenchSettings:
    """Everything that `python -m bench.sft` can be told. Without --train, conversations are made
    up, with lengths like those of SmolTalk's, GSM8K's and ARC's as the reference mixes them."""

    model: ModelSettings = field(default_factory=ModelSettings)
    mixture: MixtureSettings = field(default_factory=MixtureSettings)
    system: SystemSettings = field(default_factory=SystemSettings)
    measure: MeasureSettings = field(default_factory=MeasureSettings)


def preset(*, on_gpu: bool) -> SFTBenchSettings:
    """d20; without a GPU a toy, to see that everything works."""
    if on_gpu:
        return SFTBenchSettings()
    return SFTBenchSettings(
        model=ModelSettings(depth=2, sequence_len=64, vocab_size=300),
        system=CPU_SYSTEM,
        measure=MeasureSettings(examples_per_step=8, rounds=1, warmup=1, timed=2),
    )


class PaddedLoader:
    """Conversations in order, one a row, padded to the longest of each batch."""

    wait_seconds = 0.0

    def __init__(self, rows: PackedRows, device: torch.device) -> None:
        self.rows, self.device, self._next = rows, device, 0

    def __next__(self) -> Batch:
        numbers = range(self._next, self._next + _REFERENCE_ROWS)
        self._next = numbers.stop
        shape = (_REFERENCE_ROWS, self.rows.sequence_len)
        inputs, targets = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        lengths = [self.rows.fill(n, inputs[i], targets[i])[0] for i, n in enumerate(numbers)]
        both = torch.from_numpy(np.stack((inputs, targets))[:, :, : max(lengths)].copy())
        if self.device.type == "cuda":
            both = both.pin_memory()
        inputs, targets = both.to(self.device, non_blocking=True)
        return Batch(inputs, targets.long())


class Way:
    """One of the two ways: a model, an optimizer, and batches that go on from round to round.

    conversations, computed: of each step, the lengths of its conversations, and of the sequences
    that go through the model.
    """

    def __init__(
        self,
        world: World,
        config: GPTConfig,
        system: SystemSettings,
        loader: "RowLoader | PaddedLoader",
        *,
        accumulation: int,
        conversations: Sequence[list[int]],
        computed: Sequence[list[int]],
    ) -> None:
        self.world, self.config, self.loader = world, config, loader
        self.accumulation = accumulation
        self.conversations, self.computed = conversations, computed
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        self.attention = choose_attention(
            system.attention,
            world.device,
            dtype,
            config.head_dim,
            documents=isinstance(loader, RowLoader),
        ).backend
        self.model = parallel.build_sharded(
            lambda: GPT(config, kernels=system.kernels, attention_backend=self.attention),
            world,
            compute_dtype=dtype,
            reshard_after_forward=False,
            compile_blocks=system.compile,
            seed=0,
        )
        self.optimizer = build_optimizer(self.model, LearningSettings(grad_clip=0.0))
        self.done = 0
        # (step, seconds, supervised tokens) of every timed step.
        self.timed: list[tuple[int, float, int]] = []
        self.peak_bytes = 0

    def run(self, measure: MeasureSettings) -> None:
        """One round."""
        first, on_gpu = self.done, self.world.device.type == "cuda"
        self.done += measure.warmup + measure.timed
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with (
            tempfile.TemporaryDirectory() as folder,
            closing(_QuietLog(Path(folder), active=True, start_step=first)) as log,
        ):
            Trainer(
                world=self.world,
                model=self.model,
                optimizer=self.optimizer,
                loader=self.loader,
                plan=Plan(
                    total_steps=self.done,
                    accumulation=self.accumulation,
                    tokens_per_step=1,
                    flops_per_token=1,
                    learning_rate_multiplier=lambda step: 0.02,
                    momentum=lambda step: 0.95,
                ),
                log=log,
                checkpointer=NoCheckpoints(),
                save=lambda step: None,
                evaluate=lambda step: {},
                sample=lambda step: {"samples": []},
            ).run(first)
            rows = read_rows(Path(folder) / "metrics.jsonl", "step")
        self.timed += [
            (row["step"], row["seconds"], row["supervised_tokens"])
            for row in rows[measure.warmup :]
        ]
        self.peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else 0

    def figures(self) -> dict[str, float]:
        """Rates over all timed steps."""
        steps = [step for step, _, _ in self.timed]
        seconds = sum(s for _, s, _ in self.timed)
        useful = [length for step in steps for length in self.conversations[step]]
        computed = [length for step in steps for length in self.computed[step]]
        found = {
            "useful_tokens_per_second": sum(useful) / seconds,
            "supervised_tokens_per_second": sum(n for _, _, n in self.timed) / seconds,
            "computed_tokens_per_second": sum(computed) / seconds,
            "padding": 1 - sum(useful) / sum(computed),
            "step_seconds": seconds / len(steps),
            "conversations_per_step": len(useful) / len(steps),
            "useful_flops_per_second": self._flops(useful) / seconds,
            "computed_flops_per_second": self._flops(computed) / seconds,
        }
        if self.world.device.type == "cuda":
            found["peak_memory_bytes"] = self.peak_bytes
            own = hardware.peak(torch.cuda.get_device_name())
            for kind in ("useful", "computed"):
                flops = found[f"{kind}_flops_per_second"]
                found[f"mfu_report_{kind}"] = hardware.mfu(flops, hardware.REPORT_PEAK_FLOPS)
                if own is not None:
                    found[f"mfu_own_peak_{kind}"] = hardware.mfu(flops, own.bf16_flops)
        return found

    def _flops(self, lengths: list[int]) -> float:
        tokens = sum(lengths)
        context = sum(length**2 for length in lengths) / tokens
        return tokens * flops_per_token(self.config, context=context)


class _QuietLog(MetricsLog):
    """metrics.jsonl, and nothing on the console."""

    def say(self, line: str) -> None:
        pass


def main() -> None:
    settings = tyro.cli(
        SFTBenchSettings,
        description=__doc__,
        default=preset(on_gpu=parallel.will_use_gpus()),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    with parallel.start(cpu=settings.system.device == "cpu") as world:
        bench(settings, world)


def bench(settings: SFTBenchSettings, world: World) -> dict:
    """Measure both ways, print the table and the JSON; the latter is returned."""
    measure, model = settings.measure, settings.model
    if measure.out is not None:
        prepare_to_write(measure.out)
    tokens, vocab_size = conversations_of(settings)
    config = GPTConfig.from_depth(
        model.depth, vocab_size=vocab_size, sequence_len=model.sequence_len
    )
    # Enough for all rounds, however few there are.
    epochs = 1 + (measure.steps + 1) * measure.examples_per_step // len(tokens)
    ways = {
        "packed": packed_way(settings, world, config, tokens, epochs),
        "reference": reference_way(settings, world, config, tokens, epochs),
    }
    for _ in range(measure.rounds):
        for way in ways.values():
            way.run(measure)
    figures = {name: way.figures() for name, way in ways.items()}
    useful = [figures[name]["useful_tokens_per_second"] for name in ways]
    result = {
        "speedup_in_useful_tokens": useful[0] / useful[1],
        "ways": figures,
        "attention": {name: way.attention for name, way in ways.items()},
        "mean_conversation_tokens": float(tokens.lengths.mean()),
        "settings": asdict(settings),
        "environment": environment(world),
    }
    print_table(figures)
    print(f"packed / reference, useful tokens a second: {useful[0] / useful[1]:.2f}")
    if measure.out is not None:
        write_json(measure.out, result)
    print(json.dumps(result, default=str))
    return result


def packed_way(
    settings: SFTBenchSettings, world: World, config: GPTConfig, tokens: Tokens, epochs: int
) -> Way:
    rows = PackedRows(tokens, config.sequence_len, epochs=epochs)
    per_step = rows.holding(settings.measure.examples_per_step)
    loader = RowLoader(
        rows, rows_per_step=per_step, batch_size=min(32, per_step), device=world.device
    )
    steps = [
        [n for row in range(first, first + per_step) for n in rows.lengths(row)]
        for first in range(0, settings.measure.steps * per_step, per_step)
    ]
    # What is left free of rows is computed, too.
    places = loader.accumulation * min(32, per_step) * config.sequence_len
    return Way(
        world,
        config,
        settings.system,
        loader,
        accumulation=loader.accumulation,
        conversations=steps,
        computed=[[*lengths, *[1] * (places - sum(lengths))] for lengths in steps],
    )


def reference_way(
    settings: SFTBenchSettings, world: World, config: GPTConfig, tokens: Tokens, epochs: int
) -> Way:
    rows = PackedRows(tokens, config.sequence_len, pack=False, epochs=epochs)
    accumulation = settings.measure.examples_per_step // _REFERENCE_ROWS
    shape = (settings.measure.steps, accumulation, _REFERENCE_ROWS)
    lengths = np.array([rows.lengths(row)[0] for row in range(np.prod(shape))]).reshape(shape)
    padded = np.broadcast_to(lengths.max(axis=2, keepdims=True), shape)
    return Way(
        world,
        config,
        replace(settings.system, kernels="reference", compile=False, attention="flash2"),
        PaddedLoader(rows, world.device),
        accumulation=accumulation,
        conversations=lengths.reshape(len(lengths), -1).tolist(),
        computed=padded.reshape(len(padded), -1).tolist(),
    )


def conversations_of(settings: SFTBenchSettings) -> tuple[Tokens, int]:
    """Their tokens, and the size of the vocabulary."""
    model, measure, mixture = settings.model, settings.measure, settings.mixture
    if not mixture.train:
        count = 2 * measure.steps * measure.examples_per_step
        return made_up(count, model.sequence_len, model.vocab_size), model.vocab_size
    if measure.tokenizer is None:
        raise UserError("--train needs the --tokenizer that its text is cut by")
    tokenizer = Tokenizer.load(measure.tokenizer)
    tokens = tokenise(
        open_mixtures(mixture, train=(), val=()).train,
        tokenizer,
        max_tokens=model.sequence_len,
        cache=mixture.cache,
        progress=True,
    )
    return tokens, tokenizer.vocab_size


def made_up(count: int, sequence_len: int, vocab_size: int) -> Tokens:
    """Random tokens; lengths are an assumption, for a context of 2,048: 48 % lognormal with a
    median of 665 (talk), 36 % around 230 (school mathematics), 16 % around 90 (a letter chosen);
    of talk 70 % is the assistant's, of mathematics 60 %, of letters two tokens."""
    draw = np.random.default_rng(0)
    kinds = draw.choice(3, size=count, p=(0.48, 0.36, 0.16))
    talk = draw.lognormal(6.5, 0.6, count)
    mathematics, letters = draw.normal((230, 90), (60, 25), (count, 2)).T
    lengths = np.choose(kinds, (talk, mathematics, letters)) * sequence_len / 2048
    lengths = lengths.clip(4, sequence_len).astype(np.int64)
    ends = lengths.cumsum()
    codes = draw.integers(0, vocab_size, ends[-1], dtype=np.int32)
    learned = np.maximum(2, (lengths * np.choose(kinds, (0.7, 0.6, 0.0))).astype(np.int64))
    place = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    asked = place < np.repeat(lengths - learned, lengths)
    return Tokens(np.where(asked, ~codes, codes), ends, "made up")


def print_table(figures: dict[str, dict[str, float]]) -> None:
    """A row a figure, a column a way."""
    lines = [
        ("useful tokens/s", "useful_tokens_per_second", "{:,.0f}", 1),
        ("supervised tokens/s", "supervised_tokens_per_second", "{:,.0f}", 1),
        ("computed tokens/s", "computed_tokens_per_second", "{:,.0f}", 1),
        ("padding, %", "padding", "{:.1f}", 100),
        ("conversations a step", "conversations_per_step", "{:.1f}", 1),
        ("step, ms", "step_seconds", "{:.1f}", 1e3),
        ("MFU of 989 TFLOP/s, useful, %", "mfu_report_useful", "{:.2f}", 100),
        ("MFU of 989 TFLOP/s, computed, %", "mfu_report_computed", "{:.2f}", 100),
        ("MFU of this GPU's peak, useful, %", "mfu_own_peak_useful", "{:.2f}", 100),
        ("peak memory, GiB", "peak_memory_bytes", "{:.1f}", 1 / GIB),
    ]
    print(f"{'':34}" + "".join(f"{name:>14}" for name in figures))
    for title, key, form, scale in lines:
        if all(key in found for found in figures.values()):
            cells = [form.format(found[key] * scale) for found in figures.values()]
            print(f"{title:34}" + "".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    sys.exit(exit_code(main))
