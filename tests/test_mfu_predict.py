"""The model of step time: near what was measured, sane where nothing was."""

import json
import math

import pytest

from bench import mfu_predict
from bench.mfu_predict import PredictSettings, best, lines, measured_points
from gptfast.errors import UserError
from gptfast.model import GPTConfig

D20 = GPTConfig()


def test_within_3_percent_of_every_measured_step():
    """Of the newest code on one GPU and on two, and of the newest that ran on four."""
    points = measured_points()
    assert [(p.run["gpus"], p.newest) for p in points] == [(1, True), (2, True), (4, False)]
    assert all(p.one["gpus"] == 1 and p.one["commit"] == p.run["commit"] for p in points)
    one, *more = points
    assert one.ratio() == pytest.approx(1, rel=1e-9)
    for point in more:
        assert point.ratio() == pytest.approx(1, abs=0.03)


def test_the_check_is_of_the_newest_runs_and_tells_the_ratio():
    """And of four GPUs, with older code, from one GPU of that code."""
    said = lines(PredictSettings())[1:4]
    assert said[0].endswith(
        "measured 404.2 ms, model 404.2 ms, 1.000 of it (commit 3d59047, the model's input)"
    )
    assert said[1].endswith("measured 399.3 ms, model 400.0 ms, 1.002 of it (commit 3d59047)")
    assert said[2].endswith(
        "measured 419.9 ms, model 410.3 ms, 0.977 of it (commit 65bba56, older code, whose "
        "424.4 ms on one GPU are the input)"
    )


def test_8_to_1024_gpus_each_with_a_mesh_of_that_many():
    at = PredictSettings()
    steps = []
    for power in range(3, 11):
        found = best(D20, 2**power, at)
        assert found.shards * found.replicas == 2**power
        steps.append(found.step)
    # The same tokens a GPU: more GPUs never make a step shorter by more than the optimizer's part.
    assert max(steps) < 1.1 * min(steps)


def test_a_slow_network_costs_and_replicates_more():
    fast, slow = (best(D20, 64, PredictSettings(network_gbit=gbit)) for gbit in (400.0, 25.0))
    assert slow.step > 1.2 * fast.step
    assert slow.shards <= PredictSettings().node_gpus


def test_a_fixed_batch_is_split_until_a_gpu_has_no_sequence_left():
    at = PredictSettings(total_batch_size=524_288)
    assert [best(D20, gpus, at).batch for gpus in (8, 64, 256)] == [32, 4, 1]
    assert best(D20, 4, at).passes == 2
    assert best(D20, 512, at) is None


def test_no_sequence_of_a_batch_is_dropped():
    """37 sequences of each of 8 GPUs are 37 passes, as no fewer that fit share them equally."""
    found = best(D20, 8, PredictSettings(total_batch_size=8 * 37 * 2048))
    assert (found.passes, found.batch) == (37, 1)
    found = best(D20, 8, PredictSettings(total_batch_size=8 * 36 * 2048))
    assert (found.passes, found.batch) == (2, 18)
    at = PredictSettings(total_batch_size=8 * 37 * 2048)
    assert best(D20, 16, at) is None
    row = next(line for line in lines(at) if line.startswith("   16"))
    assert row.endswith("296 sequences a step cannot be shared equally by so many")
    for total, near in ((1_000_000, "999,424 or 1,001,472"), (5, "2,048"), (0, "2,048")):
        with pytest.raises(UserError, match=f"no multiple of the 2,048 .* are: {near}$"):
            PredictSettings(total_batch_size=total)


def test_a_model_that_fits_only_sharded_is_sharded():
    at = PredictSettings(device_batch_size=2, gpu_memory_gib=22.0)
    found = best(GPTConfig.from_depth(32, vocab_size=65536), 64, at)
    assert found.shards > 1
    assert best(GPTConfig.from_depth(64, vocab_size=65536), 8, at) is None


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
