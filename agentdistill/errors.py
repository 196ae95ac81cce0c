"""The one exception tree of the library.

Invariants: every error that a user can cause derives from :class:`AgentDistillError` and from the
standard exception that a caller would expect; its message is one line that names what is wrong and
what to do; ``exit_code`` is what the command line returns for it.

Faults *inside an episode* (an environment that breaks, a provider that times out) are data, not
crashes: the rollout catches them and records a :class:`agentdistill.records.Fault`.
"""

from __future__ import annotations


class AgentDistillError(Exception):
    """Base class of all errors that this library raises on purpose."""

    exit_code = 1


class ConfigError(AgentDistillError, ValueError):
    """A configuration that cannot run: names the key, the value and the remedy."""

    exit_code = 2

    def __init__(self, message: str, *, key: str | None = None, value: object = None) -> None:
        """Prefix ``message`` with ``key`` and ``value`` when they are known."""
        self.key, self.value = key, value
        super().__init__(f"{key}={value!r}: {message}" if key else message)


class MissingExtraError(AgentDistillError, ImportError):
    """A feature needs packages that are not installed; the message has the install command."""

    exit_code = 3

    def __init__(self, feature: str, extra: str) -> None:
        """Say that ``feature`` needs ``pip install 'agentdistill[extra]'``."""
        super().__init__(f"{feature} needs extra packages: pip install 'agentdistill[{extra}]'")
        self._arguments = feature, extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        """Errors travel between processes."""
        return type(self), self._arguments


class EnvError(AgentDistillError, RuntimeError):
    """An environment broke its contract or cannot start; inside an episode it becomes a fault."""

    exit_code = 4


class EngineError(AgentDistillError, RuntimeError):
    """An engine cannot do what it was asked; inside an episode it becomes a fault."""

    exit_code = 4


class UnfitError(EngineError):
    """A request that this engine can never answer: whoever asks has to change it."""


class StoreError(AgentDistillError, OSError):
    """The run directory cannot be read or written (disk full, foreign files, permissions)."""

    exit_code = 5


class BudgetError(AgentDistillError, RuntimeError):
    """A limit on spending would be broken: names the limit, its value and what to do."""

    exit_code = 6

    def __init__(self, limit: str, value: object, message: str) -> None:
        """Say that ``limit``, which is ``value``, leaves no room, and why (``message``)."""
        self.limit, self.value, self._message = limit, value, message
        super().__init__(
            f"{limit}={value}: {message}; raise that limit and repeat the command: "
            "what was paid is kept"
        )

    def __reduce__(self) -> tuple[type[BudgetError], tuple[str, object, str]]:
        """Errors travel between processes."""
        return type(self), (self.limit, self.value, self._message)
