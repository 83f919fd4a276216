"""A decoder of Qwen2-VL-2B's shape with random weights, as files that three programs read.

    python checkpoint.py hf DIR --layers 8       # transformers' files, with plphp's environment
    python checkpoint.py openvino DIR            # OpenVINO's, with the environment of OpenVINO
    python checkpoint.py gguf DIR                # llama.cpp's, with the environment of llama.cpp

All three have 4-bit numbers with a range for each 32 of them in the layers, and 8 bits in the
output head and the input embeddings, as `plphp --weights int4`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

GROUP = 32  # numbers that share a range


def write_hf(root: Path, layers: int) -> None:
    """The config, bfloat16 weights, and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from plphp.bench.shapes import build, shape_of

    torch.manual_seed(0)
    model = build(shape_of("qwen2-vl-2b", layers), torch.bfloat16, "cpu")
    model.config.max_position_embeddings = 1 << 15
    model.save_pretrained(root / "hf")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(root / "hf")


def write_openvino(root: Path) -> None:
    """An export by optimum-intel with weights rounded by NNCF, and the tokenizer."""
    from openvino import save_model
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    how = OVWeightQuantizationConfig(bits=4, sym=False, group_size=GROUP, ratio=1.0)
    source = root / "hf"
    model = OVModelForCausalLM.from_pretrained(source, export=True, quantization_config=how)
    model.save_pretrained(root / "openvino")
    parts = convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True)
    for part, name in zip(parts, ("tokenizer", "detokenizer"), strict=True):
        save_model(part, root / "openvino" / f"openvino_{name}.xml")


def write_gguf(root: Path) -> None:
    """The file that llama.cpp reads: Q4_1 in the layers, Q8_0 in the head and the embeddings."""
    import gguf

    config = json.loads((root / "hf/config.json").read_text())
    writer = gguf.GGUFWriter(root / "model.gguf", "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_parameters", config).get("rope_theta", 1e4))
    _add_tokens(writer, root, config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    for name, numbers in _tensors(root / "hf"):
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        _add(gguf, writer, new, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(gguf: Any, writer: Any, name: str, numbers: Any) -> None:
    kinds = gguf.GGMLQuantizationType
    if numbers.ndim < 2:
        writer.add_tensor(name, numbers)
        return
    kind = kinds.Q4_1 if name.startswith("blk.") else kinds.Q8_0
    writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)


def _add_tokens(writer: Any, root: Path, count: int) -> None:
    words = json.loads((root / "hf/tokenizer.json").read_text())["model"]["vocab"]
    names = {number: word for word, number in words.items()}
    tokens = [names.get(number, f"<{number}>") for number in range(count)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1 if number in names else 5 for number in range(count)])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(count - 1)


def _tensors(folder: Path) -> Any:
    """Name and float32 numbers of every tensor, read without torch: bfloat16 is a short float32."""
    import numpy as np

    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        for name, about in header.items():
            if name != "__metadata__":
                begin, end = (8 + size + offset for offset in about["data_offsets"])
                short = np.frombuffer(data[begin:end], np.uint16).astype(np.uint32) << 16
                yield name, short.view(np.float32).reshape(about["shape"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["hf", "openvino", "gguf"])
    parser.add_argument("root", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    given = parser.parse_args()
    given.root.mkdir(parents=True, exist_ok=True)
    if given.what == "hf":
        write_hf(given.root, given.layers)
    else:
        {"openvino": write_openvino, "gguf": write_gguf}[given.what](given.root)


if __name__ == "__main__":
    main()
