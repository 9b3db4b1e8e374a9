"""bench/sft.py at toy size: both ways run, and its counts are right; bench/loader.py, too; what
they say of a mistake."""

import json
import runpy
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from bench import loader, mfu, sft
from gptfast import parallel
from gptfast.chat_data import PackedRows
from gptfast.model import GPTConfig, flops_per_token
from tests.tuning_cases import BYTES, plain_newton_schulz

__all__ = ["plain_newton_schulz"]


@pytest.mark.usefixtures("plain_newton_schulz")
def test_both_ways_are_measured_and_written(tmp_path, capsys):
    settings = sft.preset(on_gpu=False)
    out = tmp_path / "sft.json"
    with parallel.start(cpu=True) as world:
        torch.set_num_threads(1)
        sft.bench(replace(settings, measure=replace(settings.measure, out=out)), world)
    printed = capsys.readouterr().out
    assert "packed / reference, useful tokens a second" in printed
    result = json.loads(out.read_text())
    assert result == json.loads(printed.splitlines()[-1])
    for way, padding in (("packed", 0.1), ("reference", 0.6)):
        found = result["ways"][way]
        assert 0 < found["supervised_tokens_per_second"] < found["useful_tokens_per_second"]
        assert found["useful_tokens_per_second"] < found["computed_tokens_per_second"]
        assert found["padding"] < padding
    assert result["ways"]["reference"]["conversations_per_step"] == 8


def test_made_up_conversations_fit_and_have_something_to_learn():
    tokens = sft.made_up(500, 2048, 65536)
    assert tokens.lengths.max() <= 2048
    assert 400 < tokens.lengths.mean() < 550
    rows = PackedRows(tokens, 2048)
    assert rows.conversations == 500
    assert 0.4 < rows.supervised_tokens / rows.useful_tokens < 0.8


def test_flops_of_lengths_are_those_of_each_length():
    config = GPTConfig.from_depth(4, vocab_size=512)
    way = object.__new__(sft.Way)
    way.config = config
    lengths = [10, 200, 1000]
    want = sum(n * flops_per_token(config, context=n) for n in lengths)
    assert way._flops(lengths) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(("program", "work"), [(mfu, "measure"), (sft, "bench")])
def test_on_a_cpu_beside_a_gpu_the_defaults_are_the_cpus(monkeypatch, program, work):
    asked = []
    monkeypatch.setattr(program, work, lambda settings, *more: asked.append(settings))
    monkeypatch.setattr(program.parallel, "start", lambda **how: nullcontext(Mock()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for flags in ([], ["--device", "cpu"]):
        monkeypatch.setattr(sys, "argv", ["bench", *flags])
        program.main()
    assert [(s.model.depth, s.system.device) for s in asked] == [(20, "auto"), (2, "cpu")]


def test_the_padded_loader_pads_to_the_longest_of_four():
    rows = PackedRows(sft.made_up(40, 64, 300), 64, pack=False)
    loader = sft.PaddedLoader(rows, torch.device("cpu"))
    for first in (0, 4):
        lengths = [rows.lengths(first + row)[0] for row in range(4)]
        inputs, targets, weights, documents = next(loader)
        assert inputs.shape == targets.shape == (4, max(lengths))
        assert weights is documents is None
        for row, length in enumerate(lengths):
            assert (targets[row, length:] == -1).all()
            assert np.count_nonzero(targets[row] >= 0) > 0


def test_the_loaders_rates_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader.os, "sched_setaffinity", lambda process, cores: None)
    text = tmp_path / "mine.jsonl"
    text.write_text("".join(f'{{"text": "number {n:03}"}}\n' for n in range(200)))
    BYTES.save(tmp_path / "bytes")
    settings = loader.Settings(
        data=str(text),
        tokenizer=tmp_path / "bytes",
        cache=tmp_path / "cache",
        cores=1,
        rounds=1,
        batch_size=2,
        sequence_len=16,
        out=tmp_path / "loader.json",
    )
    loader.measure(settings)
    result = json.loads(settings.out.read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    # The last 2 validate; each document has 10 letters, and one token before them.
    assert (result["tokens"], result["characters"]) == (198 * 11, 198 * 10)
    assert all(rates["parquet to batch"] > 0 for rates in result["tokens_per_second"].values())
    assert (result["settings"]["cores"], result["environment"]["device"]) == (1, "cpu")
    # Where training keeps its text.
    assert [folder.name for folder in settings.cache.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sft --train my.jsonl", "error: --train needs the --tokenizer that its text is cut by\n"),
        (
            "loader --data /nope --tokenizer {tokenizer}",
            "error: no dataset /nope: it is neither fineweb-edu nor embedded",
        ),
        ("loader --encoding nope", "error: tiktoken has no encoding 'nope': choose one of gpt2, "),
        # Before anything is measured, and with a folder made where there could be one.
        *(
            (f"{name} --out {{tokenizer}}/no_folder/out.json", "error: --out /")
            for name in ("loader", "mfu", "serve", "sft")
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, command, words):
    BYTES.save(tmp_path)
    (tmp_path / "no_folder").touch()
    name, *arguments = command.format(tokenizer=tmp_path).split()
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(Path(sft.__file__).with_name(f"{name}.py")), run_name="__main__")
    captured = capsys.readouterr()
    assert captured.err.startswith(words)
    assert captured.err.count("\n") == 1
    assert "--out" not in command or captured.err.endswith("cannot be written: Not a directory\n")
