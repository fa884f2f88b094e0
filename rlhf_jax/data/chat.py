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
(``text.special_tokens: text``): while the template is rendered characters of private use, which
depend on nothing else, stand for it. A template with ``{% generation %}`` says so itself. If a
template writes a turn otherwise once another follows (Qwen3 leaves out the reasoning of earlier
turns), no single text is right, and each learned turn gets its own text, as the model sees it then.
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

from rlhf_jax.data.conversation import is_answered, said, text_of
from rlhf_jax.data.rows import BadRow, Fields, Message, Messages, Row, Text, Tools, common_length
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
_OUR_MARK = r'^(?:\{#- text\.template: (".*?") -#\})?'
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
_ASKS: Message = {"role": "user", "content": "?"}
_ANSWERS: Message = {"role": "assistant", "content": _PROBE}
# UTF-8 in characters for private use, no icons of fonts: first byte + 0x10fe00, others + 0x10ff00.
_PRIVATE = re.compile("([\U0010fe00-\U0010ffff][\U0010ff00-\U0010ffff]*)")
_CLOSING = re.compile(r"[<\[◁]/[\w:-]+[>\]▷]")  # of a tag such as <think>

_REWRITTEN = (
    "the chat template writes earlier turns otherwise once another follows, so that an answer of "
    "several turns has no single text; keep the turns before the last one equal in all answers"
)
_SEVERAL = (
    "answers of several turns need a chat template with a token that ends a turn; name a model "
    "that has one"
)
_MOST = 2 * 10**9  # characters that are rendered for one row; about ten seconds
_OF_A_MESSAGE = 2500  # characters that take as long as a message itself

Span = tuple[int, int]
"""The characters [start, end) of a text."""


