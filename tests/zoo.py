"""Small random models of every family, built from their configurations: no hub, a fraction of a
second each.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

D, N, LAYERS, WORDS = (
    48,
    80,
    3,
    101,
)  # width of the residual stream, neurons of an MLP, layers, vocabulary
COMMON = {
    "vocab_size": WORDS,
    "hidden_size": D,
    "intermediate_size": N,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
}
ROUTED = {"num_local_experts": 6, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# as EXPERTS, for families that call it otherwise
N_ROUTED = EXPERTS | {"n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1}
BART = {
    "d_model": D,
    "decoder_layers": LAYERS,
    "encoder_layers": LAYERS,
    "decoder_ffn_dim": N,
    "encoder_ffn_dim": N,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "hidden_size": None,
    "intermediate_size": None,
}
GPT2 = {"n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_positions": 256}
DENSE = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "phi3": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": N, "word_embed_proj_dim": D},
    "gpt2": GPT2,
    "falcon": {"ffn_hidden_size": N, "head_dim": None},
    "bloom": {"n_layer": LAYERS, "n_head": 4},
}
MORE_DENSE = {  # held to the oracle only
    "apertus": {},
    "arcee": {},
    "bart": BART,
    "biogpt": {},
    "bitnet": {},
    "codegen": GPT2 | {"rotary_dim": 8},
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"sliding_window": 8},
    "cwm": {},
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "exaone4": {},
    "glm": {},
    "glm4": {},
    "gpt_bigcode": GPT2,
    "gpt_neo": {"num_layers": LAYERS, "num_heads": 4, "attention_types": [[["global"], LAYERS]]},
    "gptj": GPT2 | {"rotary_dim": 8},
    "granite": {"logits_scaling": 4.0},
    "helium": {},
    "hunyuan_v1_dense": {},
    "internlm3": {},
    "jais2": {},
    "marian": BART,
    "minicpm3": {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "dim_model_base": 16,
    },
    "ministral3": {},
    "mpt": {"d_model": D, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 256},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "persimmon": {},
    "phi": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {"partial_rotary_factor": 0.5},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {"d_model": D, "ffn_dim": N, "num_layers": LAYERS, "attention_heads": 4},
}
SPARSE = {
    "mixtral": ROUTED,
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 56, "mlp_only_layers": [1]},
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS | {"intermediate_size": 32, "moe_intermediate_size": None},
    "deepseek_v2": MLA
    | {
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "topk_group": 1,
        "n_group": 1,
        "topk_method": "greedy",
    },
    "deepseek_v3": MLA
    | {"n_routed_experts": 8, "n_shared_experts": 1, "topk_group": 1, "n_group": 2},
    "gpt_oss": ROUTED
    | {
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "granitemoe": ROUTED,
    "granitemoeshared": ROUTED | {"shared_intermediate_size": 24},
    "phimoe": ROUTED,
}
MORE_SPARSE = {  # held to the oracle and to the reroute only
    "afmoe": EXPERTS | {"num_dense_layers": 1, "num_shared_experts": 1},
    "aria_text": EXPERTS | {"moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 1},
    "dots1": N_ROUTED | {"n_group": 1, "topk_group": 1},
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 6, "moe_k": 2},
    "exaone_moe": EXPERTS,
    "flex_olmo": EXPERTS,
    "glm4_moe": N_ROUTED,
    "hunyuan_v1_moe": EXPERTS | {"moe_topk": 2},
    "hy_v3": ROUTED | EXPERTS,
    "lfm2_moe": EXPERTS
    | {"layer_types": ["full_attention"] * LAYERS, "num_dense_layers": 0, "use_expert_bias": True},
    "minimax": ROUTED,
    "minimax_m2": ROUTED,
    "solar_open": N_ROUTED,
}
ZOO, MORE = DENSE | SPARSE, MORE_DENSE | MORE_SPARSE
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:?"


def saved(folder, family: str, **changes):
    """`build`'s model with the zoo's tokenizer, saved in a folder; the folder."""
    build(family, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tuned(folder, family: str):
    """The same with weights a fifth of the way to another model's, as if tuned; the folder."""
    model, other = build(family), build(family, seed=1)
    with torch.no_grad():
        for weight, there in zip(model.parameters(), other.parameters(), strict=True):
            weight.lerp_(there, 0.2)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def build(family: str, dtype=torch.float32, seed: int = 0, **changes):
    """A model in evaluation mode, all its weights visibly random (defaults leave some routers at
    zero).
    """
    settings = {k: v for k, v in (COMMON | (ZOO | MORE)[family] | changes).items() if v is not None}
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() > 1 or "bias" in name:
                    p.copy_(torch.randn(p.shape) * (0.15 if p.dim() > 1 else 0.05))
    return model


def families() -> dict[str, str]:
    """Every family of the zoo and its kind, "dense" or "mixture of experts": what README lists."""
    dense, sparse = DENSE | MORE_DENSE, SPARSE | MORE_SPARSE
    return dict.fromkeys(dense, "dense") | dict.fromkeys(sparse, "mixture of experts")


def tokenizer():
    """A character tokenizer of 44 words with BOS, offsets and no surprises: each letter one token,
    the space too.
    """
    words = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *LETTERS, " ", "\n"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
