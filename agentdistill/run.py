"""A run: its folder, its environment, its models and policies by name.

Layout of the folder::

    config.yaml               the resolved configuration
    machine.json              versions, commit, machine
    tokenizers/<hash>/        tokenizers of tiny models
    ledger.jsonl, answers/    calls to providers and what was answered, where there are some
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

from agentdistill.chat import ChatPolicy
from agentdistill.config import (
    ApiModel,
    CascadeConfig,
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
from agentdistill.machine import machine
from agentdistill.policy import ExpertPolicy, ModelPolicy, Policy, RandomPolicy, derive_seed
from agentdistill.providers import Providers
from agentdistill.records import Trajectory
from agentdistill.render import Renderer
from agentdistill.rollout import run as wait
from agentdistill.store import Store
from agentdistill.wording import Wording

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentdistill.cascade import CascadePolicy
    from agentdistill.demos import Demos


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
        self.providers = Providers(config)
        """Models behind an API, and what they were paid."""
        self._voices: dict[str, Voice] = {}
        self._served: list[Engine] = []

    def close(self) -> None:
        """Close environments and ledger, and take back what servers were given."""
        while self._served:
            wait(self._served.pop().close())
        while self.pool:
            self.pool.pop().close()
        self.providers.close()
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
        from transformers.utils import logging

        from agentdistill.engines.hf import HFEngine
        from agentdistill.students.local import load_weights
        from agentdistill.students.served import serve

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
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

    def policy(
        self, name: str, sampling: SamplingConfig | None = None, role: str = "student"
    ) -> Policy:
        """The policy called ``name``; ``role`` is what a ledger books its calls as."""
        if name in self.config.policies:
            return self.cascade(name, sampling)
        grammar = self.config.prompt.grammar
        if name == "expert":
            return ExpertPolicy(grammar)
        if name == "random":
            return RandomPolicy(grammar)
        if isinstance(self.config.models.get(name), ApiModel):
            return self.chatting(name, sampling, role)
        return self.acting(self.voice(name), sampling)

    def cascade(
        self,
        name: str,
        sampling: SamplingConfig | None = None,
        said: CascadeConfig | None = None,
    ) -> CascadePolicy:
        """The cascade called ``name``, or what ``said`` makes of it.

        Raises:
            ConfigError: a part is missing, or the environment cannot do what it needs.
        """
        from agentdistill.cascade import of_config

        said = said or self.config.policies[name]
        student = self.policy(said.student, sampling, "student")
        teacher = self.policy(said.teacher, sampling, "teacher") if said.teacher else None
        demos, grammar = self.demos(name, said), self.config.prompt.grammar
        return of_config(name, said, student, teacher, demos, self.env.card, grammar)

    def demos(self, policy: str, said: CascadeConfig) -> Demos | None:
        """The demonstrations that the cascade called ``policy`` shows; None for none.

        Raises:
            ConfigError: they are not there.
        """
        from agentdistill.demos import named

        if not said.demos or not said.k:
            return None
        stages = [stage.name for stage in self.config.stages]
        folder = self.folder(said.demos) if said.demos in stages else None
        return named(said.demos, folder, f"policies.{policy}.demos")

    def answering(self, name: str, role: str = "student") -> Engine:
        """The model or train stage called ``name``, as an engine that takes messages.

        ``role`` is what a ledger books it as. Errors as in :meth:`voice` and of a provider.
        """
        if isinstance(self.config.models.get(name), ApiModel):
            return self.providers.engine(name).in_role(role)
        from agentdistill.engines.templated import TemplatedEngine

        voice = self.voice(name)
        voice.engine.wake()
        tokenizer: Any = voice.tokenizer
        own = voice.engine.capabilities.text  # a server with the template on its side
        return voice.engine if own else TemplatedEngine(voice.engine, tokenizer)

    def chatting(
        self, name: str, sampling: SamplingConfig | None = None, role: str = "student"
    ) -> ChatPolicy:
        """The model behind an API called ``name``, as a policy; ``role`` is for the ledger."""
        config = self.config.models[name]
        assert isinstance(config, ApiModel)
        wording = Wording(self.config.prompt, self.env.instruction)
        chosen = Sampling(**(sampling or self.config.sampling).model_dump())
        engine = self.providers.engine(name).in_role(role)
        return ChatPolicy(name, engine, wording, chosen, native_tools=config.native_tools)

    def acting(self, loaded: Voice, sampling: SamplingConfig | None = None) -> ModelPolicy:
        """``loaded`` as a policy, with the weights that it has now."""
        loaded.engine.wake()
        chosen = Sampling(**(sampling or self.config.sampling).model_dump())
        return ModelPolicy(loaded.name, loaded.engine, loaded.renderer, chosen)
