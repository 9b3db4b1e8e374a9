"""Build the training report from run folders: one HTML page, and Markdown with pictures.

    python train/report.py                                     all that runs/ holds
    python train/report.py runs/tokenizer runs/base-d20 --out report
    python train/report.py runs --price-per-gpu-hour 3.5       dollars, where the list is wrong

What is missing or half-finished is shown as that. Beside every figure stands that of the training
report which this project measures itself against.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from gptfast.report import write_report
from gptfast.run import exit_code


@dataclass(frozen=True)
class Settings:
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """Folders of runs, of a tokenizer, of a speedrun, or folders that hold such."""
    out: Path = Path("report")
    """Folder for report.html, report.md and figures/."""
    price_per_gpu_hour: float | None = None
    """Dollars; the list price of the GPU otherwise, if one is known."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    files = write_report(
        settings.folders, settings.out, price_per_gpu_hour=settings.price_per_gpu_hour
    )
    print("\n".join(map(str, files)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
