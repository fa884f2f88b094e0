"""Chat templates: conversations as the ids that a model reads, and which of them it learns.

A template is Jinja as in the folders of Hugging Face, and transformers renders it
(``render_jinja_template``), so that the text is the one of ``apply_chat_template``. Two things are
added to it. A template may not use the operator ``**``, which can take hours; and
``strftime_now`` gives one fixed date, so that a prompt does not depend on the day. Templates come
from files: the sandbox keeps them from files and from Python's internals, but limits neither the
time nor the memory that they take.

What a model learns of a conversation is what it has to write in the learned turns of the
assistant: from behind the opening of a turn (``add_generation_prompt``) to the special token that
ends the turn. A special token that a message spells is refused, or read as text
(``text.special_tokens: text``): while the template is rendered a character of private use stands
for it. A template with ``{% generation %}`` says so itself. If a template writes a turn
otherwise once another follows (Qwen3 leaves out the reasoning of earlier turns), no single text is
right, and each learned turn gets its own text, as the model sees it then.
"""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2.sandbox
import numpy as np
import tokenizers

from rlhf_jax.data.conversation import is_answered, text_of
from rlhf_jax.data.rows import BadRow, Message, Messages, Row, Text, Tools, common_length
from rlhf_jax.data.tokenizers import Tokenizer, named_templates, stored_templates
from rlhf_jax.errors import UserError

AUTO = "auto"
"""The ``text.template`` that follows the model's folder; see `frame`."""

# For tokenizers without a template: "User:\nHello\n\nAssistant:\n".
PLAIN = (
    "{% for message in messages %}{{ message.role | capitalize }}:\n{{ message.content }}\n\n{% "
    "endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
# The chat template of a model that was trained with a ``text.template``. The parts of that text
# replace the names between @; the ends of the file's lines do not count.
_LINES = Path(__file__).with_name("text_template.jinja").read_text("utf-8").splitlines()
_TEXT_TEMPLATE = "".join(_LINES).replace("\\n", "\n")
_MARK = "{{#- text.template: {} -#}}"
_GENERATION = re.compile(r"({%[-+]?\s*)(end)?generation(?=\s*[-+]?%})")
# 26 July 2024, the default date of Llama 3's template, in the formats that templates use. The line
# end after the macro is removed by trim_blocks, so that the template begins at a line's start.
_DATE = {"d": "26", "b": "Jul", "B": "July", "m": "07", "Y": "2024", "y": "24", "A": "Friday"}
_DATE |= {"a": "Fri", "H": "00", "M": "00", "S": "00", "F": "2024-07-26", "-d": "26"}
_REPLACED = "".join(f" | replace('%{code}', '{text}')" for code, text in _DATE.items())
_TODAY = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}\n"
_NOT_CONTENT = ("reasoning_content", "tool_calls")  # what a message says beside its content
# Keys of a message that are no text, or that few templates need.
_KNOWN = {"role", "content", "weight", "name", "tool_call_id"}
_PROBE = "Probe4711"  # a content that no template writes itself
_PRIVATE = re.compile("([\U00108000-\U0010ffff])")  # for private use, but no icons of fonts
_CLOSING = re.compile(r"[<\[◁]/[\w:-]+[>\]▷]")  # of a tag such as <think>

Span = tuple[int, int]
"""The characters [start, end) of a text."""


