"""Paints soft-edged shapes on a small canvas that varies in shape and exposure as real images do.

Canvas coordinates run from -1 to 1, x to the right and y downwards; in frontal and axial images the patient's right is
at negative x, as radiologists hang them. Rotation, shift, scale and an organic warp are part of the coordinates, so
that anatomy and findings move together.
"""

import io

import numpy as np
from PIL import Image


_GLYPHS = {
    "R": ("111", "101", "110", "101", "101"),
    "L": ("100", "100", "100", "100", "111"),
    "C": ("111", "100", "100", "100", "111"),
    "M": ("101", "111", "111", "101", "101"),
    "O": ("111", "101", "101", "101", "111"),
    "A": ("010", "101", "111", "101", "101"),
    "P": ("111", "101", "111", "100", "100"),
}


Point = tuple[float, float]  # x and y in canvas coordinates


class Canvas:
    """A square gray image, (size, size) float32, that is painted in canvas coordinates.

    Args:
        size: side in pixels.
        rng: source of all chance in this image.
        jitter: strength of rotation, shift, scale and warp; 0 draws the plain anatomy.
        mirror: negate x, for a breast of the other side or a heart on the right.
    """

    def __init__(self, size: int, rng: np.random.Generator, jitter: float = 1.0, mirror: bool = False):
        self.size, self.rng = size, rng
        self.image = np.zeros((size, size), dtype=np.float32)
        axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
        self.grid_x, self.grid_y = np.meshgrid(axis, axis)
        angle, scale = rng.normal(0, 0.05) * jitter, 1 + rng.uniform(-0.12, 0.12) * jitter
        self._shift_x, self._shift_y = (rng.uniform(-0.08, 0.08, 2) * jitter).tolist()
        flip = -1.0 if mirror else 1.0
        cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
        forward = np.array([[cos * flip, -sin], [sin * flip, cos]])  # from the canvas to the image
        self._forward = forward.tolist()
        back = np.linalg.inv(forward).astype(np.float32)
        u, v = self.grid_x - np.float32(self._shift_x), self.grid_y - np.float32(self._shift_y)
        warp = np.float32(0.035 * jitter)
        self.x = back[0, 0] * u + back[0, 1] * v + warp * self.noise(5)
        self.y = back[1, 0] * u + back[1, 1] * v + warp * self.noise(5)
        self._reach = scale
        self.pixel = 2 / size / scale

    def noise(self, cells: int) -> np.ndarray:
        """Smooth noise with `cells` blobs across the image and unit variance at their nodes, (size, size) float32."""
        nodes = self.rng.standard_normal((cells, cells), dtype=np.float32)
        return np.asarray(Image.fromarray(nodes).resize((self.size, self.size), Image.Resampling.BICUBIC))

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, angle: float = 0.0, soft: float = 0.0) -> np.ndarray:
        """Mask of a filled ellipse, (size, size) in 0..1.

        Args:
            cx, cy: its centre.
            rx, ry: its radii.
            angle: rotation in radians.
            soft: width of its edge, at least a pixel.
        """
        mask = np.zeros_like(self.image)
        rows, columns = self._window(cx, cy, max(rx, ry) + soft + 0.12)
        dx, dy = self.x[rows, columns] - np.float32(cx), self.y[rows, columns] - np.float32(cy)
        if angle:
            cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
        squared = np.square(dx / np.float32(rx)) + np.square(dy / np.float32(ry))
        slope = np.float32(min(rx, ry) / max(soft, self.pixel) / 2)  # 1 - r is about (1 - r^2) / 2 at the edge
        mask[rows, columns] = _unit((1 - squared) * slope + np.float32(0.5))
        return mask

    def line(self, x0: float, y0: float, x1: float, y1: float, width: float, soft: float = 0.0) -> np.ndarray:
        """Mask of a straight stroke with round ends, (size, size) in 0..1.

        Args:
            x0, y0, x1, y1: its ends.
            width: half of its width.
            soft: width of its edge, at least a pixel.
        """
        mask = np.zeros_like(self.image)
        dx, dy = x1 - x0, y1 - y0
        length = max(float(np.hypot(dx, dy)), 1e-6)
        rows, columns = self._window((x0 + x1) / 2, (y0 + y1) / 2, length / 2 + width + soft + 0.12)
        px, py = self.x[rows, columns] - np.float32(x0), self.y[rows, columns] - np.float32(y0)
        along = _unit(px * np.float32(dx / length**2) + py * np.float32(dy / length**2))
        distance = np.sqrt(np.square(px - along * np.float32(dx)) + np.square(py - along * np.float32(dy)))
        mask[rows, columns] = _unit((width - distance) / np.float32(max(soft, self.pixel)) + np.float32(0.5))
        return mask

    def above(self, distance: np.ndarray, soft: float = 0.0) -> np.ndarray:
        """Mask of the pixels at which a signed distance is positive, (size, size) in 0..1; its edge is `soft` wide."""
        return _unit(distance / np.float32(max(soft, self.pixel)) + np.float32(0.5))

    def blend(self, mask: np.ndarray, value: float | np.ndarray, opacity: float = 1.0) -> None:
        """Replace what the mask covers by `value`."""
        self.image += mask * np.float32(opacity) * (value - self.image)

    def add(self, mask: np.ndarray, amount: float) -> None:
        """Add `amount` to what the mask covers, as structures overlap in a radiograph."""
        self.image += mask * np.float32(amount)

    def blobs(self, count: int, radius: float, within: np.ndarray) -> np.ndarray:
        """Mask of up to `count` small discs whose centres are inside the mask `within`, (size, size) in 0..1."""
        mask = np.zeros_like(self.image)
        rows, columns = np.nonzero(within > 0.6)
        for pick in self.rng.integers(len(rows), size=count) if len(rows) else ():
            cx, cy = self.x[rows[pick], columns[pick]], self.y[rows[pick], columns[pick]]
            size = radius * self.rng.uniform(0.6, 1.5)
            np.maximum(mask, self.ellipse(cx, cy, size, size * self.rng.uniform(0.7, 1.3)), out=mask)
        return mask

    def arrow(self, x: float, y: float, value: float) -> None:
        """Paint an arrow from a random direction, whose tip stops just short of the point (x, y)."""
        angle = self.rng.uniform(0, 2 * np.pi)
        ux, uy = np.cos(angle), np.sin(angle)
        tip_x, tip_y = x + 0.1 * ux, y + 0.1 * uy
        shaft = self.line(tip_x + 0.08 * ux, tip_y + 0.08 * uy, tip_x + 0.26 * ux, tip_y + 0.26 * uy, 0.018)
        along = (self.x - tip_x) * ux + (self.y - tip_y) * uy
        across = np.abs((self.y - tip_y) * ux - (self.x - tip_x) * uy)
        head = self.above(np.minimum(0.5 * along - across, 0.12 - along))
        self.blend(np.maximum(shaft, head), value)

    def text(self, letters: str, x: float, y: float, value: float = 0.95) -> None:
        """Burn letters into the image, upright and not moved by the jitter.

        Args:
            letters: of those in `_GLYPHS`.
            x, y: the top left corner, from -1 to 1 across the image itself.
            value: their brightness.
        """
        cell = max(1, round(self.size / 64))
        row, column = int((y + 1) / 2 * self.size), int((x + 1) / 2 * self.size)
        for letter in letters:
            bits = np.array([[float(bit) for bit in line] for line in _GLYPHS[letter]], dtype=np.float32)
            bits = np.kron(bits, np.ones((cell, cell), dtype=np.float32))
            patch = self.image[row : row + bits.shape[0], column : column + bits.shape[1]]
            bits = bits[: patch.shape[0], : patch.shape[1]]
            patch += bits * (value - patch)
            column += 4 * cell

    def collimate(self, left: float, top: float, right: float, bottom: float) -> None:
        """Blacken a frame whose widths are given as fractions of the image's side."""
        n = self.size
        keep = np.zeros_like(self.image)
        keep[int(top * n) : n - int(bottom * n), int(left * n) : n - int(right * n)] = 1
        self.image *= keep

    def encode(self, noise: float = 0.02, exposure: float = 1.0) -> bytes:
        """Vary brightness, contrast and gamma, add grain, and give the image as an 8-bit gray PNG file.

        Args:
            noise: strength of the grain.
            exposure: strength of the variation of brightness, contrast and gamma.
        """
        rng = self.rng
        gamma = np.exp(rng.normal(0, 0.18) * exposure)
        contrast, lift = 1 + rng.normal(0, 0.12) * exposure, rng.normal(0, 0.03) * exposure
        exposed = np.clip(self.image, 0, 1) ** np.float32(gamma) * np.float32(contrast) + np.float32(lift)
        grain = rng.standard_normal(self.image.shape, dtype=np.float32)
        exposed = exposed + grain * np.float32(noise * rng.uniform(0.4, 1.8))
        buffer = io.BytesIO()
        pixels = (np.clip(exposed, 0, 1) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def _window(self, cx: float, cy: float, radius: float) -> tuple[slice, slice]:
        """Rows and columns of the image that hold a disc, whose `radius` includes 0.12 for the warp."""
        (a, b), (c, d) = self._forward
        px, py = a * cx + b * cy + self._shift_x, c * cx + d * cy + self._shift_y
        reach, half = radius * self._reach, self.size / 2
        top, bottom = int((py - reach + 1) * half), int((py + reach + 1) * half) + 1
        left, right = int((px - reach + 1) * half), int((px + reach + 1) * half) + 1
        return slice(max(top, 0), max(bottom, 0)), slice(max(left, 0), max(right, 0))


def _unit(values: np.ndarray) -> np.ndarray:
    """Values limited to 0..1; np.clip is several times slower on images this small."""
    return np.minimum(np.maximum(values, 0), 1)
