"""Methods in one run: the same rows and steps for all, against loops written by hand, stored, resumed."""

import copy
import math

import pytest
import torch

import architectures

WORDS = architectures.TEXT.split()
FAST = ("loreft", "direft", "red", "consreft", "lora", "dora", "ia3", "prefix", "head", "steering", "reft+lora", "base")


def _subject(architecture="llama", dtype=torch.float32):
    from reftlens.experiments.methods import Subject

    return Subject(architectures.hf_model(architecture).to(dtype), tokenizer=architectures.tokenizer())


def _data(subject, rows=6):
    import reftlens as rl

    examples = [
        rl.Example(" ".join(WORDS[i : i + 2 + i % 3]), " " + " ".join(WORDS[i + 5 : i + 6 + i % 4]))
        for i in range(rows)
    ]
    return rl.encode(subject.bridge, examples)


def _config(**settings):
    import reftlens as rl

    return rl.FitConfig(**{"steps": 4, "batch_size": 2, "lr": 1e-2, "warmup": 2, **settings})


def _losses_by_hand(subject, data, config, seed, steps):
    """LoRA by transformers, peft and torch alone; rows and rates are read off the config."""
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
        model = peft.get_peft_model(subject.plain(), made)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    losses = []
    for step in range(steps):
        rows = [row for some in config.micro_batches(step, len(data)) for row in some]
        tokens, mask = data.tokens[rows], data.attention_mask[rows].long()
        labels = torch.where(data.target_mask[rows], tokens, -100)
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(step, steps)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lora_equals_plain_transformers_and_peft_over_twenty_steps(dtype, tolerance, accumulate, request):
    pytest.importorskip("peft")
    if dtype == torch.float64:
        request.getfixturevalue("doubles")  # transformers computes norms and the loss in float32 otherwise
    from reftlens.experiments.methods import Lora

    subject = _subject(dtype=dtype)
    data = _data(subject)
    config = _config(steps=20, batch_size=2, accumulate=accumulate, weight_decay=0.1, schedule="cosine", seed=5)
    method = Lora(rank=3, alpha=6, targets=("q_proj", "v_proj", "down_proj"))
    trained = method.fit(subject, data, config, seed=5, progress=False)
    expected = _losses_by_hand(subject, data, config, 5, 20)
    assert len(trained.losses) == 20 and trained.losses[-1] < 0.8 * trained.losses[0]
    assert max(abs(a - b) for a, b in zip(trained.losses, expected, strict=True)) < tolerance
    other = method.fit(subject, data, config, seed=6, progress=False)  # another seed is another curve
    assert max(abs(a - b) for a, b in zip(other.losses, expected, strict=True)) > 1e-3


def test_lora_is_the_product_of_its_matrices_added_to_the_weight(doubles):
    pytest.importorskip("peft")
    from reftlens.experiments.methods import Lora

    subject = _subject(dtype=torch.float64)
    data = _data(subject)
    trained = Lora(rank=2, targets=("q_proj",)).fit(subject, data, _config(), progress=False)
    by_hand = subject.plain()
    for block, adapted in zip(by_hand.model.layers, trained.acting.inside.base_model.model.model.layers, strict=True):
        lora = adapted.self_attn.q_proj
        product = lora.lora_B["default"].weight @ lora.lora_A["default"].weight
        assert product.abs().max() > 1e-3
        block.self_attn.q_proj.weight.data += 2 * product  # alpha over rank
    logits = by_hand(data.tokens, attention_mask=data.attention_mask.long()).logits.log_softmax(-1)
    scores = logits[:, :-1].gather(2, data.tokens[:, 1:, None]).squeeze(2) * data.target_mask[:, 1:]
    assert (trained.log_probs(data) - scores.sum(dim=1)).abs().max() < 1e-9


