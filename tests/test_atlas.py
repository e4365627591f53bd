"""The atlas against loops by hand on random models of two layers, dense and sparse: frequencies,
ranks, sets, fates, tokens, single ablations; what lies on disk; bad input.
"""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from helpers.analysis.stats import bootstrap
from helpers.capture.count import count
from helpers.capture.interventions import ablate
from helpers.config import Pair, Profile
from helpers.hexainst.corpus import wordings
from helpers.record import DamagedFile, NotTestable, RecordMismatch, UserError, read_json
from helpers.run.__main__ import main
from helpers.study import atlas, exports, quick
from helpers.study.exports import sets_of_study
from helpers.study.study import Study
from tests.test_evaluate import TOKENIZER
from tests.zoo import build

TEMPLATE, SHARE, TOP, MEASURED = "say: {instruction}\n", 0.1, 2, 3
FAMILIES = {"llama": {}, "qwen2_moe": {"mlp_only_layers": []}}
UNITS = {"dense": "neuron", "expert": "neuron", "experts": "expert"}  # family: unit
NAMES = ("red", "blue", "far away")  # labels of any kind


def rows_of(each=6):
    return pd.DataFrame(
        [
            {"id": f"{fold}-{c}-{i}", "half": fold, "fold": fold, "category": c.split()[0]}
            | {"instruction": f"go {c[0]} {c[::-1]} {'abcdef'[i]}", "input": "", "tags": {}}
            | {"reference": f"{c[:2]} {i}"}
            for fold in "ab"
            for c in NAMES
            for i in range(each)
        ]
    )


def study_of(family, base=True):
    """A Study of a random model, and of another one as its base; nothing on disk."""
    models = {
        name: (build(family, seed=seed, num_hidden_layers=2, **FAMILIES[family]), TOKENIZER)
        for name, seed in (("tuned", 0), ("base", 1))
    }
    pair = Pair("pair", "a" if base else None, "b")
    settings = {"template": TEMPLATE, "epsilon": SHARE, "ablation_rows": MEASURED}
    profile = Profile(
        name="p", dataset="d", pairs=(pair,), batch_tokens=160, resamples=50, **settings
    )
    study = Study(profile, pair, rows_of(), models)
    for name, (model, tokenizer) in models.items():
        made = count(model, tokenizer, list(study.rows["instruction"]), template=TEMPLATE)
        study.once(("counts", name, "prompt"), lambda made=made: made)
    return study


@pytest.fixture(scope="module", params=FAMILIES)
def made(request):
    study = study_of(request.param)
    return SimpleNamespace(study=study, table=atlas.atlas(study, top=TOP), family=request.param)


def components(study, unit):
    """{(layer, expert or None, neuron or None): its place} of a unit of the table, by loops."""
    counts = study.counts()
    if unit == "expert":
        shape = counts.routed.shape[1:]
        return {(n, e, None): n * shape[1] + e for n in range(shape[0]) for e in range(shape[1])}
    values = counts.unit({"neuron": "neurons"}.get(unit, unit))[0]
    if values.ndim == 2:
        return {(n, None, k): n * values.shape[1] + k for n, k in np.ndindex(*values.shape)}
    _, b, c = values.shape
    return {(n, e, k): (n * b + e) * c + k for n, e, k in np.ndindex(*values.shape)}


def key_of(row):
    return tuple(None if pd.isna(x) else int(x) for x in (row.layer, row.expert, row.neuron))


def frequencies(study, unit, variant="tuned"):
    counts = study.counts(variant)
    unit = {"neuron": "neurons", "expert": "experts"}.get(unit, unit)
    values = counts.unit(unit)
    return np.array(
        [values[i].ravel() / counts.tokens[i] for i in range(len(values))], np.float64
    )  # [I, M]


def contrast_by_hand(p, own):
    spread = p.std(0)
    gap = p[own].mean(0) - p[~own].mean(0)
    return np.where(spread > 0, gap / np.where(spread > 0, spread, 1), 0)


