"""Every result can be printed on a screen, framed and plotted: one table of all result classes of the library."""

import ast
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from planted import D, pairs, planted, planted_neurons

from architectures import bridge

QUIET = dict(progress=False)
PROMPTS = ["the cat sat on", "a dog", "looked at the moon"]
ROOT = Path(__file__).parents[1] / "reftlens"
NO_MEASUREMENTS = {
    "Sites": "a list of a model's hooks",
    "Known": "a list of what a model answers, from which a task is made",
    "Grid": "texts, shown as HTML",
    "Ledger": "columns of the tables that leave pairs out",
}
"""Classes that can be framed or plotted, and are no results."""


@cache
def _texts():
    """The tiny GPT-2, six rows with targets, and an edit at two sites that has moved from where it began."""
    import reftlens as rl

    model = bridge("gpt2")
    data = rl.encode(model, [rl.Example(p, " and looked") for p in PROMPTS * 2])
    reft = rl.ReFT({rl.resid_post(i, "prompt"): rl.LoReFT(D, rank=2) for i in (0, 1)})
    reft.reset(3)
    return model, data, reft


@cache
def _exchange():
    """The planted network, pairs that exchange the value, the base's own answers, and the planted exchange."""
    import reftlens as rl

    truth = planted()
    data, base = pairs(truth.value, 24, 3)
    das = rl.DAS(D, rank=2)
    das.frame.set(truth.subspace)
    return truth, data, base, rl.ReFT({rl.resid_post(1, "last"): das})


@cache
def _fitted():
    """Two seeds, three steps each, and the path of the first one's subspace."""
    import reftlens as rl

    model, data, reft = _texts()
    copies = [reft.clone(), reft.clone()]
    path = rl.subspaces.FramePath(copies[0], every=1)
    runs = [
        rl.fit(copy, model, data, steps=3, seed=seed, on_step=path if seed == 0 else None, **QUIET)
        for seed, copy in enumerate(copies)
    ]
    return copies, runs, path


@cache
def _direction():
    import reftlens as rl

    model, data, _ = _texts()
    x = rl.activations(model, data, rl.resid_post(1, "last"), **QUIET)
    return rl.directions.difference_of_means(x, torch.tensor([0, 1, 0, 1, 1, 0]))


def _effects(of):
    import reftlens as rl

    model, data, reft = _texts()
    return rl.effects(reft, model, data, of, **QUIET)


def _variants():
    import reftlens as rl

    return _effects({"half": rl.Variant(0.5), "first site": rl.Variant(sites=[0])})


def _equal_kl():
    import reftlens as rl

    model, data, reft = _texts()
    vector = rl.ReFT({reft.sites[1]: _direction().as_steering()})
    return rl.strength.at_kl(0.01, {"LoReFT": reft, "vector": vector}, model, data, **QUIET)


def _doses():
    import reftlens as rl

    model, data, reft = _texts()
    return rl.dose_response(reft, model, data, [0, 0.5, 1], unrelated=data[[0]], **QUIET)


def _pooled():
    import reftlens as rl

    return rl.strength.PooledDoses({f"seed {seed}": _doses() for seed in (0, 1)})


def _composition():
    import reftlens as rl

    model, data, reft = _texts()
    vector = rl.ReFT({reft.sites[1]: _direction().as_steering()})
    return rl.places.composition({"LoReFT": reft, "vector": vector}, model, {"texts": data}, **QUIET)


def _scores():
    import reftlens as rl

    truth, data, base, das = _exchange()
    return rl.causal.interchange_scores(das, truth.model, data, base=base, **QUIET)


def _disentanglement():
    import reftlens as rl

    return rl.causal.cause_isolate(_scores(), _scores())


def _controls():
    import reftlens as rl

    truth, data, base, das = _exchange()
    settings = dict(random=5, shuffles=19, random_model=False)
    return rl.controls(das, truth.model, data, data, rl.FitConfig(steps=2), base=base, **settings, **QUIET)


def _map():
    import reftlens as rl

    truth, data, _, _ = _exchange()
    places = dict(layers=(0, 2), positions=("last", "first"), ranks=(0, 2), seeds=(0, 1), shuffles=19)
    return rl.interchange_map(truth.model, data, data, config=rl.FitConfig(steps=2), **places, **QUIET)


