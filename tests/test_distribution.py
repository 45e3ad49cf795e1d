"""What is in the source distribution and the wheel built from it: all that belongs there, and nothing else."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import gap_closed_clip


ROOT = Path(__file__).parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "shared")
LITTER = (
    "outputs/run/model.safetensors",
    "modeling/gap_closed_clip/model/notes.txt",
    "build/lib/old.py",
    "tests/x.py",
)
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"


def build(kind: str, tree: Path, folder: Path) -> Path:
    """A distribution of the tree, built as pip does without a network."""
    words = [sys.executable, "-c", BUILD, f"build_{kind}", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution of a copy of this tree, with some litter in it, and the wheel that is made of that."""
    folder = tmp_path_factory.mktemp("distributions")
    shutil.copytree(ROOT, folder / "tree", ignore=NOT_COPIED)
    for name in LITTER:
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / name).write_text("litter")
    sdist = build("sdist", folder / "tree", folder)
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # older Pythons have none
        archive.extractall(folder / "unpacked")
    return sdist, build("wheel", folder / "unpacked" / sdist.name.removesuffix(".tar.gz"), folder)


@pytest.fixture(scope="module")
def package() -> set[str]:
    """What belongs to the package, by the way from modeling/."""
    source = ROOT / "modeling"
    python = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
    configs = {f"gap_closed_clip/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert len(python) > 150 and len(configs) > 10
    return python | configs | {"gap_closed_clip/py.typed", "gap_closed_clip/hub/card_template.md"}


def test_the_source_distribution(distributions, package):
    with tarfile.open(distributions[0]) as archive:
        files = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
        links = [member.name for member in archive.getmembers() if not (member.isfile() or member.isdir())]
    pages = {"README.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "LICENSE"}
    made = {"PKG-INFO", "setup.cfg", "pyproject.toml", "MANIFEST.in"}
    about = {file for file in files if file.startswith("modeling/gap_closed_clip.egg-info/")}
    assert files - about == pages | made | {f"modeling/{name}" for name in package}
    assert not links


def test_the_wheel(distributions, package):
    wheel = distributions[1]
    about = f"gap_closed_clip-{gap_closed_clip.__version__}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        metadata = email.message_from_bytes(archive.read(f"{about}METADATA"))
        points = archive.read(f"{about}entry_points.txt").decode()
    described = {f"{about}{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")}
    assert files == package | described | {f"{about}licenses/LICENSE"}
    assert wheel.name == f"gap_closed_clip-{gap_closed_clip.__version__}-py3-none-any.whl"
    assert metadata["Name"] == "gap-closed-clip" and metadata["Version"] == gap_closed_clip.__version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.10"
    assert metadata.get_payload().startswith("# gap-closed-clip\n")
    assert points.split() == ["[console_scripts]", "gap-closed-clip", "=", "gap_closed_clip_cli:main"]
