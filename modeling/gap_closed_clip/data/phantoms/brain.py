"""Paints brain MR phantoms: axial, coronal and sagittal slices, with the tissue contrast of several sequences."""

import numpy as np

from .cases import Case
from .drawing import Canvas, Point


# Brightness of each tissue in each sequence. "core", "oedema", "rim", "acute" and "blood" make up the lesions.
_SEQUENCES: dict[str, dict[str, float]] = {
    "T1": dict(fat=0.9, csf=0.1, gray=0.42, white=0.58, core=0.3, oedema=0.4, rim=0.48, acute=0.38, blood=0.75),
    "T1 contrast": dict(
        fat=0.9, csf=0.1, gray=0.42, white=0.55, core=0.22, oedema=0.38, rim=0.97, acute=0.4, blood=0.7
    ),
    "T2": dict(fat=0.7, csf=0.97, gray=0.52, white=0.34, core=0.85, oedema=0.75, rim=0.45, acute=0.68, blood=0.12),
    "FLAIR": dict(fat=0.6, csf=0.06, gray=0.5, white=0.38, core=0.5, oedema=0.85, rim=0.62, acute=0.75, blood=0.25),
    "DWI": dict(fat=0.12, csf=0.08, gray=0.4, white=0.33, core=0.3, oedema=0.42, rim=0.5, acute=0.97, blood=0.15),
}
# How far each zone is from the midline, and where it lies along the head in an axial slice (the face is up).
_PLACES = {"frontal": (0.27, -0.36), "parietal": (0.4, 0.02), "occipital": (0.26, 0.42), "deep": (0.2, 0.0)}


def draw_brain(canvas: Canvas, case: Case, view: str) -> Point | None:
    """Paint a brain MR slice of a case; gives the point for an arrow to the finding, or None."""
    plane, sequence = view.split(" ", 1)
    tissue = _SEQUENCES[sequence]
    if plane == "sagittal":
        brain = _sagittal(canvas, case, tissue)
    else:
        brain = _axial(canvas, case, tissue) if plane == "axial" else _coronal(canvas, case, tissue)
    target = None
    for sign in case.signs or (1.0,):
        if plane == "sagittal":
            # The side cannot be seen here: zones lie along the image's x axis, the front of the head at the left.
            across, along = _PLACES.get(case.zone, (0.2, 0.0))
            place = along * 1.1, -0.28 + 0.3 * (case.zone == "deep") - 0.1 * across
        else:
            across, along = _PLACES.get(case.zone, (0.3, 0.0))
            place = sign * across, along if plane == "axial" else -0.4 + 0.5 * abs(along)
        target = _lesion(canvas, case, tissue, brain, sign, place) or target
    return target


def _head(canvas: Canvas, tissue: dict[str, float], cx: float, cy: float, rx: float, ry: float) -> None:
    """Paint scalp, skull and the fluid around the brain."""
    canvas.blend(canvas.ellipse(cx, cy, rx, ry, soft=0.02), tissue["fat"], 0.85)
    canvas.blend(canvas.ellipse(cx, cy, rx - 0.06, ry - 0.06), 0.05)
    canvas.blend(canvas.ellipse(cx, cy, rx - 0.12, ry - 0.12), tissue["csf"])


def _cortex(
    canvas: Canvas, case: Case, tissue: dict[str, float], cx: float, cy: float, rx: float, ry: float
) -> np.ndarray:
    """Paint white matter in a folded gray ribbon with fluid in the folds; gives the mask of the brain."""
    atrophy = 0.05 + 0.05 * case.size if case.finding.key == "atrophy" else canvas.rng.uniform(0, 0.035)
    rx, ry = rx - atrophy * 0.5, ry - atrophy * 0.5
    brain = canvas.ellipse(cx, cy, rx, ry)
    folds = canvas.noise(22)
    ring = np.square((canvas.x - cx) / rx) + np.square((canvas.y - cy) / ry)
    canvas.blend(brain, tissue["gray"])
    canvas.blend(canvas.above(0.7 - ring + 0.2 * folds, 0.08), tissue["white"] + 0.015 * canvas.noise(10))
    sulci = brain * canvas.above(ring - 0.72, 0.1) * canvas.above(np.abs(folds) * -1 + 0.1 + 3 * atrophy, 0.15)
    canvas.blend(sulci, tissue["csf"], 0.8)
    return brain


def _widening(case: Case, rng: np.random.Generator) -> float:
    """How wide the ventricles are; 1 is normal."""
    if case.finding.key == "hydrocephalus":
        return 1.8 + 0.9 * case.size
    if case.finding.key == "atrophy":
        return 1.35 + 0.3 * case.size
    return rng.uniform(0.75, 1.1) + 0.004 * max(0, case.age - 40)


