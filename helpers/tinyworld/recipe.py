"""What the tiny pairs are made of: the recipe's numbers, three architectures, one word-level
tokenizer. (Ours.)
"""

from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen2MoeConfig

from ..record import UserError

PAIRS = ("tiny-dense", "tiny-moe", "tiny-deep")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


@dataclass(frozen=True)
class Recipe:
    """Settings of one training: steps and batches are counts, `context` is tokens, learning rates
    are cosine peaks.
    """

    documents: int = 50_000
    per_category: int = 6_000
    pretrain_steps: int = 1_200
    pretrain_batch: int = 8
    context: int = 128
    pretrain_lr: float = 6e-3
    tune_steps: int = 2_200
    tune_batch: int = 16
    tune_lr: float = 3e-3
    replay_batch: int = 3
    replay_weight: float = 0.5
    evaluate_rows: int = 240


RECIPES = {
    "tiny-dense": Recipe(),
    "tiny-moe": Recipe(tune_steps=2_600),  # routed experts learn to copy later
    "tiny-deep": Recipe(tune_steps=2_600),
}
BEFORE = (
    "documents",
    "context",
    "pretrain_steps",
    "pretrain_batch",
    "pretrain_lr",
    "evaluate_rows",
)  # a base's part


def configuration(pair: str, vocabulary: int):
    """Architecture of a pair: Llama (1.1 M parameters), Qwen2-MoE, one expert shared (2.0 M), or a
    Llama of twice as many narrower layers and as many neurons (0.9 M).
    """
    common = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if pair == "tiny-dense":
        return LlamaConfig(intermediate_size=512, **common)
    if pair == "tiny-deep":
        narrow = {"hidden_size": 96, "num_hidden_layers": 8}
        return LlamaConfig(intermediate_size=256, **common | narrow)
    if pair == "tiny-moe":
        return Qwen2MoeConfig(
            intermediate_size=256,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            shared_expert_intermediate_size=64,
            norm_topk_prob=True,
            router_aux_loss_coef=0.01,
            **common,
        )
    raise UserError(f"unknown pair {pair!r}: expected one of {', '.join(PAIRS)}.")


def build_tokenizer(texts) -> PreTrainedTokenizerFast:
    """Word-level: lower case, a word or one mark is one token, <bos> in front; every word of
    `texts` is known.
    """
    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True
    )
    words = {word for t in texts for word, _ in core.pre_tokenizer.pre_tokenize_str(t.lower())}
    core.model = models.WordLevel(
        {word: i for i, word in enumerate([*SPECIAL, *sorted(words)])}, unk_token="<unk>"
    )
    core.add_special_tokens(list(SPECIAL))
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
