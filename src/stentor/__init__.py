"""Stentor: typed events, sources and handlers that run unchanged on one file or on a message queue."""

from stentor.app import App
from stentor.breaker import Breaker
from stentor.context import Context, Depends, Firing
from stentor.errors import BatchFailed, StentorError
from stentor.event import Event, Named, Outgoing, Topic, event, replace, upcast
from stentor.group import Group, on
from stentor.handler import Batch
from stentor.message import Message, Receipt
from stentor.retry import Retry
from stentor.source import Publish, Source

__version__ = "0.1.0.dev0"
__all__ = [
    "App",
    "Batch",
    "BatchFailed",
    "Breaker",
    "Context",
    "Depends",
    "Event",
    "Firing",
    "Group",
    "Message",
    "Named",
    "Outgoing",
    "Publish",
    "Receipt",
    "Retry",
    "Source",
    "StentorError",
    "Topic",
    "event",
    "on",
    "replace",
    "upcast",
]