def _illusion():
    import reftlens as rl
    from reftlens.text.batch import batch_from_rows

    truth = planted_neurons()
    rows = [[200 + i, 49 + i] for i in range(12)]
    data = batch_from_rows([[*row, 40] for row in rows], [[1, 1, 2]] * 12)
    data = data.with_sources(batch_from_rows(rows[::-1], [[1, 1]] * 12))
    das = rl.DAS(len(truth.real), rank=1)
    das.frame.set(truth.real)
    return rl.causal.subspace_illusion(rl.ReFT({rl.mlp_post(1, "last"): das}), truth.model, data, **QUIET)


def _seen():
    import reftlens as rl

    return rl.subspaces.seen_split(bridge("gpt2"), rl.resid_post(1, "last"))


def _manifold():
    import reftlens as rl

    truth, data, _, das = _exchange()
    return rl.causal.manifold_distance(das, truth.model, data, splits=19, **QUIET)


def _of_a_subspace(name, **settings):
    import reftlens as rl

    model, data, reft = _texts()
    with_data = () if name in ("weight_overlap", "direction_tokens") else (data,)
    settings |= {} if name == "principal_frame" else {"site": 1}
    settings |= {} if name == "weight_overlap" else QUIET
    return getattr(rl.subspaces, name)(reft, model, *with_data, **settings)


def _overlap():
    import reftlens as rl

    _, _, reft = _texts()
    return rl.subspaces.overlap({"LoReFT": reft, "direction": _direction(), "other": torch.randn(D, 3)})


def _critical():
    import reftlens as rl

    truth, data, _, das = _exchange()
    wide = rl.ReFT({rl.resid_post(1, "f1+l1"): das[0]})
    return rl.selection.critical(wide, truth.model, data, count=1, **QUIET)


def _openings():
    import reftlens as rl

    model, data, reft = _texts()
    gate = rl.interventions.Threshold(_direction().basis[:, 0].float())
    gated = rl.ReFT({reft.sites[1]: rl.interventions.Gated(reft.clone()[1], gate)})
    return rl.strength.openings(gated, model, data, [i % 2 == 0 for i in range(len(data))], **QUIET)


def _ranked():
    import reftlens as rl

    return rl.places.ranked_units(rl.ReFT({rl.resid_post(1, "last"): rl.interventions.SigmoidMask(D)}))


def _search():
    import reftlens as rl

    truth = planted()
    rows = [pairs(truth.value, count, seed)[0] for seed, count in ((1, 16), (2, 32), (3, 8))]
    space = rl.selection.Space(layers=(0, 2), positions=("last",), ranks=(2,), lrs=(0.1,))
    config = rl.FitConfig(steps=3, batch_size=16)
    return rl.search(truth.model, *rows, space=space, config=config, seeds=1, **QUIET)


def _table():
    from reftlens.experiments.runs.records import Prediction, RunFolder
    from reftlens.experiments.runs.tables import table

    folder = Path(mkdtemp())
    for seed in (0, 1):
        run = RunFolder(folder / f"seed-{seed}")
        run.begin({"recipe": "planted", "part": "mix", "method": "loreft", "seed": seed})
        run.add(Prediction("boolq", i, "true", {"written": ("true", "false")[(i + seed) % 2]}) for i in range(12))
        run.finish({"parameters": 12, "seconds_per_step": 0.5})
    return table([folder])


def _method_search():
    from reftlens.experiments.runs.searching import MethodSearch, Tried

    tried = tuple(
        Tried({"rank": r, "lr": lr}, None if r * lr > 5e-3 else -r * lr) for r in (2, 8) for lr in (1e-4, 1e-3)
    )
    return MethodSearch(tried, 60, 1920, 100, "log-probability per target")


def _memorised():
    from reftlens.experiments.examples.memorisation import Memorisation

    return Memorisation((0, 2), (4, 8), torch.tensor([[[4, 8], [4, 3]], [[4, 2], [1, 0]]]), 1, 33, 10)


