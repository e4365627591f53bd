"""The human half: rules on made-up rows in the sources' formats and on real rows, choice,
download, build.
"""

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
import yaml

from helpers.hexainst import human, sandbox
from helpers.hexainst.checkers import check
from helpers.hexainst.corpus import lengths, near_duplicates, text, tokens
from helpers.hexainst.schema import CATEGORIES, HEXAINST, load_hexainst, row_faults
from helpers.paths import ROOT
from helpers.record import UserError

REAL = ROOT.parent / "shared" / "human"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="sample rows of the real sources are not on this machine"
)
PLAN = yaml.safe_load((HEXAINST / "human_sources.yaml").read_text())


def dolly(category, instruction, response, context=""):
    return {
        "category": category,
        "instruction": instruction,
        "response": response,
        "context": context,
    }


def only(category, rule, row, source="dolly"):
    found = human.candidates(category, rule, source, [row])
    assert len(found) <= 1
    return found[0] if found else None


PASSAGE = "The tower of Vells was built in 1742 by Mira Oster, a mason from Lund. It burned twice and was raised again."


@pytest.mark.parametrize(
    ("instruction", "response", "subtask", "good", "bad"),
    [
        ("Which is a kind of boat? Yawl or Shawl", "Yawl", "either-or", "yawl .", "shawl"),
        (
            "Identify which bird is alive or extinct: Dodo, Robin",
            "Robin is alive, Dodo is extinct",
            "pairs",
            "Dodo is extinct. Robin: alive",
            "Robin is extinct, Dodo is alive",
        ),
        (
            "Sort these into fruit or tool:\nApple\nSaw",
            "Apple: fruit\nSaw: tool",
            "pairs",
            "- saw: Tool\n- apple: Fruit",
            "apple: tool",
        ),
        (
            "Which of these would you pack for snow: sandals, mittens, a fan?",
            "mittens",
            "which-one",
            "Mittens",
            "a fan",
        ),
        (
            "Is chess a sport or a game?",
            "Most people would call it a game of skill rather than a sport",
            "free form",
            "I think most people would call it a game of skill rather than sport",
            "It is a sport.",
        ),
    ],
)
def test_classification_rule(instruction, response, subtask, good, bad):
    row = only("CLS", "classification", dolly("classification", instruction, response))
    assert row["tags"]["subtask"] == subtask
    assert check(row, good) == 1.0
    assert check(row, bad) == 0.0


def test_answer_rule():
    row = only("QA", "answer", dolly("open_qa", "Who built the tower of Vells?", "Mira Oster"))
    assert check(row, "It was built by Mira Oster.") == 1.0
    assert check(row, "Ada Oster") == 0.0
    row = only(
        "QA",
        "answer",
        dolly(
            "closed_qa",
            "When was the tower of Vells built, and by whom?",
            "The tower of Vells was built in 1742 by a mason called Mira Oster.",
            PASSAGE,
        ),
    )
    assert row["checker"]["facts"] == ["1742", "Mira Oster"]
    assert row["input"] == PASSAGE
    assert check(row, "It was built by Mira Oster in 1742.") == 1.0
    assert check(row, "It was built in 1745 by Mira Oster.") == 0.0


def test_generation_rule():
    poem = (
        "The harbour sleeps, the gulls are gone,\nthe lanterns hum a quiet song,\nand harbour water carries on\n"
        "all night along, all night along."
    )
    row = only(
        "GEN",
        "generation",
        dolly("creative_writing", "Write a short poem about a harbour at night.", poem),
    )
    assert check(row, poem.replace("gulls", "boats")) == 1.0
    assert check(row, "A harbour.") == 0.0
    three = "1. Check the tyres before you leave\n2. Carry a pump and a patch kit\n3. Tell somebody where you ride"
    row = only(
        "GEN",
        "generation",
        dolly("brainstorming", "Give me three tips for a long bicycle tour.", three),
    )
    assert row["checker"]["lines"] == [3, 3]
    assert check(row, three) == 1.0
    assert check(row, three.replace("\n", " ")) == 0.0


