"""The model card: metadata that the Hub's own library reads, figures out of the run's folder."""

import json
import re

import pytest
from huggingface_hub import ModelCard

from gptfast.convert.card import MISSING, model_card
from gptfast.convert.reference import reference_meta
from gptfast.convert.trained import TrainedModel, write_run
from gptfast.run import write_json
from tests.convert_cases import make_trained
from tests.fake_runs import write_rows


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    return make_trained()


def test_the_card_tells_what_the_run_tells(trained, tmp_path):
    run = tmp_path / "sft-d20"
    write_run(run, trained, origin="somewhere")
    mixture = {"train": ["gsm8k", "/home/me/secret/texts.jsonl:2"]}
    start = {"source": "/home/me/secret/mid-d20"}
    write_json(run / "settings.json", {"mixture": mixture, "start": start})
    write_json(
        run / "environment.json",
        {"device": "NVIDIA H200", "processes": 4, "nodes": 1, "torch": "2.13", "git_commit": "ab1"},
    )
    write_json(
        run / "summary.json",
        {"step": 42, "training_seconds": 5400.0, "evaluations": [{"step": 42, "val_bpb": 1.25}]},
    )
    evaluation = run / "evaluation" / "step_000042"
    evaluation.mkdir(parents=True)
    tasks = {"ARC-Easy": {"accuracy": 0.3876, "centered": 0.18}}
    write_json(evaluation / "chat.json", {"chatcore_metric": None, "missing": [], "tasks": tasks})
    write_json(evaluation / "core.json", {"core_metric": 0.2219, "missing": [], "tasks": {}})
    other = run / "evaluation" / "step_000041"
    other.mkdir()
    write_json(other / "loss.json", {"train_bpb": 0.5, "val_bpb": 0.5})

    model_card(run, trained, name="d20", path="out", license="mit").save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert (card.data.language, card.data.datasets) == (None, None)
    results = {(r.dataset_type, r.dataset_config): r.metric_value for r in card.data.eval_results}
    assert results == {("allenai/ai2_arc", "ARC-Easy"): 0.3876, ("core", None): 0.2219}
    assert "| Hardware | 4 x NVIDIA H200, 1 node(s) |" in card.text
    assert "| Training time | 1.50 h (5,400 s): steps of this stage alone" in card.text
    assert "| Validation, bits per byte | 1.2500 at step 42 |" in card.text
    assert "| Data | gsm8k, texts.jsonl:2 |" in card.text
    assert "| Started from | mid-d20 |" in card.text
    assert "secret" not in card.content
    assert "| Stage | sft |" in card.text
    assert "| ARC-Easy | 0.3876 |" in card.text
    assert f"| MMLU | {MISSING} |" in card.text
    assert f"| Validation text, bits per byte | {MISSING} |" in card.text
    assert "apply_chat_template" in card.text


def test_the_card_tells_what_the_stages_before_trained_on(trained, tmp_path):
    base, mid, sft = (tmp_path / f"{stage}-d20" for stage in ("base", "mid", "sft"))
    for folder, stage in ((base, "base"), (mid, "mid"), (sft, "sft")):
        write_run(folder, trained, origin="somewhere", stage=stage)
    write_json(base / "settings.json", {"data": {"data": "fineweb-edu"}})
    write_json(mid / "settings.json", {"start": {"source": str(base)}, "mixture": {"train": []}})
    # Named by its stage; the checkpoint tells which run that was.
    write_json(
        sft / "settings.json", {"start": {"source": "mid"}, "mixture": {"train": ["a.jsonl"]}}
    )
    without = model_card(sft, trained, name="m", path="out")
    assert f"| Data of the stages before | {MISSING} |" in without.text
    [manifest] = sft.glob("checkpoints/step_*/manifest.json")
    told = json.loads(manifest.read_text())
    told["meta"]["source"] = str(mid)
    write_json(manifest, told)
    card = model_card(sft, trained, name="m", path="out")
    before = "base: fineweb-edu; mid: smoltalk, mmlu, gsm8k"
    assert f"| Data of the stages before | {before} |" in card.text
    assert "| Started from | mid-d20 |" in card.text
    assert card.data.datasets == ["karpathy/fineweb-edu-100b-shuffle"]
    assert "Data of the stages before" not in model_card(base, trained, name="m", path="out").text


def test_the_cards_sentences_and_example_are_true_as_they_stand(trained, tmp_path):
    write_run(tmp_path / "base-d3", trained, origin="somewhere", stage="base")
    card = model_card(tmp_path / "base-d3", trained, name="base-d3", path="my_model")
    text = " ".join(card.text.split())
    assert (
        "3 layers of width 64; heads of attention: 4 for queries, 2 for keys and values; a "
        "vocabulary of 600; trained on sequences of 256 tokens."
    ) in text
    assert 'path = "my_model"' in card.text
    on_hub = model_card(tmp_path / "base-d3", trained, name="me/small", path="my_model")
    assert 'path = "me/small"' in on_hub.text


