"""The figures of the report that ours is measured against."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from gptfast import hardware
from gptfast.report.spelling import short_gpu

# Settings of the reference that have another name here.
ALIASES = {"max_seq_len": "sequence_len", "task_name": "task"}


@cache
def reference() -> Mapping:
    """The content of reference.json, which names its source. Asterisks that its Markdown had
    swallowed are put back."""
    text = Path(__file__).with_name("reference.json").read_text(encoding="utf-8")
    return json.loads(text)


def hardware_name() -> str:
    """ "8 x A100-SXM4-80GB": what every figure of the reference was measured on."""
    return f"{reference()['gpus']} × {short_gpu(reference()['gpu'])}"


def gpu_peak() -> float:
    """Dense bf16 FLOP/s of one of the reference's GPUs."""
    own = hardware.peak(reference()["gpu"])
    assert own is not None, "a GPU of hardware's table"
    return own.bf16_flops
