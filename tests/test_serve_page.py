"""The chat page in a real browser, against scripted replies and against the real server; what it
needs of Chromium and axe-core is skipped where they are missing.
"""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading

import asked_runs
import pytest
from browsing import check_access, chromium, opened
from builders import json_lines
from safetensors.numpy import load_file, save_file
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.inference import asking, web
from rlhf_jax.inference.serving import app

DESKTOP = {"width": 1280, "height": 720}
PHONE = {"width": 390, "height": 780}
TOKEN = "a+b/c=-_d"
BASE = {"id": "base", "kind": "policy", "temperature": 1.0}
TUNED = {"id": "ppo", "kind": "policy", "temperature": 0.5}
JUDGE = {"id": "rm", "kind": "reward"}
ATTACK = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title='hacked'\">"
ARABIC = "مرحبا بالعالم"

pytestmark = pytest.mark.slow


class Fake:
    """A server of these models that keeps what it is asked, and says what it is told to.

    ``says``: {model: the answer}, or the status of a refusal. An answer waits at each ⏸ for
    ``go``, and a piece of it is cut within 😀.
    ``ends``: the reason of the end, or an error, or None: it breaks off.
    ``refuses``: {path: (status, message)}.
    """

    def __init__(self, *models, labels=None, token=None):
        self.models = list(models)
        self.labels = labels
        self.token = token
        self.says = {}
        self.ends = "stop"
        self.prompt = "<|user|>hi<|end|>"
        self.go = threading.Event()
        self.go.set()
        self.refuses = {}
        self.asked = []  # (path, body)
        self.gone = threading.Event()  # somebody left before the end of an answer

    def bodies(self, path):
        return [body for at, body in self.asked if at == path]

    def app(self):
        routes = [
            Route(path, lambda _, file=file: app._file(*file)) for path, file in app._FILES.items()
        ]
        for path in ("/v1/models", "/v1/chat/completions", "/score", "/judgement"):
            routes.append(Route(path, self._reply, methods=["GET", "POST"]))
        return web.Guard(Starlette(routes=routes), names=(), max_body=1 << 20)

    async def _reply(self, request):
        path = request.url.path
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return self._error(401, "give the server's token")
        if path == "/v1/models":
            return JSONResponse({"object": "list", "data": self.models, "judgements": self.labels})
        body = await request.json()
        self.asked.append((path, body))
        if path in self.refuses:
            return self._error(*self.refuses[path])
        if path == "/score":
            score = len(body["messages"][-1]["content"]) / 10
            return JSONResponse({"model": body["model"], "score": score, "scores": [score]})
        if path == "/judgement":
            return JSONResponse({"kept": True, "file": self.labels})
        if isinstance(status := self.says.get(body["model"]), int):
            return self._error(status, f"no answer of {body['model']}")
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    def _error(self, status, message):
        return JSONResponse(
            {"error": {"message": message, "type": "invalid", "code": None}}, status
        )

    async def _events(self, body):
        default = f"{body['model']} with seed {body['seed']}: {body['messages'][-1]['content']}"
        text = self.says.get(body["model"], default)
        start = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        yield self._event({"prompt_text": self.prompt, "choices": [start]})
        try:
            for part in text.split("⏸"):
                choice = {"index": 0, "delta": {"content": part}, "finish_reason": None}
                event = self._event({"choices": [choice]})
                half = event.find("😀".encode()) + 2
                yield event[:half]
                await asyncio.sleep(0.05 if half > 1 else 0)
                yield event[half:]
                while not self.go.is_set():
                    yield b": waiting\n\n"
                    await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.gone.set()
            raise
        if isinstance(self.ends, dict):
            yield self._event(self.ends)
        elif self.ends:
            yield self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": self.ends}]})
        yield b"data: [DONE]\n\n"

    def _event(self, content):
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture
def chat(browser):
    """Serves a fake while the test runs, and opens its page."""
    with contextlib.ExitStack() as ending:

        def start(fake, fragment="", size=DESKTOP, scheme="light"):
            server, listening, address = web.listen(fake.app(), "127.0.0.1", 0)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            ending.callback(thread.join)
            ending.callback(setattr, server, "should_exit", True)
            ending.callback(fake.go.set)
            page, errors = opened(browser, f"{address}/{fragment}", size, scheme)
            ending.callback(page.context.close)
            page.set_default_timeout(10_000)
            page.locator("#send[aria-disabled=false]").wait_for()
            return page, errors

        yield start