class Encoded(NamedTuple):
    """A conversation as a model reads it, and which of its token ids are learned; by `PLAIN` its
    text, and which of its characters are.
    """

    text: Text
    learned: list[bool]

    def up_to(self, end: int) -> "Encoded":
        return Encoded(self.text[:end], self.learned[:end])


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A Jinja template. With a tokenizer the rendered text is tokenised, its special tokens as
    special tokens. Without a tokenizer (`PLAIN`) prompts are text. Messages may not spell a
    special token of the tokenizer: data could then end a turn or pretend to be another role.
    """

    source: str = PLAIN
    tokenizer: Tokenizer | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    """bos_token and the like, and what a row sets, by the template's names."""
    tools_source: str = ""
    """The template of conversations with tools, if the folder has its own (``tool_use``)."""
    names: tuple[str, ...] = ()
    """Of all templates of the folder. Without a ``default`` the source is empty, and conversations
    without tools are refused."""
    reads_plain: bool = False
    """Whether a plain prompt is a user's message of this template."""

    def with_variables(self, variables: Fields, where: str) -> "ChatTemplate":
        """The template with a row's variables. Raises `BadRow` as `prompt`."""
        hidden = self._hidden(variables, "chat_template_kwargs", where)
        return replace(self, variables={**self.variables, **hidden}) if hidden else self

    def prompt_of(self, row: Row) -> Text:
        """`prompt` of a row's messages with its tools and variables."""
        own = self.with_variables(row.variables, row.source)
        return own.prompt(row.messages, row.source, tools=row.tools)

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
            rendered, _ = self._rendered(messages, tools, _opening_of(messages))
            if after:
                rendered = rendered[rendered.rindex(after) + len(after) :]
            return rendered if self.tokenizer is None else tuple(self._encode(rendered)[0])

    def conversations(
        self,
        before: Messages,
        answer: Messages,
        learns: Sequence[int],
        where: str,
        tools: Tools = None,
    ) -> list[Encoded]:
        """The ids of a conversation, which are those of transformers' ``apply_chat_template``, and
        which of them are learned; one for each learned turn if the template rewrites earlier turns
        or, as `PLAIN`, ends no turn with a token.

        What stands before a learned turn is tokenised by itself, as in `prompt`. If ``before`` and
        ``answer`` meet inside a turn of the assistant, it is one message: its beginning is given,
        its end learned.

        Args:
          learns: the numbers of the learned turns, counted over ``before`` and then ``answer``.

        Raises:
          BadRow: as `prompt`, and if the template writes nothing of the learned turns.
        """
        messages, tools = self._prepared([*before, *answer], tools, where)
        with _template_errors(where):
            if self.tokenizer is None:
                return [self._plain_turn(messages, number) for number in learns]
            joined = _joined(messages[: len(before)], messages[len(before) :])
            num_joined = len(messages) - len(joined)
            turns = []
            for number in learns:
                begun = messages[number - 1] if num_joined and number == len(before) else None
                turns.append(self._turn(joined[: number - num_joined + 1], begun, tools))
            whole = turns[-1][0]
            if learns[-1] < len(messages) - 1:
                whole, _ = self._rendered(joined, tools)
            if all(whole.startswith(text[: own[-1][1]]) for text, own, _ in turns if own):
                spans = [span for _, own, _ in turns for span in own]
                turns = [(whole, spans, [cut for *_, cuts in turns for cut in cuts])]
            parts = [self._encode(*turn) for turn in turns]
            encoded = [Encoded(tuple(ids), learned) for ids, learned in parts]
        if not any(any(one.learned) for one in encoded):
            raise BadRow(where, "the chat template writes nothing of the turns to learn")
        return encoded

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
            # In front of what closes the turn, where a short answer may stand once more.
            close = len(rendered.removesuffix(self._closing_text))
            end = rendered.rindex(content, 0, close) + len(content)
            if ends and self.end_of_turn is not None:
                rendered = rendered[: end + self._end_in(rendered[end:])]
            opening, _ = self._rendered(messages, None, _opening_of(messages))
            return self._encode(rendered, cuts=_cuts(opening, rendered))[0]

    def unwritten(self, row: Row) -> set[str]:
        """What a row has and the template leaves out: keys that it never names, and what stands in
        tags of an answer, such as ``<think>``.
        """
        turns = list(itertools.chain(*row.answers))
        contents = list(map(text_of, turns))
        if not row.messages:
            if not self.reads_plain:
                return set()
            contents = [response for response in row.responses if isinstance(response, str)]
        turns += row.messages
        has = {key for turn in turns for key, value in turn.items() if value} - _KNOWN
        has |= row.variables.keys() | ({"tools"} if row.tools else set())
        source = self._source_for(row.tools)
        left_out = {key for key in has if not re.search(rf"\b{re.escape(key)}\b", source)}
        tags = {tag for content in contents for tag in _CLOSING.findall(content)}
        if any(_is_cut(self, tag) for tag in tags):
            left_out.add("reasoning in content")
        return left_out

    @cached_property
    def end_of_turn(self) -> int | None:
        """The id of the special token that ends an assistant's turn; None if there is none."""
        return self.closing[0] if self.closing else None

    @cached_property
    def closing(self) -> list[int]:
        """The ids of what ends a turn and of what the template writes behind it, such as a line
        end; empty if no special token ends a turn.
        """
        return self._from_end(self._closing_text)

    @cached_property
    def ends(self) -> list[int]:
        """The ids that end a turn of the assistant: an answer, and a call of a tool."""
        behind_call = _behind_probe(self._with_call({} if self._reads_objects else "{}"))
        return list(dict.fromkeys([*self.closing[:1], *self._from_end(behind_call)[:1]]))

    def _from_end(self, text: str) -> list[int]:
        """Ids from the last special token on, if only spaces follow it."""
        place = self._end_in(text)
        if not place:
            return []
        last = max((token for token in self._special if text[:place].endswith(token)), key=len)
        return self._encode(last + text[place:])[0]

    def _end_in(self, text: str) -> int:
        """The place behind the last special token of a text if only spaces follow it; else 0."""
        kept = text.rstrip()
        return len(kept) if kept.endswith(self._special) else 0

    def _attempt(self, *turns: Message) -> str:
        """A short conversation; "" if the template fails, as any expression can."""
        with contextlib.suppress(Exception):
            return self._rendered(turns, None)[0]
        return ""

    @cached_property
    def _closing_text(self) -> str:
        """What the template writes behind the content of a last assistant's turn."""
        return _behind_probe(self._attempt(_ASKS, _ANSWERS))

    @cached_property
    def _reads_objects(self) -> bool:
        """Whether arguments of a call may be an object. DeepSeek's template joins their text."""
        return bool(self._with_call({}) or not self._with_call("{}"))

    def _with_call(self, arguments: Any) -> str:
        call = {"name": _PROBE, "arguments": arguments}
        calls = [{"id": "call00001", "type": "function", "function": call}]
        return self._attempt(_ASKS, _ANSWERS | {"content": "", "tool_calls": calls})

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether it writes the text of a list of parts, rather than fail or write the list."""
        written = self._attempt(_ASKS | {"content": [{"type": "text", "text": _PROBE}]})
        return _PROBE in written and "'type'" not in written

    def _turn(
        self, messages: Messages, begun: Message | None, tools: Tools
    ) -> tuple[str, list[Span], list[int]]:
        """The conversation up to its last turn, what is learned of that turn, and where it is cut:
        behind the opening of a turn, or the message that the turn begins with. A turn that no
        special token ends gets EOS, and nothing of the template behind it.
        """
        assert self.tokenizer is not None
        text, spans = self._rendered(messages, tools)
        before = [*messages[:-1]] if begun is None else [*messages[:-1], begun]
        how = "add_generation_prompt" if begun is None else "continue_final_message"
        opening, _ = self._rendered(before, tools, how)
        if not text.startswith(opening):
            history, _ = self._rendered(before, tools)
            if not text.startswith(history):
                # Mistral leaves the system's message out of the history: the turn is what follows
                # the last special token of the opening, and the opening behind that token.
                place = max((opening.rfind(token) for token in self._special), default=-1)
                tail = opening[place:]
                if place < 0 or tail not in text:
                    raise ValueError("it writes a turn of the assistant otherwise than it opens it")
                turn = text[text.rindex(tail) + len(tail) :]
                end = self._end_in(turn) or len(turn)
                return opening + turn, [(len(opening), len(opening) + end)], [len(opening)]
        cuts = _cuts(opening, text)
        start = common_length(opening, text)
        if start < len(opening) and not begun:  # it opens an answer as this one does not begin
            probe, _ = self._rendered([*before, _ANSWERS], tools)
            if _PROBE in probe:
                start = min(start, probe.rindex(_PROBE))
        if _GENERATION.search(self._source_for(tools)):
            least = start if begun else 0
            return text, [(max(least, first), end) for first, end in spans if end > start], cuts
        end = self._end_in(text[start:])
        if end:
            return text, [(start, start + end)], cuts
        ended = text.removesuffix(self._closing_text)
        ended += self.tokenizer.spelled([self.tokenizer.eos_id])
        return ended, [(start, len(ended))], cuts

    def _plain_turn(self, messages: Messages, number: int) -> Encoded:
        """The conversation up to a turn, as `PLAIN` writes it."""
        before = messages[:number]
        opening, _ = self._rendered(before, None, _opening_of(before))
        turn = text_of(messages[number])
        return Encoded(opening + turn, [False] * len(opening) + [True] * len(turn))

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
        [rendered], spans = _renderer()(
            [[*messages]],
            tools=tools,
            chat_template=(_TODAY if "strftime_now" in source else "") + source,
            return_assistant_tokens_mask=marks,
            **options,
            **self.variables,
        )
        return rendered, spans[0] if marks else []

    def _source_for(self, tools: Tools) -> str:
        is_for_tools = self.tools_source and (tools or not self.source)
        return self.tools_source if is_for_tools else self.source

    def _encode(
        self, rendered: str, spans: Sequence[Span] = (), cuts: Sequence[int] = ()
    ) -> tuple[list[int], list[bool]]:
        """The ids of a text, of which none joins what a cut divides, and which of them overlap a
        span. A token without characters, such as the space that SentencePiece puts first, is
        learned if it stands in a span.
        """
        assert self.tokenizer is not None
        ids: list[int] = []
        offsets: list[Span] = []
        place = 0
        parts = itertools.pairwise([0, *cuts, len(rendered)])
        pieces = (p for first, end in parts for p in _PRIVATE.split(rendered[first:end]))
        for number, piece in enumerate(pieces):
            is_hidden = _PRIVATE.fullmatch(piece)
            backend = self.tokenizer.backend if is_hidden else self.tokenizer.with_special_tokens
            text = bytes(ord(c) % 256 for c in piece).decode() if is_hidden else piece
            own, places = self.tokenizer.encode_inside(text, backend, begins=not number)
            if is_hidden:
                self.tokenizer.check_text(text, own)
                places = [(0, len(piece))] * len(own)
            ids += own
            offsets += [(place + first, place + end) for first, end in places]
            place += len(piece)
        starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        learned = np.zeros(len(ids), bool)
        for first, end in spans:
            learned |= ((ends > first) | (starts == first)) & (starts < end)
        return ids, learned.tolist()

    def _prepared(
        self, messages: Messages, tools: Tools, where: str
    ) -> tuple[list[Message], Tools]:
        """The messages and tools as the template gets them, what spells a special token hidden.
        Raises `BadRow` for what no template is for, `PLAIN` would leave out or may not be spelled.
        """
        if not (self.source or (tools and self.tools_source)):
            which = f"the model's folder has the chat templates {', '.join(self.names)}"
            what = f"{which}, and none named default for a conversation without tools"
            raise BadRow(where, f"{what}; save the one that you mean as its chat_template.jinja")
        others = ["tools"] if tools else []
        prepared: list[Message] = []
        for message in messages:
            given = {key: value for key, value in message.items() if value is not None}
            others += [key for key in _NOT_CONTENT if given.get(key)]
            if isinstance(given.get("content"), list) and not self._reads_parts:
                given["content"] = text_of(message)
            if isinstance(given.get("tool_calls"), list) and self._reads_objects:
                given["tool_calls"] = [_with_object(call) for call in given["tool_calls"]]
            prepared.append(given)
        if others and self.source == PLAIN:
            what = f"the plain template writes no {others[-1]}"
            raise BadRow(where, f"{what}; name a model whose own template does")
        tools = self._hidden(tools, "the tools", where)
        for given in prepared:
            role = given["role"]
            name = f"{'an' if role == 'assistant' else 'a'} {role} message"
            given |= self._hidden(given | {"role": ""}, name, where) | {"role": role}
        return prepared, tools

    def _hidden(self, value: Any, name: str = "", where: str = "") -> Any:
        """The value with each special token that its texts spell, and what they have of
        ``_PRIVATE``, as characters of it, which `_encode` reads as that text. Of what has a name a
        special token is refused, unless it is to be text.
        """
        if isinstance(value, dict):
            return {
                self._hidden(key, name, where): self._hidden(inner, name, where)
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [self._hidden(inner, name, where) for inner in value]
        if not isinstance(value, str) or self.tokenizer is None:
            return value
        spelled = self.tokenizer.spelled_in(value)
        if spelled and name and self.tokenizer.spelled_as != "text":
            what = f"{name} spells the special token {spelled[0]!r}"
            how = "remove it, or read it as ordinary characters: text.special_tokens: text"
            raise BadRow(where, f"{what}; {how}")
        if not spelled and not _PRIVATE.search(value):
            return value

        def hide(found: re.Match[str]) -> str:
            text = "".join(chr(0x10FF00 + byte) for byte in found[0].encode())
            return chr(ord(text[0]) - 0x100) + text[1:]

        return re.sub(f"{self.tokenizer.special_pattern}|{_PRIVATE.pattern}", hide, value)

    @cached_property
    def _special(self) -> tuple[str, ...]:
        return () if self.tokenizer is None else tuple(self.tokenizer.special_tokens)


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


def _opening_of(messages: Messages) -> str:
    return "continue_final_message" if is_answered(messages) else "add_generation_prompt"


def _cuts(opening: str, text: str) -> list[int]:
    """Where the text behind an opening begins, which sampling reads alone."""
    return [len(opening)] if text.startswith(opening) else []


def _behind_probe(text: str) -> str:
    return text.rpartition(_PROBE)[2] if _PROBE in text else ""


def _joined(before: Messages, answer: Messages) -> list[Message]:
    """The messages of both; a turn that ``before`` begins and ``answer`` continues is one."""
    messages = [*before, *answer]
    if not (answer and is_answered(before) and answer[0]["role"] == "assistant"):
        return messages
    whole = {**before[-1], **answer[0], "content": text_of(before[-1]) + text_of(answer[0])}
    return [*before[:-1], whole, *answer[1:]]


@lru_cache(maxsize=256)
def _is_cut(template: ChatTemplate, closing: str) -> bool:
    """Whether a template leaves out what stands before this tag in a last assistant's message."""
    content = template._hidden(f"{closing.replace('/', '', 1)}{_PROBE}{closing}.")
    written = template._attempt(_ASKS, _ANSWERS | {"content": content})
    return written != "" and _PROBE not in written


