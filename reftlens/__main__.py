"""The command line: `demo` trains the emoji chatbot, `chat DIR` talks to a saved one, `report DIR` writes about it.

`search FILE` looks for the layer, tokens, rank and strength of an edit that learns what stands in a file; `run RECIPE`
runs an experiment of the paper, `judge RUN_A RUN_B` compares what two of its runs wrote. `doctor` says what is here.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from reftlens.bridge.pretrained import DEFAULT_MODEL, load_model
from reftlens.editing.reft import ReFT
from reftlens.errors import HookNotFound, NotFinite, TrainingDiverged
from reftlens.experiments.judges.commandline import add_judge, verdict
from reftlens.experiments.runs.commandline import add_run, outcome
from reftlens.generation.decoding import Decoding
from reftlens.generation.result import Generation
from reftlens.generation.writing import stream
from reftlens.reports.commandline import add_report
from reftlens.reports.comparing import comparison
from reftlens.reports.doctor import add_doctor, diagnosis
from reftlens.reports.page import report
from reftlens.reports.saved import check_one_model, named, run_of
from reftlens.selection.commandline import add_search, script_of
from reftlens.selection.searching import SEARCH, search
from reftlens.storage.folder import StoreMismatch, load, model_of, save
from reftlens.tasks import emoji
from reftlens.text.encoding import encode, encode_prompts
from reftlens.text.loading import load_examples

STRENGTHS = (0.0, 0.5, 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    for console in (sys.stdout, sys.stderr):
        if isinstance(console, TextIOWrapper):  # what it cannot write becomes "?": no work is lost for an emoji
            console.reconfigure(errors="replace")
    try:
        return options.run(options)
    except (OSError, ValueError, ImportError, HookNotFound, NotFinite, TrainingDiverged) as error:
        print(f"reftlens: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reftlens", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train the emoji chatbot, show its answers, save it")
    demo.add_argument("--out", type=Path, default=Path("runs/emoji"), help="folder to write to (default: runs/emoji)")
    demo.add_argument("--seed", type=int, default=0, help="of initialisation and data order (default: 0)")
    demo.add_argument("--steps", type=int, help="optimizer steps (default: the demo's own)")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.set_defaults(run=run_demo)
    chat = commands.add_parser("chat", help="talk to a model with a saved intervention")
    chat.add_argument("folder", type=Path, metavar="DIR", help="what `save` or `demo` wrote")
    chat.add_argument("--model", help="folder or hub id (default: the one it was trained on)")
    chat.add_argument("--strength", type=float, default=1.0, help="0 is the unedited model (default: 1)")
    chat.add_argument("--max-new-tokens", type=int, default=128)
    chat.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    chat.set_defaults(run=run_chat)
    add_report(commands, run_report)
    add_search(commands, run_search)
    add_run(commands, run_experiment)
    add_judge(commands, run_judge)
    add_doctor(commands, run_doctor)
    return parser


def run_demo(options: argparse.Namespace) -> int:
    """Train, answer unseen questions at three strengths, write everything to a folder."""
    model = load_model(progress=not options.quiet)
    config = emoji.SETTINGS if options.steps is None else replace(emoji.SETTINGS, steps=options.steps)
    reft, run = emoji.run(model, options.seed, config=config, progress=not options.quiet)
    save(reft, options.out, model, run=run)
    print(f"\n{model.cfg.model_name}: {reft.parameter_count(model)}")
    for site, module in reft.items():
        print(f"  {module.label} of rank {module.rank} at {site.hook}, positions {site.positions}")
    print(f"{len(run.losses)} steps in {run.seconds:.0f} s, loss {run.losses[0]:.2f} → {run.loss:.2f} nats per token\n")
    questions = emoji.questions()
    answers = {s: emoji.answers(reft, model, questions, strength=s) for s in STRENGTHS}
    _write(options.out, questions, answers)
    _show(questions, answers)
    print(f"loss curve         {options.out / 'loss.png'}")
    print(f"answers            {options.out / 'answers.jsonl'}")
    print(f"saved intervention {options.out}")
    print(f"\nTalk to it:        reftlens chat {options.out}")
    print(f"Read about it:     reftlens report {options.out}")
    return 0


def _show(questions: list[str], answers: dict[float, Generation]) -> None:
    for i, question in enumerate(questions):
        print(question)
        for strength, generation in answers.items():
            print(f"  strength {strength:<4g}{' '.join(generation.texts[i].split())[:100]}")
    print()
    for strength, generation in answers.items():
        count = sum(emoji.emoji_share(text) > 0.5 for text in generation.texts)
        print(f"strength {strength:g}: {count} of {len(questions)} unseen questions answered mostly in emoji")
    print(f"distinct answers at strength 1: {len(set(answers[1.0].texts))} of {len(questions)}\n")


def _write(folder: Path, questions: list[str], answers: dict[float, Generation]) -> None:
    columns = {"prompt": questions} | {f"strength {s:g}": list(g.texts) for s, g in answers.items()}
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_chat(options: argparse.Namespace) -> int:
    """Read lines, answer each with the edited model, until end of input or an empty line."""
    model, reft = _loaded(options.folder, options.model, progress=True)
    print(_explanation(reft, options.strength))
    decoding = Decoding(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    turns: list[dict[str, str]] = []
    while line := _line():
        turns.append({"role": "user", "content": line})
        reply = ""
        for piece in stream(reft, model, turns, decoding, chat=True, variant=options.strength):
            print(piece, end="", flush=True)
            reply += piece
        print("\n")
        turns.append({"role": "assistant", "content": reply})
    return 0


def run_report(options: argparse.Namespace) -> int:
    """Write the report of a saved intervention, or of several side by side."""
    if len(options.folders) > 1:
        return _compare(options)
    progress, (folder,) = not options.quiet, options.folders
    demo = options.data is None
    examples = load_examples(options.data or emoji.data_file("emoji.jsonl"))  # before a model, which takes long
    model, reft = _loaded(folder, options.model, progress=progress)
    run, data = run_of(folder), encode(model, examples, chat=options.chat or demo or reft.chat is True)
    if demo and (run is None or run.data_hash != data.fingerprint):
        raise StoreMismatch(f"{folder} was not trained on the demo's examples: pass what it was trained on as --data")
    of_demo = {"prompts": emoji.questions()[:4], "score": emoji.emoji_share, "decoding": emoji.DECODING} if demo else {}
    settings = of_demo | ({"prompts": options.prompts} if options.prompts else {})
    path = options.out or folder / "report.html"
    report(reft, model, data, path, run=run, seed=options.seed, progress=progress, **settings)
    print(path)
    return 0


def _compare(options: argparse.Namespace) -> int:
    """On the demo's examples where all were trained on them; without data, what the folders alone tell."""
    folders, progress, data, settings = named(options.folders), not options.quiet, None, {}
    check_one_model(folders)  # before a model, which takes long
    examples = None if options.data is None else load_examples(options.data)
    model = _model_of(options.folders[0], options.model, progress=progress)
    if examples is not None:
        data = encode(model, examples, chat=options.chat)
    elif model.tokenizer is not None and model.tokenizer.chat_template is not None:
        demo = encode(model, load_examples(emoji.data_file("emoji.jsonl")), chat=True)
        if all(run is not None and run.data_hash == demo.fingerprint for run in map(run_of, folders.values())):
            data, settings = demo, {"prompts": emoji.questions()[:4], "decoding": emoji.DECODING}
    if options.prompts:
        alone = None if data is not None else encode_prompts(model, options.prompts, chat=options.chat)
        settings["prompts"] = alone or options.prompts
    path = options.out or options.folders[0] / "comparison.html"
    print(comparison(folders, model, path, data=data, progress=progress, **settings))
    return 0


