"""The same as ``nats`` with the default of NATS, ``sync_interval: 2m``: confirmed is not yet on disk."""

from benchmarks.nats import row

ROW = row("nats-unsynced", "nats2m", "2m")
