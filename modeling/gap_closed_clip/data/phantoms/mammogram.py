"""Paints mammogram phantoms: CC and MLO views, the right breast with its chest wall at the image's right edge."""

import numpy as np

from .cases import Case
from .drawing import Canvas, Point


def draw_mammogram(canvas: Canvas, case: Case, view: str) -> Point | None:
    """Paint a mammogram of a case; gives the point for an arrow to the finding, or None.

    Canvas coordinates are those of a left breast (chest wall at x = -1); the right one comes from a mirrored canvas.
    """
    rng, key = canvas.rng, case.finding.key
    large = rng.uniform(0.75, 1.1)
    cy = 0.0 if view == "CC" else 0.2
    reach, height = 1.45 * large, (0.78 if view == "CC" else 0.82) * large**0.5
    breast = canvas.ellipse(-1.05, cy, reach, height, soft=0.05)
    if view == "MLO":
        breast = np.maximum(breast, canvas.above(0.55 * large - (canvas.x + 1) - 0.45 * (canvas.y + 1), 0.05))
    edge = np.square((canvas.x + 1.05) / reach) + np.square((canvas.y - cy) / height)
    canvas.blend(breast, 0.3 - 0.12 * np.clip(edge, 0, 1) + 0.03 * canvas.noise(7))
    density = {"dense": 1.0, "implant": 0.3}.get(key, rng.beta(1.2, 1.6))
    _parenchyma(canvas, breast, large, cy, density)
    canvas.blend(canvas.ellipse(-1.05 + reach, cy, 0.035, 0.05), 0.4)  # nipple
    if view == "MLO":
        muscle = 0.5 * large + 0.12 - (canvas.x + 1) - 0.5 * (canvas.y + 1)
        canvas.blend(canvas.above(muscle, 0.04), 0.68 + 0.03 * canvas.noise(10))
    if view == "MLO" and rng.random() < 0.4:
        canvas.blend(canvas.ellipse(-0.72, -0.75, 0.05, 0.035), 0.82, 0.8)  # axillary node
    if view == "CC":  # lateral is up in this drawing, as the films hang
        across = {"outer": -0.28, "inner": 0.28}.get(case.zone, 0.0)
    else:
        across = {"outer": -0.15, "inner": 0.4}.get(case.zone, 0.2)
    x = (-0.05 if case.zone == "central" else -0.4) * large + rng.uniform(-0.12, 0.12)
    return _lesion(canvas, case, breast, edge, x, across * large + rng.uniform(-0.06, 0.06))


def _parenchyma(canvas: Canvas, breast: np.ndarray, large: float, cy: float, density: float) -> None:
    """Paint the fibroglandular cone behind the nipple; `density` is from fatty (0) to extremely dense (1)."""
    cone = canvas.ellipse(-0.38 * large, cy, 0.62 * large, 0.5 * large, soft=0.35)
    strands = canvas.above(canvas.noise(12) * 0.7 + canvas.noise(26) * 0.5 - 0.9 + 1.9 * density, 1.2)
    canvas.blend(breast * cone * strands, 0.72, 0.35 + 0.6 * density)
    for _ in range(3):
        y = cy + canvas.rng.uniform(-0.4, 0.4)
        vessel = canvas.line(-0.9, y, 0.2 * large, cy + 0.3 * (y - cy), 0.008, 0.02)  # or a duct
        canvas.add(breast * vessel, 0.08)


def _lesion(canvas: Canvas, case: Case, breast: np.ndarray, edge: np.ndarray, x: float, y: float) -> Point | None:
    """Paint the finding at (x, y); `edge` is 1 along the skin. Gives the point for an arrow, or None."""
    rng, key, size = canvas.rng, case.finding.key, case.size
    radius = 0.06 + 0.1 * size
    if key == "spiculated mass":
        for angle in rng.uniform(0, 2 * np.pi, 14):
            reach = radius * rng.uniform(1.3, 2.6)
            tip = x + reach * np.cos(angle), y + reach * np.sin(angle)
            canvas.blend(canvas.line(x, y, *tip, 0.006, 0.02) * breast, 0.85, 0.6)
        canvas.blend(canvas.ellipse(x, y, radius, radius, soft=0.05), 0.93)
    elif key == "circumscribed mass":
        canvas.blend(canvas.ellipse(x, y, radius * 1.25, radius, rng.uniform(0, 3)), 0.8)
    elif key == "calcifications":
        area = canvas.ellipse(x, y, radius * 1.2, radius)
        canvas.blend(canvas.blobs(7 + int(14 * size), 0.011, area), 1.0)
    elif key == "coarse calcification":
        canvas.blend(canvas.blobs(7, 0.3 * radius, canvas.ellipse(x, y, radius * 0.7, radius * 0.6)), 1.0)
    elif key == "skin thickening":
        canvas.blend(canvas.above(0.05 + 0.06 * size - np.abs(edge - 0.95), 0.08) * breast, 0.75)
        canvas.add(breast, 0.15)
        return None
    elif key == "implant":
        canvas.blend(canvas.ellipse(-0.75, y * 0.2 + 0.05, 0.5 + 0.15 * size, 0.45 + 0.1 * size), 0.9)
        return None
    else:
        return None
    return x, y
