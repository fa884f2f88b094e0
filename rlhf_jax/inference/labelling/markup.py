"""Texts of models and data as HTML in which nothing of theirs is a tag.

Of Markdown it knows fenced blocks, ``code`` and **bold**; links and pictures stay text.
"""

import html
import re
from collections.abc import Iterator

from rlhf_jax.data.conversation import text_of
from rlhf_jax.report.page import PICTURES

# What stands behind a fence, as the name of a language, stays: nothing of an answer is hidden.
_FENCE = re.compile(r"^ {0,3}```(?=[^`\n]*$)", re.MULTILINE)
_BLANK = re.compile(r"\n[ \t]*\n\s*")
_CODE = re.compile(r"`([^`\n]+)`")
# Not across another **, or the time would be quadratic; not powers, as in x**2 + y**2.
_BOLD = re.compile(r"(?<![\w)\]])\*\*(?=\S)((?:(?!\*\*).)+)(?<=\S)\*\*(?!\w)", re.ASCII)


def render(text: str) -> str:
    """The text as paragraphs and blocks of code. A fence that is not closed runs to the end."""
    return "".join(_blocks(text.replace("\r\n", "\n").translate(PICTURES)))


def conversation(prompt: object) -> str:
    """A prompt, which is a text or messages, as HTML; each message under its role."""
    if not isinstance(prompt, list):
        return render(str(prompt))
    parts = []
    for message in prompt:
        role = html.escape(str(message["role"]).translate(PICTURES))
        parts.append(f'<div class="turn"><h3>{role}</h3>{render(text_of(message))}</div>')
    return "".join(parts)


def _blocks(text: str) -> Iterator[str]:
    for number, part in enumerate(_FENCE.split(text)):
        if number % 2:
            code = html.escape(part.strip("\n"))
            yield f'<pre tabindex="0"><code>{code}</code></pre>'
            continue
        for paragraph in _BLANK.split(part.strip()):
            if paragraph:
                yield f"<p>{_line(paragraph)}</p>"


def _line(text: str) -> str:
    """A paragraph: what stands between backquotes is code, in which nothing else is read."""
    parts = _CODE.split(text)
    for number, part in enumerate(parts):
        escaped = html.escape(part)
        if number % 2:
            parts[number] = f"<code>{escaped}</code>"
        else:
            bold = _BOLD.sub(r"<strong>\1</strong>", escaped)
            parts[number] = bold.replace("\n", "<br>")
    return "".join(parts)
