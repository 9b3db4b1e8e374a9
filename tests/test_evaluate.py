"""The recipe that evaluates, on two processes, and a run's model back from its folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptfast.checkpoint import Checkpointer
from gptfast.config import DataSettings
from gptfast.errors import UserError
from gptfast.evaluate.core import evaluate_core
from gptfast.evaluate.core_bundle import load_bundle
from gptfast.evaluate.core_scoring import Scorer
from gptfast.evaluate.loading import (
    Placement,
    data_of_run,
    find_checkpoint,
    load_model,
    load_tokenizer,
    random_model,
)
from gptfast.model import GPTConfig
from gptfast.run import write_json
from tests.core_cases import VOCAB, make_model, make_tokenizer, write_bundle

ROOT = Path(__file__).parent.parent
CPU = Placement(torch.device("cpu"), attention="math")


def test_the_recipe_on_two_processes_scores_as_one(tmp_path):
    bundle_folder, tokenizer = write_bundle(tmp_path / "bundle"), make_tokenizer()
    tokenizer.save(tmp_path / "tokenizer")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "train" / "evaluate.py"), "base", "--random-weights", "--device=cpu"]
    command += ["--depth=2", "--sequence-len=64", f"--tokenizer={tmp_path / 'tokenizer'}"]
    command += ["--only", "samples", "core", f"--bundle={bundle_folder}", f"--out={tmp_path / 'o'}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    config = GPTConfig.from_depth(2, vocab_size=VOCAB, sequence_len=64)
    model = random_model(config, CPU)
    expected = evaluate_core(Scorer(model), tokenizer, load_bundle(bundle_folder))
    for task in expected.tasks:
        saved = json.loads((tmp_path / "o" / "core" / f"{task.label}.json").read_text())
        assert [bool(row[1]) for row in saved["outcomes"]] == (task.outcomes[:, 1] == 1).tolist()
    assert json.loads((tmp_path / "o" / "core.json").read_text())["core_metric_partial"] == (
        pytest.approx(expected.mean)
    )
    assert f"{expected.name}: {expected.mean:.4f}" in run.stdout
    assert "- sample 6: <|bos|>If 5*x" in (tmp_path / "o" / "base-model-loss.md").read_text()
    assert expected.name in (tmp_path / "o" / "base-model-evaluation.md").read_text()


def test_a_runs_model_tokenizer_and_text_come_back(tmp_path):
    model, tokenizer, run = make_model(), make_tokenizer(), tmp_path / "run"
    tokenizer.save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"no checkpoint in .*run/checkpoints: there are none"):
        find_checkpoint(run)
    checkpoints = Checkpointer(run / "checkpoints", keep=2)
    meta = {"model_config": model.config.to_dict(), "tokenizer": tokenizer.fingerprint}
    for step in (5, 10):
        tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
        checkpoints.save(step, tensors, {}, meta)
    checkpoints.close()
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

    with pytest.raises(UserError, match=r"settings.json does not tell what the run was trained on"):
        data_of_run(run)
    data = DataSettings(data="my/text", tokenizer=tmp_path / "tokenizer", cache=tmp_path)
    write_json(run / "settings.json", {"data": data.__dict__})
    assert data_of_run(run) == data
    assert load_tokenizer(data, "my/text", newest).fingerprint == tokenizer.fingerprint
    other = make_tokenizer().train(["other text, other tokens, " * 3], 270)
    other.save(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"other holds tokenizer .*, but the model was trained with"
    ):
        load_tokenizer(DataSettings(tokenizer=tmp_path / "other"), "", newest)
