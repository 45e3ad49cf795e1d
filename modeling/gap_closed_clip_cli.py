"""
The command `gap-closed-clip`: one way in, and one place for errors, interrupts and exit codes.

It lies beside the package and not in it, because importing the package takes seconds (torch, transformers): Ctrl-C in
these seconds has to end in one line as well, and `--help` need not wait for them.
"""

import importlib
import os
import re
import sys
from collections.abc import Sequence
from types import ModuleType


# Each command, the module of `gap_closed_clip.commands` that runs it, and its line of help.
COMMANDS = {
    "train": ("train", "train an encoder, adapters for one, or a captioner on one"),
    "eval": ("evaluate", "evaluate models side by side on the same pairs"),
    "center": ("center", "close a trained model's gap without training it"),
    "publish": ("publish", "check a model folder and send it to the Hub in one commit"),
    "export-onnx": ("export_onnx", "export the towers to ONNX"),
}
PROGRAM = "gap-closed-clip"
MOST_LETTERS = 3000  # of an error message
USAGE = f"""\
usage: {PROGRAM} COMMAND ...

Medical CLIP whose image and text embeddings share one space.

commands:
{chr(10).join(f"  {name:13}{line}" for name, (_, line) in COMMANDS.items())}

`{PROGRAM} COMMAND --help` says what a command takes; `{PROGRAM} --version` which version this is.
"""


def main(command: str | None = None, words: Sequence[str] | None = None) -> int:
    """
    Runs a command; returns the exit code: 0, 1 with one line about what is wrong, or 130 after Ctrl-C.

    Args:
        command: one of COMMANDS; by default the first of the words.
        words: the rest of the command line; by default the process's own.
    """
    words = list(sys.argv[1:] if words is None else words)
    if command is None:
        command, *words = words or ["--help"]
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        import importlib.metadata

        print(f"{PROGRAM} {importlib.metadata.version(PROGRAM)}")
        return 0
    if command not in COMMANDS:
        print(f"{PROGRAM}: there is no command {command!r}; there are {', '.join(COMMANDS)}.", file=sys.stderr)
        return 1
    if problem := _started_in_parallel(command):
        print(f"{PROGRAM} {command}: {problem}", file=sys.stderr)
        return 1
    return _run(command, words)


def _run(command: str, words: list[str]) -> int:
    module: ModuleType | None = None
    parsed = None
    try:
        module = importlib.import_module(f"gap_closed_clip.commands.{COMMANDS[command][0]}")
        parsed = module.parse(words)
        module.run(parsed)
    except KeyboardInterrupt:
        state = "" if module is None or parsed is None else f" {module.after_interrupt(parsed)}"
        print(f"\n{PROGRAM} {command}: interrupted.{state}", file=sys.stderr)
        return 130
    except Exception as error:
        if not isinstance(error, ValueError | OSError | ImportError) and not _is_disk_full(error):
            raise
        print(f"{PROGRAM} {command}: {_readable(str(error))}", file=sys.stderr)
        return 1
    return 0


def _readable(message: str) -> str:
    """A message without what a terminal would take for a command, and with words of thousands of letters cut short."""
    message = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in message)
    return re.sub(r"\S{300,}", lambda found: f"{found[0][:80]}...{found[0][-20:]}", message)[:MOST_LETTERS]


def _is_disk_full(error: Exception) -> bool:
    """Whether an error of a library, safetensors or torch, is that of a full disk."""
    from gap_closed_clip.disk import is_disk_full

    return bool(is_disk_full(error))


def _started_in_parallel(command: str) -> str:
    """Why a command that one process does can't be started in several; empty where it isn't."""
    size = os.environ.get("WORLD_SIZE", "1")
    if command == "train" or not size.isdigit() or int(size) < 2:
        return ""
    return (
        f"this is process {os.environ.get('RANK', '?')} of {size}, and all would write the same files. "
        "Start one, without torchrun or accelerate launch."
    )


if __name__ == "__main__":
    sys.exit(main())
