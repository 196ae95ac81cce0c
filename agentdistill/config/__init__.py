"""The one configuration object: everything a run does, checked before it starts.

``schema.py`` has the sections; of these, ``models.py`` those of models, ``api.py`` and
``servers.py`` models elsewhere and what they may cost, ``policies.py`` policies made of others,
``prompts.py`` how episodes are shown. ``loading.py`` is the way from a file to the object.
"""

from agentdistill.config.api import ApiModel, BudgetConfig, PriceConfig
from agentdistill.config.loading import load, read
from agentdistill.config.models import (
    LocalModel,
    LoraConfig,
    ModelConfig,
    TinyModel,
    TokenizerConfig,
)
from agentdistill.config.policies import CascadeConfig
from agentdistill.config.prompts import PROMPTS, PromptConfig, Section, prompt
from agentdistill.config.schema import (
    Beta,
    CollectStage,
    EnvConfig,
    EvaluateConfig,
    LimitsConfig,
    ModelName,
    Over,
    RunConfig,
    SamplingConfig,
    StageConfig,
    StageName,
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