class Encoded(NamedTuple):
    """A conversation as a model reads it: its token ids, and which of them it learns."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A Jinja template. With a tokenizer the rendered text is tokenised, its special tokens as
    special tokens. Without a tokenizer (`PLAIN`) prompts are text. Messages may not spell a
    special token of the tokenizer: data could then end a turn or pretend to be another role.
    """

    source: str = PLAIN
    tokenizer: Tokenizer | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """bos_token and the like, by the template's names."""
    tools_source: str = ""
    """The template of conversations with tools, if the folder has its own (``tool_use``)."""
    names: tuple[str, ...] = ()
    """Of all templates of the folder. Without a ``default`` the source is empty, and conversations
    without tools are refused."""
    reads_plain: bool = False
    """Whether a plain prompt is a user's message of this template."""

    def prompt(self, messages: Messages, where: str, after: str = "", tools: Tools = None) -> Text:
        """The conversation and the opening of the next assistant turn, or, if the last message is
        the assistant's, the conversation up to the end of that message, which the model continues.
        With ``after`` only the part that follows this text.

        The token ids are those of transformers' ``apply_chat_template(add_generation_prompt=True)``
        or ``(continue_final_message=True)`` on the date 26 July 2024.

        Raises:
          BadRow: at ``where``, for a template that fails or messages that spell a special token.
        """
        messages, tools = self._prepared(messages, tools, where)
        with _template_errors(where):
            rendered = self._opening(messages, tools)
            if after:
                rendered = rendered[rendered.rindex(after) + len(after) :]
            return rendered if self.tokenizer is None else tuple(self._encode(rendered).ids)

    def conversations(
        self,
        before: Messages,
        answer: Messages,
        learns: Sequence[int],
        where: str,
        tools: Tools = None,
    ) -> list[Encoded]:
        """The ids of a conversation, which are those of transformers' ``apply_chat_template``, and
        which of them are learned; one for each learned turn if the template rewrites earlier turns.

        If ``before`` and ``answer`` meet inside a turn of the assistant, it is one message: its
        beginning is given, its end learned. This template has a tokenizer.

        Args:
          learns: the numbers of the learned turns, counted over ``before`` and then ``answer``.

        Raises:
          BadRow: as `prompt`, and if the template writes nothing of the learned turns.
        """
        messages, tools = self._prepared([*before, *answer], tools, where)
        before, answer = messages[: len(before)], messages[len(before) :]
        with _template_errors(where):
            turns = [self._turn(before, answer, number, tools) for number in learns]
            whole = turns[-1][0]
            if learns[-1] < len(messages) - 1:
                whole, _ = self._rendered(_joined(before, answer), tools)
            spans = [span for _, own in turns for span in own]
            if all(whole.startswith(text[: own[-1][1]]) for text, own in turns if own):
                turns = [(whole, spans)]
            encoded = [self._encode(text, own) for text, own in turns]
        if not any(any(learned) for _, learned in encoded):
            raise BadRow(where, "the chat template writes nothing of the turns to learn")
        return encoded

    def answers(
        self, before: Messages, answer: Messages, where: str, tools: Tools = None
    ) -> tuple[str, str]:
        """The texts of a conversation up to the assistant's turn and of that turn, by `PLAIN`."""
        self._prepared([*before, *answer], tools, where)
        with _template_errors(where):
            return self._opening(before, None), text_of(answer[-1])

    def answered(
        self, messages: Messages, response: str, where: str, ends: bool = False
    ) -> list[int]:
        """Token ids of the conversation with the response as the assistant's next turn, which are
        those of transformers' ``apply_chat_template``; this template has a tokenizer. ``ends``:
        without what the template writes behind the token that ends the turn.

        A special token that the response spells stays a text, as in any response.

        Raises:
          BadRow: as `prompt`.
        """
        messages, _ = self._prepared(messages, None, where)
        content = self._hidden(response)
        turn = {"role": "assistant", "content": content}
        with _template_errors(where):
            rendered, _ = self._rendered(_joined(messages, [turn]), None)
            content = content.strip()  # as some templates do
            end = rendered.rindex(content) + len(content)
            if ends and self.end_of_turn is not None:
                rendered = rendered[: end + self._end_in(rendered[end:])]
            return self._encode(rendered).ids

    def unwritten(self, row: Row) -> set[str]:
        """What a row has and the template leaves out: keys that it never names, and what stands in
        tags of an answer, such as ``<think>``.
        """
        contents = [text_of(turn) for answer in row.answers for turn in answer]
        if not row.messages:
            if not self.reads_plain:
                return set()
            contents = [response for response in row.responses if isinstance(response, str)]
        turns = [*row.messages, *itertools.chain.from_iterable(row.answers)]
        has = {key for turn in turns for key, value in turn.items() if value} - _KNOWN
        if row.tools:
            has.add("tools")
        source = self._source_for(row.tools)
        left_out = {key for key in has if not re.search(rf"\b{re.escape(key)}\b", source)}
        tags = {tag for content in contents for tag in _CLOSING.findall(content)}
        if any(_is_cut(self, tag) for tag in tags):
            left_out.add("reasoning in content")
        return left_out

    @cached_property
    def end_of_turn(self) -> int | None:
        """The id of the special token that ends an assistant's turn; None if there is none."""
        ids = self.closing
        return ids[0] if ids else None

    @cached_property
    def closing(self) -> list[int]:
        """The ids of what ends a turn and of what the template writes behind it, such as a line
        end; empty if no special token ends a turn.
        """
        if self.tokenizer is None:
            return []
        found = self._closing_text
        place = self._end_in(found)
        if not place:
            return []
        return self._encode(self._last_special(found[:place]) + found[place:]).ids

    @cached_property
    def ends(self) -> list[int]:
        """The ids that end a turn of the assistant: an answer, and a call of a tool."""
        ids = self.closing[:1]
        _, name, after = self._with_call({} if self._reads_objects else "{}").rpartition(_PROBE)
        end = self._end_in(after)
        if name and end:
            ids += self._encode(self._last_special(after[:end])).ids
        return list(dict.fromkeys(ids))

    @cached_property
    def _reads_objects(self) -> bool:
        """Whether arguments of a call may be an object. DeepSeek's template joins their text."""
        return bool(self._with_call({}) or not self._with_call("{}"))

    def _with_call(self, arguments: Any) -> str:
        """A conversation that ends with a call of a tool; "" if the template fails."""
        call = {"name": _PROBE, "arguments": arguments}
        calls = [{"id": "call00001", "type": "function", "function": call}]
        turn: Message = {"role": "assistant", "content": "", "tool_calls": calls}
        with contextlib.suppress(Exception):  # a template can fail like any expression
            return self._rendered([{"role": "user", "content": "?"}, turn], None)[0]
        return ""

    def _last_special(self, text: str) -> str:
        """The special token that ends a text."""
        return max((token for token in self._special if text.endswith(token)), key=len)

    @cached_property
    def _closing_text(self) -> str:
        """What the template writes behind the content of a last assistant's turn."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        with contextlib.suppress(Exception):  # a template can fail like any expression
            _, found, closing = self._rendered(turns, None)[0].rpartition(_PROBE)
            return closing if found else ""
        return ""

    def _turn(
        self, before: Messages, answer: Messages, number: int, tools: Tools
    ) -> tuple[str, list[Span]]:
        """The conversation up to the turn with this number, and what is learned of that turn. A
        turn that no special token ends gets EOS, and nothing of the template behind it.
        """
        assert self.tokenizer is not None
        messages = [*before, *answer]
        until = max(number - len(before) + 1, 0)
        text, spans = self._rendered(_joined(before[: number + 1], answer[:until]), tools)
        is_begun = number == len(before) and is_answered(before)
        how = "continue_final_message" if is_begun else "add_generation_prompt"
        opening, _ = self._rendered(messages[:number], tools, how)
        if not text.startswith(opening):
            history, _ = self._rendered(messages[:number], tools)
            if not text.startswith(history):
                turn = self._behind(opening, text)
                end = self._end_in(turn) or len(turn)
                return opening + turn, [(len(opening), len(opening) + end)]
        start = common_length(opening, text)
        if start < len(opening) and not is_begun:  # it opens an answer as this one does not begin
            other: Message = {"role": "assistant", "content": _PROBE}
            probe, _ = self._rendered([*messages[:number], other], tools)
            if _PROBE in probe:
                start = min(start, probe.rindex(_PROBE))
        if _GENERATION.search(self._source_for(tools)):
            least = start if is_begun else 0
            return text, [(max(least, first), end) for first, end in spans if end > start]
        end = self._end_in(text[start:])
        if end:
            return text, [(start, start + end)]
        eos = self.tokenizer.spelled([self.tokenizer.eos_id])
        ended = text.removesuffix(self._closing_text) + eos
        return ended, [(start, len(ended))]

    def _behind(self, opening: str, text: str) -> str:
        """The last turn of a text whose history the template writes otherwise than before the turn
        (Mistral leaves out the system's message): what follows the last special token of the
        opening, and the opening's characters behind that token.
        """
        place = max((opening.rfind(token) for token in self._special), default=-1)
        tail = opening[place:]
        if place < 0 or tail not in text:
            raise ValueError("it writes a turn of the assistant otherwise than it opens it")
        return text[text.rindex(tail) + len(tail) :]

    def _end_in(self, text: str) -> int:
        """The place behind the last special token of a text if only spaces follow it; else 0."""
        kept = text.rstrip()
        is_ended = any(kept.endswith(token) for token in self._special)
        return len(kept) if is_ended else 0

    def _opening(self, messages: Messages, tools: Tools) -> str:
        """The conversation and the opening of the next assistant turn, or up to the end of its
        last message if that is the assistant's.
        """
        how = "continue_final_message" if is_answered(messages) else "add_generation_prompt"
        return self._rendered(messages, tools, how)[0]

    def _rendered(self, messages: Messages, tools: Tools, how: str = "") -> tuple[str, list[Span]]:
        """The text of the messages, and the spans of ``{% generation %}``. ``how``: the argument of
        ``apply_chat_template`` that is True.
        """
        if self.source == PLAIN:
            return plain(messages, how), []
        source = self._source_for(tools)
        _check_source(source)
        marks = not how and _GENERATION.search(source) is not None
        options: Any = {how: True} if how else {}
        rendered, spans = _renderer()(
            [[*messages]],
            tools=tools,
            chat_template=(_TODAY if "strftime_now" in source else "") + source,
            return_assistant_tokens_mask=marks,
            **options,
            **self.special_tokens,
        )
        return rendered[0], spans[0] if marks else []

    def _source_for(self, tools: Tools) -> str:
        is_for_tools = self.tools_source and (tools or not self.source)
        return self.tools_source if is_for_tools else self.source

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template writes the text of a list of parts, rather than fail or write the
        list.
        """
        parts = [{"type": "text", "text": _PROBE}]
        source = self._source_for(None)
        with contextlib.suppress(Exception):
            rendered, _ = _renderer()(
                [[{"role": "user", "content": parts}]],
                chat_template=(_TODAY if "strftime_now" in source else "") + source,
                **self.special_tokens,
            )
            return _PROBE in rendered[0] and "'type'" not in rendered[0]
        return False

    def _encode(self, rendered: str, spans: Sequence[Span] = ()) -> Encoded:
        """The ids of a text, and which of them overlap a span. A token without characters, such as
        the space that SentencePiece puts first, is learned if it stands in a span.
        """
        assert self.tokenizer is not None
        ids: list[int] = []
        offsets: list[Span] = []
        place = 0
        for number, piece in enumerate(_PRIVATE.split(rendered)):
            is_hidden = number % 2 == 1
            backend = self.tokenizer.backend if is_hidden else self._encoder
            text = self._texts.get(piece, piece) if is_hidden else piece
            # SentencePiece would put a space before it.
            before = "\n" if number and self.tokenizer.begins_with_space else ""
            lead = backend.encode(before, add_special_tokens=False).ids
            found = backend.encode(before + text, add_special_tokens=False)
            if found.ids[: len(lead)] != lead:
                before, lead = "", []
                found = backend.encode(text, add_special_tokens=False)
            if is_hidden:
                self.tokenizer.check_text(text, found.ids)
            ids += found.ids[len(lead) :]
            for first, end in found.offsets[len(lead) :]:
                inside = (0, 1) if is_hidden else (first - len(before), end - len(before))
                offsets.append((place + inside[0], place + inside[1]))
            place += len(piece)
        if not spans:
            return Encoded(ids, [False] * len(ids))
        starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        learned = np.zeros(len(ids), bool)
        for first, end in spans:
            is_inside = (ends > first) | (starts == first)
            learned |= is_inside & (starts < end)
        return Encoded(ids, learned.tolist())

    def _prepared(
        self, messages: Messages, tools: Tools, where: str
    ) -> tuple[list[Message], Tools]:
        """The messages and tools as the template gets them: without keys of null, calls with their
        arguments as objects, the text of parts for a template that cannot read them, and what
        spells a special token hidden.

        Raises `BadRow` for a conversation that no template is for, for what `PLAIN` would leave
        out, and for a spelled special token, unless it is to be text.
        """
        if not (self.source or (tools and self.tools_source)):
            which = f"the model's folder has the chat templates {', '.join(self.names)}"
            what = f"{which}, and none named default for a conversation without tools"
            raise BadRow(where, f"{what}; save the one that you mean as its chat_template.jinja")
        parts: list[tuple[str, Any]] = [("the tools", tools)] if tools else []
        others = ["tools"] if tools else []
        prepared = []
        for message in messages:
            role = message["role"]
            own = [key for key in _NOT_CONTENT if message.get(key)]
            others += own
            name = f"{'an' if role == 'assistant' else 'a'} {role} message"
            parts += [(name, value) for value in (text_of(message), *map(message.get, own))]
            given = {key: value for key, value in message.items() if value is not None}
            if isinstance(given.get("content"), list) and not self._reads_parts:
                given["content"] = text_of(message)
            if isinstance(given.get("tool_calls"), list) and self._reads_objects:
                given["tool_calls"] = [_with_object(call) for call in given["tool_calls"]]
            prepared.append(given)
        if others and self.source == PLAIN:
            what = f"the plain template writes no {others[-1]}"
            raise BadRow(where, f"{what}; name a model whose own template does")
        if self.tokenizer is None:
            return prepared, tools
        if self.tokenizer.spelled_as != "text":
            for name, part in parts:
                text = part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)
                for token in self.tokenizer.spelled_in(text):
                    what = f"{name} spells the special token {token!r}"
                    how = "remove it, or read it as ordinary characters: text.special_tokens: text"
                    raise BadRow(where, f"{what}; {how}")
        hidden = [self._hidden(message) | {"role": message["role"]} for message in prepared]
        return hidden, self._hidden(tools)

    def _hidden(self, value: Any) -> Any:
        """The value with each special token that its texts spell, and each character of private
        use, as one such character, which `_encode` reads as that text.
        """
        if isinstance(value, dict):
            return {self._hidden(key): self._hidden(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._hidden(inner) for inner in value]
        if not isinstance(value, str) or self.tokenizer is None:
            return value
        if self.tokenizer.spelled_in(value) or _PRIVATE.search(value):  # faster than the next
            return self._to_hide.sub(lambda found: self._hide(found[0]), value)
        return value

    def _hide(self, text: str) -> str:
        known = {text: character for character, text in self._texts.items()}
        character = known.get(text) or chr(0x108000 + len(known))
        self._texts[character] = text
        return character

    @cached_property
    def _texts(self) -> dict[str, str]:
        """What each character of private use stands for."""
        return {}

    @cached_property
    def _to_hide(self) -> re.Pattern[str]:
        longest_first = sorted(self._special, key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, longest_first), _PRIVATE.pattern]))

    @cached_property
    def _encoder(self) -> tokenizers.Tokenizer:
        assert self.tokenizer is not None
        return self.tokenizer.with_special_tokens

    @cached_property
    def _special(self) -> list[str]:
        return [] if self.tokenizer is None else self.tokenizer.special_tokens


