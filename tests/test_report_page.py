"""The report on a phone, in a real browser: nothing is wider than the screen, no number is cut."""

from gptfast.report.build import write_report
from tests import fake_runs
from tests.page_cases import browser, pytestmark

__all__ = ["browser", "pytestmark"]

# Of figures that a phone has room for, those that are on more than one line.
BROKEN = """() => [...document.querySelectorAll(".facts td")].filter((cell) => {
  const range = document.createRange();
  range.selectNodeContents(cell);
  const lines = new Set([...range.getClientRects()].map((box) => box.top));
  return /^[\\d,.e+-]{1,14}$/.test(cell.textContent) && lines.size > 1;
}).map((cell) => cell.textContent)"""
# What goes beyond the screen, but for tables and figures that scroll by themselves.
OUTSIDE = """() => [...document.querySelectorAll("main *, header *")].filter((element) =>
  !element.closest(".wide, figure") && element.getBoundingClientRect().right > innerWidth
).map((element) => element.outerHTML.slice(0, 80))"""


def test_nothing_is_wider_than_a_phone_and_no_number_broken(browser, tmp_path):
    fake_runs.write_everything(tmp_path / "runs")
    html, _ = write_report([tmp_path / "runs"], tmp_path / "report")
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(html.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(BROKEN) == []
    facts = page.locator(".wide:has(> .facts)")
    assert facts.count() > 10
    assert facts.evaluate_all("all => all.every((e) => e.scrollWidth <= e.clientWidth)")
    page.close()
