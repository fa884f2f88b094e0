"""``rlhf-jax serve``: models for programs that speak OpenAI's protocol, and for a browser."""

import dataclasses
from collections.abc import Sequence

import tyro

from rlhf_jax.errors import UserError
from rlhf_jax.inference import asking, chat
from rlhf_jax.inference.serving.settings import Config


def serve_models(
    runs: tyro.conf.Positional[tuple[str, ...]],
    config: tyro.conf.OmitArgPrefixes[Config],
) -> None:
    """Answer OpenAI's requests with models, and serve a page to talk with them.

    /v1/chat/completions, /v1/completions and /v1/models as other servers have them; /score for
    reward models; the page at /.

    For example: rlhf-jax serve runs/ppo runs/sft --reward runs/rm

    Args:
        runs: folders of finished runs, or of models; a request names one of them.
        config: how they sample, and who may ask.
    """
    _serve(runs, config)


def open_page(run: str, config: chat.Config) -> None:
    """The page with what ``rlhf-jax chat`` was asked for."""
    if config.system is not None:
        raise UserError("--system: write the system message on the page")
    folders = [run, *([] if config.compare is None else [config.compare])]
    how = {field.name: getattr(config, field.name) for field in dataclasses.fields(asking.Settings)}
    _serve(folders, Config(**how, reward=config.reward, page=True, port=0))


def _serve(folders: Sequence[str], config: Config) -> None:
    try:
        from rlhf_jax.inference.serving import serve
    except ModuleNotFoundError as error:
        raise UserError(
            f"this needs the package {error.name}: pip install 'rlhf-jax[serve]'"
        ) from None
    serve.run(folders, config)
