"""The calculator says what Python's eval would, or nothing."""

import random
import re
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gptfast.engine.calculator import calculate

GSM8K = Path(__file__).parents[2] / "shared/data/chat_eval/gsm8k/main"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2", "3"),
        ("48/2", "24.0"),
        ("7//2", "3"),
        ("0.1+0.2", "0.30000000000000004"),
        ("1,000*2", "2000"),
        ("2*(3+4)-5", "9"),
        (" 2 * ( 3 + 4 ) ", "14"),
        ("-5", "-5"),
        ("2--3", "5"),
        ("-(1-2)*+3", "3"),
        ("8-2-1", "5"),
        ("8/2/2", "2.0"),
        (".5+5.", "5.5"),
        ("007.5", "7.5"),
        ("-0.0", "-0.0"),
        ("00", "0"),
        ("((((1))))", "1"),
    ],
)
def test_value_as_python_writes_it(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        "()",
        "1/0",
        "1//(2-2)",
        "2**3",
        "2* *3",
        "1/ /2",
        "012",
        "1 2",
        "1.2.3",
        "1..2",
        ".",
        "5(3)",
        "(1",
        "1)",
        "1+",
        "*2",
        "1e5",
        "1_000",
        "0x10",
        "1j",
        "x",
        "7%2",
        "1<2",
        "1\n+2",
        "\u0663+1",
        "__import__('os')",
        "'a'*9",
    ],
)
def test_none_for_everything_else(expression: str) -> None:
    assert calculate(expression) is None


def test_size_is_bounded() -> None:
    assert calculate("9" * 256) == "9" * 256
    assert calculate("9" * 257) is None
    assert calculate("(" * 32 + "1" + ")" * 32) == "1"
    assert calculate("(" * 33 + "1" + ")" * 33) is None
    assert calculate("-" * 255 + "1") == "-1"
    # The largest results that the allowed length can make are numbers still.
    assert calculate("*".join(["9" * 126] * 2)) == str((10**126 - 1) ** 2)
    assert calculate("/".join(["9." + "9" * 50, "." + "0" * 190 + "1"])) == "1e+192"


def test_random_expressions_agree_with_eval() -> None:
    rng = random.Random(0)
    agreed = 0
    for _ in range(20_000):
        text = "".join(rng.choices("0123456789.+-*/() ", k=rng.randint(1, 9)))
        # What eval makes of other things is an error, a tuple or a power.
        expected = None
        if "**" not in text:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SyntaxWarning)
                    found = eval(text, {"__builtins__": {}})
                expected = str(found) if isinstance(found, int | float) else None
            except (SyntaxError, ZeroDivisionError, TypeError):
                pass
        assert calculate(text) == expected, text
        agreed += expected is not None
    assert agreed > 1000


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no {GSM8K}")
def test_gsm8k_traces() -> None:
    """Every calculation in the answers has the value that eval gives; most read the same."""
    answers = [
        answer
        for split in ("train", "test")
        for answer in pq.read_table(GSM8K / f"{split}-00000-of-00001.parquet")["answer"].to_pylist()
    ]
    calls = [call.rsplit("=", 1) for answer in answers for call in re.findall("<<(.+?)>>", answer)]
    values = [calculate(expression) for expression, _ in calls]
    assert values == [str(eval(expression.replace(",", ""))) for expression, _ in calls]
    assert len(values) == 27_998
    # The others are such as 48/2=24, where Python says 24.0.
    assert sum(value == result for value, (_, result) in zip(values, calls)) == 20_508