def sets_by_hand(study, unit, variant="tuned"):
    """{category: (scores, the set as far as no tie at the cut decides: surely in, surely out)}."""
    p, found = frequencies(study, unit, variant), {}
    size = int(p.shape[1] * SHARE) if unit != "expert" else 2 * 2  # layers x experts per token
    for category in study.categories:
        scores = contrast_by_hand(p, (study.rows["category"] == category).to_numpy())
        cut = np.sort(scores)[-size]
        found[category] = scores, scores > cut + 1e-6, scores < cut - 1e-6, size
    return found


def test_frequencies_scores_ranks_and_sets_are_those_of_a_loop(made):
    study, table = made.study, made.table
    assert set(table["unit"]) == (
        {"neuron"} if made.family == "llama" else set(atlas.NAMES.values())
    )
    for unit, part in table.groupby("unit"):
        at, p, hand = (f(study, unit) for f in (components, frequencies, sets_by_hand))
        assert len(set(map(key_of, part.itertuples()))) == len(part)
        place = np.array([at[key_of(row)] for row in part.itertuples()])
        for category in study.categories:
            own = (study.rows["category"] == category).to_numpy()
            assert part[f"p_{category}"].to_numpy() == pytest.approx(p[own][:, place].mean(0))
            scores, inside, outside, size = hand[category]
            assert part[f"score_{category}"].to_numpy() == pytest.approx(scores[place], abs=1e-5)
            member = part[f"in_{category}"].to_numpy()
            assert member.sum() == size
            assert member[inside[place]].all()
            assert not member[outside[place]].any()
            assert inside.sum() == inside[place].sum()  # no member is left out
            rank = part[f"rank_{category}"].to_numpy()
            assert (member == (rank <= size)).all()
            for r, score in zip(rank, scores[place], strict=True):
                assert (scores > score + 1e-6).sum() < r <= (scores >= score - 1e-6).sum()


def test_intervals_are_a_bootstrap_of_the_categorys_rows(made):
    row, p = made.table.iloc[0], frequencies(made.study, made.table["unit"].iloc[0])
    own = (made.study.rows["category"] == "blue").to_numpy()
    values = p[own, components(made.study, row["unit"])[key_of(row)]].astype(np.float32)
    found = bootstrap(
        lambda w: w @ values / w.sum(1), np.zeros(12), 50, clusters=wordings(made.study.rows)[own]
    )
    assert (row["low_blue"], row["high_blue"]) == pytest.approx((max(found.low, 0), found.high))


def test_parts_and_fates_are_those_of_python_sets(made):
    study, seen = made.study, set()
    for unit, part in made.table.groupby("unit"):
        at, before = components(study, unit), sets_by_hand(study, unit, "base")
        for row in part.itertuples():
            own = [c for c in study.categories if getattr(row, f"in_{c}")]
            assert row.sets == " ".join(own)
            kind = {0: "", 1: "unique", len(NAMES): "general"}.get(len(own), "some")
            assert row.part == kind
            place = at[key_of(row)]
            sure = {c for c in before if before[c][1][place]}
            maybe = {c for c in before if not before[c][2][place]}
            fates = {
                "kept" if set(own) & some else "gained" if own else "lost"
                for some in (sure, maybe)
                if own or some
            }
            assert row.fate in fates
            seen.add(row.fate)
    assert seen == {"kept", "gained", "lost"}


