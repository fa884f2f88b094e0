"""Engines: servers outside this program that sample for a run (``rl.engine: KIND:PLACE``).

A kind is a file of this folder with a function ``connect(place, server, folder) -> Engine``. What a
run asks, checks and keeps is the same for all of them: ``training.engine``.
"""

import contextlib
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from rlhf_jax.config import EngineServer
from rlhf_jax.errors import UserError, did_you_mean
from rlhf_jax.sampling import SamplingConfig


class Request(NamedTuple):
    """A prompt for which an engine samples several responses."""

    version: str  # of the weights: number of optimizer steps, "-", checksum of the weights
    prompt: list[int]  # token ids
    number: int  # responses to sample
    max_tokens: int  # of each response
    seed: int
    how: SamplingConfig
    row_keys: Sequence[list[int]] = ()
    """The key data of each response's row, for servers that sample as we do: its token t is drawn
    by ``fold_in(key, first_slot + t)``."""
    first_slot: int = 0


class Sample(NamedTuple):
    """A response as the engine returned it, before any check."""

    tokens: list[int]  # EOS included
    log_probs: list[float]  # of ``tokens``, in nats
    finished: bool  # whether it ended with EOS, not at ``max_tokens``
    version: str = ""  # of the weights that made it, as ``Engine.load`` names them
    support: list[list[int]] | None = None  # ids among which each token was drawn; None: unknown


Writer = Callable[[Path], None]
"""Writes the policy's weights into a folder: of PEFT with LoRA, otherwise of Hugging Face."""


class Engine(Protocol):
    """A server that samples."""

    place: str
    """The address or folder, as error messages name it."""

    follows: bool
    """Whether it samples with the policy's weights of each step. If not, it samples with the first
    ones, or with unknown ones."""

    def load(self, version: str, write: Writer) -> str:
        """Makes the engine sample with the weights that ``write`` writes, if ``follows``. Returns
        the version that it reports with each sample from now on.

        Raises:
            ServiceError: it cannot.
        """

    def sample(self, request: Request) -> Sequence[Sample]:
        """``request.number`` responses, sampled with the weights that were loaded last. Several
        threads may call it at the same time.

        Raises:
            ServiceError: there is no reply, or the reply is not as the protocol says.
        """

    def close(self) -> None:
        """Frees what the engine holds for this run."""


@contextlib.contextmanager
def opened(spec: str | None, server: EngineServer, folder: Path) -> Iterator[Engine | None]:
    """Opens the engine of ``spec``, KIND:PLACE, and closes it when the ``with`` block ends. Yields
    None if the spec is None.

    Args:
        server: the settings of requests to the engine.
        folder: where the weights for the engine are written if ``server.weights`` is None.

    Raises:
        UserError: the kind does not exist, or the place does not fit the kind.
        ServiceError: the engine does not reply.
    """
    if spec is None:
        yield None
        return
    kind, _, place = spec.partition(":")
    kinds = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if kind not in kinds:
        hint = did_you_mean(kind, kinds)
        raise UserError(f"rl.engine {spec}: there is {', '.join(kinds)}, and no {kind}{hint}")
    module = importlib.import_module(f"{__name__}.{kind}")
    engine: Engine = module.connect(place, server, folder)
    try:
        yield engine
    finally:
        engine.close()


# --- The JSON in which a run stores samples


def question(request: Request) -> str:
    """The request as JSON, without the version of the weights."""
    how = request.how
    asked = {
        "prompt": request.prompt,
        "number": request.number,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
        "temperature": how.temperature,
        "top_k": how.top_k,
        "top_p": how.top_p,
        "min_p": how.min_p,
        "repetition_penalty": how.repetition_penalty,
        "eos_ids": how.eos_ids,
    }
    return json.dumps(asked, sort_keys=True)


def encoded(samples: Sequence[Sample]) -> str:
    """Samples as JSON. Reading it returns exactly the same floats."""
    return json.dumps([sample._replace(version="") for sample in samples])


def decoded(text: str, version: str) -> list[Sample]:
    """The samples that ``encoded`` wrote.

    Raises:
        UserError: the text is not JSON of samples.
    """
    try:
        kept = msgspec.json.decode(text, type=list[Sample])
    except msgspec.DecodeError:
        raise UserError(
            f"engine/: what was kept of the weights {version} is no sample: {text[:80]!r}; delete "
            "these files, so that the engine is asked again"
        ) from None
    return [sample._replace(version=version) for sample in kept]
