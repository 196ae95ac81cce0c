"""The one configuration object: everything a run does, checked before it starts.

``schema.py`` has the sections, ``prompts.py`` how episodes are shown, ``api.py`` models behind an
API, ``policies.py`` policies made of others, ``loading.py`` the way from a
file to the object.
"""

from agentdistill.config.api import ApiModel, PriceConfig
from agentdistill.config.loading import load, read
from agentdistill.config.policies import CascadeConfig
from agentdistill.config.prompts import PROMPTS, PromptConfig, Section, prompt
from agentdistill.config.schema import (
    Beta,
    CollectStage,
    EnvConfig,
    EvaluateConfig,
    LimitsConfig,
    LocalModel,
    LoraConfig,
    ModelConfig,
    ModelName,
    Over,
    RunConfig,
    SamplingConfig,
    StageConfig,
    StageName,
    TinyModel,
    TokenizerConfig,
    TrainStage,
)

__all__ = [
    "PROMPTS",
    "ApiModel",
    "Beta",
    "CascadeConfig",
    "CollectStage",
    "EnvConfig",
    "EvaluateConfig",
    "LimitsConfig",
    "LocalModel",
    "LoraConfig",
    "ModelConfig",
    "ModelName",
    "Over",
    "PriceConfig",
    "PromptConfig",
    "RunConfig",
    "SamplingConfig",
    "Section",
    "StageConfig",
    "StageName",
    "TinyModel",
    "TokenizerConfig",
    "TrainStage",
    "load",
    "prompt",
    "read",
]
