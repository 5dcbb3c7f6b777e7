"""The engines of a server: one per base model, started when it is asked, the least recently used one ended for another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from preftune.app.jobs.models import base_models
from preftune.app.jobs.platform import Platform
from preftune.core.ids import digest_bytes
from preftune.serving.embedded import EmbeddedEngine, EngineOptions
from preftune.serving.placing import Placement, place
from preftune.serving.protocol import Ask, EngineError, EngineEvent
from preftune.serving.upstream import UpstreamEngine, UpstreamOptions
from preftune.store.records import ModelVersion

Capturing: TypeAlias = Literal["off", "asked", "all"]


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """How models are served.

    engine: of each base. bases: how many may be in memory at once. upstreams: bases (as placed) that other servers have.
    capture: which conversations are kept: none, those whose request says ``store: true``, or all.
    """

    engine: EngineOptions = field(default_factory=EngineOptions)
    bases: int = 2
    upstreams: Mapping[str, UpstreamOptions] = field(default_factory=dict)
    capture: Capturing = "off"


class Service:
    """Answers of every model of an installation. One event loop only."""

    def __init__(self, platform: Platform, options: ServingOptions) -> None:
        self.platform, self.options = platform, options
        self._engines: dict[str, EmbeddedEngine] = {}
        self._upstreams = {base: UpstreamEngine(one) for base, one in options.upstreams.items()}
        self._asked: dict[str, ModelVersion] = {}  # folder of a base or an adapter -> the model by which it came into memory

    async def answer(self, model: ModelVersion, ask: Ask) -> AsyncGenerator[EngineEvent, None]:
        """The events of a request to a model; closing the iterator cancels it.

        Raises
            EngineError: the request is refused, or the engine does not answer.
        """
        placement = place(model.run)
        self._asked[placement.adapter or placement.base] = model
        engine = await self._engine(placement)
        events = engine.answer(replace(ask, adapter=placement.adapter, model=model.name))
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def load(self, model: ModelVersion) -> None:
        """Bring a model's base into memory; its adapter follows with the first request, in milliseconds."""
        placement = place(model.run)
        self._asked[placement.adapter or placement.base] = model
        engine = await self._engine(placement)
        if isinstance(engine, EmbeddedEngine):
            await engine.load()

    async def unload(self, model: ModelVersion) -> None:
        """Take an adapter, or a base with all its adapters, out of memory; those who are being answered keep it."""
        placement = place(model.run)
        if placement.base in self._upstreams:
            await self._upstreams[placement.base].unload(placement.adapter)
            return
        engine = self._engines.get(placement.base)
        if engine is None:
            return
        if placement.adapter:
            engine.unload(placement.adapter)
        elif engine.num_asked == 0:
            del self._engines[placement.base]
            await engine.close()
        else:
            raise EngineError("overloaded", f"{engine.num_asked} requests are being answered; try again", retry_after=5.0)

    async def state(self, project: str) -> list[dict[str, Any]]:
        """What is in memory: of each base its engine's facts, its load and its adapters, by the names that a project asks by."""
        rows = []
        for base, engine in list(self._engines.items()):
            found = await engine.state()
            rows.append({"base": base, "pid": engine.pid, **engine.facts, **found})
        rows += [{"base": base, **await one.state()} for base, one in self._upstreams.items()]
        offered = {one.run: one for one in reversed(await asyncio.to_thread(lambda: list(base_models(self.platform))))}

        def name_of(folder: str) -> str:
            model = self._asked.get(folder) or offered.get(folder)
            if model is None:
                return f"unnamed-{digest_bytes(folder.encode())[:12]}"
            return model.name if model.form == "base" or model.project == project else model.id

        for row in rows:
            row["base"] = name_of(row["base"])
            row["adapters"] = {name_of(folder): size for folder, size in row["adapters"].items()}
        return rows

    async def close(self) -> None:
        """End every engine."""
        engines, self._engines = list(self._engines.values()), {}
        for engine in engines:
            await engine.close()
        for elsewhere in self._upstreams.values():
            await elsewhere.close()

    async def _engine(self, placement: Placement) -> EmbeddedEngine | UpstreamEngine:
        if placement.base in self._upstreams:
            return self._upstreams[placement.base]
        engine = self._engines.get(placement.base)
        if engine is None:
            engine = self._engines[placement.base] = EmbeddedEngine(placement.base, self.options.engine)
            while len(self._engines) > self.options.bases:
                idle = [one for one in self._engines.values() if one.num_asked == 0 and one is not engine]
                if not idle:
                    del self._engines[placement.base]
                    raise EngineError(
                        "overloaded", f"{self.options.bases} other models are being asked, and no more are kept; try again",
                        code="models_busy", retry_after=5.0,
                    )  # fmt: skip
                oldest = min(idle, key=lambda one: one.used)
                del self._engines[oldest.model]
                await oldest.close()
        return engine
