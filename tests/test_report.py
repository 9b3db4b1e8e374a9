"""The training report: every figure of a fabricated speedrun, and what is shown of half of one."""

import json
import re
import runpy
import shutil
import sys
import xml.etree.ElementTree as ET
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gptfast.errors import UserError
from gptfast.ledger import LEDGER_FILE, Job, Ledger, to_json
from gptfast.ledger.book import Row
from gptfast.model import GPTConfig
from gptfast.report import markdown, page
from gptfast.report.build import build_report, write_report
from gptfast.report.document import ABSENT, DONE, UNFINISHED, Cell, Facts, Figure, Report, Table
from gptfast.report.reference import reference
from gptfast.report.runs import read_folders
from tests import fake_runs
from tests.fake_runs import everything, figures, report

__all__ = ["everything", "report"]

ROOT = Path(__file__).parent.parent


def status(report: Report, title: str) -> str:
    return next(s.status for s in report.sections if s.title == title)


def test_sections_come_in_the_references_order(report):
    assert [section.title for section in report.sections] == [
        "Environment",
        "Tokenizer training",
        "Tokenizer evaluation",
        "Base model training",
        "Base model loss",
        "Base model evaluation",
        "Midtraining",
        "Chat evaluation mid",
        "Chat SFT",
        "Chat evaluation sft",
        "Chat RL",
        "Chat evaluation rl",
        "Summary",
        "Time, energy, money",
        "Wall clock",
    ]
    theirs = reference()["sections"]
    for title, fields in theirs.items():
        ours = list(figures(report, title))
        if fields:
            # Settings before results; in both, the reference's fields first and in its order.
            small = [name for name in fields if name[0].islower()]
            large = [name for name in fields if name[0].isupper()]
            assert [name for name in ours if name in small] == small
            assert [name for name in ours if name in large] == large


def test_base_training_says_what_the_reference_says(report):
    found = figures(report, "Base model training")
    assert found["Number of parameters"] == ("560,988,160", "560,988,160")
    assert found["Number of FLOPs per token"] == ("3.491758e+09", "3.491758e+09")
    assert found["Calculated number of iterations"] == ("21,400", "21,400")
    assert found["Number of training tokens"] == ("11,219,763,200", "11,219,763,200")
    assert found["Tokens : Params ratio"] == ("20.0000", "20.0000")
    assert found["DDP world size"] == ("4", "8")
    assert found["MFU %"] == ("56.49 %", "21.02 %")
    assert found["MFU of this GPU's own peak %"] == ("56.49 %", "")
    assert found["Tokens a second and GPU"] == ("160,000", "")
    assert found["Total training flops"] == ("3.917670e+19", "3.917670e+19")
    # 535 rows of 40 steps each and one of one: 21,401 steps of 0.8192 s.
    assert found["Total training time"] == ("292.19 m", "394.42 m")
    assert found["Peak memory usage"] == ("46,080.00 MiB", "75,374.27 MiB")
    assert found["max_seq_len"] == ("2048", "2048")
    assert found["Minimum validation bpb"] == ("0.7973", "0.8143")
    # Nothing estimates it while training.
    assert found["CORE metric estimate"] == ("–", "0.2133")
    notes = {
        fact.label: fact.note
        for section in report.sections
        if section.title == "Base model training"
        for block in section.blocks
        if isinstance(block, Facts)
        for fact in block.rows
    }
    assert "66.6 % of their own 312" in notes["MFU %"]
    assert notes["Total training time"] == (
        "on 4 × H200: all steps, evaluation and profile apart; the reference: on 8 × "
        "A100-SXM4-80GB, its first 11 steps left out"
    )
    assert notes["CORE metric estimate"].startswith("not taken while ours trains")
    assert "NVIDIA H200 datasheet" in notes["MFU of this GPU's own peak %"]


