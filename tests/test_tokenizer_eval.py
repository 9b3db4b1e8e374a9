"""The comparison's arithmetic and tables, and the recipe from a folder of text to its report."""

import json
import re

import pytest
import tiktoken

import train.tokenizer as recipe
from gptfast.errors import UserError
from gptfast.report import sections
from gptfast.report.document import DONE, Text
from gptfast.report.runs import read_folders
from gptfast.tokenizer import Tokenizer
from gptfast.tokenizer import evaluation as tokenizer_eval
from gptfast.tokenizer.evaluation import (
    Row,
    compare,
    load_references,
    render_summary,
    render_tables,
    training_summary,
)
from gptfast.tokenizer.texts import TEXTS

BYTES_ONLY = tiktoken.Encoding(
    "bytes",
    pat_str=r"[\s\S]",
    mergeable_ranks={bytes([byte]): byte for byte in range(256)},
    special_tokens={},
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS.values(), 800)


def test_the_texts_are_of_five_kinds_and_one_to_two_kilobytes() -> None:
    assert list(TEXTS) == ["news", "korean", "code", "math", "science"]
    assert all(1000 <= len(text.encode()) <= 2000 for text in TEXTS.values())
    compile(TEXTS["code"], "code", "exec")


def test_compare_counts_bytes_and_tokens(tokenizer: Tokenizer) -> None:
    tables = compare(tokenizer, "train text", "val <|bos|>", {"Bytes": BYTES_ONLY})
    rows = {row.text: row for row in tables["Bytes"]}
    assert list(rows) == [*TEXTS, "train", "val"]
    for name, text in {**TEXTS, "train": "train text", "val": "val <|bos|>"}.items():
        size = len(text.encode())
        assert rows[name] == Row(name, size, size, len(tokenizer.encode(text)))
    assert rows["news"].ours < rows["news"].theirs


def test_row_arithmetic() -> None:
    row = Row("news", bytes=1819, theirs=404, ours=375)
    # The report's own first row.
    assert (
        f"{row.their_ratio:.2f} {row.our_ratio:.2f} {row.relative_diff:+.1f}%" == "4.50 4.85 +7.2%"
    )
    assert row.as_dict()["relative_diff"] == pytest.approx(7.178, abs=1e-3)


def test_tables_have_the_reports_form() -> None:
    text = render_tables({"GPT-2": [Row("news", 1819, 404, 375), Row("math", 1834, 936, 966)]})
    assert text == (
        "### Comparison with GPT-2\n"
        "\n"
        "| Text Type | Bytes | GPT-2 Tokens | GPT-2 Ratio "
        "| Ours Tokens | Ours Ratio | Relative Diff % |\n"
        "|---|---|---|---|---|---|---|\n"
        "| news | 1819 | 404 | 4.50 | 375 | 4.85 | +7.2% |\n"
        "| math | 1834 | 936 | 1.96 | 966 | 1.90 | -3.2% |\n"
    )


def test_a_lossy_tokenizer_is_an_error(tokenizer: Tokenizer) -> None:
    class Lossy(tiktoken.Encoding):
        def decode_bytes(self, tokens):
            return super().decode_bytes(tokens)[:-1]

    lossy = Lossy("lossy", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={})
    lossy._core_bpe = BYTES_ONLY._core_bpe
    with pytest.raises(ValueError, match="lossy changed a text that begins with 'HARBOUR"):
        compare(tokenizer, "a", "b", {"Lossy": lossy})


def test_references_that_cannot_be_loaded_say_what_to_do(monkeypatch) -> None:
    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tokenizer_eval.tiktoken, "get_encoding", offline)
    found, missing = load_references()
    assert found == {"GPT-2": None, "GPT-4": None}
    assert re.search(r"gpt2 .* \(ConnectionError\).* TIKTOKEN_CACHE_DIR", missing["GPT-2"])
    assert "cl100k_base" in missing["GPT-4"]


def test_summary_of_training(tokenizer: Tokenizer) -> None:
    tokenizer.training = {"max_chars": 2_000_000_000, "vocab_size": 800, "train_time": 71.41541}
    summary = training_summary(tokenizer)
    lengths = [len(token) for token in tokenizer.tokens]
    assert summary["num_special_tokens"] == 9
    assert summary["token_bytes_mean"] == pytest.approx(sum(lengths) / len(lengths))
    assert (summary["token_bytes_min"], summary["token_bytes_max"]) == (1, max(lengths))
    assert render_summary(summary).splitlines()[:4] == [
        "- max_chars: 2,000,000,000",
        "- vocab_size: 800",
        "- train_time: 71.4154",
        "- num_special_tokens: 9",
    ]


