"""The page as people use it, in headless Chromium: over a fake engine where every answer is known."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import time

import pytest

from omni_engine.engine.errors import EngineDeadError
from omni_engine.engine.load import CoreLoad, StepReport
from omni_engine.engine.messages import CoreInfo
from omni_engine.engine.phases import Phase
from omni_engine.scheduler.draft_stats import DraftStats
from omni_engine.scheduler.sampling_params import ValidationError
from omni_engine.scheduler.scheduler import SchedulerStats

DONE = "[...document.querySelectorAll('.turn.model')].at(-1)?.getAttribute('aria-busy') === 'false'"
ANSWERING = "!document.getElementById('stop').hidden"
READY = "document.getElementById('status').dataset.status === 'ready'"
NAMED = "document.getElementById('model').textContent === 'tiny/model'"
KEY_LIKE = re.compile(r"\b(?:set|chart|tile|facts|answer|status|error|live|token|theme|role|key)\.[a-z_.]+\b")


@pytest.fixture
def visit(serve, chromium):
    """Runs a scenario with a page of the server over a fake engine."""

    def run(scenario, *, path="/", width=1280, height=800, scheme="light", language="en-US", **settings):
        async def with_page(client, engine):
            engine.max_model_len = 4096
            look = {"width": width, "height": height, "scheme": scheme, "language": language}
            async with chromium.page(client.address + path, **look) as page:
                await scenario(page, engine)
                assert all(address.startswith(client.address) for address in page.requests), page.requests

        serve(with_page, seconds=90, **settings)

    return run


async def ask(page, text):
    await page.click("#prompt")
    await page.type(text)
    await page.press("Enter")
    await page.wait(DONE)


async def set_value(page, name, value):
    await page.evaluate(f"document.getElementById('set-{name}').value = ''")
    await page.click(f"#set-{name}")
    await page.type(value)


async def button(page, words, turn=".turn.model:last-of-type"):
    """Clicks the button with these words."""
    await page.evaluate(
        "document.querySelectorAll('[data-test]').forEach((node) => node.removeAttribute('data-test'));"
        f"[...document.querySelectorAll('{turn} button')].find((node) => node.textContent === {json.dumps(words)})"
        ".setAttribute('data-test', '')"
    )
    await page.click("[data-test]")


def messages(engine, at=-1):
    return engine.rendered[at][0]


def test_a_whole_conversation(visit):
    async def scenario(page, engine):
        await page.wait(NAMED)
        engine.answer = "**Four**, I think."
        await set_value(page, "system", "Be short.")
        for name, value in (("temperature", "0.5"), ("max_tokens", "40"), ("seed", "7"), ("top_logprobs", "3")):
            await set_value(page, name, value)
        await page.click("#set-stop")
        await page.type("END\nSTOP")
        await ask(page, "What is 2 + 2?")
        assert await page.text(".turn.model .prose") == "Four, I think."
        assert await page.text(".turn.model .prose strong") == "Four"
        assert await page.text(".turn.user .text") == "What is 2 + 2?"
        params = engine.params[-1]
        assert (params.temperature, params.max_tokens, params.seed, params.logprobs) == (0.5, 40, 7, 3)
        assert params.stop_strings == ["END", "STOP"] and params.top_p == 1.0
        assert messages(engine) == [
            {"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 2 + 2?"},
        ]  # fmt: skip
        facts = await page.text(".turn.model .facts")
        assert "18 tokens" in facts and "tokens/s" in facts
        assert re.fullmatch(r"\d+ of 4,096 tokens of context", await page.text("#usage"))

        engine.answer = "Five."
        await page.press("Enter")  # with nothing written nothing is sent
        await page.type("And 2 + 3?")
        await page.press("Enter", shift=True)
        await page.type("Quick!")
        await page.press("Enter")
        await page.wait(f"{DONE} && document.querySelectorAll('.turn').length === 4")
        assert [message["content"] for message in messages(engine)] == [
            "Be short.", "What is 2 + 2?", "**Four**, I think.", "And 2 + 3?\nQuick!",
        ]  # fmt: skip

        engine.answer = "Five, again."
        await button(page, "Regenerate")
        await page.wait(f"{DONE} && document.querySelectorAll('.turn.model .prose')[1].innerText === 'Five, again.'")
        assert messages(engine) == messages(engine, -2) and len(engine.rendered) == 3
        assert await page.evaluate("document.querySelectorAll('.turn').length") == 4

        await button(page, "Edit", ".turn.user:first-of-type")
        assert await page.evaluate("document.getElementById('prompt').value") == "What is 2 + 2?"
        assert await page.evaluate("document.querySelectorAll('.turn').length") == 0
        await page.click("#new-chat")
        assert await page.evaluate("document.getElementById('empty').hidden") is False
        assert page.errors == []

    visit(scenario)


def test_probabilities_show_under_the_pointer_and_by_keyboard(visit):
    async def scenario(page, engine):
        await ask(page, "x")
        await button(page, "Tokens")
        assert (
            await page.evaluate("[...document.querySelectorAll('.token')].map((t) => t.textContent).join('')")
            == "hello"
        )
        await page.hover(".token:nth-of-type(2)")
        card = "document.getElementById('token-card')"
        await page.wait(f"!{card}.hidden")
        rows = await page.evaluate(f"[...{card}.querySelectorAll('li')].map((li) => li.innerText.split(/\\s+/))")
        # The fake's alternatives to "e" are f, g (and one that cannot be), at -0.1 and -0.2; e itself is at -5.
        assert rows[0][:2] == ["f", "90.5"] and rows[1][:2] == ["g", "81.9"] and ["e", "0.67"] in [r[:2] for r in rows]
        assert await page.evaluate(f"{card}.querySelector('.chosen code').textContent") == "e"
        assert await page.evaluate("document.querySelector('.token').className") == "token p4"  # exp(-5)
        await page.evaluate("document.querySelector('.token').focus()")
        for _ in range(4):
            await page.press("ArrowRight")
        assert await page.evaluate(f"{card}.querySelector('.chosen code').textContent") == "o"
        await page.press("Home")
        assert await page.evaluate(f"{card}.querySelector('.chosen code').textContent") == "h"
        await page.press("Escape")
        assert await page.evaluate(f"{card}.hidden")
        await button(page, "Text")
        assert await page.text(".turn.model .prose") == "hello"
        await page.click("#set-logprobs")
        await ask(page, "y")
        assert engine.params[-1].logprobs is None
        assert page.errors == []

    visit(scenario)


def test_the_raw_request_is_a_command_and_the_response_as_it_came(visit):
    async def scenario(page, engine):
        hard = 'it\'s "quoted" `$(id)` \\ and\nlines 今天'
        await page.wait(READY)
        await page.click("#prompt")
        await page.type(hard)
        await page.press("Enter")
        await page.wait(DONE)
        await button(page, "Raw")
        await page.wait("document.getElementById('raw').open")
        command = shlex.split(await page.evaluate("document.getElementById('raw-request').textContent"))
        assert command[:2] == ["curl", "-N"] and command[2].endswith("/v1/chat/completions")
        assert "Authorization: Bearer $API_KEY" in command and "secret" not in " ".join(command)
        body = json.loads(command[command.index("-d") + 1])
        assert body["messages"] == [{"role": "user", "content": hard}] and body["stream"] is True
        response = await page.evaluate("document.getElementById('raw-response').textContent")
        events = response.split("\n\n")
        assert events[-1] == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == "hello"
        assert chunks[-1]["usage"]["completion_tokens"] == 5
        await page.press("Escape")
        await page.wait("!document.getElementById('raw').open")

    async def with_key(page, engine):
        await page.wait("document.getElementById('key').open")
        await page.type("wrong")
        await page.press("Enter")
        await page.wait("document.getElementById('key').open && !document.getElementById('key-wrong').hidden")
        await page.evaluate("document.getElementById('key-input').select()")
        await page.type("secret")
        await page.press("Enter")
        await page.wait(NAMED)
        assert await page.evaluate("Object.values(localStorage).join() + document.cookie") == ""
        assert await page.evaluate("sessionStorage.getItem('omni-engine.key')") == "secret"
        await scenario(page, engine)
        await page.click("#tab-engine")
        await page.wait("document.querySelector('#tile-running b').textContent === '0'")

    visit(with_key, api_keys=("secret",))


@pytest.mark.parametrize("how", ["button", "Escape", "new chat"])
def test_an_answer_is_stopped(visit, how):
    async def scenario(page, engine):
        engine.hangs = True
        await page.click("#prompt")
        await page.type("go on")
        await page.press("Enter")
        await page.wait(f"{ANSWERING} && document.querySelector('.turn.model .prose').innerText === 'h'")
        assert len(engine.running) == 1 and engine.closed_early == []
        if how == "Escape":
            await page.press("Escape")
        else:
            await page.click("#stop" if how == "button" else "#new-chat")
        await page.wait(f"!({ANSWERING})")
        for _ in range(100):
            if engine.closed_early:
                break
            await asyncio.sleep(0.02)
        assert len(engine.closed_early) == 1 and engine.running == set()
        engine.hangs = False
        if how == "new chat":
            assert await page.evaluate("document.querySelectorAll('.turn').length") == 0
            await ask(page, "x")
            assert [message["content"] for message in messages(engine)] == ["x"]
            return
        assert "stopped" in await page.text(".turn.model .facts")
        assert await page.evaluate("document.activeElement.id") == "prompt"
        await page.type("and?")
        await page.press("Enter")
        await page.wait(f"{DONE} && document.querySelectorAll('.turn').length === 4")
        assert [message["content"] for message in messages(engine)] == ["go on", "h", "and?"]

    visit(scenario)


def test_errors_are_shown_and_the_conversation_goes_on(visit):
    async def scenario(page, engine):
        engine.failure = ValidationError("temperature must be <b>small</b>: 9", parameter="temperature", value=9)
        await ask(page, "x")
        assert (await page.text(".turn.model .problem p")).startswith("temperature must be <b>small</b>: 9")
        assert await page.evaluate("document.querySelector('.problem').getAttribute('role')") == "alert"
        engine.failure, engine.failure_after = None, (2, RuntimeError("a secret"))
        await button(page, "Regenerate")
        await page.wait(f"{DONE} && document.querySelector('.turn.model .problem p')?.innerText.startsWith('Internal')")
        assert await page.text(".turn.model .prose") == "he"
        engine.failure_after = None
        await button(page, "Regenerate")
        await page.wait(f"{DONE} && document.querySelector('.turn.model .prose').innerText === 'hello'")
        assert await page.evaluate("document.querySelector('.problem').hidden") is True
        engine.failure = EngineDeadError("gone")
        engine.errored, engine.dead_error = True, engine.failure
        await ask(page, "again")
        assert "stopped" in await page.text(".turn.model:last-of-type .problem")
        await page.wait("document.getElementById('status').innerText === 'Engine stopped'")
        await page.click("#tab-engine")
        await page.wait("document.getElementById('engine-note').innerText.startsWith('The engine has stopped')")
        engine.errored, engine.dead_error, engine.failure = False, None, None  # as after a restart of the core
        await page.wait(READY)
        await page.click("#tab-chat")
        await ask(page, "once more")
        assert await page.text(".turn.model:last-of-type .prose") == "hello"

    visit(scenario)


# What the page itself makes in a conversation, its dialogs and the card of a token.
ALLOWED = """
article header h2 h3 div details summary p a span figure figcaption button pre code table thead tbody tr th td section
form label input ol li i
"""
HOSTILE = """<script>window.pwned = 1</script><img src=x onerror="window.pwned = 2">
<svg onload="window.pwned = 3"></svg><iframe src="https://evil.example/"></iframe>