def _with_object(call: Any) -> Any:
    """A call of a tool, its arguments an object if they are the JSON text of one, as OpenAI's."""
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
    source = named.get("default", "")
    is_plain = source in (PLAIN, _beginning(tokenizer) + PLAIN)
    is_own = text_template(tokenizer) in (None, "{prompt}")
    if is_plain or not named or not (is_own or template == AUTO):
        return ChatTemplate()
    tokens = {
        key: token
        for key, token in tokenizer.config.items()
        if key.endswith("_token") and isinstance(token, str)
    }
    reads_plain = frame(template, tokenizer) is None
    for_tools = named.get("tool_use", "")
    return ChatTemplate(source, tokenizer, tokens, for_tools, tuple(named), reads_plain)


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
    if template != AUTO:
        return f"text.template: {template!r}"
    which = frame(template, tokenizer)
    if which is None:
        which = f"the chat template of {folder}; a plain prompt is a user's message"
    elif text_template(tokenizer) is None:
        which = f"{which}; there is no chat template"
    else:
        which = f"{which!r}, with which {folder} was trained"
    return f"text.template {AUTO}: {which}"


def boundaries(template: str, tokenizer: Tokenizer) -> str:
    """A line that says what ends the turns of the assistant and what begins a plain text."""
    begins = tokenizer.spelled(tokenizer.beginning) or "no special token"
    ends = tokenizer.spelled([end_of_response(template, tokenizer)])
    return f"turns end with {ends}, texts begin with {begins}"


