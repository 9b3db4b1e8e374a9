"""What the report tells of time, energy and money, and when each thing was made."""

import json

from gptfast.report import markdown
from gptfast.report.build import build_report
from gptfast.report.prices import price
from gptfast.report.runs import read_folders
from gptfast.run import write_section
from gptfast.speedrun.attempt import locked
from tests import fake_runs
from tests.fake_runs import everything, figures, report

__all__ = ["everything", "report"]


def test_time_energy_and_money_are_told_on_equal_terms(report):
    found = figures(report, "Time, energy, money")
    # 18,632 s of steps but RL's, on four GPUs.
    assert found["Everything but RL, wall clock"] == ("5 h 10 m", "8 h 14 m")
    assert found["Everything but RL, GPU-hours"] == ("20.7", "65.9")
    assert found["Base training, GPU-hours"] == ("19.5", "52.6")
    # 3.91767e19 FLOPs at 558.7 TFLOP/s are 70,123 s of one GPU.
    assert found["GPU-hours for 3.92e+19 FLOPs at this rate (calculated)"] == (
        "19.5 (2.70 × fewer)",
        "52.6",
    )
    assert found["The same on 8 × H200 (prediction)"] == ("2 h 26 m", "6 h 34 m")
    assert found["Everything but RL, at that price"] == ("$72.46", "$117.90")
    assert found["The same at $1.79 on both sides"] == ("$37.06", "$117.90")
    # RL's 3,600 s besides.
    assert found["Everything with RL, wall clock"] == ("6 h 10 m", "not told")
    assert found["Everything with RL, GPU-hours"] == ("24.7", "not told")
    assert found["Everything with RL, at that price"] == ("$86.46", "not told")
    # 2,800 W for 22,232 s; and base's 17,532 s.
    assert found["Energy of the GPUs, all steps"] == ("17.29 kWh", "not told")
    assert found["Mean power of a GPU"] == ("700 W", "not told")
    assert found["Base training, tokens a kWh"] == ("823 M", "not told")
    assert found["base"][2:5] == ("2", "19.5", "13.636")
    wall = next(s for s in report.sections if s.title == "Wall clock").blocks[0].text
    assert wall.startswith("Total wall clock time: 5 h 10 m")


def test_a_price_can_be_given(everything):
    found = figures(build_report(read_folders([everything]), price_per_gpu_hour=2.0), "Environment")
    assert found["Hourly Rate"] == ("$8.00/hour", "$14.32/hour")
    assert price("NVIDIA A100-SXM4-80GB").dollars == 1.79
    assert price("NVIDIA RTX 9999") is None
    assert price(None, 1.5) == (1.5, "as given")


def test_without_rl_time_and_money_are_of_everything(tmp_path):
    fake_runs.write_everything(tmp_path)
    file = tmp_path / "speedrun-d20" / "speedrun.json"
    state = json.loads(file.read_text())
    del state["steps"]["rl"]
    file.write_text(json.dumps(state))
    report = build_report(read_folders([tmp_path]))
    tiles = {tile.label: tile for tile in report.tiles}
    assert tiles["GPU-hours in all"].ours == "20.7"
    assert tiles["Money in all"].note.startswith("at $3.50")
    assert not [name for name in figures(report, "Time, energy, money") if "with RL" in name]


def test_a_step_runs_only_while_its_speedrun_lives(tmp_path):
    folder = fake_runs.write_speedrun(tmp_path / "speedrun-d20")
    state = json.loads((folder / "speedrun.json").read_text())
    state["steps"]["rl"] |= {"state": "running", "ended": ""}
    fake_runs.write(folder / "speedrun.json", state)

    def ended() -> dict[str, str]:
        found = figures(build_report(read_folders([folder])), "Time, energy, money")
        return {name: found[name][0] for name in ("sft", "rl")}

    assert ended() == {"sft": "2026-11-22 15:00:00", "rl": "interrupted"}
    with locked(folder, print):
        assert ended()["rl"] == "running"
    assert ended()["rl"] == "interrupted"


def test_a_copy_keeps_the_times_that_were_recorded(tmp_path, monkeypatch):
    fake_runs.write_everything(tmp_path)
    base = tmp_path / "base-d20" / "evaluation" / f"step_{fake_runs.STEPS:06d}"
    sft = tmp_path / "sft-d20" / "evaluation" / "step_000100"
    written = [
        (tmp_path / "tokenizer", "Tokenizer training"),
        (tmp_path / "tokenizer", "Tokenizer evaluation"),
        (base, "Base model loss"),
        (base, "Base model evaluation"),
        (sft, "Chat evaluation sft"),
    ]
    for hour, (folder, title) in enumerate(written):
        monkeypatch.setattr("gptfast.run.timestamp", lambda hour=hour: f"2026-01-01 0{hour}:00:00")
        write_section(folder, title, "timestamp of another: none\n")
    sections = {s.title: s for s in build_report(read_folders([tmp_path])).sections}
    times = [sections[title].timestamp for _, title in written]
    assert times == [f"2026-01-01 0{hour}:00:00" for hour in range(5)]
    # Nothing tells when mid was evaluated but its file.
    assert sections["Chat evaluation mid"].timestamp not in ("", *times)


def test_wall_clock_without_a_speedrun_needs_recorded_times(tmp_path):
    run = fake_runs.write_base(tmp_path / "base-d20", steps=40, total=40)
    assert "Total wall clock time: –" in markdown.render(build_report(read_folders([run])))
    fake_runs.write(run / "summary.json", {"step": 40, "ended": "2026-11-22 12:30:00"})
    told = "Total wall clock time: 2 h 30 m (from the first start to the last end); reference"
    assert told in markdown.render(build_report(read_folders([run])))