def outputs(model, ids):
    """{(unit, key): [(token, value)]} of one sequence, from the weights and the modules' inputs."""
    seen, hooks, found = {}, [], {}
    for number, layer in enumerate(model.model.layers):
        mlp = layer.mlp
        parts = (
            {("neuron", number): mlp.down_proj}
            if hasattr(mlp, "down_proj")
            else {("shared", number): mlp.shared_expert.down_proj, ("bank", number): mlp.experts}
        )
        for name, module in parts.items():
            hooks.append(
                module.register_forward_pre_hook(
                    lambda m, args, name=name: seen.update({name: args})
                )
            )
    with torch.no_grad():
        model(torch.tensor([ids]))
    [hook.remove() for hook in hooks]
    for (unit, number), args in seen.items():
        if unit != "bank":
            for k, column in enumerate(args[0].reshape(len(ids), -1).T.tolist()):
                found[unit, (number, None, k)] = list(enumerate(column))
            continue
        bank, (x, chosen, weights) = model.model.layers[number].mlp.experts, args[:3]
        for token, slot in np.ndindex(*chosen.shape):
            e = int(chosen[token, slot])
            gate, up = (bank.gate_up_proj[e] @ x.reshape(len(ids), -1)[token]).chunk(2)
            weight = float(weights[token, slot])
            found.setdefault(("expert", (number, e, None)), []).append((token, weight))
            for k, h in enumerate((F.silu(gate) * up).tolist()):
                found.setdefault(("neuron", (number, e, k)), []).append((token, h))
    return found


def test_tokens_are_those_of_a_loop_over_rows(made):
    study, known, every = made.study, set(), {}
    model, tokenizer = study.model()
    for row, text in zip(study.rows["id"], study.rows["instruction"], strict=True):
        ids = tokenizer(TEMPLATE.replace("{instruction}", text))["input_ids"]
        fresh = [tuple(ids[: t + 1]) not in known for t in range(len(ids))]
        known |= {tuple(ids[: t + 1]) for t in range(len(ids))}
        for key, values in outputs(model, ids).items():
            every.setdefault(key, []).extend(
                (abs(v), row, t, v, ids) for t, v in values if fresh[t] and v
            )
    for row in made.table.itertuples():
        hand = sorted(every.get((row.unit, key_of(row)), []), key=lambda one: -one[0])[:5]
        found = json.loads(row.tokens)
        assert [one["value"] for one in found] == pytest.approx([v[3] for v in hand], rel=1e-3)
        for one, (_, name, at, _, ids) in zip(found[:1], hand[:1], strict=True):
            assert (one["row"], one["position"]) == (name, at)
            assert one["token"] == tokenizer.decode([ids[at]]).strip()
            assert one["left"] == tokenizer.decode(ids[max(at - 4, 0) : at]).strip()
            assert one["right"] == tokenizer.decode(ids[at + 1 : at + 4]).strip()


def losses(study, model, category):
    """Nats per reference token, end of sequence too, of the rows that are measured."""
    out = []
    rows = study.rows[study.rows["category"] == category]
    for _, row in rows.groupby("fold").head(MEASURED).iterrows():
        prompt = TOKENIZER(TEMPLATE.replace("{instruction}", row["instruction"]))["input_ids"]
        answer = TOKENIZER(row["reference"], add_special_tokens=False)["input_ids"]
        whole = [*prompt, *answer, TOKENIZER.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1]
        out.append(float(F.cross_entropy(logits, torch.tensor(whole[len(prompt) :]))))
    return np.array(out)


def without(study, unit, key):
    """A copy of the model without one component."""
    model, (layer, expert, neuron) = copy.deepcopy(study.model()[0]), key
    mlp = model.model.layers[layer].mlp
    with torch.no_grad():
        if unit == "neuron" and expert is None:
            mlp.down_proj.weight[:, neuron] = 0
        elif unit == "neuron":
            mlp.experts.down_proj[expert, :, neuron] = 0
        else:
            mlp.shared_expert.down_proj.weight[:, neuron] = 0
    return model


def rise(study, unit, key, category):
    intact = losses(study, study.model()[0], category)
    if unit == "expert":
        mask = np.zeros(study.counts().routed.shape[1:], bool)
        mask[key[0], key[1]] = True
        with ablate(study.model()[0], {"experts": mask}, "reroute"):
            return losses(study, study.model()[0], category) - intact
    return losses(study, without(study, unit, key), category) - intact


def test_effects_are_those_of_a_model_edited_by_hand(made):
    study, table = made.study, made.table
    ranks = table[[f"rank_{c}" for c in study.categories]]
    shown = table[table["effect"].notna()]
    assert set(shown.index) == set(table.index[ranks.min(axis=1) <= TOP])
    for row in shown.itertuples():
        best = ranks.loc[row.Index].idxmin().removeprefix("rank_")
        assert row.effect_of == best
        effect = rise(study, row.unit, key_of(row), best).mean()
        assert row.effect == pytest.approx(effect, abs=2e-6)
        assert row.effect_low <= row.effect <= row.effect_high


