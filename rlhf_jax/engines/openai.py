"""A server with OpenAI's completions protocol that takes and returns token ids, such as vLLM and
SGLang. Its weights do not change while it runs.

The API key is read from the environment variable `ENGINE_API_KEY`.
"""

import re
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn

from rlhf_jax.config import EngineServer
from rlhf_jax.engines import Request, Sample, Writer
from rlhf_jax.errors import ServiceError
from rlhf_jax.graders import client
from rlhf_jax.graders.client import ENGINE_KEY

_TOKEN_ID = re.compile(r"token_id:(\d{1,9})")
_ROUNDING = 1e-3  # by which a log-probability may be above 0


def connect(place: str, server: EngineServer, folder: Path) -> "Completions":
    """The server at a URL."""
    return Completions(place, server)


class Completions:
    """A server whose weights do not change during the run."""

    follows = False

    def __init__(self, place: str, server: EngineServer, variable: str = ENGINE_KEY):
        """Raises ServiceError if the server lists no model, or not ``server.model``.

        variable: of the environment, which holds the server's key.
        """
        self.place = place.rstrip("/").removesuffix("/v1")
        self.server = server
        self.variable = variable
        self.models = self.list_models()
        self.model = server.model or self.models[0]

    def load(self, version: str, write: Writer) -> str:
        """Loads nothing. Returns the name of the server's model."""
        return self.model

    def sample(self, request: Request) -> Sequence[Sample]:
        """The responses of one POST to /v1/completions."""
        body = sampling_settings(request) | {
            "model": self.model,
            "prompt": request.prompt,
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        }
        if self.is_ours:
            # The run cuts stop strings itself.
            body |= {"row_keys": request.row_keys, "first_slot": request.first_slot, "stop": []}
        reply = self.ask("/v1/completions", client.Completions, body)
        choices = self.choices(reply)
        version = reply["model"]
        return [self._sample(choice, request, version) for choice in choices]

    def score(self, ids: Sequence[int]) -> tuple[list[str], list[float]]:
        """The texts of given tokens, as the server spells them, and their log-probabilities at
        temperature 1 in nats; that of the first, before which there is nothing, is 0.
        """
        body = {
            "model": self.model,
            "prompt": list(ids),
            "max_tokens": 1,  # not all servers take 0
            "temperature": 0.0,
            "echo": True,
            "logprobs": 1,
        }
        reply = self.ask("/v1/completions", client.LogProbs, body)
        choices = self.choices(reply)
        told = choices[0].get("logprobs") if choices else None
        if told is None:
            self.refuse("it returned no log-probabilities of the prompt (echo, logprobs)", reply)
        texts = told["tokens"]
        log_probs = [0.0, *told["token_logprobs"][1:]]
        count = len(ids)
        is_whole = len(texts) == len(log_probs) and len(texts) - count in (0, 1)
        are_log_probs = all(value is not None and value < _ROUNDING for value in log_probs)
        if not (is_whole and are_log_probs):
            self.refuse(f"expected log-probabilities of {count} tokens and one more", told)
        return texts[:count], log_probs[:count]

    def close(self) -> None:
        """Does nothing: the server holds nothing for this run."""

    def ask(self, path: str, form: Any, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON reply to a POST, or to a GET without a body; see ``client.ask``."""
        return client.ask(self.place + path, body, self.server, self.variable, form)

    def choices(self, reply: Any) -> list[Mapping[str, Any]]:
        """The choices of a reply, ordered by their index."""
        choices: list[Mapping[str, Any]] = sorted(reply["choices"], key=itemgetter("index"))
        numbers = [choice["index"] for choice in choices]
        if numbers != list(range(len(numbers))):
            self.refuse(f"its choices have the numbers {numbers}", reply)
        return choices

    def refuse(self, fault: str, reply: Any) -> NoReturn:
        """Raises ServiceError with the fault and the start of the reply."""
        raise ServiceError(f"{self.place}: {fault}; got {client.quoted(reply, None)}")

    def list_models(self) -> list[str]:
        """The names of the models that the server lists.

        Raises:
            ServiceError: the server has no model, or none of the name in ``server.model``.
        """
        reply = self.ask("/v1/models", client.Models)
        self.is_ours = any(model.get("owned_by") == "rlhf_jax" for model in reply["data"])
        names = [model["id"] for model in reply["data"]]
        wanted = self.server.model
        if not names or wanted not in (None, *names):
            raise ServiceError(f"{self.place}: it serves no model {wanted}, but {', '.join(names)}")
        return names

    def _sample(self, choice: Mapping[str, Any], request: Request, version: str) -> Sample:
        told = choice.get("prompt_token_ids")
        if told not in (None, request.prompt):
            self.refuse("it read other token ids than the prompt's", told)
        logprobs = choice.get("logprobs")
        if logprobs is None:
            self.refuse("it returned no log-probabilities", choice)
        tokens = choice.get("token_ids")
        if tokens is None:
            named = [_TOKEN_ID.fullmatch(token) for token in logprobs.get("tokens") or ()]
            tokens = [int(match[1]) for match in named if match]
            if not tokens:
                self.refuse("it returned no token ids (return_token_ids)", choice)
        log_probs = logprobs["token_logprobs"]
        return Sample(tokens, log_probs, choice.get("finish_reason") == "stop", version)


def sampling_settings(request: Request) -> dict[str, Any]:
    """The sampling settings under the names that all servers share. All of them are sent, because
    servers have different defaults.
    """
    how = request.how
    return {
        "n": request.number,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
        "temperature": how.temperature,
        "top_k": how.top_k or -1,
        "top_p": how.top_p or 1.0,
        "min_p": how.min_p or 0.0,
        "repetition_penalty": how.repetition_penalty,
        "stop_token_ids": list(how.eos_ids),
    }
