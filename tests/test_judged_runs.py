"""Two runs compared on the command line by a judge that prefers the longer text; its replies are stored."""

import json
import sys

import pytest
from judge_server import longer, serving

ROWS = {3: ("short", "much longer"), 5: ("the longer one", "one"), 8: ("same", "size"), 9: ("words and words", "word")}
"""By number of the row the texts of two runs: two wins, a loss, a tie."""


@pytest.fixture
def server():
    with serving() as served:
        yield served


def write(folder, name, rows, way=None, **details):
    """A finished run of so many texts, and one row of which a number is reported."""
    from reftlens.experiments.runs.records import Prediction, RunFolder

    run = RunFolder(folder / name / "seed-0")
    run.begin({"recipe": "instruct", "part": "mix", "method": name, "seed": 0})
    given = {} if way is None else {way: "yes"}
    told = {i: {"fits": False} if t is None else {"instruction": f"Say {i}.", "text": t} for i, t in rows.items()}
    run.add(Prediction("ultrafeedback", i, "gold", given, details={**told[i], **details}) for i in rows)
    run.add([Prediction("ultrafeedback, test", 3, "gold", {}, {"log-probability": -1.0})])
    run.finish({})
    return run.path


@pytest.fixture
def runs(tmp_path):
    return [
        write(tmp_path, name, {i: pair[k] for i, pair in ROWS.items()}) for k, name in enumerate(("loreft", "base"))
    ]


def judge(server, runs, file, *more):
    from reftlens.__main__ import main

    where = ["--endpoint", f"http://127.0.0.1:{server.server_port}/v1", "--model", "small", "--out", str(file)]
    return main(["judge", *map(str, runs), *where, "--quiet", *more])


def test_two_runs_are_compared_in_both_orders_and_rated_again_without_asking(
    runs, server, tmp_path, capsys, monkeypatch
):
    from reftlens.experiments.judges.duels import duels_in
    from reftlens.experiments.judges.judging import rate_of

    monkeypatch.setenv("OPENAI_API_KEY", "not for this server")
    assert judge(server, runs, tmp_path / "judged.jsonl") == 0
    said = capsys.readouterr().out
    assert "loreft (seed 0) against base (seed 0), judged by small, temperature 0, at most 512 tokens" in said
    assert "win rate 0.62" in said and "over 4 of 4 pairs, 8 replies: 2 ties, 0 not read" in said
    assert len(server.asked) == 8 and {key for _, key, _ in server.asked} == {"Bearer none"}
    lines = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert [(line["index"], line["swapped"]) for line in lines] == [(i, s) for i in ROWS for s in (False, True)]
    assert all(
        longer(line["question"]) == line["reply"] and f"Say {line['index']}." in line["question"] for line in lines
    )
    assert rate_of(duels_in(tmp_path / "judged.jsonl")).rate.value == 0.625
    assert judge(server, runs[::-1], tmp_path / "other.jsonl", "--workers", "4") == 0
    assert "win rate 0.38" in capsys.readouterr().out and len(server.asked) == 16
    assert judge(server, runs, tmp_path / "judged.jsonl") == 0 and len(server.asked) == 16, "nothing is asked again"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("cut", [False, True])
def test_a_comparison_that_was_killed_goes_on_behind_the_last_reply(runs, server, tmp_path, capsys, cut):
    file = tmp_path / "judged.jsonl"
    server.failures += [200] * 5 + [404]
    assert judge(server, runs, file) == 1 and "gave no reply" in capsys.readouterr().err
    assert len(file.read_text().splitlines()) == 5
    if cut:
        file.write_bytes(file.read_bytes()[:-9])
    assert judge(server, runs, file, "--limit", "3") == 0
    assert "over 3 of 3 pairs" in capsys.readouterr().out and len(server.asked) == 6 + 1 + cut
    assert judge(server, runs, file) == 0 and len(server.asked) == 6 + 3 + cut
    assert "win rate 0.62" in capsys.readouterr().out
    assert judge(server, runs, file, "--limit", "1") == 0 and "over 1 of 1 pair," in capsys.readouterr().out


