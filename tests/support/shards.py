"""Models split into several files by gguf-py."""

import gguf
import numpy as np

from gguflora.files.shard_names import part_paths
from support.oracles.gguf_files import read_metadata

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def split(whole, target, n_parts, *, order=lambda tensors: tensors, alignment=None):
    """A model in several files as gguf-py splits it, with metadata that nobody knows and a chat template."""
    tensors = order(list(gguf.GGUFReader(whole).tensors))
    per_file = -(-len(tensors) // n_parts)
    if alignment is None:
        write(whole, target, tensors, split_max_tensors=per_file)
        return part_paths(target, n_parts)
    for number, path in enumerate(part_paths(target, n_parts)):  # gguf-py would state it in the first file only
        own = tensors[number * per_file : (number + 1) * per_file]
        write(whole, path, own, alignment=alignment, split=(number, n_parts, len(tensors)))
    return part_paths(target, n_parts)


def write(whole, target, tensors, alignment=None, split=None, **options):
    fields = read_metadata(whole)
    writer = gguf.GGUFWriter(target, fields["general.architecture"], **options)
    if alignment:
        writer.add_custom_alignment(alignment)
    if split:
        number, count, total = split
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", total)
    if not split or split[0] == 0:
        add_metadata(writer, whole)
    for tensor in tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer, whole):
    for key, field in gguf.GGUFReader(whole).fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], element)
    writer.add_array("zebra.stripes", [7, -8, 9])
    writer.add_float64("zebra.weight", 1 / 3)
    writer.add_chat_template(TEMPLATE)


WHOLE = ("llama", "wide", "Q4_K_M")
