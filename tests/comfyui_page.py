"""The page of ComfyUI with our workflow, used as a person does, in a real browser.

    python tests/comfyui_page.py        # writes examples/comfyui/workflow.json and docs/comfyui.png anew

The workflow in the form that the page opens is what the page itself makes of `workflow_api.json`, with the nodes where
`PLACES` says.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import browser
import comfyui_models
from comfyui_server import NODES, ComfyUI, Graph, folders, running

API, WORKFLOW = NODES / "workflow_api.json", NODES / "workflow.json"
SCREENSHOT = NODES.parents[1] / "docs" / "comfyui.png"
PLACES = {"1": (0, 0, 300, 130), "2": (340, 0, 300, 100), "3": (0, 170, 300, 150), "4": (340, 170, 300, 160),
          "5": (680, 130, 260, 80), "6": (680, 0, 260, 70), "7": (680, 260, 260, 80), "8": (680, 390, 260, 130),
          "9": (340, 390, 300, 100), "10": (340, 540, 300, 120), "11": (980, 0, 300, 160), "12": (980, 210, 300, 80),
          "13": (980, 340, 300, 60), "14": (1320, 0, 380, 460)}
"""Left, top, width and height of each node."""
FILES = {"flux1-dev.safetensors": "tiny.safetensors", "style.safetensors": "tiny.safetensors",
         "ae.safetensors": "taesd3"}
"""Tiny models of the tests in the places of those that the workflow names."""


@contextmanager
def page(server: ComfyUI) -> Iterator[Any]:
    """ComfyUI's page, without the windows that greet a newcomer."""
    server.settings({"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False})
    with browser.page(server.address, ours=False) as opened:
        opened.set_viewport_size({"width": 1800, "height": 880})
        opened.wait_for_function("!!(window.app?.vueAppReady && window.LiteGraph?.registered_node_types.XDiTSampler)")
        yield opened


def of_api(opened: Any, graph: Graph) -> Any:
    """What the page makes of a graph in the form of the API, its nodes in their places."""
    return json.loads(opened.evaluate("""([graph, places]) => {
        app.loadApiJson(graph, 'workflow');
        for (const [id, [left, top, width, height]] of Object.entries(places)) {
            const node = app.graph.getNodeById(id);
            node.pos = [left, top];
            node.size = [width, height];
            const after = node.widgets?.find(widget => widget.name === 'control_after_generate');
            if (after) after.value = 'fixed';
        }
        return JSON.stringify(app.graph.serialize());
    }""", [graph, PLACES]))


def load(opened: Any, workflow: Any) -> Graph:
    """Open a workflow as a file that is dropped on the page; what the page would queue of it."""
    opened.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    return opened.evaluate("async () => (await app.graphToPrompt()).output")


def run(opened: Any, server: ComfyUI) -> dict[str, Any]:
    """Press the button; what the nodes gave."""
    def queued(answer: Any) -> bool:
        return answer.url.endswith("/prompt") and answer.request.method == "POST"

    with opened.expect_response(queued) as asked:
        opened.get_by_role("button", name="Run", exact=True).click()
    return server.outcome(asked.value.json()["prompt_id"])


def with_tests_models(workflow: Any, width: int = 144, height: int = 112) -> Any:
    """The workflow with models of the tests, a smaller picture, few steps, and text without a text encoder: a node in
    the same place gives it."""
    def of(value: Any) -> Any:
        return FILES.get(value, value) if isinstance(value, str) else value

    made = json.loads(json.dumps(workflow))
    made["nodes"] = [node for node in made["nodes"] if node["type"] != "DualCLIPLoader"]
    for node in made["nodes"]:
        node["widgets_values"] = list(map(of, node.get("widgets_values", ())))
        if node["type"] == "CLIPTextEncode":
            node |= {"type": "TestText", "inputs": [], "widgets_values": [1, "fixed", 11, 24, 32]}
        elif node["type"] == "EmptySD3LatentImage":
            node["widgets_values"] = [width, height, 1]
        elif node["type"] == "BasicScheduler":
            node["widgets_values"] = ["simple", 4, 1.0]
    made["links"] = [link for link in made["links"] if link[5] != "CLIP"]
    return made


def main() -> None:
    place = comfyui_models.checkout()
    assert place is not None, "XDIT_COMPILE_COMFYUI names no checkout of ComfyUI"
    with tempfile.TemporaryDirectory() as name:
        base = Path(name) / "base"
        folders(base)
        with running(place, base) as server, page(server) as opened:
            made = of_api(opened, json.loads(API.read_text()))
            WORKFLOW.write_text(json.dumps(made, indent=1) + "\n")
            load(opened, with_tests_models(made, 384, 320))
            run(opened, server)
            opened.evaluate("""() => {
                Object.assign(app.canvas.ds, {scale: 0.95, offset: [90, 110]});
                app.canvas.draw(true, true);
            }""")
            opened.wait_for_timeout(1000)
            opened.screenshot(path=SCREENSHOT)


if __name__ == "__main__":
    main()
