"""From folders to the report's two files."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from gptfast.errors import UserError
from gptfast.report import overview
from gptfast.report.cost import Cost
from gptfast.report.document import Report
from gptfast.report.markdown import write_markdown
from gptfast.report.page import write_page
from gptfast.report.reference import hardware_name, reference
from gptfast.report.runs import Folders, read_folders
from gptfast.report.sections import stage_sections


def write_report(
    paths: Sequence[Path], out: Path, *, price_per_gpu_hour: float | None = None
) -> list[Path]:
    """Write out/report.html (whole in itself), out/report.md and out/figures/; the two files.

    Args:
        paths: folders of runs, of a tokenizer, of a speedrun, or folders that hold such.
        price_per_gpu_hour: dollars; the list price of the GPU otherwise, if one is known.

    Raises:
        UserError: a path is no folder, two runs of a stage are found, or `out` cannot be written.
    """
    report = build_report(read_folders(paths), price_per_gpu_hour=price_per_gpu_hour)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return [write_page(report, out), write_markdown(report, out)]
    except OSError as error:
        raise UserError(f"cannot write the report to {out}: {error.strerror}") from error


def build_report(folders: Folders, *, price_per_gpu_hour: float | None = None) -> Report:
    cost = Cost.of(folders, price_per_gpu_hour)
    return Report(
        title=overview.title(folders),
        subtitle=overview.subtitle(folders),
        reference=f"{reference()['name']}, on {hardware_name()}",
        source=reference()["source"],
        generated=datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
        tiles=overview.tiles(folders, cost),
        notices=overview.notices(folders),
        sections=(
            overview.environment(folders, cost),
            *stage_sections(folders),
            overview.summary(folders),
            cost.section(),
            cost.wall_clock(),
        ),
        stages=overview.stages(folders),
    )
