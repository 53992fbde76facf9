"""Tests of programs built with Stentor: a harness with virtual time, and contexts for direct calls of handlers."""

from stentor.testing.clock import VirtualClock
from stentor.testing.harness import Attempts, DeadEvent, HandlerContext, Harness, Run, context, harness

__all__ = ["Attempts", "DeadEvent", "HandlerContext", "Harness", "Run", "VirtualClock", "context", "harness"]
