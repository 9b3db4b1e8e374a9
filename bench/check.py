"""Correct before timed: every provider of a case against an fp32 reference."""

import inspect
import textwrap
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench.case import Buffers, Case, gradients, outputs
from bench.providers import DISTRIBUTIONS, EAGER, OURS, installed, missing

# At most this many times the error of PyTorch's own bf16 maths: for ours the rule of the tests; a
# rival may be less exact, which its row shows, but has to compute the same thing.
LARGEST_RATIO = 2.0
LARGEST_RATIO_OF_RIVALS = 10.0
# Of eager itself, the measure of all others, relative to the reference.
LARGEST_EAGER_ERROR = 0.1
# Errors below count as this: an eighth of bf16's spacing, half of what rounding once costs.
SMALLEST_ERROR = torch.finfo(torch.bfloat16).eps / 8


def results(call: Any, buffers: Buffers, names: Iterable[str]) -> dict[str, Tensor]:
    """Every output, y0, y1, ..., and every gradient, d and the name of its argument."""
    values = outputs(call, buffers)
    named = {f"y{i}": y.detach() for i, y in enumerate(values)}
    if buffers.grads:
        pairs = zip(names, buffers.arguments)
        wanted = [name for name, t in pairs if isinstance(t, Tensor) and t.requires_grad]
        grads = gradients(values, buffers)
        named |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return named


def error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth||, NaN where value has one."""
    norm = torch.linalg.vector_norm
    return (norm(value.float() - truth) / norm(truth)).item()


def error_ratio(errors: Mapping[str, float], eager: Mapping[str, float]) -> float:
    """The worst tensor's error by eager's error of that tensor."""
    ratios = [
        max(e, SMALLEST_ERROR) / max(eager[name], SMALLEST_ERROR) if e == e else e
        for name, e in errors.items()
    ]
    return max(ratios, key=lambda ratio: (ratio != ratio, ratio))


class Check:
    """The providers of one case that run here, and each one's errors.

    calls: provider -> its call, for those that ran and are right
    errors: provider -> tensor -> error
    notes: provider -> why there is nothing to time
    failures: provider -> what went wrong, for the provider's own test to raise

    Of a package that is a guest here, an operator that cannot be imported, built or called is not a
    failure: its versions and those of what it stands on are its users' affair. Its row says why.
    One that computes something else fails, as that may well be our call of it.
    """

    def __init__(self, case: Case, names: Iterable[str]):
        self.case = case
        self.calls: dict[str, Any] = {}
        self.errors: dict[str, dict[str, float]] = {}
        self.notes: dict[str, str] = {}
        self.failures: dict[str, Exception] = {}
        torch.manual_seed(0)
        for name in names:
            if note := missing(name):
                self.notes[name] = note
            else:
                self.attempt(name, self._load, name)
        self._compare()
        self._judge()

    def attempt(self, provider: str, work: Callable[..., None], *args: Any) -> None:
        """work(*args); if a rival fails in it, that is noted and the rival is out."""
        try:
            work(*args)
        except Exception as problem:
            if provider == OURS:
                raise
            said = f"{type(problem).__name__}: {problem}"
            if isinstance(problem, torch.OutOfMemoryError):
                self._drop(provider, "out of memory", problem)
            elif provider in DISTRIBUTIONS:
                package = DISTRIBUTIONS[provider]
                reason = f"not available: {package} {installed(package)}: {said}"
                self._drop(provider, reason, problem)
            else:
                self._fail(provider, said, problem)

    def _fail(self, provider: str, note: str, problem: Exception) -> None:
        if provider == OURS:
            raise problem
        self._drop(provider, note, problem)
        self.failures[provider] = problem

    def _drop(self, provider: str, note: str, problem: Exception) -> None:
        self.calls.pop(provider, None)
        # The frames that it went through would keep their tensors.
        traceback.clear_frames(problem.__traceback__)
        self.notes[provider] = textwrap.shorten(note, 200, placeholder=" ...")

    def _load(self, name: str) -> None:
        self.calls[name] = self.case.providers[name]()

    def _compare(self) -> None:
        case = self.case
        buffers = Buffers.of(case, self.calls[OURS])
        names = list(inspect.signature(case.reference).parameters)
        truth = results(case.reference, buffers.fp32(), names)

        def compare(name: str) -> None:
            own = buffers.copies() if name in case.clobbering else buffers
            found = results(self.calls[name], own, names)
            self.errors[name] = {key: error(found[key], truth[key]) for key in truth}

        for name in list(self.calls):
            self.attempt(name, compare, name)

    def _judge(self) -> None:
        # Where eager does not fit into memory, ours takes its place.
        measure = EAGER if EAGER in self.errors else OURS
        eager = self.errors[measure]
        if not max(eager.values()) <= LARGEST_EAGER_ERROR:
            raise AssertionError(
                f"{self.case.name}: {measure} is not the reference's maths: {eager}"
            )
        for name, errors in self.errors.items():
            ratio = error_ratio(errors, eager)
            limit = LARGEST_RATIO if name == OURS else LARGEST_RATIO_OF_RIVALS
            if not ratio <= limit:
                problem = AssertionError(
                    f"{self.case.name}, {name}: {ratio:.3g} x PyTorch's error, over {limit:g}; "
                    f"relative to fp32 {errors}, PyTorch's {eager}"
                )
                self._fail(name, f"wrong: error ratio {ratio:.3g}", problem)

    def ratio(self, provider: str) -> float | None:
        """None for a floor, and where eager did not fit into memory."""
        if provider not in self.errors or EAGER not in self.errors:
            return None
        return error_ratio(self.errors[provider], self.errors[EAGER])
