"""A checkpoint as one file, and back bit for bit."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gptfast.checkpoint import Checkpointer, files
from gptfast.convert.single_file import read_file, write_file
from gptfast.convert.trained import TrainedModel, read_checkpoint, write_checkpoint
from gptfast.errors import UserError
from gptfast.evaluate.loading import find_checkpoint
from gptfast.run import write_json
from tests.convert_cases import make_trained, same_model
from train import convert


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    return make_trained()


def write_training_run(run: Path, trained: TrainedModel, ranks: int) -> Path:
    """A checkpoint with optimizer and rank states, as `ranks` processes leave it."""
    trained.tokenizer.save(run / "tokenizer")
    write_json(run / "settings.json", {"data": {"data": "embedded", "validation": None}})
    tensors = {f"model.{name}": tensor for name, tensor in trained.state.items()}
    tensors |= {f"optim.{name}.momentum": 3 * tensor for name, tensor in trained.state.items()}
    tensors["optim.step"] = torch.tensor(7)
    meta = {
        "model_config": trained.config.to_dict(),
        "tokenizer": trained.tokenizer.fingerprint,
        "tokenizer_folder": str(run / "tokenizer"),
        "step": 7,
    }
    states = [
        files.rank_state_bytes({"loader": {"row": rank}, "cpu_rng": torch.get_rng_state()})
        for rank in range(ranks)
    ]
    write_checkpoint(run / "checkpoints", 7, tensors, meta, states)
    return find_checkpoint(run)


@pytest.mark.parametrize("ranks", [1, 3])
def test_one_file_holds_the_whole_checkpoint_bit_for_bit(trained, tmp_path, monkeypatch, ranks):
    run, file, copy = tmp_path / "sft-d3", tmp_path / "one.safetensors", tmp_path / "copy"
    before = write_training_run(run, trained, ranks)
    monkeypatch.setattr(sys, "argv", ["convert", "to-file", str(run), "--out", str(file)])
    convert.main()
    assert file.stat().st_mode == (run / "settings.json").stat().st_mode
    monkeypatch.setattr(sys, "argv", ["convert", "from-file", str(file), "--out", str(copy)])
    convert.main()

    after = find_checkpoint(copy)
    assert files.find_damage(after) is None
    old, new = files.load_full_state(before), files.load_full_state(after)
    assert old.keys() == new.keys()
    assert all(torch.equal(new[n], t) and new[n].dtype == t.dtype for n, t in old.items())
    for rank in range(ranks):
        name = files.rank_file(rank)
        assert (after / name).read_bytes() == (before / name).read_bytes()
    old, new = (files.read_manifest(folder) for folder in (before, after))
    assert (new["step"], new["world_size"]) == (7, ranks)
    here = {"stage": "sft", "tokenizer_folder": str(copy / "tokenizer")}
    assert new["meta"] == {**old["meta"], **here}
    assert json.loads((copy / "settings.json").read_text())["data"]["data"] == "embedded"
    assert same_model(read_checkpoint(after), replace(trained, step=7))

    # What resumes a run finds everything, on another number of processes too.
    checkpoints = Checkpointer(copy / "checkpoints", keep=1)
    tensors = {
        name: torch.zeros_like(tensor) for name, tensor in files.load_full_state(after).items()
    }
    states, _ = checkpoints.load(7, tensors, model_config=trained.config.to_dict())
    rows = [s["loader"]["row"] for s in ([states] if ranks == 1 else states)]
    assert rows == list(range(ranks))
    with pytest.raises(UserError, match=r"one.safetensors exists already"):
        write_file(file, before)


def test_another_or_damaged_file_is_refused(trained, tmp_path):
    file, out = tmp_path / "one.safetensors", tmp_path / "out"
    write_file(file, write_training_run(tmp_path / "run", trained, 1))
    whole = file.read_bytes()
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["gptfast"])

    def refused(reason: str) -> None:
        with pytest.raises(UserError, match=reason):
            read_file(file, out)
        file.write_bytes(whole)
        assert not out.exists()

    def rewrite(change=None, **entries: object) -> None:
        tensors = load_file(file)
        if change is not None:
            change(tensors)
        save_file(tensors, file, metadata={"gptfast": json.dumps({**header, **entries})})

    file.write_bytes(whole[:-10])
    refused("one.safetensors cannot be read")
    file.unlink()
    refused("cannot be read")
    save_file({"a": torch.ones(2)}, file)
    refused("no checkpoint of ours: its header has no 'gptfast'")
    rewrite(step=-1)
    refused("holds no checkpoint of ours: .*step -1")
    rewrite(meta={})
    refused("holds no checkpoint of ours: KeyError")
    rewrite(lambda t: t.pop("rank.00000"))
    refused("step 7 of 0 ranks")
    rewrite(lambda t: t.pop("tokenizer"))
    refused("KeyError")
    rewrite(tokenizer={**header["tokenizer"], "pattern": r"\w+|\W+"})
    refused("the tokenizer in it is not the one")
    rewrite(lambda t: t.pop("model.lm_head.weight"))
    refused("lacks lm_head.weight")
    rewrite(lambda t: t.update({"rank.00000": torch.tensor(list(b"junk"), dtype=torch.uint8)}))
    refused("holds no checkpoint of ours: .*unpack")
    read_file(file, out)