def one_of(mask):
    """(family, index) of a mask's only component."""
    [(family, values)] = mask.items()
    [place] = np.argwhere(values).tolist()
    return family, place


def test_controls_are_others_of_the_layer_outside_the_set(made, monkeypatch):
    study, measured, plain = made.study, [], atlas.ablation_matrix
    monkeypatch.setattr(
        atlas,
        "ablation_matrix",
        lambda here, masks, *rest, **how: (
            measured.append(masks) or plain(here, masks, *rest, **how)
        ),
    )
    table = atlas.atlas(study, top=4 * TOP)
    for masks in measured:
        units = {one_of(mask)[0] for mask in masks.values()}
        [unit] = [UNITS.get(family, family) for family in units]
        at = components(study, unit)
        own = {place for place, kind in masks if kind == "own"}
        rows = table[(table["unit"] == unit) & table["effect"].notna()]
        rows = rows[[at[key_of(row)] in own for row in rows.itertuples()]]
        [category] = set(rows["effect_of"])
        barred = {
            at[key_of(r)] for r in table[table[f"in_{category}"]].itertuples() if r.unit == unit
        }
        p = frequencies(study, unit)[(study.rows["category"] == category).to_numpy()].mean(0)
        for (place, kind), mask in masks.items():
            found = int(np.flatnonzero(next(iter(mask.values())).ravel())[0])
            if kind == "own":
                assert found == place
                continue
            layer = {k[0] for k, n in at.items() if n in (place, found)}
            assert len(layer) == 1
            assert found not in barred | {place}
            free = [n for k, n in at.items() if k[0] in layer and n not in barred | {place}]
            apart = np.sort(np.abs(p[free] - p[place]))[: 2 if unit == "expert" else 10]
            assert abs(p[found] - p[place]) <= apart[-1] + 1e-6


def test_a_controls_effect_is_that_of_a_model_edited_by_hand(made):
    study = made.study
    for unit, part in made.table[made.table["effect_control"].notna()].groupby("unit"):
        row = part.iloc[0]
        layer = [key for key in components(study, unit) if key[0] == row["layer"]]
        p, at = frequencies(study, unit), components(study, unit)
        mean = p[(study.rows["category"] == row["effect_of"]).to_numpy()].mean(0)
        layer.sort(key=lambda key: abs(mean[at[key]] - mean[at[key_of(row)]]))
        near = (rise(study, unit, key, row["effect_of"]).mean() for key in layer)
        assert any(abs(found - row["effect_control"]) < 2e-6 for found in near)


