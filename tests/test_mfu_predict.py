"""The model of step time: near what was measured, sane where nothing was."""

import json
import math
from dataclasses import replace

import pytest

from bench import mfu_predict
from bench.mfu_predict import PredictSettings, lines, measured_points, on_gpus
from gptfast.errors import UserError
from gptfast.model import GPTConfig

D20 = GPTConfig()


def test_within_3_percent_of_every_measured_step():
    """Of the newest code on one GPU, and of the newest that ran on two and on four."""
    points = measured_points()
    assert [(p.run["gpus"], p.newest) for p in points] == [(1, True), (2, False), (4, False)]
    assert all(p.one["gpus"] == 1 and p.one["commit"] == p.run["commit"] for p in points)
    one, *more = points
    assert one.ratio() == pytest.approx(1, rel=1e-9)
    for point in more:
        assert point.ratio() == pytest.approx(1, abs=0.03)


def test_the_check_is_of_the_newest_runs_and_tells_the_ratio():
    """And of more GPUs, with older code, from one GPU of that code."""
    said = lines(PredictSettings())[1:4]
    newest = measured_points()[0].run
    assert said[0].endswith(
        "measured {step_ms} ms, model {step_ms} ms, 1.000 of it (commit {commit}, the model's "
        "input)".format(**newest)
    )
    assert said[1].endswith(
        "measured 399.3 ms, model 400.0 ms, 1.002 of it (commit 3d59047, older code, whose "
        "404.2 ms on one GPU are the input)"
    )
    assert said[2].endswith(
        "measured 419.9 ms, model 410.3 ms, 0.977 of it (commit 65bba56, older code, whose "
        "424.4 ms on one GPU are the input)"
    )


def test_8_to_1024_gpus_each_with_a_mesh_of_that_many():
    at = PredictSettings()
    steps = []
    for power in range(3, 11):
        found = on_gpus(2**power, D20, at)
        assert found.shards * found.replicas == 2**power
        steps.append(found.step)
    # The same tokens a GPU: more GPUs never make a step shorter by more than the optimizer's part.
    assert max(steps) < 1.1 * min(steps)


@pytest.mark.parametrize("gbit", [1.0, 400.0, 1e6])
def test_the_mesh_is_the_one_that_training_makes(gbit):
    """As few nodes of one size as can be, sharded each, whatever the network's speed."""
    for node_gpus, meshes in {
        8: {8: (8, 1), 16: (8, 2), 1024: (8, 128)},
        4: {8: (4, 2), 64: (4, 16)},
        6: {8: (4, 2), 24: (6, 4)},
        72: {64: (64, 1), 128: (64, 2)},
    }.items():
        at = PredictSettings(network_gbit=gbit, node_gpus=node_gpus)
        found = {gpus: on_gpus(gpus, D20, at) for gpus in meshes}
        assert {n: (p.shards, p.replicas) for n, p in found.items()} == meshes


def test_a_slow_network_costs():
    fast, slow = (on_gpus(64, D20, PredictSettings(network_gbit=gbit)) for gbit in (400.0, 25.0))
    assert slow.step > 1.2 * fast.step


def test_a_fixed_batch_is_split_until_a_gpu_has_no_sequence_left():
    at = PredictSettings(total_batch_size=524_288)
    assert [on_gpus(gpus, D20, at).batch for gpus in (8, 64, 256)] == [32, 4, 1]
    assert on_gpus(4, D20, at).passes == 2
    with pytest.raises(UserError, match="256 sequences a step cannot be shared"):
        on_gpus(512, D20, at)


def test_no_sequence_of_a_batch_is_dropped():
    """37 sequences of each of 8 GPUs are 37 passes, as no fewer that fit share them equally."""
    found = on_gpus(8, D20, PredictSettings(total_batch_size=8 * 37 * 2048))
    assert (found.passes, found.batch) == (37, 1)
    found = on_gpus(8, D20, PredictSettings(total_batch_size=8 * 36 * 2048))
    assert (found.passes, found.batch) == (2, 18)
    at = PredictSettings(total_batch_size=8 * 37 * 2048)
    row = next(line for line in lines(at) if line.startswith("   16"))
    assert row.endswith("296 sequences a step cannot be shared equally by so many")
    for total, near in ((1_000_000, "999,424 or 1,001,472"), (5, "2,048"), (0, "2,048")):
        with pytest.raises(UserError, match=f"no multiple of the 2,048 .* are: {near}$"):
            PredictSettings(total_batch_size=total)


def test_what_does_not_fit_the_memory_of_a_node_is_told_with_the_numbers():
    d32 = GPTConfig.from_depth(32, vocab_size=65536)
    at = PredictSettings(device_batch_size=2, gpu_memory_gib=22.0)
    assert on_gpus(64, d32, at).shards == 8
    for node_gpus, need in ((1, "32.5"), (2, "21.5")):
        with pytest.raises(UserError, match=f"1 x 2 sequences a GPU take {need} of 22 GiB, 92%"):
            on_gpus(64, d32, replace(at, node_gpus=node_gpus))


def test_predictions_are_labelled_and_the_check_comes_first(tmp_path, monkeypatch):
    said = lines(PredictSettings())
    assert said[0].startswith("Checked against measured steps")
    label = next(i for i, line in enumerate(said) if line.startswith("PREDICTIONS"))
    assert "nothing below was run" in said[label]
    assert [line.split()[0] for line in said[label + 2 : label + 10]] == [
        str(2**power) for power in range(3, 11)
    ]
    bad = tmp_path / "base.json"
    bad.write_text(json.dumps({})[:1])
    monkeypatch.setattr(mfu_predict, "BASE", bad)
    with pytest.raises(UserError, match="the prediction needs"):
        lines(PredictSettings())


@pytest.mark.parametrize("number", [math.nan, math.inf, 0.0, -400.0])
@pytest.mark.parametrize("name", ["network_gbit", "gpu_memory_gib"])
def test_a_quantity_that_is_none_is_refused(name, number):
    with pytest.raises(UserError, match=f"{name} must be a number above 0, got {number}"):
        PredictSettings(**{name: number})
