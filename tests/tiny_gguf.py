"""A tiny llama as a GGUF file, written as llama.cpp's converter would, and a wheel around it."""

import zipfile

import numpy as np
import torch
import zoo
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from tokenizers import pre_tokenizers

WORDS = [
    *["<bos>", "<eos>", "<unk>"],
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *["ad", "add", "Ġadd"],
]
MERGES = ["a d", "ad d", "Ġ add"]
SHAPE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "vocab_size": len(WORDS)}
TEMPLATE = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}"
PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def model(seed=0):
    """The model that the file holds."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    return zoo.build("llama", seed=seed, **SHAPE, **ids)


def write(path, architecture="llama", words=WORDS, kind="F32", seed=0, **header):
    """Write the GGUF; `words` None leaves the tokenizer out, `kind` is a type of ggml. `header`:
    layers it says it has, files it says it is split over.
    """
    made, writer = model(seed), GGUFWriter(path, architecture)
    config = made.config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(header.get("layers", config.num_hidden_layers))
    writer.add_uint16("split.count", header.get("split", 1))
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if words:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(words)
        writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(words) - 3))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_chat_template(TEMPLATE)
    for name, weight in made.state_dict().items():
        _add(writer, name, weight, config, GGMLQuantizationType[kind])
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path


def _add(writer, name, weight, config, kind):
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        place = NAMES[stem]
    else:
        _, _, layer, rest = stem.split(".", 3)
        place = f"blk.{layer}.{PLACES[rest]}"
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if number := heads.get(place.rpartition(".")[2]):  # llama.cpp interleaves the rotary halves
        half = weight.shape[0] // number // 2
        weight = weight.reshape(number, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)
    array = weight.detach().to(torch.float32).contiguous().numpy()
    if array.ndim == 2 and kind != GGMLQuantizationType.F32:
        writer.add_tensor(f"{place}.weight", quants.quantize(array, kind), raw_dtype=kind)
    else:
        writer.add_tensor(f"{place}.weight", np.ascontiguousarray(array))


def wheel(folder, file, inside="tiny_model/model.gguf", name="tiny_model"):
    """A wheel, version 1.0, that holds `file` as `inside`, and code that nobody should run."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file, inside)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path
