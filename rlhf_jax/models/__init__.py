"""Language models: building them, heads on them, and Hugging Face folders."""

from rlhf_jax.models import lora
from rlhf_jax.models.config import (
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    RopeScaling,
)
from rlhf_jax.models.heads import (
    HEADS,
    Teacher,
    add_head,
    policy_fn,
    policy_params,
    score_fn,
)
from rlhf_jax.models.hf import load, save
from rlhf_jax.models.model import Model, build, resize_vocabulary
from rlhf_jax.models.names import SHARDING

# The configurations of the families
__all__ = ["GPT2Config", "Gemma3TextConfig", "LlamaConfig", "MistralConfig"]
__all__ += ["Qwen2Config", "Qwen3Config", "RopeScaling"]
# A model and its files, heads and adapters, and the places of its parameters on a mesh
__all__ += ["Model", "build", "load", "resize_vocabulary", "save"]
__all__ += ["HEADS", "SHARDING", "add_head", "lora", "policy_fn", "policy_params", "score_fn"]
__all__ += ["Teacher"]
