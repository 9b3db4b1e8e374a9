"""The chat page in a real browser: a conversation, stop, reload, tabs, edit, errors, commands."""

from gptfast.serve.app import Access
from tests.page_cases import (
    ANSWERS,
    browser,
    engine,
    finish,
    page,
    pytestmark,
    said,
    say,
    server,
)
from tests.serve_cases import ScriptedEngine, running

__all__ = ["browser", "engine", "page", "pytestmark", "server"]


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
