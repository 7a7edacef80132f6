"""What tools/fuzz.py feeds to the readers, and what may come of it: success, or an error of gguflora's.

A seed is a small directory of sound files. A mutation changes some bytes of one of them, knowing where a format keeps
its numbers; a target reads the directory as the program would. No test: `test_corpus.py` replays what was found.
"""

import copy
import json
import random
import resource
import shutil
import signal
import struct
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

import gguflora
from gguflora.adapters.adapter import read_adapter
from gguflora.architectures.base_model import describe, read_base
from gguflora.errors import GgufloraError
from gguflora.files.gguf import GgufFile
from gguflora.files.safetensors import as_float32, read_safetensors
from gguflora.merging.high_precision import UnquantizedBase
from gguflora.merging.imatrix import importance_of, read_imatrix

HIDDEN, FFN, HEADS, KV_HEADS, VOCABULARY, LAYERS = 32, 64, 4, 2, 40, 2
SECONDS, MEMORY = 20, 1 << 30
"""What one trial may take."""


# -- sound files --


def shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of a llama so small that it can be merged in milliseconds."""
    kv = HIDDEN // HEADS * KV_HEADS
    block = {
        "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN),
        "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
    }  # fmt: skip
    layers = {f"blk.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in block.items()}
    ends = {"token_embd.weight": (VOCABULARY, HIDDEN), "output.weight": (VOCABULARY, HIDDEN)}
    return {**ends, "output_norm.weight": (HIDDEN,), **layers}


def write_base(path: Path, parts: int = 0, tokenizer: str = "gpt2") -> None:
    """The llama in F32, F16 and Q8_0, in one file or split."""
    random_ = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=-(-len(shapes()) // parts) if parts else 0)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["a b"])
    writer.add_array("tokenizer.ggml.tokens", [f"<{n}>" for n in range(VOCABULARY)])
    writer.add_array("tokenizer.ggml.scores", [float(n) for n in range(VOCABULARY)])
    for name, shape in shapes().items():
        values = random_.standard_normal(shape).astype(np.float32)
        if "ffn" in name and "norm" not in name:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values.astype(np.float16) if "attn_v" in name else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@cache
def base(tokenizer: str = "gpt2") -> Path:
    """The llama, sound, for adapters to be merged into."""
    path = Path(tempfile.mkdtemp(prefix="gguflora-fuzz-")) / "base.gguf"
    write_base(path, tokenizer=tokenizer)
    return path


def write_lora_directory(folder: Path) -> None:
    """A LoRA of two modules, by hand: no PEFT is needed to replay what was found."""
    random_ = np.random.default_rng(1)
    tensors = {}
    for module, (n_out, n_in) in {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 64)}.items():
        at = f"base_model.model.model.layers.0.{module}"
        tensors[f"{at}.lora_A.weight"] = random_.standard_normal((4, n_in)).astype(np.float32)
        tensors[f"{at}.lora_B.weight"] = random_.standard_normal((n_out, 4)).astype(np.float16)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 4}, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")


def write_checkpoint(folder: Path) -> None:
    """The llama as Hugging Face keeps it, in two shards."""
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    ends = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    shards: list[dict[str, np.ndarray]] = [{}, {}]
    for number, (name, shape) in enumerate(shapes().items()):
        words = name.split(".")
        hf = ends[words[0]] if len(words) == 2 else f"model.layers.{words[1]}.{names[words[2]]}"
        shards[number % 2][f"{hf}.weight"] = np.ones(shape, np.float16)
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        safetensors.numpy.save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def write_imatrix(folder: Path) -> None:
    """Importance of two tensors, in both formats."""
    writer = gguf.GGUFWriter(folder / "imatrix.gguf", "llama")
    content = struct.pack("<i", 2)
    for name, n_in in {"blk.0.attn_q.weight": HIDDEN, "blk.0.ffn_down.weight": FFN}.items():
        sums = np.arange(n_in, dtype=np.float32)
        writer.add_tensor(f"{name}.in_sum2", sums.reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[7]], np.float32))
        content += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 3, n_in) + sums.tobytes()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "imatrix.dat").write_bytes(content + struct.pack("<ii", 3, 5) + b"words")


def write_lora_gguf(folder: Path) -> None:
    """A GGUF LoRA, by gguflora."""
    write_lora_directory(folder)
    gguflora.convert(folder, base(), folder / "lora.gguf", outtype="f16")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()


def write_npz(folder: Path) -> None:
    """A LoRA of an older mlx-lm: arrays in a .npz file."""
    random_ = np.random.default_rng(2)
    at = "model.layers.0.self_attn.q_proj"
    pair: dict[str, Any] = {
        f"{at}.lora_a": random_.standard_normal((HIDDEN, 4)).astype(np.float32),
        f"{at}.lora_b": random_.standard_normal((4, HIDDEN)).astype(np.float32),
    }
    np.savez(folder / "adapters.npz", **pair)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_tokenizer(folder: Path) -> None:
    """A LoRA with the tokenizer of its training: other added tokens, merges and templates than the base's."""
    write_lora_directory(folder)
    vocabulary = {f"<{n}>": n for n in range(30)}
    added = [{"id": n, "content": f"[new {n}]", "special": n % 2 == 0, "normalized": False} for n in (30, 31, 45)]
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"], "c d"]}
    decoder = {str(token["id"]): {"content": token["content"], "special": token["special"]} for token in added}
    files = {
        "tokenizer.json": {"version": "1.0", "added_tokens": added, "model": model},
        "tokenizer_config.json": {
            "eos_token": "[new 30]", "bos_token": {"content": "<1>"}, "added_tokens_decoder": decoder,
            "chat_template": [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}],
        },
        "added_tokens.json": {"[new 31]": 31},
        "chat_template.json": {"chat_template": "{{ 3 }}"},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def write_pieces(folder: Path) -> None:
    """A LoRA with a SentencePiece model: a byte, control tokens, pieces with scores, and tokens added to them."""
    write_lora_directory(folder)
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<0x0A>", 0.0, 6)]
    pieces += [(f"\u2581p{n}", -1.5 * n, 1) for n in range(30)]
    content = b""
    for text, score, kind in pieces:
        name = text.encode()
        piece = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        content += b"\x0a" + bytes([len(piece)]) + piece
    (folder / "tokenizer.model").write_bytes(content + b"\x12\x02\x18\x02")
    (folder / "added_tokens.json").write_text(json.dumps({"[new]": 35, "<|end|>": 36}))
    decoder = {"36": {"content": "<|end|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "added_tokens_decoder": decoder}))


def merge_pieces(folder: Path) -> None:
    """An adapter with a SentencePiece tokenizer merged into a sound base of that kind, and converted."""
    with tempfile.TemporaryDirectory() as other:
        try:
            gguflora.merge(base("llama"), folder, Path(other) / "out.gguf", threads=1)
        finally:
            gguflora.convert(folder, base("llama"), Path(other) / "lora.gguf")


def write_mmproj(folder: Path) -> None:
    """The vision part of a multimodal model, in F32 and Q8_0."""
    writer = gguf.GGUFWriter(folder / "mmproj.gguf", "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_projector_type("pixtral")
    writer.add_vision_block_count(1)
    writer.add_vision_head_count(HEADS)
    random_ = np.random.default_rng(3)
    for name in ("v.blk.0.attn_q", "v.blk.0.attn_k", "v.blk.0.ffn_up", "mm.1"):
        values = random_.standard_normal((HIDDEN, HIDDEN)).astype(np.float32)
        if name == "mm.1":
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.add_tensor("v.patch_embd.weight", np.zeros((HIDDEN, 3, 2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vision_lora(folder: Path) -> None:
    """A LoRA of the vision part."""
    layer = "vision_tower.transformer.layers.0"
    modules = (f"{layer}.attention.q_proj", f"{layer}.feed_forward.up_proj", "multi_modal_projector.linear_1")
    shape = {"A": (4, HIDDEN), "B": (HIDDEN, 4)}
    tensors = {
        f"base_model.model.model.{module}.lora_{side}.weight": np.ones(shape[side], np.float32)
        for module in modules
        for side in "AB"
    }
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")


# -- targets --


def read_gguf(folder: Path) -> None:
    """Everything that can be asked of a model's file or files."""
    with GgufFile(sorted(folder.glob("*.gguf"))[-1]) as file:
        describe(file)
        dict(file.metadata)
        for tensor in file.tensors.values():
            file.read_rows(tensor, 0, tensor.n_rows)
        file.layout({}, {name: (tensor.shape, tensor.type) for name, tensor in file.tensors.items()})


def merge_into(folder: Path) -> None:
    """A sound adapter merged into a base."""
    with tempfile.TemporaryDirectory() as other:
        write_lora_directory(Path(other))
        gguflora.merge(folder / "base.gguf", other, Path(other) / "out.gguf", threads=1)


def merge_into_mmproj(folder: Path) -> None:
    """A sound adapter merged into a vision part."""
    with tempfile.TemporaryDirectory() as other:
        write_vision_lora(Path(other))
        gguflora.merge(folder / "mmproj.gguf", other, Path(other) / "out.gguf", threads=1)


def merge_adapter(folder: Path) -> None:
    """An adapter merged into a sound base, and converted."""
    adapter = next(iter(folder.glob("*.gguf")), folder)
    read_adapter(adapter)
    with tempfile.TemporaryDirectory() as other:
        try:
            gguflora.merge(base(), adapter, Path(other) / "out.gguf", threads=1)
        finally:
            gguflora.convert(adapter, base(), Path(other) / "lora.gguf")


def read_weights(folder: Path) -> None:
    """All tensors of a safetensors file."""
    for tensor in read_safetensors(folder / "adapter_model.safetensors").values():
        as_float32(tensor).sum()


def read_checkpoint(folder: Path) -> None:
    """All rows of a base from its Hugging Face directory, by the base's GGUF file and by its configuration."""
    for model in (read_base(base()), read_base(folder)):
        with UnquantizedBase.open(folder, model) as source:
            for name, shape in shapes().items():
                source.rows(name, 0, shape[0] if len(shape) == 2 else 1)


def read_importance(folder: Path) -> None:
    """Importance matrices."""
    for name in ("imatrix.gguf", "imatrix.dat"):
        if (folder / name).exists():
            imatrix = read_imatrix(folder / name)
            for tensor, shape in shapes().items():
                importance_of(imatrix, tensor, shape)


Reader = Callable[[Path], None]
SEEDS: dict[str, tuple[Callable[[Path], None], Reader]] = {
    "gguf": (lambda folder: write_base(folder / "base.gguf"), read_gguf),
    "split": (lambda folder: write_base(folder / "base.gguf", parts=3), read_gguf),
    "base": (lambda folder: write_base(folder / "base.gguf"), merge_into),
    "lora": (write_lora_gguf, merge_adapter),
    "imatrix": (write_imatrix, read_importance),
    "safetensors": (write_lora_directory, read_weights),
    "checkpoint": (write_checkpoint, read_checkpoint),
    "peft": (write_lora_directory, merge_adapter),
    "npz": (write_npz, merge_adapter),
    "tokenizer": (write_tokenizer, merge_adapter),
    "pieces": (write_pieces, merge_pieces),
    "mmproj": (write_mmproj, merge_into_mmproj),
}
"""How a seed is written and read, by the name of the target."""


# -- mutations --

NUMBERS = [0, 1, 2, 3, 7, 31, 32, 33, 127, 128, 255, 256, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
NUMBERS += [1 << 32, 1 << 40, 1 << 59, (1 << 62) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    1e30,
    1e308,
    -0.5,
    1 << 70,
    "",
    "x",
    "LORA",
    "(",
    [],
    [[]],
    {},
    [1, 2],
    {"a": 1},
]
VALUES += ["NaN", float("nan"), float("inf"), [0, 1 << 60], ["q_proj"], "all-linear", "\ud800", "a" * 300, ".", ".*"]


def mutate(folder: Path, dice: random.Random) -> None:
    """Change one file of the directory in one to four ways."""
    path = dice.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        if path.suffix == ".json" and dice.random() < 0.8:
            content = _mutated_json(content, dice)
        elif path.suffix == ".safetensors" and dice.random() < 0.6:
            content = _mutated_header(content, dice)
        else:
            content = dice.choice(_BYTES)(content, dice)
    path.write_bytes(content)


def _mutated_json(content: bytes, dice: random.Random) -> bytes:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return _flipped(content, dice)
    places = list(_places(document))
    if not places:
        return _flipped(content, dice)
    owner, key = dice.choice(places)
    kind = dice.random()
    if kind < 0.15:
        del owner[key]
    elif kind < 0.3 and isinstance(owner, dict):
        owner[str(dice.choice([key, "lora_A", "x", ""])) + dice.choice(["", ".weight", "2"])] = owner.pop(key)
    elif kind < 0.5:
        other, place = dice.choice(places)
        owner[key] = copy.deepcopy(other[place])
    else:
        owner[key] = copy.deepcopy(dice.choice(VALUES)) if dice.random() < 0.7 else dice.choice(NUMBERS)
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _places(document: object) -> Iterator[tuple[Any, Any]]:
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield document, key
        yield from _places(value)


def _mutated_header(content: bytes, dice: random.Random) -> bytes:
    """The JSON of a safetensors file changed, its length put right."""
    size = int.from_bytes(content[:8], "little")
    if size > len(content):
        return _flipped(content, dice)
    header = _mutated_json(content[8 : 8 + size], dice)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def _place(content: bytes, dice: random.Random) -> int:
    """A position, mostly in the header."""
    end = len(content) if dice.random() < 0.2 else min(len(content), 2400)
    return dice.randrange(max(end, 1))


def _flipped(content: bytes, dice: random.Random) -> bytes:
    if not content:
        return bytes([dice.randrange(256)])
    at = _place(content, dice)
    return content[:at] + bytes([content[at] ^ (1 << dice.randrange(8))]) + content[at + 1 :]


def _number(content: bytes, dice: random.Random) -> bytes:
    size, at = dice.choice((1, 2, 4, 8)), _place(content, dice)
    value = dice.choice(NUMBERS) if dice.random() < 0.8 else len(content) + dice.randrange(-64, 64)
    return content[:at] + (value % (1 << 8 * size)).to_bytes(size, "little") + content[at + size :]


def _float(content: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(content) // 4 + 1) * 4
    value = dice.choice((float("nan"), float("inf"), -float("inf"), 3e38, -1.0, 1e-45))
    return content[:at] + struct.pack("<f", value) + content[at + 4 :]


def _cut(content: bytes, dice: random.Random) -> bytes:
    return content[: _place(content, dice)]


def _removed(content: bytes, dice: random.Random) -> bytes:
    at = _place(content, dice)
    return content[:at] + content[at + dice.choice((1, 4, 8, 64)) :]


def _inserted(content: bytes, dice: random.Random) -> bytes:
    at, other, size = _place(content, dice), _place(content, dice), dice.choice((1, 4, 8, 32, 64))
    return content[:at] + dice.choice((bytes(size), content[other : other + size])) + content[at:]


def _copied(content: bytes, dice: random.Random) -> bytes:
    at, other, size = _place(content, dice), _place(content, dice), dice.choice((4, 8, 16, 32, 64))
    return content[:at] + content[other : other + size] + content[at + size :]


_BYTES = [_flipped, _number, _number, _number, _float, _cut, _removed, _inserted, _copied]


# -- trials --


class TooSlowError(BaseException):
    """A trial took longer than `SECONDS`."""


def limit_memory() -> None:
    """Let this process have no more than `MEMORY` beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def finding(reader: Reader, folder: Path) -> str | None:
    """What a reader does with a directory that it must not do; None if it reads it or refuses it."""

    def stop(number: int, frame: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        reader(folder)
    except GgufloraError as error:
        return "a message without words" if not str(error).strip() else None
    except (Exception, TooSlowError) as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "gguflora" in frame.filename]
        place = f"{Path(own[-1].filename).name}:{own[-1].name}" if own else "?"
        return f"{type(error).__name__} in {place}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return None


def trial(seed: Path, scratch: Path, dice: random.Random, reader: Reader) -> str | None:
    """One mutation of a seed, left in ``scratch``."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(seed, scratch)
    mutate(scratch, dice)
    return finding(reader, scratch)