@lru_cache(maxsize=1)
def _renderer() -> Callable[..., Any]:
    """transformers' renderer, imported with the first template: that takes most of a second."""
    # Without PyTorch it says that no models are available, and none is wanted here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.utils import chat_template_utils

    return chat_template_utils.render_jinja_template


def plain(messages: Messages, how: str = "") -> str:
    """The text of `PLAIN`, which also shows messages to people. ``how``: as ``_rendered``."""
    turns = [f"{turn['role'].capitalize()}:\n{text_of(turn)}\n\n" for turn in messages]
    text = "".join(turns)
    if how == "continue_final_message":
        return text.removesuffix("\n\n")
    return f"{text}Assistant:\n" if how else text


def _joined(before: Messages, answer: Messages) -> list[Message]:
    """The messages of both. A turn of the assistant that ``before`` begins and ``answer`` continues
    is one message.
    """
    messages = [*before, *answer]
    if not (answer and is_answered(before) and answer[0]["role"] == "assistant"):
        return messages
    whole = {**before[-1], **answer[0], "content": text_of(before[-1]) + text_of(answer[0])}
    return [*before[:-1], whole, *answer[1:]]


@lru_cache(maxsize=256)
def _is_cut(template: ChatTemplate, closing: str) -> bool:
    """Whether a template leaves out what stands before this tag in a last assistant's message."""
    content = template._hidden(f"{closing.replace('/', '', 1)}{_PROBE}{closing}.")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    with contextlib.suppress(Exception):  # a template can fail like any expression
        return _PROBE not in template._rendered(turns, None)[0]
    return False


