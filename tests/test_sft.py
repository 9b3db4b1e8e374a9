"""Supervised fine-tuning: packing changes no number, a run in this process, exact resume."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptfast.attention import choose_attention
from gptfast.chat_data import PackedRows, RowLoader, Tokens, tokenise
from gptfast.chat_data.mixture import Mixture
from gptfast.config import RunSettings
from gptfast.config_chat import (
    CPU_SYSTEM,
    AccuracySettings,
    MixtureSettings,
    SFTSettings,
    SourceSettings,
)
from gptfast.model import GPT, GPTConfig
from gptfast.report.build import build_report
from gptfast.report.runs import read_folders
from gptfast.tasks import Conversations
from tests.fake_runs import figures as report_figures
from tests.tuning_cases import (
    BYTES,
    CONFIG,
    figures,
    leave_out_newton_schulz_kernel,
    plain_newton_schulz,
    rows,
    run_stage,
    stop_at,
    write_conversations,
    write_source,
)
from train import sft

pytestmark = pytest.mark.usefixtures("plain_newton_schulz")
__all__ = ["plain_newton_schulz"]


def own_tokens(folder: Path, sequence_len: int, count: int = 90) -> Tokens:
    path = write_conversations(folder / "own.jsonl", count)
    mixture = Mixture(Conversations([path]), str(path))
    return tokenise(mixture, BYTES, max_tokens=sequence_len, cache=folder)


def loss_and_gradients(
    model: GPT, tokens: Tokens, sequence_len: int, *, pack: bool, batch_size: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over supervised tokens of all conversations as one step, and its gradients."""
    data = PackedRows(tokens, sequence_len, pack=pack)
    device = model.cos.device
    loader = RowLoader(data, rows_per_step=len(data), batch_size=batch_size, device=device)
    model.zero_grad()
    total, count = 0.0, 0
    for batch in loader:
        loss = model(batch.inputs, batch.targets, documents=batch.documents)
        loss.backward()
        total += loss.item()
        count += int((batch.targets >= 0).sum())
    loader.close()
    assert count == data.supervised_tokens
    return total / count, {n: p.grad.float() / count for n, p in model.named_parameters()}


def filled(config: GPTConfig, **choices: str) -> GPT:
    """A plain model with no zero-initialised weight left."""
    model = GPT(config, **choices)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for parameter in model.parameters():
        value = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(value * parameter.shape[1] ** -0.5)
    return model


@pytest.mark.parametrize("batch_size", [1, 5])
def test_packed_equals_one_conversation_a_row(tmp_path, batch_size):
    tokens, model = own_tokens(tmp_path, 48), filled(CONFIG)
    packed = PackedRows(tokens, 48)
    assert len(packed) < 0.5 * packed.conversations
    got = loss_and_gradients(model, tokens, 48, pack=True, batch_size=batch_size)
    want = loss_and_gradients(model, tokens, 48, pack=False, batch_size=8)
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    for name, gradient in want[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[1][name], gradient, atol=1e-6 * scale, rtol=1e-4, msg=name)