def test_reft_is_what_fit_makes_of_the_same_start():
    import reftlens as rl
    from reftlens.experiments.methods import Reft

    subject = _subject()
    data, config = _data(subject), _config()
    method = Reft(rank=2, positions="f1+l1", layers=(0, 2), tied=False)
    trained = method.fit(subject, data, config, seed=3, progress=False)
    reft = rl.ReFT(
        {
            rl.resid_post(i, p): rl.LoReFT(subject.bridge.cfg.d_model, rank=2, init="identity")
            for i in (0, 2)
            for p in ("f1", "l1")
        }
    )
    reft.reset(3)
    run = rl.fit(reft, subject.bridge, data, config, seed=3, progress=False)
    assert trained.losses == run.losses
    assert trained.parameters == 4 * (2 * 32 * 2 + 2)
    assert trained.percent == pytest.approx(100 * trained.parameters / subject.parameters)
    loss = rl.evaluate(reft, subject.bridge, data, [1], progress=False).loss[0]
    assert torch.allclose(trained.log_probs(data), -loss * data.target_mask.sum(dim=1))


def test_rows_of_similar_length_together_give_the_step_of_the_whole_micro_batch(doubles, monkeypatch):
    from reftlens.experiments.methods import Lora, loop
    from reftlens.text import beginnings

    pytest.importorskip("peft")
    subject = _subject(dtype=torch.float64)
    data, config, curves, widths = _data(subject), _config(batch_size=6, steps=5), [], []
    summed = loop.Loop._summed

    def watched(self, batch):
        widths[-1].append(batch.tokens.shape)
        return summed(self, batch)

    monkeypatch.setattr(loop.Loop, "_summed", watched)
    for overhead in (0.0, 1e9):
        widths.append([])
        monkeypatch.setitem(beginnings.PASS, "cpu", overhead)
        curves.append(Lora(rank=2).fit(subject, data, config, progress=False).losses)
    assert len(widths[0]) > 5 == len(widths[1]) and max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-11
    assert sum(rows * width for rows, width in widths[0]) == int(data.attention_mask.sum()) * 5


@pytest.mark.parametrize("name", FAST)
def test_each_method_trains_is_stored_and_read_again(name, tmp_path):
    import reftlens as rl
    from reftlens.experiments import methods

    pytest.importorskip("peft")
    subject = _subject()
    data = _data(subject)
    steps = 40 if name == "prefix" else 6  # prefixes begin with drawn numbers, far from the unedited model
    trained = methods.METHODS[name].fit(subject, data, _config(steps=steps), progress=False)
    assert bool(trained.parameters) == bool(trained.losses) == (name != "base")
    assert trained.parameters == methods.METHODS[name].size(subject)
    if trained.losses:
        assert trained.losses[-1] < trained.losses[0] and trained.seconds_per_step > 0
    size = trained.save(tmp_path)
    assert size >= 4 * trained.parameters
    again = methods.load(tmp_path, subject)
    assert again.method == trained.method and again.measured == trained.measured
    scores = trained.log_probs(data, batch_size=4)
    assert torch.equal(again.log_probs(data, batch_size=4), scores) and torch.isfinite(scores).all()
    prompts = rl.encode_prompts(subject.bridge, [" ".join(WORDS[:4]), WORDS[5]])
    decoding = rl.Decoding(max_new_tokens=6)
    texts = trained.texts(prompts, decoding)
    assert len(texts) == 2 and again.texts(prompts, decoding) == texts
    base = methods.Unedited().fit(subject).log_probs(data)
    assert torch.allclose(base, scores) == (name == "base")