def send(page, text):
    line = page.get_by_label("Your message")
    line.fill(text)
    line.press("Enter")


def wait_for_answers(page):
    page.locator("#turns[aria-busy=false] article").last.wait_for()


def ask(page, text):
    send(page, text)
    wait_for_answers(page)


def wait_for_scores(page, num):
    """Of one reward model."""
    wait_for_answers(page)
    columns(page).locator("> p", has_text=re.compile(r"-?\d\.\d{3}")).nth(num - 1).wait_for()


def press(page, name):
    """Whether or not the button says that it can be used."""
    page.get_by_role("button", name=name, exact=True).click(force=True)


def columns(page):
    """The answers to the last turn."""
    return page.locator("article").last.locator("section")


def said(page):
    """Their texts."""
    return columns(page).locator("> .text").all_inner_texts()


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_an_answer_is_shown_before_it_ends_and_is_part_of_the_next_prompt(chat):
    fake = Fake(BASE)
    fake.says = {"base": "One ä 😀⏸ two."}
    fake.go.clear()
    page, errors = chat(fake)
    send(page, "Count")
    page.get_by_text("One ä 😀").wait_for()
    assert said(page) == ["One ä 😀"]
    assert page.locator("#turns").get_attribute("aria-busy") == "true"
    send(page, "Too early")
    press(page, "Regenerate")
    press(page, "New conversation")
    assert len(fake.asked) == 1
    fake.go.set()
    page.get_by_text("One ä 😀 two.").wait_for()
    wait_for_answers(page)
    assert page.get_by_label("Your message").input_value() == "Too early"
    ask(page, "More")
    first, second = fake.bodies("/v1/chat/completions")
    assert first == {
        "model": "base",
        "messages": [user("Count")],
        "seed": 0,
        "stream": True,
        "return_token_ids": True,
    }
    assert second["messages"] == [user("Count"), assistant("One ä 😀 two."), user("More")]
    assert page.locator("article").count() == 2
    press(page, "New conversation")
    assert page.locator("article").count() == 0
    ask(page, "Again")
    assert fake.bodies("/v1/chat/completions")[-1]["messages"] == [user("Again")]
    assert errors == []


@pytest.mark.parametrize("how", ["key", "button"])
def test_a_stopped_answer_stays_as_far_as_it_came(chat, how):
    fake = Fake(BASE, JUDGE)
    fake.says = {"base": "One⏸ two"}
    fake.go.clear()
    page, _ = chat(fake)
    page.keyboard.press("Escape")
    press(page, "Stop")  # nothing is there to stop
    send(page, "Count")
    page.get_by_text("One").wait_for()
    if how == "key":
        page.keyboard.press("Escape")
    else:
        press(page, "Stop")
    wait_for_answers(page)
    assert fake.gone.wait(10)  # the server knows
    assert columns(page).locator("> p").inner_text().strip() == "stopped"
    assert page.get_by_role("alert").inner_text() == ""
    fake.go.set()
    ask(page, "Go on")
    last = fake.bodies("/v1/chat/completions")[-1]
    assert last["messages"] == [user("Count"), assistant("One"), user("Go on")]
    page.get_by_text("rm 0.7").wait_for()
    assert len(fake.bodies("/score")) == 1


def test_two_columns_get_the_same_messages_and_seed(chat):
    fake = Fake(BASE, TUNED)
    page, errors = chat(fake)
    boxes = [page.get_by_label(f"Model {letter}").bounding_box() for letter in "AB"]
    assert boxes[0]["y"] == boxes[1]["y"]
    page.get_by_text("System message").click()
    page.get_by_label("System message").fill("Be kind")
    page.get_by_label("Seed").fill("7")
    ask(page, "Hello")
    assert said(page) == ["base with seed 7: Hello", "ppo with seed 7: Hello"]
    assert columns(page).locator("h3").all_inner_texts() == ["A: base", "B: ppo"]
    first, second = fake.bodies("/v1/chat/completions")
    assert "temperature" not in first  # each has its own
    assert first | {"model": "ppo"} == second
    assert first["messages"] == [{"role": "system", "content": "Be kind"}, user("Hello")]
    page.get_by_role("spinbutton", name="Temperature").fill("0.3")
    press(page, "Regenerate")
    page.get_by_text("base with seed 8: Hello").wait_for()
    wait_for_answers(page)
    assert page.get_by_label("Seed").input_value() == "8"
    again = fake.bodies("/v1/chat/completions")[2:]
    assert again == [one | {"seed": 8, "temperature": 0.3} for one in (first, second)]
    page.get_by_label("Model A").select_option("ppo")
    page.get_by_label("Model B").select_option("base")
    ask(page, "Bye")
    assert said(page) == ["ppo with seed 8: Bye", "base with seed 8: Bye"]
    assert fake.bodies("/v1/chat/completions")[-1]["messages"][1:] == [
        user("Hello"),
        assistant("base with seed 8: Hello"),
        user("Bye"),
    ]
    assert page.locator("#judgement").is_hidden()  # nothing keeps them
    assert "goes on with A." in page.locator("#status").inner_text()
    assert errors == []


