"""Language models: building them, heads on them, and Hugging Face folders."""

from rlhf_jax.models import lora
from rlhf_jax.models.config import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RopeScaling,
    SmolLM3Config,
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
from rlhf_jax.models.model import Model, build, master_weights, resize_vocabulary
from rlhf_jax.models.names import SHARDING

# The configurations of the families
__all__ = ["GPT2Config", "GPTNeoXConfig", "Gemma2Config", "Gemma3TextConfig", "GptOssConfig"]
__all__ += ["GraniteConfig", "LlamaConfig", "Ministral3Config", "MistralConfig", "MixtralConfig"]
__all__ += ["Olmo2Config", "Olmo3Config", "OlmoeConfig", "Phi3Config", "Qwen2Config"]
__all__ += ["Qwen3Config", "Qwen3MoeConfig", "RopeScaling", "SmolLM3Config"]
# A model and its files, heads and adapters, and the places of its parameters on a mesh
__all__ += ["Model", "build", "load", "master_weights", "resize_vocabulary", "save"]
__all__ += ["HEADS", "SHARDING", "add_head", "lora", "policy_fn", "policy_params", "score_fn"]
__all__ += ["Teacher"]
