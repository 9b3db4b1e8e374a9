"""Scores in the report: of which examples, and of which step, they are."""

from gptfast.report import markdown
from gptfast.report.build import build_report
from gptfast.report.document import Cell
from gptfast.report.runs import read_folders
from tests import fake_runs
from tests.fake_runs import figures


def test_partial_scores_are_never_called_whole(tmp_path):
    run = fake_runs.write_base(tmp_path / "base-d20")
    fake_runs.write_base_evaluation(run, missing=("coqa", "squad"))
    sft = fake_runs.write_stage(tmp_path / "sft-d20", "sft")
    fake_runs.write_chat(sft, 0.4, leave_out=("HumanEval",))
    report = build_report(read_folders([tmp_path]))
    assert figures(report, "Base model evaluation")["CORE metric"] == ("–", "0.2084")
    assert figures(report, "Summary")["CORE"][0] == Cell("–", "0.2084")
    assert figures(report, "Summary")["ChatCORE"][2] == Cell("–", "0.0854")
    assert figures(report, "Summary")["HumanEval"][2] == Cell("–", "0.1220")
    text = markdown.render(report)
    assert "2 of 22 tasks are missing (coqa, squad)" in text
    assert "Not evaluated: HumanEval; so no ChatCORE." in text
    # Of a stage that the reference did not evaluate, nothing is shown where nothing is.
    rl = fake_runs.write_stage(tmp_path / "rl-d20", "rl")
    fake_runs.write_chat(rl, 0.5, leave_out=("HumanEval",))
    shown = figures(build_report(read_folders([tmp_path])), "Chat evaluation rl")
    assert shown["GSM8K"][0] == "0.5000"
    assert "ChatCORE metric" not in shown


def test_scores_of_the_first_examples_are_shown_and_marked(tmp_path):
    fake_runs.write_base_evaluation(fake_runs.write_base(tmp_path / "base-d20"), first=500)
    fake_runs.write_chat(fake_runs.write_stage(tmp_path / "mid-d20", "mid"), 0.3)
    sft = fake_runs.write_stage(tmp_path / "sft-d20", "sft")
    fake_runs.write_chat(sft, 0.4, first=2000)
    report = build_report(read_folders([tmp_path]))
    core = figures(report, "Base model evaluation")
    chat = figures(report, "Chat evaluation sft")
    assert core["CORE metric"] == ("0.1050, first 500", "0.2084")
    assert core["hellaswag_zeroshot"][0] == "0.0000, first 500"
    assert chat["GSM8K"] == ("0.4000, first 2,000", "0.0599")
    assert chat["ChatCORE metric"] == ("0.4000, first 2,000", "0.0854")
    table = figures(report, "Summary")
    assert table["CORE"][0] == Cell("0.1050, first 500", "0.2084")
    assert table["ChatCORE"][1:3] == (
        Cell("0.3000", "0.0681"),
        Cell("0.4000, first 2,000", "0.0854"),
    )
    tiles = {tile.label: (tile.ours, tile.note) for tile in report.tiles}
    assert tiles["CORE"] == ("0.1050", "first 500 of each task")
    assert tiles["ChatCORE after SFT"] == ("0.4000", "first 2,000 of each task")
    text = markdown.render(report)
    assert "> Scored on the first 2,000 examples of each task only; the reference's" in text
    assert "first N: of the first N of each task" in text
    assert text.count("Scored on the first") == 2


def test_scores_of_an_earlier_step_name_it(tmp_path):
    run = fake_runs.write_base(tmp_path / "base-d20")
    fake_runs.write_base_evaluation(run)
    (run / "evaluation" / f"step_{fake_runs.STEPS:06d}").rename(run / "evaluation" / "step_010000")
    report = build_report(read_folders([tmp_path]))
    assert figures(report, "Base model evaluation")["Model"][0] == "base-d20 (step 10000)"
    for title in ("Base model loss", "Base model evaluation"):
        section = next(s for s in report.sections if s.title == title)
        warning = f"Of the model at step 10,000; {fake_runs.STEPS:,} steps have been trained."
        assert section.blocks[0].text == warning
