"""Chat rows, lists of ``{role, content}``, as prompts and responses by a chat template.

The prompt is the conversation before the last assistant turn, rendered with the template's opening
of the next assistant turn (``add_generation_prompt``); the response is that turn's content, so that
the boundary is where the sampler puts it, and EOS ends it as it ends any response.

Templates are Jinja as in Hugging Face's tokenizers. They come from files, so they run in the
sandbox whose values cannot be changed and whose unsafe attributes cannot be reached. It limits one
``range``, but neither the time nor the memory that a template takes.
"""

import contextlib
import datetime
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox
import tokenizers

from rlhf_jax.data.rows import BadRow, Fields, Message, Messages, Record, Row, Text
from rlhf_jax.data.tokenizers import Tokenizer, named_tokens

AUTO = "auto"
"""The ``text.template`` that follows the model's folder; see `frame`."""
ROLES = ("system", "developer", "user", "assistant", "tool")
NO_RESPONSE = "dialogue without a last response"

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
# The default date of Llama 3's template: a prompt must not depend on the day.
_TODAY = datetime.datetime(2024, 7, 26)


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A Jinja template. With a tokenizer the rendered text is tokenised, its special tokens as
    special tokens. Without a tokenizer (`PLAIN`) prompts are text. Message contents may not spell a
    special token of the tokenizer: data could then end a turn or pretend to be another role.
    """

    source: str = PLAIN
    tokenizer: Tokenizer | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """bos_token and the like, by the template's names."""

    def prompt(
        self,
        messages: Messages,
        where: str,
        after: str = "",
    ) -> Text:
        """The conversation and the opening of the next assistant turn; with ``after`` only the part
        that follows this text.

        The token ids are those of transformers' ``apply_chat_template(add_generation_prompt=True)``
        on the date that `_TODAY` gives.

        Raises:
          BadRow: at ``where``, for a template that fails or contents that spell a special token.
        """
        self._check(messages, where)
        with _template_errors(where):
            rendered = self._rendered(messages, opens=True)
            if after:
                rendered = rendered[rendered.rindex(after) + len(after) :]
            return rendered if self.tokenizer is None else tuple(self._encoded(rendered))

    def answered(
        self,
        messages: Messages,
        response: str,
        where: str,
    ) -> list[int]:
        """Token ids of the conversation with the response as the assistant's next turn, which are
        those of transformers' ``apply_chat_template``; this template has a tokenizer.

        A special token that the response spells stays a text, as in any response.

        Raises:
          BadRow: as `prompt`.
        """
        assert self.tokenizer is not None
        self._check(messages, where)
        turn = {"role": "assistant", "content": response}
        with _template_errors(where):
            rendered = self._rendered([*messages, turn], opens=False)
            if not any(token in response for token in self._special):
                return self._encoded(rendered)
            content = response.strip()  # as some templates do
            start = rendered.rindex(content)
            before = self._encoded(rendered[:start])
            after = self._encoded(rendered[start + len(content) :])
            return [*before, *self.tokenizer.encode(content), *after]

    def _rendered(self, messages: Messages, opens: bool) -> str:
        """The text of the messages; ``opens``: and the opening of the next assistant turn."""
        return self._template.render(
            messages=messages,
            add_generation_prompt=opens,
            tools=None,
            documents=None,
            **self.special_tokens,
        )

    def _encoded(self, rendered: str) -> list[int]:
        return self._encoder.encode(rendered, add_special_tokens=False).ids

    def _check(self, messages: Messages, where: str) -> None:
        """Raises `BadRow` for tool calls that `PLAIN` would leave out, and for a content that
        spells a special token of the tokenizer.
        """
        for message in messages:
            if self.tokenizer is None and message.get("tool_calls"):
                what = "the plain template writes no tool_calls"
                raise BadRow(where, f"{what}; name a model whose own template does")
            for token in self._special:
                if token in message["content"]:
                    what = f"a {message['role']} message spells the special token {token!r}"
                    raise BadRow(where, f"{what}; remove it, only the chat template may write it")

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _TODAY.strftime
        # Jinja's own filter is for HTML.
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        # Hugging Face marks what an assistant says by {% generation %}: its body is rendered as it
        # stands.
        source = re.sub(r"({%[-+]?\s*)generation(?=\s*[-+]?%})", r"\1if true", self.source)
        source = re.sub(r"({%[-+]?\s*)endgeneration(?=\s*[-+]?%})", r"\1endif", source)
        return environment.from_string(source)

    @cached_property
    def _encoder(self) -> tokenizers.Tokenizer:
        assert self.tokenizer is not None
        encoder = tokenizers.Tokenizer.from_str(self.tokenizer.backend.to_str())
        # Here their spelling means the token, unlike in any other text.
        encoder.encode_special_tokens = False
        return encoder

    @cached_property
    def _special(self) -> list[str]:
        if self.tokenizer is None:
            return []
        added = self.tokenizer.backend.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]