def test_what_is_not_read_and_what_has_no_text_is_counted(runs, server, tmp_path, capsys):
    server.reply = lambda question: "I cannot say." if "size" in question else longer(question)
    short = write(tmp_path, "short", {i: None if i == 3 else ROWS[i][1] for i in ROWS})
    assert judge(server, [runs[0], short], tmp_path / "judged.jsonl") == 0
    said = capsys.readouterr().out
    assert "win rate 1.00" in said and "over 2 of 3 pairs, 6 replies: 0 ties, 2 not read" in said
    assert "left out, without a text of both: 1" in said


@pytest.mark.parametrize("content", ['{\n "recipe": "instruct"\n}', "a note"])
def test_a_file_that_holds_something_else_is_refused_and_left_as_it_is(runs, server, tmp_path, capsys, content):
    (tmp_path / "config.json").write_text(content)
    assert judge(server, runs, tmp_path / "config.json") == 1 and "is no reply of a judge" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == content and not server.asked


def test_a_reply_cut_in_the_middle_of_a_character_is_stored_and_read_again(runs, server, tmp_path, capsys):
    server.reply = lambda question: longer(question) + " \ud83d"
    assert judge(server, runs, tmp_path / "judged.jsonl") == 0
    said = capsys.readouterr().out
    assert judge(server, runs, tmp_path / "judged.jsonl") == 0 and capsys.readouterr().out == said
    assert len(server.asked) == 8


def test_runs_that_cannot_be_compared_are_refused(runs, server, tmp_path, capsys):
    def refused(some, *more, file="judged.jsonl"):
        assert judge(server, some, tmp_path / file, *more) == 1
        return capsys.readouterr().err

    fewer = write(tmp_path, "fewer", {3: "a", 5: "b"})
    assert "answered 4 rows and" in (said := refused([runs[0], fewer])) and "row 8 of ultrafeedback is not in" in said
    other = write(tmp_path, "other", {i: "a" for i in ROWS}, instruction="Sing.")
    assert "row 3 of ultrafeedback is 'Say 3.' in" in refused([runs[0], other])
    said = refused([runs[0], write(tmp_path, "commonsense", {3: "yes"}, way="written")])
    assert "holds no texts that a judge could compare: it is a run of instruct" in said
    assert "holds 5 finished runs, expected one" in refused([tmp_path, runs[1]])
    assert "holds no metrics.json" in refused([tmp_path / "loreft/seed-0/none", runs[1]])
    assert "--key-env NO_SUCH: there is no such variable" in refused(runs, "--key-env", "NO_SUCH")
    assert "limit=0" in refused(runs, "--limit", "0") and "workers=0" in refused(runs, "--workers", "0")
    assert not server.asked and not (tmp_path / "judged.jsonl").exists()


def test_replies_of_another_judge_or_about_other_texts_are_not_mixed_in(runs, server, tmp_path, capsys, monkeypatch):
    from reftlens.experiments.runs.records import RunFolder

    file = tmp_path / "judged.jsonl"
    monkeypatch.setenv("MY_KEY", "secret")
    assert judge(server, runs, file, "--limit", "1", "--key-env", "MY_KEY") == 0
    assert {key for _, key, _ in server.asked} == {"Bearer secret"} and "secret" not in file.read_text()
    assert judge(server, runs, file, "--model", "large") == 1
    assert "holds replies of small, temperature 0, at most 512 tokens, not of large" in capsys.readouterr().err
    assert judge(server, runs[::-1], file) == 1
    assert "holds a reply about other texts to row 3 of ultrafeedback" in capsys.readouterr().err
    file.write_text("{}\n")
    assert judge(server, runs, file) == 1 and "line 1 is no reply of a judge" in capsys.readouterr().err
    run = RunFolder(runs[0])
    told = [json.loads(line) for line in (run.path / "predictions.jsonl").read_text().splitlines()]
    for line in told:
        line["details"].pop("instruction", None)
    (run.path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    assert judge(server, runs, file) == 1 and "holds texts without their instructions" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "openai", None)
    assert judge(server, runs, file) == 1 and 'pip install "reftlens[judge]"' in capsys.readouterr().err
