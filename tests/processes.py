"""
Python processes for tests: they begin as forks of one that has imported torch and the like, which is most of what a
new one does, and are otherwise as new: their own environment, folder, path and `__main__`.
"""

import atexit
import gc
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType


# Of these nothing depends on the environment at import, as it does of huggingface_hub and what imports it.
IMPORTED_BEFORE = ["torch", "torchvision", "torch._dynamo", "sklearn.metrics", "sklearn.covariance", "scipy.stats"]
IMPORTED_BEFORE += ["pandas", "pyarrow.parquet", "PIL.Image", "matplotlib.figure", "matplotlib.backends.backend_agg"]


class PythonProcess:
    """
    `python *words` in a process of its own, which has begun.

    Args:
        words: a script or `-c` and code, and arguments.
        environment: all of it.
        folder: where it runs.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], folder: str | Path = "."):
        self.words = list(words)
        self._files = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._files.name) / name for name in ("stdout", "stderr")]
        arguments = (self.words, dict(environment), str(folder), _path_of_new_processes(), self._outputs)
        self._process = _context().Process(target=_run, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    def printed(self) -> str:
        """What it has written to stdout so far."""
        return _read(self._outputs[0])

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """
        Raises:
            subprocess.TimeoutExpired: it takes longer, in seconds; it is then killed.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self.words, timeout, *map(_read, self._outputs))
        with self._files:
            return subprocess.CompletedProcess(self.words, self._process.exitcode, *map(_read, self._outputs))


def run_in_processes(script: str, folder: Path, number: int) -> None:
    """Runs `python script folder` in that many processes, with the variables that `init_process_group` reads."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(number),
    }
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    processes = [PythonProcess([script, str(folder)], environment | rank) for rank in ranks]
    try:
        ended = [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in ended] == [0] * number, "\n".join(process.stderr for process in ended)


@cache
def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_BEFORE)
    return context


@cache
def _path_of_new_processes() -> list[str]:
    """`sys.path` of a new process but for its first entry and those of PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import json, sys; print(json.dumps(sys.path[1:]))"
    return json.loads(subprocess.check_output([sys.executable, "-c", code], env=environment))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _run(words: list[str], environment: dict[str, str], folder: str, path: list[str], outputs: Sequence[Path]) -> None:
    """What the forked process does; it ends here, with the exit code that Python would end with."""
    gc.freeze()  # what is imported is no garbage, and its memory stays shared with the other processes
    for descriptor, output in enumerate(outputs, start=1):
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    first = "" if words[0] == "-c" else str(Path(words[0]).resolve().parent)
    given = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [first, *given, *path]
    sys.argv[:] = words if words[0] != "-c" else ["-c", *words[2:]]
    code = 0
    try:
        _execute(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)  # as Python does
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _execute(words: list[str]) -> None:
    if "OMP_NUM_THREADS" in os.environ:  # read by torch when it was imported
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    if words[0] == "-c":
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        runpy.run_path(words[0], run_name="__main__")