def test_summary_rule():
    row = only(
        "SUM",
        "summary",
        dolly(
            "summarization",
            "What is this about?",
            "The tower of Vells, built in 1742, burned twice.",
            PASSAGE,
        ),
    )
    assert check(row, "Built in 1742, the tower of Vells burned two times.") == 1.0
    assert check(row, PASSAGE) == 0.0
    assert check(row, "A tower burned.") == 0.0


def test_gsm8k_and_mbpp_rules():
    row = only(
        "MATH",
        "sum_of_steps",
        {
            "question": "A crate holds 12 jars. How many jars do 100 crates hold?",
            "answer": "100 * 12 = <<100*12=1200>>1200\n#### 1,200",
        },
        "gsm8k",
    )
    assert row["reference"] == "100 * 12 = 1200\nThe answer is 1,200"
    assert check(row, "1200 jars") == 1.0
    assert check(row, "12") == 0.0
    row = only(
        "CODE",
        "program",
        {
            "text": "Write a function to double a number.",
            "code": "def help(x):\r\n\treturn x\r\ndef twice(x):\r\n\treturn 2 * help(x)",
            "test_list": ["assert twice(help(2)) == 4"],
            "test_setup_code": "",
        },
        "mbpp",
    )
    assert row["checker"]["entry_point"] == "twice"
    assert "assert twice(help(2)) == 4" in row["input"]
    assert check(row, row["reference"], run_code=True) == 1.0
    assert check(row, "def help(x): return x\ndef twice(x): return x", run_code=True) == 0.0


@pytest.mark.parametrize(
    ("category", "rule", "row"),
    [
        ("QA", "answer", dolly("summarization", "Who?", "Mira")),  # of another category
        (
            "QA",
            "answer",
            dolly("open_qa", "Why?", "because of some reason that nobody wrote down in words"),
        ),  # nothing to check
        ("GEN", "generation", dolly("creative_writing", "Write a haiku.", "too short")),
        (
            "GEN",
            "generation",
            dolly("creative_writing", "Write it.", "word " * 30),
        ),  # no topic word
        (
            "SUM",
            "summary",
            dolly("summarization", "Sum up.", PASSAGE, PASSAGE),
        ),  # no shorter than the passage
        (
            "CLS",
            "classification",
            dolly("classification", "Name it: " + "w " * 300, "w"),
        ),  # too long
    ],
)
def test_rows_without_a_sound_checker_are_passed_over(category, rule, row):
    assert only(category, rule, row) is None


def made_up(n=60):
    """Files in the three sources' formats, `n` acceptable rows of each kind, by name."""
    words = [
        f"{a}{b}"
        for a in ("bar", "cor", "dal", "fen", "gor", "hul", "jas", "kem")
        for b in ("lin", "mot", "nex", "pud", "rab", "sil", "tun", "vor")
    ]
    rows = []
    for i, word in enumerate(words[:n]):
        name, other, pad = word.title(), words[-1 - i].title(), " ".join(words[i + 1 :: 7])
        rows += [
            dolly(
                "classification", f"Of the two, {pad}, which one floats? {name} or {other}", name
            ),
            dolly("open_qa", f"Where does {other} live, as {pad} has it?", name),
            dolly(
                "brainstorming",
                f"Plan a day with {word} and {pad}.",
                f"First we meet {word} early, then " + "walk " * 20,
            ),
            dolly(
                "summarization",
                f"What of {pad}?",
                f"{name} left the village in 17{10 + i}.",
                f"In 17{10 + i} {name} left the village of {other} and {pad} for good, which nobody there had expected.",
            ),
        ]
    sums = [
        {
            "question": f"{w.title()} has {i + 3} {w}s and buys as many {pad} again. How many are there?",
            "answer": f"#### {2 * i + 6}",
        }
        for i, w in enumerate(words[:n])
        for pad in [" ".join(words[i::5])]
    ]
    code = [
        {
            "text": f"Write a function to {w} a number, {' '.join(words[i::6])}.",
            "code": f"def {w}(x):\n    return x + {i}",
            "test_setup_code": "",
            "test_list": [f"assert {w}(1) == {1 + i}"],
        }
        for i, w in enumerate(words[:n])
    ]
    return {"databricks-dolly-15k.jsonl": rows, "gsm8k_test.jsonl": sums, "mbpp.jsonl": code}


