"""``rlhf-jax configs`` and ``rlhf-jax models``: what comes with the package, and what loads."""

import re
import textwrap

import tyro

from rlhf_jax import config
from rlhf_jax.cli.console import show
from rlhf_jax.errors import UserError, did_you_mean
from rlhf_jax.models.config import ROPES
from rlhf_jax.models.families import FAMILIES, differences

CONFIGS = {  # {folder of the files: what they are}
    "configs": "Runs: --config NAME with the commands of the file's comment",
    "algorithms": "Methods with the settings of their papers: the file's comment has the command",
    "defaults": "Defaults of other libraries",
}
LONG_HEAD = 26  # letters of a sentence before a colon that say enough by themselves


def list_configs(name: tyro.conf.Positional[str | None] = None) -> None:
    """List the settings that come with the package: each NAME is for `--config NAME`.

    Args:
        name: show this file instead.
    """
    paths = config.shipped()
    if name is not None:
        if name not in paths:
            hint = did_you_mean(name, paths)
            more = "; `rlhf-jax configs` lists them"
            raise UserError(f"rlhf-jax configs: no settings {name!r}{hint or more}")
        show(paths[name].read_text("utf-8").rstrip())
        return
    for folder, heading in CONFIGS.items():
        show(f"{heading}:")
        group = {known: path for known, path in paths.items() if path.parent.name == folder}
        width = 4 + max(map(len, group))
        for known, path in group.items():
            comment, _, _ = path.read_text("utf-8").partition("\n#\n")
            show(f"  {known}".ljust(width) + _in_short(comment, 79 - width))
    show("rlhf-jax configs NAME shows the file: all it says of itself, and each setting.")


def _in_short(comment: str, width: int) -> str:
    """A YAML file's first sentence without its brackets; of a long one what is before a colon."""
    text = comment.replace("\n#", "").removeprefix("# ")
    sentence = re.split(r"(?<=\w\w\w)\. ", re.sub(r" \([^()]*\)", "", text))[0].rstrip(".")
    head, _, _ = sentence.partition(": ")
    if len(sentence) > width and len(head) > LONG_HEAD:
        sentence = head
    return textwrap.shorten(sentence, width, placeholder=" ...")


def list_models() -> None:
    """List the families of models that load: model_type of config.json, released models, and in
    what each differs from Llama.
    """
    for family in FAMILIES.values():
        show(f"{family.title} ({family.model_type}): {family.covers}")
        words = "; ".join(differences(family))
        show(f"    {words or 'the decoder that the others are compared with'}")
    show(f"\nPositions may be scaled: {', '.join(ROPES)}.")
    show(
        "Each family equals transformers on tiny random weights: logits, padding, packed texts, "
        "greedy tokens, saved folders. The page on models lists the tests."
    )
