"""The one configuration object: everything a run does, checked before it starts.

``schema.py`` has the sections, ``prompts.py`` how episodes are shown, ``api.py`` models behind an
API and what they may cost, ``servers.py`` vLLM servers, ``policies.py`` policies made of others,
``loading.py`` the way from a file to the object.
"""

from agentdistill.config.api import ApiModel, BudgetConfig, PriceConfig
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
from agentdistill.config.servers import ServerConfig, VllmModel

__all__ = [
    "PROMPTS",
    "ApiModel",
    "Beta",
    "BudgetConfig",
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
    "ServerConfig",
    "StageConfig",
    "StageName",
    "TinyModel",
    "TokenizerConfig",
    "TrainStage",
    "VllmModel",
    "load",
    "prompt",
    "read",
]