def plan_for(folder, **changes):
    """The shipped plan, pinned to the made-up files that are written into `folder`."""
    plan = json.loads(json.dumps(PLAN)) | {"rows": 20, "per_bin": 2} | changes
    for source in plan["sources"].values():
        path = folder / source["file"]
        path.write_text("".join(json.dumps(row) + "\n" for row in made_up()[source["file"]]))
        source["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return folder / "plan.yaml"


def test_build_from_local_copies(tmp_path):
    plan = plan_for(tmp_path)
    path = human.build(plan, local=tmp_path, out=tmp_path / "human.jsonl", run_code=True)
    first = path.read_bytes()
    rows = load_hexainst(dataset=path, half="human")
    assert rows["category"].value_counts().to_dict() == dict.fromkeys(CATEGORIES, 20)
    assert rows["id"].iloc[0] == "human-CLS-001"
    assert near_duplicates(rows, 0.6).empty
    human.build(plan, local=tmp_path, out=path)
    assert path.read_bytes() == first
    human.build(plan_for(tmp_path, seed=1), local=tmp_path, out=path)
    assert path.read_bytes() != first


def test_too_few_rows_leave_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="CLS: only .* of 500 rows"):
        human.build(plan_for(tmp_path, rows=500), local=tmp_path, out=tmp_path / "human.jsonl")
    assert not (tmp_path / "human.jsonl").exists()


def test_choice_fills_bins_first_and_takes_free_forms_last():
    rows = [
        {
            "source": str(i),
            "instruction": " ".join(f"w{i}x{k}" for k in range(5 + i % 30)),
            "input": "",
            "tags": {"subtask": human.FREE if i % 2 else "pairs"},
        }
        for i in range(120)
    ]
    for seed in "abcd":
        sizes = [
            len(tokens(text(row))) for row in human.choose(rows, 30, [10, 20, 30], 15, 0.5, seed)
        ]
        assert sum(10 <= n < 20 for n in sizes) == sum(20 <= n < 30 for n in sizes) == 15
    taken = human.choose(rows, 40, [10, 20, 30], 15, 0.5, "seed")
    assert len(taken) == len({row["source"] for row in taken}) == 40
    assert not any(row["tags"]["subtask"] == human.FREE for row in taken)
    twins = [
        {
            "source": str(i),
            "instruction": "one two three four five",
            "input": "",
            "tags": {"subtask": "pairs"},
        }
        for i in range(9)
    ]
    assert len(human.choose(twins, 5, [1, 9], 5, 0.5, "seed")) == 1


@needs_real
def test_real_rows_become_sound_rows():
    read = [
        [json.loads(line) for line in (REAL / name).open()]
        for name in ("gsm8k_test_200.jsonl", "mbpp_200.jsonl")
    ]
    for category, rule, source, rows in (
        ("MATH", "sum_of_steps", "gsm8k", read[0]),
        ("CODE", "program", "mbpp", read[1]),
    ):
        found = human.candidates(category, rule, source, rows)
        assert len(found) >= 190
        assert not any(row_faults(row) for row in found[:40])
        chosen = human.choose(
            found, 100, PLAN["bins"], PLAN["per_bin"], PLAN["near_duplicate"], f"0 {category}"
        )
        chosen = pd.DataFrame(chosen).assign(id=range(100))
        assert (
            pd.cut(lengths(chosen), PLAN["bins"], right=False).value_counts() >= PLAN["per_bin"]
        ).all()
        assert near_duplicates(
            pd.concat([load_hexainst("ai"), chosen], ignore_index=True), 0.6
        ).empty
    for row in found[::12]:  # all 191 were run once; here a sample, for the time it takes
        program = "\n".join((row["reference"], row["checker"]["setup"], *row["checker"]["tests"]))
        assert sandbox.run(program).ok or row["source"] in PLAN["exclude"]