def end_of_response(template: str, tokenizer: Tokenizer) -> int:
    """The token that ends a response under a ``text.template``."""
    end = None if frame(template, tokenizer) is not None else template_of(tokenizer).end_of_turn
    return tokenizer.eos_id if end is None else end


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
    if template not in (AUTO, "{prompt}"):
        texts = [json.dumps(part, ensure_ascii=False) for part in template.split("{prompt}")]
        parts = {"MARK": mark, "BEGIN": begun, "AFTER": texts[-1]}
        parts["FRAMED"] = " + text + ".join(texts[:-1])
        source = re.sub("@([A-Z]+)@", lambda match: parts[match[1]], _TEXT_TEMPLATE)
    elif template == "{prompt}" and own.source and own.tokenizer is not None:
        default = {"default": mark + own.source.removeprefix(mark)}
        source = stored_templates(named_templates(tokenizer.config) | default)
    elif template == "{prompt}" and text_template(tokenizer) is not None:
        source = begun + PLAIN
    return replace(tokenizer, config={**tokenizer.config, "chat_template": source})


def reading(
    tokenizer: Tokenizer,
    options: Mapping[str, Any] | None,
    special_tokens: Literal["text", "tokens"] | None = None,
    where: str = "text.template_options",
) -> Tokenizer:
    """The tokenizer as a run with ``text.template_options`` and ``text.special_tokens`` reads. The
    options are defaults of its chat template, also for programs that read its folder.

    Raises:
      UserError: at ``where``: there is no chat template, or it does not name one of the options'
        variables.
    """
    tokenizer = replace(tokenizer, spelled_as=special_tokens)
    if not options:
        return tokenizer
    template = template_of(tokenizer)
    if template.tokenizer is None:
        raise UserError(f"{where}: the model has no chat template that could read them")
    for name in options:
        used = re.search(rf"\b{re.escape(name)}\b", template.source + template.tools_source)
        if not (name.isidentifier() and used):
            raise UserError(f"{where}: the chat template of the model reads no variable {name!r}")
    lines = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}\n"
        for name, value in options.items()  # Jinja reads a value as Python writes it
    )
    named = {
        name: re.sub(_OUR_MARK, lambda mark: mark[0] + lines, source, count=1)
        for name, source in named_templates(tokenizer.config).items()
    }
    config = {**tokenizer.config, "chat_template": stored_templates(named)}
    return replace(tokenizer, config=config)


