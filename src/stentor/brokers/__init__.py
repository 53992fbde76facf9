"""Brokers: one file each, imported when a URL names its scheme."""
