"""The page in a real browser: headless Chromium types, reads, stops, and looks at it as assistive technology does."""

from __future__ import annotations

import json
import os
import shutil

import httpx
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from nautile.server import ServerOptions
from server.live import Live, serving
from server.scripted import Gate, Script, calls
from waiting import soon

expect.set_options(timeout=60_000)  # a busy machine
CHROMIUM = shutil.which("chromium")
INSTALL = "Chromium is missing; install it with: apt-get install -y --no-install-recommends chromium"
SIZE = {"width": 1100, "height": 760}
PARAMETERS = {"type": "object", "properties": {"zone": {"type": "string"}}}
TOOLS = json.dumps([{"type": "function", "function": {"name": "clock", "parameters": PARAMETERS}}])


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail(INSTALL)
        pytest.skip(INSTALL)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"], timeout=180_000)
        yield browser.new_context(viewport=SIZE)
        browser.close()


@pytest.fixture(scope="module")
def server():
    with serving(name="scripted-v4") as live:
        yield live


@pytest.fixture
def live(server: Live) -> Live:
    server.reset()
    return server


@pytest.fixture
def page(browser, live):
    """The page, opened; no test may leave an error in its console."""
    faults: list[str] = []
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(live.url)
    page.faults = faults
    yield page
    page.close()
    assert not faults


def say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def forgive(page: Page, status: str) -> None:
    """The browser itself writes about a refusal into the console, and that may come after the page has said it."""
    for _ in range(600):
        if page.faults:
            break
        page.wait_for_timeout(100)
    assert page.faults and all(status in fault for fault in page.faults)
    page.faults.clear()


def done(page: Page, number: int = 1):
    """The last answer, once it is complete."""
    answers = page.get_by_role("article", name="Model")
    expect(answers).to_have_count(number)
    expect(answers.last).to_have_attribute("aria-busy", "false")
    return answers.last


def test_answer_reasoning_and_cache(page, live, tmp_path):
    live.engine.say(Script("They greet.\nSo do I.</think>Hello <b>you</b>", cached=40), Script("</think>again", cached=100))
    say(page, "hi")
    answer = done(page)
    expect(answer.locator(".text")).to_have_text("Hello <b>you</b>")  # text, never markup
    thoughts = answer.locator("details")
    expect(thoughts.locator(".reasoning")).to_have_text("They greet.\nSo do I.")
    total = len(live.engine.requests[0].prompt_ids)
    expect(answer.locator(".figures")).to_contain_text(f"Prompt {total} tokens, 40 from the cache ({round(4000 / total)} %)")
    thoughts.locator("summary").press("Enter")
    expect(thoughts.locator(".reasoning")).to_be_hidden()
    say(page, "and again")
    done(page, 2)
    assert "Hello <b>you</b>" in live.engine.prompt() and live.engine.prompt().endswith("and again<｜Assistant｜><think>")


def test_thinking_switch_effort_and_instructions(page, live):
    page.get_by_role("switch", name="Thinking").uncheck()
    expect(page.get_by_label("Effort")).to_be_disabled()
    page.get_by_text("Instructions, tools and key").click()
    page.get_by_label("Instructions for the model").fill("Be brief.")
    live.engine.say("plain", "</think>x")
    say(page, "hi")
    expect(done(page).locator("details")).to_have_count(0)
    assert live.engine.prompt() == "<｜begin▁of▁sentence｜>Be brief.<｜User｜>hi<｜Assistant｜></think>"
    page.get_by_role("switch", name="Thinking").check()
    page.get_by_label("Effort").select_option("max")
    say(page, "more")
    done(page, 2)
    assert "Reasoning Effort: Beyond maximum" in live.engine.prompt()


def test_calls_are_shown_and_answered_by_keyboard_alone(page, live):
    """Send, answer the call, and go on, without touching the mouse; reasoning goes back to the model."""
    live.engine.say("look</think>" + calls(("clock", {"zone": "UTC"})), "</think>Noon.")
    page.get_by_text("Instructions, tools and key").press("Enter")
    page.get_by_label("Tools, as a JSON list of functions").fill(TOOLS)
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.type("time?")
    page.keyboard.press("Enter")
    call = page.get_by_role("group", name="Call of clock")
    expect(call).to_contain_text('"zone": "UTC"')
    expect(page.get_by_label("Result of clock")).to_be_focused()
    page.keyboard.type("12:00")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Send results")).to_be_focused()
    page.keyboard.press("Enter")
    expect(done(page, 2).locator(".text")).to_have_text("Noon.")
    first, second = live.engine.prompt(0), live.engine.prompt(1)
    assert second.startswith(first + "look</think>\n\n<") and "<tool_result>12:00</tool_result>" in second
    expect(page.get_by_label("Message", exact=True)).to_be_focused()


def test_stop_button_and_escape(page, live):
    endless = Script("</think>" + "word " * 8000, gate=Gate(40))
    live.engine.say(endless, endless)
    say(page, "go")
    stop = page.get_by_role("button", name="Stop")
    expect(page.locator("article.model .text")).to_contain_text("word word")
    stop.click()
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    done(page)
    expect(stop).to_be_disabled()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    say(page, "again")
    expect(page.locator("article.model .text").nth(1)).to_contain_text("word word")
    page.keyboard.press("Escape")
    done(page, 2)
    soon(lambda: len(live.engine.cancelled) == 2)


