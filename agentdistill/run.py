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

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import agentdistill
from agentdistill.chat import ChatPolicy
from agentdistill.config import (
    ApiModel,
    LocalModel,
    RunConfig,
    SamplingConfig,
    TinyModel,
    TrainStage,
    VllmModel,
    load,
)
from agentdistill.engines.base import Engine, Sampling
from agentdistill.envs.base import TextEnv
from agentdistill.envs.make import make
from agentdistill.errors import ConfigError, MissingExtraError
from agentdistill.files import refusing, write_text
from agentdistill.ledger import Price
from agentdistill.policy import ExpertPolicy, ModelPolicy, Policy, RandomPolicy, derive_seed
from agentdistill.records import Trajectory
from agentdistill.render import Renderer
from agentdistill.rollout import run as wait
from agentdistill.store import Store
from agentdistill.wording import Wording

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentdistill.engines.litellm import LiteLLMEngine
    from agentdistill.ledger import Ledger
    from agentdistill.request_cache import RequestCache


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


@dataclass(slots=True, eq=False, kw_only=True)
class Voice:
    """A model that acts and scores by token ids, wherever its weights are."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    engine: Engine


@dataclass(slots=True, eq=False, kw_only=True)
class Loaded(Voice):
    """A model whose weights are here: it can be trained, and scored in whole distributions."""

    model: PreTrainedModel


class Run:
    """Everything a stage needs, by name. Use it as a context manager, or call :meth:`close`."""

    def __init__(self, config: RunConfig) -> None:
        """Nothing is written or loaded until it is asked for."""
        self.config, self.path = config, config.path
        self.pool: list[TextEnv] = []
        """Environments that wait for the next rollout."""
        self.ledger: Ledger | None = None
        self.answers: RequestCache | None = None
        self._remote: dict[str, LiteLLMEngine] = {}
        self._voices: dict[str, Voice] = {}
        self._served: list[Engine] = []

    def close(self) -> None:
        """Close every environment, and take back what servers were given."""
        while self._served:
            wait(self._served.pop().close())
        while self.pool:
            self.pool.pop().close()
        env = self.__dict__.pop("env", None)
        if env is not None:
            env.close()

    def __enter__(self) -> Run:
        """Itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close."""
        self.close()

    def prepare(self) -> None:
        """Make the folder and write the configuration; refuse a folder of another run.

        Raises:
            ConfigError: the folder holds a run with another configuration.
            StoreError: the disk refuses.
        """
        known = self.path / "config.yaml"
        with refusing(self.path):
            if known.exists():
                self._check_same(known)
                return
            self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "machine.json", json.dumps(machine(), indent=1))
        write_text(known, yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False))

    def _check_same(self, known: Path) -> None:
        if load(known).fingerprint != self.config.fingerprint:
            raise ConfigError(
                f"{self.path} holds a run with another configuration; give another name, or "
                "remove the folder",
                key="name",
                value=self.config.name,
            )

    # -- environment ------------------------------------------------------------------------------

    def make_env(self) -> TextEnv:
        """A fresh environment."""
        return make(self.config.env.id, self.config.env.options)

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
        from agentdistill.students.served import serve

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
        engine: Engine = (here := HFEngine(model, tokenizer, name=name))
        if (server := getattr(self.config.models[key], "server", None)) is not None:
            place, probe = f"models.{key}.server", renderer.alone("?")
            engine = serve(server, here, model, tokenizer, key=place, probe=probe)
            self._served.append(engine)
        return Loaded(name=name, model=model, tokenizer=tokenizer, renderer=renderer, engine=engine)

    def voice(self, name: str) -> Voice:
        """The model or train stage called ``name``, in this process or on a server."""
        config = self.config.models.get(name)
        if not isinstance(config, VllmModel):
            return self.model(name)
        if name not in self._voices:
            from agentdistill.engines import vllm
            from agentdistill.students.local import tokenizer_of

            need_torch("a model")
            tokenizer = tokenizer_of(config.tokenizer)
            engine = vllm.of_config(config, tokenizer, name)
            renderer = Renderer(tokenizer, self.config.prompt, self.env.instruction)
            self._voices[name] = Voice(
                name=name, tokenizer=tokenizer, renderer=renderer, engine=engine
            )
        return self._voices[name]

    def _fresh(self, key: str) -> tuple[PreTrainedModel, Any]:
        from agentdistill.students import local, tiny

        if key not in self.config.models:
            known = ", ".join(self.config.models)
            raise ConfigError(f"no such model; known: {known}", key="models", value=key)
        config = self.config.models[key]
        if isinstance(config, ApiModel | VllmModel):
            text = isinstance(config, ApiModel)
            raise ConfigError(
                "answers in text over an API: it has no weights here, and cannot score tokens"
                if text
                else "is on a server, and has no weights here: name a tiny or local model",
                key=f"models.{key}.kind",
                value=config.kind,
            )
        seed = derive_seed(self.config.seed, "model", key) % 2**31
        if isinstance(config, LocalModel):
            stages = [s for s in self.config.stages if isinstance(s, TrainStage)]
            with seeded(seed):  # fresh adapters are drawn from the global generator
                return local.load(config, trained=any(stage.model == key for stage in stages))
        tokenizer = self.tokenizer(config)
        return tiny.build(config, tokenizer, seed), tokenizer

    def tokenizer(self, config: TinyModel) -> Any:
        """The tokenizer of a tiny model: trained once per run, shared by equal configurations."""
        from transformers import AutoTokenizer

        from agentdistill.records import digest
        from agentdistill.students import tiny

        folder = self.path / "tokenizers" / digest(config.tokenizer.model_dump())
        if not folder.exists():
            unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
            with closing(self.make_env()) as env:
                grammar, episodes = self.config.prompt.grammar, config.tokenizer.episodes
                texts = tiny.corpus(env, grammar, episodes, self.config.seed, self.config.prompt)
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
        if isinstance(self.config.models.get(name), ApiModel):
            return self.chatting(name, sampling)
        return self.acting(self.voice(name), sampling)

    def chatting(
        self, name: str, sampling: SamplingConfig | None = None, role: str = "student"
    ) -> ChatPolicy:
        """The model behind an API called ``name``, as a policy; ``role`` is for the ledger."""
        config = self.config.models[name]
        assert isinstance(config, ApiModel)
        wording = Wording(self.config.prompt, self.env.instruction)
        chosen = Sampling(**(sampling or self.config.sampling).model_dump())
        engine = self.remote(name).in_role(role)
        return ChatPolicy(name, engine, wording, chosen, native_tools=config.native_tools)

    def remote(self, name: str) -> LiteLLMEngine:
        """The engine of a model behind an API: one for the run, so that its limits hold for all.

        Raises:
            ConfigError: its key is not set, or nobody knows its provider.
            MissingExtraError: litellm is not installed.
        """
        from agentdistill.engines.litellm import LiteLLMEngine
        from agentdistill.engines.patience import Patience

        config = self.config.models[name]
        assert isinstance(config, ApiModel)
        if name not in self._remote:
            self._remote[name] = LiteLLMEngine(
                config.model,
                name=name,
                base_url=config.base_url,
                key_env=config.key_env,
                concurrency=config.concurrency,
                timeout=config.timeout,
                patience=Patience(config.retries, budget=config.retry_budget),
                ledger=self.ledger,
                answers=self.answers,
            )
        return self._remote[name]

    def prices(self) -> dict[str, Price]:
        """What the configuration says that models behind an API cost, for a ledger.

        Raises:
            ConfigError: two entries give one model different prices.
        """
        found: dict[str, Price] = {}
        for name, config in self.config.models.items():
            if not isinstance(config, ApiModel) or config.price is None:
                continue
            said = config.price
            write, read = (
                said.input if part is None else part for part in (said.cache_write, said.cache_read)
            )
            price = Price(said.input, write, read, said.output)
            if found.setdefault(config.model, price) != price:
                raise ConfigError(
                    f"{config.model} has another price elsewhere", key=f"models.{name}.price"
                )
        return found

    def acting(self, loaded: Voice, sampling: SamplingConfig | None = None) -> ModelPolicy:
        """``loaded`` as a policy, with the weights that it has now."""
        loaded.engine.wake()
        chosen = Sampling(**(sampling or self.config.sampling).model_dump())
        return ModelPolicy(loaded.name, loaded.engine, loaded.renderer, chosen)


def machine() -> dict[str, Any]:
    """Versions of what numbers depend on, the commit of this checkout, and the machine."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"agentdistill": agentdistill.__version__}
    for name in ("torch", "transformers", "tokenizers", "numpy", "gymnasium"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return {
        "versions": versions,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }


def _commit() -> str:
    """The commit of the checkout this code runs from; "" for an installed package."""
    import subprocess

    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
