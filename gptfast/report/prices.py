"""What an hour of a GPU costs, where nobody says: list prices, each with its source."""

from typing import NamedTuple

_REFERENCE = "the reference report's table, October 2025"
# The lower end of what specialised clouds ask on demand (mercatus-ai.com, cloud GPU pricing, May
# 2026: 3.50 to 4.50).
_MARKET = "list price of specialised clouds, May 2026 (mercatus-ai.com)"


class Price(NamedTuple):
    """Dollars for one GPU and hour, and who says so."""

    dollars: float
    source: str


_PRICES = {
    "H200": Price(3.50, _MARKET),
    "H100": Price(3.00, _REFERENCE),
    "A100": Price(1.79, _REFERENCE),
    "V100": Price(0.55, _REFERENCE),
}


def price(device_name: str | None, asked: float | None = None) -> Price | None:
    """What is asked for if anything is; else the list price of the GPU of this name; None for an
    unknown GPU, which gets no invented figure, and for a CPU."""
    if asked is not None:
        return Price(asked, "as given")
    words = (device_name or "").replace("-", " ").split()
    return next((found for name, found in _PRICES.items() if name in words), None)
