"""What `evidence.py` has found before, so that a run that was stopped goes on where it was."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from comparison import slug
from filelock import FileLock, Timeout
from measure import machine, versions

import gap_closed_clip
from gap_closed_clip.disk import replacing


# What numbers depend on: another state of these folders makes trainings anew.
CODE = ("model", "data", "metrics", "evaluation", "training")
OF_REPORTS = Path("evaluation", "statistics.py")  # compares stored numbers whenever a report is written
PACKAGES = ("torch", "transformers", "timm", "scikit-learn", "gap-closed-clip")


class Busy(Exception):
    """Another process is making this training."""


class Store:
    """
    What was found before, one file a training, by its settings and the state of the code. Several processes may share
    the folder: none makes what another is making.

    Args:
        folder: of the files.
        any_code: whether results of another state of the code count.
        scripts: those of this folder that decide the numbers: evidence_NAME.py.
        workers: number of processes that share the work, for the time that is left.
        device: that this process trains on.

    `waits`: whether `get` waits for what another process is making.
    """

    waits = True

    def __init__(
        self,
        folder: Path,
        any_code: bool = False,
        scripts: Sequence[str] = ("measure", "runs"),
        workers: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.folder, self.any_code, self.code = folder, any_code, digest_of_code(scripts)
        self.workers, self.device = workers, device
        self.total = 0
        self.there: dict[Path, dict[str, str]] = {}  # what was given, and where each was made
        self.elsewhere: dict[Path, str] = {}  # what other processes were making, and its settings
        self.seconds = self.new = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, settings: dict[str, Any], compute: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """
        The `result` of these settings, computed if it is not there, the `seconds` that took, and the file for its
        `arrays`, which `compute` may write.

        Raises:
            Busy: another process is making it, and `waits` is false.
        """
        text = json.dumps(settings, sort_keys=True)
        path = self.folder / f"{slug(name)}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}.json"
        content = self._read(path, text)
        if content is None:
            lock = FileLock(path.with_suffix(".lock"))
            try:
                lock.acquire(blocking=self.waits)
            except Timeout:
                self.elsewhere[path] = text
                raise Busy(name) from None
            try:
                content = self._read(path, text) or self._make(path, text, compute)
            finally:
                lock.release()
        self.there[path] = {field: content.get(field, "not noted") for field in ("machine", "versions")}
        if content.pop("is new", False):
            self.new += 1
            self.seconds += content["seconds"]
            done = len({*self.there, *(path for path, text in self.elsewhere.items() if self._read(path, text))})
            left = (self.total - done) * self.seconds / self.new / self.workers / 60
            seconds = f"{content['seconds']:.0f} s; about {left:.0f} minutes left"
            print(f"[{done}/{self.total}] {name} ({seconds})", flush=True)
        return {**content, "arrays": path.with_suffix(".npz")}

    def _make(self, path: Path, settings: str, compute: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        start = time.perf_counter()
        result = compute(path.with_suffix(".npz"))
        seconds = time.perf_counter() - start
        made = {"machine": machine(self.device), "versions": versions(*PACKAGES)}
        content = {"settings": settings, "code": self.code, **made, "seconds": seconds, "result": result}
        with replacing(path) as draft:
            draft.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
        return {**content, "is new": True}

    def _read(self, path: Path, settings: str) -> dict[str, Any] | None:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        is_same = content.get("settings") == settings and (self.any_code or content.get("code") == self.code)
        return content if is_same else None


def made_on(*stores: Store) -> dict[str, str]:
    """
    The `machine` and the `versions` behind what stores have given: a run that was stopped may go on elsewhere. Where
    there are several, each with its number of trainings.
    """
    found = {}
    for field in ("machine", "versions"):
        counts = Counter(made[field] for store in stores for made in store.there.values())
        several = len(counts) > 1
        each = (f"{name} ({count} of {counts.total()})" if several else name for name, count in counts.most_common())
        found[field] = "; ".join(each)
    return found


def digest_of_code(scripts: Sequence[str] = ("measure", "runs")) -> str:
    """Of the source of the package's parts that decide numbers, and of these scripts'."""
    root = Path(gap_closed_clip.__file__).parent
    files = [path for part in CODE for path in sorted((root / part).rglob("*.py"))]
    files.remove(root / OF_REPORTS)
    files += [Path(__file__).parent / f"evidence_{name}.py" for name in scripts]
    hashed = hashlib.blake2b(digest_size=8)
    for path in files:
        hashed.update(path.read_bytes())
    return hashed.hexdigest()
