"""The command ``serve``: its flags, and the server and engine that they ask for."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

from xdit_compile.cli.run import DTYPES
from xdit_compile.cli.run_flags import adapter
from xdit_compile.engine.handle import start
from xdit_compile.errors import XditError
from xdit_compile.planner.auto import Auto
from xdit_compile.serve.server import serve
from xdit_compile.serve.settings import Limits, Settings
from xdit_compile.spec import ShardingSpec

HELP = """\
Serve a pipeline over HTTP: OpenAI's images API, jobs with events for what takes long, xDiT's /generate, a page to try
it at /, and /health, /ready, /metrics. Starts one process for each rank; needs `pip install 'xdit-compile[serve]'`.

examples:
  xdit-compile serve --model DIR_OR_ID --spec cfg=2,ulysses=2 --port 8000
  xdit-compile serve --model DIR --artifact model-u4.xdit --api-key "$KEY" --host 0.0.0.0
  xdit-compile serve --model mine.py:pipeline --spec data=4 --queue 128 --max-steps 50
  curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' -d '{"prompt": "a red circle"}'

exit status: 0 when told to stop, 2 if the engine or the server cannot start.
"""
KEY = "XDIT_COMPILE_API_KEY"
_LIMITS = {"side": "pixels of a side", "pixels": "pixels of a picture or frame", "steps": "steps of denoising",
           "frames": "frames of a video", "images": "results of one request", "prompt": "characters of a text",
           "body": "bytes of a request", "seconds": "seconds for a request, waiting included",
           "kept": "finished jobs whose results are kept"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of the command."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_ID",
        help="a folder of a pipeline, its name on the hub, or a function that makes one (file.py:function)")
    add("--spec", default="", help="how to shard, as in cfg=2,ulysses=2 (default: one process)")
    add("--world-size", type=int, metavar="N", help="ranks (default: what the spec asks for)")
    add("--executor", choices=("processes", "ray"), default="processes", help="what ranks are (default processes)")
    add("--artifact", action="append", default=[], metavar="[COMPONENT=]FOLDER",
        help="an artifact in place of the pipeline's model of its class, or of the component named")
    add("--native", action="store_true", help="run what the artifact holds compiled ahead, where you trust it")
    add("--weights", metavar="FOLDER", help="safetensors of the artifact (default: the pipeline's)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (default: bfloat16 on a GPU, else float32)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if it fits")
    add("--pipeline", metavar="CLASS", help="a pipeline of diffusers in place of the one that the folder names")
    add("--scheduler", metavar="CLASS", help="a scheduler of diffusers in place of the pipeline's own")
    add("--lora", metavar="PATH[:SCALE]", nargs="+", action="extend", default=[], help="adapters to load")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    add("--port", type=int, default=8000, help="default 8000")
    add("--api-key", default=os.environ.get(KEY, ""), metavar="KEY",
        help=f"what clients must send (default: {KEY} of the environment, else none)")
    add("--name", help="of the model, for clients (default: the last part of --model)")
    add("--queue", type=int, default=Settings.queue, metavar="N", help="calls that may wait (default %(default)s)")
    add("--batch", type=int, metavar="N",
        help="calls that may be made as one, where a trial gave the same bits as each by itself (default: the spec's "
             "data; 1: none)")
    add("--grace", type=float, default=Settings.grace, metavar="SECONDS",
        help="for what is under way when told to stop (default %(default)s)")
    add("--fps", type=int, default=Settings.frame_rate, metavar="N", help="of videos whose pipeline takes none")
    for name, text in _LIMITS.items():
        default = getattr(Limits, name)
        add(f"--max-{name}", type=type(default), default=default, metavar="N", help=f"{text} (default %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Serve until told to stop; the exit status.

    Raises:
        XditError: what was asked for is not there.
    """
    name = options.name or Path(options.model.rpartition(":")[0] or options.model).stem
    spec = options.spec
    batch = options.batch
    if batch is None:
        batch = 1 if Auto.parse(spec) else ShardingSpec.parse(spec).data_degree
    limits = Limits(**{f.name: vars(options)[f"max_{f.name}"] for f in fields(Limits)})
    if options.host not in ("127.0.0.1", "localhost", "::1") and not options.api_key:
        print(f"xdit-compile: {options.host} can be reached from other machines, and no --api-key is asked for",
              file=sys.stderr)
    settings = Settings(name, options.host, options.port, options.api_key, options.queue, max(1, batch), options.grace,
                        options.fps, limits)
    chosen = {"pipeline": options.pipeline, "scheduler": options.scheduler,
              "adapters": tuple(map(adapter, options.lora))}
    artifacts = dict(_named(text) for text in options.artifact)
    starting = partial(
        start, options.model, spec, world_size=options.world_size, executor=options.executor, device=options.device,
        dtype=options.dtype, artifact=artifacts or None, weights=options.weights, native=options.native,
        options={n: v for n, v in chosen.items() if v})
    _speak()
    print(f"http://{options.host}:{options.port}  ({name}; the engine is starting)", file=sys.stderr)
    return 0 if serve(settings, starting) else 2


def _named(text: str) -> tuple[str, str]:
    """A folder, and the component that it is for if one is named."""
    name, equals, folder = text.partition("=")
    if equals and not folder:
        raise XditError(f"cannot read --artifact {text}; write FOLDER or COMPONENT=FOLDER")
    return (name, folder) if equals and name.isidentifier() else ("", text)


def _speak() -> None:
    """The server's own log, on the error stream."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    for room in ("serve", "engine"):
        logger = logging.getLogger(f"xdit_compile.{room}")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
