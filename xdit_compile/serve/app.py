"""The routes of a server."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from xdit_compile.engine.handle import Engine
from xdit_compile.serve.arguments import Checked, checked, picture, seed_of, size_of
from xdit_compile.serve.guards import Guards
from xdit_compile.serve.job import Encode, Job
from xdit_compile.serve.metrics import Metrics
from xdit_compile.serve.queue import Queue
from xdit_compile.serve.refusals import Refusal, bad
from xdit_compile.serve.results import FORMATS, files_of
from xdit_compile.serve.settings import Settings

log = logging.getLogger(__name__)

# Seconds between two looks at whether a client that waits is still there.
_LOOK = 0.5
# Fields of OpenAI's API that say nothing to a diffusion pipeline.
_WITHOUT_EFFECT = ("user", "background", "moderation", "partial_images", "style", "quality", "input_fidelity")


class Server:
    """What the routes have in common. Before its engine has started it says that it is not ready.

    Args:
        start: starts the engine; called in a thread when the server is up.
        failed: called when that fails.
    """

    def __init__(self, settings: Settings, start: Callable[[], Engine], failed: Callable[[], None]) -> None:
        self.settings, self.metrics = settings, Metrics()
        self._start, self._failed = start, failed
        self._engine: Engine | None = None
        self._queue: Queue | None = None

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(self._begin())
        yield
        if self._queue is not None:
            await self._queue.drain(self.settings.grace)
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
        starting.cancel()

    async def _begin(self) -> None:
        try:
            self._engine = await asyncio.to_thread(self._start)
        except Exception as error:
            log.error("the engine cannot be started: %s", error)
            self._failed()
            return
        self._queue = Queue(self._engine, self.settings, self.metrics)
        self.metrics.ready.set(1)
        log.info("ready: %s", self._engine)

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise Refusal(503, "the engine is starting", "starting", after=5)
        return self._engine

    @property
    def queue(self) -> Queue:
        if self._queue is None:
            raise Refusal(503, "the engine is starting", "starting", after=5)
        return self._queue

    @property
    def ready(self) -> bool:
        return self._queue is not None and not self._queue.draining

    def submit(self, given: Mapping[str, Any], seed: int, count: int = 1, pictures: Mapping[str, Any] | None = None,
               form: str = "png", quality: int = 90) -> Job:
        """A job for the arguments that a client gave."""
        made: Checked = checked(self.engine.signature, self.settings.limits, given, seed, count, pictures)
        rate = made.arguments.get("frame_rate") or self.engine.signature.defaults.get("frame_rate")
        encode: Encode = partial(_files, rate=int(rate or self.settings.frame_rate), form=form, quality=quality)
        return self.queue.submit(made, encode)


def _files(answer: Any, seed: int, rate: int, form: str, quality: int) -> Any:
    return files_of(answer, seed, rate, form, quality)


def application(server: Server) -> FastAPI:
    """The routes."""
    app = FastAPI(title="xdit_compile", lifespan=server.lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    page = files(__package__).joinpath("page.html").read_text()

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        server.metrics.refused.labels(refusal.code).inc()
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        refusal = Refusal(error.status_code, str(error.detail), "not_found" if error.status_code == 404 else "refused")
        return JSONResponse(refusal.body, refusal.status, error.headers)

    @app.get("/")
    async def tried() -> Response:
        return HTMLResponse(page)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        return JSONResponse({"ready": server.ready}, 200 if server.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> Response:
        signature, limits = server.engine.signature, server.settings.limits
        return JSONResponse({"object": "list", "data": [{
            "id": server.settings.model, "object": "model", "owned_by": "local", "pipeline": signature.name,
            "arguments": list(signature.kinds), "needs": list(signature.needed), "defaults": dict(signature.defaults),
            "limits": {"steps": limits.steps, "side": limits.side, "images": limits.images}}]})

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        return await _images(server, request, await _object(request), {})

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        if "image" not in server.engine.signature.kinds:
            raise Refusal(404, f"{server.engine.signature.name} takes no image", "no_edits")
        given, pictures = await _form(request, server)
        return await _images(server, request, given, pictures)

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        given = await _object(request)
        if given.pop("save_disk_path", None):
            raise bad("files are not written where a client says; leave save_disk_path out and take `output`",
                      "save_disk_path")
        if "cfg" in given:
            given["guidance_scale"] = given.pop("cfg")
        started = time.perf_counter()
        job = server.submit(given, seed_of(given.pop("seed", None), 42))
        await _waited(server, request, job)
        return JSONResponse({"message": "Image generated successfully", "save_to_disk": False,
                             "elapsed_time": f"{time.perf_counter() - started:.2f} sec",
                             "output": base64.b64encode(job.files[0].content).decode()})

    for prefix in ("/v1/jobs", "/v1/videos"):
        _jobs(app, server, prefix)
    app.add_middleware(Guards, settings=server.settings, metrics=server.metrics)
    return app


def _jobs(app: FastAPI, server: Server, prefix: str) -> None:
    """Requests that are not waited for."""
    def described(job: Job) -> dict[str, Any]:
        made = {"id": job.identifier, "object": "job", "model": server.settings.model, "status": _STATUS[job.state],
                "created_at": int(job.created), "progress": round(100 * job.progress), "step": job.step,
                "steps": job.steps, "before": server.queue.place(job), "seed": job.checked.seed}
        if job.over:
            made["seconds"] = round(job.seconds, 3)
        if job.refusal is not None:
            made |= job.refusal.body
        if job.state == "done":
            made["results"] = [{"url": f"{prefix}/{job.identifier}/content?index={i}", "name": f.name,
                                "media_type": f.media_type, "seed": f.seed} for i, f in enumerate(job.files)]
        return made

    @app.post(prefix)
    async def submit(request: Request) -> Response:
        given = await _object(request)
        seed, count, form, quality = _common(given, server)
        return JSONResponse(described(server.submit(given, seed, count, form=form, quality=quality)), 202)

    @app.get(prefix + "/{identifier}")
    async def look(identifier: str) -> Response:
        return JSONResponse(described(server.queue.job(identifier)))

    @app.get(prefix + "/{identifier}/events")
    async def events(identifier: str) -> Response:
        job = server.queue.job(identifier)

        async def told() -> AsyncIterator[str]:
            async for now in job.watched():
                yield _event("progress" if not now.over else now.state, described(now))

        return StreamingResponse(told(), media_type="text/event-stream", headers=_FRESH)

    @app.get(prefix + "/{identifier}/content")
    async def content(identifier: str, index: int = 0) -> Response:
        job = server.queue.job(identifier)
        if job.refusal is not None:
            raise job.refusal
        if job.state != "done":
            raise Refusal(409, f"this job is {_STATUS[job.state]}; its result is not there yet", "not_done", after=1)
        if not 0 <= index < len(job.files):
            raise Refusal(404, f"this job has {len(job.files)} results; there is no number {index}", "no_such_result")
        file = job.files[index]
        return Response(file.content, media_type=file.media_type, headers={
            "Content-Disposition": f'inline; filename="{file.name}"', "X-Content-Type-Options": "nosniff"})

    @app.delete(prefix + "/{identifier}")
    async def cancel(identifier: str) -> Response:
        job = server.queue.job(identifier)
        await server.queue.cancel(job)
        return JSONResponse(described(job))


_STATUS = {"queued": "queued", "running": "in_progress", "done": "completed", "failed": "failed",
           "cancelled": "cancelled"}
_FRESH = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


async def _images(server: Server, request: Request, given: dict[str, Any], pictures: Mapping[str, Any]) -> Response:
    """OpenAI's images API: answered when they are made, or with events meanwhile."""
    stream = given.pop("stream", False)
    if not isinstance(stream, bool):
        raise bad("stream must be true or false", "stream")
    if (asked := given.pop("response_format", "b64_json")) not in ("b64_json", "url"):
        raise bad("response_format must be b64_json or url", "response_format")
    seed, count, form, quality = _common(given, server)
    job = server.submit(given, seed, count, pictures, form, quality)

    def answered() -> dict[str, Any]:
        data = []
        for i, file in enumerate(job.files):
            where = f"{request.base_url}v1/jobs/{job.identifier}/content?index={i}"
            data.append({"seed": file.seed} | ({"url": where} if asked == "url" else {
                "b64_json": base64.b64encode(file.content).decode()}))
        return {"created": int(job.created), "data": data, "output_format": form}

    if not stream:
        await _waited(server, request, job)
        timing = ", ".join(f"{name};dur={1000 * seconds:.3f}" for name, seconds in job.timing.items())
        return JSONResponse(await asyncio.to_thread(answered), headers={"Server-Timing": timing})

    async def told() -> AsyncIterator[str]:
        try:
            async for now in job.watched():
                if now.refusal is not None:
                    yield _event("error", {"type": "error", **now.refusal.body})
                elif now.state == "done":
                    made = answered()
                    for entry in made["data"]:
                        yield _event("image_generation.completed", {
                            "type": "image_generation.completed", "created_at": made["created"],
                            "output_format": form, **entry})
                else:
                    yield _event("image_generation.progress", {
                        "type": "image_generation.progress", "id": job.identifier, "progress": now.progress,
                        "step": now.step, "steps": now.steps, "before": server.queue.place(now)})
        finally:
            await server.queue.cancel(job)  # the client is gone

    return StreamingResponse(told(), media_type="text/event-stream", headers=_FRESH)


