"""The command line, run as a user runs it."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import architectures


def _run(*arguments, **kwargs):
    command = [sys.executable, "-m", "reftlens", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def test_chat_names_a_folder_that_holds_nothing(tmp_path, capsys):
    from reftlens.__main__ import main

    assert main(["chat", str(tmp_path)]) == 1
    assert "holds no reft.json" in capsys.readouterr().err


def test_a_command_is_required(capsys):
    from reftlens.__main__ import main

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


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_the_work_is_saved_and_told_whatever_the_console_can_write(tmp_path, monkeypatch, encoding):
    """With no `errors=` of its own, as Python's console has none."""
    from reftlens import __main__ as cli

    model = architectures.fresh_bridge("llama")
    monkeypatch.setattr(cli, "load_model", lambda *args, **kwargs: model)
    monkeypatch.setattr(cli.emoji, "questions", lambda: ["the cat 😀?", "a → dog"])
    monkeypatch.setattr(cli.emoji, "DECODING", cli.Decoding(max_new_tokens=2))
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    out = tmp_path / "emoji"

    def run(model, seed, *, config, progress):
        assert not out.exists()
        reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(architectures.D, rank=1)})
        return reft, rl.fit(reft, model, rl.encode(model, [rl.Example("a", " cat")]), steps=1, progress=False)

    import reftlens as rl

    monkeypatch.setattr(cli.emoji, "run", run)
    assert cli.main(["demo", "--out", str(out), "--quiet"]) == 0
    assert {"reft.json", "answers.jsonl", "loss.png", "README.md"} <= {p.name for p in out.iterdir()}
    monkeypatch.setattr("builtins.input", lambda prompt: next(replies))
    monkeypatch.setattr(cli, "stream", lambda *args, **kwargs: iter(["🍎 → "]))
    replies = iter(["hello", ""])
    assert cli.main(["chat", str(out)]) == 0
    console.flush()
    shown = console.buffer.getvalue().decode(encoding)
    assert "strength 1: 0 of 2" in shown and ("→" in shown) is (encoding == "utf-8")


@pytest.mark.slow
def test_what_the_library_refuses_is_said_in_a_sentence(monkeypatch, capsys):
    from reftlens import __main__ as cli
    from reftlens.errors import HookNotFound, NotFinite, TrainingDiverged

    for error in (HookNotFound("no hook"), NotFinite("a NaN"), TrainingDiverged("at step 3")):
        monkeypatch.setattr(cli, "run_demo", lambda options, error=error: (_ for _ in ()).throw(error))
        assert cli.main(["demo"]) == 1
        assert capsys.readouterr().err == f"reftlens: {error}\n"


def test_the_package_is_a_command():
    found = _run("--help")
    assert found.returncode == 0 and "demo" in found.stdout and "chat" in found.stdout
    assert Path(sys.executable).with_name("reftlens").exists()


def test_a_search_saves_what_it_recommends(tmp_path, monkeypatch, capsys):
    import reftlens as rl
    from reftlens import __main__ as cli

    model = architectures.fresh_bridge("llama")
    monkeypatch.setattr(cli, "load_model", lambda *arguments, **settings: model)
    words = ("cat", "dog", "moon", "hill", "mat", "green", "ran", "sat")
    rows = [
        {"prompt": f"the {a} and the {b} by the {c}", "completion": " a"} for a in words for b in words for c in words
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows[::3]))
    space = rl.selection.Space(layers=(1,), positions=("last",), ranks=(1,), lrs=(1e-2,), strengths=(1.0,))
    monkeypatch.setattr(cli, "search", lambda *arguments, **settings: rl.search(*arguments, space=space, **settings))
    out, names = tmp_path / "out", {}
    asked = ["search", str(file), "--out", str(out), "--among", " a", " the", "--quiet", "--steps"]
    assert cli.main([*asked, "2"]) == 0
    assert "test" in capsys.readouterr().out and (out / "search.csv").read_text().count("\n") == 4
    monkeypatch.setattr(rl, "load_model", cli.load_model)
    exec((out / "search.py").read_text(), names)
    assert len(names["data"].answers) == 2 and len(names["run"].losses) == 2
    (saved,), (again,) = ([module for _, module in reft.items()] for reft in (rl.load(out, model), names["reft"]))
    assert torch.allclose(saved.b, again.b, rtol=1e-4)  # seeds were trained in shared passes, in float32
    assert cli.main([*asked, "3"]) == 1
    assert "belongs to another search, its settings differ" in capsys.readouterr().err


def test_what_cannot_be_searched_is_said_in_a_sentence(tmp_path, monkeypatch, capsys):
    """Not in a traceback; of the file alone before a model is loaded."""
    from reftlens import __main__ as cli

    monkeypatch.setattr(cli, "load_model", lambda *arguments, **settings: architectures.bridge("llama"))
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(json.dumps({"prompt": f"a cat {i}", "completion": " a"}) for i in range(9)))
    out = ["--out", str(tmp_path / "out"), "--quiet"]
    for asked, message in (([], "dev row(s)"), (["--among", " a"], "expected two or more")):
        assert cli.main(["search", str(few), *out, *asked]) == 1
        assert message in capsys.readouterr().err
    monkeypatch.delattr(cli, "load_model")
    (tmp_path / "text.jsonl").write_text("no json")
    for file, message in (("text.jsonl", "is not JSON"), (".", "is a folder"), ("none", "No such file")):
        assert cli.main(["search", str(tmp_path / file), *out]) == 1
        said = capsys.readouterr().err
        assert said.startswith("reftlens: ") and message in said and said.count("\n") == 1
