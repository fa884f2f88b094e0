"""A vLLM server that loads the policy's weights before each rollout.

With LoRA the server loads the adapters under a new name (``/v1/load_lora_adapter``). Without LoRA
it reads all weights from a folder (``reload_weights``) and gets a new version for them
(``/update_weight_version``). It returns that name or version with each sample.
"""

import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.config import EngineServer
from rlhf_jax.engines import Request, Sample, Writer
from rlhf_jax.engines.openai import Completions, sampling_settings
from rlhf_jax.errors import ServiceError, logger
from rlhf_jax.graders import client
from rlhf_jax.models import peft

LORA_NEEDS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora"
FULL_NEEDS = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out (vLLM 0.32 or later)"


def connect(place: str, server: EngineServer, folder: Path) -> "VLLM":
    """The server at a URL. It reads weights below ``server.weights`` or, if that is None, in
    ``folder``.
    """
    return VLLM(place, server, folder)


class VLLM(Completions):
    """A server that loads weights from folders. It must see them under the same paths as we do."""

    follows = True

    def __init__(self, place: str, server: EngineServer, folder: Path):
        super().__init__(place, server)
        # A name that no other run, and no earlier start of this run, has used.
        self._session = f"rlhf-jax-{secrets.token_hex(4)}"
        if server.weights is not None:
            folder = Path(server.weights, self._session)
        self._folder = folder.resolve()
        self._base = self.model
        self._adapter: str | None = None

    def load(self, version: str, write: Writer) -> str:
        """Writes the weights into a folder of this version, then makes the server load them."""
        name = f"{self._session}-{version}"
        folder = self._folder / version
        write(folder)
        if (folder / peft.CONFIG).exists():
            self._load_adapter(name, folder)
        else:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._command("/collective_rpc", reload, FULL_NEEDS)
            self._command("/reset_prefix_cache", {}, FULL_NEEDS)
            self._command("/update_weight_version", {"new_version": name}, FULL_NEEDS)
        for old in self._folder.iterdir():
            if old != folder:
                shutil.rmtree(old)
        return name

    def sample(self, request: Request) -> Sequence[Sample]:
        """The responses. With full weights the request uses vLLM's own protocol, which returns the
        version of the weights with each response.
        """
        if self._adapter is not None:
            return super().sample(request)
        settings = sampling_settings(request) | {"logprobs": 0, "detokenize": False}
        body = {"model": self._base, "token_ids": request.prompt, "sampling_params": settings}
        reply = self._command("/inference/v1/generate", body, FULL_NEEDS, client.Generations)
        return [self._versioned(choice) for choice in self.choices(reply)]

    def close(self) -> None:
        """Deletes the folder of weights and unloads the adapter, if the server still replies."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._adapter is not None:
            self._unload(self._adapter)

    def _load_adapter(self, name: str, folder: Path) -> None:
        body = {"lora_name": name, "lora_path": str(folder)}
        try:
            self._command("/v1/load_lora_adapter", body, LORA_NEEDS)
        except ServiceError:
            # The server refuses an adapter that it has already. It has it if the reply to an
            # earlier try of this request was lost.
            if name not in self.list_models():
                raise
        before = self._adapter
        self._adapter = name
        self.model = name
        if before is not None:
            self._unload(before)

    def _unload(self, name: str) -> None:
        try:
            self._command("/v1/unload_lora_adapter", {"lora_name": name}, LORA_NEEDS)
        except ServiceError as error:
            logger.info(f"the adapter {name} stays on the server: {error}")

    def _command(
        self,
        path: str,
        body: Mapping[str, Any],
        needs: str,
        form: Any = None,
    ) -> Any:
        """Sends a POST; the reply if it has a form. A ServiceError says how to start the server."""
        try:
            return self.ask(path, form, body)
        except ServiceError as error:
            if re.search("HTTP 40[34]", str(error)):
                raise ServiceError(f"{error}; start the server with {needs}") from error
            raise

    def _versioned(self, choice: Mapping[str, Any]) -> Sample:
        """The sample in a choice of /inference/v1/generate."""
        spans = choice.get("weight_versions") or ()
        versions = {str(span["version"]) for span in spans}
        content = choice["logprobs"]["content"]
        ids = [token["token_id"] for token in content]
        if ids != choice["token_ids"]:
            self.refuse("its log-probabilities are of other token ids", choice)
        log_probs = [token["logprob"] for token in content]
        ended = choice.get("finish_reason") == "stop"
        version = " and ".join(sorted(versions))
        return Sample(ids, log_probs, ended, version, choice.get("sampling_mask"))