def test_own_texts_are_read_as_they_were_counted():
    model = build("llama", num_hidden_layers=2)
    texts = [f"go {c} {i}" for c in "abc" for i in range(6)]
    labels, counts = list("abc") * 6, quick.count(model, TOKENIZER, texts)
    study = atlas.own_study(model, TOKENIZER, texts, labels, counts)
    assert study.template == quick.DEFAULT.template
    assert (study.counts().tokens == counts.tokens).all()
    other = build("llama", num_hidden_layers=3)
    longer = [f"{text} again" for text in texts]
    for wrong in (other, TOKENIZER, texts), (model, TOKENIZER, longer):
        with pytest.raises(UserError, match="of other texts or of another model"):
            atlas.own_study(*wrong, labels, counts)
    for bad in ({"labels": [None, *labels[1:]]}, {"texts": [7, *texts[1:]]}):
        given = {"texts": texts, "labels": labels} | bad
        with pytest.raises(UserError, match="(label|text) 0 is"):
            atlas.own_study(model, TOKENIZER, **given, counts=counts)
    with pytest.raises(UserError, match="reference 1 is None"):
        atlas.own_study(model, TOKENIZER, texts, labels, counts, ["a", None, *texts[2:]])
    with pytest.raises(UserError, match="template"):
        atlas.own_study(model, TOKENIZER, texts, labels, counts, template="x")


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_counts_that_only_look_like_those_of_own_texts_are_refused(family):
    """As many tokens and layers: another template's, another model's, another order's. Counts of
    texts that were read one by one are theirs.
    """
    model = build(family)
    texts = [f"{one}{two} is {two}" for one in "abc" for two in "def"]
    labels, counts = list("abc") * 3, quick.count(model, TOKENIZER, texts)
    assert len(set(counts.tokens.tolist())) == 1
    assert atlas.own_study(model, TOKENIZER, texts, labels, counts)
    alone = count(model, TOKENIZER, texts, 1, template=quick.DEFAULT.template)
    assert atlas.own_study(model, TOKENIZER, texts, labels, alone)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        other = type(model)(model.config).eval()
    for made in (
        count(model, TOKENIZER, texts),
        quick.count(other, TOKENIZER, texts),
        quick.count(model, TOKENIZER, texts[::-1]),
        quick.count(model, TOKENIZER, [*texts[3:6], *texts[:3], *texts[6:]]),
    ):
        assert made.tokens.tolist() == counts.tokens.tolist()
        with pytest.raises(UserError, match="text 0, counted again, differs"):
            atlas.own_study(model, TOKENIZER, texts, labels, made)


def test_own_texts_need_no_base_no_references_and_no_disk():
    model = build("llama", num_hidden_layers=2)
    texts = [f"go {c} {i}" for c in "abc" for i in range(6)]
    labels = [*["one kind"] * 6, *[7] * 6, *["None"] * 6]
    counts = quick.count(model, TOKENIZER, texts)
    table = atlas.atlas(atlas.own_study(model, TOKENIZER, texts, labels, counts))
    assert {"p_one_kind", "p_7", "p_None"} <= set(table)
    assert set(table["fate"]) == {""}
    assert table["effect"].isna().all()
    assert set(table["part"]) <= {"general", "unique", "some"}
    study = atlas.own_study(model, TOKENIZER, texts, labels, counts, texts)
    assert atlas.atlas(study, top=1)["effect"].notna().sum() in (1, 2, 3)
    sets = sets_of_study(study)
    assert (sets.pair, sets.about["weights"]) == ("own", {"tuned": None})
    ranked = atlas.atlas(study, "contribution", top=0)
    assert set(ranked["score"]) == {"contribution"}
    with pytest.raises(UserError, match="labels"):
        atlas.own_study(model, TOKENIZER, texts, labels[1:], counts)
    with pytest.raises(UserError, match="same word"):
        atlas.own_study(model, TOKENIZER, texts, [*labels[:-2], "one  kind", "one  kind"], counts)
    with pytest.raises(NotTestable, match="one label only"):
        atlas.own_study(model, TOKENIZER, texts, ["x"] * 18, counts)
    with pytest.raises(UserError, match="score is 'best'"):
        atlas.atlas(study, "best")
    split = atlas.own_study(model, TOKENIZER, texts, labels, counts)
    split.rows.loc[0, "category"] = "two words"
    with pytest.raises(UserError, match="two words"):
        atlas.atlas(split)


def test_a_massive_neuron_is_marked_and_no_other():
    model = build("llama", num_hidden_layers=2)
    model.model.layers[1].mlp.up_proj.weight.data[3] *= 1e4
    texts, labels = [f"go {c} {i}" for c in "ab" for i in range(6)], list("aaaaaabbbbbb")
    study = atlas.own_study(model, TOKENIZER, texts, labels, quick.count(model, TOKENIZER, texts))
    table = atlas.atlas(study, share=1.0, top=0)
    assert len(table) == 2 * 80
    assert table.loc[table["massive"], ["layer", "neuron"]].to_numpy().tolist() == [[1, 3]]


def test_one_pass_over_the_rows_finds_all_tokens(monkeypatch):
    study, calls = study_of("llama", base=False), []
    read = atlas.read_outputs
    monkeypatch.setattr(atlas, "read_outputs", lambda *args: calls.append(1) or read(*args))
    atlas.atlas(study, top=0)
    assert len(calls) == 1


