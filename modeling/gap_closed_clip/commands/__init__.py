"""
What `gap-closed-clip COMMAND` does, a module a command, each with three functions:

- `parse(words)`: the command line, checked;
- `run(parsed)`: the work; what it raises as ValueError, OSError or ImportError is for the user, in one line;
- `after_interrupt(parsed)`: the state that Ctrl-C leaves behind, in a sentence.

The wrapper around them is `gap_closed_clip_cli`, beside the package.
"""

import argparse
import ctypes
import os
import platform
from typing import NoReturn

import torch


# Numbers of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


class CommandParser(argparse.ArgumentParser):
    """argparse, whose errors are exceptions: the command's wrapper prints them in one line."""

    def __init__(self, command: str, description: str | None):
        super().__init__(
            prog=f"gap-closed-clip {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")

    def parse_words(self, words: list[str], metavar: str, at_least_one: bool = False) -> list[str]:
        """
        The command line of a command that takes words (names, files, `key=value`) and no options.

        Raises:
            ValueError: an option, with what to write instead.
        """
        self.add_argument("words", nargs="+" if at_least_one else "*", metavar=metavar)
        parsed, options = self.parse_known_args(words)
        if options:
            key, _, value = options[0].lstrip("-").partition("=")
            following = words[words.index(options[0]) + 1 :][:1]
            if not value and following and "=" not in following[0]:
                value = following[0]
            instead = value if value.endswith(".yaml") else f"{key.replace('-', '_')}={value or 'true'}"
            raise ValueError(f"There is no option {options[0]}: write {instead}.")
        return parsed.words


def keep_freed_memory() -> None:
    """
    Has the C library keep the memory that a tensor leaves for the next one, which without this takes a third of the
    time of a convolutional tower on CPUs: blocks above 32 MB would go back to the system each time, and be handed out
    again, zeroed, page by page. The process then occupies its peak to its end.

    Does something under glibc (Linux) alone, and nothing where there is a GPU or where the environment has settings of
    its own (MALLOC_...).
    """
    if torch.accelerator.is_available() or any(name.startswith("MALLOC_") for name in os.environ):
        return
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


__all__ = ["CommandParser", "keep_freed_memory"]
