"""The page of a server, used as a person does, in a real browser.

    python tests/browser.py docs/serving/page.png      # the screenshot in the documentation
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
from serving import free_port, ready

SHAPES = Path(__file__).parents[1] / "examples" / "shapes" / "model"


def missing() -> str:
    """What it takes and is not here; empty if all is."""
    if find_spec("playwright") is None:
        return "playwright is not installed (pip install '.[browser]')"
    return "" if shutil.which("chromium") else "there is no chromium (apt-get install chromium)"


@contextmanager
def page(url: str, ours: bool = True) -> Iterator[Any]:
    """A browser at this address; what scripts of a page of ours raise is an error."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1000, "height": 640})
        raised: list[Any] = []
        opened.on("pageerror", lambda error: raised.append(error))
        opened.goto(url)
        yield opened
        browser.close()
        assert not (ours and raised), raised


def made(opened: Any, count: int) -> None:
    """Press the button, and wait until there are so many pictures in the history."""
    opened.click("#go")
    opened.wait_for_function(f"document.querySelectorAll('#history img').length === {count}", timeout=120_000)


def main(path: Path) -> None:
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "xdit_compile.cli", "serve", "--model", str(SHAPES), "--name",
                               "shapes", "--spec", "cfg=2", "--device", "cpu", "--port", str(port)])
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            ready(client, 600)
        with page(f"http://127.0.0.1:{port}/") as opened:
            opened.wait_for_function("document.querySelector('#steps').value !== ''")
            opened.fill("#steps", "30")
            for i, label in enumerate((0, 3, 7, 9)):
                opened.fill("#more", f'{{"class_labels": [{label}], "guidance_scale": 4}}')
                opened.fill("#seed", str(i))
                made(opened, i + 1)
            path.parent.mkdir(exist_ok=True)
            opened.screenshot(path=path)
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
