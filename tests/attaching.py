"""What the tests of `attach` share: prompts, edits of every kind, and texts written by either library."""

import warnings
from functools import cache

import torch

import architectures

D, VOCABULARY, NEW = architectures.D, 300, 8
PAD = 2
LENGTHS = (9, 3, 17, 6, 1, 12)


def dtype_of(architecture):
    """float64; but beside padding the attention of Gemma is NaN there, as its softmax is of float32."""
    return torch.float32 if architecture.startswith("gemma") else torch.float64


def fresh(architecture="llama"):
    return architectures.hf_model(architecture).to(dtype_of(architecture))


plain = cache(fresh)  # shared: every test leaves it as it was


@cache
def bridge(architecture):
    """A bridge of these tests alone: what is found of one in float64 here, others find with norms in float64, too."""
    return architectures.fresh_bridge(architecture, dtype=dtype_of(architecture))


def prompts(count=6, seed=0):
    """Rows of random tokens of different lengths."""
    from reftlens.text.batch import batch_from_rows
    from reftlens.text.view import TokenRole

    generator = torch.Generator().manual_seed(seed)
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(count)]
    ids = [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    roles = [[int(TokenRole.PROMPT)] * n for n in lengths]
    return batch_from_rows(ids, roles, tokenizer=architectures.tokenizer())


def left(batch):
    """Ids and attention mask, padded on the left."""
    real = batch.attention_mask
    order = real.long().argsort(dim=1, stable=True)
    mask = real.gather(1, order)
    return batch.tokens.gather(1, order).masked_fill(~mask, PAD), mask.long()


def edit(kind="mixed", rank=3):
    import reftlens as rl

    P, generator = rl.positions, torch.Generator().manual_seed(5)
    direction = torch.randn(D, generator=generator)

    def lo():
        return rl.LoReFT(D, rank)

    letters, push = P.Written("[a-zA-Z]", regex=True), rl.SteeringVector(D, 3 * direction)
    gated = rl.interventions.Gated(lo(), rl.interventions.Threshold(direction, 0.0, per="prompt"))
    sites = {
        "last": {rl.resid_post(1, "last"): lo()},
        "f2+l2": {rl.resid_pre(1, "f2+l2"): lo()},
        "prompt": {rl.resid_pre(0, "prompt"): rl.SteeringVector(D, direction)},
        "all": {rl.resid_post(0, "all"): lo()},
        "generated": {rl.resid_post(2, "generated"): push},
        "first generated": {rl.resid_post(0, P.Response() >> P.First(4)): lo()},
        "written": {
            rl.resid_post(1, P.Written("[a-zA-Z]", regex=True, then="after")): rl.SteeringVector(D, 3 * direction)
        },
        "gate per prompt": {rl.resid_post(0, "all"): gated},
        "gate per token": {
            rl.resid_post(1, "all"): rl.interventions.Gated(lo(), rl.interventions.Threshold(direction, 0.0))
        },
        "schedule": {rl.resid_post(1, "all"): rl.interventions.Gated(lo(), rl.interventions.Schedule([1.0, 0.5, 0.0]))},
        "mixed": {
            rl.resid_pre(0, "last"): lo(),
            rl.resid_post(0, "all"): gated,
            rl.resid_post(1, P.Response() >> P.First(4)): lo(),
            rl.resid_post(2, letters): push,
        },
    }[kind]
    reft = rl.ReFT(sites).double().eval()
    for module in reft.modules():
        if isinstance(module, rl.LoReFT):
            module.reset(generator)
    return reft


KINDS = (
    *("last", "f2+l2", "prompt", "all", "generated", "first generated", "written"),
    *("gate per prompt", "gate per token", "schedule", "mixed"),
)


_made = []


def attached(reft, model, **kwargs):
    import reftlens as rl

    _made.append(rl.attach(reft, model, tokenizer=architectures.tokenizer(), **kwargs))
    return _made[-1]


def leave():
    """Detach what a test that failed has left."""
    while _made:
        quiet(_made.pop())


def ours(reft, architecture, batch, **decoding):
    import reftlens as rl

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*chose no token")
        model = bridge(architecture)
        return rl.generate(reft, model, batch, rl.Decoding(**{"max_new_tokens": NEW, **decoding})).ids


def theirs(model, tokens, mask, **settings):
    """What `generate` writes after each row."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, **settings}
    return model.generate(tokens, attention_mask=mask, **settings)[:, tokens.shape[1] :].tolist()


def assert_same(written, ids):
    for row, expected in zip(written, ids, strict=True):
        assert row[: len(expected)] == list(expected) and set(row[len(expected) :]) <= {PAD}


def quiet(attachment):
    """Detach, whatever has chosen no token."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attachment.detach()


def state(model):
    """All that an attachment may change of a model."""
    hooks = [(name, list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()]
    return hooks, sorted(model.__dict__), list(model.state_dict())
