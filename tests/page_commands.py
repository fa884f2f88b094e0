"""All pages of the documentation, and the commands of each."""

import re

from builders import ROOT
from fifteen_minutes import FIRST
from pages import BLOCK, blocks

README = ROOT / "README.md"
PAGES = [
    README,
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
]
# What README says that this test does not run.
NOT_RUN = {
    "python3 -m venv": "makes the environment that runs this test",
    "pip install": "changes the environment; .ci/run starts with these commands",
    "rlhf-jax quickstart": "takes minutes; tests/fifteen_minutes.py runs it",
    **dict.fromkeys(FIRST, "follows the quickstart; tests/fifteen_minutes.py runs it"),
    "pytest": "is what runs this test",
}


def name(path):
    return path.relative_to(ROOT).as_posix()


def commands(path):
    """In the order of the page; a command that goes on in the next line, after a backslash, is
    one.
    """
    if path == README:
        lines = re.sub(r" *\\\n *", " ", BLOCK.sub("", path.read_text("utf-8"))).splitlines()
        given = [line.removeprefix("    ") for line in lines if line.startswith("    ")]
    else:
        text = "".join(block.text for block in blocks(path) if block.language == "console")
        lines = re.sub(r" *\\\n *", " ", text).splitlines()
        assert all(line.startswith(("$ ", "> ")) for line in lines), (
            f"{name(path)}: no '$ ' before a command"
        )
        given = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [command for command in given if not command.startswith(tuple(NOT_RUN))]
