"""The blocks of a documentation page, its commands, and what is typed into them."""

import re
from pathlib import Path
from typing import NamedTuple

LABELLED = "## Several people"  # of docs/your-preferences.md: what needs people and their clicks
BLOCK = re.compile(r"^```(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: the word after the fence, its text, and the line where that text starts."""

    language: str
    text: str
    line: int


def blocks(path: Path, labelled: bool = False) -> list[Block]:
    """The blocks of a page without those below ``LABELLED``, or with ``labelled`` these alone."""
    text = path.read_text("utf-8")
    above, _, below = text.partition(LABELLED)
    text = "\n" * above.count("\n") + below if labelled else above
    return [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in BLOCK.finditer(text)]


def typed(path: Path) -> dict[str, str]:
    """{command: the lines that are typed into it} of the ``console`` blocks, in their order."""
    lines: dict[str, str] = {}
    command = ""
    for block in blocks(path):
        if block.language != "console":
            continue
        for line in re.sub(r" *\\\n *", " ", block.text).splitlines():
            if line.startswith("$ "):
                command = line.removeprefix("$ ")
                lines[command] = ""
            else:
                lines[command] += line.removeprefix("> ") + "\n"
    return lines


def outputs(path: Path) -> dict[str, str]:
    """{command: the end of its output}: a ``text`` block that follows its ``console`` block."""
    text = path.read_text("utf-8").partition(LABELLED)[0]
    pair = re.compile(
        r"^```console\n(?P<asked>.*?)^```\n\n```text\n(?P<said>.*?)^```$", re.M | re.S
    )
    ends = {}
    for match in pair.finditer(text):
        asked = re.sub(r" *\\\n *", " ", match["asked"])
        *_, command = re.findall(r"^\$ (.*)$", asked, re.MULTILINE)
        ends[command] = match["said"]
    return ends
