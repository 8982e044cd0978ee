"""What a handle and a server cost, and whether they lose or mix up anything.

A tiny pipeline of diffusers on two ranks behind the real command: 200 requests of 16 clients, each compared with its
own single run; a rank killed under load; 1,000 malformed requests; memory over 500 requests. Then what the handle and
HTTP add to an image, against the time that rank 0 spent in the very same call, so that a busy machine does not matter;
and how soon an engine answers that starts from a pipeline, and from an artifact, in turns.

    python benchmarks/serving.py --output docs/serving.md
    python benchmarks/serving.py --parts load overhead
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import IMAGES, Kept, free_port, malformed, pixels, ready, served

import xdit_compile
from xdit_compile.serve.settings import Limits, Settings

REPOSITORY = Path(__file__).parents[1]
SHAPES = REPOSITORY / "examples" / "shapes" / "model"
PARTS = ("load", "death", "malformed", "memory", "overhead", "start")


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    """The command ``serve`` on the tiny pipeline, and a client."""
    port = free_port()
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen([sys.executable, "-m", "xdit_compile.cli", "serve", "--model", str(SHAPES), "--spec",
                                    "cfg=2", "--device", "cpu", "--port", str(port), "--queue", "256", *arguments],
                                   stdout=log, stderr=log, cwd=REPOSITORY)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
                ready(client, 600, lambda: process.poll() is None or sys.exit(Path(log.name).read_text()))
                yield client, psutil.Process(process.pid)
            process.terminate()
            assert process.wait(60) == 0, Path(log.name).read_text()
        finally:
            process.kill()


def body(i: int, steps: int = 4) -> dict[str, Any]:
    return {"class_labels": [i % 10], "seed": i % 20, "num_inference_steps": steps}


def picture(client: httpx.Client, asked: dict[str, Any]) -> np.ndarray:
    answer = client.post(IMAGES, json=asked)
    answer.raise_for_status()
    return pixels(answer.json()["data"][0]["b64_json"])


def load(requests: int, clients: int) -> dict[str, Any]:
    """Many clients at once. Single runs are made before, by the same server and by diffusers alone in this process."""
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained(SHAPES)
    pipe.set_progress_bar_config(disable=True)
    with serving() as (client, _):
        alone = [picture(client, body(i)) for i in tqdm(range(20), desc="single runs")]
        off = 0
        for i in range(0, 20, 5):
            asked = body(i)
            generator = torch.Generator().manual_seed(asked.pop("seed"))
            plain = np.asarray(pipe(**asked, generator=generator).images[0]).astype(int)
            off = max(off, int(np.abs(plain - alone[i]).max()))
        seconds: list[float] = []
        bar = tqdm(total=requests, desc=f"{clients} clients")

        def asked_for(i: int) -> bool:
            started = time.perf_counter()
            found = picture(client, body(i))
            seconds.append(time.perf_counter() - started)
            bar.update()
            return np.array_equal(found, alone[i % 20])

        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            right = sum(pool.map(asked_for, range(requests)))
        total = time.perf_counter() - started
        bar.close()
    cuts = statistics.quantiles(seconds, n=20)
    return {"requests": requests, "clients": clients, "answered": len(seconds), "equal": right,
            "largest difference from diffusers alone, of 255": off, "p50": cuts[9], "p95": cuts[18],
            "images per second": requests / total}


def death() -> dict[str, Any]:
    """A rank is killed while requests wait and one runs."""
    with serving() as (client, server):
        expected = picture(client, body(1))
        workers = [p for p in server.children() if "worker_process" in " ".join(p.cmdline())]
        answers: list[httpx.Response] = []
        slow = threading.Thread(target=lambda: answers.append(client.post(IMAGES, json=body(0, 190))))
        slow.start()
        time.sleep(1)
        workers[1].send_signal(signal.SIGKILL)
        with ThreadPoolExecutor(4) as pool:
            later = list(pool.map(lambda _: picture(client, body(1)), range(8)))
        slow.join()
    return {"status": answers[0].status_code, "said": answers[0].json()["error"]["message"].replace(
        str(REPOSITORY) + os.sep, ""), "later": len(later),
        "equal": sum(np.array_equal(one, expected) for one in later)}


def wrong(count: int) -> dict[str, Any]:
    """Requests that are malformed; what the answers' statuses are."""
    rng, statuses = random.Random(0), dict[int, int]()
    with serving() as (client, _):
        expected = picture(client, body(1))
        for _ in tqdm(range(count), desc="malformed"):
            path, request = malformed(rng)
            status = client.post(path, **request).status_code
            statuses[status] = statuses.get(status, 0) + 1
        lives = np.array_equal(picture(client, body(1)), expected)
    return {"requests": count, "statuses": dict(sorted(statuses.items())), "lives": lives}


def memory(few: int, many: int) -> dict[str, Any]:
    """Bytes that the server and its ranks have to themselves, after few requests and after many."""
    with serving() as (client, server):
        def held() -> int:
            return sum(p.memory_full_info().uss for p in (server, *server.children(recursive=True)))

        found = []
        for i in tqdm(range(many), desc="memory"):
            picture(client, body(i, 2))
            if i + 1 in (few, many):
                found.append(held())
    return {"after": [few, many], "bytes": found, "growth": found[1] / found[0] - 1}


