"""When a failed handler runs again."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from stentor.clock import Duration, seconds
from stentor.errors import DefinitionError

Errors = tuple[type[BaseException], ...]


@dataclass(frozen=True, slots=True)
class Retry:
    """A retry policy: exponential backoff between attempts, then the dead letter.

    ``attempts`` includes the first; None means without end. The wait after attempt n is ``first * factor**(n-1)``, at
    most ``longest``, spread by ``jitter`` (a share of the wait, both ways). With ``only``, other errors are dead at
    once; ``never`` errors are dead at once.

    Raises:
        DefinitionError: a value makes no sense.
    """

    attempts: int | None = 20
    first: Duration = "1s"
    factor: float = 2
    longest: Duration = "10m"
    jitter: float = 0.1
    only: Errors = ()
    never: Errors = ()
    _first: float = field(init=False, repr=False, compare=False)
    _longest: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.attempts is not None and (type(self.attempts) is not int or self.attempts < 1):
            raise DefinitionError(f"Retry: attempts must be a whole number from 1, or None, not {self.attempts!r}")
        if self.factor < 1:
            raise DefinitionError(f"Retry: factor must be at least 1, not {self.factor!r}")
        if not 0 <= self.jitter < 1:
            raise DefinitionError(f"Retry: jitter must be from 0 up to 1, not {self.jitter!r}")
        for name in ("only", "never"):
            object.__setattr__(self, name, error_classes(getattr(self, name), f"Retry: {name}"))
        object.__setattr__(self, "_first", seconds(self.first, "Retry: first"))
        object.__setattr__(self, "_longest", seconds(self.longest, "Retry: longest"))

    def wait(self, attempt: int) -> float:
        """Seconds to wait after the given attempt (from 1) failed."""
        # The exponent is bounded so that a policy without end cannot overflow.
        base = min(self._longest, self._first * self.factor ** min(attempt - 1, 200))
        return base * (1 + self.jitter * random.uniform(-1, 1))  # noqa: S311 - no secret

    def gives_up(self, error: BaseException, attempt: int) -> bool:
        """Whether the event is dead after this attempt failed with this error."""
        if self.never and isinstance(error, self.never):
            return True
        if self.only and not isinstance(error, self.only):
            return True
        return self.attempts is not None and attempt >= self.attempts


def error_classes(value: Any, what: str) -> Errors:
    """Exception classes as a tuple; a single one may be given alone. Raises DefinitionError."""
    if isinstance(value, type):
        value = (value,)
    if not isinstance(value, tuple) or not all(map(_is_error, value)):
        raise DefinitionError(f"{what} must be a tuple of exception classes, not {value!r}")
    return value


def _is_error(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)
