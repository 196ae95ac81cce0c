"""What a configuration names, as an engine that takes messages.

Invariant: what is served is what the same name is in evaluation: the same models, rule and
demonstrations; what only an environment can do is refused.
"""

from __future__ import annotations

from agentdistill import actions
from agentdistill.config import CascadeConfig
from agentdistill.engines.base import Engine, Sampling
from agentdistill.errors import ConfigError
from agentdistill.run import Run
from agentdistill.serving.cascade import MessageCascade, Shown


def engine_of(run: Run, name: str) -> Engine:
    """The policy called ``name``: a model, a train stage, or a key of ``policies``.

    Raises:
        ConfigError: there is none, or it needs an environment.
    """
    config = run.config
    if name in config.policies:
        return _cascade(run, name, config.policies[name])
    stages = [stage.name for stage in config.stages if stage.do == "train"]
    known = [*config.policies, *config.models, *stages]
    if name not in known:
        remedy = f"nothing of this name answers messages; known: {', '.join(known)}"
        raise ConfigError(remedy, key="policy", value=name)
    return run.answering(name)


def _cascade(run: Run, name: str, said: CascadeConfig) -> MessageCascade:
    def refuse(key: str, remedy: str) -> ConfigError:
        return ConfigError(remedy, key=f"policies.{name}.{key}", value=getattr(said, key))

    if said.execute:
        raise refuse("execute", "there is no environment behind messages to try anything in")
    if said.plan:
        raise refuse("plan", "plans are written in environments only")
    if said.teacher == "expert":
        raise refuse("teacher", "the expert needs an environment; name a model")
    prompt = run.config.prompt
    return MessageCascade(
        name,
        run.answering(said.student),
        run.answering(said.teacher, "teacher") if said.teacher else None,
        said.decides(),
        shown=_shown(run, name, said),
        drafts=Sampling(**run.config.sampling.model_dump()),
        grammar=actions.grammar(prompt.grammar, most=prompt.max_actions),
        code=said.equivalence == "code",
        teacher_demos=said.teacher_demos,
    )


def _shown(run: Run, name: str, said: CascadeConfig) -> Shown | None:
    demos, grammar = run.demos(name, said), run.config.prompt.grammar
    if demos is None:
        return None
    return Shown(demos, k=said.k, window=said.window, place=said.place, grammar=grammar)