def test_what_is_written_comes_back_and_is_made_once(monkeypatch, tmp_path):
    study = study_of("llama", base=False)
    monkeypatch.setattr(atlas, "results_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(Study, "checkpoint", lambda *args: {"weights": "w"})
    monkeypatch.setattr(Study, "close", lambda self: None)
    paths = atlas.write({"pair": study}, None, "contrast", SHARE)
    assert [path.suffix for path in paths] == [".parquet", ".csv", ".json"]
    table, by_csv = atlas.read("p"), pd.read_csv(paths[1], keep_default_na=False)
    fresh = atlas.atlas(study, "contrast", SHARE)
    pd.testing.assert_frame_equal(table, fresh, check_dtype=False)
    assert list(by_csv) == list(table)
    for name in table:
        if pd.api.types.is_numeric_dtype(table[name]):
            again = pd.to_numeric(by_csv[name])
            assert again.to_numpy(float) == pytest.approx(
                table[name].astype("Float64").to_numpy(float, na_value=np.nan), nan_ok=True
            )
    assert by_csv["tokens"].map(json.loads).equals(table["tokens"].map(json.loads))
    monkeypatch.setattr(atlas, "atlas", lambda *args: pytest.fail("made twice"))
    atlas.write({"pair": study}, "pair", "contrast", SHARE)
    with pytest.raises(RecordMismatch, match="share"):
        atlas.write({"pair": study}, None, "contrast", 0.2)
    with pytest.raises(UserError, match="the profile has pair"):
        atlas.write({"pair": study}, "other")
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    with pytest.raises(DamagedFile, match="atlas.parquet"):
        atlas.read("p")
    with pytest.raises(DamagedFile, match="missing"):
        atlas.read("q")


def test_exported_sets_are_those_of_the_kept_atlas(monkeypatch, tmp_path):
    study = study_of("llama", base=False)
    monkeypatch.setattr(atlas, "results_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(Study, "checkpoint", lambda *args: {"weights": "w"})
    monkeypatch.setattr(Study, "close", lambda self: None)
    monkeypatch.setattr("helpers.study.study.studies", lambda profile: {"pair": study})
    share, line = 2 * SHARE, ["export", "--pair", "pair", "--format", "csv", "--to"]
    assert main([*line, str(tmp_path / "default")]) == 0
    atlas.write({"pair": study}, None, "frequency", share)
    assert main([*line, str(tmp_path / "own")]) == 0
    want = exports.members_table(exports.sets_of_study(study, "frequency", share))
    found = pd.read_csv(tmp_path / "own" / "pair-sets.csv")
    places = ["category", "layer", "neuron"]
    assert found[places].to_numpy().tolist() == want[places].to_numpy().tolist()
    records = [read_json(tmp_path / name / "pair-sets.json") for name in ("default", "own")]
    assert [record["score"] for record in records] == ["contrast", "frequency"]
    monkeypatch.setattr(Study, "checkpoint", lambda *args: {"weights": "others"})
    assert main([*line, str(tmp_path / "stale")]) == 1
    assert not (tmp_path / "stale").exists()


def test_an_atlas_of_the_same_rows_under_other_labels_is_another(monkeypatch, tmp_path):
    monkeypatch.setattr(atlas, "results_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(Study, "checkpoint", lambda *args: {"weights": "w"})
    study = study_of("llama", base=False)
    turned = study.rows["category"].map({"red": "blue", "blue": "far", "far": "red"})
    other = Study(study.profile, study.pair, study.rows.assign(category=turned))
    want = [atlas.expected(one) for one in (study, other)]
    assert [key for key in want[0] if want[0][key] != want[1][key]] == ["data"]
    atlas._path(study).parent.mkdir(parents=True)
    atlas._write(atlas._path(study), pd.DataFrame({"place": [0]}), want[0])
    assert len(atlas.kept(study)) == 1
    with pytest.raises(RecordMismatch, match="made with data"):
        atlas.kept(other)
