"""What the metrics of embeddings have in common.

No metric itself. `evaluate.load` copies a file that a metric imports as `from ._name import ...` along with it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any

import datasets
import evaluate
import numpy as np
import pandas
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


EMBEDDING = datasets.Sequence(datasets.Value("float32"))
STRING = datasets.Value("string")
INTEGER = datasets.Value("int64")
TIE = 1e-9  # cosines this close are equal: well above float64 rounding, well below that of float32 embeddings

_URLS = ["https://arxiv.org/abs/2602.20046", "https://arxiv.org/abs/2601.18525"]
_CITATION = """\
@inproceedings{grassucci2025closing,
  title     = {Closing the gap in multimodal medical representation alignment},
  author    = {Grassucci, Eleonora and Cicchetti, Giordano and Comminiello, Danilo},
  booktitle = {IEEE International Workshop on Machine Learning for Signal Processing (MLSP)},
  year      = {2025},
  note      = {arXiv:2602.20046}
}
@inproceedings{grassucci2026groupwise,
  title     = {Closing the Modality Gap Aligns Group-Wise Semantics},
  author    = {Grassucci, Eleonora and Cicchetti, Giordano and Frasca, Emanuele and Uncini, Aurelio and
               Comminiello, Danilo},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2026},
  note      = {arXiv:2601.18525}
}
"""

# Parts of the descriptions of inputs.
PAIR_ARGUMENTS = """\
    image_embeds: (N, D) image embeddings: a numpy array, a torch tensor, or one list of D floats a pair. They are read
        as float32 and normalised to unit length here.
    text_embeds: (N, D) text embeddings, row i is the caption of image i; likewise."""
ID_ARGUMENTS = """\
    image_ids: N strings or whole numbers, equal for rows that show the same image. Without them every row has an image
        of its own.
    caption_ids: N strings or whole numbers, equal for rows that carry the same caption (the caption itself will do).
        Without them every row has a caption of its own."""
RAISES = """\
ValueError: no pair, rows of different length, a zero vector, a value that is not finite, or an id that is None,
        NaN, or neither string nor whole number; the row is named."""


class EmbeddingMetric(evaluate.Metric, ABC):
    """A metric that measures arrays where they are, and some of whose inputs may be left out.

    It is abstract because `evaluate.load` takes the first metric class in a file that is not.
    """

    optional_inputs: tuple[str, ...] = ()  # names of features; `evaluate` itself knows no optional input

    @abstractmethod
    def _compute(self, **inputs): ...

    def compute(self, **kwargs) -> dict[str, float] | None:
        """The metric of these inputs, together with the rows that `add` and `add_batch` have collected.

        Arrays and tensors of floats are measured where they are. `evaluate` would turn every value into a Python
        float; that is done where the inputs are lists, rows were added before, or other processes have rows too.
        """
        inputs = {name: kwargs.pop(name, None) for name in self._feature_names()}
        if all(value is None for value in inputs.values()):
            return super().compute(**kwargs)
        inputs = self._with_defaults(inputs)
        arrays = self._as_arrays(inputs) if self.num_process == 1 and self.writer is None else None
        if arrays is None:
            return super().compute(**inputs, **kwargs)
        settings = {name: value for name, value in kwargs.items() if name not in ("predictions", "references")}
        return self._compute(**arrays, **settings)

    def add_batch(self, **inputs) -> None:
        """Adds the rows of a batch; `compute` without inputs measures all that were added."""
        super().add_batch(**self._with_defaults(inputs))

    def add(self, **inputs) -> None:
        """Adds one row; `compute` without inputs measures all that were added."""
        one_row = self._with_defaults({name: None if value is None else [value] for name, value in inputs.items()})
        super().add(**{name: column[0] for name, column in one_row.items()})

    def _with_defaults(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The columns with those that may be left out filled in: ids that no other row has, empty labels or lists.

        Ids and labels become strings.
        """
        inputs = {
            name: _strings(name, column) if self.features.get(name) == STRING else _without_index(column)
            for name, column in inputs.items()
        }
        missing = [name for name in self._feature_names() if inputs.get(name) is None]
        if required := [name for name in missing if name not in self.optional_inputs]:
            raise ValueError(f"{self.name}: inputs are missing: {required}.")
        if not missing:
            return inputs
        start, count = len(self), len(inputs["image_embeds"])
        # Sorted, the ids are in the order of the rows, also over several processes.
        own_ids = [f"process {self.process_id:06} row {row:012}" for row in range(start, start + count)]
        nothing: list[list] = [[] for _ in range(count)]
        defaults = {"image_ids": own_ids, "caption_ids": own_ids, "labels": [""] * count}
        return inputs | {name: defaults.get(name, nothing) for name in missing}

    def _as_arrays(self, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """The inputs as `_compute` takes them; None where they are lists, or `evaluate` has to say what is wrong."""
        arrays = {name: _as_array(column, self.features[name]) for name, column in inputs.items()}
        columns = [column for column in arrays.values() if column is not None]
        fit = len(columns) == len(arrays) and len({len(column) for column in columns}) == 1
        return arrays if fit else None


def pair_info(description: str, inputs_description: str, **features: Any) -> evaluate.MetricInfo:
    """What `_info` of a metric of pairs returns; `features` are those beside both embeddings."""
    return evaluate.MetricInfo(
        description=description,
        citation=_CITATION,
        inputs_description=inputs_description,
        features=datasets.Features({"image_embeds": EMBEDDING, "text_embeds": EMBEDDING, **features}),
        reference_urls=_URLS,
    )


def _without_index(column: Any) -> Any:
    """A pandas Series or DataFrame as an array: its rows in their order, whatever their index says."""
    return column.to_numpy() if isinstance(column, pandas.Series | pandas.DataFrame) else column


def _strings(name: str, column: Any) -> Any:
    """Ids or labels as strings; "" for a label that is none: None, NaN or pandas.NA, as data frames have them.

    Whole numbers become what `str` makes of them, of floats too, which a column of numbers with gaps consists of.

    Raises:
        ValueError: an id that is None or NaN, or anything else that is neither string nor whole number.
    """
    if isinstance(column, str) or not isinstance(column, Iterable):
        return column
    values = column.tolist() if hasattr(column, "tolist") else list(column)
    if all(isinstance(value, str) for value in values):
        return values
    return [value if isinstance(value, str) else _string(name, row, value) for row, value in enumerate(values)]


def is_missing(value: Any) -> bool:
    """Whether a value is None, or what arrays and data frames have in its place: NaN, pandas.NA, NaT."""
    return value is None or (pandas.api.types.is_scalar(value) and bool(pandas.isna(value)))


def _string(name: str, row: int, value: Any) -> str:
    """One value of `_strings`."""
    if is_missing(value):
        if name == "labels":
            return ""
        raise ValueError(f"{name}: row {row} has none ({value}): give each row an id of its own, or leave {name} out.")
    whole = isinstance(value, Integral | np.bool) or (isinstance(value, float | np.floating) and value == value // 1)
    if not whole:
        kind = "label" if name == "labels" else "id"
        raise ValueError(f"{name}: row {row} is {value!r:.80}: {kind}s are strings or whole numbers.")
    return str(int(value) if not isinstance(value, bool | np.bool) else bool(value))


def _as_array(column: Any, feature: Any) -> np.ndarray | list | None:
    """The (N, D) float32 matrix, the N matrices, strings or integers that the column holds; None for anything else."""
    if feature == EMBEDDING:
        return _as_matrix(column)
    if not isinstance(column, Sequence | np.ndarray) or isinstance(column, str):
        return None
    if feature == INTEGER:
        numbers = np.asarray(column)
        return numbers if numbers.ndim == 1 and numbers.dtype.kind in "iu" else None
    if feature == STRING:
        strings = list(column)
        return strings if all(isinstance(value, str) for value in strings) else None
    matrices = [row if isinstance(row, list) and not row else _as_matrix(row) for row in column]
    return None if any(matrix is None for matrix in matrices) else matrices


def _as_matrix(rows: Any) -> np.ndarray | None:
    """(N, D) float32, a copy only of what is not float32; None for anything but floats in rows of one length."""
    if hasattr(rows, "detach"):  # a torch tensor
        if not rows.is_floating_point():
            return None
        rows = rows.detach().cpu().float().numpy()  # numpy has no bfloat16
    elif isinstance(rows, list | tuple) and rows and all(isinstance(row, np.ndarray) for row in rows):
        if len({(row.shape, row.dtype) for row in rows}) > 1:
            return None
        rows = np.stack(rows)
    if not isinstance(rows, np.ndarray) or np.ma.isMaskedArray(rows):
        return None
    if rows.ndim != 2 or rows.dtype.kind != "f":
        return None
    with np.errstate(over="ignore"):  # a value that float32 does not hold is infinite, and named later
        return rows.astype(np.float32, copy=False)


class UnitRows:
    """The rows of a matrix as float64 unit vectors, made when they are asked for: `rows[3:7]`, `rows[[0, 5]]`.

    The matrix itself stays in float32, as the metrics' features are: in float64 it would be twice as large.

    Args:
        rows: (N, D), an array or N lists.
        name: of the input, for the messages.
        kind: what the rows are, for the message that there are none.

    Raises:
        ValueError: no row, rows of different length, or a row without a direction, which is named.
    """

    def __init__(self, rows: np.ndarray | list[list[float]], name: str, kind: str = "pairs"):
        if len(rows) == 0:
            raise ValueError(f"{name}: empty, there are no {kind} to measure.")
        if not isinstance(rows, np.ndarray) and len(lengths := {len(row) for row in rows}) > 1:
            raise ValueError(f"{name}: rows differ in length, {sorted(lengths)} values.")
        self._matrix = np.asarray(rows, dtype=np.float32)  # (N, D)
        # Sums depend in their last digits on how the values lie in memory: row by row, here and below.
        norms = [np.linalg.norm(self._matrix[block].astype(np.float64, "C"), axis=1) for block in blocks(len(rows))]
        self._norms = np.concatenate(norms)  # (N,); no float32 is so large that its square overflows
        finite = np.isfinite(self._norms)
        if not finite.all():
            raise ValueError(f"{name}: row {int(np.argmin(finite))} holds NaN or infinity, the embeddings are broken.")
        if not self._norms.all():
            row = int(np.argmin(self._norms))
            raise ValueError(f"{name}: row {row} is a zero vector, it has no direction on the sphere.")

    def __len__(self) -> int:
        return len(self._matrix)

    @property
    def dim(self) -> int:
        return self._matrix.shape[1]

    def __getitem__(self, rows: slice | np.ndarray | list[int]) -> np.ndarray:
        return np.divide(self._matrix[rows], self._norms[rows, None], order="C")  # float32 by float64 is float64


def blocks(count: int, size: int = 1024) -> Iterator[slice]:
    """The slices of `size` rows, the last of them shorter, that make up `count` rows."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def require_one_space(image: UnitRows, other: UnitRows, name: str) -> None:
    """
    Raises:
        ValueError: the input of that name has more or fewer dimensions than the images.
    """
    if image.dim != other.dim:
        raise ValueError(f"image_embeds have {image.dim} dimensions, {name} {other.dim}.")


def unit_pairs(image_embeds: np.ndarray | list, text_embeds: np.ndarray | list) -> tuple[UnitRows, UnitRows]:
    """Both modalities as unit vectors of one space; ValueError where they are not."""
    image, text = UnitRows(image_embeds, "image_embeds"), UnitRows(text_embeds, "text_embeds")
    require_one_space(image, text, "text_embeds")
    return image, text


def numbered(names: list[str]) -> np.ndarray:
    """(N,) position of each name among the sorted distinct ones."""
    position = {name: number for number, name in enumerate(sorted(set(names)))}
    return np.array([position[name] for name in names])


def first_rows(numbers: np.ndarray) -> np.ndarray:
    """The first row of each number from `numbered`, in the order of the numbers."""
    return np.unique(numbers, return_index=True)[1]


def families_of(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """(N,) number of each row's family: the connected parts of the graph whose edges are the pairs.

    The numbers follow those of the images, so neither families nor folds depend on the order of the rows.

    Args:
        images: (N,) each row's image, from `numbered`.
        captions: (N,) each row's caption, likewise.
    """
    num_images = int(images.max()) + 1
    size = num_images + int(captions.max()) + 1
    edges = coo_array((np.ones(len(images)), (images, num_images + captions)), shape=(size, size))
    return connected_components(edges, directed=False)[1][images]
