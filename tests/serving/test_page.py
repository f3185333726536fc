"""The chat page in Chromium, with a small replacement of the server."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.serving.page_server import API_KEY, MODEL, StandIn, stand_in

sync_api = pytest.importorskip("playwright.sync_api")
Browser, Page, expect = sync_api.Browser, sync_api.Page, sync_api.expect

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"Chromium is not installed as {CHROMIUM}"),
]

MARKDOWN = """# Title

Use `a` and **b**:

```python
x = "<b>" * 3
```

- one
  - nested
2. two

| h | i |
|---|---|
| 1 | 2 |

<img src=x onerror=alert(1)> [link](https://example.com) [no](javascript:alert(1))"""


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox"], timeout=180_000
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, server: StandIn) -> Iterator[Callable[..., Page]]:
    """Opens the page, and checks at the end that it wrote no error to the console.

    The browser reports violations of the content security policy there, and failed requests.
    """
    contexts, errors = [], []

    def open_page(**options: object) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [error for error in errors if not error.startswith("Failed to load resource")] == []


@pytest.fixture
def page(open_page) -> Page:
    page = open_page()
    expect(page.get_by_label("Model")).to_have_value(MODEL)
    return page


def send(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def wait_until(page: Page, condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        page.wait_for_timeout(10)
    pytest.fail("the condition was not met within 2 s")


def answers(page: Page) -> sync_api.Locator:
    return page.locator(".assistant .content")


def stored(page: Page) -> list[dict]:
    """Conversations in the browser's storage."""
    values = page.evaluate(
        "Object.keys(localStorage).filter((key) => key.includes('conversation'))"
        ".map((key) => localStorage[key])"
    )
    return [json.loads(value) for value in values]


def test_sends_and_streams(page, server):
    server.seconds_per_word = 0.05
    server.answers["Hello"] = "one two three"
    page.evaluate(
        """() => {
            window.seen = [];
            const log = document.getElementById("log");
            const look = () => window.seen.push(log.querySelector(".assistant")?.innerText ?? "");
            new MutationObserver(look).observe(
                log, {childList: true, subtree: true, characterData: true});
        }"""
    )
    send(page, "Hello")
    expect(answers(page)).to_have_text("one two three")
    expect(page.locator(".stats")).to_have_text(
        re.compile(r"^3 tokens · [\d.]+ tokens/s · first after [\d.]+ s$")
    )
    assert {"one", "one two"} & set(page.evaluate("window.seen.map((text) => text.trim())"))
    (body,) = server.bodies
    assert body == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    send(page, "Again")
    expect(answers(page).last).to_have_text("2: Again")
    roles = [message["role"] for message in server.bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stops(page, server, way):
    send(page, "wait")
    expect(answers(page)).to_contain_text("wait .")
    if way == "button":
        page.get_by_label("Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator(".stats")).to_have_text("Stopped")
    expect(page.get_by_label("Send")).to_be_visible()
    wait_until(page, lambda: server.num_gone_clients == 1)
    send(page, "next")
    expect(answers(page).last).to_have_text("2: next")


def test_regenerates_and_edits(page, server):
    send(page, "first")
    expect(answers(page)).to_have_text("1: first")
    page.get_by_label("Regenerate").click()
    expect(answers(page)).to_have_text("2: first")
    assert server.bodies[1] == server.bodies[0]
    send(page, "second")
    expect(answers(page)).to_have_count(2)
    page.get_by_label("Edit", exact=True).first.click()
    page.get_by_label("Edit the message").fill("changed")
    page.get_by_label("Edit the message").press("Enter")
    expect(answers(page)).to_have_text(["4: changed"])
    assert server.bodies[3]["messages"] == [{"role": "user", "content": "changed"}]
    page.get_by_label("Edit", exact=True).last.click()
    page.get_by_label("Edit the message").fill("better")
    page.get_by_label("Edit the message").press("Enter")
    expect(answers(page)).to_have_text(["better"])
    assert len(server.bodies) == 4


def test_keeps_conversations(page, server):
    send(page, "one")
    expect(answers(page)).to_have_text("1: one")
    page.get_by_role("button", name="New conversation").first.click()
    send(page, "two")
    expect(answers(page)).to_have_text("2: two")
    page.reload()
    titles = page.locator("#conversations .open")
    expect(titles).to_have_text(["two", "one"])
    expect(answers(page)).to_have_text("2: two")
    titles.last.click()
    expect(answers(page)).to_have_text("1: one")
    page.locator("#conversations li").last.hover()
    page.get_by_label("Rename").last.click()
    page.get_by_label("Title").fill("renamed")
    page.get_by_label("Title").press("Enter")
    expect(titles.last).to_have_text("renamed")
    page.locator("#conversations li").first.hover()
    page.get_by_label("Delete").first.click()
    expect(titles).to_have_text(["renamed"])
    assert [conversation["title"] for conversation in stored(page)] == ["renamed"]
    page.get_by_role("button", name="Undo").click()
    expect(titles).to_have_text(["two", "renamed"])
    with page.expect_download() as download:
        page.get_by_label("Export as JSON").click()
    exported = json.loads(download.value.path().read_text())
    assert exported["messages"] == [
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2: two"},
    ]


def test_an_answer_survives_a_reload_in_the_middle(page):
    send(page, "wait")
    expect(answers(page)).to_contain_text("wait . .")
    page.reload()
    expect(answers(page)).to_contain_text("wait . .")
    send(page, "next")
    expect(answers(page).last).to_have_text("2: next")


@pytest.mark.parametrize(
    ("text", "error", "remedy"),
    [
        ("busy", "The queue is full.", "The server is busy. Try again in 7 s."),
        ("break", "The model failed.", "Try again."),
        ("close", "The connection ended before the answer did.", "Try again."),
    ],
)
def test_shows_errors(page, server, text, error, remedy):
    send(page, text)
    expect(page.locator(".error strong")).to_have_text(error)
    expect(page.locator(".error p")).to_have_text(remedy)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".error")).to_have_count(1)
    wait_until(page, lambda: len(server.bodies) == 2)
    assert server.bodies[1] == server.bodies[0]


def test_a_server_that_is_gone(page):
    page.context.set_offline(True)
    send(page, "Hello")
    expect(page.locator(".error strong")).to_have_text("The server does not answer.")


def test_asks_for_the_key_and_keeps_settings(open_page, server):
    server.has_key = True
    page = open_page()
    expect(page.locator(".error strong")).to_have_text("The API key is missing or wrong.")
    page.get_by_role("button", name="Open settings").click()
    page.get_by_label("API key").fill(API_KEY)
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Top k").fill("40")
    page.get_by_label("Max tokens").fill("8")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("System prompt").fill("Be short.")
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".error")).to_have_count(0)
    expect(page.get_by_label("Model")).to_have_value(MODEL)
    send(page, "Hello")
    expect(answers(page)).to_have_text("1: Hello")
    body = server.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_tokens": 8, "seed": 7}
    assert {name: body[name] for name in sampling} == sampling
    assert API_KEY not in page.evaluate("JSON.stringify(localStorage)")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("3")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_label("Temperature")).to_be_visible()


