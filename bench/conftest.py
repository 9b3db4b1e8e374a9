"""`pytest bench/`: every kernel against its rivals and against what this GPU can do.

    pytest bench/                                      # d20, on one GPU
    pytest bench/ --all-shapes --json now.json --chart now.png
    pytest bench/ --compare kept.json --max-loss 0.05  # fails on a loss to torch.compile
    pytest bench/test_rms_norm.py -k backward
    pytest bench/test_chat_evaluation.py               # of minutes, so only by name

Each test is one provider's pass of one operator. The first test of a group measures all of the
group's providers, interleaved (bench/timing.py); each test then hands its provider's samples to
pytest-benchmark, so that --benchmark-json, --benchmark-verbose and the like work as they do
everywhere. Without a GPU nothing is timed: ours and eager are compared with the reference on tiny
shapes, and the ahead-of-time table is shown.

A rival's package that is missing is skipped, or fails the session with --require-rivals. One
operator of an installed package that cannot be imported or built here is a row that says why, with
the package's version, and no failure: QuACK 0.6.5's linear cross-entropy, say, cannot be imported
beside nvidia-cutlass-dsl 4.8.1, which satisfies its requirements.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import aot
from bench.case import Case, Size, sizes
from bench.marks import SIZE as MARKED_SIZE
from bench.marks import marks
from bench.providers import DISTRIBUTIONS, EAGER, OURS, missing
from bench.report import (
    agreement,
    chart,
    compare,
    environment,
    read_json,
    table,
    write_json,
)
from bench.suite import Result, Suite
from bench.timing import LOAD_MS, Samples, gpu_here

SUITE = pytest.StashKey[Suite]()
LINES = pytest.StashKey[list[str]]()
# Minutes long: the selection without arguments is to end within six on one H200.
ONLY_BY_NAME = ("test_chat_evaluation.py",)
NO_GPU = (
    "No CUDA GPU here, so nothing is timed: ours and eager were compared with the reference at "
    "tiny shapes, and this is what the kernels compile to (`python -m bench.aot` makes it anew)."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "kernels against their rivals")
    group.addoption("--all-shapes", action="store_true", help="d12, d26 and d32 besides d20")
    group.addoption(
        "--require-rivals",
        action="store_true",
        help="fail if liger-kernel or QuACK is not installed",
    )
    group.addoption(
        "--load-ms",
        type=float,
        default=LOAD_MS,
        metavar="MS",
        help="how long products go on before each sample (%(default)g); 0 times a rested card",
    )
    group.addoption(
        "--no-do-bench",
        action="store_true",
        help="do not time ours with triton.testing.do_bench as well",
    )
    group.addoption("--json", type=Path, metavar="FILE", help="write everything measured")
    group.addoption("--chart", type=Path, metavar="FILE", help="write a PNG: ours by each rival")
    group.addoption("--compare", type=Path, metavar="KEPT", help="a JSON to compare with")
    group.addoption(
        "--max-loss",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="with --compare: fail if a pass lost more of its ratio to torch.compile (%(default)s)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """One process: the tests' `-n 2` (pyproject.toml) would share the GPU."""
    if config.pluginmanager.hasplugin("xdist"):
        config.option.numprocesses = 0


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    name = collection_path.name
    named = {Path(argument.partition("::")[0]).name for argument in config.args}
    return True if name in ONLY_BY_NAME and name not in named else None


def pytest_configure(config: pytest.Config) -> None:
    # The tests make errors of warnings; here rivals and compilers are guests and may warn.
    config.addinivalue_line("filterwarnings", "default")
    option = config.option
    config.stash[SUITE] = suite = Suite(gpu_here(), option.load_ms, not option.no_do_bench)
    # Our table says the same and more; --benchmark-verbose shows pytest-benchmark's too.
    config.option.benchmark_quiet = True
    absent = [reason for provider in DISTRIBUTIONS if (reason := missing(provider))]
    if config.option.require_rivals and absent:
        raise pytest.UsageError(f"--require-rivals: {', '.join(absent)}")
    for flag in ("--json", "--chart"):
        refuse_missing_folder(flag, config.getoption(flag))
    if config.option.compare is not None:
        refuse_other_gpu(config.option.compare, suite.gpu.name if suite.gpu else "no CUDA GPU")
    if suite.gpu is not None and not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("bench/ needs pytest-benchmark: pip install -e '.[bench]'")