[a](javascript:window.pwned=4) [b](JaVaScRiPt:window.pwned=5) [c](data:text/html,<script>window.pwned=6</script>)
[d](/v1/models) [e]( java
script:1) <javascript:window.pwned=7> ![image](https://evil.example/pixel.png) [ok](https://good.example/?a=1&b="2")

```<img src=x onerror=window.pwned=8>
</code></pre><script>window.pwned = 9</script>
```

| <b>x</b> | y |
|---|---|
| <img src=x onerror=window.pwned=10> | `</code><script>1</script>` |

<a href="javascript:window.pwned=11">x</a> <style>body { display: none }</style> <form action=//evil.example><button>
"""


def test_what_a_model_writes_cannot_script_the_page(visit):
    async def scenario(page, engine):
        engine.answer = f"<think>{HOSTILE}</think>{HOSTILE}"
        await ask(page, HOSTILE)
        await page.click(".turn.model summary")
        for selector in (".prose", ".reasoning"):
            text = await page.evaluate(f"document.querySelector('.turn.model {selector}').textContent")
            for shown in ("<script>window.pwned = 1</script>", "<iframe src=", "</code></pre><script>", "<b>x</b>"):
                assert shown in text, selector
        await button(page, "Tokens")
        await button(page, "Text")
        await button(page, "Raw")
        made = await page.evaluate(
            "[...document.querySelectorAll('#messages *, dialog *, #token-card *')].map((n) => n.tagName.toLowerCase())"
        )
        allowed = set(ALLOWED.split())
        assert set(made) <= allowed, set(made) - allowed
        links = await page.evaluate(
            "[...document.querySelectorAll('#messages a')].map((a) => [a.href, a.rel, a.target])"
        )
        evil = "https://evil.example/"  # no more than an address that may be followed
        assert {link[0] for link in links} == {evil, f"{evil}pixel.png", "https://good.example/?a=1&b=%222%22"}
        assert all(rel == "noopener noreferrer nofollow" and target == "_blank" for _, rel, target in links)
        attributes = await page.evaluate(
            "[...document.querySelectorAll('#messages *')].flatMap((n) => n.getAttributeNames())"
        )
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "srcdoc")]
        assert await page.evaluate("window.pwned") is None
        assert page.errors == []
        # The control: what the page does not do would have been seen, and even then stopped.
        with pytest.raises(AssertionError, match="TrustedHTML"):
            await page.evaluate("document.body.innerHTML = '<b>x</b>'")
        await page.evaluate(
            "document.body.append(Object.assign(document.createElement('img'), { src: 'https://evil.example/x.png' }))"
        )
        with pytest.raises(AssertionError, match="TrustedScript"):
            await page.evaluate("document.body.setAttribute('onclick', 'window.pwned = 12')")
        await page.evaluate("void document.body.append(document.createElement('style'))")
        await page.evaluate("document.querySelector('body > style').textContent = 'body { color: red }'")
        assert await page.evaluate("window.pwned") is None
        for _ in range(50):
            if len(page.errors) >= 2:
                break
            await asyncio.sleep(0.02)
        assert any("img-src" in error for error in page.errors)
        assert any("style-src" in error for error in page.errors)
        page.requests = [
            address for address in page.requests if "evil.example" not in address
        ]  # stopped before the wire

    visit(scenario, reasoning_parser="deepseek_r1")


def test_reasoning_is_folded_and_can_be_opened(visit):
    async def scenario(page, engine):
        engine.answer = "<think>It is *late*.</think>Good night."
        await ask(page, "x")
        assert await page.text(".turn.model .prose") == "Good night."
        assert await page.evaluate("document.querySelector('.thinking').open") is False
        assert re.fullmatch(r"Thought for [\d.]+ s", await page.text(".thinking summary"))
        await page.evaluate("document.querySelector('.thinking summary').focus()")
        await page.press("Enter")
        assert await page.evaluate("document.querySelector('.thinking').open") is True
        assert await page.text(".reasoning em") == "late"
        engine.answer = "<think></think>Bye."
        await ask(page, "y")
        assert [message["content"] for message in messages(engine)] == ["x", "Good night.", "y"]
        assert await page.evaluate("document.querySelectorAll('.thinking')[1].hidden") is True

    visit(scenario, reasoning_parser="deepseek_r1")


def fill(engine):
    """An engine with a little of everything to show."""
    engine.core_info = CoreInfo(4096, 1001, 16, gears=[1, 4, 8])
    engine.start_phases = [
        ("front", [Phase("imports", 0.5)]),
        ("core", [Phase("imports", 1.0), Phase("weights", 2.0, 3 << 20)]),
    ]
    engine.config.speculation = type("S", (), {"choice": type("C", (), {"num_drafts": 2})})


def test_the_engine_live(visit):
    async def scenario(page, engine):
        fill(engine)
        assert engine.meter is None
        await page.click("#tab-engine")
        await page.wait("!document.getElementById('view-engine').hidden")
        for _ in range(200):
            if engine.meter is not None:
                break
            await asyncio.sleep(0.01)
        drafts = DraftStats(0, 0, 0, [0, 0])
        engine.meter.take([], SchedulerStats(0, 0, 0, 0.0, 0, 0, 0, drafts), None, 0, 0, 0.0)
        drafts = DraftStats(10, 20, 12, [8, 4])
        steps = [StepReport(3, 3, 9, 4, 0.01)] * 9 + [StepReport(3, 2, 40, 0, 0.05)]
        now = time.monotonic()
        engine.meter.take([], SchedulerStats(3, 2, 9, 0.3, 100, 25, 1, drafts), CoreLoad(300, 200, steps), 40, 30, now)
        await page.wait("document.querySelector('#tile-running b').textContent === '3'")
        text = await page.text("#tiles")
        assert "30 %" in text and "25 %" in text and "2\nWaiting" in text
        charts = await page.text("#charts")
        for shown in (
            "in use 300",
            "cached 200",
            "500 free",
            "1 preemptions",
            "accepted 60 %",
            "imports",
            "3 MiB",
            "1 · 4 · 8",
        ):
            assert shown in charts, charts
        bars = await page.evaluate(
            "[...document.querySelectorAll('.bars dl > div')].map((n) => n.innerText.split(/\\n+/))"
        )
        assert ["no graph", "1"] in bars and ["4", "9"] in bars
        assert ["draft 1", "80 %"] in bars and ["draft 2", "40 %"] in bars
        # A chart is read with the keyboard: the first point of the batch has the gear of its step.
        await page.wait("document.querySelectorAll('#charts svg .line').length > 0")
        await page.evaluate("document.querySelectorAll('#charts svg')[3].focus()")
        await page.press("Home")
        told = await page.wait("document.querySelectorAll('#charts svg')[3].getAttribute('aria-label')")
        assert "batch" in told and "gear" in told
        assert await page.evaluate("document.querySelectorAll('#charts svg')[3].querySelector('.cursor') !== null")

        await page.click("#tab-chat")
        for _ in range(200):
            if engine.meter is None:
                break
            await asyncio.sleep(0.01)
        assert engine.meter is None and engine.num_watches == 1  # nobody looks any more
        assert page.errors == []

    visit(scenario)


def test_keyboard_only(visit):
    async def scenario(page, engine):
        await page.wait(READY)
        assert await page.evaluate("document.activeElement.id") == "prompt"
        await page.type("hi")
        await page.press("Enter")
        await page.wait(DONE)
        seen = []
        for _ in range(80):
            await page.press("Tab")
            told = await page.evaluate(
                "(() => { const n = document.activeElement; return n === document.body ? null : "
                "[n.id || n.textContent.trim(), n.matches(':focus-visible'), getComputedStyle(n).outlineStyle] })()"
            )
            if told is not None:  # behind the last one is the browser's own
                seen.append(told)
            if told is not None and told[0] == "prompt":
                break
        assert all(visible and outline != "none" for _, visible, outline in seen), seen
        names = [name for name, *_ in seen]
        start = names.index("Skip to the content")
        names = names[start:] + names[:start]
        wanted = ["tab-chat", "language", "theme", "messages", "Edit", "Regenerate", "Copy", "Tokens", "Raw", "prompt",
                  "send", "new-chat", "set-system", "set-temperature", "set-logprobs"]  # fmt: skip
        assert [name for name in names if name in wanted] == wanted
        assert "tab-engine" not in names  # the tabs are one stop, and arrows go on
        await page.evaluate("document.getElementById('tab-chat').focus()")
        await page.press("ArrowRight")
        assert await page.evaluate("document.activeElement.id") == "tab-engine"
        assert await page.evaluate("document.getElementById('view-engine').hidden") is False
        unnamed = await page.evaluate(
            "[...document.querySelectorAll('button, input, textarea, [role=log], [role=tab]')].filter((n) => "
            "!(n.textContent.trim() || n.getAttribute('aria-label') || document.querySelector(`label[for='${n.id}']`)))"
            ".map((n) => n.outerHTML)"
        )
        assert unnamed == []

    visit(scenario)


@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_on_a_phone_nothing_is_wider_than_the_screen(visit, language):
    async def scenario(page, engine):
        fill(engine)
        engine.answer = (
            "word " * 40
            + "x" * 300
            + "\n\n```\n"
            + "code " * 60
            + "\n```\n| a | b |\n|---|---|\n| "
            + "c " * 99
            + "|d|"
        )
        parts = "document.querySelectorAll('html, body, .view, .messages, .settings')"
        width = f"Math.max(...[...{parts}].map((node) => node.scrollWidth))"
        await ask(page, "y" * 300)
        assert await page.evaluate(width) <= 390
        await page.evaluate("document.querySelectorAll('.turn.model .actions button')[2].click()")
        assert await page.evaluate(width) <= 390
        assert await page.evaluate("getComputedStyle(document.getElementById('settings')).display") == "none"
        await page.click("#settings-button")
        await page.click("#set-seed")
        assert await page.evaluate("document.activeElement.id") == "set-seed"
        await page.press("Escape")
        assert await page.evaluate("document.activeElement.id") == "settings-button"
        await page.click("#tab-engine")
        await page.wait("document.querySelector('#tile-running b').textContent === '0'")
        assert await page.evaluate(width) <= 390
        assert (await page.text("#tab-engine") == "引擎") == (language == "zh-CN")

    visit(scenario, width=390, height=844, language=language)


def test_language_and_theme_follow_the_browser_until_they_are_chosen(visit):
    async def scenario(page, engine):
        fill(engine)
        ground = "getComputedStyle(document.body).backgroundColor"
        dark = await page.evaluate(ground)
        assert await page.evaluate("document.documentElement.lang") == "zh-Hans"
        await ask(page, "x")
        for name in ("engine", "chat"):
            await page.click(f"#tab-{name}")
            for _ in range(2):
                shown = await page.text("body")
                assert not KEY_LIKE.search(shown), KEY_LIKE.search(shown)
                await page.click("#language")
        words = await page.evaluate("[...document.querySelectorAll('[data-i18n]')].map((n) => n.textContent)")
        assert not [word for word in words if not word or "{" in word]
        await page.click("#language")
        assert await page.evaluate("document.documentElement.lang") == "en"
        assert await page.text(".turn.user h2") == "You" and "token" in await page.text(".facts")
        await page.prefer("light")
        light = await page.evaluate(ground)
        assert light != dark
        for expected in (light, dark, light):  # chosen: light, dark; then as the system again
            await page.click("#theme")
            assert await page.evaluate(ground) == expected
        await page.click("#theme")
        await page.click("#theme")
        await page.send("Page.reload")
        await page.wait(f"document.readyState === 'complete' && {READY}")
        assert await page.evaluate(ground) == dark
        assert await page.evaluate("document.documentElement.lang") == "en"
        assert page.errors == []

    visit(scenario, scheme="dark", language="zh-CN")


def test_the_page_waits_for_an_engine_that_loads(visit):
    async def scenario(page, engine):
        await page.wait(READY)
        engine.is_ready = False
        await page.send("Page.reload")
        await page.wait("document.getElementById('status').innerText === 'Loading'")
        engine.is_ready = True
        await page.wait(f"{READY} && {NAMED}")

    visit(scenario)
