"""The requests that the server reads: OpenAI's, with the keys that vLLM and other servers add.

A key that would change the answer and is not read is refused; so is a key that nobody knows. A key
that is null is not given.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rlhf_jax.generation.slots import MOST_LIKELY

MOST_SAMPLES = 128  # of a prompt
_Count = Annotated[int, Meta(ge=0, le=MOST_LIKELY)]
_Id = Annotated[int, Meta(ge=0, lt=1 << 31)]
_Ids = Annotated[list[_Id], Meta(min_length=1)]
_Word = Annotated[int, Meta(ge=0, lt=1 << 32)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Stop = Annotated[str, Meta(min_length=1, max_length=1000)]
_Zero = Annotated[float, Meta(ge=0, le=0)]


class Refused(Exception):
    """A request that gets no answer."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.code = code


def read(body: bytes, form: type[Any]) -> Any:
    """The body of a request."""
    given = msgspec.json.decode(body, type=dict[str, Any])
    return msgspec.convert({key: x for key, x in given.items() if x is not None}, form)


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What requests for chats and for texts have in common. None: as the served run sampled."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_SAMPLES)] = 1
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None  # -1 and 0: all tokens
    min_p: _Share | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    max_tokens: Annotated[int, Meta(ge=0, lt=1 << 31)] | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=16)] | None = None
    stop_token_ids: list[_Id] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    row_keys: list[tuple[_Word, _Word]] | None = None
    """Of this package's runs: the key data of each sample's row, in place of the seed."""
    first_slot: _Id = 0
    """Of this package's runs: the slot of the first token, in a conversation of several turns."""

    # Of no meaning here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    # Read if they ask for nothing.
    frequency_penalty: _Zero = 0
    presence_penalty: _Zero = 0
    logit_bias: Annotated[dict[str, Any], Meta(max_length=0)] | None = None


class Completion(Request, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | Annotated[list[str | _Id | _Ids], Meta(min_length=1)]
    logprobs: _Count | None = None
    echo: bool = False
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class Chat(Request, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Meta(ge=0, lt=1 << 31)] | None = None
    logprobs: bool = False
    top_logprobs: _Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    functions: Annotated[list[Any], Meta(max_length=0)] | None = None
    function_call: Literal["auto", "none"] | None = None  # of functions
    prediction: Any = None  # makes OpenAI's server faster


class Columns(msgspec.Struct, frozen=True):
    """What this package's runs say of the prompts' rows."""

    messages: list[list[dict[str, Any]] | None] = []


class Score(msgspec.Struct, kw_only=True):
    """The body of /score: conversations that end with an answer, or prompts and responses, each a
    text or messages.
    """

    model: str | None = None
    messages: list[dict[str, Any] | list[dict[str, Any]]] = []
    prompts: list[str | list[dict[str, Any]]] = []
    columns: Columns = Columns()
    responses: list[str | list[dict[str, Any]]] = []
    prompt: str | list[dict[str, Any]] | None = None
    response: str | list[dict[str, Any]] | None = None
    query: list[str] = []
    """Whole texts as the model reads them, special tokens spelled, as OpenRLHF sends them; they
    stand for all else.
    """


class Judgement(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of /judgement."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    answers: tuple[str, str]
    choice: Literal["a", "b", "tie", "bad"]
    seconds: Annotated[float, Meta(ge=0, lt=1e9)] = 0.0