def _axial(canvas: Canvas, case: Case, tissue: dict[str, float]) -> np.ndarray:
    """Paint an axial slice through the ventricles or above them, the face up; gives the mask of the brain."""
    rng = canvas.rng
    rx, ry = 0.72 * rng.uniform(0.95, 1.04), 0.9 * rng.uniform(0.95, 1.02)
    _head(canvas, tissue, 0, 0, rx, ry)
    brain = _cortex(canvas, case, tissue, 0, 0, rx - 0.13, ry - 0.13)
    canvas.blend(canvas.line(0, -ry + 0.14, 0, -0.3, 0.012), tissue["csf"])
    canvas.blend(canvas.line(0, 0.32, 0, ry - 0.14, 0.012), tissue["csf"])
    wide = _widening(case, rng)
    if rng.random() < 0.75 or case.zone == "deep" or wide > 1.3:  # a slice through the ventricles
        for sign in (-1, 1):
            canvas.blend(canvas.ellipse(sign * 0.15, 0.02, 0.09, 0.17, sign * 0.3), tissue["gray"])
            canvas.blend(canvas.ellipse(sign * 0.3, -0.02, 0.06, 0.16, sign * 0.15), tissue["gray"])
            front = canvas.ellipse(sign * (0.06 + 0.03 * wide), -0.2, 0.04 * wide, 0.13 * wide**0.5, sign * -0.4)
            back = canvas.ellipse(sign * (0.12 + 0.05 * wide), 0.26, 0.045 * wide, 0.15 * wide**0.5, sign * -0.5)
            canvas.blend(np.maximum(front, back), tissue["csf"])
        canvas.blend(canvas.line(0, -0.04, 0, 0.14, 0.014 * wide), tissue["csf"])
    else:  # a slice above them
        for sign in (-1, 1):
            canvas.blend(canvas.ellipse(sign * 0.13, 0.0, 0.03 * wide, 0.22, sign * 0.05), tissue["csf"], 0.9)
    return brain


def _coronal(canvas: Canvas, case: Case, tissue: dict[str, float]) -> np.ndarray:
    """Paint a coronal slice; gives the mask of the brain."""
    canvas.blend(canvas.ellipse(0, 0.85, 0.36, 0.5, soft=0.03), 0.35)  # neck
    _head(canvas, tissue, 0, -0.1, 0.76, 0.78)
    brain = _cortex(canvas, case, tissue, 0, -0.14, 0.63, 0.62)
    canvas.blend(canvas.line(0, -0.76, 0, -0.25, 0.012), tissue["csf"])
    wide = _widening(case, canvas.rng)
    for sign in (-1, 1):
        canvas.blend(canvas.ellipse(sign * 0.17, 0.0, 0.11, 0.12), tissue["gray"])
        canvas.blend(
            canvas.ellipse(sign * (0.07 + 0.03 * wide), -0.17, 0.09 * wide, 0.035 * wide, sign * 0.4), tissue["csf"]
        )
        canvas.blend(canvas.line(sign * 0.28, 0.05, sign * 0.6, 0.02, 0.018), tissue["csf"])  # Sylvian fissure
        canvas.blend(canvas.ellipse(sign * 0.22, 0.52, 0.22, 0.12), tissue["gray"])  # cerebellum
    canvas.blend(canvas.line(0, -0.02, 0, 0.1, 0.015 * wide), tissue["csf"])
    canvas.blend(canvas.line(0, 0.3, 0, 0.75, 0.08), tissue["white"])
    return brain


def _sagittal(canvas: Canvas, case: Case, tissue: dict[str, float]) -> np.ndarray:
    """Paint a sagittal slice in the midline, the face at the image left; gives the mask of the brain."""
    canvas.blend(canvas.ellipse(-0.45, 0.55, 0.3, 0.42, -0.2, soft=0.05), 0.4)  # face
    canvas.blend(canvas.line(-0.74, 0.35, -0.6, 0.1, 0.05), 0.45)  # nose
    canvas.blend(canvas.line(0.25, 0.5, 0.3, 1.2, 0.3, soft=0.05), 0.4)  # neck
    canvas.blend(canvas.line(-0.3, 0.62, -0.05, 0.62, 0.08), 0.08)  # airway
    _head(canvas, tissue, 0.02, -0.1, 0.86, 0.72)
    brain = _cortex(canvas, case, tissue, 0.02, -0.18, 0.72, 0.5)
    wide = _widening(case, canvas.rng)
    canvas.blend(canvas.ellipse(0.02, -0.02, 0.3, 0.2), tissue["white"])
    canvas.blend(canvas.ellipse(0.02, 0.04, 0.26, 0.17 + 0.02 * wide), tissue["csf"])  # under the corpus callosum
    canvas.blend(canvas.ellipse(0.06, 0.08, 0.17, 0.16 / wide**0.5), tissue["gray"])
    canvas.blend(canvas.ellipse(0.42, 0.3, 0.21, 0.17), tissue["gray"])  # cerebellum
    canvas.blend(canvas.ellipse(0.42, 0.3, 0.1, 0.1) * (canvas.noise(24) > 0), tissue["white"])
    canvas.blend(canvas.ellipse(0.12, 0.3, 0.1, 0.14), tissue["white"])  # pons
    canvas.blend(canvas.line(0.15, 0.4, 0.22, 1.0, 0.055), tissue["white"])
    return brain


