"""The training report: what the folders of a speedrun hold, as one page and as Markdown.

runs.py       reads run folders, half-finished ones too
reference.*   the figures of the report that everything is measured against
sections.py   one section a stage: its settings and results, the reference's beside them
overview.py   header, headline figures, summary, cost on equal terms
charts.py     line charts and the waterfall, as SVG
document.py   what a report is made of, before anybody says how it looks
markdown.py, page.py, page.css    the two ways it looks
"""

from gptfast.report.build import write_report

__all__ = ["write_report"]
