"""SIGKILLs at random moments of training and publishing; the same command goes on each time, to the same weights.

    python benchmarks/kills.py                  # 50 kills; benchmarks/results/kills_*.md
    python benchmarks/kills.py --kills 10 --work outputs/kills-10

A tiny model trains on phantoms: its frozen text tower's features are embedded once, checkpoints are written and
evaluations made every second step, the model folder, its evaluation and its card are written at the end, and the
folder is published to a Hub on this machine. Each process is forked from one that has imported everything. It is
killed at a random moment of a phase, one phase after another in their turn, twice a run, and started again by the very
same command (resume_from_checkpoint=auto; publish) until it ends by itself. Then everything is compared with an
unbroken run: weights bit by bit, names of the files left, the folder on the Hub. This program, too, may be killed and
started again: it goes on counting in --work. For Linux.
"""

import argparse
import hashlib
import json
import math
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"
TESTS = Path(__file__).parent.parent / "tests"
PHASES = ("loading", "embedding", "training", "checkpoint", "evaluation", "saving", "card", "publishing")
CONFIG = """
model:
  vision:
    architecture: eva02_tiny_patch14_224
    model_args: {img_size: 28, embed_dim: 48, depth: 1, num_heads: 3}
  text: {hidden_size: 48, num_hidden_layers: 1, num_attention_heads: 3, intermediate_size: 64, vocab_size: 300}
  freeze_text: true
  projection_dim: 16
data:
  phantom_train_pairs: 160
  phantom_validation_pairs: 12
  phantom_test_pairs: 12
  phantom_size: 32
training:
  max_steps: 12
  per_device_train_batch_size: 8
  per_device_eval_batch_size: 8
  save_strategy: steps
  save_steps: 2
  save_total_limit: 2
  eval_strategy: steps
  eval_steps: 2
  eval_grouping: false
  final_split: test
  resume_from_checkpoint: auto
  use_cpu: true
  disable_tqdm: true
  report_to: none
"""


class Run:
    """
    A folder in which one run after another is started, killed and started again.

    Args:
        work: holds the runs' folders and the count so far.
    """

    def __init__(self, work: Path):
        self.work = work
        self.phase = mmap.mmap(-1, 1)  # shared with the process that trains, which notes there what it is about
        (work / "kills.yaml").write_text(CONFIG)

    def words(self, command: str, name: str) -> list[str]:
        folder = self.work / name
        if command == "publish":
            return [str(folder / "model"), "tester/kills"]
        settings = {"output_dir": folder / "model", "feature_cache": folder / "cache"}
        return [str(self.work / "kills.yaml"), *(f"{key}={value}" for key, value in settings.items())]

    def start(self, command: str, name: str) -> int:
        """Forks a process that does the command; returns its id."""
        self.phase[0] = 0
        process = os.fork()
        if process:
            return process
        (self.work / name).mkdir(exist_ok=True)
        log = os.open(self.work / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            self._note_phases()
            import gap_closed_clip_cli

            code = gap_closed_clip_cli.main(command, self.words(command, name))
        finally:
            os._exit(code)

    def _note_phases(self) -> None:
        from gap_closed_clip.commands import publish, train
        from gap_closed_clip.training import build, run
        from gap_closed_clip.training.checked_trainer import CheckedTrainer

        places = [
            (build, "embed_pairs_once", "embedding"),
            (run, "fit", "training"),
            (CheckedTrainer, "_save_checkpoint", "checkpoint"),
            (CheckedTrainer, "evaluate", "evaluation"),
            (run, "evaluate", "evaluation"),
            (run, "save_model_folder", "saving"),
            (train, "write_card", "card"),
            (publish, "publish", "publishing"),
        ]
        for owner, name, phase in places:
            setattr(owner, name, self._noted(getattr(owner, name), PHASES.index(phase)))

    def _noted(self, function, number: int):
        def call(*args, **kwargs):
            before = self.phase[0]
            self.phase[0] = number
            try:
                return function(*args, **kwargs)
            finally:
                self.phase[0] = before

        return call

    def durations(self, process: int) -> dict[int, list[float]]:
        """Watches a process to its end: how long each phase took, each time."""
        found: dict[int, list[float]] = {}
        phase, began = self.phase[0], time.monotonic()
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if self.phase[0] != phase or ended:
                found.setdefault(phase, []).append(time.monotonic() - began)
                phase, began = self.phase[0], time.monotonic()
            if ended:
                assert status == 0, f"The unbroken run failed; see {self.work / 'log.txt'}."
                return found
            time.sleep(0.0005)

    def kill(self, process: int, phase: int, wait: float, skip: int) -> tuple[str | None, int]:
        """
        Kills a process so many seconds into a phase, the first or a later time that it comes there.

        Returns:
            the phase that it was killed in, or None and the exit code where it ended before.
        """
        until, seen, before = None, -1, -1
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return None, os.waitstatus_to_exitcode(status)
            now = self.phase[0]
            if now == phase and before != phase:
                seen += 1
            before = now
            if until is None and now == phase and seen >= skip:
                until = time.monotonic() + wait
            if until is not None and time.monotonic() >= until:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                return PHASES[self.phase[0]], -signal.SIGKILL
            time.sleep(0.0005)


def left(folder: Path) -> dict[str, str]:
    """What a run leaves: {file: digest}, where every run's is the same; {file: ""} of others."""
    names = sorted(path for path in folder.rglob("*") if path.is_file())
    same = (".safetensors", ".py", "tokenizer.json", "digests.bin")
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.name.endswith(same)
        else ""
        for path in names
    }


