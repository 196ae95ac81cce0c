"""A run: its folder, its environment, its models and policies by name.

Layout of the folder::

    config.yaml               the resolved configuration
    machine.json              versions, commit, machine
    tokenizers/<hash>/        tokenizers of tiny models
    stages/<name>/            store (commits.jsonl, shards/), checkpoints/, model/, metrics.jsonl,
                              done.json when the stage is complete
    results.json, results.md  the evaluation

Names mean the same everywhere: ``expert``, ``random``, a key of ``models``, or a train stage.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from agentdistill.config import LocalModel, RunConfig, SamplingConfig, TinyModel, TrainStage
from agentdistill.engines.base import Sampling
from agentdistill.envs.base import TextEnv
from agentdistill.errors import ConfigError, MissingExtraError, StoreError
from agentdistill.files import write_text
from agentdistill.policy import ExpertPolicy, ModelPolicy, Policy, RandomPolicy, derive_seed
from agentdistill.records import Trajectory
from agentdistill.render import Renderer
from agentdistill.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentdistill.engines.hf import HFEngine


def make_env(env_id: str, options: dict[str, Any]) -> TextEnv:
    """The environment ``env_id`` (a registered id, or ``module:Class``), unwrapped.

    Raises:
        ConfigError: unknown id, class or option.
    """
    import gymnasium as gym

    import agentdistill.envs  # noqa: F401  (registers our ids)

    try:
        if ":" in env_id and "/" not in env_id:
            module, _, name = env_id.partition(":")
            env = getattr(importlib.import_module(module), name)(**options)
        else:
            spec = gym.spec(env_id)  # without make's wrappers: they cost more than our steps
            creator = spec.entry_point
            assert creator is not None
            create = (
                gym.envs.registration.load_env_creator(creator)
                if isinstance(creator, str)
                else creator
            )
            env = create(**{**spec.kwargs, **options})
    except ConfigError:
        raise
    except (gym.error.Error, ImportError, AttributeError, TypeError) as error:
        line = str(error).splitlines()[0]
        raise ConfigError(line, key="env", value={"id": env_id, **options}) from error
    if not isinstance(env, TextEnv):
        raise ConfigError("is not a TextEnv", key="env.id", value=env_id)
    return env


def need_torch(feature: str) -> None:
    """Say which extra ``feature`` needs, where torch and transformers are missing."""
    from importlib.util import find_spec

    if not all(find_spec(name) for name in ("torch", "transformers", "tokenizers")):
        raise MissingExtraError(feature, "train")


@contextmanager
def seeded(seed: int, device: Any = None) -> Iterator[None]:
    """Torch's global generators as ``seed`` says inside the block, and as they were after it.

    Those of the CPU, and of ``device`` where that is a GPU.
    """
    import torch

    with torch.random.fork_rng([device] if getattr(device, "type", "") == "cuda" else []):
        torch.manual_seed(seed % 2**63)
        yield


@dataclass(slots=True, eq=False)
class Loaded:
    """A model that is ready to act, to be scored and to be trained."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    engine: HFEngine