def test_numbers_that_are_none_are_not_sent(chat):
    fake = Fake(BASE)
    page, _ = chat(fake)
    page.get_by_role("spinbutton", name="Temperature").fill("-1")
    send(page, "Hello")
    page.get_by_role("spinbutton", name="Temperature").fill("")
    page.get_by_label("Seed").fill("")
    send(page, "Hello")
    page.get_by_label("Seed").fill("0.5")
    send(page, "Hello")
    assert fake.asked == []
    page.get_by_label("Seed").fill("5")
    ask(page, "Hello")
    page.get_by_label("Seed").fill("")
    press(page, "Regenerate")
    assert len(fake.asked) == 1


@pytest.mark.parametrize(
    ("name", "choice", "next"),
    [
        ("A is better", "a", "base"),
        ("B is better", "b", "ppo"),
        ("Tie", "tie", "base"),
        ("Both bad", "bad", "base"),
    ],
)
def test_a_choice_is_kept_and_the_conversation_goes_on_with_it(chat, name, choice, next):
    fake = Fake(BASE, TUNED, labels="labels.jsonl")
    page, errors = chat(fake)
    assert page.locator("#judgement").is_hidden()
    ask(page, "Hello")
    assert "goes on with A, or with B" in page.locator("#status").inner_text()
    texts = said(page)
    page.get_by_role("button", name=name, exact=True).dblclick()
    page.get_by_text("Kept in labels.jsonl").wait_for()
    assert page.locator("#judgement").is_hidden()
    [judgement] = fake.bodies("/judgement")
    seconds = judgement.pop("seconds")
    assert 0 <= seconds < 60
    assert judgement == {"messages": [user("Hello")], "answers": texts, "choice": choice}
    letter = "B" if choice == "b" else "A"
    assert f"goes on with {letter}." in page.locator("#status").inner_text()
    ask(page, "And then?")
    before = [user("Hello"), assistant(f"{next} with seed 0: Hello"), user("And then?")]
    assert [one["messages"] for one in fake.bodies("/v1/chat/completions")[2:]] == [before] * 2
    assert page.locator("article").first.locator("h3").inner_text() == f"{letter}: {next}"
    assert page.locator("#judgement").is_visible()
    press(page, "Tie")
    page.get_by_text("Kept in labels.jsonl").wait_for()
    press(page, "Regenerate")
    wait_for_answers(page)
    assert page.locator("#judgement").is_visible()  # it is another pair
    assert fake.bodies("/judgement")[1]["messages"] == before
    assert errors == []


def test_a_choice_that_is_not_kept_can_be_made_again(chat):
    fake = Fake(BASE, TUNED, labels="labels.jsonl")
    fake.refuses = {"/judgement": (400, "the answers are equal")}
    page, _ = chat(fake)
    ask(page, "Hello")
    press(page, "B is better")
    page.get_by_text("Not kept: the answers are equal").wait_for()
    assert "Kept" not in page.locator("#status").inner_text()
    fake.refuses = {}
    press(page, "B is better")
    page.get_by_text("Kept in labels.jsonl").wait_for()
    assert page.get_by_role("alert").inner_text() == ""


def test_whole_answers_alone_are_compared(chat):
    fake = Fake(BASE, TUNED, labels="labels.jsonl")
    fake.says = {"base": "One⏸ two", "ppo": "All"}
    fake.go.clear()
    page, _ = chat(fake)
    send(page, "Count")
    page.get_by_text("All").wait_for()
    press(page, "Stop")
    wait_for_answers(page)
    assert page.locator("#judgement").is_hidden()