# The compiler's warnings are its own affair.
@pytest.mark.filterwarnings("default")
@pytest.mark.gpu
def test_on_a_gpu_packed_equals_one_conversation_a_row(tmp_path):
    """bf16, our kernels, the chosen variable-length attention, compiled blocks."""
    device = torch.device("cuda")
    config = replace(CONFIG, sequence_len=256, n_embd=256, n_head=2, n_kv_head=2)
    choice = choose_attention("auto", device, torch.bfloat16, config.head_dim, documents=True)
    model = filled(config, kernels="triton", attention_backend=choice.backend).to(device)
    model.cast_parameters(torch.bfloat16)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False)
    tokens = own_tokens(tmp_path, 256, count=300)
    got = loss_and_gradients(model, tokens, 256, pack=True, batch_size=4)
    want = loss_and_gradients(model, tokens, 256, pack=False, batch_size=32)
    assert got[0] == pytest.approx(want[0], rel=1e-3)
    for name, gradient in want[1].items():
        difference = (got[1][name] - gradient).norm() / gradient.norm()
        assert difference < 0.03, f"{name}: {difference:.4f}"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> SFTSettings:
    folder = tmp_path_factory.mktemp("sft")
    return SFTSettings(
        start=SourceSettings(str(write_source(folder / "mid-d2"))),
        mixture=MixtureSettings(
            train=(str(write_conversations(folder / "own.jsonl")),),
            val=("embedded[:10]",),
            cache=folder,
        ),
        num_epochs=2,
        optim=replace(SFTSettings().optim, target_examples_per_step=12, init_lr_frac=1.0),
        accuracy=AccuracySettings(accuracy_of=("embedded",), accuracy_every=8, accuracy_problems=8),
        system=CPU_SYSTEM,
        run=RunSettings(out=folder / "whole", eval_every=5, eval_tokens=400, save_every=2),
    )


@pytest.fixture(scope="module")
def whole(settings: SFTSettings) -> tuple[Path, list[str]]:
    """A run from beginning to end, and what it said."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_newton_schulz_kernel(patch)
        said = run_stage(sft.train, settings)
    return settings.run.out, said


def test_a_run_learns_and_leaves_what_it_promises(whole, settings):
    run, said = whole
    steps, evaluations = rows(run, "step"), rows(run, "eval")
    # 88 conversations twice, 12 a step.
    assert len(steps) == pytest.approx(2 * 88 / 12, abs=1)
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    multipliers = [row["lr_multiplier"] for row in steps]
    assert multipliers == pytest.approx([1 - s / len(steps) for s in range(len(steps))])
    # Losses at every evaluation; accuracies when they are due, at the first and at the last.
    assert all({"val_loss", "val_bpb"} <= row.keys() for row in evaluations)
    scored = [row["step"] for row in evaluations if "embedded" in row]
    assert scored == [0, 8, len(steps)]
    assert [row["step"] for row in evaluations] == [0, 5, 8, 10, len(steps)]
    assert any("% full" in line for line in said)
    assert len(rows(run, "sample")[-1]["samples"]) == 5
    assert json.loads((run / "summary.json").read_text())["step"] == len(steps)


def test_the_report_tells_how_many_conversations_trained(whole):
    found = report_figures(build_report(read_folders([whole[0]])), "Chat SFT")
    assert found["Training rows"] == ("90", "20,843")


def test_only_what_the_assistant_says_counts(whole, settings, tmp_path):
    run, _ = whole
    tokens = own_tokens(tmp_path, 48)
    # All but two of them train.
    learned = sum(row["supervised_tokens"] for row in rows(run, "step")) / 2
    assert 0.9 * PackedRows(tokens, 48).supervised_tokens < learned
    assert learned < 0.5 * len(tokens.codes)
    assert math.isfinite(rows(run, "step")[-1]["grad_norm"])


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    settings, whole, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    stopped = replace(settings, run=replace(settings.run, out=out))
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        run_stage(sft.train, stopped)
    # The host reads a step late whether it is to stop.
    assert len(rows(out, "step")) == 7
    run_stage(sft.train, replace(stopped, run=replace(stopped.run, resume=True)))
    assert figures(out) == figures(whole[0])


def test_one_conversation_a_row_takes_the_reference_s_steps(settings, tmp_path):
    padded = replace(
        settings,
        num_epochs=1,
        num_iterations=3,
        optim=replace(settings.optim, pack=False, device_batch_size=4),
        accuracy=replace(settings.accuracy, accuracy_of=()),
        run=replace(settings.run, out=tmp_path / "run"),
    )
    said = run_stage(sft.train, padded)
    assert any("3 steps of 12 rows, 3 pass(es) each" in line for line in said)
    assert len(rows(tmp_path / "run", "step")) == 3