def test_markdown_is_never_html(page, server):
    server.answers["Show"] = MARKDOWN
    send(page, "Show")
    expect(page.locator(".content pre")).to_have_text('x = "<b>" * 3')
    expect(page.locator(".content h3")).to_have_text("Title")
    expect(page.locator(".content ul ul li")).to_have_text("nested")
    expect(page.locator(".content td")).to_have_text(["1", "2"])
    expect(page.locator(".content img")).to_have_count(0)
    expect(page.locator(".content a")).to_have_text(["link"])
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy", exact=True).and_(page.locator(".code *")).click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == 'x = "<b>" * 3'


def test_phone(open_page, server):
    server.answers["Show"] = MARKDOWN + "\n\n```\n" + "long " * 100 + "\n```\n\n" + "x" * 500
    page = open_page(viewport={"width": 390, "height": 700}, has_touch=True, color_scheme="dark")
    expect(page.get_by_label("Close the list")).not_to_be_in_viewport()
    send(page, "Show")
    expect(page.locator(".content pre")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    overflow = "(e) => e.scrollWidth > e.clientWidth"
    assert not page.locator("#scroll").evaluate(overflow)
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("button", name="New conversation").first.click()
    expect(page.get_by_label("Close the list")).not_to_be_in_viewport()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 27)"
    page.get_by_label("Switch between light and dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_keyboard_only(page):
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("1: one two")
    names = []
    while "New conversation" not in names and len(names) < 20:
        page.keyboard.press("Shift+Tab")
        name, outline = page.evaluate(
            """() => {
                const e = document.activeElement;
                return [e.ariaLabel ?? e.innerText, getComputedStyle(e).outlineStyle];
            }"""
        )
        assert outline == "solid", name
        names.append(name)
    assert {"Regenerate", "Copy", "Edit", "Settings", "Rename", "Delete"} <= set(names)
    page.keyboard.press("Enter")
    page.keyboard.type("three")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("2: three")


def test_every_control_has_a_name(page, server):
    send(page, "Hello")
    expect(answers(page)).to_have_text("1: Hello")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select")]
            .filter((e) => !(e.getAttribute("aria-label") || e.innerText || e.labels?.length))
            .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    expect(page.locator("#announcement")).to_have_text("Answer: 1: Hello")
