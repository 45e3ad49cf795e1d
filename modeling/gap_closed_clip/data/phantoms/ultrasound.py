"""Paints ultrasound phantoms of the upper abdomen: a fan of speckle with gallbladder, kidney or liver."""

import numpy as np

from .cases import Case
from .drawing import Canvas, Point


# Where each zone lies: x along the kidney, and the point in the liver.
_POLE = {"upper pole": -0.26, "interpolar": 0.0, "lower pole": 0.26}
_SEGMENT = {"dome": (-0.3, 0.25), "hilum": (0.12, -0.05), "inferior": (0.4, 0.15)}


def draw_ultrasound(canvas: Canvas, case: Case, view: str) -> Point | None:
    """Paint an abdominal ultrasound of a case; gives the point for an arrow to the finding, or None."""
    rng, family, key = canvas.rng, case.finding.family, case.finding.key
    apex = -1.25 - rng.uniform(0, 0.4)
    depth = canvas.grid_y - np.float32(apex)
    radius = np.sqrt(np.square(canvas.grid_x) + np.square(depth))
    angle = np.arctan2(canvas.grid_x, depth)
    canvas.image[:] = 0.36 + 0.04 * canvas.noise(6)
    canvas.blend(canvas.above(-0.75 - canvas.y, 0.05), 0.55)  # abdominal wall
    canvas.add(canvas.above(0.02 - np.abs(canvas.y + 0.7 + 0.05 * canvas.noise(4))), 0.25)
    if family == "kidney":
        target = _kidney(canvas, case, angle, radius)
    elif family == "gallbladder":
        target = _gallbladder(canvas, case, angle, radius)
    else:
        target = _liver(canvas, case, angle, radius)
    weaken = np.float32(0.35 + 0.45 * (key == "steatosis"))
    canvas.image *= np.float32(1.1) - weaken * (radius - radius.min()) / np.float32(2)
    speckle = np.abs(canvas.noise(canvas.size // 2) * 0.7 + canvas.noise(canvas.size // 5) * 0.5)
    canvas.image *= np.float32(0.62) + np.float32(0.6) * speckle
    span = rng.uniform(0.55, 0.72)
    near = -apex - rng.uniform(0.8, 0.95)
    fan = (
        canvas.above(span - np.abs(angle))
        * canvas.above(radius - near)
        * canvas.above(np.float32(0.93 - apex) - radius)
    )
    canvas.image *= fan
    canvas.blend(np.float32(canvas.grid_x > 0.95) * (canvas.grid_y < 0.2), 0.5 - 0.5 * canvas.grid_y)  # gray bar
    return target


def _behind(canvas: Canvas, angle: np.ndarray, radius: np.ndarray, spot: np.ndarray, factor: float) -> None:
    """Paint the shadow (`factor` < 1) or enhancement (> 1) behind the mask `spot`, along the beam.

    Args:
        angle, radius: polar coordinates of every pixel, seen from the probe.
        spot: mask of a stone or a cyst.
        factor: that the brightness behind it is multiplied by.
    """
    inside = spot > 0.5
    if not inside.any():
        return
    low, high, start = angle[inside].min(), angle[inside].max(), radius[inside].mean()
    edge = np.minimum(angle - low, high - angle)
    strip = canvas.above(edge, 0.03) * canvas.above(radius - start, 0.05)
    canvas.image *= 1 + np.float32(factor - 1) * strip


def _gallbladder(canvas: Canvas, case: Case, angle: np.ndarray, radius: np.ndarray) -> Point | None:
    """Paint a gallbladder and what is wrong with it; gives the point for an arrow, or None."""
    rng, key, size = canvas.rng, case.finding.key, case.size
    tilt, rx, ry = rng.uniform(0.2, 0.9), rng.uniform(0.32, 0.46), rng.uniform(0.15, 0.21)
    wall = 0.07 + 0.05 * size if key == "cholecystitis" else 0.02
    canvas.blend(canvas.ellipse(0, 0, rx + wall, ry + wall, tilt), 0.62, 0.9)
    if key == "cholecystitis":
        canvas.blend(canvas.ellipse(0, 0, rx + wall + 0.02, ry + wall + 0.02, tilt), 0.95)
        canvas.blend(canvas.ellipse(0, 0, rx + wall - 0.02, ry + wall - 0.02, tilt), 0.18)
        canvas.blend(canvas.ellipse(0, 0, rx + 0.02, ry + 0.02, tilt), 0.95)
    lumen = canvas.ellipse(0, 0, rx, ry, tilt)
    canvas.blend(lumen, 0.02)
    _behind(canvas, angle, radius, lumen, 1.5)
    if key == "gallstones" or (key == "cholecystitis" and rng.random() < 0.5):
        for _ in range(case.number):
            along = rng.uniform(-0.2, 0.26)
            x, y = along * np.cos(tilt) - 0.06 * np.sin(tilt), along * np.sin(tilt) + 0.09
            stone = canvas.ellipse(x, y, 0.04 + 0.07 * size, 0.035 + 0.05 * size)
            _behind(canvas, angle, radius, stone, 0.15)
            canvas.blend(stone * canvas.above(y + 0.03 - canvas.y, 0.04), 1.0)
        return x, y
    if key == "polyp":
        x, y = -0.1 * np.cos(tilt) + 0.1 * np.sin(tilt), -0.1 * np.sin(tilt) - 0.1
        canvas.blend(canvas.ellipse(x, y, 0.03 + 0.06 * size, 0.03 + 0.05 * size), 0.6)
        return x, y
    return (0.1, -0.2) if key == "cholecystitis" else None


def _kidney(canvas: Canvas, case: Case, angle: np.ndarray, radius: np.ndarray) -> Point | None:
    """Paint a kidney beside the liver (right) or the spleen (left), and its finding; the upper pole is at the left."""
    rng, key, size = canvas.rng, case.finding.key, case.size
    if case.side != "left":
        canvas.blend(canvas.ellipse(-0.3, -0.5, 0.9, 0.5, 0.15), 0.45)
    else:
        canvas.blend(canvas.ellipse(-0.55, -0.3, 0.42, 0.3, 0.5), 0.5)
    canvas.blend(canvas.ellipse(0.0, 0.12, 0.58, 0.3, 0.12, soft=0.08), 0.58)  # perirenal fat
    canvas.blend(canvas.ellipse(0.0, 0.12, 0.54, 0.27, 0.12), 0.26)
    for x in (-0.3, -0.1, 0.12, 0.32):
        canvas.blend(canvas.ellipse(x, -0.02 + 0.05 * x, 0.06, 0.06), 0.15, 0.7)  # pyramids
    canvas.blend(canvas.ellipse(0.02, 0.14, 0.33, 0.12, 0.12, soft=0.1), 0.8)  # sinus
    x = _POLE.get(case.zone, 0.0) * 1.3
    if key == "hydronephrosis":
        fluid = canvas.ellipse(0.04, 0.15, 0.16 + 0.16 * size, 0.06 + 0.1 * size, 0.12)
        for calyx in (-0.22, 0.0, 0.22):
            knob = canvas.ellipse(calyx, 0.05, 0.04 + 0.07 * size, 0.05 + 0.05 * size)
            fluid = np.maximum(fluid, np.maximum(knob, canvas.line(calyx, 0.05, 0.04, 0.15, 0.02 + 0.03 * size)))
        canvas.blend(fluid, 0.02)
        _behind(canvas, angle, radius, fluid, 1.3)
        return 0.04, 0.1
    if key == "renal cyst":
        y = -0.05 if rng.random() < 0.6 else 0.32
        cyst = canvas.ellipse(x, y, 0.08 + 0.15 * size, 0.08 + 0.13 * size)
        canvas.blend(cyst, 0.01)
        _behind(canvas, angle, radius, cyst, 1.5)
        return x, y
    if key == "renal stone":
        stone = canvas.ellipse(x * 0.8, 0.12, 0.035 + 0.08 * size, 0.03 + 0.03 * size)
        _behind(canvas, angle, radius, stone, 0.15)
        canvas.blend(stone, 1.0)
        return x * 0.8, 0.12
    return None


def _liver(canvas: Canvas, case: Case, angle: np.ndarray, radius: np.ndarray) -> Point | None:
    """Paint a liver and what is wrong with it; gives the point for an arrow, or None."""
    rng, key, size = canvas.rng, case.finding.key, case.size
    bright = 0.85 if key == "steatosis" else 0.42
    shrink = 0.2 + 0.12 * size if key == "ascites" else 0.0
    canvas.blend(canvas.above(-0.55 - canvas.y, 0.05), 0.45)
    if key == "ascites":
        canvas.blend(canvas.above(canvas.y + 0.55, 0.03) * canvas.above(0.7 - canvas.y, 0.05), 0.02)
    edge = 0.06 * canvas.noise(12) if key == "ascites" else 0.0
    outline = 1 - np.square(canvas.x / (0.95 - shrink)) - np.square((canvas.y - 0.05) / (0.68 - shrink)) + edge
    liver = canvas.above(outline, 0.04)
    canvas.blend(liver, bright + 0.03 * canvas.noise(10))
    canvas.blend(canvas.above(0.025 - np.abs(outline), 0.03) * (canvas.y > 0.2), 1.0)  # diaphragm
    if key != "steatosis":
        for turn in rng.uniform(-1.1, 1.1, 3):  # hepatic veins that meet at the vena cava
            x, y = 0.6 * np.sin(turn), 0.4 - 0.6 * np.cos(turn)
            canvas.blend(liver * canvas.line(0.0, 0.45, x * 0.6, 0.45 + (y - 0.45) * 0.6, 0.03, 0.03), 0.1, 0.8)
            canvas.blend(liver * canvas.line(x * 0.5, 0.45 + (y - 0.45) * 0.5, x, y, 0.014, 0.03), 0.1, 0.7)
    x, y = _SEGMENT.get(case.zone, (0.0, 0.0))
    x, y = x + rng.uniform(-0.08, 0.08), y + rng.uniform(-0.08, 0.08)
    if key == "liver cyst":
        cyst = canvas.ellipse(x, y, 0.08 + 0.2 * size, 0.08 + 0.17 * size)
        canvas.blend(cyst, 0.01)
        _behind(canvas, angle, radius, cyst, 1.5)
        return x, y
    if key == "liver mass":
        canvas.blend(
            canvas.ellipse(x, y, 0.09 + 0.18 * size, 0.08 + 0.16 * size, soft=0.03), 0.8 + 0.1 * canvas.noise(14)
        )
        return x, y
    if key == "metastases":
        rings = canvas.blobs(3 + 2 * case.number, 0.08 + 0.04 * size, liver)
        canvas.blend(rings, 0.15)
        canvas.blend(canvas.above(rings - 0.98) * (canvas.noise(12) > -0.2), 0.5)
        return None
    return (0.5, 0.45) if key == "ascites" else None