def _common(given: dict[str, Any], server: Server) -> tuple[int, int, str, int]:
    """Take seed, number of results, form and quality out of a body, and turn its size into height and width."""
    count, limits = given.pop("n", 1), server.settings.limits
    count = 1 if count is None else count
    if type(count) is not int or not 1 <= count <= limits.images:
        raise bad(f"n must be a whole number from 1 to {limits.images}", "n")
    if (form := given.pop("output_format", "png")) not in tuple(FORMATS):
        raise bad(f"output_format must be one of {', '.join(FORMATS)}", "output_format")
    quality = given.pop("output_compression", 90)
    if type(quality) is not int or not 0 <= quality <= 100:
        raise bad("output_compression must be a whole number from 0 to 100", "output_compression")
    size = size_of(given.pop("size", None))
    if both := size.keys() & given.keys():
        raise bad(f"{both.pop()} is given twice, also by size", "size")
    if missing := size.keys() - server.engine.signature.kinds.keys():
        raise bad(f"{server.engine.signature.name} takes no {missing.pop()}; leave size out", "size")
    given |= size
    if (model := given.pop("model", server.settings.model)) not in (server.settings.model, None):
        raise Refusal(404, f"there is no model {str(model)[:80]!r}; this server has {server.settings.model}",
                      "model_not_found", "model")
    for name in _WITHOUT_EFFECT:
        if name not in server.engine.signature.kinds:
            given.pop(name, None)
    return seed_of(given.pop("seed", None), secrets.randbelow(2**32)), count, form, quality