def _composed():
    from reftlens.experiments.examples.skill_shares import SkillShares

    held = torch.rand(3, 2, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    return SkillShares(("terse", "loud"), ({}, {"terse": 1.0}, {"terse": 1.0, "loud": -1.0}), (("",) * 20,) * 3, held)


def _learned():
    from reftlens.experiments.examples.few_shot import LearningCurve

    right = (
        torch.rand(3, 2, 20, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.3, 0.6, 0.9])[:, None, None]
    )
    return LearningCurve("LoReFT", (2, 4, 8), right, right.roll(1, 0), right[0, 0])


def _letters():
    from hub_rows import obqa

    from reftlens.experiments.answers.letters import letter_bias, rotations
    from reftlens.experiments.rows.loading import load_rows

    turned = rotations(load_rows("obqa", data=obqa()))
    return letter_bias(turned, [["answer1" if i % 2 else row.answer for i, row in enumerate(part)] for part in turned])


def _letter_table():
    from reftlens.experiments.runs.letter_tables import Letters, LetterTable

    where = ("commonsense", "mix", "loreft", "obqa")
    lines = [Letters(*where, way, (0,), 10, 2, 1, _letters()) for way in ("written", "likelihood")]
    return LetterTable((*lines, Letters(*where, "spoken", (), 0, 10, 0, None)))


def _sparsity():
    import reftlens as rl

    model, data, _ = _texts()
    sites, config = rl.places.every_head(model, "last"), rl.FitConfig(steps=2)
    return rl.places.sparsity(sites, lambda: rl.LoReFT(8, 1), model, data, data, [0.1], config, **QUIET)


def _ranks():
    import reftlens as rl

    model, data, _ = _texts()
    settings = dict(validation=data, seeds=(0, 1), config=rl.FitConfig(steps=2))
    return rl.subspaces.rank_sweep(model, data, rl.resid_post(1, "last"), [1, 2], **settings, **QUIET)


def _evaluation():
    import reftlens as rl

    model, data, reft = _texts()
    return rl.evaluate(reft, model, data, **QUIET)


def _generation():
    import reftlens as rl

    model, _, reft = _texts()
    return rl.generate(reft, model, PROMPTS * 16, rl.Decoding(max_new_tokens=4))


def _path():
    import reftlens as rl

    model, data, reft = _texts()
    return rl.places.edit_path(reft, model, data, **QUIET)


def _streams():
    import reftlens as rl

    model, data, reft = _texts()
    return rl.places.stream_effects(reft, model, data, 1)


def _forecast():
    import reftlens as rl

    model, data, reft = _texts()
    return rl.training.plan(reft, model, data, steps=3)


def _stability():
    import reftlens as rl

    return rl.subspaces.stability(_fitted()[0])


RESULTS = {
    "CellEffects": lambda: _effects("cells"),
    "Composition": _composition,
    "Controls": _controls,
    "Critical": _critical,
    "Direction": _direction,
    "DirectionExamples": lambda: _of_a_subspace("direction_examples"),
    "DirectionTokens": lambda: _of_a_subspace("direction_tokens"),
    "Disentanglement": _disentanglement,
    "Dose": lambda: _equal_kl()["vector"],
    "DoseResponse": _doses,
    "EditPath": _path,
    "EqualKL": _equal_kl,
    "Evaluation": _evaluation,
    "FitResult": lambda: _fitted()[1][0],
    "Forecast": _forecast,
    "FramePath": lambda: _fitted()[2],
    "Generation": _generation,
    "IllusionMeter": _illusion,
    "InterchangeMap": _map,
    "InterchangeScores": _scores,
    "ManifoldDistance": _manifold,
    "Openings": _openings,
    "Overlap": _overlap,
    "PairEffects": lambda: _effects("pairs"),
    "PartEffects": lambda: _effects("positions"),
    "Plane": lambda: _of_a_subspace("plane"),
    "PooledDoses": _pooled,
    "PrincipalFrame": lambda: _of_a_subspace("principal_frame"),
    "RankSweep": _ranks,
    "LetterBias": _letters,
    "LetterTable": _letter_table,
    "LearningCurve": _learned,
    "Memorisation": _memorised,
    "MethodSearch": _method_search,
    "RankedUnits": _ranked,
    "SearchResult": _search,
    "SeenSplit": _seen,
    "SkillShares": _composed,
    "Sparsity": _sparsity,
    "Stability": _stability,
    "StreamEffects": _streams,
    "Table": _table,
    "VariantEffects": _variants,
    "WeightOverlap": lambda: _of_a_subspace("weight_overlap"),
}
_result = cache(lambda name: RESULTS[name]())


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_fits_a_screen_and_can_be_framed_and_plotted(name):
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

    result = _result(name)
    assert type(result).__name__ == name
    for lines in (str(result).splitlines(), repr(result).splitlines()):
        assert 1 <= len(lines) <= 40 and max(map(len, lines)) <= 160, (len(lines), max(map(len, lines)))
    assert not str(result).startswith(f"{name}("), "the fields of a class are no report"
    assert len(result.to_frame()) > 0
    try:
        assert isinstance(result.plot(), Axes)
        ax = plt.subplots()[1]
        drawn = result.plot(ax)
        assert drawn is ax and drawn.has_data()
        assert drawn.get_xlabel() or drawn.get_ylabel() or drawn.get_title()
    finally:
        plt.close("all")


