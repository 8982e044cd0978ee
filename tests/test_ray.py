"""An engine whose ranks are actors of a real Ray, with two raylets as two nodes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import engine_makers
import numpy as np
import pytest
import torch

import xdit_compile
from xdit_compile.errors import RankFailure, XditError

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install '.[ray]')")
SHAPES = Path(__file__).parents[1] / "examples" / "shapes" / "model"


@pytest.fixture(scope="module", autouse=True)
def two_nodes() -> Iterator[None]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        yield
        ray.shutdown()
        cluster.shutdown()


def test_ranks_are_actors_on_two_nodes() -> None:
    x, steps = torch.tensor([1.0, 2.0]), list[tuple[int, int]]()
    with xdit_compile.start(engine_makers.toy, "ulysses=2", executor="ray", device="cpu",
                            arguments={"factor": 0.5}) as engine:
        actors = engine._dispatcher._ranks._actors
        assert len({ray.get(actor.place.remote())[0] for actor in actors}) == 2
        answer = engine(x, steps=2, on_step=lambda done, total: steps.append((done, total)))
        assert torch.equal(answer["x"], 4 * 0.5 * x) and steps == [(1, 2), (2, 2)]
        with pytest.raises(TypeError):
            engine(x, steps="two")
        long = engine.submit(x, steps=10_000, pause=0.01)
        while long.steps < 2:
            time.sleep(0.01)
        os.kill(answer["pid"], signal.SIGKILL)
        with pytest.raises(RankFailure, match="rank 0 is gone"):
            long.result(60)
        again = engine(x, steps=1)
        assert torch.equal(again["x"], 2 * 0.5 * x) and again["pid"] != answer["pid"]
    with pytest.raises(XditError, match="no room for 3 ranks"):
        xdit_compile.start(engine_makers.toy, "ulysses=3", executor="ray", device="cpu", timeout=3,
                           arguments={"factor": 0.5})


def test_a_pipeline_on_two_nodes_answers_as_in_processes() -> None:
    call = {"class_labels": [1], "num_inference_steps": 2, "output_type": "np", "seed": 0}
    found = []
    for executor in ("ray", "processes"):
        with xdit_compile.start(SHAPES, "cfg=2", executor=executor, device="cpu", threads=1) as engine:
            found.append(engine(**call).images)
    assert np.array_equal(*found)
