"""The report: what is in it, that its numbers are those of the data frames, and that data stays text."""

import json
import re
from datetime import datetime
from functools import cache
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

import architectures

SECTIONS = ("summary", "texts", "strength", "where", "stream", "geometry", "directions", "controls", "training")
SECTIONS = (*SECTIONS, "provenance")
NOW = datetime(2026, 1, 2, 3, 4, 5)
EVIL = '<script>alert("x")</script> & the cat'


@cache
def trained():
    """An edit of two layers of the tiny llama, its data and the record of its training."""
    import reftlens as rl

    model = architectures.bridge("llama")
    words = ("mat", "moon", "hill", "dog")
    examples = [rl.Example(f"the cat sat on {i} and", f" the {words[i % 4]}") for i in range(12)]
    data = rl.encode(model, [*examples, rl.Example(EVIL, " ran by")], boundary="split")
    sites = {rl.resid_post(0, "l2"): 2, rl.resid_post(1, "l1"): 2}
    reft = rl.ReFT({site: rl.LoReFT(architectures.D, rank=rank) for site, rank in sites.items()})
    reft.reset(seed=0)
    run = rl.fit(reft, model, data, steps=12, lr=2e-2, progress=False)
    return model, data, reft, run


def write(path, **options):
    import reftlens as rl
    from reftlens.reports.page import report

    model, data, reft, run = trained()
    rl.training.forget()  # a row that was captured in other company differs by rounding
    given = {
        "run": run,
        "prompts": [EVIL, "the dog"],
        "strengths": [0, 0.5, 1, 2],
        "decoding": rl.Decoding(max_new_tokens=6),
    }
    return report(reft, model, data, path, progress=False, **{"now": NOW, **given, **options})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write(tmp_path_factory.mktemp("report") / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def without_charts(monkeypatch):
    """Figures keep their captions and numbers; drawing takes most of a report's time."""
    from markupsafe import Markup

    from reftlens.reports import parts
    from reftlens.reports.charts import Chart

    monkeypatch.setattr(parts, "chart", lambda plot, name: Chart(Markup(), "1", "1"))


class Page(HTMLParser):
    """Elements with their attributes, ids, and what a reader sees in each section."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "section":
            self.open.append(dict(attributes)["id"])

    def handle_endtag(self, tag):
        if tag == "section":
            self.open.pop()

    def handle_data(self, data):
        for name in self.open:
            self.text[name] = self.text.get(name, "") + data


def numbers(page):
    return json.loads(re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page, re.DOTALL)[1])


def test_every_section_is_there_and_in_the_contents(page):
    found = Page(page)
    assert tuple(a["id"] for tag, a in found.elements if tag == "section") == SECTIONS
    assert [a["href"] for tag, a in found.elements if tag == "a"][1:] == [f"#{name}" for name in SECTIONS]
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert page.count("<svg") >= 9 and page.count("<svg") == page.count("</svg>")
    assert all(a["role"] == "img" and a["aria-label"] for tag, a in found.elements if tag == "svg")


def test_the_summary_says_what_was_edited_where_and_how_much_it_does(page):
    from reftlens.analysis.strength import dose_response

    model, data, reft, _ = trained()
    said = Page(page).text["summary"]
    count = reft.parameter_count(model)
    assert (
        all(site.hook in said and str(site.positions) in said for site in reft.sites)
        and f"It stores {count.stored:,} numbers" in said
    )
    effect = dose_response(reft, model, data, [1.0], progress=False).estimate("effect")[0]
    assert f"{effect.value:.2f} [{effect.low:.2f}, {effect.high:.2f}]" in said
    assert "Only 13 examples were measured" in said and "data that the edit was trained on" in said


def test_the_numbers_are_those_of_the_data_frames(page):
    import reftlens as rl
    from reftlens.analysis.strength import dose_response
    from reftlens.analysis.subspaces.frame import principal_frame

    model, data, reft, run = trained()
    dose = dose_response(reft, model, data, [0, 0.5, 1, 2], progress=False)
    expected = {
        "strength": dose.by_strength(),
        "each position": rl.effects(reft, model, data, progress=False).to_frame(),
        "map": rl.effects(reft, model, data, of="cells", progress=False).to_frame(),
        "spectrum": principal_frame(reft, model, data, progress=False).to_frame(),
        "training": run.to_frame(),
        "each site": rl.effects(reft, model, data, of="sites", progress=False).to_frame(),
    }
    found = numbers(page)
    for name, frame in expected.items():
        frame = frame.reset_index() if frame.index.name else frame
        rows = found[name]
        assert len(rows) == len(frame), name
        for column in frame.columns:
            values = [row[column] for row in rows]
            close = frame[column].dtype == float  # scored beside others, in batches of another shape
            assert values == (pytest.approx(list(frame[column]), rel=1e-4, abs=1e-5) if close else list(frame[column]))


def test_the_tables_show_these_numbers(page):
    """What a reader sees is the data frame, to four digits."""
    for name in ("each position", "map", "spectrum", "training"):
        for row in numbers(page)[name]:
            for value in row.values():
                text = f"{value:.4g}" if isinstance(value, float) else None
                assert text is None or f'<td class="number">{text}</td>' in page, (name, value)


def test_the_slider_holds_what_generate_gives(page):
    import reftlens as rl

    model, _, reft, _ = trained()
    rows = numbers(page)["texts"]
    for strength in (0.0, 0.5, 1.0, 2.0):
        variant = rl.Variant(strength)
        made = rl.generate(reft, model, [EVIL, "the dog"], rl.Decoding(max_new_tokens=6), variant=variant)
        assert tuple(r["text"] for r in rows if r["strength"] == strength) == made.texts
    dial = next(a for tag, a in Page(page).elements if tag == "input")
    assert dial["type"] == "range" and dial["max"] == "3"


def test_a_text_is_shown_token_by_token(page):
    import reftlens as rl

    model, _, reft, _ = trained()
    written = rl.generate(reft, model, [EVIL, "the dog"], rl.Decoding(max_new_tokens=6))
    effects = rl.places.stream_effects(reft, model, written.batch())
    rows = numbers(page)["stream"]
    assert effects.html() in page and len(rows) == int(((effects.change > 0) | (effects.divergence > 0)).sum()) > 0
    frame = effects.to_frame().set_index(["position", "layer"])
    assert all(row["kl"] == frame.loc[(row["position"], row["layer"]), "kl"] for row in rows)


def test_text_of_the_data_and_of_the_model_is_escaped(page):
    assert 'alert("x")' not in re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; the cat" in page
    assert [tag for tag, _ in Page(page).elements].count("script") == 2
    assert numbers(page)["texts"][0]["prompt"] == EVIL
    assert EVIL in unescape(page)


def test_labels_and_names_are_escaped():
    """What reaches a chart, a caption or a table from outside."""
    import pandas as pd
    from jinja2 import Environment

    from reftlens import figures
    from reftlens.reports.layout import page_templates
    from reftlens.reports.parts import figure, table

    evil, frame = '"><img src=x>', pd.DataFrame({"<b>": ["<i>x</i>"]})

    def plot():
        ax = figures.axes()
        ax.set_xlabel(evil)
        return ax

    def written(templates):
        parts = templates.get_template("parts.html.j2").module
        return (
            parts.figure(figure(plot, "c", evil, frame)),
            parts.frame(table(frame, evil)),
            parts.lines([evil], "k"),
            parts.pairs({evil: evil}),
            parts.absent(evil),
        )

    def is_text(html):
        elements = Page(str(html)).elements
        return not {"img", "b", "i"} & {tag for tag, _ in elements} and "src" not in {k for _, a in elements for k in a}

    assert all(map(is_text, written(page_templates())))
    careless = Environment(loader=page_templates().loader, trim_blocks=True, lstrip_blocks=True)
    careless.filters["number"] = str
    assert not any(map(is_text, written(careless)))  # the twin: without escaping, each of them would let it through


def test_no_script_comes_in_by_a_prompt_a_completion_or_the_name_of_a_hook(tmp_path, monkeypatch, without_charts):
    import reftlens as rl
    from reftlens.editing.site import Site
    from reftlens.reports.page import report

    model, _, reft, _ = trained()
    evil = "<script>alert(1)</script>"
    data = rl.encode(model, [rl.Example(f"{evil} the cat", f" {evil}"), rl.Example(evil, " dog")], boundary="split")
    monkeypatch.setattr(Site, "__str__", lambda site: f"{evil} {site.hook}")
    text = report(
        reft, model, data, tmp_path / "r.html", prompts=[evil], decoding=rl.Decoding(3), progress=False, now=NOW
    )
    page = text.read_text(encoding="utf-8")
    assert [tag for tag, _ in Page(page).elements].count("script") == 2 and evil not in page
    seen = Page(page).text
    assert f"{evil} blocks.0.hook_resid_post" in seen["geometry"] and f"{evil} blocks.0" in seen["directions"]
    assert evil in seen["texts"] and evil in seen["summary"] and evil in numbers(page)["texts"][0]["prompt"]


def test_what_p_and_holm_are_stands_by_the_tables_that_have_them(page):
    tables = re.findall(r"<caption>(.*?)</caption>.*?<thead>(.*?)</thead>", page, flags=re.S)
    explained = {caption for caption, _ in tables if "corrected for the number of tests" in caption}
    assert explained == {caption for caption, head in tables if "holm" in head} and len(explained) < len(tables)
    assert explained


def test_nothing_is_loaded_from_anywhere(page):
    assert not re.findall(r"https?://", page)
    for tag, attributes in Page(page).elements:
        for name in ("src", "href", "xlink:href", "data", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, name, value[:60])
    assert "default-src 'none'" in page and "@import" not in page
    assert all(a.startswith("#") for a in re.findall(r"url\(([^)]*)\)", page))


def test_the_same_call_writes_the_same_bytes_but_for_the_time(page, tmp_path):
    later = write(tmp_path / "b.html", now=None).read_text(encoding="utf-8")
    stamp = r'<time id="stamp" datetime="([^"]*)">([^<]*)</time>'
    assert later != page and re.sub(stamp, "", later) == re.sub(stamp, "", page)
    assert re.findall(stamp, page) == [(NOW.isoformat(), NOW.isoformat())] and len(page.encode()) < 3_000_000


def test_charts_take_the_colours_of_the_page(page):
    """No ink of the light page is left in a figure; black stays only where it is written on a heat map."""
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert "currentColor" in charts[0] and "var(--blue)" in charts[0]
    assert not any(colour in chart for chart in charts for colour in ("#010203", "#0072b2", "#dddddd"))
    assert not any("DejaVu" in chart or "<style" in chart for chart in charts)


def test_texts_are_written_from_prompts_as_they_were_trained(tmp_path, monkeypatch):
    """In the chat template, with the system message, of the data that effects are measured on; a batch stays itself."""
    import reftlens as rl
    from reftlens.reports import page

    model, plain, reft, _ = trained()
    system = "a dog ran by"
    chat = rl.encode(model, plain.examples[:2], chat=True, system=system)
    expected = rl.encode_prompts(model, ["the moon"], chat=True, system=system)

    def read_by_the_model(data, prompts=("the moon",), **options):
        monkeypatch.setattr(page, "_page", lambda subject, stamp: str(subject.results.grid.at(1.0).prompt_ids[0]))
        options |= {"strengths": (), "decoding": rl.Decoding(max_new_tokens=1), "prompts": prompts}
        return page.report(reft, model, data, tmp_path / "r.html", progress=False, **options).read_text("utf-8")

    def ids(batch):
        return str(tuple(batch.tokens[0].tolist()))

    assert ids(expected) == read_by_the_model(chat) == read_by_the_model(plain, heldout=chat)
    assert ids(expected) == read_by_the_model(plain, prompts=expected)
    assert ids(expected) != read_by_the_model(plain) == ids(rl.encode_prompts(model, ["the moon"]))
    first = rl.encode_prompts(model, [plain.examples[0].prompt], chat=True, system=system)
    assert read_by_the_model(chat, prompts=None) == ids(first)


def test_an_exchange_gets_a_report_that_says_what_does_not_apply(tmp_path, without_charts):
    import reftlens as rl
    from reftlens.reports.page import report

    model, data, _, _ = trained()
    pairs = data[:12].with_sources(data[[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0]])
    das = rl.ReFT({rl.resid_post(1, "last"): rl.DAS(architectures.D, rank=1)})
    text = report(das, model, pairs, tmp_path / "das.html", progress=False, now=NOW).read_text(encoding="utf-8")
    said = Page(text).text
    assert "DAS copies from a source" in said["texts"]
    assert "None were given: run controls" in said["controls"] and "No controls were given" in said["summary"]
    assert "No record of the training was given" in said["training"]
    assert 'type="range"' not in text and "The first row of the data" in said["stream"]


def test_a_vector_moves_every_token_alike_and_every_strength_is_shown(tmp_path, monkeypatch, without_charts):
    import reftlens as rl
    from reftlens.reports import subject
    from reftlens.reports.page import report
    from reftlens.scoring import responses

    model, data, reft, _ = trained()
    sweeps, reads, score, read = [], [], responses.scorer_of, subject.read_sites
    monkeypatch.setattr(responses, "scorer_of", lambda *a: sweeps.append(len(a[2])) or score(*a))
    monkeypatch.setattr(subject, "read_sites", lambda *a, **k: reads.append(a[1]) or read(*a, **k))
    vector = rl.ReFT({rl.resid_post(1, "last"): rl.directions.random_subspace(architectures.D).as_steering()})
    asked = {"strengths": [-2, 4], "progress": False, "decoding": rl.Decoding(4)}
    said = {}
    for name, edit in {"vector": vector, "trained": reft}.items():
        text = report(edit, model, data, tmp_path / f"{name}.html", **asked).read_text(encoding="utf-8")
        said[name] = Page(text).text["directions"]
        columns = re.findall(r'<th scope="col"[^>]*>(-2|0 \(unedited\)|1|4)</th>', text)
        assert columns[:4] == ["-2", "0 (unedited)", "1", "4"]
    # one sweep and one reading each: unedited, and three strengths, of which one is the whole edit; of two sites also
    # two positions alone (each is the other left out), two sites likewise, the one cell that is none of these, and the
    # one that edits nothing, which is not computed
    assert len(reads) == 2 and sweeps == [4, 4 + 2 + 2 + 1]
    # asked again, nothing is scored, and the page is the same but for the time and what it came after
    again = report(reft, model, data, tmp_path / "again.html", **asked).read_text(encoding="utf-8")
    session = r'<time id="stamp".*?</time>|>light cone: [^<]*<|>\d+ of \d+ scores from earlier calls<'
    assert len(sweeps) == 2 and re.sub(session, "", again) == re.sub(session, "", text) and again != text
    assert "moves every token alike" in said["vector"] and "largest" not in said["vector"]
    assert "moves every token alike" not in said["trained"] and "largest" in said["trained"]


def test_controls_and_their_warnings_are_shown(tmp_path, without_charts):
    import reftlens as rl
    from reftlens.scoring.statistics import Estimate

    class Warned(rl.causal.Controls):
        warnings = ("shuffled labels score as high <b>",)

    estimate = Estimate(0.5, 0.2, 0.8, 12)
    rows = tuple(rl.causal.Control(name, estimate, estimate) for name in ("trained", "no edit", "full vector"))
    text = write(tmp_path / "c.html", controls=Warned(rows, (), 0.4, 99, estimate, (1,))).read_text(encoding="utf-8")
    said = Page(text).text
    assert "Controls: shuffled labels score as high <b>." in said["summary"] and "trained" in said["controls"]
    assert numbers(text)["controls"][0]["accuracy"] == 0.5


def test_tokens_at_a_site_that_the_unembedding_cannot_read_are_left_out_with_a_reason(tmp_path, without_charts):
    """At queries; neurons, its twin, are read through the output projection."""
    import reftlens as rl
    from reftlens.reports.page import report

    model, data, _, _ = trained()
    for site, width in ((rl.attn_q(1, "last"), architectures.D), (rl.mlp_post(1, "last"), architectures.D_MLP)):
        reft, path = rl.ReFT({site: rl.LoReFT(width, rank=1)}), tmp_path / f"{width}.html"
        text = report(reft, model, data, path, progress=False, decoding=rl.Decoding(4)).read_text("utf-8")
        said = Page(text).text["directions"]
        assert ("Tokens: not shown, because" in said) == (width == architectures.D) and "moved" in said


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_what_is_said_of_tokens_is_what_was_tested(scale):
    """The size of the strongest logit beside that of random directions: no verdict on tokens, below chance or above."""
    from dataclasses import replace

    import reftlens as rl
    from reftlens.reports.directions import _token_table

    model, _, reft, _ = trained()
    tokens = rl.subspaces.direction_tokens(reft, model, site=1, draws=40)
    rows = tuple(replace(row, logit=scale * row.logit) for row in tokens.rows)
    scaled = replace(tokens, rows=rows)
    text = _token_table(scaled, 1)["test"]
    for direction in (0, 1):
        most = max(abs(row.logit) for row in rows if row.direction == direction)
        share = (1 + (tokens.random >= most).sum().item()) / 41
        assert f"direction {direction} reaches {most:.2f} (p = {share:.2g})" in text
    assert f"95 % of random directions stay within ±{tokens.chance:.2f}" in text and "Not tested is which" in text
    assert "stands out" not in text and "read nothing" not in text


def test_warnings_follow_what_was_measured():
    """Each with its twin that keeps quiet; the effects are set, as a training would decide them for each machine."""
    from dataclasses import replace

    import reftlens as rl
    from reftlens.reports.subject import Subject
    from reftlens.reports.summary import warnings_of

    model, data, reft, run = trained()
    subject = Subject(reft, model, data, None, None, (0.0, 1.0), run, None, None, None, rl.Decoding(4), 0, False)
    results = subject.results

    def with_effect(sign):
        on_data = replace(results.dose.on_data, effect=sign * results.dose.on_data.effect.abs())
        return replace(results, dose=replace(results.dose, on_data=on_data))

    def warnings(results=None, **changes):
        return " ".join(warnings_of(replace(subject, **changes), results or with_effect(1)))

    assert "trained on" in warnings() and "trained on: they say" not in warnings(heldout=data[:6])
    assert "No record" in warnings(run=None) and "No record" not in warnings()
    assert "hashes differ" in warnings(run=replace(run, data_hash="0")) and "hashes differ" not in warnings()
    assert "unrelated text was not measured" in warnings()
    drifting = replace(subject, unrelated=data[:4]).results
    assert "was not measured" not in warnings(drifting, unrelated=data[:4])
    for words in ("makes the targets less likely", "of the examples move the wrong way"):
        assert words in warnings(with_effect(-1)) and words not in warnings()


def test_the_package_holds_the_files_of_the_page():
    from reftlens.reports import page  # `reftlens.reports` itself is the function

    folder = Path(page.__file__).parent
    assert {p.name for p in folder.iterdir()} >= {"report.css", "report.js", "page.html.j2", "parts.html.j2"}
    assert {p.name for p in folder.iterdir()} >= {f"{name}.html.j2" for name in SECTIONS}


def test_the_command_names_what_is_missing(tmp_path, capsys):
    from reftlens.__main__ import main

    assert main(["report", str(tmp_path)]) == 1
    assert "holds no reft.json" in capsys.readouterr().err


def test_the_command_writes_the_report_of_a_folder(tmp_path, monkeypatch, capsys, without_charts):
    import reftlens as rl
    from reftlens import __main__ as cli

    model, data, reft, run = trained()
    rl.save(reft, tmp_path, model, run=run)
    lines = [json.dumps({"prompt": e.prompt, "completion": e.completion}) for e in data.examples[:12]]
    (tmp_path / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(cli, "load_model", lambda name, progress: model)
    arguments = ["report", str(tmp_path), "--data", str(tmp_path / "data.jsonl"), "--prompts", "the cat", "--quiet"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "hashes differ" in text and numbers(text)["texts"][0]["prompt"] == "the cat"
    assert cli.main(["report", str(tmp_path), "--quiet"]) == 1
    assert "not trained on the demo's examples" in capsys.readouterr().err


@pytest.mark.parametrize("trained_on_chats", [False, True])
@pytest.mark.parametrize("asked", [[], ["--chat"]], ids=["not said", "said"])
def test_the_command_measures_an_edit_of_chats_on_chats(tmp_path, monkeypatch, trained_on_chats, asked):
    import reftlens as rl
    from reftlens import __main__ as cli

    model, _, reft, _ = trained()
    again = reft.clone()
    again.chat = trained_on_chats
    rl.save(again, tmp_path, model)
    (tmp_path / "data.jsonl").write_text('{"prompt": "the cat", "completion": " sat"}', encoding="utf-8")
    measured = []
    monkeypatch.setattr(cli, "load_model", lambda name, progress: model)
    monkeypatch.setattr(cli, "report", lambda reft, model, data, path, **settings: measured.append(data))
    assert cli.main(["report", str(tmp_path), "--data", str(tmp_path / "data.jsonl"), "--quiet", *asked]) == 0
    assert [batch.template.chat for batch in measured] == [trained_on_chats or bool(asked)]
