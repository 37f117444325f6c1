"""Importing, loading a folder, training and writing start no process and open no connection."""

import json
import subprocess
import sys

import pytest

import architectures

GUARD = """
import sys
seen, watching = [], True
def watch(event, arguments):
    if not watching:
        return
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
        if "ldconfig" in str(arguments[0]):
            return  # trio, which selenium brings and httpx imports, asks where a library is
        seen.append(f"{event} {arguments}"[:200])
sys.addaudithook(watch)
"""
WORK = """
import json, torch, reftlens as rl
model = rl.load_model(FOLDER, progress=False)
reft = rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(32, rank=2)})
data = rl.encode(model, [rl.Example("the cat sat", " on the mat"), rl.Example("a dog", " ran")])
rl.fit(reft, model, data, steps=2, progress=False)
rl.generate(reft, model, ["the cat"], rl.Decoding(max_new_tokens=3))
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as transformers stores it."""
    path = tmp_path_factory.mktemp("model")
    architectures.hf_model("llama").save_pretrained(path)
    architectures.tokenizer().save_pretrained(path)
    return path


def events(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", GUARD + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_work_starts_no_process_and_opens_no_connection(folder, capsys):
    names = {}
    try:
        exec(GUARD + WORK.replace("FOLDER", repr(str(folder))), names)
    finally:
        names["watching"] = False  # a hook of this kind stays for good
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == []


@pytest.mark.slow
def test_no_process_is_started_and_no_connection_opened(folder):
    """In a process of its own, so that importing is part of it."""
    assert events(WORK.replace("FOLDER", repr(str(folder)))) == []


@pytest.mark.parametrize(
    "deed",
    [
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "import socket; s = socket.socket(); s.settimeout(0.1); s.connect_ex(('127.0.0.1', 9))",
    ],
)
def test_the_guard_sees_each(deed):
    assert len(events(f"{deed}\nimport json; print(json.dumps(seen))")) >= 1
