"""Preference objectives against trl's trainers, on random Llamas of one layer; an edit is a hook on the plain model."""

import copy

import pytest
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

import architectures

trl = pytest.importorskip("trl")
WORDS = architectures.TEXT.split()
PAIRS = [
    (" ".join(WORDS[i : i + 2 + i % 3]), f" {WORDS[i + 4]}" * (1 + i % 2), f" {WORDS[i + 6]} {WORDS[i]}")
    for i in range(8)
]


def _plain():
    config = transformers.LlamaConfig(
        vocab_size=len(architectures.tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.3,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double().eval()
    model.config.architectures = ["LlamaForCausalLM"]
    return model


@pytest.fixture
def both(doubles):
    """A bridge with pairs and an edit of it; and the plain model, edited by a hook, with its unedited twin."""
    import reftlens as rl

    reference = _plain()
    bridge = TransformerBridge.boot_transformers(
        architectures.NAMES["llama"],
        hf_model=copy.deepcopy(reference),
        tokenizer=architectures.tokenizer(),
        device="cpu",
        dtype=torch.float64,
    ).eval()
    data = rl.training.preference_pairs(bridge, PAIRS)
    vector = 0.5 * torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    reft = rl.ReFT({rl.resid_post(0, "all"): rl.SteeringVector(32, vector=vector)}).double()
    policy = copy.deepcopy(reference)

    def add(module, args, output):
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    policy.model.layers[0].register_forward_hook(add)
    return bridge, data, reft, policy, reference


def _first_loss(rl, both, objective):
    """Of the step on all pairs, before it changes anything; and of the same edit turned round."""
    bridge, data, reft, _, _ = both
    settings = {"steps": 1, "batch_size": 8, "shuffle": False, "progress": False, "objective": objective}
    return rl.fit(reft.clone(), bridge, data, **settings).losses[0]


def _arguments(folder):
    return {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False}


def _rows():
    return trl.trainer.dpo_trainer.Dataset.from_list(
        [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
    )


def test_dpo_is_the_loss_of_trl(both, tmp_path):
    import reftlens as rl

    _, data, _, policy, reference = both
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(beta=0.3, **_arguments(tmp_path)),
        train_dataset=_rows(),
        processing_class=architectures.tokenizer(),
    )
    order = [*range(0, 16, 2), *range(1, 16, 2)]  # trl takes the chosen first, and then the rejected
    inputs = {
        "input_ids": data.tokens[order],
        "attention_mask": data.attention_mask[order].long(),
        "completion_mask": data.target_mask[order].long(),
    }
    expected = trainer.compute_loss(trainer.model, inputs).item()
    assert abs(expected - 0.6931) > 0.01
    assert abs(_first_loss(rl, both, rl.training.DPO(0.3)) - expected) < 1e-6
    assert abs(_first_loss(rl, both, rl.training.DPO(0.5)) - expected) > 1e-3


def test_simpo_is_the_loss_of_trl(both, tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    import reftlens as rl

    _, data, _, policy, _ = both
    trainer = CPOTrainer(
        model=policy,
        args=CPOConfig(loss_type="simpo", beta=2.0, simpo_gamma=0.7, cpo_alpha=0.0, **_arguments(tmp_path)),
        train_dataset=_rows(),
        processing_class=architectures.tokenizer(),
    )
    with torch.no_grad():
        logits = policy(data.tokens, attention_mask=data.attention_mask.long()).logits
    labels = torch.where(data.target_mask, data.tokens, -100)
    means = trainer.get_batch_logps(logits, labels, average_log_prob=True)
    expected = trainer.cpo_loss(means[::2], means[1::2])[0].mean().item()
    assert abs(_first_loss(rl, both, rl.training.SimPO(2.0, 0.7)) - expected) < 1e-6
    assert abs(_first_loss(rl, both, rl.training.SimPO(2.0, 0.0)) - expected) > 1e-3