CURVES = [
    "Direction",
    "DirectionExamples",
    "Dose",
    "DoseResponse",
    "Evaluation",
    "FitResult",
    "FramePath",
    "LearningCurve",
    "PrincipalFrame",
    "RankSweep",
    "SeenSplit",
]
"""Results whose figure is a curve, or dots, over a common axis: several of them may be drawn on one."""


def _lines(ax):
    """Colours of what the legend names, by entry; what is alike for all (levels, bands) left out."""
    from matplotlib.colors import to_hex

    drawn = [(h, name) for h, name in zip(*ax.get_legend_handles_labels(), strict=True)]
    colours = {}
    for handle, name in drawn:
        handle = handle.lines[0] if hasattr(handle, "lines") else handle
        colour = handle.get_edgecolor() if hasattr(handle, "get_edgecolor") else handle.get_color()
        if name not in ("95 % interval", "budget", "unedited model"):
            colours[name] = to_hex(colour)
    return colours


@pytest.mark.parametrize("name", CURVES)
def test_three_curves_on_one_axes_are_told_apart(name):
    import matplotlib.pyplot as plt

    from reftlens import figures

    result = _result(name)
    one = _lines(result.plot())
    each = len(set(one.values()))
    assert next(iter(one.values())) == figures.BLUE.lower(), "alone in the house style"
    ax = plt.subplots()[1]
    ax.set_prop_cycle(color=[f"#{i:02x}3366" for i in range(16, 16 + 3 * each)])
    entries = [_lines(result.plot(ax)) for _ in range(3)][-1]
    assert (
        len(entries)
        == 3 * len(one)
        == len(ax.get_legend().get_texts()) - (len(ax.get_legend().get_texts()) - 3 * len(one))
    )
    assert list(dict.fromkeys(entries.values())) == [f"#{i:02x}3366" for i in range(16, 16 + 3 * each)]
    plt.close("all")


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_has_the_name_and_the_colour_that_it_is_given(name):
    import matplotlib.pyplot as plt

    result, ax = _result(name), plt.subplots()[1]
    result.plot(ax, label="mine", color="#123456")
    result.plot(ax, label="yours", color="#abcdef")
    lines = _lines(ax)
    assert {colour for entry, colour in lines.items() if entry.startswith("mine")} == {"#123456"}
    assert {colour for entry, colour in lines.items() if entry.startswith("yours")} == {"#abcdef"}
    assert all(entry.startswith(("mine", "yours")) for entry in lines)
    plt.close("all")


def test_no_result_is_missing_from_the_table():
    classes = [
        (node.name, {item.name for item in node.body if isinstance(item, ast.FunctionDef)})
        for path in ROOT.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]
    results = {name for name, methods in classes if methods & {"to_frame", "plot"}}
    assert results == RESULTS.keys() | NO_MEASUREMENTS.keys()
