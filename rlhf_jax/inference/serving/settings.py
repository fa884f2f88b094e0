"""The flags of ``rlhf-jax serve``."""

import dataclasses

from rlhf_jax.evaluation.settings import check_at_least
from rlhf_jax.inference import asking


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(asking.Settings):
    """How the models sample where a request says nothing, and who may ask."""

    reward: tuple[str, ...] = ()
    """Folders of reward models, which /score asks, and the page beside each answer."""
    page: bool = False
    """Open the page in a browser."""
    labels: str | None = None
    """Where "A is better" of the page is kept: JSON lines that reward-model and dpo train on."""
    host: str = "127.0.0.1"
    """Where the server listens; 0.0.0.0 lets other machines in, which needs TLS in front."""
    port: int = 8000
    """0: any free port."""
    names: tuple[str, ...] = ()
    """Host names under which it is reached, besides localhost and IP addresses."""
    token: bool = False
    """Refuse requests without a token, which is made and printed once. It is always so with another
    --host than this machine's own, and if the environment variable SERVE_TOKEN has a token."""
    columns: int = 65536
    """Columns of caches, prompts with their answers, of all requests to a model at once; others
    wait. Each costs the memory of a token in a cache."""
    waiting: int = 256
    """Prompts that may wait for a model; further ones are refused."""
    seconds: float = 600.0
    """That a request may take."""

    def __post_init__(self) -> None:
        check_at_least(self, port=0, columns=256, waiting=1, seconds=1)
