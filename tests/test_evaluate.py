"""The recipe that evaluates base models and those that chat; a run's model out of its folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from gptfast.checkpoint import Checkpointer
from gptfast.config import DEFAULT_CACHE, DataSettings
from gptfast.errors import UserError
from gptfast.evaluate.chat import evaluate_chat
from gptfast.evaluate.core import evaluate_core
from gptfast.evaluate.core_bundle import load_bundle
from gptfast.evaluate.core_scoring import Scorer
from gptfast.evaluate.generative import Answering
from gptfast.evaluate.loading import (
    Placement,
    cache_of_run,
    data_of_run,
    find_checkpoint,
    load_model,
    load_subject,
    load_tokenizer,
    random_model,
)
from gptfast.model import GPT, GPTConfig
from gptfast.run import exit_code, write_json
from gptfast.tasks import chat_task
from gptfast.tokenizer import Tokenizer
from tests.core_cases import VOCAB, make_model, make_tokenizer, write_bundle
from train import evaluate as recipe

ROOT = Path(__file__).parent.parent
CPU = Placement(torch.device("cpu"), attention="math")


def evaluate(*arguments: object, processes: int) -> str:
    """What train/evaluate.py says, under torchrun."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}"]
    command += [str(ROOT / "train" / "evaluate.py"), *map(str, arguments), "--device=cpu"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return run.stdout


def save_run(run: Path, model: GPT, tokenizer: Tokenizer, *steps: int, **meta: str) -> Path:
    """A run of two checkpoints."""
    checkpoints = Checkpointer(run / "checkpoints", keep=2)
    meta |= {"model_config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint}
    for step in steps:
        tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
        checkpoints.save(step, tensors, {}, meta)
    checkpoints.close()
    return run


@pytest.mark.slow
def test_base_on_two_processes_scores_as_one_and_as_one_at_a_time(tmp_path):
    bundle_folder, tokenizer = write_bundle(tmp_path / "bundle"), make_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    said = evaluate(
        *("base", "--random-weights", "--depth=2", "--sequence-len=64"),
        *("--tokenizer", tmp_path / "tokenizer", "--only", "samples", "core"),
        *("--compare-one-at-a-time", "--core-bundle", bundle_folder, "--out", tmp_path / "o"),
        processes=2,
    )
    config = GPTConfig.from_depth(2, vocab_size=VOCAB, sequence_len=64)
    model = random_model(config, CPU)
    expected = evaluate_core(Scorer(model), tokenizer, load_bundle(bundle_folder))
    for task in expected.tasks:
        saved = json.loads(
            (tmp_path / "o" / "core" / f"{task.label}-{task.examples}.json").read_text()
        )
        assert [bool(row[1]) for row in saved["outcomes"]] == (task.outcomes[:, 1] == 1).tolist()
    assert json.loads((tmp_path / "o" / "core.json").read_text())["core_metric_partial"] == (
        pytest.approx(expected.mean)
    )
    assert f"{expected.name}: {expected.mean:.4f}" in said
    assert "- sample 6: <|bos|>If 5*x" in (tmp_path / "o" / "base-model-loss.md").read_text()
    assert expected.name in (tmp_path / "o" / "base-model-evaluation.md").read_text()
    compared = (tmp_path / "o" / "core-compared.md").read_text()
    assert compared.startswith("0 of 62 examples differ (0.00%).\n")
    assert compared in said


def write_split(folder: Path, split: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")


def write_chat_data(folder: Path) -> Path:
    """Nine questions of ARC-Easy and five of GSM8K."""
    choices = {"text": ["a river", "a stone", "songs"], "label": ["A", "B", "C"]}
    questions = [
        {"question": f"what is {i}?", "choices": choices, "answerKey": "ABC"[i % 3]}
        for i in range(9)
    ]
    write_split(folder / "arc" / "ARC-Easy", "test", questions)
    problems = [{"question": f"{i} + 1?", "answer": f"<<{i}+1={i + 1}>>\n#### 7"} for i in range(5)]
    write_split(folder / "gsm8k" / "main", "test", problems)
    return folder


def test_chat_writes_results_and_the_reports_section(tmp_path, monkeypatch, capsys):
    write_chat_data(tmp_path / "data")
    model, tokenizer = make_model(), make_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    meta = {"tokenizer_folder": str(tmp_path / "tokenizer"), "stage": "sft"}
    run = save_run(tmp_path / "mine", model, tokenizer, 30, **meta)
    out = run / "evaluation" / "step_000030"

    arguments = [
        *("chat", "-i", run, "-a", "ARC-Easy|GSM8K", "-x", 8, "-m", 6, "-t", 0.5, "-n", 2, "-k", 9),
        *("-b", 3, "-s", 30, "-d", "float32", "--chat-data", tmp_path / "data", "--device=cpu"),
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    # One thread: several would wait for each other longer than they compute.
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert exit_code(recipe.main) == 0
    said = capsys.readouterr().out
    names = ("ARC-Easy", "GSM8K")
    tasks = {name: chat_task(name, data=tmp_path / "data", cache=tmp_path) for name in names}
    expected = evaluate_chat(
        model,
        tokenizer,
        tasks,
        answering=Answering(max_new_tokens=6, temperature=0.5, num_samples=2, top_k=9),
        max_problems=8,
    )
    assert expected.table() in said
    saved = json.loads((out / "chat.json").read_text())
    assert saved["tasks"] == expected.as_dict()["tasks"]
    assert saved["missing"] == ["ARC-Challenge", "MMLU", "HumanEval"]
    assert saved["arguments"]["top_k"] == 9
    section = (out / "chat-evaluation-sft.md").read_text().splitlines()
    assert section[0] == "## Chat evaluation sft"
    assert f"- source: {run}" in section
    assert f"- ARC-Easy: {expected.tasks[0].accuracy:.4f}" in section
    assert section[-1].startswith("- ChatCORE metric (first 8 of each task): none, ")
    assert saved["first_of_each_task"] == 8
    assert sorted(path.name for path in (out / "chat").iterdir()) == [
        "ARC-Easy-8.json",
        "GSM8K-5.json",
    ]


def test_a_chat_task_alone_joins_the_others_under_the_same_circumstances(tmp_path):
    data, tokenizer = write_chat_data(tmp_path / "data"), make_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    meta = {"tokenizer_folder": str(tmp_path / "tokenizer"), "stage": "sft"}
    run = save_run(tmp_path / "mine", make_model(), tokenizer, 30, **meta)
    out = run / "evaluation" / "step_000030"

    def evaluate_here(*tasks: str, **more: int | Path) -> dict:
        options = {
            "chat_data": data,
            "max_new_tokens": 4,
            "device": "cpu",
            "dtype": "float32",
            **more,
        }
        recipe.chat(recipe.EvaluateChatSettings(source=str(run), task=tasks, **options))
        return json.loads((out / "chat.json").read_text())

    both = evaluate_here("ARC-Easy", "GSM8K")
    alone = evaluate_here("GSM8K", batch_size=1)
    assert alone["tasks"] == both["tasks"]
    assert alone["missing"] == both["missing"] == ["ARC-Challenge", "MMLU", "HumanEval"]
    assert alone["arguments"]["task"] == ["ARC-Easy", "GSM8K"]
    section = (out / "chat-evaluation-sft.md").read_text()
    assert f"- ARC-Easy: {both['tasks']['ARC-Easy']['accuracy']:.4f}\n" in section
    # Of the first problems, of other answers and of other questions, nothing is mixed.
    assert list(evaluate_here("GSM8K", max_problems=3)["tasks"]) == ["GSM8K"]
    cut = evaluate_here("ARC-Easy", max_problems=3)
    assert [task["examples"] for task in cut["tasks"].values()] == [3, 3]
    assert list(evaluate_here("GSM8K", seed=1)["tasks"]) == ["GSM8K"]
    shutil.copytree(data, tmp_path / "others")
    other = evaluate_here("ARC-Easy", seed=1, chat_data=tmp_path / "others")
    assert list(other["tasks"]) == ["ARC-Easy"]
    (out / "chat.json").write_text("{")
    with pytest.raises(UserError, match=r"chat\.json is damaged"):
        evaluate_here("GSM8K")


def test_a_runs_model_tokenizer_and_text_come_back(tmp_path):
    model, tokenizer, run = make_model(), make_tokenizer(), tmp_path / "run"
    tokenizer.save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"no checkpoint in .*run/checkpoints: there are none"):
        find_checkpoint(run)
    save_run(run, model, tokenizer, 5, 10)
    with pytest.raises(UserError, match=r"of step 7 in .*: there are steps 5, 10"):
        find_checkpoint(run, 7)
    assert find_checkpoint(run, 5).name == "step_000005"
    newest = find_checkpoint(run)
    assert newest.name == "step_000010"

    ids = torch.randint(VOCAB, (1, 9))
    assert torch.equal(load_model(newest, CPU)(ids), model(ids))
    small = load_model(newest, Placement(torch.device("cpu"), dtype="bfloat16"))
    assert small.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(small.cos, model.cos)

    assert cache_of_run(run) == DEFAULT_CACHE
    with pytest.raises(UserError, match=r"settings.json does not tell what the run was trained on"):
        data_of_run(run)
    data = DataSettings(data="my/text", tokenizer=tmp_path / "tokenizer", cache=tmp_path)
    write_json(run / "settings.json", {"num_epochs": 1, "data": data.__dict__})
    assert data_of_run(run) == data
    assert cache_of_run(run) == tmp_path
    # Without the checkpoint's word, as the run's settings say.
    assert load_tokenizer(newest).fingerprint == tokenizer.fingerprint
    subject = load_subject(run, CPU, step=5)
    assert (subject.name, subject.out) == ("run (step 5)", run / "evaluation" / "step_000005")
    assert subject.identity["tokenizer"] == tokenizer.fingerprint
    # Prompts of the chat tasks are read with it, so that what was scored with another is not kept.
    assert subject.identity["attention"] == "math"
    auto = load_subject(run, Placement(torch.device("cpu")), step=5)
    assert auto.identity == {**subject.identity, "attention": "flash2"}


def test_a_later_stages_tokenizer_is_where_its_checkpoint_says(tmp_path):
    tokenizer = make_tokenizer()
    meta = {"tokenizer_folder": str(tmp_path / "tokenizer")}
    checkpoint = find_checkpoint(save_run(tmp_path / "sft", make_model(), tokenizer, 5, **meta))
    with pytest.raises(UserError, match=r"the tokenizer in .*/tokenizer, which is not there: give"):
        load_tokenizer(checkpoint)
    tokenizer.save(tmp_path / "elsewhere")
    found = load_tokenizer(checkpoint, tmp_path / "elsewhere")
    assert found.fingerprint == tokenizer.fingerprint
    tokenizer.save(tmp_path / "tokenizer")
    assert load_tokenizer(checkpoint).fingerprint == tokenizer.fingerprint
    # A run that has it and was moved.
    tokenizer.save(tmp_path / "sft" / "tokenizer")
    moved = find_checkpoint((tmp_path / "sft").rename(tmp_path / "moved"))
    shutil.rmtree(tmp_path / "tokenizer")
    assert load_tokenizer(moved).fingerprint == tokenizer.fingerprint
    other = make_tokenizer().train(["other text, other tokens, " * 3], 270)
    other.save(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"other holds tokenizer .*, but the model was trained with"
    ):
        load_tokenizer(moved, tmp_path / "other")
