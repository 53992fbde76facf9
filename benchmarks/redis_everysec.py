"""The same as ``redis`` with the default of Redis, ``appendfsync everysec``: confirmed is not yet on disk."""

from benchmarks.redis import row

ROW = row("redis-everysec", "everysec")
