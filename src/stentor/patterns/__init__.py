"""Patterns built on the core: what event-driven programs need beside publish and handle."""
