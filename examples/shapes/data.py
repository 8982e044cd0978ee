"""Draws the training pictures: one coloured shape with a soft shadow on a pale background, 64x64 pixels.

Every picture is a pure function of (seed, index), so the data set needs no files and no download.
"""

from __future__ import annotations

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

IMAGE_SIZE = 64
SUPERSAMPLE = 8  # masks are drawn this many times larger and averaged down, which smooths the edges

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
HUES = {"red": 0.99, "yellow": 0.135, "green": 0.38, "blue": 0.61}  # in turns around the colour circle
LABELS = [f"{colour} {shape}" for shape in SHAPES for colour in HUES]


def _outline(shape: str) -> np.ndarray:
    """Corner points of a shape around the origin, about 1 in radius: (points, 2), y downwards."""
    if shape == "square":
        return np.array([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])
    if shape == "triangle":
        angles = np.arange(3) * 2 * math.pi / 3 - math.pi / 2
        return 1.15 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if shape == "star":
        angles = np.arange(10) * math.pi / 5 - math.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 1.2, 0.55)
        return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 80, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return np.stack([x, y - 2.5], axis=1) / 15
    t = np.linspace(0, 2 * math.pi, 80, endpoint=False)  # circle, and the outside of the ring
    return np.stack([np.cos(t), np.sin(t)], axis=1)


def _mask(shape: str, centre: np.ndarray, radius: float, angle: float) -> Image.Image:
    """How much of each pixel the shape covers, as an 8-bit grey picture of IMAGE_SIZE x IMAGE_SIZE."""
    big = Image.new("L", (IMAGE_SIZE * SUPERSAMPLE,) * 2, 0)
    draw = ImageDraw.Draw(big)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])

    def polygon(points: np.ndarray, fill: int) -> None:
        placed = (centre + radius * points @ turn) * SUPERSAMPLE
        draw.polygon([tuple(point) for point in placed.tolist()], fill=fill)

    polygon(_outline(shape), fill=255)
    if shape == "ring":
        polygon(0.52 * _outline(shape), fill=0)
    return big.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _ramp(rng: np.random.Generator, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A smooth blend of two colours (3,) along a random direction: (IMAGE_SIZE, IMAGE_SIZE, 3)."""
    angle = rng.uniform(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, IMAGE_SIZE)
    along = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]
    weight = (0.5 + along / (abs(math.cos(angle)) + abs(math.sin(angle))))[..., None]
    return (1 - weight) * first + weight * second


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """One colour as RGB in 0..1: (3,)."""
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value))


def draw_image(label: int, rng: np.random.Generator) -> np.ndarray:
    """One picture of the class `label`: (IMAGE_SIZE, IMAGE_SIZE, 3) uint8."""
    colour, shape = LABELS[label].split(" ")
    radius = rng.uniform(14.0, 21.0)
    margin = 1.2 * radius + 2  # the widest outline reaches 1.2 radii: no shape is cut off by the border
    centre = rng.uniform(margin, IMAGE_SIZE - margin, size=2)
    mask = _mask(shape, centre, radius, angle=math.radians(rng.uniform(-25, 25)))
    shadow = mask.transform(mask.size, Image.Transform.AFFINE, (1, 0, -2, 0, 1, -3))  # 2 right, 3 down
    shadow = shadow.filter(ImageFilter.GaussianBlur(2.5))

    # The background's tint is free of the class, and pale enough that no shape drowns in it.
    hue = rng.uniform()
    background = _ramp(
        rng,
        _hsv(hue, rng.uniform(0.04, 0.20), rng.uniform(0.90, 1.0)),
        _hsv(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.10, 0.30), rng.uniform(0.78, 0.93)),
    )
    hue = HUES[colour] + rng.uniform(-0.015, 0.015)
    paint = _ramp(
        rng,
        _hsv(hue, rng.uniform(0.70, 0.80), rng.uniform(0.92, 1.0)),
        _hsv(hue, rng.uniform(0.80, 0.95), rng.uniform(0.78, 0.90)),
    )

    cover = np.asarray(mask, dtype=np.float64)[..., None] / 255
    shade = np.asarray(shadow, dtype=np.float64)[..., None] / 255
    picture = cover * paint + (1 - cover) * background * (1 - 0.35 * shade)
    return np.round(255 * picture).astype(np.uint8)


def draw_dataset(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count, IMAGE_SIZE, IMAGE_SIZE, 3) uint8 and labels (count,) int64, the classes in turn."""
    labels = np.arange(count, dtype=np.int64) % len(LABELS)
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for index in tqdm(range(count), desc="draw", unit="image"):
        images[index] = draw_image(int(labels[index]), np.random.default_rng([seed, index]))
    return images, labels