def test_summary_has_both_figures_of_every_stage(report):
    table = figures(report, "Summary")
    assert list(table) == [
        "CORE", "ARC-Challenge", "ARC-Easy", "GSM8K", "HumanEval", "MMLU", "ChatCORE",
    ]  # fmt: skip
    assert table["CORE"] == (Cell("0.1050", "0.2084"), Cell("–"), Cell("–"), Cell("–"))
    mid, sft = Cell("0.3000", "0.0402"), Cell("0.4000", "0.0599")
    assert table["GSM8K"] == (Cell("–"), mid, sft, Cell("–"))
    assert table["ChatCORE"][2] == Cell("0.4000", "0.0854")


def test_tiles_and_notices_say_what_limits_the_comparison(report):
    tiles = {tile.label: tile for tile in report.tiles}
    assert (tiles["MFU of 989 TFLOP/s"].ours, tiles["MFU of 989 TFLOP/s"].comparison) == (
        "56.5 %",
        "2.69 ×",
    )
    assert tiles["Tokens/s a GPU"].reference == "59,537"
    assert tiles["Bits per byte"].ours == "0.8000"
    # The reference's leaves RL out: what ours took is beside what compares.
    hours, money = tiles["GPU-hours without RL"], tiles["Money without RL"]
    assert (hours.ours, money.ours) == ("20.7", "$72.46")
    assert hours.note.startswith("with RL 24.7; 5 h 10 m without RL; reference: 8 h 14 m")
    assert money.note.startswith("$86.46 with RL; at $3.50")
    assert report.notices == (
        "Trained on /data/corpus, not on the reference's FineWeb-Edu: bits per byte and scores are "
        "not comparable with its.",
        "Measured on 4 × H200; what is told for 8 GPUs is a prediction.",
    )
    assert [s for _, s, _ in report.stages] == [DONE] * 5


def test_of_nothing_at_all_everything_is_shown_as_missing(tmp_path):
    report = build_report(read_folders([tmp_path]))
    assert {s.status for s in report.sections[1:12]} == {ABSENT}
    assert report.notices == ("Missing: Tokenizer, Base, Mid-training, SFT.",)
    base = figures(report, "Base model training")
    assert base["MFU %"] == ("–", "21.02 %")
    assert base["Number of parameters"] == ("–", "560,988,160")
    assert figures(report, "Summary")["CORE"][0] == Cell("–", "0.2084")
    assert figures(report, "Time, energy, money")["Hardware"] == ("–", "8 × A100-SXM4-80GB")
    html, text = page.render(report), markdown.render(report)
    assert text.count("**missing**") == 11
    assert html.count('<span class="badge">missing</span>') == 11


def test_a_stage_that_neither_has_is_a_heading_alone(tmp_path):
    report = build_report(read_folders([tmp_path]))
    assert next(s for s in report.sections if s.title == "Chat evaluation rl").blocks == ()
    html, text = page.render(report), markdown.render(report)
    rl = html.partition('<section id="chat-evaluation-rl"')[2].partition("</section>")[0]
    assert rl.endswith('<h2>Chat evaluation rl <span class="badge">missing</span></h2>')
    assert "## Chat evaluation rl\n\n**missing**\n\n## Summary" in text
    # What the reference has stays to be read.
    assert "The reference's figures" in html


def test_texts_are_shown_whole(everything, report):
    message = figures(report, "Environment")["Message"][0]
    assert message == fake_runs.ENVIRONMENT["git_message"]
    samples = page.render(report).partition('<ol class="samples">')[2].partition("</ol>")[0]
    assert "<p>The capital of France is <mark>what it is.</mark></p>" in samples
    assert '<p class="theirs">reference: Paris. The capital of France is Paris.' in samples
    assert "…" not in samples


def test_a_run_on_a_cpu_had_no_gpu_whatever_the_machine_has(tmp_path):
    fake_runs.write_everything(tmp_path)
    environment, state = tmp_path / "base-d20/environment.json", tmp_path / "speedrun-d20"
    recorded = json.loads(environment.read_text())
    fake_runs.write(environment, {**recorded, "device": "cpu"})
    machine = {"machine": recorded, **json.loads((state / "speedrun.json").read_text())}
    fake_runs.write(state / "speedrun.json", machine)
    found = figures(build_report(read_folders([tmp_path])), "Environment")
    assert found["GPUs"][0] == "none"