def _with_object(call: Any) -> Any:
    """A call of a tool, its arguments an object if they are the JSON text of one, as in OpenAI's
    form: templates write JSON themselves.
    """
    if not isinstance(call, dict):
        return call
    call = call | ({"function": _with_object(call["function"])} if "function" in call else {})
    with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError):
        arguments = json.loads(call["arguments"])
        if isinstance(arguments, dict):
            return call | {"arguments": arguments}
    return call


@lru_cache(maxsize=64)
def _check_source(source: str) -> None:
    """Raises SecurityError for a template with the operator ``**``, before anything computes it."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    plain_tags = _GENERATION.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}", source)
    if environment.parse(plain_tags).find(jinja2.nodes.Pow):
        raise jinja2.sandbox.SecurityError("** is not allowed")


@contextlib.contextmanager
def _template_errors(where: str) -> Iterator[None]:
    """Turns any failure of a chat template into a `BadRow`."""
    try:
        yield
    except BadRow:
        raise
    # a template can fail like any expression, and a vocabulary can lack a character
    except Exception as error:
        what = f"the chat template failed: {type(error).__name__}: {error}"
        raise BadRow(where, what) from error


@lru_cache(maxsize=8)
def template_of(tokenizer: Tokenizer | None, template: str = "{prompt}") -> ChatTemplate:
    """The template that renders messages under a ``text.template``: the tokenizer's own chat
    template, or `PLAIN` if it has none.

    A chat template that `with_text_template` made from a text is ignored, except under `AUTO`.
    """
    if tokenizer is None:
        return ChatTemplate()
    named = named_templates(tokenizer.config)
    is_own = text_template(tokenizer) in (None, "{prompt}")
    source = named.get("default", "")
    is_plain = source in (PLAIN, _beginning(tokenizer) + PLAIN)
    if is_plain or not named or not (is_own or template == AUTO):
        return ChatTemplate()
    for_tools = named.get("tool_use", "")
    named_tokens = {
        key: token
        for key, token in tokenizer.config.items()
        if key.endswith("_token") and isinstance(token, str)
    }
    reads_plain = frame(template, tokenizer) is None
    return ChatTemplate(source, tokenizer, named_tokens, for_tools, tuple(named), reads_plain)


def _beginning(tokenizer: Tokenizer) -> str:
    """The Jinja that writes the BOS with which transformers begins a plain text, if it does."""
    ids = tokenizer.beginning
    texts = [json.dumps(tokenizer.spelled([i]), ensure_ascii=False) for i in ids]
    return "".join(f"{{{{- {text} -}}}}" for text in texts)


def frame(template: str, tokenizer: Tokenizer) -> str | None:
    """The text with ``{prompt}`` that encloses plain prompts under a ``text.template``. None: a
    plain prompt is a user's message in the tokenizer's chat template.

    `AUTO` is the text template of the run that left the tokenizer's folder (`text_template`), or
    else its chat template, or else ``{prompt}``.
    """
    if template != AUTO:
        return template
    of_run = text_template(tokenizer)
    if of_run is not None:
        return of_run
    has_own = template_of(tokenizer).tokenizer is not None
    return None if has_own else "{prompt}"


def in_force(template: str, tokenizer: Tokenizer) -> str:
    """The `frame` of plain prompts, or the source of the chat template that renders them."""
    return frame(template, tokenizer) or template_of(tokenizer).source


def describe(template: str, tokenizer: Tokenizer, folder: str | None) -> str:
    """A line that says in which template a model gets its prompts. Its tokenizer is the folder's or
    new.
    """
    around = frame(template, tokenizer)
    if template != AUTO:
        return f"text.template: {template!r}"
    if around is None:
        which = f"the chat template of {folder}; a plain prompt is a user's message"
    elif text_template(tokenizer) is None:
        which = f"{around}; there is no chat template"
    else:
        which = f"{around!r}, with which {folder} was trained"
    return f"text.template {AUTO}: {which}"


def boundaries(template: str, tokenizer: Tokenizer) -> str:
    """A line that says what ends the turns of the assistant and what begins a plain text."""
    around = frame(template, tokenizer)
    end = None if around is not None else template_of(tokenizer).end_of_turn
    begins = tokenizer.spelled(tokenizer.beginning) or "no special token"
    ends = tokenizer.spelled([tokenizer.eos_id if end is None else end])
    return f"turns end with {ends}, texts begin with {begins}"


def with_text_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The tokenizer with a chat template that gives chat clients the prompt format of the run.

    A user's message stands where ``template``, the run's ``text.template``, has ``{prompt}``; an
    assistant's has the tokenizer's EOS after it; any other, such as a system message, stands before
    the next user's. Under `AUTO` the chat template stays. Under a bare ``{prompt}`` it is the one
    that renders the messages of data files: the tokenizer's own, marked as not for plain prompts,
    or `PLAIN`.
    """
    mark = _MARK.format(json.dumps(template).replace("#", "\\u0023"))  # else "#}" would end it
    own = template_of(tokenizer)
    begun = _beginning(tokenizer)
    source: Any = tokenizer.config.get("chat_template", begun + PLAIN)
    if template == "{prompt}" and own.source and own.tokenizer is not None:
        default = {"default": mark + own.source.removeprefix(mark)}
        source = stored_templates(named_templates(tokenizer.config) | default)
    elif template == "{prompt}" and text_template(tokenizer) is not None:
        source = begun + PLAIN
    elif template not in (AUTO, "{prompt}"):
        *before, after = (
            json.dumps(part, ensure_ascii=False) for part in template.split("{prompt}")
        )
        parts = {"MARK": mark, "FRAMED": " + text + ".join(before), "AFTER": after}
        parts["BEGIN"] = begun
        source = re.sub("@([A-Z]+)@", lambda match: parts[match[1]], _TEXT_TEMPLATE)
    return replace(tokenizer, config={**tokenizer.config, "chat_template": source})


