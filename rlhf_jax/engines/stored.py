"""An engine that returns the samples stored in a run folder. It needs no server.

``rlhf-jax verify`` uses it to repeat a run that sampled with an engine.
"""

from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.config import EngineServer
from rlhf_jax.engines import Request, Sample, Writer, decoded, question
from rlhf_jax.errors import ServiceError, UserError
from rlhf_jax.graders.replies import Replies


def connect(place: str, server: EngineServer, folder: Path) -> "Stored":
    """The samples in the folder ``engine/`` of a run."""
    if not Path(place).is_dir():
        raise UserError(f"rl.engine stored:{place}: no such folder; give engine/ of a run")
    return Stored(place)


class Stored:
    """Stored samples, found by the number of optimizer steps and the request."""

    follows = False  # samples of a server with fixed weights are kept too

    def __init__(self, place: str):
        self.place = place
        self._kept = Replies(None)

    def load(self, version: str, write: Writer) -> str:
        """Reads the samples of the optimizer step in ``version``. The weights are not compared."""
        steps, _, _ = version.partition("-")
        self._kept = Replies(Path(self.place), f"{steps}-*")
        return version

    def sample(self, request: Request) -> Sequence[Sample]:
        """The stored responses to this request."""
        asked = question(request)
        if asked not in self._kept:
            raise ServiceError(
                f"{self.place}: no samples were kept of the prompt {request.prompt[:8]} ... at the "
                f"weights {request.version}"
            )
        return decoded(self._kept[asked], request.version)

    def close(self) -> None:
        """Does nothing: no file stays open."""