def text_template(tokenizer: Tokenizer) -> str | None:
    """The ``text.template`` that `with_text_template` wrote into the chat template; None for any
    other.
    """
    source = named_templates(tokenizer.config).get("default", "")
    made = re.match(_OUR_MARK, source)
    with contextlib.suppress(ValueError):  # a folder of others may hold anything
        return str(json.loads(made[1])) if made and made[1] else None
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
    return plain(messages, _opening_of(messages))


def rendered(
    row: Row, template: ChatTemplate, last: bool = False, is_feedback: bool = False
) -> list[Row]:
    """The row with its messages as texts or token ids: one text for the prompt and each response,
    and which of its tokens are learned; or a row for each learned turn, if a demonstration or
    feedback has no single text.

    Args:
      row: has ``messages``. A response that is a text is the assistant's next turn; one of token
        ids stays.
      last: only the last turn of each answer is learned.
      is_feedback: the target of the one answer belongs to each of its turns.

    Raises:
      BadRow: no turn is learned, the template fails, or a preference has no single text.
    """
    if not all(isinstance(response, str) for response in row.responses) or not row.responses:
        return [replace(row, prompt=template.prompt_of(row))]
    answers = row.answers or tuple(
        [{"role": "assistant", "content": response}] for response in row.responses
    )
    row = replace(row, answers=answers)
    template = template.with_variables(row.variables, row.source)
    of_answers = []
    for answer in answers:
        learned = _learned(row, answer, last)
        texts = template.conversations(row.messages, answer, learned, row.source, row.tools)
        if len(answers) > 1 or row.targets is not None:  # a score stands where a turn ends
            texts = [_ended(text, template.end_of_turn) for text in texts]
        of_answers.append(texts)
    is_plain = template.tokenizer is None
    if len(answers) == 1 and (row.targets is None or is_feedback) and (is_plain or len(texts) > 1):
        rows = []
        for number, text in zip(learned, texts, strict=True):
            if any(text.learned):
                before = [*row.messages, *answers[0]][:number]
                rows.append(replace(_split(row, [text]), messages=before))
        if len(rows) == 1:
            return rows
        return [
            replace(one, source=f"{row.source}, turn {number}", first=rows[0].messages)
            for number, one in enumerate(rows, 1)
        ]
    if is_plain and any(len(answer) > 1 for answer in answers):
        raise BadRow(row.source, _SEVERAL)
    if any(len(texts) > 1 for texts in of_answers):
        raise BadRow(row.source, _REWRITTEN)
    return [_split(row, [text for [text] in of_answers])]