def test_a_killed_run_is_unfinished_and_its_time_counts(tmp_path):
    run = fake_runs.write_base(tmp_path / "base-d20", steps=4000, every=40)
    assert (run / "metrics.jsonl").read_text().endswith('{"kind": "step", "st')
    report = build_report(read_folders([tmp_path]))
    assert status(report, "Base model training") == UNFINISHED
    assert ("Base", UNFINISHED, "base-model-training") in report.stages
    found = figures(report, "Base model training")
    # As its settings have it: 20 tokens a parameter.
    assert found["Calculated number of iterations"][0] == "21,400"
    assert found["Number of training tokens"][0] == "2,097,152,000"
    section = next(s for s in report.sections if s.title == "Base model training")
    assert section.blocks[0].text == "Not finished: 4,000 step(s) done."
    assert [b.name for b in section.blocks if isinstance(b, Figure)] == [
        "base-loss", "base-validation", "base-mfu-report", "base-lr-multiplier",
    ]  # fmt: skip


def test_what_was_no_number_is_passed_over(tmp_path):
    metrics = fake_runs.write_base(tmp_path / "base-d20", steps=4000, every=40) / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('\n{"kind": "eval", "step": 4000, "tokens": 9, "val_bpb": null}\n')
        file.write(json.dumps(fake_runs.step_row(4000, 0.0) | {"loss": None}) + "\n")
    found = figures(build_report(read_folders([tmp_path])), "Base model training")
    assert found["Final validation bpb"] == found["Minimum validation bpb"]
    # 0.79 + 2.6 / (1 + 4000 / 60)
    assert found["Final validation bpb"][0] == "0.8284"


def test_sft_and_rl_show_their_own_figures(report):
    sft = figures(report, "Chat SFT")
    assert sft["Training rows"] == ("20,843", "20,843")
    assert sft["Number of iterations"] == ("100", "651")
    assert sft["Training loss"] == ("1.1010", "1.1234")
    assert sft["Validation loss"] == ("1.0350", "1.0146")
    assert sft["ARC-Easy"] == ("0.3000", "")
    assert sft["init_lr_frac"] == ("0.0200", "0.0200")
    rl = figures(report, "Chat RL")
    assert rl["Mean reward, first tenth"][0] == "0.0450"
    assert rl["Mean reward, last tenth"][0] == "0.9450"


def test_two_runs_of_a_stage_are_refused(tmp_path):
    for name in ("base-d20", "base-d8"):
        fake_runs.write_base(tmp_path / name, steps=40)
    with pytest.raises(UserError, match=r"two runs of the stage base: .*base-d20 and .*base-d8"):
        read_folders([tmp_path])
    assert read_folders([tmp_path / "base-d8"]).runs["base"].folder == tmp_path / "base-d8"
    with pytest.raises(UserError, match="no folder"):
        read_folders([tmp_path / "nowhere"])


def test_a_speedruns_folder_names_the_runs_that_belong_to_it(tmp_path):
    fake_runs.write_everything(tmp_path)
    file = tmp_path / "speedrun-d20" / "speedrun.json"
    names = {"tokenizer": "../tokenizer", "base": "../base-d20", "sft": "../no-such-run"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "folders": names}))
    shutil.copytree(tmp_path / "base-d20", tmp_path / "base-d8")
    folders = read_folders([tmp_path / "speedrun-d20"])
    assert set(folders.runs) == {"base"}
    assert folders.tokenizer["training"]["train_time"] == 143.2


def test_the_stage_is_what_its_checkpoints_or_its_recipe_say(tmp_path):
    run = fake_runs.write_stage(tmp_path / "my-model", "sft")
    assert list(read_folders([run]).runs) == ["sft"]
    fake_runs.write(run / "checkpoints/step_000100/manifest.json", {"meta": {"stage": "mid"}})
    assert list(read_folders([run]).runs) == ["mid"]


