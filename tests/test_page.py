"""The page in a real browser: a conversation, stop, edit, errors, commands, a hostile answer.

Needs Playwright (a Python package) and Chromium (Debian's, or any in PATH); says which is missing.
"""

import json
import re
import shutil
import time
from collections.abc import Iterator

import pytest

from tests.serve_cases import ScriptedEngine, running, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
from gptfast.serve.app import Access, Defaults  # noqa: E402

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")

MARKDOWN = """# Title #

A **strong**, *weak* and `co_de` word, snake_case_stays, 2 * 3*4*5, a [link](https://a.example/b).

1. one
2. two
   - nested
   - *again*

> quoted
> lines

| a | b |
| --- | ---: |
| 1 | x \\| y |

```python
if x < 1:  # "small"
    print('<b>')
```
It is <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>42."""

HOSTILE = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2">
[a](javascript:window.hacked=3) [b](JaVaScRiPt:window.hacked=4) [c](data:text/html,<script>1)
[d](java
script:window.hacked=5) [e](vbscript:x) <javascript:window.hacked=6> [f](//a.example) [g](/stats)
![pixel](https://a.example/pixel.png) [ok](https://a.example/"onmouseover="window.hacked=7)
**<svg onload=window.hacked=8>** `<iframe srcdoc='<script>parent.hacked=9</script>'>`
<style>body { display: none }</style> <meta http-equiv=refresh content="0;url=https://a.example">

```"><script>window.hacked=10</script>
</code></pre><script>window.hacked = 11</script>
```
| <b onclick=window.hacked=12> | \ue0000\ue001 |
| --- | --- |
| <form action=https://a.example> | <base href=https://a.example> |
"""

ANSWERS = {
    "hello": "Hello! I am *small*.",
    "markdown": MARKDOWN,
    "hostile": HOSTILE,
    # About ten seconds.
    "slow": "word " * 500,
}


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as started:
        # Its sandbox is not to be had where tests run as root.
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    def script(asked: str) -> str:
        return ANSWERS.get(asked, f"You said: {asked[:99]}")

    return ScriptedEngine(script, pause=0.004)


@pytest.fixture(scope="module")
def server(engine):
    options = {"context": None, "slots": 2, "queue": 0, "defaults": Defaults(max_tokens=4000)}
    with running(lambda: engine, **options) as it:
        yield it


@pytest.fixture
def page(browser, server):
    """Open, connected, and at the end found without errors, dialogs or requests elsewhere."""
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    page, problems = context.new_page(), []
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    elsewhere = re.compile(rf"(?!{re.escape(server.url)}/)")
    page.on("request", lambda it: elsewhere.match(it.url) and problems.append(it.url))
    page.goto(server.url)
    page.wait_for_selector(".dot.ready")
    yield page
    assert problems == []
    context.close()


def say(page, text: str, *, wait: bool = True) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")
    if wait:
        finish(page)


def finish(page) -> None:
    page.wait_for_selector("body:not(.busy)")


def said(page) -> list[str]:
    return page.locator("article .said").all_inner_texts()


def test_a_conversation_its_history_and_a_reload(page, server, engine):
    assert page.title() == "tiny · gptfast"
    assert page.get_by_text("What would you like to talk about?").is_visible()
    say(page, "hello")
    say(page, "and more")
    conversation = ["hello", "Hello! I am small.", "and more", "You said: and more"]
    assert said(page) == conversation
    assert page.locator(".model em").inner_text() == "small"
    assert engine.prompts[-1] == (
        "<|bos|><|user_start|>hello<|user_end|><|assistant_start|>Hello! I am *small*."
        "<|assistant_end|><|user_start|>and more<|user_end|><|assistant_start|>"
    )
    assert page.locator("#announce").text_content() == "You said: and more"
    page.reload()
    page.wait_for_selector(".dot.ready")
    assert said(page) == conversation
    page.keyboard.press("Control+Shift+O")
    assert said(page) == []
    page.get_by_role("button", name="Undo").click()
    assert said(page) == conversation


def test_stop_keeps_what_was_said_and_frees_the_slot(page, server):
    say(page, "slow", wait=False)
    page.wait_for_selector(".streaming >> text=word word")
    assert server.pool.running == 1
    page.get_by_role("button", name="Stop").click()
    finish(page)
    server.wait_until_idle()
    assert page.locator(".note").inner_text() == "Stopped."
    before = said(page)[-1]
    assert before.startswith("word word")
    say(page, "slow", wait=False)
    page.wait_for_selector(".streaming >> text=word")
    page.keyboard.press("Escape")
    finish(page)
    server.wait_until_idle()
    assert said(page)[1] == before


def test_undoing_a_new_chat_ends_its_answer(page, server):
    say(page, "hello")
    page.keyboard.press("Control+Shift+O")
    say(page, "slow", wait=False)
    page.wait_for_selector(".streaming >> text=word")
    page.get_by_role("button", name="Undo").click()
    finish(page)
    server.wait_until_idle()
    assert said(page) == ["hello", "Hello! I am small."]
    say(page, "more")
    assert said(page)[2:] == ["more", "You said: more"]


def test_what_a_reload_interrupts_is_kept_as_stopped(page, server):
    say(page, "slow", wait=False)
    page.wait_for_selector(".streaming >> text=word word")
    page.reload()
    server.wait_until_idle()
    assert said(page)[0] == "slow"
    assert said(page)[1].startswith("word word")
    assert page.locator(".note").all_inner_texts() == ["Stopped."]
    assert page.get_by_role("alert").count() == 0
    # Nothing was said yet.
    page.route("**/v1/chat/completions", lambda route: None)
    page.keyboard.press("Control+Shift+O")
    say(page, "hello", wait=False)
    page.wait_for_selector(".thinking")
    page.reload()
    assert said(page) == ["hello", ""]
    assert page.locator(".note").all_inner_texts() == ["No answer."]
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Answer again").click()
    finish(page)
    assert said(page) == ["hello", "Hello! I am small."]


def test_a_tab_that_is_left_does_not_write_over_another(page, server):
    tab = page.context.new_page()
    tab.goto(server.url)
    say(page, "hello")
    tab.goto("about:blank")
    tab.goto(server.url)
    assert said(tab) == ["hello", "Hello! I am small."]


def test_tabs_that_chat_at_once_keep_a_conversation_each(page, server):
    say(page, "hello")
    tab = page.context.new_page()
    tab.goto(server.url)
    tab.keyboard.press("Control+Shift+O")
    say(tab, "one")
    say(page, "two")
    for each in (tab, page):
        each.reload()
    assert said(tab) == ["one", "You said: one"]
    assert said(page) == ["hello", "Hello! I am small.", "two", "You said: two"]


def test_editing_drops_later_turns_and_again_asks_again(page, engine):
    say(page, "one")
    say(page, "two")
    page.locator("article.user").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    page.keyboard.press("Escape")
    assert said(page) == ["one", "You said: one", "two", "You said: two"]
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit your message").fill("three")
    page.keyboard.press("Enter")
    finish(page)
    assert said(page) == ["three", "You said: three"]
    asked = len(engine.prompts)
    page.get_by_role("button", name="Answer again").click()
    finish(page)
    assert said(page) == ["three", "You said: three"]
    assert engine.prompts[asked:] == [engine.prompts[-1]]
    assert "one" not in engine.prompts[-1]
    # The last message, from the keyboard alone.
    page.press("#input", "ArrowUp")
    assert page.get_by_label("Edit your message").input_value() == "three"


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


def test_errors_are_told_kindly_and_can_be_retried(page, server):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "hello")
    failed = page.get_by_role("alert")
    assert failed.inner_text().startswith("The server cannot be reached.")
    page.unroute("**/v1/chat/completions")
    failed.get_by_role("button", name="Try again").click()
    finish(page)
    assert said(page) == ["hello", "Hello! I am small."]
    # Both slots are taken, and nobody may wait.
    tabs = [page.context.new_page() for _ in range(2)]
    for tab in tabs:
        tab.goto(server.url)
        tab.keyboard.press("Control+Shift+O")
        say(tab, "slow", wait=False)
        tab.wait_for_selector(".streaming >> text=word")
    say(page, "more")
    assert failed.inner_text().startswith(
        "The server is busy.\nToo many requests wait already. Try"
    )
    for tab in tabs:
        tab.close()
    server.wait_until_idle()
    failed.get_by_role("button", name="Try again").click()
    finish(page)
    assert said(page)[-1] == "You said: more"
    for _ in range(4):
        say(page, "x" * 8000)
    assert failed.inner_text().startswith("This conversation has become too long.\n32,")
    failed.get_by_role("button", name="New chat").click()
    assert said(page) == []


def test_an_answer_that_breaks_off_is_kept(page, server):
    say(page, "slow", wait=False)
    page.wait_for_selector(".streaming >> text=word")
    # What happens when a deadline passes at shutdown.
    server.server.servers[0].get_loop().call_soon_threadsafe(server.pool.give_up)
    finish(page)
    assert said(page)[1].startswith("word")
    assert (
        page.get_by_role("alert")
        .inner_text()
        .startswith("The answer broke off.\nthe server is shutting down")
    )


def test_settings_and_commands_reach_the_server(page):
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json))
    page.fill("#input", "/t")
    assert page.get_by_role("option").count() == 2
    page.press("#input", "ArrowDown")
    page.press("#input", "Tab")
    page.keyboard.type("7")
    page.press("#input", "Enter")
    say(page, "/temperature 1.25")
    say(page, "/temperature 3")
    say(page, "/nothing")
    assert page.locator(".notice").all_inner_texts() == [
        "Top-k is now 7.",
        "Temperature is now 1.25.",
        "Temperature goes from 0 to 2.",
        "There is no command /nothing. /help lists those that there are.",
    ]
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Temperature").input_value() == "1.25"
    page.get_by_label("Longest answer").fill("9")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_text("Dark", exact=True).click()
    page.get_by_role("button", name="Done").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 22, 20)"
    bodies.clear()
    say(page, "hello")
    sent = bodies[0]
    assert (sent["temperature"], sent["top_k"], sent["max_tokens"]) == (1.25, 7, 9)
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert said(page)[-1] == "You said:"
    assert page.locator(".note").inner_text().startswith("Cut off")


def test_a_token_is_asked_for(browser):
    engine = ScriptedEngine(ANSWERS.__getitem__)
    with running(lambda: engine, context=None, access=Access(token="secret")) as it:
        page = browser.new_page()
        page.goto(it.url)
        say(page, "hello")
        page.get_by_role("button", name="Enter the token").click()
        page.keyboard.type("secret")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Try again").click()
        finish(page)
        assert said(page) == ["hello", "Hello! I am small."]
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
