"""When what the handlers of a group call is away: the group waits for it, and no event uses up its attempts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stentor.clock import Duration, seconds
from stentor.errors import DefinitionError
from stentor.rate import allowed
from stentor.retry import Errors, error_classes

if TYPE_CHECKING:
    from stentor.worker import Worker

MARGIN = 0.05
"""Seconds after the end of a pause at which an event that waits for it is tried again."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """A circuit breaker for a group, in each of its processes.

    ``after`` events in a row that failed with one of the errors ``only``, with none of the group between them that was
    handled well, open it (a batch fails as a whole): for ``pause`` nothing is fetched and nothing begins. Then one
    handler tries. If it ends well, all go on; if it fails in the same way, the pause is twice as long, ``longest`` at
    the most. From the opening on such failures cost no attempt: those events wait, in their order, and are tried again
    after the pause.

    Raises:
        DefinitionError: a value makes no sense.
    """

    only: Errors = (ConnectionError, TimeoutError)
    after: int = 5
    pause: Duration = "1s"
    longest: Duration = "1m"
    _pause: float = field(init=False, repr=False, compare=False)
    _longest: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if type(self.after) is not int or self.after < 1:
            raise DefinitionError(f"Breaker: after must be a whole number from 1, not {self.after!r}")
        only = error_classes(self.only, "Breaker: only")
        if not only:
            raise DefinitionError("Breaker: only must name an exception class")
        object.__setattr__(self, "only", only)
        for name in ("pause", "longest"):
            value = seconds(getattr(self, name), f"Breaker: {name}")
            if value <= 0:
                raise DefinitionError(f"Breaker: {name} must be more than 0, not {getattr(self, name)!r}")
            object.__setattr__(self, f"_{name}", value)


class Circuit:
    """A breaker at work in one worker: closed, open, or open with one handler that tries."""

    def __init__(self, worker: Worker, breaker: Breaker) -> None:
        self._worker = worker
        self._breaker = breaker
        self._failures = 0
        self._pause = breaker._pause
        self._until = 0.0
        self.open = False

    def concerns(self, error: BaseException) -> bool:
        """Whether an error says that what is called is away."""
        return isinstance(error, self._breaker.only)

    def worked(self) -> None:
        """A handler ended well."""
        self._failures = 0
        if self.open:
            self.open, self._pause = False, self._breaker._pause
            self._worker.most = allowed(self._worker)
            self._worker.poke()

    def failed(self, error: BaseException) -> float | None:
        """Seconds after which the event is tried again, at no attempt; None where its failure is its own matter."""
        if not self.concerns(error):
            return None
        self._failures += 1
        now = self._worker.clock.monotonic()
        if not self.open and self._failures < self._breaker.after:
            return None
        if not self.open or now >= self._until:
            self.open = True
            self._until = now + self._pause
            self._worker.log.warning(
                "%s: held for %.3g s: %s: %s", self._worker.group, self._pause, type(error).__name__, error
            )
            self._worker.hold.set(self._pause, f"{type(error).__name__}: {error}")
            self._worker.most = allowed(self._worker)
            self._pause = min(2 * self._pause, self._breaker._longest)
        return self._until - now + MARGIN
