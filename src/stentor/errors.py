"""Every error Stentor raises, in one tree.

```text
StentorError
├── DefinitionError          the program declares something that cannot work (found at start-up)
│   ├── ConfigError          a broker URL, option or setting is wrong
│   ├── DuplicateType        two event classes, or two handlers of a group, claim one type
│   └── GroupsChanged        a group of this app disappeared while a new one appeared
├── Unsupported              the broker cannot do what the program asks of it
├── InvalidEvent             an event is refused at its publisher
│   └── TooLarge             … because it is over the size limit
├── Undecodable              bytes that cannot be read as the event they claim to be
│   └── NewerVersion         … because a newer program wrote them
├── BatchFailed              raised by a batch handler: which members failed
├── NotDelivered             a remote handler did not take an event
├── NotConnected             the app is not running and not connected
├── PositionLost             what a source has not read yet is gone where it comes from
└── BrokerError              the broker refused or could not be reached
    ├── Unavailable          not reachable or busy now; trying again makes sense
    ├── AuthenticationFailed wrong credentials; trying again does not
    ├── StorageFull          no room: disk full or size limit reached
    ├── StorageUnusable      the store is corrupt, foreign, read-only or of a newer schema
    ├── PublishUnknown       no confirmation came: the events may or may not be stored
    ├── UnknownTopic         the topic was never declared
    ├── UnknownGroup         the group was never declared
    └── LeaseLost            another process owns the partition by now
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class StentorError(Exception):
    """Base of every error that Stentor raises."""


class DefinitionError(StentorError):
    """Something the program declares cannot work; raised where it is defined or at start-up."""


class ConfigError(DefinitionError):
    """A broker URL, an option or a setting is wrong."""


class DuplicateType(DefinitionError):
    """Two event classes, or two handlers of one group, claim the same event type."""


class GroupsChanged(DefinitionError):
    """A declared group of this app lost its handler while a new group appeared: a rename, or not?"""


class Unsupported(StentorError):
    """The broker lacks a capability that the program asks for.

    ``feature`` and ``broker`` name them, ``alternatives`` what would do instead.
    """

    def __init__(self, feature: str, broker: str, alternatives: str) -> None:
        super().__init__(f"{broker} does not support {feature}; {alternatives}")
        self.feature = feature
        self.broker = broker
        self.alternatives = alternatives


class InvalidEvent(StentorError):
    """An event is refused at publish: it does not encode, or its own bytes would not decode again."""


class TooLarge(InvalidEvent):
    """An event is larger than the broker takes."""


class Undecodable(StentorError):
    """Bytes cannot be read as the event type they claim to be."""


class NewerVersion(Undecodable):
    """A message carries a newer version than this program knows; ``version`` and ``known`` say which."""

    def __init__(self, type: str, version: int, known: int) -> None:
        super().__init__(f"{type} has version {version}; this program knows version {known}")
        self.version = version
        self.known = known


class BatchFailed(StentorError):
    """Raised by a batch handler to fail some members: ``{index in the batch: error}``; the others succeed."""

    def __init__(self, errors: Mapping[int, BaseException]) -> None:
        super().__init__(f"{len(errors)} of the batch failed: {', '.join(map(str, sorted(errors)))}")
        self.errors = dict(errors)


class NotDelivered(StentorError):
    """A remote handler did not take an event.

    ``status`` is its answer, None without one; ``after`` the seconds it asks to wait; ``away``: it was not reached.
    """

    def __init__(self, text: str, status: int | None = None, *, after: float | None = None, away: bool = False) -> None:
        super().__init__(text)
        self.status = status
        self.after = after
        self.away = away


class NotConnected(StentorError):
    """The app is not running and not connected; use ``async with app:`` or ``app.connected()``."""


class PositionLost(StentorError):
    """What a source has not read yet is gone where it comes from: a slot, a log file."""


class BrokerError(StentorError):
    """The broker refused an operation or could not be reached."""


class Unavailable(BrokerError):
    """The broker cannot be reached, or is busy, now; trying again makes sense."""


class AuthenticationFailed(BrokerError):
    """The broker refused the credentials; trying again with the same ones does not help."""


class StorageFull(BrokerError):
    """No room: the disk is full or a size limit is reached."""


class StorageUnusable(BrokerError):
    """The store is corrupt, belongs to another program, is read-only, or has a newer schema."""


class PublishUnknown(BrokerError):
    """No confirmation came, so the events may or may not be stored.

    Publish them again with the same ``ids`` (``publish(event, id=...)``): what was stored is not stored twice.
    """

    def __init__(self, ids: Sequence[str], why: str) -> None:
        shown = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
        super().__init__(f"no confirmation for {shown}: {why}; publish again with the same ids")
        self.ids = list(ids)
        self.why = why


class UnknownTopic(BrokerError):
    """The topic was never declared."""


class UnknownGroup(BrokerError):
    """The group was never declared."""


class LeaseLost(BrokerError):
    """Another process owns the partition by now; its epoch refuses this one's settle."""