def reading(
    tokenizer: Tokenizer,
    options: Mapping[str, Any] | None,
    special_tokens: Literal["text", "tokens"] | None,
) -> Tokenizer:
    """The tokenizer as a run with ``text.template_options`` and ``text.special_tokens`` reads."""
    return replace(with_options(tokenizer, options), spelled_as=special_tokens)


def with_options(
    tokenizer: Tokenizer, options: Mapping[str, Any] | None, where: str = "text.template_options"
) -> Tokenizer:
    """The tokenizer with these variables as defaults of its chat template, also for programs that
    read its folder.

    Raises:
      UserError: it begins with ``where``; there is no chat template, or it does not name one of the
        variables.
    """
    if not options:
        return tokenizer
    template = template_of(tokenizer)
    if template.tokenizer is None:
        raise UserError(f"{where}: the model has no chat template that could read them")
    for name in options:
        used = re.search(rf"\b{re.escape(name)}\b", template.source + template.tools_source)
        if not (name.isidentifier() and used):
            raise UserError(f"{where}: the chat template of the model reads no variable {name!r}")
    lines = [
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in options.items()
    ]

    named = {}
    for name, source in named_templates(tokenizer.config).items():
        mark = re.match(r"(\{#- text\.template: .*? -#\})?", source)
        end = mark.end() if mark else 0
        named[name] = source[:end] + "".join(lines) + source[end:]
    config = {**tokenizer.config, "chat_template": stored_templates(named)}
    return replace(tokenizer, config=config)


def _literal(value: Any) -> str:
    """A value of JSON as Jinja writes it."""
    if isinstance(value, dict):
        items = [f"{_literal(key)}: {_literal(inner)}" for key, inner in value.items()]
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value)


def text_template(tokenizer: Tokenizer) -> str | None:
    """The ``text.template`` that `with_text_template` wrote into the chat template; None for any
    other.
    """
    source = named_templates(tokenizer.config).get("default", "")
    made = re.match(r'\{#- text\.template: (".*?") -#\}', source)
    with contextlib.suppress(ValueError):  # a folder of others may hold anything
        return str(json.loads(made[1])) if made else None
    return None


def shown(row: Row, tokenizer: Tokenizer) -> str:
    """A row's prompt as text for people: messages in the form of `PLAIN`, token ids decoded."""
    if isinstance(row.prompt, str):
        return row.prompt
    if not row.messages:
        return tokenizer.decode(row.prompt)
    messages = []
    for message in row.messages:
        calls = message.get("tool_calls")
        written = json.dumps(calls, ensure_ascii=False) if calls else ""
        messages.append(message | {"content": text_of(message) + written})
    how = "continue_final_message" if is_answered(messages) else "add_generation_prompt"
    return plain(messages, how)