def test_the_conversation_goes_on_with_the_answer_that_is_whole(chat):
    fake = Fake(BASE, TUNED, labels="labels.jsonl")
    fake.says = {"base": 404}
    page, _ = chat(fake)
    ask(page, "Count")
    assert page.get_by_role("alert").inner_text().strip() == "no answer of base"
    assert page.locator("#judgement").is_hidden()
    assert "goes on with B." in page.locator("#status").inner_text()
    ask(page, "More")
    assert fake.bodies("/v1/chat/completions")[-1]["messages"][1] == assistant(
        "ppo with seed 0: Count"
    )


def test_scores_stand_beside_each_answer(chat):
    fake = Fake(BASE, TUNED, JUDGE, {"id": "safety", "kind": "reward"})
    fake.says = {"base": "123", "ppo": "12345"}
    page, errors = chat(fake)
    page.get_by_text("System message").click()
    page.get_by_label("System message").fill("Be kind")
    ask(page, "Hello")
    page.get_by_text("safety 0.500").wait_for()
    page.get_by_text("safety 0.300").wait_for()
    notes = [text.split("\n")[:2] for text in columns(page).locator("> p").all_inner_texts()]
    assert notes == [["rm 0.300", "safety 0.300"], ["rm 0.500", "safety 0.500"]]
    asked = [{"role": "system", "content": "Be kind"}, user("Hello")]
    expected = [
        {"model": model, "messages": [*asked, assistant(text)]}
        for model in ("rm", "safety")
        for text in ("123", "12345")
    ]
    assert sorted(fake.bodies("/score"), key=str) == sorted(expected, key=str)
    assert errors == []
    fake.refuses = {"/score": (429, "too many are waiting")}
    ask(page, "Again")
    page.get_by_text("too many are waiting").wait_for()
    fake.refuses = {}
    ask(page, "Once more")
    assert page.get_by_role("alert").inner_text() == ""


def test_the_rendered_prompt_is_shown_on_request(chat):
    page, _ = chat(Fake(BASE))
    ask(page, "Hello")
    prompt = page.get_by_text("<|user|>hi<|end|>")
    assert prompt.is_hidden()
    page.get_by_text("Prompt", exact=True).click()
    assert prompt.is_visible()


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize(
    ("says", "ends", "message"),
    [
        (429, "stop", "no answer of base"),
        ("", {"error": {"message": "no whole answer within 600 seconds"}}, "no whole answer"),
        ("", None, "The answer broke off."),
    ],
)
def test_an_error_is_shown_and_the_message_can_be_sent_again(chat, num, says, ends, message):
    fake = Fake(BASE, TUNED)
    fake.models = fake.models[:num]
    page, _ = chat(fake)
    ask(page, "Hello")
    fake.says = {"base": says, "ppo": says}
    fake.ends = ends
    ask(page, "Who?")
    alert = page.get_by_role("alert").inner_text()
    assert alert.count(message) == 1
    assert len(alert.splitlines()) == 1 + (num == 2 and says == 429)  # two models, two messages
    line = page.get_by_label("Your message")
    assert line.input_value() == "Who?"
    assert page.locator("article").count() == 1
    fake.says = {}
    fake.ends = "length"
    line.press("Enter")
    page.get_by_text("base with seed 0: Who?").wait_for()
    wait_for_answers(page)
    assert page.get_by_role("alert").inner_text() == ""
    assert columns(page).locator("> p").first.inner_text().strip() == "cut at its longest"
    last = fake.bodies("/v1/chat/completions")[-1]
    assert last["messages"] == [user("Hello"), assistant("base with seed 0: Hello"), user("Who?")]


def test_a_server_that_is_gone_is_told(chat):
    page, _ = chat(Fake(BASE))
    page.route("**/v1/**", lambda route: route.abort())
    ask_in_vain = page.get_by_label("Your message")
    send(page, "Hello")
    page.get_by_text("The server does not reply.").wait_for()
    page.unroute("**/v1/**")
    ask_in_vain.press("Enter")
    page.get_by_text("base with seed 0: Hello").wait_for()


def test_a_token_stands_in_the_address(chat):
    page, _ = chat(Fake(BASE, token=TOKEN))
    alert = page.get_by_role("alert")
    assert "must end with #token=" in alert.inner_text()
    page.evaluate(f"location.hash = 'token={TOKEN}'")
    page.locator("option", has_text="base").first.wait_for(state="attached")
    assert alert.inner_text() == ""
    ask(page, "Hello")
    assert said(page) == ["base with seed 0: Hello"]
    assert TOKEN not in page.url  # nor in the browser's history
    denied = "{ get() { throw new Error('denied'); } }"  # where cookies are blocked
    page.add_init_script(f"Object.defineProperty(window, 'sessionStorage', {denied})")
    page.reload()
    page.locator("option", has_text="base").first.wait_for(state="attached")
    direct, errors = chat(Fake(BASE, JUDGE, token=TOKEN), f"#token={TOKEN}")
    ask(direct, "Hello")
    direct.get_by_text("rm 2.3").wait_for()
    assert errors == []