def _lesion(
    canvas: Canvas, case: Case, tissue: dict[str, float], brain: np.ndarray, sign: float, place: Point
) -> Point | None:
    """Paint the finding on one side, about `place`; gives the point for an arrow to it, or None."""
    rng, key, size = canvas.rng, case.finding.key, case.size
    px, py = place[0] + rng.uniform(-0.06, 0.06), place[1] + rng.uniform(-0.06, 0.06)
    radius = 0.08 + 0.14 * size
    if key in ("meningioma", "subdural", "arachnoid cyst"):
        return _lesion_at_the_surface(canvas, case, tissue, brain, sign, (px, py))
    if key in ("metastases", "white matter lesions"):
        _scattered_lesions(canvas, case, tissue, brain, sign)
    elif key in ("glioma", "abscess"):
        _ring_enhancing_lesion(canvas, case, tissue, brain, (px, py))
    elif key in ("infarct", "old infarct"):
        patch = canvas.ellipse(px, py, radius * 1.2, radius * 1.5, rng.uniform(-0.4, 0.4), soft=0.05) * brain
        canvas.blend(patch * canvas.above(1.0 + canvas.noise(10), 0.8), tissue["acute" if key == "infarct" else "csf"])
    elif key == "haematoma":
        canvas.blend(canvas.ellipse(px, py, radius * 1.4, radius * 1.3, soft=0.06) * brain, tissue["oedema"])
        canvas.blend(canvas.ellipse(px, py, radius, radius * 0.8), tissue["blood"])
    else:
        return None
    return px, py


def _ring_enhancing_lesion(
    canvas: Canvas, case: Case, tissue: dict[str, float], brain: np.ndarray, place: Point
) -> None:
    """Paint a ragged glioma or a smooth abscess, with oedema around it."""
    px, py = place
    smooth = case.finding.key == "abscess"
    radius = (0.08 + 0.14 * case.size) * (0.75 if smooth else 1.0)
    halo = canvas.ellipse(px, py, radius * 1.9, radius * 1.7, canvas.rng.uniform(0, 3), soft=0.1) * brain
    canvas.blend(halo * canvas.above(0.8 + canvas.noise(8), 0.6), tissue["oedema"])
    ragged = 0.0 if smooth else 0.3
    ring = np.sqrt(np.square(canvas.x - px) + np.square(canvas.y - py)) / radius + ragged * canvas.noise(9)
    canvas.blend(canvas.above(1 - ring, 0.15), tissue["rim"])
    canvas.blend(canvas.above((0.72 if smooth else 0.6) - ring, 0.15), tissue["acute" if smooth else "core"])


def _lesion_at_the_surface(
    canvas: Canvas, case: Case, tissue: dict[str, float], brain: np.ndarray, sign: float, place: Point
) -> Point:
    """Paint a meningioma, a subdural haematoma or an arachnoid cyst; gives the point for an arrow to it."""
    key, size = case.finding.key, case.size
    px, py = place
    radius = 0.08 + 0.14 * size
    if key == "meningioma":
        stretch = 0.56 / max(np.hypot(px / 1.0, py / 1.25), 1e-3)
        px, py = px * stretch, py * stretch
        canvas.blend(canvas.ellipse(px, py, radius * 1.3, radius * 1.2, soft=0.03) * brain, tissue["oedema"], 0.4)
        canvas.blend(canvas.ellipse(px, py, radius, radius), 0.5 + 0.9 * (tissue["rim"] - 0.5))
        return px, py
    if key == "subdural":
        shift = canvas.ellipse(-sign * (0.05 + 0.1 * size), 0, 0.62, 0.8)
        canvas.blend(brain * (1 - shift) * (canvas.x * sign > 0), max(tissue["oedema"], tissue["blood"]))
        return sign * 0.54, 0.0
    px, py = sign * 0.42, -0.25
    canvas.blend(canvas.ellipse(px, py, radius * 1.1, radius * 1.5, sign * 0.5) * brain, tissue["csf"])
    return px, py


def _scattered_lesions(canvas: Canvas, case: Case, tissue: dict[str, float], brain: np.ndarray, sign: float) -> None:
    """Paint metastases or white matter lesions in one half of the brain."""
    half = canvas.x * sign > 0
    if case.finding.key == "metastases":
        spots = canvas.blobs(1 + 2 * case.number, 0.045 + 0.03 * case.size, brain * half)
        canvas.blend(spots, tissue["rim"])
    else:
        near = brain * np.exp(-np.square((np.abs(canvas.x) - 0.2) / 0.14) - np.square(canvas.y / 0.4))
        spots = canvas.blobs(3 + int(9 * case.size), 0.028, np.where(half, near * 1.6, 0))
        canvas.blend(spots, tissue["oedema"])
