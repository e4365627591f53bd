"""HexaInst through the whole chain of functions on small random models: a check of the pipeline,
not a result.
"""

import numpy as np
import pytest
import zoo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.analysis.sets import consensus, top_experts, top_sets
from helpers.analysis.similarity import (
    category_matrix,
    jaccard_matrix,
    routing_similarity,
    within_between,
)
from helpers.capture.count import count
from helpers.hexainst.corpus import text
from helpers.hexainst.schema import CATEGORIES, load_hexainst


@pytest.fixture(scope="module")
def rows():
    return (
        load_hexainst(half="ai", dataset="hexainst")
        .groupby("category", sort=False)
        .head(8)
        .reset_index(drop=True)
    )


@pytest.fixture(scope="module")
def tokenizer(rows):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator([text(row) for row in rows.to_dict("records")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_hexainst_runs_from_text_to_consensus_sets(family, rows, tokenizer):
    model = zoo.build(family, vocab_size=len(tokenizer), max_position_embeddings=2048)
    texts = [text(row) for row in rows.to_dict("records")]
    counts = count(model, tokenizer, texts, template="Instruction: {instruction}\nResponse:")
    plain = [len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    assert (
        np.abs(counts.tokens - plain).max() <= 2
    )  # the template's edges may merge with the text's
    neurons = counts.neurons["dense"] if family == "llama" else counts.neurons["expert"]
    sets, report = top_sets(neurons, 0.05)
    assert report["testable"].all()
    assert (report["size"] >= report["nominal"]).all()
    agreed = consensus(sets, rows["category"].to_numpy(), 0.5)
    assert agreed.shape == (len(CATEGORIES), neurons[0].size)
    values = within_between(category_matrix(jaccard_matrix(sets), rows["category"].to_numpy()))
    assert 0 < values["between"] < 1
    assert 0 < values["within"] < 1
    if counts.routed is not None:
        assert (counts.routed.sum(-1) == 2 * counts.tokens[:, None]).all()
        assert top_experts(counts.routed, 2).sum(-1).max() == 2
        assert np.isfinite(routing_similarity(counts.routed)).all()
