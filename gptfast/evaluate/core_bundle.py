"""The CORE bundle: 22 tasks of in-context learning (DCLM, arXiv:2406.11794), read and checked.

    core.yaml             the tasks: data file, kind, shots, delimiter
    eval_meta_data.csv    what guessing scores in each task, in per cent
    eval_data/**.jsonl    one example a line

Whatever kind a task is of, an example becomes the same thing here: options, each a context and
its continuation, of which one is right. Multiple choice has one context and several
continuations, a schema several contexts and one continuation, language modelling one of each.
"""

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import yaml

from gptfast.errors import UserError

CORE_TASKS = (
    "hellaswag_zeroshot",
    "jeopardy",
    "bigbench_qa_wikidata",
    "arc_easy",
    "arc_challenge",
    "copa",
    "commonsense_qa",
    "piqa",
    "openbook_qa",
    "lambada_openai",
    "hellaswag",
    "winograd",
    "winogrande",
    "bigbench_dyck_languages",
    "agi_eval_lsat_ar",
    "bigbench_cs_algorithms",
    "bigbench_operators",
    "bigbench_repeat_copy_logic",
    "squad",
    "coqa",
    "boolq",
    "bigbench_language_identification",
)

MULTIPLE_CHOICE = "multiple_choice"
SCHEMA = "schema"
LANGUAGE_MODELING = "language_modeling"
KINDS = (MULTIPLE_CHOICE, SCHEMA, LANGUAGE_MODELING)

CONFIG_FILE = "core.yaml"
BASELINES_FILE = "eval_meta_data.csv"
DATA_FOLDER = "eval_data"


@dataclass(frozen=True)
class Example:
    """options: (context, continuation) pairs; gold: the index of the right one."""

    options: tuple[tuple[str, str], ...]
    gold: int = 0


@dataclass(frozen=True)
class Task:
    """One task, examples in the file's order. baseline: accuracy of guessing, 0 to 1; sha256: of
    the file; shots: solved examples shown before the one that is asked."""

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    examples: tuple[Example, ...]
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """tasks in the order of core.yaml; missing: tasks of CORE that core.yaml does not list."""

    tasks: tuple[Task, ...]
    missing: tuple[str, ...]


def load_bundle(folder: Path) -> Bundle:
    """Read all of it. UserError naming the file, and the line where there is one, and what is
    wrong: a file is missing, core.yaml lists what CORE does not have, a line is malformed."""
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"no CORE bundle in {folder}: {CONFIG_FILE} is missing; name the folder that "
            "eval_bundle.zip unpacks to, or none, and it is fetched (162 MB)"
        )
    entries = _read_config(folder / CONFIG_FILE)
    baselines = _read_baselines(folder / BASELINES_FILE)
    files: dict[tuple[str, str], tuple[tuple[Example, ...], str]] = {}
    tasks = []
    for entry in entries:
        label, kind, uri = entry["label"], entry["icl_task_type"], entry["dataset_uri"]
        if label not in baselines:
            raise UserError(f"{folder / BASELINES_FILE} has no row for the task {label}")
        # HellaSwag is two tasks: with shots and without.
        if (uri, kind) not in files:
            files[uri, kind] = _read_examples(folder / DATA_FOLDER / uri, kind, label)
        examples, sha256 = files[uri, kind]
        tasks.append(
            Task(
                label=label,
                kind=kind,
                shots=entry["num_fewshot"][0],
                delimiter=entry.get("continuation_delimiter", " "),
                baseline=baselines[label],
                examples=examples,
                sha256=sha256,
            )
        )
    listed = {task.label for task in tasks}
    return Bundle(tuple(tasks), tuple(label for label in CORE_TASKS if label not in listed))


def _read_config(path: Path) -> list[dict]:
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["icl_tasks"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no list of tasks under icl_tasks: {reason}") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} lists no tasks under icl_tasks")
    seen = set()
    for number, entry in enumerate(entries, 1):
        if problem := _entry_problem(entry):
            raise UserError(f"{path}, task {number}: {problem}")
        if entry["label"] in seen:
            raise UserError(f"{path} lists {entry['label']} twice")
        seen.add(entry["label"])
    return entries


def _entry_problem(entry: object) -> str | None:
    if not isinstance(entry, dict):
        return f"it is {entry!r}, not a task"
    label, kind, shots = (entry.get(key) for key in ("label", "icl_task_type", "num_fewshot"))
    if label not in CORE_TASKS:
        return f"{label!r} is not one of CORE's {len(CORE_TASKS)} tasks"
    if kind not in KINDS:
        return f"{label} has icl_task_type {kind!r}; known are {', '.join(KINDS)}"
    if not (isinstance(shots, list) and len(shots) == 1 and _is_index(shots[0])):
        return f"{label} has num_fewshot {shots!r}; one number of examples is needed, as in [10]"
    for key in ("dataset_uri", "continuation_delimiter"):
        if not isinstance(entry.get(key, " "), str):
            return f"{label} has {key} {entry[key]!r}; a string is needed"
    return None if "dataset_uri" in entry else f"{label} has no dataset_uri"


def _read_baselines(path: Path) -> dict[str, float]:
    """{task: accuracy of guessing}, 0 to 1."""
    if not path.is_file():
        raise UserError(f"the CORE bundle is incomplete: {path} is missing")
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        try:
            return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}, line {rows.line_num}: a name under 'Eval Task' and a number under "
                f"'Random baseline' are needed: {error!r}"
            ) from error


def _read_examples(path: Path, kind: str, label: str) -> tuple[tuple[Example, ...], str]:
    """(examples, sha256 of the file)."""
    if not path.is_file():
        raise UserError(f"the CORE bundle is incomplete: {label} needs {path}, which is missing")
    content = path.read_bytes()
    examples = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            examples.append(_example(json.loads(line), kind))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is no {kind} example: {error}") from error
    return tuple(examples), hashlib.sha256(content).hexdigest()


def _example(row: object, kind: str) -> Example:
    """ValueError tells what the line lacks."""
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}, not an object")
    if kind == LANGUAGE_MODELING:
        return Example(((_text(row, "context").strip(), _answer(row)),))
    if kind == MULTIPLE_CHOICE:
        query = _text(row, "query")
        options = tuple((query, choice) for choice in _texts(row, "choices"))
    else:
        answer = _answer(row)
        options = tuple((context, answer) for context in _texts(row, "context_options"))
    gold = row.get("gold")
    if not _is_index(gold) or gold >= len(options):
        raise ValueError(f"gold is {gold!r}, no index of its {len(options)} options")
    return Example(options, gold)


def _is_index(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(row: dict, key: str) -> str:
    if not isinstance(row.get(key), str):
        raise ValueError(f"{key} is {row.get(key)!r}, a string is needed")
    return row[key]


def _answer(row: dict) -> str:
    continuation = _text(row, "continuation")
    if not continuation.strip():
        raise ValueError("continuation is blank")
    return continuation


def _texts(row: dict, key: str) -> list[str]:
    values = row.get(key)
    if not isinstance(values, list) or len(values) < 2 or not all(map(_is_text, values)):
        raise ValueError(f"{key} is {values!r}, a list of two or more strings is needed")
    return values


def _is_text(value: object) -> bool:
    return isinstance(value, str)
