"""Paints chest CT phantoms: an axial slice in Hounsfield units, seen through a lung or a mediastinal window."""

import numpy as np

from .cases import Case
from .drawing import Canvas, Point


# Centre and width in Hounsfield units.
_WINDOWS = {"lung window": (-550.0, 1500.0), "mediastinal window": (40.0, 420.0)}
_LEVELS = ("heart", "carina", "arch")


def draw_ct(canvas: Canvas, case: Case, view: str) -> Point | None:
    """Paint an axial chest CT of a case; gives the point for an arrow to the finding, or None."""
    rng, key = canvas.rng, case.finding.key
    level = _LEVELS[int(rng.choice(3, p=(0.45, 0.35, 0.2)))]
    level = {"embolism": "carina", "pericardial effusion": "heart"}.get(key, level)
    if key in ("aneurysm", "anterior mass") and level == "heart":
        level = "carina"
    blood = 45.0 if rng.random() < 0.3 and key not in ("embolism", "aneurysm") else rng.uniform(150, 260)
    lungs = _thorax(canvas, case, level)
    target = _mediastinum(canvas, case, level, blood)
    for sign in case.signs:
        target = _lung_finding(canvas, case, sign, lungs[int(sign > 0)], blood) or target
    centre, width = _WINDOWS[view]
    canvas.image = (canvas.image - np.float32(centre - width / 2)) / np.float32(width)
    return target


