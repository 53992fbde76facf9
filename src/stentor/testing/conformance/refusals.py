"""Rule 13: what a broker lacks is refused, naming feature, broker and alternatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from stentor.app import App
from stentor.broker import Durable, weaker
from stentor.errors import ConfigError, UnknownGroup, UnknownTopic, Unsupported
from stentor.testing.conformance.events import Job
from stentor.testing.conformance.stage import Scene, Stage


class Refusals(Scene):
    """Each feature works or is refused; nothing in between."""

    async def test_r13_durability_is_checked(self, stage: Stage) -> None:
        """An app that demands more than the broker gives does not start; what it gives, it accepts."""
        levels: tuple[Durable, ...] = ("process", "host", "replica")
        for level in levels:
            app = App("shop", durable=level)
            if weaker(stage.features.durable, level):
                with pytest.raises(ConfigError, match=f"{level}.*{stage.features.name}.*{stage.features.durable}"):
                    async with app.running(broker=stage.broker, connect_only=True):
                        pass
            else:
                async with app.running(broker=stage.broker, connect_only=True):
                    pass

    async def test_r13_each_feature_works_or_is_refused(self, stage: Stage) -> None:
        """Replay, cancel and browse are done, or raise Unsupported with feature, broker and alternative."""
        app = stage.app()

        @app.on(Job)
        async def work(job: Job) -> None:
            pass

        async def browse() -> None:
            async for _ in stage.broker.browse("jobs", "earliest", follow=False):
                pass

        async def replay() -> None:
            await stage.broker.admin.replay("shop.work", "earliest")

        async def cancel() -> None:
            await stage.broker.admin.cancel("nothing")

        async with stage.running(app):
            for name, ask in (("browse", browse), ("replay", replay), ("cancel", cancel)):
                if getattr(stage.features, name):
                    await ask()
                    continue
                with pytest.raises(Unsupported) as caught:
                    await ask()
                assert caught.value.feature == name
                assert caught.value.broker == stage.features.name
                assert caught.value.alternatives

    async def test_r13_unknown_names(self, stage: Stage) -> None:
        """Operations on a group or topic that was never declared say so."""
        admin = stage.broker.admin
        with pytest.raises(UnknownGroup, match="nobody"):
            await admin.drop_group("nobody")
        with pytest.raises(UnknownGroup, match="nobody"):
            await admin.rename_group("nobody", "somebody")
        if stage.features.replay:
            with pytest.raises(UnknownGroup, match="nobody"):
                await admin.replay("nobody", "earliest")
        if stage.features.browse:
            with pytest.raises(UnknownTopic, match="nowhere"):
                await stage.browse("nowhere")

    async def test_r13_features_are_of_this_broker(
        self, stage: Stage, record_property: Callable[[str, object], None]
    ) -> None:
        """The record names the broker, and a limit of at least 64 KiB, which CloudEvents asks of everyone."""
        for field in stage.features.__struct_fields__:
            record_property(field, getattr(stage.features, field))
        assert stage.features.name
        assert stage.features.max_bytes >= 64 * 1024
