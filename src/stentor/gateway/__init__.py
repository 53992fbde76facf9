"""The event bus between services: routes taken from the apps, written for a proxy, and the relay that broadcasts."""