def _thorax(canvas: Canvas, case: Case, level: str) -> tuple[np.ndarray, np.ndarray]:
    """Paint air, table, body wall, bones and lungs; gives the masks of both lungs (image left, image right)."""
    rng, key = canvas.rng, case.finding.key
    habitus = rng.uniform(0.9, 1.05)
    fat = rng.uniform(0.03, 0.13)
    canvas.image[:] = -1000
    table = canvas.above(0.02 - np.abs(canvas.y - (0.88 - 0.12 * np.square(canvas.x))))
    canvas.blend(table, -200)
    canvas.blend(canvas.ellipse(0, 0.06, 0.94 * habitus, 0.7 * habitus), 20)
    canvas.blend(canvas.ellipse(0, 0.06, 0.92 * habitus, 0.68 * habitus), -95)
    wall = habitus * (0.92 - fat), habitus * (0.68 - fat)
    canvas.blend(canvas.ellipse(0, 0.06, *wall), 50 + 6 * canvas.noise(16))
    lean = habitus * (0.80 - fat), habitus * (0.57 - fat)
    for angle in np.arange(12) * (np.pi / 6) + rng.uniform(0, 0.3):
        rx, ry = lean[0] + 0.035, lean[1] + 0.035
        tilt = np.arctan2(ry * np.cos(angle), -rx * np.sin(angle))
        canvas.blend(canvas.ellipse(rx * np.cos(angle), 0.06 + ry * np.sin(angle), 0.09, 0.024, tilt), 420)
    small = {"heart": 1.0, "carina": 0.95, "arch": 0.85}[level]
    rx, ry = lean[0] * 0.43 * small, lean[1] * 0.94 * small
    right = canvas.ellipse(-lean[0] * 0.53, 0.06, rx, ry)
    left = canvas.ellipse(lean[0] * 0.53, 0.06, rx * 0.97, ry)
    air = -930.0 if key == "emphysema" else -850.0
    lungs = np.maximum(right, left)
    canvas.blend(canvas.ellipse(0, 0.04, 0.3, lean[1] * 0.95), -80)  # mediastinal fat
    canvas.blend(lungs, air + 25 * canvas.noise(8))
    canvas.blend(lungs * (canvas.noise(canvas.size // 4) > 1.25), -150, 0.8)  # vessels cut across
    for sign in (-1, 1):
        for reach in (-0.16, 0.02, 0.2):
            canvas.blend(lungs * canvas.line(sign * 0.12, 0.05, sign * 0.42, 0.06 + 1.6 * reach, 0.016, 0.03), 0, 0.7)
    return right, left


def _mediastinum(canvas: Canvas, case: Case, level: str, blood: float) -> Point | None:
    """Paint spine, sternum, heart or vessels, airways and what is wrong with them; gives the point for an arrow."""
    key, size, rng = case.finding.key, case.size, canvas.rng
    canvas.blend(canvas.ellipse(0, 0.42, 0.13, 0.1), 260)
    canvas.blend(canvas.ellipse(0, 0.42, 0.1, 0.07), 160)
    canvas.blend(canvas.ellipse(0, 0.56, 0.07, 0.05), 30)
    canvas.blend(canvas.line(0, 0.62, 0, 0.7, 0.025), 350)
    canvas.blend(canvas.ellipse(0, -0.5, 0.1, 0.03), 300)  # sternum
    aorta = 0.11 + 0.07 * size if key == "aneurysm" else 0.075  # its radius
    target = None
    if level == "heart":
        target = _heart(canvas, case, blood)
    elif level == "carina":
        _carina(canvas, aorta, blood)
    else:
        canvas.blend(canvas.line(-0.1, -0.14, 0.1, 0.14, 0.09), blood)  # aortic arch
        canvas.blend(canvas.ellipse(-0.17, -0.12, 0.05, 0.05), blood)
        canvas.blend(canvas.ellipse(-0.02, 0.1, 0.055, 0.06), -980)  # trachea
    if level != "arch":
        canvas.blend(canvas.ellipse(0.13, 0.27, aorta, aorta), blood)  # descending aorta
    if key == "aneurysm":
        canvas.blend(canvas.line(0.06, 0.16, 0.2, 0.34, 0.014), 40)
        canvas.blend(canvas.ellipse(0.13 + aorta * 0.5, 0.27, aorta * 0.4, aorta * 0.7), 60)
        target = 0.13, 0.25
    elif key == "anterior mass":
        radius = 0.13 + 0.14 * size
        canvas.blend(canvas.ellipse(rng.uniform(-0.08, 0.12), -0.3, radius * 1.3, radius), 60 + 25 * canvas.noise(12))
        target = 0.05, -0.3
    return target


def _heart(canvas: Canvas, case: Case, blood: float) -> Point | None:
    """Paint the heart with its chambers; gives the point for an arrow if there is fluid around it."""
    size, target = case.size, None
    big = canvas.rng.uniform(0.9, 1.1)
    if case.finding.key == "pericardial effusion":
        canvas.blend(canvas.ellipse(0.1, -0.06, 0.36 * big + 0.1 * size, 0.29 * big + 0.08 * size, 0.5), 10)
        target = 0.4, -0.1
    canvas.blend(canvas.ellipse(0.1, -0.08, 0.34 * big, 0.25 * big, 0.5), 55)
    canvas.blend(canvas.ellipse(0.18, -0.05, 0.17 * big, 0.11 * big, 0.6), blood)
    canvas.blend(canvas.ellipse(-0.06, -0.14, 0.14 * big, 0.12 * big, 0.2), blood)
    return target


def _carina(canvas: Canvas, aorta: float, blood: float) -> None:
    """Paint the great vessels and the main bronchi at the carina; `aorta` is the radius of the aorta."""
    canvas.blend(canvas.ellipse(-0.05, -0.14, max(0.1, aorta * 0.9), max(0.1, aorta * 0.9)), blood)
    canvas.blend(canvas.ellipse(-0.18, -0.1, 0.05, 0.06), blood)
    canvas.blend(canvas.line(0.13, -0.18, 0.0, 0.04, 0.065), blood)  # pulmonary trunk and right artery
    canvas.blend(canvas.line(0.0, 0.03, -0.2, 0.07, 0.05), blood)
    canvas.blend(canvas.line(0.13, -0.18, 0.22, 0.06, 0.055), blood)
    for sign in (-1, 1):
        canvas.blend(canvas.ellipse(sign * 0.08, 0.14, 0.05, 0.035), -980)


def _lung_finding(canvas: Canvas, case: Case, sign: float, lung: np.ndarray, blood: float) -> Point | None:
    """Paint what is wrong on one side; `sign` is -1 for the patient's right (image left). Gives the arrow's point."""
    rng, key, size = canvas.rng, case.finding.key, case.size
    px, py = sign * rng.uniform(0.34, 0.5), 0.06 + (0.22 if case.zone == "posterior" else -0.2) * rng.uniform(0.6, 1.1)
    if key in ("effusion", "pneumothorax"):
        return _pleural_finding(canvas, case, sign, lung)
    if key in ("emphysema", "fibrosis"):
        _diffuse_finding(canvas, case, lung)
        return None
    if key in ("nodule", "mass"):
        radius = 0.035 + 0.045 * size if key == "nodule" else 0.12 + 0.12 * size
        for angle in rng.uniform(0, 2 * np.pi, 5 if rng.random() < 0.5 else 0):
            reach = radius * 1.9
            tip = px + reach * np.cos(angle), py + reach * np.sin(angle)
            canvas.blend(canvas.line(px, py, *tip, 0.012) * lung, -150)
        canvas.blend(canvas.ellipse(px, py, radius, radius * rng.uniform(0.8, 1.2)), 55 + 20 * canvas.noise(16))
    elif key in ("ground glass", "consolidation"):
        dense = key == "consolidation"
        patch = canvas.ellipse(px * 1.15, py, 0.16 + 0.14 * size, 0.14 + 0.16 * size, soft=0.1)
        if not dense:
            patch = np.maximum(patch, canvas.ellipse(px * 1.2, -0.1 - py * 0.5, 0.12, 0.14, soft=0.08))
        canvas.blend(lung * patch * np.clip(0.8 + 0.4 * canvas.noise(12), 0, 1), 30.0 if dense else -520.0)
        if dense:
            canvas.blend(lung * patch * canvas.line(sign * 0.15, 0.05, px * 1.2, py, 0.018), -950)
    elif key == "embolism":
        px, py = (-0.1, 0.05) if sign < 0 else (0.18, -0.02)
        canvas.blend(canvas.ellipse(px, py, 0.05 + 0.04 * size, 0.032, 0.3 * sign), min(45.0, blood))
    elif key == "metastases":
        canvas.blend(canvas.blobs(3 + 3 * case.number, 0.03 + 0.03 * size, lung), 40)
    else:
        return None
    return px, py


def _pleural_finding(canvas: Canvas, case: Case, sign: float, lung: np.ndarray) -> Point:
    """Paint fluid or air between lung and chest wall; gives the point for an arrow to it."""
    size, x, y = case.size, canvas.x, canvas.y
    if case.finding.key == "effusion":
        level = 0.36 - 0.5 * size - 0.3 * np.square(x - sign * 0.36)
        canvas.blend(lung * canvas.above(y - level, 0.03), 12)
        return sign * 0.42, 0.4 - 0.25 * size
    level = -0.28 + 0.4 * size + 0.5 * np.square(x - sign * 0.2)
    canvas.blend(lung * canvas.above(level - y), -1000)
    canvas.add(lung * canvas.above(y - level), 120 * size)
    canvas.blend(lung * canvas.above(0.012 - np.abs(y - level)), -300, 0.7)
    return sign * 0.36, -0.28


def _diffuse_finding(canvas: Canvas, case: Case, lung: np.ndarray) -> None:
    """Paint emphysema or fibrosis all over one lung."""
    size, x, y = case.size, canvas.x, canvas.y
    if case.finding.key == "emphysema":
        holes = canvas.noise(14) > (0.9 - 0.8 * size)
        canvas.blend(lung * holes * (np.abs(x) > 0.25), -1000, 0.9)
        canvas.add(lung * ~holes, 60)
    else:
        edge = np.square((np.abs(x) - 0.36) / 0.3) + np.square((y - 0.0) / 0.42)
        rim = lung * canvas.above(edge - (0.85 - 0.5 * size) + 0.3 * (y < 0), 0.2)
        canvas.blend(rim, -450 + 330 * np.sign(canvas.noise(canvas.size // 4)))