def test_a_server_without_policies_is_told(chat):
    fake = Fake(JUDGE)
    page, _ = chat(fake)
    page.get_by_text("No policy is served here").wait_for()
    fake.models = [BASE]
    send(page, "Hello")  # looks again
    page.locator("option", has_text="base, temperature 1").first.wait_for(state="attached")
    page.get_by_label("Your message").press("Enter")
    page.get_by_text("base with seed 0: Hello").wait_for()


def test_texts_are_no_markup_and_hide_nothing(chat):
    fake = Fake(BASE | {"id": ATTACK}, TUNED, JUDGE)
    fake.says = {
        ATTACK: f"{ATTACK}\n  a\r\n\x1b[31m\x00\u202eabc",
        "ppo": f"{ARABIC}\n{'w' * 3000}",
    }
    fake.prompt = f"<|user|>{ATTACK}{'v' * 3000}"
    page, errors = chat(fake, size=PHONE)
    ask(page, f"{ATTACK} {'u' * 3000}")
    page.get_by_text("rm ").last.wait_for()
    for prompt in page.get_by_text("Prompt", exact=True).all():
        prompt.click()
    assert said(page)[0] == f"{ATTACK}\n  a\n⟨U+001B⟩[31m⟨U+0000⟩⟨U+202E⟩abc"
    assert ATTACK in page.locator("article > .text").inner_text()
    assert ATTACK in page.locator("details .text").first.inner_text()
    starts = """text => {
        const range = document.createRange();
        range.setStart(text.firstChild, 0);
        range.setEnd(text.firstChild, 1);
        return range.getBoundingClientRect().left - text.getBoundingClientRect().left;
    }"""
    first = columns(page).nth(1).locator("> .text")
    assert first.evaluate(starts) > 100  # from the right
    fake.refuses = {"/v1/chat/completions": (400, f"{ATTACK}{'x' * 3000}")}
    ask(page, "Why?")
    assert ATTACK in page.get_by_role("alert").inner_text()
    assert page.title() == "Chat"
    assert page.locator("img").count() == 0
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
    assert [one for one in errors if "400" not in one] == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("num", [1, 2])
def test_the_page_can_be_read_by_everybody_and_asks_nobody_else(chat, size, scheme, num):
    fake = Fake(BASE, TUNED, labels="labels.jsonl")
    fake.models = [*fake.models[:num], JUDGE]
    page, _ = chat(fake, size=size, scheme=scheme)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.locator("#send[aria-disabled=false]").wait_for()
    check_access(page)
    page.get_by_text("System message").click()
    ask(page, "Hello")
    page.get_by_text("rm ").last.wait_for()
    page.get_by_text("Prompt", exact=True).first.click()
    check_access(page)
    boxes = [one.bounding_box() for one in columns(page).all()]
    if num == 2:
        where = "x" if size == DESKTOP else "y"
        assert boxes[0][where] + 100 < boxes[1][where]
    else:
        assert len(boxes) == 1
        assert boxes[0]["width"] > 0.9 * size["width"]
        assert page.get_by_text("Model B").is_hidden()
    fake.go.clear()
    send(page, "Hello again")
    page.locator("#turns[aria-busy=true]").wait_for()
    check_access(page)
    fake.refuses = {"/score": (429, "too many are waiting")}
    fake.go.set()
    page.get_by_text("too many are waiting").wait_for()
    check_access(page)
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(18, 22, 27)" if scheme == "dark" else "rgb(246, 247, 249)")
    origin = page.evaluate("location.origin")
    assert len(asked) > 5
    assert [one for one in asked if not one.startswith(f"{origin}/")] == []