def test_scores_of_the_first_examples_have_other_names_and_no_metadata(trained, tmp_path):
    write_run(tmp_path, trained, origin="somewhere")
    evaluation = tmp_path / "evaluation" / "step_000042"
    evaluation.mkdir(parents=True)
    limits = {"missing": [], "first_of_each_task": 20}
    tasks = {"ARC-Easy": {"accuracy": 0.3876, "centered": 0.18}}
    chat = {"chatcore_metric_partial": 0.25, **limits, "tasks": tasks}
    write_json(evaluation / "chat.json", chat)
    write_json(evaluation / "core.json", {"core_metric_partial": 0.2219, **limits, "tasks": {}})
    card = model_card(tmp_path, trained, name="d20", path="out")
    assert card.data.eval_results is None
    assert f"| CORE | {MISSING} |" in card.text
    for name, score in (("CORE", "0.2219"), ("ChatCORE", "0.2500"), ("ARC-Easy", "0.3876")):
        assert f"| {name}, first 20 of each task | {score} |" in card.text


@pytest.mark.parametrize("ended", [True, False])
def test_an_earlier_checkpoint_tells_its_own_figures(trained, tmp_path, ended):
    """Of step 42, whether the run went on to 100 or was killed at 60."""
    run = tmp_path / "sft-d20"
    write_run(run, trained, origin="somewhere")
    steps = 100 if ended else 60
    rows = [
        {"kind": "step", "step": step, "seconds": 100.0, "tokens": 1000 * (step + 1)}
        for step in range(steps)
    ]
    bpb = {0: 3.0, 30: 2.0, 60: 1.0}
    rows += [{"kind": "eval", "step": step, "val_bpb": value} for step, value in bpb.items()]
    write_rows(run / "metrics.jsonl", rows)
    if ended:
        evaluations = [{"step": step, "val_bpb": value} for step, value in bpb.items()]
        summary = {"step": 100, "training_seconds": 9.0, "evaluations": evaluations}
        write_json(run / "summary.json", summary)
    text = model_card(run, trained, name="d20", path="out").text
    assert "| Tokens | 42,000 |" in text
    assert "| Training time | 1.17 h (4,200 s): steps" in text
    assert "| Validation, bits per byte | 2.0000 at step 30 |" in text
    assert reference_meta(run, 42)["val_bpb"] == 2.0
    assert reference_meta(run, 60)["val_bpb"] == 1.0


def test_a_summary_of_another_step_is_not_told(trained, tmp_path):
    run = tmp_path / "base-d20"
    write_run(run, trained, origin="somewhere")
    evaluations = [{"step": 100, "val_bpb": 1.0}]
    summary = {"step": 100, "training_seconds": 9.0, "evaluations": evaluations}
    write_json(run / "summary.json", summary)
    text = model_card(run, trained, name="d20", path="out").text
    for name in ("Tokens", "Training time", "Validation, bits per byte"):
        assert f"| {name} | {MISSING} |" in text
    assert reference_meta(run, 42)["val_bpb"] is None
    assert reference_meta(run, 100)["val_bpb"] == 1.0


def test_the_card_of_a_run_that_tells_nothing_says_so(trained, tmp_path):
    write_run(tmp_path / "run", trained, origin="a checkpoint of nanochat", stage="base")
    card = model_card(tmp_path / "run", trained, name="m", path="out")
    for name in ("Hardware", "Training time", "Tokens", "gptfast", "CORE", "ChatCORE", "GSM8K"):
        assert f"| {name} | {MISSING} |" in card.text
    assert "| Data | not known: imported from a checkpoint of nanochat |" in card.text
    assert "| License | not stated |" in card.text
    assert "was not taught to chat" in card.text
    assert card.data.eval_results is None
    assert not re.search(r"\{\w+\}", card.text)


def test_what_a_base_run_of_fineweb_says_in_its_metadata(trained, tmp_path):
    write_run(tmp_path / "base-d20", trained, origin="somewhere")
    write_json(tmp_path / "base-d20" / "settings.json", {"data": {"data": "fineweb-edu"}})
    card = model_card(tmp_path / "base-d20", trained, name="m", path="out")
    assert card.data.datasets == ["karpathy/fineweb-edu-100b-shuffle"]
    assert card.data.language == "en"
    assert "| Data | fineweb-edu |" in card.text
    assert "| Started from | nothing |" in card.text
