"""Paints chest radiograph phantoms: frontal (PA, AP) and lateral, white bones on black air."""

import numpy as np

from .cases import Case
from .drawing import Canvas, Point


# Where each zone lies in a frontal image: y in canvas coordinates.
_HEIGHT = {"upper": -0.3, "middle": 0.02, "lower": 0.32}


def draw_radiograph(canvas: Canvas, case: Case, view: str) -> Point | None:
    """Paint a chest radiograph of a case; gives the point for an arrow to the finding, or None."""
    if view == "lateral":
        return _lateral(canvas, case)
    rng = canvas.rng
    lungs, dome = _frontal_anatomy(canvas, case, view)
    target = None
    for sign in case.signs or (1.0,):
        target = _finding(canvas, case, sign, lungs[int(sign > 0)], dome) or target
    if rng.random() < 0.25:  # electrodes and leads, whatever is wrong
        for _ in range(rng.integers(1, 4)):
            x, y = rng.uniform(-0.7, 0.7), rng.uniform(-0.5, 0.5)
            canvas.blend(canvas.ellipse(x, y, 0.03, 0.03), 0.95)
            canvas.blend(canvas.line(x, y, x + rng.uniform(-0.3, 0.3), 1.0, 0.008), 0.9, 0.6)
    return target


def _frontal_anatomy(canvas: Canvas, case: Case, view: str) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Paint the thorax; gives the masks of both lungs (image left, image right) and the depth below the diaphragm."""
    rng, x, y, key = canvas.rng, canvas.x, canvas.y, case.finding.key
    habitus, deep = rng.uniform(0.86, 1.08), rng.uniform(-0.06, 0.1) - (0.12 if view == "AP" else 0)
    if key == "hyperinflation":
        deep += 0.2
    body = np.maximum(canvas.ellipse(0, 0.5, 1.0 * habitus, 1.32, soft=0.05), canvas.ellipse(0, -0.9, 0.24, 0.4))
    canvas.blend(body, 0.52 + 0.05 * canvas.noise(4))
    lateral = np.abs(x) - 0.4
    flat = 0.3 if key == "hyperinflation" else 1.0
    dome = y - (
        0.42 + deep + flat * np.square(lateral) * np.where(lateral > 0, 1.9, 0.35) + 0.06 * canvas.above(x, 0.2)
    )
    above = canvas.above(-dome)
    right = canvas.ellipse(-0.42 * habitus, 0.22, 0.33 * habitus, 0.97, soft=0.04) * above
    left = canvas.ellipse(0.43 * habitus, 0.22, 0.31 * habitus, 0.97, soft=0.04) * above
    lungs = np.maximum(right, left)
    dark = 0.09 if key == "hyperinflation" else 0.16
    canvas.blend(lungs, dark + 0.02 * canvas.noise(6))
    canvas.blend(body * (1 - above) * canvas.above(np.float32(0.92 * habitus) - np.abs(x), 0.15), 0.7)
    hilar = np.exp(-np.square((np.abs(x) - 0.17) / 0.22) - np.square((y - 0.05) / 0.35))
    canvas.add(lungs * hilar, 0.14)
    canvas.add(lungs * hilar * np.maximum(canvas.noise(24), 0), 0.14)  # vessels
    if rng.random() < 0.6:
        bubble = canvas.ellipse(0.36, 0.6 + deep, 0.13, 0.08)
        canvas.blend(bubble * (1 - above), 0.35)
    _mediastinum(canvas, case, view, deep)
    _bones(canvas, habitus)
    if case.sex == "female" and rng.random() < 0.8:
        for sign in (-1, 1):
            canvas.add(canvas.ellipse(sign * 0.48 * habitus, 0.38, 0.34, 0.3, soft=0.12), 0.07)
    return (right, left), dome


def _mediastinum(canvas: Canvas, case: Case, view: str, deep: float) -> None:
    """Paint heart, vessels, trachea and hila; `deep` is how much lower than usual the diaphragm stands."""
    key, rng = case.finding.key, canvas.rng
    width = rng.uniform(0.9, 1.08) * (1.12 if view == "AP" else 1.0)
    if key == "cardiomegaly":
        width *= 1.32 + 0.3 * case.size
    elif key == "oedema":
        width *= 1.2
    elif key == "hyperinflation":
        width *= 0.75
    wide = 1.6 + 0.7 * case.size if key == "wide mediastinum" else 1.0
    heart = canvas.ellipse(0.1 * width, 0.26 + deep / 2, 0.29 * width, 0.24 * width**0.5, 0.5, soft=0.03)
    atrium = canvas.ellipse(-0.07 * width, 0.26 + deep / 2, 0.15 * width, 0.2, soft=0.03)
    trunk = canvas.ellipse(0, -0.15, 0.14 * wide, 0.6, soft=0.05)
    knob = canvas.ellipse(0.09 * wide, -0.22, 0.1 * wide**0.5, 0.1, soft=0.03)
    canvas.blend(np.maximum.reduce([heart, atrium, trunk, knob]), 0.68)
    canvas.add(canvas.line(0, -0.95, 0, -0.12, 0.045, soft=0.04), -0.16)  # trachea
    if key == "hilar nodes":
        for sign in (-1, 1):
            canvas.blend(canvas.ellipse(sign * 0.24, 0.02, 0.1 + 0.07 * case.size, 0.15, soft=0.05), 0.66)


def _bones(canvas: Canvas, habitus: float) -> None:
    """Paint spine, ribs and clavicles; `habitus` is how broad the patient is, 1 on average."""
    x, y = canvas.x, canvas.y
    spine = canvas.above(np.float32(0.085) - np.abs(x), 0.03)
    canvas.add(spine, 0.07)
    canvas.add(spine * (np.sin(y * 24) > 0.75), -0.05)  # disc spaces
    outer = np.square(x / (0.8 * habitus)) + np.square((y - 0.2) / 1.0)
    cage = canvas.above(1 - outer, 0.05) * canvas.above(np.abs(x) - np.float32(0.09), 0.03)
    behind = np.cos((y - 0.1 * np.abs(x) + 0.45 * np.square(x)) * 30) > 0.55
    front = np.cos((y + 0.55 * np.square(np.abs(x) - 0.9)) * 24) > 0.75
    canvas.add(cage * behind, 0.085)
    canvas.add(cage * front * (np.abs(x) > 0.25), 0.04)
    for sign in (-1, 1):
        canvas.add(canvas.line(sign * 0.1, -0.5, sign * 0.72 * habitus, -0.64, 0.03), 0.14)


def _finding(canvas: Canvas, case: Case, sign: float, lung: np.ndarray, dome: np.ndarray) -> Point | None:
    """Paint what is wrong on one side; `sign` is -1 for the patient's right (image left). Gives the arrow's point."""
    rng, key, size = canvas.rng, case.finding.key, case.size
    px, py = sign * rng.uniform(0.34, 0.5), _HEIGHT.get(case.zone, 0.1) + rng.uniform(-0.07, 0.07)
    if key in ("nodule", "mass"):
        radius = 0.045 + 0.05 * size if key == "nodule" else 0.13 + 0.12 * size
        canvas.blend(canvas.ellipse(px, py, radius, radius * rng.uniform(0.8, 1.2), soft=0.03), 0.66, 0.85)
    elif key == "consolidation":
        patch = canvas.ellipse(px, py, 0.2 + 0.1 * size, 0.17 + 0.12 * size, soft=0.2) * lung
        canvas.blend(patch, 0.6 + 0.08 * canvas.noise(18), 0.85)
    elif key in ("effusion", "pneumothorax"):
        return _pleural_finding(canvas, case, sign, lung)
    elif key == "cavity":
        radius = 0.1 + 0.08 * size
        canvas.blend(canvas.ellipse(px, py, radius, radius, soft=0.04), 0.66, 0.9)
        hole = canvas.ellipse(px, py, radius * 0.62, radius * 0.62)
        canvas.blend(hole * (canvas.y < py + radius * 0.2), 0.14)
    elif key == "metastases":
        canvas.blend(canvas.blobs(2 + 2 * case.number, 0.035 + 0.04 * size, lung), 0.64, 0.8)
    elif key == "miliary":
        canvas.add(lung * (canvas.noise(canvas.size // 3) > 0.7), 0.16)
        return None
    elif key == "device":
        _pacemaker(canvas, sign)
        return None
    elif key == "tube":
        _tubes(canvas, sign)
        return None
    else:
        return _diffuse_finding(canvas, case, lung, dome)
    return px, py


def _pleural_finding(canvas: Canvas, case: Case, sign: float, lung: np.ndarray) -> Point:
    """Paint fluid or air between lung and chest wall; gives the point for an arrow to it."""
    size, x, y = case.size, canvas.x, canvas.y
    if case.finding.key == "effusion":
        level = 0.58 - 0.75 * size - 0.35 * np.square(np.minimum(np.abs(x), 0.8) / 0.8) * (1 - 0.4 * size)
        canvas.blend(canvas.above(y - level, 0.08) * lung, 0.68, 0.95)
        return sign * 0.58, 0.36 - 0.6 * size
    shrink = 0.96 - 0.5 * size
    collapsed = canvas.ellipse(sign * (0.42 - 0.22 * size), 0.26, 0.33 * shrink, 0.97 * shrink, soft=0.02)
    edge = canvas.ellipse(sign * (0.42 - 0.22 * size), 0.26, 0.33 * shrink + 0.025, 0.97 * shrink + 0.025)
    canvas.blend(lung * (1 - edge), 0.06, 0.85)
    canvas.add(lung * np.clip(edge - collapsed, 0, 1), 0.22)
    canvas.add(lung * collapsed, 0.12 * size)
    return sign * 0.6, -0.25


def _diffuse_finding(canvas: Canvas, case: Case, lung: np.ndarray, dome: np.ndarray) -> Point | None:
    """Paint a finding that has no side, if it is not part of the anatomy already; gives the point for an arrow."""
    x, y, key = canvas.x, canvas.y, case.finding.key
    if key == "oedema":
        hilar = np.exp(-np.square((np.abs(x) - 0.3) / 0.22) - np.square((y - 0.08) / (0.3 + 0.15 * case.size)))
        canvas.add(hilar * (0.8 + 0.4 * canvas.noise(14)), 0.2 + 0.16 * case.size)
        return None
    if key == "free air":
        under = canvas.above(dome - 0.03) * canvas.above(np.float32(0.09 + 0.08 * case.size) - dome)
        canvas.blend(under * (np.abs(np.abs(x) - 0.42) < 0.24) * ((x < 0) | (case.size > 0.4)), 0.1)
        return -0.42, 0.5
    if key == "cardiomegaly":
        return 0.38, 0.3
    if key == "wide mediastinum":
        return 0.25, -0.2
    return (-0.26, 0.0) if key == "hilar nodes" else None


def _pacemaker(canvas: Canvas, sign: float) -> None:
    """Paint the box under one clavicle and the lead to the heart."""
    canvas.blend(canvas.ellipse(sign * 0.6, -0.42, 0.13, 0.1), 0.97)
    for x0, y0, x1, y1 in ((sign * 0.6, -0.4, 0.0, -0.5), (0.0, -0.5, -0.1, 0.1), (-0.1, 0.1, 0.2, 0.38)):
        canvas.blend(canvas.line(x0, y0, x1, y1, 0.014), 0.95)


def _tubes(canvas: Canvas, sign: float) -> None:
    """Paint an endotracheal or a chest tube, and a central line."""
    if canvas.rng.random() < 0.5:
        canvas.blend(canvas.line(0, -1, 0.0, -0.2, 0.018), 0.95)
    else:
        canvas.blend(canvas.line(sign * 0.85, 0.2, sign * 0.4, -0.35, 0.03), 0.9, 0.8)
    canvas.blend(canvas.line(-0.3, -0.7, -0.1, -0.45, 0.012), 0.9)
    canvas.blend(canvas.line(-0.1, -0.45, -0.1, 0.0, 0.012), 0.9)


def _lateral(canvas: Canvas, case: Case) -> Point | None:
    """Paint a lateral view: sternum at the image left, spine at the image right; sides cannot be told apart."""
    rng, x, y, key, size = canvas.rng, canvas.x, canvas.y, case.finding.key, case.size
    canvas.blend(canvas.ellipse(0.0, 0.35, 0.78, 1.35, soft=0.05), 0.5 + 0.05 * canvas.noise(4))
    dome = y - (0.42 + rng.uniform(-0.05, 0.1) + 0.8 * np.square(x + 0.05) + 0.12 * x)
    lung = canvas.ellipse(0.02, 0.12, 0.6, 0.95, soft=0.04) * canvas.above(-dome)
    canvas.blend(lung, 0.2 + 0.02 * canvas.noise(6))
    big = 1.4 if key in ("cardiomegaly", "oedema") else 1.0
    canvas.blend(canvas.ellipse(-0.25, 0.25, 0.25 * big, 0.28 * big, 0.5, soft=0.1), 0.55)
    canvas.blend(canvas.ellipse(-0.02, -0.05, 0.13, 0.12, soft=0.08), 0.45)
    canvas.add(canvas.line(0.05, -1, 0.02, -0.15, 0.05, soft=0.04), -0.12)
    spine = canvas.above(0.1 - np.abs(x - 0.52 + 0.12 * np.square(y)), 0.03)
    canvas.add(spine, 0.22)
    canvas.add(spine * (np.sin(y * 26) > 0.75), -0.12)
    canvas.add(lung * (np.cos((y - 0.5 * x) * 28) > 0.6), 0.06)
    canvas.add(canvas.line(-0.55, -0.6, -0.64, 0.3, 0.035), 0.2)
    if key == "effusion":
        canvas.blend(lung * canvas.above(y - (0.42 - 0.5 * size - 0.5 * np.square(x - 0.1)), 0.06), 0.66)
        return 0.4, 0.3 - 0.4 * size
    if key in ("oedema", "miliary", "hilar nodes"):
        canvas.add(lung * np.exp(-(np.square(x) + np.square(y)) / 0.12), 0.25)
    place = {"upper": -0.35, "middle": 0.05, "lower": 0.25}.get(case.zone)
    if place is None:
        return None
    px = rng.uniform(-0.1, 0.3)
    radius = {"nodule": 0.05, "mass": 0.18, "cavity": 0.13}.get(key, 0.22) * (0.8 + 0.5 * size)
    canvas.blend(canvas.ellipse(px, place, radius, radius, soft=0.1 if key == "consolidation" else 0.03) * lung, 0.62)
    return px, place
