"""What pyreft does at a step of training, in the peers' environment."""

import torch
from floors import LR, padded, plain_model
from shapes import SHAPES, TEXTS, TINY_RATE, edited_places, rows_of, start_of

PAD = "<|im_end|>"  # SmolLM2's
TOGETHER = 2048  # tokens of a micro-batch on real text: whole batches in one pass need up to 30 GB


def reft_of(model, spec, kind):
    import pyreft

    d = model.config.hidden_size
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": spec["rank"],
            "intervention": kind(embed_dim=d, low_rank_dimension=spec["rank"], add_bias=True, dtype=model.dtype).to(
                model.device
            ),
        }
        for layer in spec["layers"]
    ]
    return pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations), set_device=False)


def pyreft_step(shape, folder, kind):
    """What pyreft's trainer does at a step: its own loss function on a collated batch, then AdamW."""
    from pyreft.reft_trainer import ReftTrainer

    spec = SHAPES[shape]
    reft = reft_of(plain_model(folder), spec, kind)
    places = torch.tensor(edited_places(shape))  # weights tied over prefix and suffix: one list of places per layer
    ids = rows_of(shape)
    labels = [[-100] * p + row[p:] for row, (p, _) in zip(ids, spec["rows"], strict=True)]
    inputs = {
        "input_ids": padded(ids),
        "attention_mask": padded([[1] * len(r) for r in ids]),
        "labels": padded(labels, -100),
        "intervention_locations": places[:, None, :].repeat(1, len(spec["layers"]), 1),
    }
    optimizer = torch.optim.AdamW([p for p in reft.parameters() if p.requires_grad], lr=LR)
    reft.train()

    def step():
        optimizer.zero_grad(set_to_none=True)
        ReftTrainer.compute_loss(None, reft, inputs).backward()
        optimizer.step()

    return step


def instances(batch, spec, tokenizer):
    """The rows of a batch as pyreft's data sets make them, a padding token before each and all."""
    from pyreft.dataset import get_intervention_locations

    count, rows = len(spec["layers"]), []
    for ids, prompt in batch:
        if spec["positions"] == "last":  # as make_last_position_supervised_data_module
            sink, places = 0, [[prompt - 1]] * count
        else:  # as ReftDataset: short rows would be edited at the padding token
            settings = dict(positions=spec["positions"], num_interventions=count, share_weights=True)
            sink, places = 1, get_intervention_locations(last_position=prompt, **settings)
            places = [[place + 1 for place in at] for at in places]
        row = {
            "input_ids": [*[tokenizer.pad_token_id] * sink, *ids],
            "labels": [*[-100] * (sink + prompt), *ids[prompt:]],
            "attention_mask": [*[0] * sink, *[1] * len(ids)],
        }
        rows.append({**row, "intervention_locations": places})
    return rows


def text_steps(shape, batches, folder):
    """`step(batch)` is one optimizer step, in micro-batches as wide as the whole batch."""
    from pyreft import LoreftIntervention
    from pyreft.dataset import ReftDataCollator
    from pyreft.reft_trainer import ReftTrainer
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

    spec = TEXTS[shape]
    reft = reft_of(plain_model(folder), spec, LoreftIntervention)
    with torch.no_grad():
        for layer, (name, module) in zip(spec["layers"], reft.interventions.items(), strict=True):
            module = module[0] if isinstance(module, list | tuple) else module
            assert f"layer_{layer}_" in name.replace(".", "_"), name
            R, W, b = start_of(layer, 576, spec["rank"])
            module.rotate_layer.weight = R
            module.learned_source.weight.copy_(W), module.learned_source.bias.copy_(b)
            assert torch.allclose(module.rotate_layer.weight, R, atol=1e-6)
    optimizer = torch.optim.AdamW([p for p in reft.parameters() if p.requires_grad], lr=TINY_RATE, weight_decay=0.0)
    # the class that the folder names is unknown to the transformers of the peers; the collator only pads
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", pad_token=PAD)
    rows_of_batch = [instances(batch, spec, tokenizer) for batch in batches]
    collate = ReftDataCollator(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100, padding="longest"))
    reft.train()

    def step(number, only_first=False):
        inputs, total = collate(rows_of_batch[number]), 0.0
        rows, width = inputs["input_ids"].shape
        size = max(1, TOGETHER // width)
        targets = (inputs["labels"] != -100).sum()
        optimizer.zero_grad(set_to_none=True)
        for begin in range(0, size if only_first else rows, size):
            some = {name: value[begin : begin + size] for name, value in inputs.items()}
            loss = ReftTrainer.compute_loss(None, reft, some) * (some["labels"] != -100).sum() / targets
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total

    return step
