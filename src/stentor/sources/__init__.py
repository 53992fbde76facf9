"""Where events come from, beside handlers and timers: adapters to what others run."""
