"""Training: exact pieces (tokenizer, optimiser, loss), a miniature run that is the same bit for
bit, the shipped pairs.
"""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers import paths
from helpers.hexainst.corpus import text
from helpers.hexainst.schema import CATEGORIES
from helpers.record import UserError, digest, read_json, sha256
from helpers.run import __main__ as command
from helpers.study.tuning import alone
from helpers.tinyworld import train as training
from helpers.tinyworld import world
from helpers.tinyworld.optim import Muon, orthogonal, update
from helpers.tinyworld.recipe import PAIRS, Recipe, build_tokenizer, configuration

MINI = Recipe(
    documents=200,
    per_category=8,
    pretrain_steps=2,
    pretrain_batch=2,
    context=32,
    tune_steps=2,
    tune_batch=4,
    replay_batch=1,
    evaluate_rows=1,
)
SHIPPED = sorted(paths.MODELS.glob(f"*/*/{training.RECORD}"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(
        ["Mia lives in oakham.", "def add(a): return a + 3", "Instruction: Response:"]
    )


def quiet(_):
    """Report nothing."""


# tokenizer


def test_tokenizer_splits_words_and_marks_and_puts_bos_in_front(tokenizer, tmp_path):
    ids = tokenizer("MIA lives\nin oakham.")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "mia", "lives", "in", "oakham", "."]
    code = tokenizer("def add(a): return a + 3", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(code) == "def add ( a ) : return a + 3"
    assert tokenizer.convert_ids_to_tokens(tokenizer("zebra")["input_ids"]) == ["<bos>", "<unk>"]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("mia, mia!")["input_ids"] == tokenizer("mia, mia!")["input_ids"]
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (
        0,
        1,
        2,
        3,
    )


def test_pack_cuts_one_stream_of_closed_documents(tokenizer):
    rows = training.pack(tokenizer, ["mia lives.", "oakham."], 5)
    assert rows.tolist() == [
        [1, *tokenizer("mia lives.", add_special_tokens=False)["input_ids"], 2]
    ]


# optimiser


def test_orthogonal_moves_singular_values_to_one_and_keeps_directions():
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(orthogonal(matrix), full_matrices=False)
    assert ((s > 0.6) & (s < 1.3)).all()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ orthogonal(matrix) @ v.mT  # diagonal: same directions
    assert torch.allclose(inside, inside.diagonal().diag(), atol=1e-4)


def test_orthogonal_treats_a_stack_matrix_by_matrix():
    stack = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(orthogonal(stack), torch.stack([orthogonal(m) for m in stack]), atol=1e-6)


def test_muon_minimises_and_its_step_has_the_promised_size():
    weight = torch.nn.Parameter(torch.zeros(16, 16))
    goal = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    opt, before = Muon([weight], lr=0.5), None
    for step in range(60):
        loss = (weight - goal).square().mean()
        before = before or loss.item()
        update([opt], loss, step, 60, 0.5)
        if step == 0:  # warm-up is 3 steps: a third of the peak
            assert weight.detach().square().mean().sqrt().item() == pytest.approx(
                0.5 / 3 * 0.2, rel=0.2
            )
    assert (weight - goal).square().mean() < 0.02 * before


def test_expert_banks_get_muon_and_routers_do_not():
    model = training.AutoModelForCausalLM.from_config(configuration("tiny-moe", 50))
    muon, adamw = training.optimisers(model, 1e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert {
        n for n in names.values() if "experts.gate_up_proj" in n or "experts.down_proj" in n
    } <= chosen
    rest = {names[id(p)] for p in adamw.param_groups[0]["params"]}
    assert chosen | rest == set(names.values())
    assert not chosen & rest
    assert any("mlp.gate.weight" in n for n in rest)
    assert "model.embed_tokens.weight" in rest


# loss


def test_loss_counts_references_only_and_padding_changes_nothing(tokenizer):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    ids, weights = torch.tensor([[1, 5, 6, 7, 2]]), torch.tensor([[0, 0, 0, 0.5, 0.5]])
    logits = model(ids).logits.log_softmax(-1)
    expected = -(logits[0, 2, 7] + logits[0, 3, 2]) / 2
    assert training._loss(model, ids, weights)[0].item() == pytest.approx(expected.item(), abs=1e-5)
    padded = torch.nn.functional.pad(ids, (0, 3)), torch.nn.functional.pad(weights, (0, 3))
    assert training._loss(model, *padded)[0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_batches_visit_every_row_once_per_round_and_keep_like_lengths_together():
    lengths = torch.arange(64) % 8
    batches = training._endless(64, 8, torch.Generator().manual_seed(0), lengths)
    seen = [next(batches) for _ in range(8)]
    assert sorted(torch.cat(seen).tolist()) == list(range(64))
    assert all(lengths[b].max() - lengths[b].min() <= 1 for b in seen)


# a miniature run


@pytest.mark.parametrize("pair", PAIRS)
def test_a_run_is_the_same_bit_for_bit(pair, tmp_path):
    records = [
        training.train(pair, 3, MINI, tmp_path / name, report=quiet) for name in ("one", "two")
    ]
    for variant in ("base", "tuned"):
        one, two = (tmp_path / name / variant / "model.safetensors" for name in ("one", "two"))
        assert sha256(one) == sha256(two) == records[0][variant]["sha256"]
        assert records[0][variant]["losses"] == records[1][variant]["losses"]
    assert records[0]["base"]["sha256"] != records[0]["tuned"]["sha256"]
    other = training.train(pair, 4, MINI, tmp_path / "three", report=quiet)
    assert other["base"]["sha256"] != records[0]["base"]["sha256"]


def test_a_killed_run_leaves_nothing_half_written_and_ends_as_if_never_killed(tmp_path):
    class Killed(Exception):
        pass

    def kill(step, model):
        raise Killed

    whole = training.train("tiny-dense", 0, MINI, tmp_path / "whole", report=quiet)
    with pytest.raises(Killed):
        training.train("tiny-dense", 0, MINI, tmp_path / "killed", then=kill, report=quiet)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["base"]
    stamp = (tmp_path / "killed" / "base" / "model.safetensors").stat().st_mtime_ns
    again = training.train("tiny-dense", 0, MINI, tmp_path / "killed", report=quiet)
    assert (tmp_path / "killed" / "base" / "model.safetensors").stat().st_mtime_ns == stamp, (
        "the base was trained again"
    )
    assert again["tuned"]["sha256"] == whole["tuned"]["sha256"]


def test_a_base_of_another_seed_or_recipe_is_not_used_again(tmp_path):
    first = training.train("tiny-dense", 0, MINI, tmp_path, report=quiet)
    second = training.train("tiny-dense", 1, MINI, tmp_path, report=quiet)
    assert first["base"]["sha256"] != second["base"]["sha256"]


def test_a_failing_save_keeps_the_old_folder(tmp_path, monkeypatch):
    training.train("tiny-dense", 0, MINI, tmp_path, report=quiet)
    before = sha256(tmp_path / "tuned")

    def fail(*_):
        raise RuntimeError("disk full")

    monkeypatch.setattr(training, "accuracy", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        training.train("tiny-dense", 0, MINI, tmp_path, report=quiet)
    assert sha256(tmp_path / "tuned") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.parametrize("variant", ["base", "tuned"])
@pytest.mark.parametrize("what", ["folder", "file", "link", "{}", "[]", '{"variant": "other"}'])
def test_a_folder_that_it_did_not_write_is_kept(variant, what, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "prepare", lambda *given: pytest.fail("it began"))
    there, elsewhere = tmp_path / "out" / variant, tmp_path / "elsewhere"
    elsewhere.mkdir()
    there.parent.mkdir()
    if what == "file":
        there.write_text("mine")
    elif what == "link":
        there.symlink_to(elsewhere)
    else:
        there.mkdir()
        (there / "mine.txt").write_text("mine")
    if what.startswith(("{", "[")):
        (there / training.RECORD).write_text(what)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"out/{variant} stands there already .* --out"):
        training.train("tiny-dense", 0, MINI, tmp_path / "out", report=quiet)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("seed", [2**70, 2**32, -1])
def test_a_seed_out_of_range_is_refused_before_anything(seed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training.world, "pretraining", lambda **given: pytest.fail("it began"))
    given = ["train", "--pair", "tiny-dense", "--seed", str(seed), "--out", str(tmp_path / "x")]
    assert command.main(given) == 1
    said = f"error: --seed is {seed}, expected a whole number from 0 to 4294967295.\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "x").exists()


def test_a_second_training_in_one_folder_is_one_line_and_a_draft_is_removed(tmp_path):
    draft = tmp_path / ".tuned.abcd_123"
    draft.mkdir()
    (draft / "model.safetensors").write_text("half")
    with (
        alone(tmp_path / "pair"),
        pytest.raises(UserError, match="another process is writing"),
    ):
        training.train("tiny-dense", 0, MINI, tmp_path, report=quiet)
    assert draft.exists()
    training.train("tiny-dense", 0, MINI, tmp_path, report=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_each_step_can_be_watched(tmp_path):
    seen = []
    training.train(
        "tiny-dense",
        0,
        MINI,
        tmp_path,
        then=lambda step, model: seen.append(step),
        report=quiet,
    )
    assert seen == list(range(1, MINI.tune_steps + 1))


def test_the_stacked_step_is_the_step_of_each_matrix_alone():
    draw = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (3, 6, 4), (6, 4), (4, 6)]
    grads = [[torch.randn(s, generator=draw) for s in shapes] for _ in range(3)]
    together = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    alone = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    opts = [Muon(together, 0.1), *(Muon([p], 0.1) for p in alone)]
    for some in grads:
        for p, grad in zip([*together, *alone], some * 2, strict=True):
            p.grad = grad.clone()
        for opt in opts:
            opt.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "gpu", "mps"])
def test_a_device_that_is_not_there_is_one_clear_error(device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=f"--device is '{device}', .* cpu; torch .* sees no GPU"):
        training.train("tiny-dense", 0, MINI, tmp_path / "x", report=quiet, device=device)
    assert not (tmp_path / "x").exists()


def test_a_record_names_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the card of {device}")
    assert training.processor("cuda:0") == {"device": "the card of cuda:0"}
    assert training.processor("cpu") == {}
    with pytest.raises(UserError, match="'cuda:1', expected one of cpu, cuda, cuda:0; .* one GPU"):
        training.processor("cuda:1")


def test_an_unknown_pair_is_one_clear_error(capsys):
    with pytest.raises(
        UserError, match="unknown pair 'tiny-mamba': expected one of tiny-dense, tiny-moe"
    ):
        configuration("tiny-mamba", 10)
    assert command.main(["train"]) == 1
    assert "--pair" in capsys.readouterr().err


# what is shipped


def test_both_pairs_and_three_dense_seeds_are_shipped_within_40_megabytes():
    names = {file.parent.parent.name for file in SHIPPED}
    assert {"tiny-dense", "tiny-moe", "tiny-dense-s1", "tiny-dense-s2"} <= names
    assert len(SHIPPED) == 2 * len(names)
    assert sum(f.stat().st_size for f in paths.MODELS.rglob("*") if f.is_file()) <= 40e6


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: "-".join(f.parts[-3:-1]))
def test_shipped_record_meets_the_requirement(file):
    record = read_json(file)
    assert record["sha256"] == sha256(file.parent / "model.safetensors")
    assert record["prompts"] >= 200
    for scores in record["accuracy"].values():
        assert set(scores) == set(CATEGORIES)
        worst, *rest = sorted(scores.values())
        if record["variant"] == "base":
            assert max(scores.values()) <= 0.05
        else:
            assert worst >= 0.75
            assert min(rest) >= 0.9


def test_shipped_records_were_trained_on_this_world():
    documents, rows = world.pretraining(), world.tuning()
    expected = {"base": {"pretraining": digest(documents)}}
    expected["tuned"] = expected["base"] | {"tuning": digest(rows)}
    for record in map(read_json, SHIPPED):
        assert expected[record["variant"]].items() <= record["data"].items()
    known = AutoTokenizer.from_pretrained(SHIPPED[0].parent)
    asked = [
        text(row) + " " + row["reference"]
        for half in world.HALVES
        for row in world.evaluation(half)
    ]
    assert not any(known.unk_token_id in ids for ids in known(asked)["input_ids"])


@pytest.mark.parametrize(
    "file", [f for f in SHIPPED if "-s" not in f.parts[-3]], ids=lambda f: "-".join(f.parts[-3:-1])
)
def test_shipped_checkpoint_reaches_its_recorded_accuracy(file):
    """20 of 240 rows per category and half; 0.2 is about three standard errors of such a sample at
    0.9.
    """
    found = training.accuracy(
        training.load(file.parent), AutoTokenizer.from_pretrained(file.parent), 20
    )
    for half, scores in read_json(file)["accuracy"].items():
        for category, score in scores.items():
            assert found[half][category] == pytest.approx(score, abs=0.2)


def test_card_shows_the_records():
    card = training.CARD.read_text()
    assert training.card_table() in card