def _learned(row: Row, answer: Messages, last: bool) -> list[int]:
    """The numbers of the assistant's turns that are learned, counted over the row's messages and
    then the answer's: those that say something and have no weight of 0.
    """
    whole = [*row.messages, *answer]
    first = len(whole) - 1 if last else len(row.messages)
    learned = []
    for number, message in enumerate(whole[first:], first):
        if message["role"] == "assistant" and message.get("weight", 1) != 0 and said(message):
            learned.append(number)
    if not learned:
        raise BadRow(row.source, "no turn of the assistant is learned: each is empty or weighs 0")
    size = sum(_OF_A_MESSAGE + len(text_of(message)) for message in whole)
    if len(learned) * size > _MOST:
        what = f"{len(learned)} turns of {len(whole)} messages would be learned"
        how = "split the conversation, or learn its last turn alone (sft.turns: last)"
        raise BadRow(row.source, f"{what}, and each is rendered with all before it; {how}")
    return learned


def _ended(text: Encoded, end_of_turn: int | None) -> Encoded:
    """The text up to the token that ends its last learned turn, where a score stands."""
    if not any(text.learned):
        return text
    text = text.up_to(len(text.learned) - text.learned[::-1].index(True))
    ends = [place for place, token in enumerate(text.text, 1) if token == end_of_turn]
    return text.up_to(ends[-1]) if ends else text


def _split(row: Row, texts: Sequence[Encoded]) -> Row:
    """The row, its prompt what all texts begin with, up to the first place that is learned."""
    start = min(text.learned.index(True) for text in texts)
    if len(texts) > 1:
        start = min(start, common_length(*(text.text for text in texts)))
    masks = tuple(tuple(text.learned[start:]) for text in texts)
    return replace(
        row,
        prompt=texts[0].text[:start],
        responses=tuple(text.text[start:] for text in texts),
        learned=() if all(map(all, masks)) else masks,
    )