def published(url: str) -> dict[str, str]:
    """{file: its id} in the repository on the Hub."""
    import huggingface_hub

    api = huggingface_hub.HfApi(endpoint=url)
    entries = api.list_repo_tree("tester/kills", recursive=True)
    return {entry.path: entry.blob_id for entry in entries if hasattr(entry, "blob_id")}


def serve() -> None:
    """The Hub, in a process of its own: prints its address and stays until it is ended."""
    sys.path.insert(0, str(TESTS))
    from hub.loopback_hub import LoopbackHub

    print(LoopbackHub().url, flush=True)
    sys.stdin.read()


class Count:
    """What has been found so far, in a file: this program may be killed as well."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, Any] = {"kills": {}, "finished": 0, "starts": 0, "faults": [], "staging": 0}
        if path.is_file():
            self.found = json.loads(path.read_text())

    @property
    def kills(self) -> int:
        return sum(self.found["kills"].values())

    def save(self) -> None:
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(self.found))
        os.replace(draft, self.path)


def go_on(run: Run, count: Count, wanted: int, durations: dict[str, dict[int, list[float]]], chance, url: str) -> None:
    """Run after run until there are as many kills as wanted, each killed up to twice in the phase whose turn it is."""
    reference = left(run.work / "unbroken")
    on_hub = published(url)
    while count.kills < wanted:
        name, phase = f"run-{count.found['finished']}", count.found["finished"] % len(PHASES)
        for command, lasts in durations.items():
            times = len(lasts.get(phase, []))
            for skip in [chance.randrange(times // 2 + 1), 0] if times else []:  # what is resumed has less before it
                if _ended(run, count, command, name, phase, chance.random() * max(lasts[phase]), skip):
                    break
            _ended(run, count, command, name, phase, math.inf, 0)
        compare(count, name, reference, left(run.work / name))
        if published(url) != on_hub:
            count.found["faults"].append(f"{name}: other files on the Hub")
        count.found["finished"] += 1
        count.save()
        shutil.rmtree(run.work / name)


def _ended(run: Run, count: Count, command: str, name: str, phase: int, wait: float, skip: int) -> bool:
    """Starts the command, and whether it came to its end before it was killed."""
    killed, code = run.kill(run.start(command, name), phase, wait, skip)
    count.found["starts"] += 1
    if killed is not None:
        count.found["kills"][killed] = count.found["kills"].get(killed, 0) + 1
        print(f"{count.kills}: killed in {killed}", flush=True)
    elif code:
        count.found["faults"].append(f"{name}: {command} ended with {code}")
    count.save()
    if code and killed is None:
        raise SystemExit(f"{name}: {command} ended with {code}; see {run.work / 'log.txt'}.")
    return killed is None


def compare(count: Count, name: str, reference: dict[str, str], found: dict[str, str]) -> None:
    for path in sorted({**reference, **found}):
        if path not in found:
            count.found["faults"].append(f"{name}: {path} is missing")
        elif path not in reference:
            count.found["faults"].append(f"{name}: {path} is litter")
        elif reference[path] != found[path]:
            count.found["faults"].append(f"{name}: {path} differs")


def report(count: Count) -> str:
    """The table in Markdown."""
    kills = Counter(count.found["kills"])
    rows = [f"| {phase} | {kills[phase]} |" for phase in PHASES if kills[phase]]
    found = count.found
    faults = [f"- {fault}" for fault in found["faults"]] or [
        "None: no weights differ, no file more or less, no refusal."
    ]
    return "\n".join(
        [
            "# Killed at random moments, and started again by the same command",
            "",
            f"{count.kills} SIGKILLs in {found['finished']} runs that were trained and published to their end "
            f"({found['starts']} starts), on {os.cpu_count()} CPU cores: `python benchmarks/kills.py --kills "
            f"{count.kills}`.",
            "",
            "| killed during | times |",
            "| --- | ---: |",
            *rows,
            f"| together | {count.kills} |",
            "",
            "Compared with an unbroken run at the end of each: all weights and the tokenizer bit by bit, in the model "
            "folder and in its checkpoints; the names of all files in the model folder and the cache of features; all "
            "files on the Hub.",
            "",
            "Faults:",
            "",
            *faults,
            "",
            f"Folders that killed publications left in the system's folder for temporary files: {found['staging']}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("outputs/kills"), help="where runs and counts are kept")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    work = args.work.resolve()
    (work / "tmp").mkdir(parents=True, exist_ok=True)
    hub = subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    url = hub.stdout.readline().strip()  # type: ignore[union-attr]
    os.environ.update(HF_ENDPOINT=url, HF_TOKEN="hf_loopback", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    os.environ.update(HF_HUB_OFFLINE="0", OMP_NUM_THREADS="1", TMPDIR=str(work / "tmp"), HF_HOME=str(work / "home"))
    try:
        for name in ("publish", "train", "evaluate"):
            __import__(f"gap_closed_clip.commands.{name}")
        run, count = Run(work), Count(work / "count.json")
        shutil.rmtree(work / "unbroken", ignore_errors=True)
        durations = {command: run.durations(run.start(command, "unbroken")) for command in ("train", "publish")}
        for command, lasts in durations.items():
            print(command, {PHASES[number]: (len(each), round(sum(each), 2)) for number, each in lasts.items()})
        go_on(run, count, args.kills, durations, random.Random(args.seed + count.kills), url)
        count.found["staging"] = len(list((work / "tmp").iterdir()))
        count.save()
    finally:
        hub.kill()
    (RESULTS / f"kills_cpu-{os.cpu_count()}-cores.md").write_text(report(count))
    print(report(count))
    if count.found["faults"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
