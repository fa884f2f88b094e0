"""All settings of a run: one ``RunConfig`` with a section per stage, read from YAML and dotted
flags by ``parse``.

    config = parse(RunConfig)     # script.py --config FILE.yaml --ppo.clip-low 0.1

``configs/`` holds examples.
"""

from rlhf_jax.config.flags import parse
from rlhf_jax.config.sections import for_algorithm, section_name
from rlhf_jax.config.settings import (
    ALGORITHMS,
    Answering,
    Compute,
    DistillStage,
    DPOStage,
    EngineServer,
    Json,
    KTOStage,
    LoRA,
    Mesh,
    Network,
    Optimizer,
    PPOStage,
    Reference,
    RewardModelStage,
    RLStage,
    RunConfig,
    Safety,
    SFTStage,
    Text,
    Tokenizer,
)
from rlhf_jax.config.sources import DataSource, ModelSource, data_source, model_source
from rlhf_jax.config.trust import check_trusted, recorded, shipped
from rlhf_jax.config.yaml_files import read, to_dict, to_yaml
from rlhf_jax.graders.service import Judge

__all__ = [
    "ALGORITHMS",
    "Answering",
    "Compute",
    "DPOStage",
    "DataSource",
    "DistillStage",
    "EngineServer",
    "Json",
    "Judge",
    "KTOStage",
    "LoRA",
    "Mesh",
    "ModelSource",
    "Network",
    "Optimizer",
    "PPOStage",
    "RLStage",
    "Reference",
    "RewardModelStage",
    "RunConfig",
    "SFTStage",
    "Safety",
    "Text",
    "Tokenizer",
    "check_trusted",
    "data_source",
    "for_algorithm",
    "model_source",
    "parse",
    "read",
    "recorded",
    "section_name",
    "shipped",
    "to_dict",
    "to_yaml",
]
