"""A server: OpenAI's images API, jobs, the queue, what it refuses; every picture that of its own request."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import browser
import engine_makers
import httpx
import numpy as np
import psutil
import pytest
import serving
from serving import IMAGES, drawn, malformed, pixels, png, served

import xdit_compile
from xdit_compile.serve.app import Server
from xdit_compile.serve.settings import Limits, Settings

LIMITS = Limits(side=64, pixels=1024, steps=50_000, images=4, prompt=100, body=100_000, kept=8)


@pytest.fixture(scope="module")
def engine() -> Iterator[xdit_compile.Engine]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        with xdit_compile.start(engine_makers.painter, "ulysses=2", device="cpu") as made:
            yield made


@pytest.fixture(scope="module")
def pair(engine: xdit_compile.Engine) -> Iterator[tuple[httpx.Client, Server]]:
    with served(Settings("painter", queue=64, limits=LIMITS), serving.Kept(engine)) as made:
        yield made


@pytest.fixture
def client(pair: tuple[httpx.Client, Server]) -> httpx.Client:
    return pair[0]


def refused(answer: httpx.Response, status: int, text: str) -> None:
    assert answer.status_code == status, answer.text
    assert text in answer.json()["error"]["message"], answer.text


def counted(client: httpx.Client, name: str) -> float:
    found = [line.split()[-1] for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(map(float, found))


def test_images_as_openai_has_them(client: httpx.Client) -> None:
    asked = {"prompt": "a cat", "n": 2, "size": "16x8", "seed": 3, "user": "me", "quality": "high", "model": "painter",
             "num_inference_steps": 3, "response_format": "b64_json"}
    answer = client.post(IMAGES, json=asked).json()
    assert [one["seed"] for one in answer["data"]] == [3, 4] and answer["output_format"] == "png"
    for one in answer["data"]:
        assert np.array_equal(pixels(one["b64_json"]), drawn("a cat", one["seed"], 3, (8, 16)))
    found = client.post(IMAGES, json=asked | {"n": 1, "response_format": "url", "output_format": "webp"}).json()
    assert client.get(found["data"][0]["url"]).headers["content-type"] == "image/webp"
    unseeded = [client.post(IMAGES, json={"prompt": "a"}).json()["data"][0]["seed"] for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    assert client.get("/v1/models").json()["data"][0]["arguments"][:2] == ["prompt", "negative_prompt"]


def test_events_while_a_picture_is_made(client: httpx.Client) -> None:
    with client.stream("POST", IMAGES, json={"prompt": "a", "seed": 1, "stream": True, "pause": 0.02}) as answer:
        told = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert {(t["step"], t["steps"]) for t in told[:-1]} >= {(1, 4), (3, 4)}
    assert [t["progress"] for t in told[:-1]] == sorted(t["progress"] for t in told[:-1])
    assert told[-1]["type"] == "image_generation.completed"
    assert np.array_equal(pixels(told[-1]["b64_json"]), drawn("a", 1))
    with client.stream("POST", IMAGES, json={"prompt": "kind", "guidance_scale": -1, "stream": True}) as answer:
        told = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert "guidance_scale must not be negative" in told[-1]["error"]["message"]


def test_edits_take_pictures(client: httpx.Client) -> None:
    answer = client.post("/v1/images/edits", data={"prompt": "a", "seed": "2", "num_inference_steps": "1"},
                         files={"image": ("x.png", png(3), "image/png")})
    assert answer.status_code == 200, answer.text
    as_text = "data:image/png;base64," + base64.b64encode(png(3)).decode()
    other = client.post(IMAGES, json={"prompt": "a", "seed": 2, "num_inference_steps": 1, "image": as_text})
    found = [pixels(one.json()["data"][0]["b64_json"]) for one in (answer, other)]
    assert np.array_equal(*found) and not np.array_equal(found[0], drawn("a", 2, 1))
    refused(client.post("/v1/images/edits", data={"prompt": "a"}), 400, "a picture is needed")
    refused(client.post("/v1/images/edits", data={"prompt": "a"}, files={"image": b"no picture"}), 400, "no picture")
    refused(client.post("/v1/images/edits", data={"prompt": "a"}, files={"image": png(1), "mask": png(1)}), 400,
            "takes no mask_image")
    refused(client.post("/v1/images/edits", data={"prompt": "a"}, files={"image": png(1, (65, 1))}), 400, "65x1 pixels")


def test_xdit_s_requests_are_taken(client: httpx.Client) -> None:
    answer = client.post("/generate", json={"prompt": "a cat", "num_inference_steps": 2, "cfg": 7.5}).json()
    assert np.array_equal(pixels(answer["output"]), drawn("a cat", 42, 2))
    assert answer["message"] == "Image generated successfully" and answer["elapsed_time"].endswith(" sec")
    refused(client.post("/generate", json={"prompt": "a", "save_disk_path": "/tmp"}), 400, "files are not written")


def test_jobs_are_watched_fetched_and_cancelled(client: httpx.Client) -> None:
    slow = client.post("/v1/jobs", json={"prompt": "a", "num_inference_steps": 50_000, "pause": 0.005}).json()
    job = client.post("/v1/jobs", json={"prompt": "bb", "seed": 9}).json()
    assert job["status"] == "queued" and job["before"] == 1
    refused(client.get(f"/v1/jobs/{job['id']}/content"), 409, "its result is not there yet")
    stopped = client.delete(f"/v1/jobs/{slow['id']}").json()
    assert stopped["status"] == "cancelled" and stopped["error"]["code"] == "cancelled"
    refused(client.get(f"/v1/jobs/{slow['id']}/content"), 409, "cancelled")
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        told = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert told[-1]["status"] == "completed" and told[-1]["progress"] == 100
    content = client.get(told[-1]["results"][0]["url"])
    assert content.headers["content-type"] == "image/png" and np.array_equal(pixels(content.content), drawn("bb", 9))
    refused(client.get(f"/v1/jobs/{job['id']}/content?index=1"), 404, "there is no number 1")
    refused(client.get("/v1/videos/nothing"), 404, "there is no job")


def test_a_client_that_goes_away_has_its_request_cancelled(client: httpx.Client) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post(IMAGES, json={"prompt": "a", "num_inference_steps": 50_000, "pause": 0.005}, timeout=0.3)
    assert client.post(IMAGES, json={"prompt": "a"}, timeout=20).status_code == 200


WRONG: list[tuple[Any, int, str]] = [
    ({}, 400, "needs prompt"), ({"prompt": 3}, 400, "prompt of Painter must be text"),
    ({"prompt": "a", "colour": 1}, 400, "takes no colour; it takes prompt, negative_prompt"),
    ({"prompt": "a" * 101}, 400, "101 characters"), ({"prompt": "a", "n": 5}, 400, "n must be"),
    ({"prompt": ["a"] * 5}, 400, "5 entries"), ({"prompt": ["a"] * 3, "n": 2}, 400, "6 results"),
    ({"prompt": []}, 400, "empty"), ({"prompt": "a", "size": "big"}, 400, "WIDTHxHEIGHT"),
    ({"prompt": "a", "size": "65x1"}, 400, "width must be from 1 to 64"),
    ({"prompt": "a", "size": "64x64"}, 400, "more than 1024 pixels"), ({"prompt": "a", "height": 0}, 400, "height"),
    ({"prompt": "a", "num_inference_steps": 10**6}, 400, "num_inference_steps must"),
    ({"prompt": "a", "num_inference_steps": "x"}, 400, "must be a whole number"),
    ({"prompt": "a", "seed": -1}, 400, "seed must"), ({"prompt": "a", "seed": 1.5}, 400, "seed must"),
    ({"prompt": "a", "generator": 1}, 400, "give a seed"), ({"prompt": "a", "output_type": "np"}, 400, "set by the"),
    ({"prompt": "a", "image": "/etc/passwd"}, 400, "takes no text; give a picture as data:"),
    ({"prompt": "a", "image": "data:image/png;base64,AAAA"}, 400, "no picture"),
    ({"prompt": "a", "image": "data:image/png;base64,*"}, 400, "base64"),
    ({"prompt": "a", "guidance_scale": 1e300}, 400, "no number"), ({"prompt": "a", "model": "x"}, 404, "no model"),
    ({"prompt": "a", "stream": 1}, 400, "stream must"), ({"prompt": "a", "output_format": "bmp"}, 400, "output_format"),
    ({"prompt": "a", "response_format": "x"}, 400, "response_format"), ({"prompt": "a", "pause": [1]}, 400, "pause of"),
    ({"prompt": "a", "output_compression": 101}, 400, "output_compression"), ([], 400, "an object"),
    ({"prompt": "a", "guidance_scale": -1}, 422, "guidance_scale must not be negative"),
]


def test_what_is_wrong_with_a_request_is_said(client: httpx.Client) -> None:
    for body, status, text in WRONG:
        refused(client.post(IMAGES, json=body), status, text)
    refused(client.post(IMAGES, content=b"{", headers={"Content-Type": "application/json"}), 400, "no JSON")
    refused(client.post(IMAGES, content=b"{}", headers={"Content-Type": "text/plain"}), 415, "must be JSON")
    refused(client.post(IMAGES, json={"prompt": "a" * 200_000}), 413, "longer than 100000 bytes")
    refused(client.post(IMAGES, content=(b"a" * 1000 for _ in range(1000)),
                        headers={"Content-Type": "application/json"}), 413, "longer than 100000 bytes")
    refused(client.get("/nothing"), 404, "Not Found")
    refused(client.post(IMAGES, json={"prompt": "a"}, headers={"Origin": "http://elsewhere"}), 403, "elsewhere")
    refused(client.get("/v1/models", headers={"Host": "elsewhere:80"}), 403, "is not called 'elsewhere'")
    assert client.get("/health").status_code == 200


def test_malformed_requests_are_refused_and_the_server_lives(client: httpx.Client) -> None:
    rng = random.Random(0)
    for _ in range(300):
        path, request = malformed(rng)
        answer = client.post(path, **request)
        assert 400 <= answer.status_code < 500, (path, request, answer.status_code, answer.text)
        assert answer.json()["error"]["message"]
    assert pixels(client.post(IMAGES, json={"prompt": "a", "seed": 1}).json()["data"][0]["b64_json"]).shape == (8, 8, 3)


def test_requests_of_many_clients_are_neither_lost_nor_mixed_up(client: httpx.Client) -> None:
    def asked(i: int) -> bool:
        prompt, seed, steps = "a" * (i % 7 + 1), i, i % 3 + 1
        answer = client.post(IMAGES, json={"prompt": prompt, "seed": seed, "num_inference_steps": steps})
        return np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), drawn(prompt, seed, steps))

    with ThreadPoolExecutor(16) as clients:
        assert all(clients.map(asked, range(100)))
    assert counted(client, "xdit_queue_waiting") == 0


def test_memory_stays_what_it_is(client: httpx.Client) -> None:
    def held_after(requests: int) -> int:
        for i in range(requests):
            client.post(IMAGES, json={"prompt": "a", "size": "32x32", "num_inference_steps": 1, "seed": i})
        return sum(p.memory_full_info().uss for p in (psutil.Process(), *psutil.Process().children()))

    first = held_after(50)
    assert held_after(450) < 1.05 * first


def test_a_rank_that_dies_ends_its_request_alone(client: httpx.Client) -> None:
    refused(client.post(IMAGES, json={"prompt": "kill"}), 500, "rank 1 was killed by signal SIGKILL")
    found = client.post(IMAGES, json={"prompt": "later", "seed": 5}).json()["data"][0]["b64_json"]
    assert np.array_equal(pixels(found), drawn("later", 5)) and counted(client, "xdit_rank_failures_total") == 1


def test_what_does_not_fit_into_the_queue_is_told_to_come_again(engine: xdit_compile.Engine) -> None:
    settings = Settings("painter", queue=2, api_key="secret", limits=Limits(seconds=0.5, steps=50_000), grace=0)
    with served(settings, serving.Kept(engine)) as (client, _):
        refused(client.post(IMAGES, json={"prompt": "a"}), 401, "key is missing")
        refused(client.post(IMAGES, json={"prompt": "a"}, headers={"X-API-Key": "other"}), 401, "key is missing")
        assert client.get("/metrics").status_code == 401 and client.get("/").status_code == 200
        client.headers["Authorization"] = "Bearer secret"
        slow = {"prompt": "a", "num_inference_steps": 50_000, "pause": 0.005}
        jobs = [client.post("/v1/jobs", json=slow) for _ in range(3)]
        time.sleep(0.1)
        jobs += [client.post("/v1/jobs", json=slow) for _ in range(2)]
        full = [job for job in jobs if job.status_code == 429]
        assert full and full[0].headers["retry-after"] and "at most 2 may" in full[0].json()["error"]["message"]
        for job in jobs:
            if job.status_code == 202:
                with client.stream("GET", f"/v1/jobs/{job.json()['id']}/events") as answer:
                    last = json.loads([line for line in answer.iter_lines() if line.startswith("data: ")][-1][6:])
                assert last["error"]["code"] == "timeout"


def test_calls_are_shared_only_where_each_gets_its_own_bits(engine: xdit_compile.Engine) -> None:
    def all_right(client: httpx.Client, prompts: list[str]) -> bool:
        def asked(i: int) -> bool:
            answer = client.post(IMAGES, json={"prompt": prompts[i], "seed": i, "pause": 0.02}).json()
            return np.array_equal(pixels(answer["data"][0]["b64_json"]), drawn(prompts[i], i))

        with ThreadPoolExecutor(len(prompts)) as clients:
            return all(clients.map(asked, range(len(prompts))))

    texts = ["a", "a b", "a b c", "d", "d e", "f g h i"] * 2
    with served(Settings("painter", batch=2), serving.Kept(engine)) as (client, _):
        assert all_right(client, ["a", "b", "c", "d", "e"])  # of equal length, nothing is learnt
        assert counted(client, "xdit_shared_calls_total") == 0
        assert all_right(client, texts)
        assert counted(client, "xdit_shared_calls_total") >= 4
    engine.invoke("spoil")
    with served(Settings("painter", batch=2), serving.Kept(engine)) as (client, _):
        assert all_right(client, texts)
        assert counted(client, "xdit_shared_calls_total") == 0


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
def test_the_page_in_a_browser(client: httpx.Client, tmp_path: Path) -> None:
    with browser.page(str(client.base_url)) as page:
        page.wait_for_selector("#prompt-label:not([hidden])")
        for name, value in {"prompt": "a cat", "seed": "3", "steps": "3", "width": "16", "height": "8"}.items():
            page.fill(f"#{name}", value)
        page.fill("#more", '{"pause": 0.1}')
        page.click("#go")
        page.wait_for_function("document.querySelector('#bar').value > 0")
        page.wait_for_selector("#view img")
        assert "a cat, seed 3" in page.inner_text("#status")
        page.click("#view img", button="right")  # it can be saved as any picture
        shown = page.evaluate("fetch(document.querySelector('#view img').src).then(r => r.arrayBuffer())"
                              ".then(b => [...new Uint8Array(b)])")
        assert np.array_equal(pixels(bytes(shown)), drawn("a cat", 3, 3, (8, 16)))
        page.fill("#seed", "4")
        browser.made(page, 2)
        page.click("#history button:last-child")
        assert "seed 3" in page.inner_text("#status")
        page.fill("#steps", "50000")
        page.evaluate("document.querySelector('#steps').max = 50000")
        page.click("#go")
        page.wait_for_function("document.querySelector('#status').innerText.startsWith('step')")
        page.click("#stop")
        page.wait_for_selector("#status.bad")
        assert page.inner_text("#status") == "cancelled"
        page.fill("#more", '{"colour": 1}')
        page.click("#go")
        page.wait_for_function("document.querySelector('#status').innerText.includes('takes no colour')")


def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    port = serving.free_port()
    command = [sys.executable, "-m", "xdit_compile.cli", "serve", "--model", serving.PAINTER, "--spec", "ulysses=2",
               "--device", "cpu", "--port", str(port), "--grace", "20", "--max-steps", "20"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file)
    answers: list[httpx.Response] = []
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        serving.ready(client)
        refused(client.post(IMAGES, json={"prompt": "a", "num_inference_steps": 21}), 400, "from 1 to 20")
        late = threading.Thread(target=lambda: answers.append(
            client.post(IMAGES, json={"prompt": "a", "seed": 1, "pause": 0.4})))
        late.start()
        time.sleep(0.8)
        os.kill(process.pid, signal.SIGTERM)
        late.join(60)
    assert process.wait(60) == 0, log.read_text()
    assert np.array_equal(pixels(answers[0].json()["data"][0]["b64_json"]), drawn("a", 1)), log.read_text()
