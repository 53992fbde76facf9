"""Handlers that are not functions of this program: services that get its events."""
