"""One run, one folder: a lock that says who holds it, and that a killed run does not leave behind for long."""

import getpass
import json
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers.utils import logging

from ..checkpoint import check_writable


logger = logging.get_logger(__name__)

LOCK_FILE = ".run.lock"
BEAT_SECONDS = 30.0
# Of a run on another machine, whose processes can't be asked for: after so long without a beat it is over.
STALE_SECONDS = 600.0


class RunLock:
    """
    Held in a run's output folder as long as the run lasts; a context manager.

    The lock of a process of this machine that is no longer there is taken over at once. Of another machine's it is
    taken over when its file has not been touched for `STALE_SECONDS`; a run touches its own every `BEAT_SECONDS`.

    Args:
        folder: the output folder; it is made.

    Raises (when it is entered):
        ValueError: another run holds the folder; the message says who.
        OSError: the folder can't be written to.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / LOCK_FILE
        self._over = threading.Event()
        self._owner = {
            "user": _user(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "began": _began(os.getpid()),
        }

    def __enter__(self) -> "RunLock":
        check_writable(self.folder, "training.output_dir")
        self._made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f"{LOCK_FILE}.{self._owner['host']}.{self._owner['process']}"
        draft.write_text(json.dumps(self._owner) + "\n", encoding="utf-8")
        try:
            for _ in range(10):  # times that another process may be quicker
                try:
                    _create_as(draft, self.path)
                except FileExistsError:
                    self._remove_stale(draft)
                else:
                    break
            else:
                raise ValueError(f"training.output_dir {self.folder}: several runs start there at once. Try again.")
        finally:
            draft.unlink(missing_ok=True)
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        if self._read() == self._owner:
            self.path.unlink(missing_ok=True)
        if self._made and error is not None:
            with suppress(OSError):  # something is in it
                self.folder.rmdir()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:  # a disk that is gone for a while, or a folder that somebody removed
                continue

    def _read(self) -> dict[str, Any] | None:
        """Who holds the folder; None where nobody does, {} where the file says nothing."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _remove_stale(self, draft: Path) -> None:
        """
        Raises:
            ValueError: the run that holds the folder goes on.
        """
        owner = self._read()
        if owner is None:
            return
        if not _is_over(owner, self.path, draft):
            who = f"user {owner.get('user')}, process {owner.get('process')} on {owner.get('host')}"
            raise ValueError(
                f"training.output_dir {self.folder} is in use by another run ({who}). Wait for it, stop it, or name "
                f"another folder. (If there is no such run any more, delete {self.path}.)"
            )
        # Under a name of its own: of several that try, one moves the very file that was found stale.
        moved = draft.with_name(draft.name + ".stale")
        try:
            os.rename(self.path, moved)
        except FileNotFoundError:
            return
        moved.unlink(missing_ok=True)
        logger.warning(f"{self.folder} was held by a run that is over; this one takes its place.")


def _create_as(draft: Path, path: Path) -> None:
    """Creates the file as a whole with the draft's content; of several that try at once, one succeeds."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        with open(path, "x", encoding="utf-8") as file:
            file.write(draft.read_text(encoding="utf-8"))


def _is_over(owner: dict[str, Any], lock: Path, draft: Path) -> bool:
    if owner.get("host") == socket.gethostname() and isinstance(owner.get("process"), int):
        began = _began(owner["process"])
        return began is None or (owner.get("began") is not None and began != owner["began"])
    try:
        os.utime(draft)
        # Both times are the file server's, whatever this machine's clock says.
        return draft.stat().st_mtime - lock.stat().st_mtime > STALE_SECONDS
    except FileNotFoundError:
        return False


def _began(process: int) -> str | None:
    """When a process of this machine began, in the system's own words; "" where it can't tell, None without one."""
    try:
        # The 22nd field; the second is the program's name in brackets, which may hold anything.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except (OSError, OverflowError, ValueError):
        return ""
    return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, in a container
        return "unknown"


__all__ = ["LOCK_FILE", "RunLock"]