@needs_real
def test_rules_digest_real_instructions():
    """Self-instruct's human-written tasks in Dolly's fields: no rule stumbles, every row that is
    taken is sound.
    """
    tasks = [
        json.loads(line)
        for name in ("self_instruct_seed_tasks", "self_instruct_user_oriented")
        for line in (REAL / f"{name}.jsonl").open()
    ][::3]
    for category, rule, kind in (
        ("CLS", "classification", "classification"),
        ("QA", "answer", "open_qa"),
        ("GEN", "generation", "creative_writing"),
        ("SUM", "summary", "summarization"),
    ):
        rows = [
            dolly(kind, t["instruction"], t["instances"][0]["output"], t["instances"][0]["input"])
            for t in tasks
        ]
        found = human.candidates(category, rule, "dolly", rows)
        assert len(found) >= 10
        assert all(check(row, row["reference"]) == 1.0 for row in found)


class Server(BaseHTTPRequestHandler):
    """Serves `content`; breaks off after `limit` bytes of a reply; may ignore ranges."""

    content, limit, ranges, asked = b"", None, True, []

    def do_GET(self):
        asked = self.headers.get("Range")
        type(self).asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        body = self.content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.limit])

    def log_message(self, *args):
        """Stay silent."""


@pytest.fixture
def served():
    """A source whose file a local server has; the handler class, to set how it behaves."""
    handler = type("Handler", (Server,), {"content": bytes(range(256)) * 900, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    source = {
        "file": "data.jsonl",
        "url": f"http://127.0.0.1:{server.server_port}/data.jsonl",
        "sha256": hashlib.sha256(handler.content).hexdigest(),
    }
    yield source, handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_is_verified_and_kept(served, tmp_path):
    source, handler = served
    path = human.fetch(source, tmp_path)
    assert path.read_bytes() == handler.content
    assert handler.asked == [None]
    assert human.fetch(source, tmp_path) == path
    assert handler.asked == [None]
    assert human.fetch(source, tmp_path / "other", local=tmp_path) == path


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_resumes(served, tmp_path, ranges):
    source, handler = served
    handler.limit, handler.ranges = 100_000, ranges
    with pytest.raises(UserError, match="closed after 100000 of 230400 bytes.*Run again to resume"):
        human.fetch(source, tmp_path)
    assert not (tmp_path / "data.jsonl").exists()
    handler.limit = None
    assert human.fetch(source, tmp_path).read_bytes() == handler.content
    assert handler.asked == [None, "bytes=100000-"]
    assert not list(tmp_path.glob("*.part"))


def test_a_download_complete_but_not_renamed_is_used(served, tmp_path):
    source, handler = served
    (tmp_path / "data.jsonl.part").write_bytes(handler.content)
    assert human.fetch(source, tmp_path).read_bytes() == handler.content


def test_another_version_is_refused(served, tmp_path):
    source, handler = served
    handler.content = b"changed upstream"
    with pytest.raises(
        UserError,
        match=f"expected {source['sha256']}.*Copy the file, named data.jsonl, .*--local FOLDER",
    ):
        human.fetch(source, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data.jsonl").write_bytes(b"changed here")
    with pytest.raises(UserError, match="damaged or another version"):
        human.fetch(source, tmp_path)


def test_offline_says_where_a_copy_goes(tmp_path):
    source = {"file": "data.jsonl", "url": "http://127.0.0.1:9/data.jsonl", "sha256": "0"}
    with pytest.raises(
        UserError, match=r"cannot fetch http.*named data.jsonl, into .*--local FOLDER"
    ):
        human.fetch(source, tmp_path)


def test_the_command_fails_in_one_line(tmp_path):
    (tmp_path / "databricks-dolly-15k.jsonl").write_text("{}\n")
    done = subprocess.run(
        [sys.executable, "-m", "helpers.run", "human", "--local", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_the_plan_is_complete():
    assert tuple(PLAN["categories"]) == CATEGORIES
    assert all(
        part["source"] in PLAN["sources"] and part["rule"] in human.RULES
        for part in PLAN["categories"].values()
    )
    assert all(
        len(source["sha256"]) == 64 and source["licence"] for source in PLAN["sources"].values()
    )