def overhead(rounds: int, seconds: float) -> dict[str, Any]:
    """Of each call: the time until the caller has its picture, over the time of the same call on rank 0 without telling
    of steps."""
    with xdit_compile.start(SHAPES, "cfg=2", device="cpu") as engine:
        engine(class_labels=[1], num_inference_steps=2, seed=0)
        started = time.perf_counter()
        engine(class_labels=[1], num_inference_steps=20, seed=0)
        steps = max(10, min(900, round(20 * seconds / (time.perf_counter() - started))))
        handle: list[tuple[float, float]] = []
        cpu: dict[str, list[float]] = {"handle": [], "HTTP": []}
        for i in tqdm(range(rounds), desc="handle"):
            started, used = time.perf_counter(), time.process_time()
            call = engine.submit(class_labels=[1], num_inference_steps=steps, seed=i, on_step=lambda done, total: None)
            call.result()
            cpu["handle"].append(time.process_time() - used + call.timing["telling"])
            handle.append(_over(time.perf_counter() - started, call.timing["call"], call.timing["telling"]))
        http = []
        with served(Settings("shapes", limits=Limits(steps=900)), Kept(engine)) as (client, _):
            picture(client, body(0, 2))
            for i in tqdm(range(rounds), desc="HTTP"):
                started, used = time.perf_counter(), time.process_time()
                answer = client.post(IMAGES, json=body(i, steps))
                content = pixels(answer.json()["data"][0]["b64_json"])
                total = time.perf_counter() - started
                assert content.shape == (64, 64, 3)
                used = time.process_time() - used
                timing = dict(part.strip().split(";dur=") for part in answer.headers["server-timing"].split(","))
                cpu["HTTP"].append(used + float(timing["telling"]) / 1000)
                http.append(_over(total, float(timing["call"]) / 1000, float(timing["telling"]) / 1000))
    return {"rounds": rounds, "steps": steps, "seconds": statistics.median(s for _, s in handle + http),
            "handle": statistics.median(o for o, _ in handle), "HTTP": statistics.median(o for o, _ in http),
            "work": {name: statistics.median(seconds) for name, seconds in cpu.items()}}


def _over(total: float, call: float, telling: float) -> tuple[float, float]:
    work = call - telling
    return (total - work) / work, work


def start(rounds: int) -> dict[str, Any]:
    """Seconds from `start` to the first answer, in turns, of a pipeline as deep as DiT-XL/2 is: as it is and compiled,
    with what inductor has kept from earlier starts and without; and with its model from an artifact, or that alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        deep, eager, native = folder / "deep", folder / "eager.xdit", folder / "native.xdit"
        _deep_pipeline(deep, 28)
        for path, how in ((eager, []), (native, ["--native"])):
            subprocess.run([sys.executable, "-m", "xdit_compile.cli", "export", "--model", str(deep), "--spec", "cfg=2",
                            "--arg", "class_labels=[1]", "-o", str(path), "--weights", "included", *how], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=REPOSITORY)
        inputs = {"hidden_states": torch.zeros(2, 4, 16, 16), "timestep": torch.zeros(2, dtype=torch.int64),
                  "class_labels": torch.tensor([1, 10])}
        call = {"class_labels": [1], "num_inference_steps": 2, "seed": 0}
        compiled = "cfg=2,backend=inductor"
        ways: dict[str, Callable[[], Any]] = {
            "pipeline": lambda: _answered(call, deep, "cfg=2"),
            "pipeline, its model from an artifact": lambda: _answered(call, deep, artifact=eager),
            "artifact alone": lambda: _answered(inputs, eager),
            "compiled pipeline (`backend=inductor`), the first time": lambda: _answered(call, deep, compiled),
            "compiled pipeline, a later time": lambda: _answered(call, deep, compiled),
            "compiled pipeline, its model from a native artifact": lambda: _answered(
                call, deep, artifact=native, native=True),
            "native artifact alone": lambda: _answered(inputs, native, native=True)}
        found: dict[str, list[float]] = {name: [] for name in ways}
        work: dict[str, list[float]] = {name: [] for name in ways}
        for i in tqdm(range(rounds), desc="starts"):
            # Ranks take it from here; the first compiled pipeline finds it empty.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"inductor{i}")
            for name, way in ways.items():
                started, used = time.perf_counter(), _work_of_ranks()
                way()
                found[name].append(time.perf_counter() - started)
                work[name].append(_work_of_ranks() - used)
                tqdm.write(f"{name}: {found[name][-1]:.1f} s, {work[name][-1]:.1f} s of the processor")
    return {"rounds": rounds, "seconds": {name: statistics.median(s) for name, s in found.items()},
            "work": {name: statistics.median(s) for name, s in work.items()}}


def _work_of_ranks() -> float:
    """Seconds of the processor that processes which have ended have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _deep_pipeline(folder: Path, layers: int) -> None:
    """The pipeline of shapes with random blocks, more of them."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    pipe = DiTPipeline.from_pretrained(SHAPES)
    torch.manual_seed(0)
    pipe.transformer = DiTTransformer2DModel.from_config({**pipe.transformer.config, "num_layers": layers})
    pipe.save_pretrained(folder)


def _answered(call: dict[str, Any], *source: Any, **options: Any) -> None:
    with xdit_compile.start(*source, device="cpu", **options) as engine:
        engine(**call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="of overhead and starts")
    parser.add_argument("--output", type=Path, metavar="MD", help="write the page of what was measured")
    options = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "load": lambda: load(options.requests, options.clients), "death": death, "malformed": lambda: wrong(1000),
        "memory": lambda: memory(50, 500), "overhead": lambda: overhead(options.rounds, 2.0),
        "start": lambda: start(options.rounds)}
    found = {}
    for name in options.parts:
        found[name] = parts[name]()
        print(name, json.dumps(found[name]), flush=True)
    if options.output:
        from serving_page import page

        options.output.write_text(page(found))


if __name__ == "__main__":
    main()
