"""The page in a real browser: by mouse and by keys, on a desktop and on a phone, light and dark;
what it needs of Chromium and axe-core is skipped where they are missing.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import browsing
import pytest
from browsing import check_access, chromium
from builders import ROOT, json_lines, save_base
from pages import blocks

PAGE = ROOT / "docs" / "your-preferences.md"
PICTURES = os.environ.get("LABEL_PICTURES")  # a folder: draw the pictures of the docs anew
ATTACK = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title='hacked'\">"
CODE = "Use `sorted`:\n\n```python\nprint(sorted([3, 1, 2]))\n```\n\nIt gives a **new** list."
ROWS = [
    {"prompt": "How do I sort a list in Python?", "responses": [CODE, "With `list.sort()`."]},
    {"prompt": f"What is a tag? {ATTACK}", "responses": [f"This: {ATTACK}", "A mark."]},
    *[{"prompt": f"Question {i}", "responses": [f"Answer {i}", "None."]} for i in range(4)],
]
DESKTOP = {"width": 1180, "height": 620}
PHONE = {"width": 390, "height": 780}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


class Served:
    """``rlhf-jax label --serve`` as a process."""

    def __init__(self, folder, *arguments):
        command = [sys.executable, "-m", "rlhf_jax", *arguments]
        env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1")
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
            cwd=folder,
        )
        self.addresses = {}
        said = []
        for line in self.process.stdout:
            said.append(line)
            if match := re.match(r"(\w+): (http://\S+)$", line):
                self.addresses[match[1]] = match[2]
            if line.startswith("Ctrl-C"):
                return
        raise AssertionError("".join(said))

    def end(self):
        self.process.send_signal(signal.SIGINT)
        said = self.process.communicate(timeout=60)[0]
        assert self.process.returncode == 0, said
        return said


@pytest.fixture
def served(tmp_path):
    started = []

    def serve(*arguments):
        started.append(Served(tmp_path, *arguments))
        return started[-1]

    yield serve
    for one in started:
        if one.process.poll() is None:
            one.process.kill()


def opened(browser, address, size, scheme="light"):
    page, errors = browsing.opened(browser, address, size, scheme)
    page.locator("#pair").wait_for()
    return page, errors


def wait_for(page, own):
    page.get_by_text(f"yours {own},").wait_for()
    page.locator('[data-choice="undo"][aria-disabled="false"]').wait_for()


def picture(page, name):
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES, name)))


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def by_mouse(browser, address):
    """Judges four of six pairs."""
    page, errors = opened(browser, address, DESKTOP)
    check_access(page)
    picture(page, "label_desktop.png")
    assert page.locator("pre code").inner_text() == "python\nprint(sorted([3, 1, 2]))"
    boxes = [page.locator(f"#answer-{name}").bounding_box() for name in "ab"]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] < boxes[1]["x"]
    page.get_by_label("Strong").check()
    page.get_by_label("Reason").fill("1 2 0 x s u")  # keys in a text are letters
    press(page, "A is better")
    wait_for(page, 1)
    assert ATTACK in page.locator("#conversation").inner_text()
    assert page.title() == "Compare two answers"
    page.keyboard.press("2")
    wait_for(page, 2)
    page.keyboard.press("u")
    wait_for(page, 1)
    for own, name in enumerate(("B is better", "Tie", "Both bad", "Skip"), 2):
        press(page, name)
        wait_for(page, own)
    press(page, "Undo")
    wait_for(page, 4)
    return page, errors


def by_keys(page):
    """Judges the other pairs."""
    page.keyboard.press("Tab")  # on from the heading, to the buttons: no mouse is needed
    for _ in range(12):
        if page.evaluate("document.activeElement.dataset.choice") == "a":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait_for(page, 5)
    for own in (6, 7):
        page.keyboard.press("1")
        wait_for(page, own)
    page.get_by_text("no more pairs for you").wait_for()


def on_a_phone(browser, address):
    phone, errors = opened(browser, address, PHONE, "dark")
    check_access(phone)
    picture(phone, "label_phone.png")
    boxes = [phone.locator(f"#answer-{name}").bounding_box() for name in "ab"]
    assert boxes[0]["y"] < boxes[1]["y"]
    wide = "document.documentElement.scrollWidth > innerWidth"
    assert not phone.evaluate(wide)
    back = phone.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == "rgb(18, 22, 27)"
    assert errors == []
    assert opened(browser, address, DESKTOP, "dark")[1] == []


def test_people_label_by_mouse_by_keys_and_on_a_phone(browser, served, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    how = ["--answers", "a.json", "--out", "prefs.jsonl", "--annotators", "ana,ben"]
    site = served("label", "--serve", "--port", "0", *how, "--reasons", "--per-pair", "2")
    page, errors = by_mouse(browser, site.addresses["ana"])
    by_keys(page)
    assert errors == []
    on_a_phone(browser, site.addresses["ben"])
    said = site.end()
    assert "ana: judgements 6" in said
    rows = json_lines(tmp_path / "prefs.jsonl")
    assert len(rows) == 6
    assert rows[0]["strength"] == "strong"
    assert rows[0]["reason"] == "1 2 0 x s u"
    assert rows[3]["both_bad"] is True


def test_the_commands_of_the_page_with_simulated_clicks(browser, served, tmp_path):
    """A person labels on a phone what a model samples, trains a reward model on it, and sees how
    often they agree.
    """
    console = "".join(
        block.text for block in blocks(PAGE, labelled=True) if block.language == "console"
    )
    lines = re.sub(r" *\\\n *", " ", console).splitlines()
    commands = [shlex.split(line.removeprefix("$ rlhf-jax ")) for line in lines]
    serving = next(command for command in commands if "--serve" in command)
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    subprocess.run(
        [sys.executable, "-m", "rlhf_jax", "data", "demo", "runs/quickstart/data"],
        cwd=tmp_path,
        env=env,
        check=True,
    )
    save_base(tmp_path / "runs" / "quickstart" / "sft", tmp_path / "runs" / "quickstart" / "data")
    site = served(*serving, "--port", "0", "--max-new-tokens", "24")
    for name in site.addresses:
        page, errors = opened(browser, site.addresses[name], PHONE)
        done = 0
        while page.locator("#pair").is_visible():
            longer = [len(page.locator(f"#answer-{one}").inner_text()) for one in "ab"]
            choice = "A is better" if longer[0] >= longer[1] else "B is better"
            press(page, choice)
            done += 1
            wait_for(page, done)
            page.wait_for_function(
                "!document.getElementById('message').innerText.includes('sampled')"
            )
        assert done >= 30
        assert errors == []
    site.end()
    for command in commands:
        if command is serving:
            continue
        ran = subprocess.run(
            [sys.executable, "-m", "rlhf_jax", *command],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
