"""The pictures of the embedded sample set: procedural scenes, each with one object of a class.

A class is a shape. Colors, texture, pose, light and clutter are drawn without looking at the class, so
that mean color does not tell it. Image `index` of a split is a function of (SEED, split, index) alone.

Bytes   equal for equal versions of numpy and Pillow on one kind of processor (numpy's sin differs by ulps).
Run     as a script it writes a share of the set: `scenes.py FOLDER NUM K`. It imports numpy and Pillow only.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

VERSION = "sample-v1"  # another picture for any index is another version
SEED = 220804164
COUNTS = {"train": 2400, "test": 600}
FINE = 3  # masks are drawn at three times their size

Polygons = list[tuple[np.ndarray, int]]  # ([K, 2] points within about -1..1, y downwards; 1 adds, 0 cuts)


# --- the shapes: one function per class ----------------------------------------------------------


def _polar(radius: np.ndarray | float, num: int = 72, turn: float = 1.0, start: float = 0.0) -> np.ndarray:
    """`[num, 2]` points at `radius` over `turn` turns of the angle."""
    angle = start + 2 * np.pi * turn * np.arange(num) / num
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _disc(x: float, y: float, radius: float) -> np.ndarray:
    return np.array((x, y)) + _polar(radius)


def _box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _arrow(rng: Generator) -> Polygons:
    neck, half, head = rng.uniform(-0.1, 0.3), rng.uniform(0.16, 0.3), rng.uniform(0.6, 0.9)
    upper = [(-1, -half), (neck, -half), (neck, -head), (1, 0)]
    return [(np.array(upper + [(x, -y) for x, y in upper[2::-1]]), 1)]


def _crescent(rng: Generator) -> Polygons:
    return [(_polar(1.0), 1), (_disc(rng.uniform(0.42, 0.6), 0, rng.uniform(0.75, 0.9)), 0)]


def _cross(rng: Generator) -> Polygons:
    w, h = rng.uniform(0.2, 0.34, 2)
    return [(_box(-1, -h, 1, h), 1), (_box(-w, -1, w, 1), 1)]


def _fish(rng: Generator) -> Polygons:
    fat, fork = rng.uniform(0.4, 0.6), rng.uniform(0.0, 0.25)
    body = _polar(1.0) * (0.72, fat) + (-0.25, 0)
    tail = np.array([(0.3, 0), (1, -0.6), (1 - fork, 0), (1, 0.6)])
    fin = np.array([(-0.5, -0.3 * fat), (0.25, -fat - 0.35), (0.2, -0.4 * fat)])
    return [(tail, 1), (fin, 1), (body, 1), (_disc(-0.62, -0.3 * fat, 0.09), 0)]


def _gear(rng: Generator) -> Polygons:
    teeth, depth = int(rng.integers(8, 13)), rng.uniform(0.7, 0.8)
    profile = np.where(np.arange(8 * teeth) % 8 < 4, 1.0, depth)
    return [(_polar(profile, 8 * teeth), 1), (_polar(rng.uniform(0.2, 0.4)), 0)]


def _house(rng: Generator) -> Polygons:
    w, eaves = rng.uniform(0.6, 0.75), rng.uniform(-0.2, 0.05)
    roof = np.array([(-w - 0.22, eaves), (0, -1), (w + 0.22, eaves)])
    window = _box(-0.42, eaves + 0.2, -0.12, eaves + 0.48)
    return [
        (_box(0.3, -0.85, 0.5, eaves), 1), (roof, 1), (_box(-w, eaves, w, 0.9), 1),
        (_box(0.1, 0.35, 0.42, 0.9), 0), (window, 0),
    ]  # fmt: skip


def _key(rng: Generator) -> Polygons:
    bow, half, bit = rng.uniform(0.36, 0.46), rng.uniform(0.08, 0.13), rng.uniform(0.3, 0.45)
    shaft, first, last = _box(-0.4, -half, 1, half), _box(0.45, 0, 0.6, bit), _box(0.78, 0, 1, bit + 0.1)
    return [
        (_disc(bow - 1, 0, bow), 1),
        (shaft, 1),
        (first, 1),
        (last, 1),
        (_disc(bow - 1, 0, 0.55 * bow), 0),
    ]


def _mug(rng: Generator) -> Polygons:
    taper, grip = rng.uniform(0.0, 0.15), rng.uniform(0.38, 0.5)
    body = np.array([(-0.85, -0.8), (0.4, -0.8), (0.4 - taper, 0.85), (-0.85 + taper, 0.85)])
    handle, hole = _disc(0.4, 0, grip) * (1, 1.2), _disc(0.4, 0, 0.58 * grip) * (1, 1.2)
    return [(handle, 1), (hole, 0), (body, 1)]


def _ring(rng: Generator) -> Polygons:
    return [(_polar(1.0), 1), (_polar(rng.uniform(0.5, 0.72)), 0)]


def _spiral(rng: Generator) -> Polygons:
    turns, half, num = rng.uniform(1.9, 2.4), rng.uniform(0.08, 0.12), 110
    along = np.linspace(0.08, 0.9, num)
    edges = [_polar(along + side * np.sin(np.linspace(0.35, 2.8, num)), num, turns) for side in (-half, half)]
    return [(np.concatenate([edges[0], edges[1][::-1]]), 1)]


def _star(rng: Generator) -> Polygons:
    tips, inner = int(rng.integers(5, 8)), rng.uniform(0.36, 0.5)
    return [(_polar(np.where(np.arange(2 * tips) % 2, inner, 1.0), 2 * tips, start=-np.pi / 2), 1)]


def _tree(rng: Generator) -> Polygons:
    tiers, wide = int(rng.integers(2, 5)), rng.uniform(0.6, 0.85)
    parts: Polygons = [(_box(-0.13, 0.5, 0.13, 1), 1)]
    for k in range(tiers):
        top, half = -1 + 1.1 * k / tiers, wide * (0.45 + 0.55 * (k + 1) / tiers)
        base = top + 1.75 / (tiers + 0.5)
        parts.append((np.array([(0, top), (half, base), (-half, base)]), 1))
    return parts


SHAPES: dict[str, Callable[[Generator], Polygons]] = {
    "arrow": _arrow, "crescent": _crescent, "cross": _cross, "fish": _fish, "gear": _gear, "house": _house,
    "key": _key, "mug": _mug, "ring": _ring, "spiral": _spiral, "star": _star, "tree": _tree,
}  # fmt: skip
CLASSES = tuple(SHAPES)


def _blob(rng: Generator) -> Polygons:
    """Clutter: a lump, a bar, or a torn-off half of some class's shape."""
    kind = rng.integers(3)
    if kind == 0:
        angle, phase = 2 * np.pi * np.arange(72) / 72, rng.uniform(0, 6.28, 3)
        bumps = sum(rng.uniform(0, 0.3) / k * np.sin((k + 1) * angle + phase[k - 1]) for k in (1, 2, 3))
        return [(_polar(0.8 + bumps), 1)]
    if kind == 1:
        return [(_box(-1.6, -0.16, 1.6, 0.16), 1)]
    return [*SHAPES[CLASSES[rng.integers(len(CLASSES))]](rng), (_box(rng.uniform(-0.3, 0.3), -2, 2, 2), 0)]


