"""Horizons, learning rates and momenta against numbers worked out by hand."""

import pytest

from gptfast.config import HorizonSettings, preset
from gptfast.errors import UserError
from gptfast.schedule import horizon, learning_rate_multiplier, muon_momentum

# A d20 with a vocabulary of 65,536 and the reference's batch.
D20 = {"n_params": 560_988_160, "flops_per_token": 3_491_758_080, "total_batch_size": 524_288}


def test_d20_trains_for_21400_steps():
    assert horizon(**D20) == 21_400
    assert horizon(**D20) * D20["total_batch_size"] == 11_219_763_200


def test_target_flops_round_to_the_nearest_step():
    one_step = D20["flops_per_token"] * D20["total_batch_size"]
    assert horizon(**D20, target_flops=3.917e19) == 21_396
    assert horizon(**D20, target_flops=7.4 * one_step) == 7
    assert horizon(**D20, target_flops=7.6 * one_step) == 8


def test_the_most_explicit_request_wins():
    asked = {"iterations": 3, "tokens": 5 * 524_288 + 1, "target_flops": 3.917e19}
    assert horizon(**D20, **asked) == 3
    asked.pop("iterations")
    assert horizon(**D20, **asked) == 5
    asked.pop("tokens")
    assert horizon(**D20, **asked) == 21_396
    assert horizon(**D20, tokens_per_param=10.0) == 10_700
    assert horizon(**D20) == 21_400


def test_on_a_cpu_a_run_has_60_steps_unless_a_length_is_given():
    settings = preset(on_gpu=False, processes=1)
    assert settings.horizon.iterations(settings.system.device) == 60
    assert HorizonSettings(num_iterations=7).iterations("cpu") == 7
    assert HorizonSettings(target_tokens=5_000_000).iterations("cpu") is None
    assert HorizonSettings().iterations("auto") is None


def test_two_lengths_of_a_run_are_refused():
    with pytest.raises(UserError, match=r"iterations 60 and target_tokens 5e.06: a run has one"):
        HorizonSettings(num_iterations=60, target_tokens=5_000_000)


@pytest.mark.parametrize(
    "asked",
    [{"iterations": 0}, {"tokens": 524_287}, {"target_flops": 1e12}, {"tokens_per_param": 1e-4}],
    ids=lambda asked: next(iter(asked)),
)
def test_a_run_without_steps_is_refused_with_its_numbers(asked):
    with pytest.raises(UserError, match=r"524288 tokens gives 0 steps; at least 1"):
        horizon(**D20, **asked)


def test_warm_down_covers_the_last_fifth():
    rate = [learning_rate_multiplier(step, 21_400) for step in range(21_400)]
    assert rate[:17_121] == [1.0] * 17_121
    assert rate[17_121] == 4279 / 4280
    assert rate[19_260] == 0.5
    assert rate[-1] == 1 / 4280
    assert learning_rate_multiplier(21_400, 21_400) == 0.0


def test_warm_up_counts_from_one_and_the_line_ends_at_the_final_fraction():
    options = {"warmup_ratio": 0.2, "warmdown_ratio": 0.4, "final_fraction": 0.1}
    rate = [learning_rate_multiplier(step, 10, **options) for step in range(11)]
    assert rate == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1])


def test_a_warm_down_of_the_whole_run_is_a_straight_line():
    rate = [learning_rate_multiplier(step, 4, warmdown_ratio=1.0) for step in range(4)]
    assert rate == [1.0, 0.75, 0.5, 0.25]


def test_no_warm_down_and_a_run_of_one_step():
    assert learning_rate_multiplier(9, 10, warmdown_ratio=0.0) == 1.0
    assert learning_rate_multiplier(0, 1) == 1.0


@pytest.mark.parametrize(
    "ratios",
    [
        {"warmup_ratio": 0.5, "warmdown_ratio": 0.6},
        {"warmup_ratio": -0.1},
        {"warmdown_ratio": -0.1},
    ],
    ids=["overlap", "negative-warmup", "negative-warmdown"],
)
def test_ratios_that_do_not_fit_one_run_are_refused(ratios):
    with pytest.raises(UserError, match="shares of one run"):
        learning_rate_multiplier(0, 10, **ratios)


def test_momentum_rises_over_300_steps():
    assert muon_momentum(0) == 0.85
    assert muon_momentum(150) == pytest.approx(0.90)
    assert muon_momentum(299) < 0.95
    assert muon_momentum(300) == muon_momentum(100_000) == 0.95
    assert muon_momentum(0, ramp_steps=0) == 0.95
