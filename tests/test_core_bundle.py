"""CORE's bundle: fetched and verified, and each thing that can be wrong with it is named."""

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from gptfast.errors import UserError
from gptfast.evaluate.core_bundle import load_bundle
from gptfast.evaluate.core_fetch import fetch_bundle
from gptfast.evaluate.core_prompts import select_examples
from gptfast.fetch import WebFile
from tests.core_cases import TASKS, write_bundle
from tests.fake_hub import QUICK


def spoil(folder: Path, name: str, text: str | None, old: str = "") -> None:
    path = folder / name
    if text is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace(old, text, 1) if old else text)


@pytest.mark.parametrize(
    ("name", "text", "old", "message"),
    [
        ("core.yaml", None, "", "no CORE bundle in .*: core.yaml is missing"),
        ("core.yaml", "icl_tasks: [", "", "core.yaml is no list of tasks under icl_tasks"),
        (
            "core.yaml",
            "tasks: []",
            "",
            "core.yaml is no list of tasks under icl_tasks: 'icl_tasks'",
        ),
        ("core.yaml", "label: mine", "label: coqa", "task 6: 'mine' is not one of CORE's 22"),
        ("core.yaml", "label: winograd", "label: coqa", "lists winograd twice"),
        (
            "core.yaml",
            "num_fewshot: 3",
            "num_fewshot: [3]",
            r"arc_easy has num_fewshot 3; .*\[10\]",
        ),
        ("core.yaml", "icl_task_type: magic", "icl_task_type: schema", "winograd has .* 'magic'"),
        ("eval_meta_data.csv", None, "", "incomplete: .*eval_meta_data.csv is missing"),
        ("eval_meta_data.csv", "a,b\n1,2\n", "", "eval_meta_data.csv, line 2: a name under"),
        ("eval_meta_data.csv", "", "coqa,25\n", "has no row for the task coqa"),
        ("eval_data/some/coqa.jsonl", None, "", "coqa needs .*coqa.jsonl, which is missing"),
    ],
)
def test_an_incomplete_bundle_is_named(tmp_path, name, text, old, message):
    spoil(write_bundle(tmp_path), name, text, old)
    with pytest.raises(UserError, match=message):
        load_bundle(tmp_path)


@pytest.mark.parametrize(
    ("label", "line", "message"),
    [
        ("coqa", '{"context": "a", ', "Expecting property name"),
        ("coqa", "[1, 2]", "it is a list, not an object"),
        ("coqa", '{"context": "a"}', "continuation is None, a string is needed"),
        ("coqa", '{"context": "a", "continuation": " "}', "continuation is blank"),
        ("winograd", '{"context_options": ["a"], "continuation": "b", "gold": 0}', "two or more"),
        ("hellaswag", '{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold is 2, no index"),
        ("hellaswag", '{"query": "a", "choices": ["b", "c"], "gold": true}', "gold is True"),
        ("hellaswag", '{"query": 5, "choices": ["b", "c"], "gold": 1}', "query is 5, a string"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(tmp_path, label, line, message):
    path = write_bundle(tmp_path) / "eval_data" / "some" / f"{label}.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(UserError, match=rf"{label}\.jsonl, line 3 is no .* example: .*{message}"):
        load_bundle(tmp_path)


def test_too_few_examples_for_the_shots(tmp_path):
    bundle = load_bundle(write_bundle(tmp_path))
    with pytest.raises(UserError, match=r"jeopardy has 4 .* after the cut to 4 .*take 5 or more"):
        select_examples(bundle.tasks[4], 4)
    assert len(select_examples(bundle.tasks[4], 5)) == 5
    few = replace(bundle.tasks[4], examples=bundle.tasks[4].examples[:4])
    with pytest.raises(UserError, match=r"4 example\(s\), but shows 4 others .*incomplete"):
        select_examples(few)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    source = write_bundle(tmp_path / "source" / "eval_bundle")
    archive = tmp_path / "eval_bundle.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in source.rglob("*"):
            zipped.write(path, path.relative_to(source.parent))
    return archive


def address(archive: Path) -> WebFile:
    return WebFile(archive.as_uri(), hashlib.sha256(archive.read_bytes()).hexdigest())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


KEPT = {"eval_bundle.zip", "eval_bundle.zip.json"}


def test_the_bundle_is_fetched_once_and_verified(archive, tmp_path):
    fetch = partial(fetch_bundle, policy=QUICK)
    good = address(archive)
    with pytest.raises(
        UserError, match=r"eval_bundle.zip could not be .*expected .*'sha256': '000"
    ):
        fetch(tmp_path / "cache", archive=WebFile(good.url, "0" * 64))
    folder = fetch(tmp_path / "cache", archive=good)
    assert [task.label for task in load_bundle(folder).tasks] == list(TASKS)
    archive.unlink()
    assert fetch(tmp_path / "cache", archive=good) == folder
    assert names(tmp_path / "cache") == {"eval_bundle", *KEPT}
    with pytest.raises(UserError, match=r"could not be fetched in 2 tries: .*name a folder"):
        fetch(tmp_path / "other", archive=good)
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("other/core.yaml", "")
    with pytest.raises(UserError, match=r"eval_bundle.zip holds no eval_bundle/core.yaml"):
        fetch(tmp_path / "other", archive=address(archive))
    assert names(tmp_path / "other") == KEPT


def test_an_archive_whose_unpacking_was_stopped_is_not_fetched_again(
    archive, tmp_path, monkeypatch
):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    fetch = partial(fetch_bundle, tmp_path / "cache", archive=address(archive), policy=QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", stop)
        with pytest.raises(KeyboardInterrupt):
            fetch()
    assert names(tmp_path / "cache") == KEPT
    archive.unlink()
    assert len(load_bundle(fetch()).tasks) == len(TASKS)


def test_several_commands_that_want_the_bundle_get_it(archive, tmp_path):
    """Threads stand for commands, of one node or of several with a shared cache."""
    fetch = partial(fetch_bundle, tmp_path / "cache", archive=address(archive), policy=QUICK)
    with ThreadPoolExecutor(3) as pool:
        commands = [pool.submit(fetch) for _ in range(3)]
    assert {command.result() for command in commands} == {tmp_path / "cache" / "eval_bundle"}
    assert names(tmp_path / "cache") == {"eval_bundle", *KEPT}


def test_a_bundle_that_another_node_has_placed_meanwhile_is_taken(archive, tmp_path, monkeypatch):
    """Where locks do not reach from one node to the other."""
    cache, extract = tmp_path / "cache", zipfile.ZipFile.extractall

    def slowly(zipped: zipfile.ZipFile, scratch: Path) -> None:
        extract(zipped, scratch)
        extract(zipped, cache)

    monkeypatch.setattr(zipfile.ZipFile, "extractall", slowly)
    folder = fetch_bundle(cache, archive=address(archive), policy=QUICK)
    assert len(load_bundle(folder).tasks) == len(TASKS)
    assert names(cache) == {"eval_bundle", *KEPT}
