"""What a report is made of, before anybody says how it looks."""

from dataclasses import dataclass, field

DONE, UNFINISHED, ABSENT = "done", "unfinished", "missing"


@dataclass(frozen=True)
class Cell:
    """A figure of this run and, where it has one, the reference report's."""

    ours: str
    reference: str = ""


@dataclass(frozen=True)
class Fact:
    """One named figure. note: what a reader must know to compare the two."""

    label: str
    ours: str
    reference: str = ""
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """Rows of one section. folded: settings, which a page may hide until they are asked for."""

    rows: tuple[Fact, ...]
    folded: bool = False
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Cells may be plain strings; the first column is the row's name."""

    columns: tuple[str, ...]
    rows: tuple[tuple["Cell | str", ...], ...]
    title: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph; warning if it limits what the figures mean."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Samples:
    """What the model wrote: (prompt, continuation, the reference's continuation)."""

    rows: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Figure:
    """A picture as SVG. name: of its file beside the Markdown; wide: needs a row of its own."""

    name: str
    caption: str
    svg: str
    wide: bool = False


Block = Facts | Table | Text | Samples | Figure


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...] = ()
    status: str = DONE
    timestamp: str = ""
    reference_timestamp: str = ""
    lead: bool = False
    """Whether a page shows it before all others."""

    @property
    def anchor(self) -> str:
        return anchor_of(self.title)


@dataclass(frozen=True)
class Tile:
    """A headline figure; better: how it stands to the reference's, in words ("2.6 x")."""

    label: str
    ours: str
    reference: str = ""
    comparison: str = ""
    note: str = ""


@dataclass(frozen=True)
class Report:
    title: str
    subtitle: str
    reference: str
    """The name of what everything is compared with, hardware included."""
    source: str
    generated: str
    tiles: tuple[Tile, ...]
    notices: tuple[str, ...]
    sections: tuple[Section, ...]
    stages: tuple[tuple[str, str, str], ...] = field(default=())
    """(stage, status, anchor of its section)."""


def anchor_of(title: str) -> str:
    """Where a section of this title is to be found on a page."""
    return title.lower().replace(" ", "-").replace(",", "")