def run_search(options: argparse.Namespace) -> int:
    """Search, save what is recommended with the table of all that was tried; a search that was stopped goes on."""
    examples, progress = load_examples(options.data), not options.quiet  # before a model, which takes long
    model, among = load_model(options.model, progress=progress), options.among  # the end is no answer
    reading = {"chat": options.chat, "end": among is None, "among_answers": among}
    data = encode(model, examples, **reading)
    within = None if options.kl is None else {"kl": options.kl}
    settings = {"budget": options.budget, "metric": options.metric, "within": within, "seed": options.seed}
    checkpoint, config = options.out / "search.ckpt", replace(SEARCH, steps=options.steps)
    result = search(model, data, config=config, checkpoint=checkpoint, progress=progress, **settings)
    save(result.recommended, options.out, model)
    result.to_frame().to_csv(options.out / "search.csv", index=False)
    (options.out / "search.py").write_text(script_of(options, reading, result.code), encoding="utf-8")
    print(result)
    print(f"\nsaved edit    {options.out}, to be used at strength {result.variant.strength}")
    print(f"all that was tried   {options.out / 'search.csv'}")
    print(f"Python that trains it anew   {options.out / 'search.py'}")
    return 0


def run_experiment(options: argparse.Namespace) -> int:
    """Run an experiment of the paper, and print its table."""
    print(outcome(options))
    return 0


def run_judge(options: argparse.Namespace) -> int:
    """Compare the texts of two runs by a judge, and print the win rate."""
    print(verdict(options))
    return 0


def run_doctor(options: argparse.Namespace) -> int:
    """Say what is installed, and whether it works."""
    text, passed = diagnosis(options.model)
    print(text)
    return 0 if passed else 1


def _loaded(folder: Path, name: str | None, *, progress: bool) -> tuple[Any, ReFT]:
    """The model that a saved intervention was trained on (or another one), and the intervention."""
    model = _model_of(folder, name, progress=progress)
    return model, load(folder, model)


def _model_of(folder: Path, name: str | None, *, progress: bool) -> Any:
    """The model that a saved intervention was trained on, or another one."""
    trained_on = model_of(folder)
    default = None if trained_on.name == DEFAULT_MODEL else trained_on.name
    return load_model(name or trained_on.source.get("wheel") or default, progress=progress)


def _explanation(reft: ReFT, strength: float) -> str:
    places = ", ".join(f"{site.hook} at {site.positions}" for site in reft.sites)
    return (
        f"Edits: {places}; strength {strength:g}.\n"
        "Each turn gives the model the whole conversation as one new prompt. Positions count in that prompt: the "
        "last\ntokens are those that open the model's new answer, so every answer is edited at its own start, and the "
        "text of\nearlier turns is read unedited. An empty line ends the chat.\n"
    )


def _line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
