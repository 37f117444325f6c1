"""The command line, run as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def _run(*arguments, **kwargs):
    command = [sys.executable, "-m", "reftlens", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def test_chat_names_a_folder_that_holds_nothing(tmp_path, capsys):
    from reftlens.cli import main

    assert main(["chat", str(tmp_path)]) == 1
    assert "holds no reft.json" in capsys.readouterr().err


def test_a_command_is_required(capsys):
    from reftlens.cli import main

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_writes_what_it_says_and_chat_talks_to_it(tmp_path):
    out = tmp_path / "emoji"
    demo = _run("demo", "--out", out, "--steps", 3, "--quiet")
    assert demo.returncode == 0, demo.stderr
    assert "strength 0: 0 of 10 unseen questions answered mostly in emoji" in demo.stdout
    assert "strength 1:" in demo.stdout and str(out / "loss.png") in demo.stdout
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 10 and set(answers[0]) == {"prompt", "strength 0", "strength 0.5", "strength 1"}
    assert len(json.loads((out / "run.json").read_text())["losses"]) == 3
    chat = _run("chat", out, "--strength", 0, "--max-new-tokens", 4, input="Hello!\nWho are you?\n\n")
    assert chat.returncode == 0, chat.stderr
    assert "the whole conversation as one new prompt" in chat.stdout
    assert chat.stdout.count("> ") == 3


@pytest.mark.slow
def test_the_package_is_a_command():
    found = _run("--help")
    assert found.returncode == 0 and "demo" in found.stdout and "chat" in found.stdout
    assert Path(sys.executable).with_name("reftlens").exists()