@pytest.mark.parametrize("name", ["loreft", "lora", "reft+lora", "head"])
def test_a_run_that_was_killed_ends_as_one_that_was_not(name, tmp_path, monkeypatch):
    from reftlens.experiments import methods
    from reftlens.experiments.methods import costs, loop
    from reftlens.training import fitting

    pytest.importorskip("peft")
    subject = _subject()
    data, config = _data(subject), _config(steps=45, batch_size=3)
    method = methods.METHODS[name]
    if name == "lora":
        method = methods.Lora(dropout=0.3)  # its draws follow from seed and step
    whole = method.fit(subject, data, config, seed=1, progress=False)
    steps, step, advance = [], loop.Loop.step, fitting.advance

    def killed(make):
        def run(*args):
            steps.append(1)
            if len(steps) == 31:
                raise KeyboardInterrupt
            return make(*args)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "step", killed(step))
        patch.setattr(fitting, "advance", killed(advance))
        with pytest.raises(KeyboardInterrupt):
            method.fit(subject, data, config, seed=1, checkpoint=tmp_path / "run", progress=False)
    done = []
    clock = [0.0]
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "step", lambda self: clock.append(clock[-1] + 2.0) or done.append(1) or step(self))
        patch.setattr(
            fitting, "advance", lambda *args: clock.append(clock[-1] + 2.0) or done.append(1) or advance(*args)
        )
        patch.setattr(costs.time, "perf_counter", lambda: clock[-1])
        again = method.fit(subject, data, config, seed=1, checkpoint=tmp_path / "run", progress=False)
    assert len(done) == 25  # from step 20, the last that was written
    assert again.seconds_per_step == 2.0  # of the steps that were taken in this call
    assert again.losses == whole.losses
    assert torch.equal(again.log_probs(data), whole.log_probs(data))


def test_a_checkpoint_of_another_method_or_start_is_refused(tmp_path):
    import reftlens as rl
    from reftlens.experiments.methods import Lora

    pytest.importorskip("peft")
    subject = _subject()
    data = _data(subject)
    Lora(rank=2).fit(subject, data, _config(), checkpoint=tmp_path / "run", progress=False)
    with pytest.raises(rl.errors.CheckpointMismatch, match="method"):
        Lora(rank=2, alpha=1).fit(subject, data, _config(), checkpoint=tmp_path / "run", progress=False)


def test_patience_keeps_the_best_weights_of_a_plain_run():
    from reftlens.experiments.methods import Lora

    pytest.importorskip("peft")
    subject = _subject()
    data = _data(subject, rows=8)
    train, held = data[:5], data[5:]
    config = _config(steps=200, lr=0.05, batch_size=5, eval_every=2, patience=2, warmup=0)
    trained = Lora(rank=4).fit(subject, train, config, validation=held, progress=False)
    evaluations = trained.measured.validation
    assert len(trained.losses) < 200
    best = min(loss for _, loss in evaluations)
    mean = -trained.log_probs(held).sum() / held.target_mask.sum()
    assert mean.item() == pytest.approx(best, abs=1e-5) and evaluations[-1][1] > best