async def _waited(server: Server, request: Request, job: Job) -> None:
    """Wait until a job is over; a client that goes away has it cancelled.

    Raises:
        Refusal: it failed.
    """
    waiting = asyncio.create_task(job.ended.wait())
    try:
        while not (await asyncio.wait([waiting], timeout=_LOOK))[0]:
            if await request.is_disconnected():
                await server.queue.cancel(job)
            elif time.monotonic() > job.deadline:
                await server.queue.cancel(job, Refusal(
                    504, f"not done within {server.settings.limits.seconds:g} s", "timeout"))
    finally:
        waiting.cancel()
        await server.queue.cancel(job)
    if job.refusal is not None:
        raise job.refusal


async def _object(request: Request) -> dict[str, Any]:
    """The body, which is an object of JSON.

    Raises:
        Refusal: it is not.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the body must be JSON, with Content-Type: application/json", "not_json")
    try:
        given = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise bad("the body is no JSON") from None
    if not isinstance(given, dict):
        raise bad("the body must be an object")
    return given


async def _form(request: Request, server: Server) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields, as JSON where they are, and pictures of a form; a mask goes where the pipeline takes one."""
    limits = server.settings.limits
    try:
        form = await request.form(max_files=limits.images + 1, max_fields=100, max_part_size=limits.body)
    except (HTTPException, MultiPartException, ValueError):
        raise bad("the body is no form that can be read: send multipart/form-data") from None
    given: dict[str, Any] = {}
    pictures: dict[str, list[Any]] = {}
    for key, value in form.multi_items():
        name = {"mask": "mask_image"}.get(key.removesuffix("[]"), key.removesuffix("[]"))
        if isinstance(value, str):
            if name in given:
                raise bad(f"{name} is given twice", name)
            kinds = server.engine.signature.kinds.get(name, ())
            given[name] = value if "str" in kinds else _json_or_text(value)
        else:
            pictures.setdefault(name, []).append(picture(await value.read(), limits, name))
    if "image" not in pictures:
        raise bad("a picture is needed as the file `image`", "image")
    return given, {n: p if len(p) > 1 else p[0] for n, p in pictures.items()}


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _event(name: str, data: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