class Run:
    """Everything a stage needs, by name."""

    def __init__(self, config: RunConfig) -> None:
        """Nothing is written or loaded until it is asked for."""
        self.config, self.path = config, config.path
        self.pool: list[TextEnv] = []
        """Environments that wait for the next rollout."""

    def prepare(self) -> None:
        """Make the folder and write the configuration; refuse a folder of another run.

        Raises:
            ConfigError: the folder holds a run with another configuration.
            StoreError: the disk refuses.
        """
        known = self.path / "config.yaml"
        if known.exists():
            from agentdistill.config import load

            if load(known).fingerprint != self.config.fingerprint:
                raise ConfigError(
                    f"{self.path} holds a run with another configuration; give another name, or "
                    "remove the folder",
                    key="name",
                    value=self.config.name,
                )
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            remedy = "choose another output folder"
            raise StoreError(f"cannot make {self.path} ({error.strerror}); {remedy}") from error
        write_text(self.path / "machine.json", json.dumps(machine(), indent=1))
        write_text(known, yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False))

    # -- environment ------------------------------------------------------------------------------

    def make_env(self) -> TextEnv:
        """A fresh environment."""
        return make_env(self.config.env.id, dict(self.config.env.options))

    @cached_property
    def env(self) -> TextEnv:
        """One environment for listing tasks and reading the card; never stepped by rollouts."""
        return self.make_env()

    @property
    def max_turns(self) -> int:
        """Turns an episode can have."""
        return min(self.config.env.max_turns or self.env.step_limit, self.env.step_limit)

    # -- stages -----------------------------------------------------------------------------------

    def folder(self, stage: str) -> Path:
        """Folder of a stage."""
        return self.path / "stages" / stage

    def done(self, stage: str) -> dict[str, Any] | None:
        """Summary of a finished stage, None while it is not."""
        file = self.folder(stage) / "done.json"
        return dict(json.loads(file.read_text())) if file.exists() else None

    def episodes(self, stage: str) -> list[Trajectory]:
        """The committed trajectories of a stage.

        Raises:
            ConfigError: the stage has none yet.
        """
        with Store(self.folder(stage), readonly=True) as store:
            found = list(store.trajectories(stage, committed=True))
        if not found:
            raise ConfigError("has no episodes; run that stage first", key="data", value=stage)
        return found

    # -- models and policies ----------------------------------------------------------------------

    def model(self, name: str) -> Loaded:
        """The model or train stage called ``name``, with its trained weights where it has some."""
        need_torch("a model")
        import torch

        from agentdistill.engines.hf import HFEngine
        from agentdistill.students.local import load_weights

        torch.set_num_threads(self.config.threads)
        stage = next((s for s in self.config.stages if s.name == name), None)
        key = stage.model if isinstance(stage, TrainStage) else name
        model, tokenizer = self._fresh(key)
        if isinstance(stage, TrainStage):
            folder = self.folder(name) / "model"
            if not folder.exists():
                raise ConfigError("this stage has no trained model yet", key="stage", value=name)
            load_weights(model, folder)
        renderer = Renderer(tokenizer, self.config.prompt, self.env.instruction)
        return Loaded(name, model, tokenizer, renderer, HFEngine(model, tokenizer, name=name))

    def _fresh(self, key: str) -> tuple[PreTrainedModel, Any]:
        from agentdistill.students import local, tiny

        if key not in self.config.models:
            known = ", ".join(self.config.models)
            raise ConfigError(f"no such model; known: {known}", key="models", value=key)
        config = self.config.models[key]
        seed = derive_seed(self.config.seed, "model", key) % 2**31
        if isinstance(config, LocalModel):
            with seeded(seed):  # fresh adapters are drawn from the global generator
                return local.load(config)
        tokenizer = self.tokenizer(config)
        return tiny.build(config, tokenizer, seed), tokenizer

    def tokenizer(self, config: TinyModel) -> Any:
        """The tokenizer of a tiny model: trained once per run, shared by equal configurations."""
        from transformers import AutoTokenizer

        from agentdistill.records import digest
        from agentdistill.students import tiny

        folder = self.path / "tokenizers" / digest(config.tokenizer.model_dump())
        if not folder.exists():
            texts = tiny.corpus(
                self.make_env(),
                self.config.prompt.grammar,
                config.tokenizer.episodes,
                self.config.seed,
            )
            unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
            tiny.train_tokenizer(texts, config.tokenizer).save_pretrained(unfinished)
            try:
                unfinished.rename(folder)  # complete or not there
            except OSError:
                if not folder.exists():
                    raise
                shutil.rmtree(unfinished)  # another process was faster, and its is the same
        return AutoTokenizer.from_pretrained(folder)

    def policy(self, name: str, sampling: SamplingConfig | None = None) -> Policy:
        """The policy called ``name``."""
        grammar = self.config.prompt.grammar
        if name == "expert":
            return ExpertPolicy(grammar)
        if name == "random":
            return RandomPolicy(grammar)
        return self.acting(self.model(name), sampling)

    def acting(self, loaded: Loaded, sampling: SamplingConfig | None = None) -> ModelPolicy:
        """``loaded`` as a policy."""
        chosen = Sampling(**(sampling or self.config.sampling).model_dump())
        return ModelPolicy(loaded.name, loaded.engine, loaded.renderer, chosen)


def machine() -> dict[str, Any]:
    """Versions of what numbers depend on, the commit of this checkout, and the machine."""
    import platform
    import subprocess
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("agentdistill", "torch", "transformers", "tokenizers", "numpy", "gymnasium"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "versions": versions,
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
