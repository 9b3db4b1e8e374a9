"""A report as Markdown: for a terminal, a repository, a model card."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from gptfast.report.charts import standalone
from gptfast.report.document import (
    ABSENT,
    UNFINISHED,
    Block,
    Cell,
    Facts,
    Figure,
    Report,
    Samples,
    Section,
    Table,
    Text,
)


def write_markdown(report: Report, folder: Path) -> Path:
    """folder/report.md, and its pictures in folder/figures."""
    figures = [b for section in report.sections for b in section.blocks if isinstance(b, Figure)]
    for figure in figures:
        path = folder / _picture(figure)
        path.parent.mkdir(exist_ok=True)
        path.write_text(standalone(figure.svg), encoding="utf-8")
    path = folder / "report.md"
    path.write_text(render(report), encoding="utf-8")
    return path


def render(report: Report) -> str:
    lines = [f"# {report.title}", "", report.subtitle, "", f"Generated: {report.generated}", ""]
    lines += [f"> {notice}  " for notice in report.notices] + [""]
    lines += [f"Beside every figure stands that of the reference: {report.reference}.", ""]
    rows = [
        (t.label, t.ours, t.reference, " ".join((t.comparison, t.note)).strip())
        for t in report.tiles
    ]
    lines += _table(("At a glance", "This run", "Reference", ""), rows)
    for section in report.sections:
        lines += _section(section)
    lines += [f"The reference: {report.source}", ""]
    return "\n".join(lines)


def _section(section: Section) -> list[str]:
    lines = [f"## {section.title}", ""]
    if section.status in (ABSENT, UNFINISHED):
        lines += [f"**{section.status}**", ""]
    if section.timestamp or section.reference_timestamp:
        theirs = section.reference_timestamp
        ours = section.timestamp or "–"
        lines += [f"timestamp: {ours}{f' (reference: {theirs})' if theirs else ''}", ""]
    for block in section.blocks:
        lines += _block(block)
    return lines


def _block(block: Block) -> list[str]:
    if isinstance(block, Text):
        return [f"> {block.text}" if block.warning else block.text, ""]
    if isinstance(block, Figure):
        return [f"![{block.caption}]({_picture(block)})", ""]
    if isinstance(block, Samples):
        rows = [(f"{prompt} …", *(_code(text) for text in texts)) for prompt, *texts in block.rows]
        return _table(("Sample", "This run", "Reference"), rows)
    heading = [f"### {block.title}", ""] if block.title else []
    if isinstance(block, Table):
        return heading + _table(block.columns, block.rows)
    return heading + _facts(block)


def _facts(facts: Facts) -> list[str]:
    if not facts.rows:
        return []
    if any(row.note for row in facts.rows):
        rows = [(row.label, row.ours, row.reference, row.note) for row in facts.rows]
        return _table(("", "This run", "Reference", "Note"), rows)
    return _table(
        ("", "This run", "Reference"), [(r.label, r.ours, r.reference) for r in facts.rows]
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[Cell | str]]) -> list[str]:
    lines = [_row(columns), "|---" * len(columns) + "|"]
    return [*lines, *(_row(row) for row in rows), ""]


def _row(cells: Iterable[Cell | str]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, Cell):
        return f"{cell.ours} ({cell.reference})" if cell.reference else cell.ours
    return cell.replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    return f"`{text.replace('`', chr(39))}`"


def _picture(figure: Figure) -> str:
    return f"figures/{figure.name}.svg"
