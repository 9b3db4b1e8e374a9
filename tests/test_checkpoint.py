"""Checkpoints of one process: bit for bit, in the background, damaged, refused, on a full disk."""

import errno
import json
import os
import pickle
import random
import re
import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import nn

from gptfast.checkpoint import Checkpointer, files
from gptfast.errors import UserError

CONFIG = {"n_layer": 2, "n_embd": 16, "window": (4, 8)}
META = {"step": 7, "val_bpb": 0.1 + 0.2, "model_config": CONFIG}


def some_state(seed: int = 0) -> dict:
    """Every kind of tensor that a run has, named as a run names them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(33, 17, generator=generator)
    return {
        "model": {"wte.weight": weight.bfloat16(), "lm_head.weight": nn.Parameter(weight)},
        "optimizer": {
            "lm_head.weight": {"momentum": weight * 3, "step": torch.tensor(float(seed))},
            "empty": torch.empty(0, 4),
            "tokens": torch.tensor(seed, dtype=torch.int64),
        },
    }


def same(a: dict, b: dict) -> bool:
    a, b = files.flatten(a), files.flatten(b)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_bit_for_bit(tmp_path, monkeypatch):
    go = threading.Event()
    write_data = files.Writer.write_data

    def late(self, *args):
        assert go.wait(30)
        return write_data(self, *args)

    monkeypatch.setattr(files.Writer, "write_data", late)
    checkpoints = Checkpointer(tmp_path / "new" / "folder", keep=2)
    assert checkpoints.latest() == (None, [])
    with pytest.raises(UserError, match=r"new/folder/step_000003 does not exist"):
        checkpoints.load(3, {})
    random.seed(5)
    torch.manual_seed(5)
    state, big = some_state(), 2**100 + 1
    rank_state = {
        "position": {"file": "a.parquet", "row": 12, "left": torch.arange(5)},
        "random": (random.getstate(), torch.get_rng_state(), big),
    }
    checkpoints.save(7, state, rank_state, META)
    expected = [random.random(), torch.rand(3).tolist()]
    with torch.no_grad():
        for tensor in files.flatten(state).values():
            tensor.fill_(1)
    rank_state["position"]["left"].fill_(9)
    assert names(checkpoints.folder) == ["step_000007.partial"]
    go.set()
    assert checkpoints.latest() == (7, [])

    loaded = some_state(seed=1)
    rank_state, meta = checkpoints.load(7, loaded, model_config=CONFIG)
    assert same(loaded, some_state())
    assert meta == json.loads(json.dumps(META))
    assert rank_state["position"]["left"].tolist() == [0, 1, 2, 3, 4]
    assert rank_state["random"][2] == big
    random.setstate(rank_state["random"][0])
    torch.set_rng_state(rank_state["random"][1])
    assert [random.random(), torch.rand(3).tolist()] == expected

    folder = files.step_folder(checkpoints.folder, 7)
    assert same(files.load_full_state(folder), files.flatten(some_state()))
    assert same(files.load_full_state(folder, "model"), some_state()["model"])
    assert str(tmp_path).encode() not in (folder / ".metadata").read_bytes()
    with pytest.raises(UserError, match="holds no 'modell', only model, optimizer"):
        files.load_full_state(folder, "modell")
    checkpoints.close()


def test_what_a_checkpoint_cannot_hold_is_refused_at_the_save(tmp_path):
    checkpoints = Checkpointer(tmp_path, keep=1)
    for state, rank_state, meta, error in (
        ({"lr": 0.1}, {}, {}, "lr is a float: state holds tensors with values only"),
        ({"w": torch.empty(2, device="meta")}, {}, {}, "w is a tensor on meta"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, {}, {}, "are named a.b"),
        ({}, {"path": namedtuple("Odd", "x")}, {}, "weights_only|[Pp]ickle"),
        ({}, {}, {"when": tmp_path}, "JSON"),
    ):
        with pytest.raises(
            (ValueError, TypeError, AttributeError, pickle.PickleError), match=error
        ):
            checkpoints.save(1, state, rank_state, meta)
    with pytest.raises(UserError, match="at least 1 checkpoint, got 0"):
        Checkpointer(tmp_path, keep=0)
    assert list(tmp_path.iterdir()) == []
    checkpoints.close()


def test_the_last_k_stay_and_leftovers_go(tmp_path):
    left = "step_000001.partial", "step_000009.partial", "step_000002.discarded", "step_000001.mine"
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    checkpoints = Checkpointer(tmp_path, keep=2)
    step, warnings = checkpoints.latest()
    assert step is None
    half = "is half-written: the run died while saving it"
    assert warnings == [f"{tmp_path / left[1]} {half}", f"{tmp_path / left[0]} {half}"]
    for step in (3, 5, 7, 7, 6):
        checkpoints.save(step, some_state(step), {}, META)
    checkpoints.close()
    # 6 came last: it takes the place of 5, and 7, of a later step, is not ours to remove.
    kept = ["step_000001.mine", "step_000005", "step_000006", "step_000007"]
    assert names(tmp_path) == kept
    assert same(files.load_full_state(tmp_path / "step_000007"), files.flatten(some_state(7)))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def another_number(path: Path) -> None:
    path.write_text(path.read_text().replace('"val_bpb": 0.3', '"val_bpb": 0.2'))


@pytest.mark.parametrize(
    ("harm", "name", "named"),
    [
        (truncate, "__0_0.distcp", "__0_0.distcp has .* bytes, .* were written"),
        (flip_a_byte, "__0_0.distcp", "__0_0.distcp has checksum .*, .* was written"),
        (flip_a_byte, ".metadata", ".metadata has checksum"),
        (flip_a_byte, "rank_00000.pt", "rank_00000.pt has checksum"),
        (another_number, "manifest.json", "manifest.json disagrees with its own checksum"),
        (truncate, "manifest.json", "manifest.json: "),
        (Path.unlink, "manifest.json", "manifest.json is missing"),
        (Path.unlink, "__0_0.distcp", "__0_0.distcp is missing"),
    ],
    ids=lambda value: getattr(value, "__name__", value).lstrip("_"),
)
def test_damage_is_named_and_the_one_before_used(tmp_path, harm, name, named):
    checkpoints = Checkpointer(tmp_path, keep=2)
    for step in (10, 20):
        checkpoints.save(step, some_state(step), {}, META)
    checkpoints.close()
    harm(tmp_path / "step_000020" / name)

    checkpoints = Checkpointer(tmp_path, keep=2)
    step, warnings = checkpoints.latest()
    assert step == 10
    assert len(warnings) == 1
    with pytest.raises(files.DamagedCheckpoint, match=f"step_000020 is damaged: {named}"):
        checkpoints.load(20, some_state())
    assert warnings == [checkpoints.verify(20)]
    loaded = some_state()
    checkpoints.load(10, loaded)
    assert same(loaded, some_state(10))
    # Of two to keep, one that is known to be damaged is none.
    checkpoints.save(30, some_state(30), {}, META)
    checkpoints.close()
    assert names(tmp_path) == ["step_000010", "step_000030"]


def test_another_architecture_is_one_clear_line(tmp_path):
    checkpoints = Checkpointer(tmp_path, keep=1)
    checkpoints.save(1, some_state(), {}, META)

    def refusal(state, config=None):
        with pytest.raises(UserError) as error:
            checkpoints.load(1, state, model_config=config)
        assert "\n" not in str(error.value)
        return str(error.value).removeprefix(
            f"{tmp_path / 'step_000001'} is of another architecture: "
        )

    other = some_state()
    config = {"n_layer": 3, "n_embd": 16, "window": (4, 8), "softcap": None}
    assert (
        refusal(other, config) == "n_layer is 2 there, 3 here; softcap is missing there, None here"
    )
    other["model"]["wte.weight"] = torch.zeros(33, 17)
    other["model"]["h.0"] = torch.zeros(2)
    del other["model"]["lm_head.weight"]
    other["optimizer"] = {}
    assert refusal(other) == (
        "model.wte.weight is (33, 17) bfloat16 there, (33, 17) float32 here; "
        "model.h.0 is missing there, (2,) float32 here; "
        "model.lm_head.weight is (33, 17) float32 there, missing here"
    )
    assert refusal({"model": {f"h.{i}": torch.zeros(1) for i in range(9)}}).endswith("; and 8 more")
    # A part of what was saved is no other architecture.
    model = {"model": some_state(1)["model"]}
    checkpoints.load(1, model)
    assert same(model, {"model": some_state()["model"]})
    checkpoints.close()


def test_a_pickle_that_runs_code_is_not_loaded(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(files.DamagedCheckpoint, match=r"posix\.mkdir has no place in a checkpoint"):
        files.Reader(tmp_path).read_metadata()
    assert not (tmp_path / "harm").exists()


def test_a_disk_too_small_is_told_before_writing(tmp_path, monkeypatch):
    said: list[str] = []
    checkpoints = Checkpointer(tmp_path, keep=3, say=said.append)
    checkpoints.save(1, some_state(), {}, META)
    checkpoints.wait()
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    state = {"w": torch.zeros(1000, 1000)}
    told = r"disk full: .*step_000002.partial needs 0.004 GB .*, 0.002 GB are free; .*keep=3"
    checkpoints.save(2, state, {}, META)
    assert re.match(f"not saved: {told}", said.pop())
    assert names(tmp_path) == ["step_000001"]
    # The last save of a run is waited for, and its failure is the run's.
    with pytest.raises(UserError, match=told):
        checkpoints.close()
    (tmp_path / "file").write_text("")
    checkpoints = Checkpointer(tmp_path / "file" / "below", keep=1)
    checkpoints.save(1, state, {}, META)
    with pytest.raises(UserError, match=r"cannot write checkpoints in .*file/below"):
        checkpoints.close()


def test_after_a_save_that_the_disk_refused_the_next_one_is_tried(tmp_path, monkeypatch):
    said: list[str] = []
    checkpoints = Checkpointer(tmp_path, keep=3, say=said.append)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
        checkpoints.save(1, some_state(1), {}, META)
    assert len(said) == 1
    write_file = files.Writer.write_file

    def fail(self, name, data):
        raise OSError(errno.EIO, "Input/output error", name)

    monkeypatch.setattr(files.Writer, "write_file", fail)
    checkpoints.save(2, some_state(2), {}, META)
    while len(said) < 2:
        # Told when it happens, not a save later.
        time.sleep(0.01)
    failure = r"saving .*step_000002 failed: \[Errno 5\] Input/output error: 'rank_00000.pt'"
    assert re.fullmatch(f"not saved: {failure}", said[1])
    monkeypatch.setattr(files.Writer, "write_file", write_file)
    checkpoints.save(3, some_state(3), {}, META)
    checkpoints.close()
    assert names(tmp_path) == ["step_000003"]
    assert len(said) == 2


def test_what_is_not_the_disks_fault_is_raised_at_the_next_save(tmp_path, monkeypatch):
    def fail(self, name, data):
        raise KeyError(name)

    monkeypatch.setattr(files.Writer, "write_file", fail)
    checkpoints = Checkpointer(tmp_path, keep=3)
    checkpoints.save(1, some_state(), {}, META)
    with pytest.raises(RuntimeError, match=r"saving .*step_000001 failed: 'rank_00000.pt'"):
        checkpoints.save(2, some_state(), {}, META)
    checkpoints.close()
