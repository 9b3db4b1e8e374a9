"""The server's benchmark at toy size, and how it counts."""

import pytest

from bench.serve import Settings, measure, table
from bench.serve_load import Answer, quantile


def test_a_toy():
    """Everything but its size is as on a GPU."""
    settings = Settings(
        depth=1,
        vocab_size=300,
        sequence_len=128,
        streams=4,
        prompt_tokens=8,
        tokens=12,
        seconds=1.0,
        device="cpu",
    )
    result = measure(settings, in_process=False)
    served = result["served"]
    assert served["errors"] == []
    assert served["answers"] >= served["streams"] == 4
    assert 6 <= served["answer_tokens"] <= 18
    # 4 characters a token, and what a conversation adds.
    # And those of the conversation around it.
    assert 8 <= served["prompt_tokens"] <= 8 + 6
    assert 0 < served["tokens_per_s"] < 2 * result["engine_tokens_per_s"]
    assert result["share"] == served["tokens_per_s"] / result["engine_tokens_per_s"]
    first = served["first_ms"]
    assert 0 < first["p50"] <= first["p95"] <= first["most"]
    lines = table(result)
    assert lines[0].startswith("4 at a time")
    assert sum("met" in line.lower() for line in lines) == 2


def test_tokens_count_where_they_were_written():
    answer = Answer(asked=0.0, first=10.0, last=20.0, tokens=100)
    assert answer.tokens_between(0, 100) == 100
    assert answer.tokens_between(12, 15) == pytest.approx(30)
    assert answer.tokens_between(15, 100) == pytest.approx(50)
    assert answer.tokens_between(20, 30) == answer.tokens_between(0, 10) == 0


def test_quantiles():
    values = [float(i) for i in range(1, 101)]
    assert [quantile(values, q) for q in (0.5, 0.95, 1.0)] == [50, 95, 100]
    assert quantile([7.0], 0.95) == 7
    assert quantile([], 0.5) == 0
