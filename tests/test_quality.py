"""The page about PipeFusion's images: its measures, and that the script writes all of it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import pipefusion_quality as quality


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_an_image_is_most_like_itself() -> None:
    images = np.random.default_rng(0).random((2, 32, 32, 3), dtype=np.float32)
    assert quality.likeness(images, images) == quality.Likeness(quality.CAP, quality.CAP, 1.0)
    darker = quality.likeness(images * 0.9, images)
    assert 20 < darker.lowest <= darker.psnr < 30
    assert 0.9 < darker.ssim < 1


@pytest.mark.whole
def test_the_page_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    assert quality.main(["--quick", "--output", str(path)]) == 0
    text = path.read_text()
    rows = {line[0]: line[1:] for line in map(cells, text.splitlines()) if len(line) == 6}
    assert [*rows][2:] == [
        "drawn by data.py", "the same, encoded and decoded", "one device", "one device, 6 steps",
        "`warmup=all`", "`warmup=0, patches=2`", "`warmup=1, patches=2`",
    ]  # fmt: skip
    psnr, lowest, ssim, accuracy, same = rows["`warmup=all`"]
    assert float(lowest) >= quality.ENOUGH and float(psnr) >= float(lowest) and ssim == "1.0000"
    assert accuracy == rows["one device"][3] and same == "100.0%"
    assert float(rows["`warmup=1, patches=2`"][0]) < quality.ENOUGH
    for name in ("images", "differences"):
        assert f"](page/{name}.png)" in text
        with Image.open(tmp_path / "page" / f"{name}.png") as picture:
            picture.load()
