"""``rlhf-jax models``: the families of models that load."""

from rlhf_jax.cli.console import show
from rlhf_jax.models.config import ROPES
from rlhf_jax.models.families import FAMILIES, differences


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
