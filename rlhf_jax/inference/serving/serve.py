"""``rlhf-jax serve``: opens models, and answers requests until a signal."""

import asyncio
import contextlib
import dataclasses
import html
import ipaddress
import itertools
import os
import secrets
import tempfile
import webbrowser
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from rlhf_jax.config import Compute
from rlhf_jax.data import chat
from rlhf_jax.errors import UserError, logger
from rlhf_jax.generation.generator import LanguageModel
from rlhf_jax.inference import asking, label, web
from rlhf_jax.inference.labelling import pairs
from rlhf_jax.inference.labelling import settings as label_settings
from rlhf_jax.inference.serving import app
from rlhf_jax.inference.serving.answers import Policy
from rlhf_jax.inference.serving.app import Judge, Labels, Served
from rlhf_jax.inference.serving.settings import Config
from rlhf_jax.inference.serving.worker import Worker
from rlhf_jax.models import hf
from rlhf_jax.training.common import initial


def run(folders: Sequence[str], config: Config) -> None:
    """Serves until Ctrl-C or SIGTERM.

    Raises:
        UserError: a folder cannot be read or is given twice; the port is taken; as
            ``label.opened``.
    """
    asking.start(config)
    with opened(folders, config) as served:
        server, listening, address = web.listen(application(served), config.host, config.port)
        for name in [*served.policies, *served.judges]:
            logger.info(f"{address}/v1 serves {name}")
        page = f"{address}/"
        with_token = page if served.token is None else f"{page}#token={served.token}"
        is_known = served.token == os.environ.get("SERVE_TOKEN")
        logger.info(f"page: {page if is_known else with_token}")
        with contextlib.ExitStack() as stack:
            if config.page:
                is_open = served.token is None
                webbrowser.open(page if is_open else stack.enter_context(_leading(with_token)))
            web.run(server, listening)


@contextlib.contextmanager
def _leading(address: str) -> Iterator[str]:
    """A page that leads on and that only the owner reads: everybody reads a command line."""
    to = html.escape(f"0;url={address}")
    with tempfile.NamedTemporaryFile(suffix=".html") as file:  # of mode 600
        file.write(f'<meta charset="utf-8"><meta http-equiv="refresh" content="{to}">'.encode())
        file.flush()
        yield Path(file.name).as_uri()


@contextlib.contextmanager
def opened(folders: Sequence[str], config: Config) -> Iterator[Served]:
    """The models, and what guards them."""
    folders = [folder.rstrip("/") or folder for folder in folders]
    names = [*folders, *config.reward]
    if not names or len(set(names)) < len(names):
        raise UserError("give folders of runs or models, each once, and reward models by --reward")
    policies = {name: _policy(name, config) for name in folders}
    judges = {name: _judge(name, config) for name in config.reward}
    token = os.environ.get("SERVE_TOKEN") or None
    if token is None and (config.token or not _is_own(config.host)):
        token = secrets.token_urlsafe(32)
    hosts = (*config.names, config.host)
    with _labels(config.labels) as kept:
        yield Served(policies, judges, token, hosts, config.seconds, kept)


def application(served: Served) -> ASGIApp:
    """The server's application; its models sample while it runs."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        for policy in served.policies.values():
            policy.worker.start()
        try:
            yield
        finally:
            for policy in served.policies.values():
                await asyncio.to_thread(policy.worker.stop)

    return app.build(served, lifespan)


def _policy(name: str, config: Config) -> Policy:
    # A model's folder says how its run asked, for conversations too.
    asked = dataclasses.replace(config, template=config.template or chat.AUTO)
    generator = asking.open_policy(name, asked)
    limits = {"most_columns": config.columns, "most_waiting": config.waiting}
    worker = Worker(generator.batch, **limits)
    return Policy(generator, worker, asyncio.Lock(), itertools.count(config.seed))


def _judge(name: str, config: Config) -> Judge:
    source = hf.model_folder(name)
    layers = hf.read_config(hf.find_folder(source)).num_layers
    compute = Compute(dtype=config.dtype or "float32")
    model = LanguageModel.load(source, **initial.compute_options(compute, layers))
    if "score" not in model.params:
        raise UserError(f"--reward {name}: this model has no score head")
    return Judge(model, asyncio.Lock())


def _is_own(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _labels(out: str | None) -> Iterator[Labels | None]:
    """The store of a file of preferences, if there is one."""
    if out is None:
        yield None
        return
    settings = label_settings.Config(out=out, answers="the chat page")
    source = pairs.Source({"answers": "the chat page"}, 0, lambda _: iter(()))
    with label.opened(settings, lambda: source) as (store, _):
        yield Labels(store, Path(out))