# --- paint: textures, surfaces, light ------------------------------------------------------------


def _noise(rng: Generator, shape: tuple[int, int], cells: int) -> np.ndarray:
    """Smooth noise of about `cells` lumps across, fp32 in about -1..1."""
    grid = rng.uniform(-1, 1, (cells + 2, cells + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize(shape[::-1], Image.Resampling.BICUBIC))


def _texture(rng: Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How much of the second color lies at (u, v), fp32 0..1: seven kinds, turned, scaled and bent."""
    kind, scale, turn = rng.integers(7), rng.uniform(4, 13), rng.uniform(0, np.pi)
    bend = rng.uniform(0, 0.15) * _noise(rng, u.shape, 3)
    u, v = scale * (np.cos(turn) * u - np.sin(turn) * v + bend), scale * (np.sin(turn) * u + np.cos(turn) * v)
    if kind == 0:  # stripes
        wave = 3 * np.sin(u)
    elif kind == 1:  # checks
        wave = 5 * np.sin(u) * np.sin(v)
    elif kind == 2:  # dots
        wave = 3 * (np.cos(u) + np.cos(v) - rng.uniform(0.2, 1.0))
    elif kind == 3:  # grain of wood: long bent rings
        wave = 1.5 * np.sin(2 * np.sqrt(u * u + 0.04 * v * v) + 3 * _noise(rng, u.shape, 4))
    elif kind == 4:  # lumps of two sizes
        wave = 2 * _noise(rng, u.shape, int(scale)) + _noise(rng, u.shape, int(3 * scale))
    elif kind == 5:  # a gradient
        wave = u / scale
    else:  # speckle
        wave = 2.5 * (_noise(rng, u.shape, int(5 * scale)) + 0.5 * _noise(rng, u.shape, 3))
    return np.clip(0.5 + 0.5 * wave, 0, 1, dtype=np.float32)


def _colors(rng: Generator, against: float | None = None) -> np.ndarray:
    """`[2, 3]` colors 0..1; where `against` is a brightness, theirs is well away from it on one side."""
    while True:
        pair = rng.uniform(0.05, 0.95) + rng.uniform(-0.33, 0.33, (2, 3))
        pair = np.clip(pair, 0.02, 0.98).astype(np.float32)
        if against is None or abs(pair.mean() - against) > 0.22:
            return pair


def _surface(rng: Generator, u: np.ndarray, v: np.ndarray, pair: np.ndarray) -> np.ndarray:
    return pair[0] + _texture(rng, u, v)[..., None] * (pair[1] - pair[0])


def _background(rng: Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A wall, often a floor that runs to a horizon, often a patch of something else. `[H, W, 3]`."""
    scene = _surface(rng, x, y, _colors(rng))
    if rng.random() < 0.6:
        height = y - rng.uniform(-0.3, 0.4) - rng.uniform(-0.15, 0.15) * x
        depth = 0.5 / np.maximum(height + 0.12, 0.12)
        floor = _surface(rng, x * depth, depth, _colors(rng))
        scene += np.clip(40 * height, 0, 1)[..., None] * (floor - scene)
    if rng.random() < 0.6:
        where = np.clip(25 * (_noise(rng, x.shape, 2) - rng.uniform(0.1, 0.4)), 0, 1)[..., None]
        scene += where * (_surface(rng, x, y, _colors(rng)) - scene)
    return scene


def _pose(rng: Generator, at: np.ndarray, scale: float, tilt: float) -> np.ndarray:
    """`[3, 3]` homography from the shape's plane to the scene: turned, sheared, aslant, moved to `at`."""
    turn, shear, aspect = rng.uniform(-tilt, tilt), rng.uniform(-0.25, 0.25), rng.uniform(0.8, 1.0)
    c, s = scale * np.cos(turn), scale * np.sin(turn)
    slant, move = np.eye(3), np.eye(3)
    slant[:2, :2] = np.array([(c, -s), (s, c)]) @ np.array([(1, shear), (0, aspect)])
    slant[2, :2] = rng.uniform(-0.18, 0.18, 2)
    move[:2, 2] = at
    return move @ slant


def _project(pose: np.ndarray, points: np.ndarray) -> np.ndarray:
    """`[3, 3] x [..., 2] -> [..., 2]`."""
    moved = points @ pose[:, :2].T + pose[:, 2]
    return moved[..., :2] / moved[..., 2:]


def _squared(vectors: np.ndarray) -> np.ndarray:
    return vectors[..., 0] ** 2 + vectors[..., 1] ** 2


def _mask(parts: Polygons, pose: np.ndarray, grid: np.ndarray, offset: np.ndarray, unit: float) -> np.ndarray:
    """Coverage `[H, W]`, fp32 0..1, of the shape in this pose, moved by `offset`; `unit` is in pixels."""
    (height, width), origin = grid.shape[:2], grid[0, 0]
    canvas = Image.new("L", (FINE * width, FINE * height))
    draw = ImageDraw.Draw(canvas)
    for points, ink in parts:
        at = (_project(pose, points) + offset - origin) * (FINE * unit)
        draw.polygon([tuple(p) for p in at.tolist()], fill=255 * ink)
    return np.asarray(canvas.reduce(FINE), dtype=np.float32) / 255


def _blur(mask: np.ndarray, pixels: float) -> np.ndarray:
    image = Image.fromarray((255 * mask).astype(np.uint8)).filter(ImageFilter.GaussianBlur(float(pixels)))
    return np.asarray(image, dtype=np.float32) / 255


def _put(
    rng: Generator, scene: np.ndarray, grid: np.ndarray, parts: Polygons, pose: np.ndarray, sun: np.ndarray
) -> None:
    """Paint one thick, lit, shadow-casting object into `scene` `[H, W, 3]`; `sun` [2] points to the light."""
    unit, scale = 1 / (grid[0, 1, 0] - grid[0, 0, 0]), float(np.sqrt(np.linalg.det(pose)))
    thick = scale * rng.uniform(0.05, 0.2) * np.array((rng.uniform(-1, 1), rng.uniform(0.3, 1)))
    outline = np.concatenate([_project(pose, points) for points, ink in parts if ink])
    low = (outline.min(0) - 0.7 * scale - grid[0, 0]) * unit
    high = (outline.max(0) + 0.7 * scale - grid[0, 0]) * unit
    (x0, y0), (x1, y1) = low.clip(0).astype(int), high.clip(0).astype(int)
    scene, grid = scene[y0:y1, x0:x1], grid[y0:y1, x0:x1]  # the rest is untouched
    if min(grid.shape[:2]) < 4:
        return

    face = _mask(parts, pose, grid, np.zeros(2), unit)
    if not face.any():
        return
    side = np.max([_mask(parts, pose, grid, thick * k / 3, unit) for k in (1, 2, 3)], axis=0)
    shade = _mask(parts, pose, grid, thick - sun * scale * rng.uniform(0.1, 0.35), unit)
    scene *= 1 - rng.uniform(0.3, 0.6) * _blur(shade, unit * scale * rng.uniform(0.03, 0.12))[..., None]

    plane = _project(np.linalg.inv(pose).astype(np.float32), grid)
    under = (scene @ np.full(3, 1 / 3, np.float32) * face).sum() / face.sum()
    color = _surface(rng, plane[..., 0], plane[..., 1], _colors(rng, float(under)))
    scene += side[..., None] * (rng.uniform(0.4, 0.7) * color - scene)

    # the face bulges: its height is the mask blurred, its light what a half-glossy surface sends back
    soft = unit * scale * rng.uniform(0.04, 0.1)
    slope_y, slope_x = np.gradient(_blur(face, soft))
    towards = (slope_x * sun[0] + slope_y * sun[1]) * (-2.5 * soft)
    gloss = rng.uniform(0, 1.6) * np.clip(towards - 0.25, 0, 1)
    shine = rng.uniform(0, 0.5) * np.exp(_squared(plane - 0.5 * sun) * -rng.uniform(4, 12))
    lit = color * (1 + 0.6 * np.clip(towards, -1, 1))[..., None] + (gloss + shine)[..., None]
    scene += face[..., None] * (lit - scene)


def _lines(rng: Generator, scene: np.ndarray, num: int) -> None:
    """Long bent wires across the scene: what is hidden of one can be told from what is seen of it."""
    height, width = scene.shape[:2]
    for _ in range(num):
        knots, t = rng.uniform(-0.2, 1.2, (4, 2)), np.linspace(0, 1, 40)[:, None]
        bend = (1 - t) ** 3 * knots[0] + 3 * t * (1 - t) ** 2 * knots[1]
        bend = (bend + 3 * t * t * (1 - t) * knots[2] + t**3 * knots[3]) * (FINE * width, FINE * height)
        canvas = Image.new("L", (FINE * width, FINE * height))
        points = [tuple(p) for p in bend.tolist()]
        ImageDraw.Draw(canvas).line(points, fill=255, width=int(rng.integers(FINE, 4 * FINE)), joint="curve")
        mask = np.asarray(canvas.reduce(FINE), dtype=np.float32)[..., None] / 255
        scene += mask * (_colors(rng)[0] - scene)


def render(split: str, index: int) -> Image.Image:
    """Image `index` of a split, RGB, 96..160 px a side; its class is `CLASSES[index % 12]`."""
    rng = np.random.default_rng((SEED, list(COUNTS).index(split), index))
    width, height = rng.permutation((rng.integers(96, 161), rng.integers(96, 129))).tolist()
    reach = (np.array((width, height)) / min(width, height)).astype(np.float32)  # the scene's half sides
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    grid = np.stack([xs - width / 2, ys - height / 2], -1) * np.float32(2 / min(width, height))
    sun = _polar(1.0, 1, start=rng.uniform(0, 2 * np.pi))[0].astype(np.float32)

    scene = _background(rng, grid[..., 0], grid[..., 1])
    for _ in range(rng.integers(3, 7)):
        parts, at, scale = _blob(rng), reach * rng.uniform(-1, 1, 2), rng.uniform(0.1, 0.32)
        _put(rng, scene, grid, parts, _pose(rng, at, scale, tilt=np.pi), sun)
    _lines(rng, scene, int(rng.integers(0, 4)))
    scale = rng.uniform(0.5, 0.8)
    at = np.maximum(reach - scale, 0.1) * rng.uniform(-0.8, 0.8, 2)
    shape = SHAPES[CLASSES[index % len(CLASSES)]]
    _put(rng, scene, grid, shape(rng), _pose(rng, at, scale, tilt=0.6), sun)
    _lines(rng, scene, int(rng.integers(0, 2)))

    edge = (_squared(grid) / _squared(reach))[..., None]
    scene *= (1 - rng.uniform(0, 0.45) * edge) * (1 + rng.uniform(0, 0.25) * (grid @ sun)[..., None])
    return Image.fromarray((255 * np.clip(scene, 0, 1)).astype(np.uint8))


def write_share(new: Path, num: int, k: int) -> None:
    """Write every `num`-th image from the `k`-th; stops when the parent is gone."""
    parent = os.getppid()
    for split, count in COUNTS.items():
        for index in range(k, count, num):
            if os.getppid() != parent:
                return
            quality = int(np.random.default_rng((index, SEED)).integers(80, 96))
            path = new / split / CLASSES[index % len(CLASSES)] / f"{index:05d}.jpg"
            render(split, index).save(path, quality=quality)


if __name__ == "__main__":
    write_share(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
