"""README and pages: their commands parse, their links lead somewhere, and the tree of the design is the one there."""

import importlib
import importlib.util
import re
import shlex
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from conftest import tiny_config
from markdown_pages import PAGES, ROOT, blocks, name_of, prose

import gap_closed_clip
from gap_closed_clip.training import load_config


PACKAGE = Path(gap_closed_clip.__file__).parent
ABOUT = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "space/README.md")]
needs_commands = pytest.mark.skipif(
    importlib.util.find_spec("gap_closed_clip.commands") is None, reason="the commands are not there yet"
)

# The commands.

OTHER_PROGRAMS = {"curl", "echo", "export", "hf", "mypy", "pip", "pre-commit", "pytest", "ruff"}
SCRIPTS = {
    "train.py": "train",
    "eval.py": "eval",
    "center.py": "center",
    "publish.py": "publish",
    "export_onnx.py": "export-onnx",
}


def command_lines(page: Path) -> list[str]:
    """Lines of bash blocks, continued ones joined, and commands inside sentences."""
    lines = [line for code in blocks(page, "bash") for line in re.sub(r"(\\|(?<=\|))\n\s*", " ", code).splitlines()]
    programs = "accelerate|gap-closed-clip|pip install|pytest|python"
    return lines + re.findall(rf"`((?:{programs}) [^`]+ [^`]+)`", prose(page))


def simple_commands(line: str) -> list[list[str]]:
    """The commands that a line joins by `&&` or `|`, without variables that are set for one of them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;"):
            commands.append([])
        elif commands[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            commands[-1].append(word)
    return [words for words in commands if words]


def check_command(program: str, *words: str) -> None:
    """Fails unless there is such a program, and takes such words."""
    if program == "gap-closed-clip":
        commands = importlib.import_module("gap_closed_clip_cli").COMMANDS
        module = importlib.import_module(f"gap_closed_clip.commands.{commands[words[0]][0]}")
        module.parse(list(words[1:]))
    elif program in ("accelerate", "torchrun"):
        rest = list(words)
        if program == "accelerate":
            assert rest.pop(0) == "launch"
        while rest[0].startswith("--"):
            del rest[:2]
        in_wheel = rest[:2] == ["-m", "gap_closed_clip_cli"]
        check_command(*(["gap-closed-clip", *rest[2:]] if in_wheel else ["python", *rest]))
    elif program == "python" and words[0] in SCRIPTS:
        assert f'main("{SCRIPTS[words[0]]}")' in (ROOT / words[0]).read_text(encoding="utf-8")
        check_command("gap-closed-clip", SCRIPTS[words[0]], *words[1:])
    elif program == "python":
        check_script(*words)
    elif program == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE)
        asked = [extra for word in words for group in re.findall(r"\.\[(.+)\]", word) for extra in group.split(",")]
        assert words[0] == "install" and set(asked) <= set(extras)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests"))
    else:
        assert program in OTHER_PROGRAMS, f"What is {program}?"


def check_script(script: str, *words: str) -> None:
    """Its file, its options, its configuration files and the fields that it sets."""
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / script).parent.glob("*.py"))
    assert (ROOT / script).is_file()
    assert all(f'"{word}"' in source for word in words if word.startswith("--"))
    files = [word for word in words if word.endswith(".yaml")]
    fields = [word for word in words if "=" in word]
    if files or fields:
        load_config(files, fields)


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory, tiny_processor) -> Path:
    """Every `outputs/...` that a page names, as a trained model's folder."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "outputs").mkdir()
    model = folder / "a_model"
    gap_closed_clip.GapClosedClipModel(tiny_config()).save_pretrained(model)
    tiny_processor.save_pretrained(model)
    (model / "train_config.yaml").write_text("data: {source: phantoms}\n")
    for page in PAGES + ABOUT:
        for name in set(re.findall(r"outputs/(\w+)", page.read_text(encoding="utf-8"))):
            (folder / "outputs" / name).unlink(missing_ok=True)
            (folder / "outputs" / name).symlink_to(model)
    return folder


@needs_commands
@pytest.mark.parametrize("page", PAGES + ABOUT, ids=name_of)
def test_commands_are_accepted(page, model_folders, monkeypatch):
    monkeypatch.chdir(model_folders)
    for line in command_lines(page):
        for words in simple_commands(line):
            try:
                check_command(*words)
            except Exception as error:
                raise AssertionError(f"{name_of(page)}: {shlex.join(words)}: {error!r}") from error


# The links.

LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]*)\)")
TEMPLATE = PACKAGE / "hub" / "card_template.md"
LINKED = [*PAGES, *ABOUT, *sorted(ROOT.glob("benchmarks/results/*.md"))]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, without marks, hyphens for spaces, numbered where they repeat."""
    found: Counter[str] = Counter()
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(page), flags=re.MULTILINE):
        text = re.sub(r"[`*]", "", LINK.sub(r"\1", heading)).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found[f"{slug}-{found[slug]}" if found[slug] else slug] += 1
    return set(found)


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page):
    for label, target in LINK.findall(re.sub(r"`[^`\n]*`", "code", prose(page))):
        assert label and target, f"{label!r} leads to {target!r}"
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            assert parts.scheme == "https" and re.fullmatch(r"([\w-]+\.)+[a-z]+", parts.netloc), target
            assert parts.netloc != "arxiv.org" or re.fullmatch(r"/abs/\d{4}\.\d{5}", parts.path), target
            continue
        path = Path(*page.parent.parts, parts.path) if parts.path else page
        steps = [part for part in (path, *path.parents) if part != ROOT and part.is_relative_to(ROOT)]
        # GitHub does not follow symbolic links.
        assert path.exists() and path.resolve().is_relative_to(ROOT.resolve()), f"There is no {target}"
        assert not any(step.is_symlink() for step in steps), f"{target} goes through a symbolic link"
        assert not parts.fragment or parts.fragment in anchors(path), f"There is no heading for {target}"


def test_links_inside_the_card_lead_to_its_headings():
    headings = anchors(TEMPLATE)
    targets = [target for _, target in LINK.findall(prose(TEMPLATE)) if target.startswith("#")]
    assert targets and all(target[1:] in headings for target in targets)


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# transformers' own: `a_b`, *ATP* 1:1\n\n```\n# no heading\n```\n\n## Use\n\n## Use\n\n### [Train](x.md) it\n"
    )
    assert anchors(page) == {"transformers-own-a_b-atp-11", "use", "use-1", "train-it"}


def test_every_page_and_image_is_within_reach():
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in LINKED
        for _, target in LINK.findall(prose(page))
    }
    pages = {page.resolve() for page in [*PAGES, *ABOUT, *ROOT.glob("*.md"), *ROOT.glob("benchmarks/results/*.md")]}
    images = {image.resolve() for image in (ROOT / "model_card").iterdir()}
    assert pages | images <= linked


# The house.


@needs_commands
def test_the_tree_of_the_design_is_the_one_that_is_there():
    (tree,) = [code for code in blocks(ROOT / "docs" / "design.md", "") if "pyproject.toml" in code]
    named, folders = set(), [ROOT]
    for line in tree.splitlines():
        indent, name, rest = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        del folders[len(indent) // 2 + 1 :]
        path = folders[-1] / name
        assert path.exists(), f"There is no {path.relative_to(ROOT)}"
        folders.append(path)
        named |= {path, *(path.parent / other for other in re.findall(r"\w+\.py", rest))}
    files = {
        file for room in ("model", "data", "training", "evaluation", "hub") for file in (PACKAGE / room).glob("*.py")
    }
    missing = {file.relative_to(PACKAGE).as_posix() for file in files - named if file.name != "__init__.py"}
    assert not missing, f"docs/design.md does not name {sorted(missing)}"


def test_parts_import_only_what_stands_before_them():
    text = " ".join(prose(ROOT / "docs" / "design.md").split())
    order = re.findall(r"`(\w+)`", text.partition("before it here, which a test checks: ")[2].partition(".")[0])
    assert {"model", "data", "metrics", "evaluation", "training", "hub"} <= set(order)
    for file in PACKAGE.rglob("*.py"):
        part, *_ = steps = file.relative_to(PACKAGE).with_suffix("").parts
        if part == "__init__":
            continue
        dots = r"\." * len(steps)
        imported = re.findall(rf"^ *from {dots}(\w+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        later = set(imported) - set(order[: order.index(part)])
        assert not later, f"{file.relative_to(PACKAGE)} imports {', '.join(later)}"


@needs_commands
def test_the_test_command_is_the_same_everywhere():
    (command,) = [line for line in command_lines(ROOT / "README.md") if "pytest" in line]
    assert command in command_lines(ROOT / "CONTRIBUTING.md")
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace(" --quiet", "")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in workflow["jobs"].items()}
    assert ".ci/run" in steps["test"] and command.rpartition(" && ")[2] in steps["lower-bounds"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert [hook["entry"].split()[:2] for hook in hooks] == [["ruff", "check"], ["ruff", "format"], ["mypy"]]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"] == "gap-closed-clip"
    assert citation["version"] == gap_closed_clip.__version__ and citation["authors"][0]["name"]
    papers = [reference["identifiers"][0]["value"] for reference in citation["references"]]
    assert papers == ["arXiv:2602.20046", "arXiv:2601.18525"]
    assert all(reference["authors"] and reference["title"] for reference in citation["references"])
