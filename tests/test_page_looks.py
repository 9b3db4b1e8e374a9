"""The chat page in a real browser: what becomes of an answer's text, hostile or long; keyboard,
phone, contrast."""

import json
import time

import pytest

from tests.page_cases import browser, engine, page, pytestmark, say, server
from tests.serve_cases import wait_until

__all__ = ["browser", "engine", "page", "pytestmark", "server"]


def test_markdown_becomes_what_it_means(page):
    say(page, "markdown")
    prose = page.locator(".model .prose")
    assert prose.locator("h3").inner_text() == "Title"
    first = prose.locator("p").first
    assert first.locator("strong, em, code").all_inner_texts() == ["strong", "weak", "co_de"]
    assert "snake_case_stays, 2 * 3*4*5" in first.inner_text()
    link = first.locator("a")
    assert (link.inner_text(), link.get_attribute("href")) == ("link", "https://a.example/b")
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert prose.locator("> ol > li").count() == 2
    assert prose.locator("ol ul li").all_inner_texts() == ["nested", "again"]
    assert prose.locator("blockquote").inner_text() == "quoted\nlines"
    assert prose.locator("td").all_inner_texts() == ["1", "x | y"]
    assert prose.locator("td.right").count() == 1
    assert prose.locator("pre").inner_text() == "if x < 1:  # \"small\"\n    print('<b>')"
    assert prose.locator(".t-word, .t-comment").all_inner_texts() == ["if", '# "small"']
    assert prose.locator(".sum").inner_text() == "6*7 = 42"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    prose.get_by_role("button", name="Copy code").click()
    wait_until(lambda: page.locator("#announce").text_content() == "Copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith("if x < 1:")
    # The calculator's part goes back to the model as it came.
    say(page, "thanks")


def test_a_hostile_answer_is_text(page):
    say(page, "hostile")
    time.sleep(0.3)
    assert page.evaluate("window.hacked") is None
    prose = page.locator(".model .prose")
    allowed = "p, br, a, strong, em, code, div, header, span, button, svg, use, pre, table, thead"
    allowed += ", tbody, tr, th, td, b"
    nodes = page.locator(".model .prose *")
    assert nodes.evaluate_all(f"all => all.filter(n => !n.matches('{allowed}')).length") == 0
    links = prose.locator("a").evaluate_all("links => links.map(link => link.href)")
    assert links
    assert all(link.startswith("https://a.example/") for link in links)
    attributes = page.evaluate(
        "[...new Set([...document.querySelectorAll('#log *')].flatMap(n => n.getAttributeNames()))]"
    )
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")]
    text = prose.inner_text()
    for line in ('<img src=x onerror="window.hacked = 2">', "[a](javascript:window.hacked=3)"):
        assert line in text
    # And if the page did make HTML of it, the browser would refuse to.
    refused = "try { document.body.innerHTML = '<b>'; 0 } catch (e) { e.name }"
    assert page.evaluate(refused) == "TypeError"
    script = "const script = document.createElement('script'); script.append('window.hacked = 13');"
    page.evaluate(f"{script} document.body.append(script)")
    assert page.evaluate("window.hacked") is None


def test_no_text_takes_long(browser, server):
    """As it streams it is rendered many times."""
    texts = ["*a" * 6000, "[" * 12000, "`a" * 6000, "**a " * 4000, "> " * 8000, "- " * 6000]
    texts += ["|" * 12000, "# " + " " * 12000 + "x", "_a_" * 5000, "![](" * 4000, '"' * 12000]
    texts += ["http://" * 2500, "a\\" * 6000, "~~a" * 4000, "1. \n  " * 4000, "__a" * 4000]
    chat = []
    for text in texts:
        parts = [{"type": "text", "text": text}]
        chat += [{"role": "user", "text": "?"}]
        chat += [{"role": "assistant", "finish": "stop", "parts": parts}]
    page = browser.new_page()
    page.add_init_script(f"localStorage['gptfast.chat'] = {json.dumps(json.dumps(chat))}")
    page.goto(server.url)
    load = "performance.getEntriesByType('navigation')[0]"
    took = page.evaluate(f"{load}.domInteractive - {load}.responseEnd")
    assert page.locator(".model .prose:not(:empty)").count() == len(texts)
    # Half a second where nothing else runs; what backtracks would take minutes.
    assert took < 10_000, f"{took:.0f} ms"
    page.close()


def test_everything_can_be_reached_with_the_keyboard(page):
    say(page, "hello")
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.ariaLabel ?? document.activeElement.id"
                " ?? document.activeElement.innerText"
            )
        )
    assert {"New chat", "Settings", "Copy", "Edit", "Answer again", "input"} <= set(reached)
    names = page.locator("button:visible, input, textarea").evaluate_all(
        "all => all.filter(n => !(n.ariaLabel ?? n.innerText) && !n.labels?.length).length"
    )
    assert names == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off_and_contrast_is_enough(browser, server, scheme):
    context = browser.new_context(
        viewport={"width": 360, "height": 640}, color_scheme=scheme, has_touch=True, is_mobile=True
    )
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector(".dot.ready")
    say(page, "markdown")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("document.getElementById('scroller').scrollWidth") <= 360
    smallest = page.locator("button:visible").evaluate_all(
        "all => Math.min(...all.flatMap(n => [n.offsetWidth, n.offsetHeight]))"
    )
    assert smallest >= 30
    for colour in ("--ink", "--soft", "--accent", "--good", "--bad"):
        for ground in ("--paper", "--raised", "--tint", "--code"):
            ratio = page.evaluate(CONTRAST, [colour, ground])
            assert ratio >= (3 if colour == "--good" else 4.5), f"{colour} on {ground}: {ratio:.2f}"
    context.close()


# WCAG's contrast ratio of two custom properties.
CONTRAST = """names => {
  const probe = document.body.appendChild(document.createElement("i"));
  const [a, b] = names.map((name) => {
    probe.style.color = `var(${name})`;
    const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map((x) => {
      const c = x / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  });
  probe.remove();
  return Math.max(a, b) / Math.min(a, b);
}"""
