"""YAML as configurations have it: `1e-3` is a number, `no` a text, and no key is there twice."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


MOST_VALUES = 100_000  # of a file, once its aliases are written out: a few lines of them can stand for billions


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string, and the `no` of save_strategy=no as false; everybody means the other."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(problem=f"the key {name!r} is there twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """
    The value that a text in YAML describes.

    Raises:
        ValueError: it is no YAML, names a key twice, or stands for too much; with the reason in one line.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("its values lie too deep inside one another") from None
    except (TypeError, AttributeError, KeyError) as error:  # yaml's own, of values that are not what their tags say
        raise ValueError(f"a value is not of the kind that its tag says ({error})") from error
    for number, _ in enumerate(_values(value)):
        if number > MOST_VALUES:
            raise ValueError(f"it stands for more than {MOST_VALUES:,} values (an alias inside itself, or of aliases)")
    return value


def read_yaml(path: Path) -> Any:
    """
    The value that a file in YAML describes.

    Raises:
        ValueError: as `parse_yaml`, or it is not in UTF-8; with the file.
        OSError: it can't be read.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is not in UTF-8 (line {line}): save it in that encoding.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def _values(value: Any) -> Iterator[Any]:
    """Every value inside a value; without end where one holds itself."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        yield value
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value


__all__ = ["MOST_VALUES", "parse_yaml", "read_yaml"]
