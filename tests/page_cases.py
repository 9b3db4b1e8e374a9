"""What tests of the chat page share: a browser, a server whose answers are scripted, and the page.

Needs Playwright (a Python package) and Chromium (Debian's, or any in PATH); says which is missing.
"""

import re
import shutil
from collections.abc import Iterator

import pytest

from tests.serve_cases import ScriptedEngine, running

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
from gptfast.serve.app import Defaults  # noqa: E402

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
