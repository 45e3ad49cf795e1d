"""The command `gap-closed-clip`: what it lists, its errors, exit codes and interrupts, in a process of its own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import gap_closed_clip_cli
from gap_closed_clip_cli import COMMANDS


ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "train": "train.py",
    "eval": "eval.py",
    "center": "center.py",
    "publish": "publish.py",
    "export-onnx": "export_onnx.py",
}


def test_help_lists_the_commands_without_importing_anything_large(capsys):
    code = (
        "import gap_closed_clip_cli, sys; gap_closed_clip_cli.main(None, ['--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'gap_closed_clip')))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == ""
    lines = [line.split(maxsplit=1) for line in process.stdout.splitlines() if line.startswith("  ")]
    assert {name: help_line for name, help_line in lines} == {name: line for name, (_, line) in COMMANDS.items()}
    assert list(COMMANDS) == list(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_command_says_what_it_takes(name, capsys):
    with pytest.raises(SystemExit) as stop:
        gap_closed_clip_cli.main(name, ["--help"])
    output = capsys.readouterr().out
    assert stop.value.code == 0
    assert output.startswith(f"usage: gap-closed-clip {name} ") and f"`python {SCRIPTS[name]}` is the same" in output


def test_an_unknown_command(capsys):
    assert gap_closed_clip_cli.main(None, ["tran", "configs/demo.yaml"]) == 1
    expected = "gap-closed-clip: there is no command 'tran'; there are train, eval, center, publish, export-onnx.\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "nowhere.yaml"), "There is no config file nowhere.yaml."),
        (("eval", "outputs/nowhere/at/all"), "There is no model folder outputs/nowhere/at/all."),
        (("publish", "outputs/demo"), "The following arguments are required: repo_id. See gap-closed-clip publish --"),
        (("publish", "./nowhere", "owner/name", "--dry-run"), "There is no model folder "),
        (("export-onnx", "./nowhere"), "There is no model folder nowhere."),
        (("export-onnx", "owner/name", "--check"), "owner/name is no folder, so name one to write to: "),
        (("export-onnx", "./nowhere", "--tolerance", "much"), "Argument --tolerance: invalid float value: 'much'."),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(command, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*words)
    assert code == 1 and out == "" and err.count("\n") == 1
    assert err.startswith(f"gap-closed-clip {words[0]}: {message}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_of_a_checkout_are_the_commands(name):
    namespace: dict = {"__name__": "script"}
    source = (ROOT / SCRIPTS[name]).read_text(encoding="utf-8")
    exec(source, namespace)
    assert namespace["main"] is gap_closed_clip_cli.main and f'main("{name}")' in source


@pytest.mark.parametrize("imported", ["numpy", "torch.nn", "transformers.configuration_utils"])
def test_an_interrupt_during_the_imports_is_one_line_and_exit_code_130(tmp_path, imported):
    # With -X importtime Python writes a line to stderr whenever a module has been imported.
    command = [sys.executable, "-X", "importtime", "-m", "gap_closed_clip_cli", "train", "output_dir=run"]
    # A suite that a script started in the background ignores SIGINT, and so would what it starts.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    for line in process.stderr:
        if line.rstrip().endswith(f" {imported}"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    rest = [line for line in err.splitlines() if line and not line.startswith("import time:")]
    assert (out, rest) == ("", ["gap-closed-clip train: interrupted."])
    # Python ends itself by the signal where it came inside an exec(): to a shell that is exit code 130 as well.
    assert process.returncode in (130, -signal.SIGINT)