@pytest.fixture
def run_recipe(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        lines = [json.dumps({"text": text}) for text in TEXTS.values()]
        (data / f"{name}.jsonl").write_text("\n".join(lines))

    def run(*arguments: str) -> None:
        flags = ["--data", str(data), "--cache", str(tmp_path / "cache")]
        monkeypatch.setattr("sys.argv", ["tokenizer.py", *flags, *arguments])
        recipe.main()

    return run


def test_recipe_writes_tokenizer_and_report(run_recipe, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(recipe, "load_references", lambda: ({"GPT-2": BYTES_ONLY}, {}))
    out = tmp_path / "out"
    run_recipe("--out", str(out), "--vocab-size", "400", "--doc-cap", "500", "--max-chars", "1600")
    tokenizer = Tokenizer.load(out)
    report = json.loads((out / "report.json").read_text())
    # The fourth document of 500 characters is the one that reaches 1,600.
    assert (tokenizer.training["documents"], tokenizer.training["characters"]) == (4, 2000)
    assert report["training"]["fingerprint"] == tokenizer.fingerprint
    rows = {row["text"]: row for row in report["evaluation"]["GPT-2"]}
    assert rows["val"]["bytes"] == len("\n".join(TEXTS.values()).encode())
    training = (out / "tokenizer-training.md").read_text()
    assert training.startswith("## Tokenizer training\n\ntimestamp: 20")
    assert "- doc_cap: 500\n" in training
    assert "| val | " in (out / "tokenizer-evaluation.md").read_text()
    assert "400 tokens" in capsys.readouterr().out


def test_without_the_references_ours_is_evaluated_alone(
    run_recipe, tmp_path, monkeypatch, capsys
) -> None:
    """GPT-4's file is not to be had: recipe, section and report show ours, and why it is alone."""
    references = {"GPT-2": BYTES_ONLY, "GPT-4": None}
    monkeypatch.setattr(recipe, "load_references", lambda: (references, {"GPT-4": "no network"}))
    out = tmp_path / "out"
    run_recipe("--out", str(out), "--vocab-size", "300")
    tokenizer = Tokenizer.load(out)
    evaluation = json.loads((out / "report.json").read_text())["evaluation"]
    assert evaluation["missing"] == {"GPT-4": "no network"}
    size, ours = len(TEXTS["news"].encode()), len(tokenizer.encode(TEXTS["news"]))
    row = evaluation["GPT-4"][0]
    assert (row["text"], row["bytes"], row["ours"], row["theirs"]) == ("news", size, ours, None)
    assert row["relative_diff"] is None
    assert evaluation["GPT-2"][0]["theirs"] == size
    section = (out / "tokenizer-evaluation.md").read_text()
    assert "### Comparison with GPT-4\n\nGPT-4 is missing: no network\n" in section
    assert f"| news | {size} | – | – | {ours} | {size / ours:.2f} | – |" in section
    shown = sections.tokenizer_evaluation(read_folders([out]).tokenizer)
    assert shown.status == DONE
    assert shown.blocks[0] == Text("GPT-4 is missing: no network", warning=True)
    cells = [cell.ours for cell in shown.blocks[2].rows[0][1:]]
    assert cells == [f"{size:,}", "–", "–", f"{ours:,}", f"{size / ours:.2f}", "–"]
    assert "GPT-4 is missing: no network" in capsys.readouterr().out


def test_recipe_refuses_an_occupied_folder_before_anything(run_recipe, tmp_path) -> None:
    with pytest.raises(UserError, match="data exists already"):
        run_recipe("--out", str(tmp_path / "data"))
    assert not (tmp_path / "cache").exists()


def show(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["tokenizer.py", "show", *map(str, arguments)])
    recipe.main()


def test_recipe_shows_what_is_learned_of_ones_own_conversations(tmp_path, monkeypatch, capsys):
    Tokenizer({bytes([byte]): byte for byte in range(256)}).save(tmp_path / "tokenizer")
    file = tmp_path / "my.jsonl"
    turns = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"})
    file.write_text(3 * (json.dumps({"messages": turns}) + "\n"))
    show(monkeypatch, tmp_path / "tokenizer", file, "--count", 2)
    said = capsys.readouterr().out
    text = "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|>[[Yes<|assistant_end|>]]\n\n"
    assert said == "".join(
        f"conversation {number} of 3: 10 tokens, 4 of them learned\n{text}" for number in (1, 2)
    )
    show(monkeypatch, tmp_path / "tokenizer", file, "--count", 1, "--max-tokens", 6)
    (line, *_) = capsys.readouterr().out.splitlines()
    assert line.endswith("cut after 6 of 10 tokens, 0 of them learned: SFT leaves it out")
    # What training says of a line that is wrong.
    file.write_text(file.read_text() + json.dumps({"messages": turns[:1]}))
    with pytest.raises(UserError, match=r"my\.jsonl, line 4: it has 1 turn\(s\)"):
        show(monkeypatch, tmp_path / "tokenizer", file)