class Links(HTMLParser):
    """Everything in a page that a browser might fetch, and what its parts are called."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.targets: set[str] = set()

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.anchors.add(value)
            elif name in ("src", "href", "data", "action", "srcset", "poster"):
                if value.startswith("#"):
                    self.targets.add(value[1:])
                else:
                    self.fetched.append(value)


def test_the_page_is_whole_in_itself(everything, tmp_path):
    html_file, markdown_file = write_report([everything], tmp_path / "out")
    html, text = html_file.read_text(), markdown_file.read_text()
    links = Links()
    links.feed(html)
    assert links.fetched == []
    assert links.targets <= links.anchors
    assert "@import" not in html
    assert "url(" not in html
    assert len(html) < 400_000
    # Every picture of the Markdown is there, and is an image of its own.
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == 18
    for name in pictures:
        root = ET.parse(tmp_path / "out" / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme:dark" in root[0].text


def test_what_a_run_says_is_never_taken_for_html(tmp_path):
    run = fake_runs.write_base(tmp_path / "base-d20", steps=40, total=40)
    fake_runs.write_base_evaluation(run)
    loss = next(run.glob("evaluation/*/loss.json"))
    attack = "<script>alert(1)</script>|`x`"
    loss.write_text(json.dumps({"val_bpb": 1.0, "samples": [attack]}))
    settings = {**fake_runs.SETTINGS, "data": {"data": "<img src=x onerror=alert(2)>"}}
    fake_runs.write(run / "settings.json", settings)
    report = build_report(read_folders([run]))
    html = page.render(report)
    assert "<script>alert" not in html
    assert "<img" not in html
    assert "&lt;script&gt;alert(1)" in html
    # A cell of a Markdown table stays one cell.
    row = next(line for line in markdown.render(report).splitlines() if "alert(1)" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 4


def test_a_ledger_becomes_the_waterfall(tmp_path):
    run = fake_runs.write_base(tmp_path / "base-d20", steps=40, total=40)
    rows = (Row("products", "all", 250.0), Row("attention", "all", 60.0), Row("gaps", "gap", 10.0))
    job = Job(GPTConfig(**fake_runs.MODEL), batch=32, accumulation=1, processes=4, shards=4)
    ledger = Ledger(job=job, device="NVIDIA H200", rows=rows, step_ms=320.0, steps=3)
    fake_runs.write(run / LEDGER_FILE, json.loads(json.dumps(to_json(ledger), default=str)))
    report = build_report(read_folders([run]))
    section = next(s for s in report.sections if s.title == "Base model training")
    waterfall = next(b for b in section.blocks if isinstance(b, Figure) and b.wide)
    assert "989 TFLOP/s, NVIDIA H200" in waterfall.caption
    # 65,536 tokens x 3.49 GFLOPs in 320 ms are 715.1 TFLOP/s.
    assert waterfall.svg.count("72.3 %") == 1
    table = next(b for b in section.blocks if isinstance(b, Table))
    assert table.rows == (
        ("products", "250.0 ms", "78.1 %"),
        ("attention", "60.0 ms", "18.8 %"),
        ("gaps", "10.0 ms", "3.1 %"),
    )
    (run / LEDGER_FILE).write_text('{"formula": "another", "format": 1}')
    text = markdown.render(build_report(read_folders([run])))
    assert "ledger.json is a ledger of another kind" in text


def test_the_recipe(everything, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", str(everything), f"--out={tmp_path / 'r'}"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train" / "report.py"), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "r" / f"report.{k}") for k in ("html", "md")
    ]
    text = (tmp_path / "r" / "report.md").read_text()
    made = re.search(r"^Generated: (.*)$", text, re.MULTILINE)[1]
    assert (datetime.now() - datetime.fromisoformat(made)).total_seconds() < 100