def test_all_is_reached_by_keys(chat):
    fake = Fake(BASE, TUNED, labels="labels.jsonl")
    page, _ = chat(fake)
    line = page.get_by_label("Your message")
    assert page.evaluate("document.activeElement.id") == "line"
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    line.dispatch_event("keydown", {"key": "Enter", "isComposing": True})  # of an input method
    assert line.input_value() == "One\ntwo"
    assert fake.asked == []
    page.keyboard.press("Enter")
    wait_for_answers(page)
    assert fake.asked[0][1]["messages"] == [user("One\ntwo")]
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.get_by_role("spinbutton", name="Temperature").focus()
    reached = []
    for _ in range(20):
        reached.append(page.evaluate("document.activeElement.outerHTML.slice(0, 200)"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert "<body" in reached[-1] or outline != "none"
        page.keyboard.press("Tab")
    for word in ("temperature", "seed", '"new"', "System", "select", "Prompt"):
        assert any(word in one for one in reached), word
    for word in ("A is better", "B is better", "Tie", "Both bad", "Send", "Stop", "Regenerate"):
        assert any(word in one for one in reached), word
    page.get_by_role("button", name="Tie").focus()
    page.keyboard.press("Enter")
    page.get_by_text("Kept in labels.jsonl").wait_for()
    assert page.evaluate("document.activeElement.id") == "line"  # the button is gone


def test_the_end_stays_in_view_unless_the_reader_scrolls_up(chat):
    fake = Fake(BASE)
    fake.says = {"base": "line\n" * 60 + "⏸" + "line\n" * 60}
    fake.go.clear()
    page, _ = chat(fake)
    gap = "document.documentElement.scrollHeight - innerHeight - scrollY"
    send(page, "Hello")
    page.get_by_text("line").wait_for()
    assert page.evaluate(gap) < 2
    page.evaluate("scrollTo(0, 100)")
    fake.go.set()
    wait_for_answers(page)
    assert page.evaluate("scrollY") == 100
    ask(page, "Hello")
    assert page.evaluate(gap) < 2


@contextlib.contextmanager
def serving(folder, *arguments):
    """The address of the page of ``rlhf-jax serve``, as it is printed."""
    command = [sys.executable, "-m", "rlhf_jax", "serve", *arguments, "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, **pipes) as process:
        try:
            told = []
            for line in process.stdout:
                told.append(line)
                if line.startswith("page: "):
                    yield line.removeprefix("page: ").strip()
                    break
            else:
                raise AssertionError("".join(told))
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=60)
            assert process.returncode == 0, rest
        finally:
            process.kill()


def test_two_models_are_compared_on_the_real_server(browser, tmp_path):
    runs = asked_runs.write(tmp_path)
    shutil.copytree(runs / "policy", runs / "other")
    file = runs / "other" / "model" / "model.safetensors"
    save_file({name: -leaf for name, leaf in load_file(file).items()}, file)
    folders = [str(runs / name) for name in ("policy", "other")]
    own = asking.Settings(template="auto")  # as the folders say that their runs asked
    policies = [asking.open_policy(folder, own) for folder in folders]
    judge = LanguageModel.load(runs / "reward" / "model")
    options = ("--reward", "reward", "--labels", "labels.jsonl", "--token")
    with serving(runs, "policy", "other", *options) as address:
        page, errors = opened(browser, address, DESKTOP)
        page.locator("#send[aria-disabled=false]").wait_for()
        asked = [user("who")]
        for seed in (0, 1):
            if seed:
                press(page, "Regenerate")
            else:
                send(page, "who")
            wait_for_scores(page, 2)
            texts = [policy([asked], seed=seed).texts[0] for policy in policies]
            assert [one.text_content() for one in columns(page).locator("> .text").all()] == texts
        scores = judge.score_texts([asked, asked], texts)
        for score, note in zip(scores, columns(page).locator("> p").all_inner_texts(), strict=True):
            assert f"reward {score:.3f}" in note
        press(page, "B is better")
        page.get_by_text("Kept in labels.jsonl").wait_for()
        page.get_by_label("Seed").fill("0")
        send(page, "and y")
        wait_for_scores(page, 2)
        whole = [*asked, assistant(texts[1]), user("and y")]
        assert said(page) == [policy([whole], seed=0).texts[0] for policy in policies]
        page.get_by_text("Prompt", exact=True).last.click()
        prompt = columns(page).last.locator("details .text").inner_text()
        assert prompt == f"who:{texts[1]}<|endoftext|>and y:"  # the frame of the run, twice
        send(page, "z" * 90)
        page.get_by_role("alert").get_by_text("tokens").wait_for()
        assert [one for one in errors if "400" not in one] == []
    [row] = json_lines(runs / "labels.jsonl")
    assert row["prompt"] == asked
    assert [row["chosen"], row["rejected"]] == texts[::-1]