def refuse_missing_folder(flag: str, file: Path | None) -> None:
    """UsageError, before anything is measured, if the file has no folder to be written to."""
    if file is not None and not file.absolute().parent.is_dir():
        raise pytest.UsageError(f"{flag} {file}: there is no folder {file.parent}")


def refuse_other_gpu(kept: Path, here: str) -> None:
    """UsageError unless `kept` is a session's JSON, measured on a GPU of the name `here`."""
    try:
        there, _ = read_json(kept)
    except (OSError, ValueError) as problem:
        raise pytest.UsageError(f"--compare: {problem}") from problem
    if here != there:
        raise pytest.UsageError(
            f"--compare: {kept} was measured on {there}, here is {here}; ratios hold on one kind "
            "of GPU only"
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        config = metafunc.config
        on_gpu = config.stash[SUITE].gpu is not None
        chosen = sizes(on_gpu=on_gpu, every=config.option.all_shapes)
        metafunc.parametrize("size", chosen, ids=[size.name for size in chosen])


class Replay:
    """Measured durations as a clock and a call that pytest-benchmark can time again."""

    def __init__(self, samples: Samples):
        self.left = iter(samples.ms)
        self.seconds = 0.0

    def clock(self) -> float:
        return self.seconds

    def call(self) -> None:
        self.seconds += next(self.left) / 1e3


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> Suite:
    return request.config.stash[SUITE]


@pytest.fixture
def bench(suite: Suite, hand_over: Callable[[Result], None]):
    """bench(case, size, direction, provider): checks; on a GPU measures and hands the result on."""

    def run(case: Case, size: Size, direction: str, provider: str) -> None:
        if suite.gpu is None:
            if provider not in (OURS, EAGER):
                pytest.skip("needs a CUDA GPU")
            suite.check(case, size)
            return
        hand_over(suite.group(case, size, direction)[provider])

    return run


@pytest.fixture
def hand_over(request: pytest.FixtureRequest):
    """hand_over(result): one provider's samples to pytest-benchmark, or why there are none."""

    def run(result: Result) -> None:
        if result.failure is not None:
            raise result.failure
        if result.samples is None:
            pytest.skip(result.row.note)
        replay = Replay(result.samples)
        group = " ".join(result.row.group)
        request.node.add_marker(pytest.mark.benchmark(group=group, timer=replay.clock))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.extra_info.update(asdict(result.row))
        benchmark.pedantic(replay.call, rounds=len(result.samples.ms))

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes what was asked for; fails the session if --compare finds a loss, or if what was asked
    for cannot be had because nothing was measured."""
    config = session.config
    suite, option = config.stash[SUITE], config.option
    config.stash[LINES] = []
    if not suite.rows:
        asked = [flag for flag in ("--json", "--chart", "--compare") if config.getoption(flag)]
        if asked:
            config.stash[LINES] = [f"{', '.join(asked)}: nothing was measured in this session"]
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
        return
    card, ceilings = suite.instruments()
    gpu = card.name
    found = marks(suite.rows, gpu)
    config.stash[LINES] = lines = [
        f"{gpu}, measured in this session: {ceilings}",
        *table(suite.rows),
        "",
        *agreement(suite.rows),
        "",
        f"Marks, at {MARKED_SIZE}:",
        *map(str, found),
    ]
    if option.json is not None:
        more = {
            "load_ms": suite.load_ms,
            "ceilings": asdict(ceilings),
            "marks": [asdict(mark) for mark in found],
        }
        write_json(option.json, suite.rows, **environment(gpu), **more)
        lines.append(f"written: {option.json}")
    if option.chart is not None:
        chart(suite.rows, option.chart, f"{gpu}, torch {torch.__version__}")
        lines.append(f"written: {option.chart}")
    if option.compare is not None:
        _, kept = read_json(option.compare)
        compared, lost = compare(suite.rows, kept, option.max_loss)
        lines += ["", f"Compared with {option.compare}:", *compared]
        if lost:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    lines = config.stash.get(LINES, [])
    if config.stash[SUITE].gpu is None:
        # Kept true by tests/test_aot.py.
        lines = [NO_GPU, *aot.lines(json.loads(aot.TABLE.read_text())), *lines]
    for line in lines:
        terminalreporter.write_line(line)
