"""A report as one HTML page that asks for nothing outside itself."""

from collections.abc import Iterable
from html import escape
from itertools import groupby
from pathlib import Path

from gptfast.report.charts import CHART_STYLE
from gptfast.report.document import (
    ABSENT,
    DONE,
    Block,
    Cell,
    Fact,
    Facts,
    Figure,
    Report,
    Samples,
    Section,
    Table,
    Text,
    Tile,
)


def write_page(report: Report, folder: Path) -> Path:
    """folder/report.html."""
    path = folder / "report.html"
    path.write_text(render(report), encoding="utf-8")
    return path


def render(report: Report) -> str:
    """The page; every text of the report is escaped."""
    stages = "".join(
        f'<li class="{status}"><a href="#{anchor}">{escape(name)}</a> <span>{status}</span></li>'
        for name, status, anchor in report.stages
    )
    # Stable: those that lead first, the others in their order.
    sections = sorted(report.sections, key=lambda section: not section.lead)
    contents = "".join(
        f'<li class="{section.status}"><a href="#{section.anchor}">{escape(section.title)}</a></li>'
        for section in sections
    )
    notices = "".join(f"<li>{escape(notice)}</li>" for notice in report.notices)
    return _PAGE.format(
        title=escape(report.title),
        subtitle=escape(report.subtitle),
        generated=escape(report.generated),
        reference=escape(report.reference),
        source=escape(report.source),
        stages=stages,
        contents=contents,
        notices=f'<ul class="notices">{notices}</ul>' if notices else "",
        tiles="".join(map(_tile, report.tiles)),
        sections="".join(map(_section, sections)),
        style=_resource("page.css") + CHART_STYLE,
        script=_resource("page.js"),
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<p class="kicker">gptfast · generated {generated}</p>
<h1>{title}</h1>
<p class="subtitle">{subtitle}</p>
<ol class="stages">{stages}</ol>
</header>
<div class="columns">
<nav aria-label="Contents"><ol>{contents}</ol></nav>
<main>
{notices}
<div class="tiles">{tiles}</div>
<p class="legend"><i class="ours"></i> this run <i class="theirs"></i> reference: {reference}</p>
{sections}
<footer><p>The reference: {source}</p></footer>
</main>
</div>
<script>{script}</script>
</body>
</html>
"""


def _tile(tile: Tile) -> str:
    versus = f"<em>{escape(tile.comparison)}</em>" if tile.comparison else ""
    theirs = f'<p class="theirs">ref {escape(tile.reference)} {versus}</p>'
    note = f'<p class="note">{escape(tile.note)}</p>' if tile.note else ""
    return (
        f'<div class="tile"><h3>{escape(tile.label)}</h3>'
        f'<p class="ours">{escape(tile.ours)}</p>{theirs}{note}</div>'
    )


def _section(section: Section) -> str:
    badge = f'<span class="badge">{section.status}</span>' if section.status != DONE else ""
    times = [
        f"{name}{escape(time)}"
        for name, time in (("", section.timestamp), ("reference ", section.reference_timestamp))
        if time
    ]
    stamp = f'<p class="stamp">{" · ".join(times)}</p>' if times else ""
    body = _blocks(section.blocks)
    if section.status == ABSENT and body:
        body = f"<details><summary>The reference's figures</summary>{body}</details>"
    return (
        f'<section id="{section.anchor}" class="{section.status}">'
        f"<h2>{escape(section.title)} {badge}</h2>{stamp}{body}</section>"
    )


def _blocks(blocks: Iterable[Block]) -> str:
    """Neighbouring blocks of a kind share a frame: pictures side by side, short lists too."""
    parts = []
    for kind, group in groupby(blocks, key=type):
        html = "".join(map(_block, group))
        frame = {Figure: "charts", Facts: "lists"}.get(kind)
        parts.append(f'<div class="{frame}">{html}</div>' if frame else html)
    return "".join(parts)


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f'<p class="{"warning" if block.warning else "text"}">{escape(block.text)}</p>'
    if isinstance(block, Figure):
        return _figure(block)
    if isinstance(block, Samples):
        return _samples(block)
    html = _facts(block) if isinstance(block, Facts) else _table(block)
    if block.folded:
        name, size = escape(block.title), len(block.rows)
        return f"<details><summary>{name} <small>{size}</small></summary>{html}</details>"
    heading = f"<h3>{escape(block.title)}</h3>" if block.title else ""
    return f"<div>{heading}{html}</div>"


def _facts(facts: Facts) -> str:
    rows = "".join(map(_fact, facts.rows))
    return f'<div class="wide"><table class="facts">{rows}</table></div>'


def _fact(fact: Fact) -> str:
    """A row, and its note in one of its own below it."""
    note = f'<tr class="note"><td colspan="3">{escape(fact.note)}</td></tr>' if fact.note else ""
    return (
        f"<tr><th>{_breakable(fact.label)}</th><td>{escape(fact.ours)}</td>"
        f'<td class="theirs">{escape(fact.reference)}</td></tr>{note}'
    )


def _breakable(name: str) -> str:
    """With places where a narrow column may break the name of a setting."""
    return escape(name).replace("_", "_<wbr>")


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(
        f"<tr><th>{_cell(first)}</th>{''.join(f'<td>{_cell(cell)}</td>' for cell in cells)}</tr>"
        for first, *cells in table.rows
    )
    return f'<div class="wide"><table class="grid"><tr>{head}</tr>{rows}</table></div>'


def _cell(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return escape(cell)
    theirs = f'<small class="theirs">{escape(cell.reference)}</small>' if cell.reference else ""
    return f"{escape(cell.ours)}{theirs}"


def _samples(samples: Samples) -> str:
    rows = "".join(
        f"<li><p>{escape(prompt)} <mark>{escape(ours)}</mark></p>"
        f'<p class="theirs">reference: {escape(theirs)}</p></li>'
        for prompt, ours, theirs in samples.rows
    )
    return f'<ol class="samples">{rows}</ol>'


def _figure(figure: Figure) -> str:
    kind = ' class="wide-chart"' if figure.wide else ""
    return f"<figure{kind}><figcaption>{escape(figure.caption)}</figcaption>{figure.svg}</figure>"


def _resource(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
