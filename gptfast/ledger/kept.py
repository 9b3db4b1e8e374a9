"""The ledger as JSON: written, and read again with every field checked."""

import json
from dataclasses import asdict
from inspect import Parameter, signature
from math import inf
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from gptfast import hardware
from gptfast.errors import UserError
from gptfast.ledger.book import Ledger, checks

FORMAT = "gptfast ledger 1"
FORMULA = "6 x (blocks + head) + 12 L H D T FLOPs a token (full square, no recomputation)"


def to_json(ledger: Ledger) -> dict:
    job = ledger.job
    return {
        "format": FORMAT,
        "formula": FORMULA,
        "device": ledger.device,
        "job": {**job._asdict(), "config": job.config.to_dict()},
        "settings": ledger.settings,
        "environment": ledger.environment,
        "ceilings": asdict(ledger.ceilings) if ledger.ceilings else None,
        "steps": ledger.steps,
        "step_ms": ledger.step_ms,
        "unprofiled_step_ms": ledger.unprofiled_step_ms,
        "tokens_per_second_per_gpu": ledger.tokens_per_second,
        "flops_per_second": ledger.flops_per_second(),
        "mfu_report": hardware.mfu(ledger.flops_per_second(), hardware.REPORT_PEAK_FLOPS)
        if ledger.own_peak
        else None,
        "mfu_own_peak": ledger.mfu(),
        "checks": checks(ledger),
        "parts": ledger.parts,
        "rows": [asdict(row) for row in ledger.rows],
    }


def read_json(path: Path) -> Ledger:
    """A kept ledger. UserError for what is none, was cut off, or is damaged: which field is not
    what it should be."""
    try:
        kept = _made(dict, json.loads(path.read_text(encoding="utf-8")), "")
        if not kept.keys() >= {"format", "formula"}:
            raise ValueError("format or formula is missing")
        if (kept["format"], kept["formula"]) != (FORMAT, FORMULA):
            raise UserError(
                f"{path} is a ledger of another kind: {kept['format']!r} with {kept['formula']!r}, "
                f"this program writes {FORMAT!r} with {FORMULA!r}"
            )
        ledger = _made(Ledger, kept, "")
        ms = min(ledger.step_ms, ledger.best_step_ms)
        if ms <= 0 or not ledger.rows:
            raise ValueError(f"{len(ledger.rows)} rows and {ms} ms are no step")
        return ledger
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no ledger of `python -m bench.mfu --out`, or it is damaged: {error}"
        ) from error


def _made(kind: Any, value: Any, name: str) -> Any:
    """What JSON says as this type: str, dict, float, int (a count here), X | None, a tuple, or a
    class by its fields; what else an object says is left out. ValueError with the name of the first
    field that is something else."""
    inner = get_args(kind)
    if NoneType in inner:
        return None if value is None else _made(inner[0], value, name)
    if get_origin(kind) is tuple:
        _expect("a list", isinstance(value, list), value, name)
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        _expect(f"one of {len(kinds)}", len(value) == len(kinds), value, name)
        return tuple(_made(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    if kind in (int, float):
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        if kind is int:
            _expect("a whole number of at least 1", number and value >= 1, value, name)
        _expect("a finite number", number and abs(value) < inf, value, name)
    elif kind is str:
        _expect("text", isinstance(value, str), value, name)
    else:
        _expect("an object", isinstance(value, dict), value, name)
    return value if kind in (int, float, str, dict) else _of_fields(kind, value, name)


def _of_fields(kind: Any, value: dict, name: str) -> Any:
    hints, fields = get_type_hints(kind), {}
    for field, parameter in signature(kind).parameters.items():
        inside = f"{name}.{field}" if name else field
        if field in value:
            fields[field] = _made(hints[field], value[field], inside)
        elif parameter.default is Parameter.empty:
            raise ValueError(f"{inside} is missing")
    try:
        return kind(**fields)
    except UserError as error:
        raise ValueError(f"{name}: {error}") from error


def _expect(expected: str, right: bool, value: object, name: str) -> None:
    if not right:
        told = repr(value)[:40]
        if isinstance(value, dict | list):
            told = f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
        raise ValueError(f"{name or 'it'} is {told}, not {expected}")