def test_reft_and_lora_have_the_gradients_of_a_loop_written_by_hand(doubles):
    peft = pytest.importorskip("peft")
    from reftlens.experiments.methods import Lora, Reft
    from reftlens.experiments.methods.joint import ReftAndLora

    subject = _subject(dtype=torch.float64)
    data = _data(subject)
    config = _config(steps=3, batch_size=6, warmup=0, clip=None, schedule="constant", shuffle=False)
    method = ReftAndLora(
        Reft("DiReFT", rank=2, positions="l1", layers=(1,), init="paper"), Lora(2, targets=("q_proj",))
    )
    trained = method.fit(subject, data, config, seed=4, progress=False)

    edit = method.reft.edit(subject, 4)[0]
    w1, w2, b = (p.detach().clone().requires_grad_() for p in (edit.W, edit.W2, edit.b))
    torch.manual_seed(4)
    model = peft.get_peft_model(subject.plain(), method.lora.config())
    last, rows = data.prompt_mask.sum(dim=1) - 1, torch.arange(len(data))

    def act(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        new = h.clone()
        new[rows, last] = h[rows, last] + (h[rows, last] @ w1.T + b) @ w2
        return (new, *output[1:]) if isinstance(output, tuple) else new

    model.get_base_model().model.layers[1].register_forward_hook(act)
    parameters = [w1, w2, b, *(p for p in model.parameters() if p.requires_grad)]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    losses = []
    for _ in range(3):
        labels = torch.where(data.target_mask, data.tokens, -100)
        loss = model(input_ids=data.tokens, attention_mask=data.attention_mask.long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(abs(x - y) for x, y in zip(trained.losses, losses, strict=True)) < 1e-9
    ours = trained.acting.reft[0]
    for mine, by_hand, start in ((ours.W, w1, edit.W), (ours.W2, w2, edit.W2), (ours.b, b, edit.b)):
        assert (mine - by_hand).abs().max() < 1e-8 and (mine - start).abs().max() > 1e-3
    theirs = [p for n, p in model.named_parameters() if p.requires_grad]
    for mine, by_hand in zip(trained.acting.weights.values(), theirs, strict=True):
        assert (mine - by_hand).abs().max() < 1e-8 and by_hand.abs().max() > 1e-4


def test_bitfit_trains_biases_and_refuses_a_model_without():
    from reftlens.experiments.methods import BitFit

    subject = _subject("gpt2")
    data = _data(subject)
    before = subject.plain().state_dict()
    trained = BitFit().fit(subject, data, _config(), progress=False)
    after = trained.acting.inside.state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all(n.endswith(".bias") for n in moved)
    assert trained.parameters == sum(before[n].numel() for n in before if n.endswith(".bias"))
    assert trained.losses[-1] < trained.losses[0]
    with pytest.raises(ValueError, match="has none: choose a model with biases"):
        BitFit().fit(_subject("llama"), _data(_subject("llama")), _config(), progress=False)


def test_prefixes_score_and_write_alike_alone_and_in_a_batch():
    import reftlens as rl
    from reftlens.experiments.methods import Prefix

    pytest.importorskip("peft")
    subject = _subject(dtype=torch.float64)
    data = _data(subject)
    trained = Prefix(tokens=3).fit(subject, data, _config(), progress=False)
    together = trained.log_probs(data)
    whole = trained.acting.inside(data.tokens, attention_mask=data.attention_mask.long()).logits.log_softmax(-1)
    targets = whole[:, :-1].gather(2, data.tokens[:, 1:, None]).squeeze(2) * data.target_mask[:, 1:]
    assert (together - targets.sum(dim=1)).abs().max() < 1e-6
    alone = torch.cat([trained.log_probs(data[[i]]) for i in range(len(data))])
    assert (together - alone).abs().max() < 1e-6
    texts = [" ".join(WORDS[:n]) for n in (1, 4, 2)]
    decoding = rl.Decoding(max_new_tokens=8)
    batch = trained.texts(rl.encode_prompts(subject.bridge, texts), decoding)
    assert batch == [trained.texts(rl.encode_prompts(subject.bridge, [text]), decoding)[0] for text in texts]


@pytest.mark.parametrize("settings", [{"no_repeat_ngram": 2}, {"repetition_penalty": 1.5}, {"beams": 2}])
def test_a_plain_model_writes_what_its_bridge_does_whatever_stands_beside_a_prompt(settings):
    import reftlens as rl
    from reftlens.experiments.methods.acting import OnBridge, OnPlain

    subject = _subject()
    texts = [" ".join(WORDS[i : i + 3 + i % 4]) for i in range(8)]
    prompts = rl.encode_prompts(subject.bridge, texts)
    decoding = rl.Decoding(max_new_tokens=12, **settings)
    padding = (~prompts.attention_mask).nonzero()[:, 0]
    assert len(padding)
    for pad in (2, 52, 200):  # any id serves as padding: it is no text of the row
        prompts.tokens[~prompts.attention_mask] = pad
        written = OnPlain(subject.plain(), subject).texts(prompts, decoding)
        assert written == OnBridge(subject.bridge, None).texts(prompts, decoding)


def test_methods_inside_a_method_are_stored_as_what_they_are(tmp_path):
    from reftlens.experiments import methods

    pytest.importorskip("peft")
    subject = _subject()
    method = methods.ReftAndLora(methods.Reft("DiReFT", rank=2, layers=(0, 2)), methods.Dora(2, targets=("v_proj",)))
    trained = method.fit(subject, _data(subject), _config(), progress=False)
    trained.save(tmp_path)
    again = methods.load(tmp_path, subject)
    assert again.method == method and again.method.name == "DiReFT and DoRA"
    assert torch.equal(again.log_probs(_data(subject)), trained.log_probs(_data(subject)))


def test_methods_of_another_model_are_not_read(tmp_path):
    import reftlens as rl
    from reftlens.experiments import methods

    subject = _subject()
    methods.Reft(rank=1).fit(subject, _data(subject), _config(), progress=False).save(tmp_path)
    with pytest.raises(rl.errors.StoreMismatch, match="another model"):
        methods.load(tmp_path, _subject("qwen2"))
    with pytest.raises(ValueError, match="loreft"):
        methods.method_of("lorefd")


def test_a_loop_takes_any_module_forward_pass_and_losses():
    """A head on hidden states: a function of the rows gives what the losses are computed of."""
    from reftlens.experiments.methods.loop import Loop, train

    subject = _subject()
    data = _data(subject)
    head, body = torch.nn.Linear(32, 1), subject.plain().requires_grad_(False)
    goal = torch.arange(len(data), dtype=torch.float32)

    def hidden(module, batch):
        with torch.no_grad():
            out = body(batch.tokens, attention_mask=batch.attention_mask.long(), output_hidden_states=True)
        return module(out.hidden_states[-1][:, 0]).squeeze(1)

    def losses(output, batch):
        return (output - goal[: len(batch)]).square()

    history = train(Loop(head, data, _config(steps=30, batch_size=6, shuffle=False), hidden, losses), progress=False)
    assert history.losses[-1] < history.losses[0] and len(history.losses) == 30
    assert not math.isnan(history.seconds)
    with pytest.raises(ValueError, match="nothing to train"):
        Loop(copy.deepcopy(body), data, _config())


def test_each_kind_of_the_family_is_made_at_its_sites_and_begins_with_the_unedited_model():
    import reftlens as rl
    from reftlens.experiments.methods import METHODS, Reft
    from reftlens.experiments.methods.refts import FAMILY

    subject = _subject()
    data = _data(subject)
    base = rl.evaluate(METHODS["loreft"].edit(subject, 0), subject.bridge, data, [0], progress=False).loss[0]
    made = {m.kind: m for m in METHODS.values() if isinstance(m, Reft)} | {"SteeringVector": Reft("SteeringVector")}
    assert set(made) == set(FAMILY)
    for kind, method in made.items():
        reft = method.edit(subject, 0)
        assert [str(site) for site in reft.sites] == [str(rl.resid_post(i, "f7+l7")) for i in range(3)]
        assert {module.kind for _, module in reft.items()} == {kind}
        loss = rl.evaluate(reft, subject.bridge, data, [1], progress=False).loss[0]
        assert ((loss - base).abs().max() < 1e-5) == (kind != "ConsReFT"), kind
    untied = Reft(positions="f1+l2", tied=False, layers=[1]).edit(subject, 0)
    assert [str(site) for site in untied.sites] == [str(rl.resid_post(1, part)) for part in ("f1", "l2")]
    for wrong in ({"kind": "DAS"}, {"rank": 0}, {"layers": ()}):
        with pytest.raises(ValueError):
            Reft(**wrong)


@pytest.mark.parametrize("name", ["lora", "prefix", "reft+lora", "loreft"])
def test_a_model_that_predicts_no_next_token_is_refused_before_any_training(name, monkeypatch):
    from transformers import BertConfig, BertForMaskedLM

    from reftlens.experiments import methods
    from reftlens.experiments.methods import loop

    pytest.importorskip("peft")
    tokenizer = architectures.tokenizer()
    sizes: dict = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    encoder = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes))
    subject = methods.Subject(encoder, tokenizer=tokenizer)
    monkeypatch.setattr(loop.Loop, "step", lambda self: pytest.fail("it was trained"))
    with pytest.raises(ValueError, match="sees the tokens that it would predict"):
        methods.METHODS[name].fit(subject, _data(subject), _config(), progress=False)