@lru_cache(maxsize=8)
def template_of(tokenizer: Tokenizer | None, template: str = "{prompt}") -> ChatTemplate:
    """The template that renders messages under a ``text.template``: the tokenizer's own chat
    template, or `PLAIN` if it has none.

    A chat template that `with_text_template` made from a text is ignored, except under `AUTO`.
    """
    if tokenizer is None:
        return ChatTemplate()
    source = tokenizer.config.get("chat_template")
    if isinstance(source, list):  # several by name, as Hugging Face has them
        entries = [entry for entry in source if isinstance(entry, dict)]
        named = {entry.get("name"): entry.get("template") for entry in entries}
        source = named.get("default")
    is_own = text_template(tokenizer) in (None, "{prompt}")
    if source == PLAIN or not isinstance(source, str) or not (is_own or template == AUTO):
        return ChatTemplate()
    return ChatTemplate(source, tokenizer, named_tokens(tokenizer.config))


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


def describe(
    template: str,
    tokenizer: Tokenizer,
    folder: str | None,
) -> str:
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
    source: Any = tokenizer.config.get("chat_template", PLAIN)
    if template == "{prompt}" and own.tokenizer is not None:
        source = mark + own.source.removeprefix(mark)
    elif template == "{prompt}" and text_template(tokenizer) is not None:
        source = PLAIN
    elif template not in (AUTO, "{prompt}"):
        *before, after = (
            json.dumps(part, ensure_ascii=False) for part in template.split("{prompt}")
        )
        parts = {"MARK": mark, "FRAMED": " + text + ".join(before), "AFTER": after}
        source = re.sub("@([A-Z]+)@", lambda match: parts[match[1]], _TEXT_TEMPLATE)
    return replace(tokenizer, config={**tokenizer.config, "chat_template": source})


def text_template(tokenizer: Tokenizer) -> str | None:
    """The ``text.template`` that `with_text_template` wrote into the chat template; None for any
    other.
    """
    source = str(tokenizer.config.get("chat_template"))
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
        messages.append(message | {"content": message["content"] + written})
    return template_of(None)._rendered(messages, opens=True)


def is_chat(row: Fields, *keys: str) -> bool:
    """Whether one of these keys holds messages."""
    values = [row.get(key) for key in keys]
    lists = [value for value in values if isinstance(value, list)]
    return any(isinstance(turn, dict) for turn in itertools.chain(*lists))


def is_answered(messages: Any) -> bool:
    """Whether the last of these messages is the assistant's."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def conversation(record: Record, key: str) -> list[Message]:
    """The messages under ``key`` without a last assistant turn."""
    messages = _messages(record, key)
    return _before_last(record, key, messages) if is_answered(messages) else messages


def exchange(record: Record, key: str) -> tuple[list[Message], str]:
    """The messages before the last assistant turn of the conversation under ``key``, and that
    turn's content.

    If the row has a ``prompt`` (text or messages), the value under ``key`` (text or messages)
    continues it, unless it repeats it. Raises `BadRow` if the conversation does not end with an
    assistant turn that has content.
    """
    row = record.value
    start: list[Message] = []
    if isinstance(row.get("prompt"), str):
        start = [{"role": "user", "content": record.text("prompt")}]
    elif row.get("prompt") is not None:
        start = _messages(record, "prompt")
    if start and isinstance(row[key], str):
        return start, record.text(key)
    messages = _messages(record, key)
    # They may hold the prompt themselves, perhaps after a system message.
    if start not in (messages[: len(start)], messages[1 : len(start) + 1]):
        messages = start + messages
    response = messages[-1]["content"]
    what = f"message {len(messages)} of {key!r} has tool_calls, which are no text to learn"
    record.expect(not messages[-1].get("tool_calls"), what)
    record.expect(is_answered(messages) and response.strip(), NO_RESPONSE)
    return _before_last(record, key, messages), response


def _before_last(
    record: Record,
    key: str,
    messages: list[Message],
) -> list[Message]:
    record.expect(len(messages) > 1, f"{key!r} has no message before the assistant's")
    return messages[:-1]


def _messages(record: Record, key: str) -> list[Message]:
    value = record.value[key]
    is_list = isinstance(value, list) and value
    record.expect(is_list, f"{key!r} must be a list of messages {{role, content}}", value)
    for number, message in enumerate(value, 1):
        where = f"message {number} of {key!r}"
        is_object = isinstance(message, dict)
        record.expect(is_object, f"{where} must be an object with role, content", message)
        for part in ("role", "content"):
            given = message.get(part)
            record.expect(isinstance(given, str), f"{part!r} of {where} must be a string", given)
        role = message["role"]
        wanted = f"the role of {where} must be one of {', '.join(ROLES)}, found {role!r}"
        record.expect(role in ROLES, wanted)
        record.checked(f"the content of {where}", message["content"] or " ")
    return value


@contextlib.contextmanager
def _template_errors(where: str) -> Iterator[None]:
    """Turns any failure of a chat template into a `BadRow`."""
    try:
        yield
    # a template can fail like any expression, and a vocabulary can lack a character
    except Exception as error:
        what = f"the chat template failed: {type(error).__name__}: {error}"
        raise BadRow(where, what) from error


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """A sandbox without the operator **, which can take hours."""

    intercepted_binops = frozenset(("**",))

    def call_binop(self, *operation: Any) -> NoReturn:
        raise jinja2.sandbox.SecurityError("** is not allowed")


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