def test_errors_are_said(page, live):
    live.engine.say(Script(refuse="the prompt does not fit"))
    say(page, "hi")
    expect(page.get_by_role("status")).to_have_text("the prompt does not fit")
    expect(page.get_by_label("Message", exact=True)).to_have_value("hi")  # to be sent again
    forgive(page, "400")
    live.engine.say(Script("</think>half", fail="the card fell off"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("the card fell off")


def test_a_server_with_keys_is_used_with_one(page):
    with serving(ServerOptions(api_keys=("key-of-eight",))) as guarded:
        page.goto(guarded.url)
        expect(page.locator("#model")).to_have_text("needs a key")
        say(page, "hi")
        expect(page.get_by_role("status")).to_contain_text("Instructions, tools and key")
        page.get_by_label("API key of this server").fill("key-of-eight")
        guarded.engine.say("</think>come in")
        page.get_by_role("button", name="Send", exact=True).click()
        expect(page.locator("article.model .text")).to_have_text("come in")
        expect(page.locator("#model")).to_contain_text("scripted")
        page.goto("about:blank")  # before the server ends: the page looks at its figures every second
        forgive(page, "401")


def test_live_figures(page, live):
    expect(page.locator("#model")).to_contain_text("scripted-v4")
    live.engine.say("</think>" + "word " * 50)
    say(page, "go")
    done(page)
    expect(page.locator("#rate")).not_to_have_text("–")
    expect(page.locator("#running")).to_have_text("0")
    expect(page.get_by_role("table", name="State by kind")).to_contain_text("all")
    figures = httpx.get(live.url + "/stats", timeout=60).json()
    assert figures["completion_tokens"] > 50 and figures["model"] == "scripted-v4"


def test_new_conversation_forgets(page, live):
    live.engine.say("</think>one", "</think>two")
    say(page, "first")
    done(page)
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_role("article")).to_have_count(0)
    say(page, "second")
    done(page)
    assert "first" not in live.engine.prompt()


# What assistive technology gets

CONTRAST = """() => {
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const part = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const faults = [];
  let seen = 0;
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!text || !element.checkVisibility() || element.closest(".skip, .hidden")) continue;
    seen += 1;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) faults.push(`${element.tagName} "${element.textContent.slice(0, 30)}": ${ratio.toFixed(2)}`);
  }
  return { faults, seen };
}"""


def test_contrast(page, live):
    live.engine.say("hm</think>ok" + calls(("clock", {"zone": "UTC"})))
    page.get_by_text("Instructions, tools and key").click()
    page.get_by_label("Tools, as a JSON list of functions").fill(TOOLS)
    say(page, "hi")
    done(page)
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = page.evaluate(CONTRAST)
        assert not found["faults"] and found["seen"] > 30, scheme


def test_every_control_has_a_name_and_a_size(page, live):
    page.get_by_text("Instructions, tools and key").click()
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "switch", "combobox", "DisclosureTriangle", "link", "log", "complementary", "table")
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert {role for role, _ in named} == set(roles)
    assert all(name for _, name in named)
    small = """() => [...document.querySelectorAll("button, select, textarea, summary, input, .switch")]
        .filter((e) => { const r = e.getBoundingClientRect(); return Math.min(r.height, r.width) < 20; })
        .map((e) => e.id || e.tagName)"""
    assert page.evaluate(small) == []
    assert page.locator("html").get_attribute("lang") == "en" and page.title() == "Nautile"
    headings = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((e) => e.tagName + ' ' + e.textContent)")
    assert headings == ["H1 Nautile", "H2 Conversation", "H2 Live figures"]


def test_tab_goes_through_the_controls_in_reading_order(page):
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the message field")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    order = []
    for _ in range(7):
        order.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", order
        page.keyboard.press("Tab")
    assert order == ["message", "send", "clear", "thinking", "effort", "Instructions, tools and key", "Live figures"]


def test_narrow_screen_and_still_page(page, live):
    page.set_viewport_size({"width": 360, "height": 640})
    page.emulate_media(reduced_motion="reduce")
    page.reload()
    live.engine.say(Script("reason" * 40 + "</think>" + "x" * 200 + " word" * 60, delay=0.01))
    say(page, "a-long-word-without-a-break" * 5)
    expect(page.locator("article.model .text")).to_contain_text("word")
    moving = page.evaluate("document.getAnimations().filter((one) => one.playState === 'running').length")
    assert moving == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    expect(page.get_by_role("table", name="State by kind")).to_be_hidden()  # figures are folded away on small screens
    page.keyboard.press("Escape")
    done(page)


def test_screenshot_is_of_a_whole_page(page, live, tmp_path):
    live.engine.say(Script("They greet me, so I greet them.</think>Hello! What shall we look at?", cached=64))
    say(page, "Hello")
    done(page)
    shot = page.screenshot(path=tmp_path / "page.png")
    assert shot.startswith(b"\x89PNG") and len(shot) > 20_000
    pixels = page.evaluate("[innerWidth, document.documentElement.scrollWidth]")
    assert pixels[0] >= pixels[1]


# The files themselves, without a browser


def test_headers_and_nothing_from_elsewhere(live):
    for path, kind in (
        ("/", "text/html"),
        ("/web/page.css", "text/css"),
        ("/web/page.js", "text/javascript"),
        ("/web/icon.svg", "image/svg"),
    ):
        answer = httpx.get(live.url + path, timeout=60)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    assert httpx.head(live.url + "/", timeout=60).status_code == 200
    assert httpx.get(live.url + "/web/secret", timeout=60).status_code == 404
    assert httpx.get(live.url + "/web/..%2f__init__.py", timeout=60).status_code == 404


def test_figures_need_the_key_but_the_page_does_not():
    with serving(ServerOptions(api_keys=("key-of-eight",))) as live:
        assert httpx.get(live.url + "/", timeout=60).status_code == 200
        assert httpx.get(live.url + "/stats", timeout=60).status_code == 401
        assert httpx.get(live.url + "/stats", headers={"Authorization": "Bearer key-of-eight"}, timeout=60).status_code == 200
