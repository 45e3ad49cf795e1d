"""
The common tests of transformers, importable as `transformers_tests`.

They are in its source distribution (`tests/`), not in its wheel, and without some of the modules that they import.
Three steps: fetch the distribution of the installed version, unpack `tests/`, put stubs in the place of what it lacks.
Nothing of it becomes part of this repository.
"""

import functools
import importlib.util
import inspect
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import transformers
from PIL import Image


PACKAGE = "transformers_tests"  # not `tests`, which may be anybody's
# A package folder like any other; transformers' own test of configurations wants to import it.
INIT = '"""`tests/` of the source distribution of transformers."""\n'


def default_cache() -> Path:
    """The folder that distributions are fetched to."""
    return Path.home() / ".cache" / "gap_closed_clip" / "conformance"


def fetch(cache: Path) -> Path:
    """
    The source distribution of the installed transformers, from pip's index where it isn't in `cache` yet.

    Raises:
        FileNotFoundError: pip finds none, or can't be reached.
    """
    path = cache / f"transformers-{transformers.__version__}.tar.gz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        options = ["--no-deps", "--no-binary", "transformers", "--dest", str(cache)]
        if _exists("setuptools"):
            # pip builds a source distribution's metadata; without isolation it need not install setuptools for that.
            options.append("--no-build-isolation")
        command = [sys.executable, "-m", "pip", "download", *options, f"transformers=={transformers.__version__}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if not path.exists():
            raise FileNotFoundError(
                f"pip did not bring {path.name}: give a downloaded one with --sdist.\n{done.stderr.strip()}"
            )
    return path


def unpack(sdist: Path, folder: Path) -> Path:
    """
    Unpacks `tests/` of `sdist` into `folder`, as a package; gives `folder`, to import it from.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a distribution of another version than the installed one, without the common tests, or damaged.
    """
    if not sdist.is_file():
        raise FileNotFoundError(f"There is no file {sdist}.")
    if sdist.name != f"transformers-{transformers.__version__}.tar.gz":
        raise ValueError(f"{sdist.name} is not of the installed version of transformers, {transformers.__version__}.")
    package = folder / PACKAGE
    try:
        with tarfile.open(sdist, "r:gz") as archive:
            for member in archive.getmembers():
                parts = Path(member.name).parts
                if member.isfile() and len(parts) > 2 and parts[1] == "tests" and ".." not in parts:
                    target = package.joinpath(*parts[2:])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.extractfile(member).read())
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{sdist} is damaged ({error}): fetch it again.") from error
    if not (package / "test_modeling_common.py").exists():
        raise ValueError(f"{sdist.name} holds no tests/test_modeling_common.py.")
    if not (package / "__init__.py").exists():
        (package / "__init__.py").write_text(INIT)
    return folder


def make_importable(folder: Path) -> list[str]:
    """Makes `transformers_tests` importable from `folder`, with stubs; gives the names of what is stubbed."""
    sys.path.insert(0, str(folder))
    stubs = {
        "parameterized": {"parameterized": Parameterized},
        "fetch_hub_objects_for_ci": {"url_to_local_path": functools.partial(local_file, folder)},
        f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": {}},
    }
    stubbed = [name for name in stubs if not _exists(name)]
    for name in stubbed:
        parent = name.rpartition(".")[0]
        if parent and parent not in sys.modules and not _exists(parent):
            sys.modules[parent] = ModuleType(parent)
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(stubs[name])
    return stubbed


def local_file(folder: Path, url: str) -> str:
    """A file of the kind that `url` names: an image is made here, what else there is stays where it is."""
    if not url.endswith((".png", ".jpg", ".jpeg")):
        return url
    path = folder / Path(url).with_suffix(".png").name
    if not path.exists():
        pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return str(path)


class Parameterized:
    """What the common tests use of the package `parameterized`: `expand` as a decorator of a method."""

    @staticmethod
    def expand(cases: Iterable[Any]) -> Callable[[Callable], None]:
        """Puts one method a case into the class body, named `<test>_<number>_<first parameter>`."""
        namespace = inspect.currentframe().f_back.f_locals

        def decorate(test: Callable) -> None:
            for number, case in enumerate(cases):
                arguments = tuple(case) if isinstance(case, list | tuple) else (case,)
                suffix = f"_{number}_{arguments[0]}" if isinstance(arguments[0], str) else f"_{number}"
                namespace[test.__name__ + suffix] = _bind(test, arguments)

        return decorate


def _bind(test: Callable, arguments: tuple) -> Callable:
    @functools.wraps(test)
    def method(self):
        return test(self, *arguments)

    del method.__wrapped__  # pytest would read the parameters as fixtures
    return method


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent that is not there either
        return False
