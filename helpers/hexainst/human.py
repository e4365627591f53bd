"""The human half: 600 rows from public human-written sources, fetched on the user's machine,
pinned, never committed.

    python -m helpers.run human [--local FOLDER] [--run-code]         (make hexainst-human)

`data/hexainst/human_sources.yaml` pins each source by sha256 and names one rule per category. A
rule gives an upstream row a subtask and a checker, or passes it over (None); a row that fails the
validator is passed over too. The choice among the rest depends on the seed and the sources alone.
Everything here is ours, not the paper's.
"""

import json
import random
import re
import shutil
import urllib.error
import urllib.request
from http.client import HTTPException
from itertools import pairwise
from pathlib import Path

import yaml

from ..paths import HEXAINST, short
from ..record import UserError, atomic, sha256
from . import checkers
from .corpus import shingles, text, tokens
from .schema import CATEGORIES, row_faults, validate

COUNTS = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
}
NAME = re.compile(r"\b(?:[A-Z][\w'-]+(?: (?:of |the )?[A-Z][\w'-]+)*|\d[\d,.]*\d|\d)\b")
COMMON = {
    "A",
    "An",
    "And",
    "As",
    "At",
    "But",
    "By",
    "For",
    "From",
    "He",
    "Her",
    "His",
    "How",
    "If",
    "In",
    "It",
    "Its",
    "No",
    "On",
    "Or",
    "She",
    "So",
    "Some",
    "That",
    "The",
    "Their",
    "There",
    "They",
    "This",
    "To",
    "We",
    "What",
    "When",
    "Who",
    "With",
    "You",
}


FREE = "free form"  # checked by likeness to the reference alone: taken only to fill up


def fetch(source: dict, folder, local=None) -> Path:
    """Path of one verified source file: a copy in `local` or `folder`, or a download that resumes
    where it broke off.

    Raises UserError when offline (it says where to put a copy) or when the sha256 is not the
    pinned one.
    """
    for path in [Path(place) / source["file"] for place in (local, folder) if place]:
        if path.is_file():
            return _verified(path, source)
    copy = f"Copy the file, named {source['file']}, into {short(folder)} or another folder given by --local FOLDER."
    part = path.with_suffix(path.suffix + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(
        source["url"], headers={"Range": f"bytes={done}-"} if done else {}
    )
    try:
        with (
            urllib.request.urlopen(request, timeout=60) as reply,
            open(part, "ab" if reply.status == 206 else "wb") as out,
        ):
            whole = out.tell() + int(reply.headers["Content-Length"] or 0)
            shutil.copyfileobj(reply, out)
        if part.stat().st_size < whole:
            raise OSError(f"the connection closed after {part.stat().st_size} of {whole} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is missing after `done` bytes
            raise _offline(source, error, copy) from error
    except (OSError, HTTPException) as error:
        raise _offline(source, error, copy) from error
    if (found := sha256(part)) != source["sha256"]:
        part.unlink()
        raise UserError(
            f"{source['url']} gave sha256 {found}, expected {source['sha256']}: damaged on its way, or "
            f"another version. Run again; if it stays so, find the pinned one. {copy}"
        )
    return part.rename(path)


def _verified(path, source):
    if (found := sha256(path)) != source["sha256"]:
        raise UserError(
            f"{short(path)} has sha256 {found}, expected {source['sha256']}: it is damaged or another "
            f"version. Delete it and run again to fetch {source['url']}."
        )
    return path


def _offline(source, error, copy):
    return UserError(
        f"cannot fetch {source['url']} ({error}). Run again to resume, or do without the net. {copy}"
    )


def names(passage: str, within: str, most: int = 3) -> list[str]:
    """Names and numbers of `passage` that stand in `within` too, in order, at most `most`."""
    found = dict.fromkeys(
        name for name in NAME.findall(passage) if name not in COMMON and checkers.has(within, name)
    )
    return list(found)[:most]


def classification(row):
    """Dolly, classification: an either-or, or "P is A, Q is B" pairs; else ROUGE-L >= 0.6."""
    reference, given = row["response"].strip(), f"{row['instruction']}\n{row['context']}"
    count = len(checkers.words(reference))
    if row["category"] != "classification" or count > 60:
        return None
    pairs = [
        re.fullmatch(r"\s*(?:and )?(.+?)(?: is an? | is | are |: | - )(.+?)\.?\s*", piece, re.I)
        for piece in re.split(r"[,;\n]+|\.\s", reference)
        if piece.strip(" .")
    ]
    if len(pairs) > 1 and all(
        pair and checkers.has(given, pair[1]) and checkers.has(given, pair[2]) for pair in pairs
    ):
        wanted = [
            [f"{p[1]}{link}{p[2]}" for link in (": ", " - ", " is ", " is a ", " are ")]
            for p in pairs
        ]
        return "pairs", {"name": "constraints", "contains": wanted, "max_words": 3 * count + 10}
    if count <= 5 and checkers.has(given, reference):
        options = re.search(
            r"(?:[?:,]\s*|^)([^?:,]+?),? or ([^?:,]+?)[?.]?\s*$", row["instruction"]
        )
        labels = [option.strip() for option in options.groups()] if options else []
        if checkers.bare(reference) in map(checkers.bare, labels):
            return "either-or", {"name": "label", "labels": labels, "answer": reference}
        return "which-one", {"name": "short_answer", "answers": [reference]}
    return FREE, {
        "name": "rouge_facts",
        "reference": reference,
        "facts": names(reference, given),
        "min_rouge": 0.6,
        "max_words": 2 * count,
    }


def answer(row):
    """Dolly, closed and open QA: a short answer, or ROUGE-L and two names or numbers the question
    does not hold.
    """
    reference = row["response"].strip()
    count = len(checkers.words(reference))
    if row["category"] not in ("closed_qa", "open_qa") or count > 60:
        return None
    if count <= 6:
        return "short answer", {"name": "short_answer", "answers": [reference], "within": 40}
    facts = [
        name
        for name in names(reference, reference, 9)
        if not checkers.has(row["instruction"], name)
    ][:2]
    longest = min(2 * count + 20, len(checkers.words(row["context"])) - 1 if row["context"] else 99)
    return facts and (
        "sentence",
        {
            "name": "rouge_facts",
            "reference": reference,
            "facts": facts,
            "min_rouge": 0.2,
            "max_words": longest,
        },
    )


def generation(row):
    """Dolly, creative writing, brainstorming, lists to extract: length, a topic word, the list
    form if asked for.
    """
    instruction, reference, kind = row["instruction"], row["response"].strip(), row["category"]
    lines, count = len(reference.splitlines()), len(checkers.words(reference))
    asked = re.search(rf"\b(list|bullet\w*|items?|\d+|{'|'.join(COUNTS)})\b", instruction, re.I)
    listed = bool(asked) and checkers.FORMATS["list"](reference)
    if (
        count < 15
        or kind not in ("creative_writing", "brainstorming") + ("information_extraction",) * listed
    ):
        return None
    rules = {
        "name": "constraints",
        "min_words": min(count, max(10, count // 3)),
        "max_words": 4 * count + 20,
    }
    if listed:
        wanted = COUNTS.get(asked[1].lower(), asked[1])
        span = [lines, lines] if str(wanted) == str(lines) else [2, 3 * lines]
        rules |= {"format": "list", "lines": span, "contains": names(reference, row["context"], 2)}
    else:
        topic = [
            w
            for w in dict.fromkeys(checkers.words(reference))
            if len(w) > 4 and checkers.has(instruction, w)
        ]
        echo = [part for part in (instruction, row["context"]) if part]
        rules |= {
            "contains": [topic],
            "forbidden": echo,
        }  # without any topic word the row fails its own checker
    return kind.replace("_", " "), rules


def summary(row):
    """Dolly, summarization of a passage: ROUGE-L, up to three names or numbers, and shorter than
    the passage.
    """
    reference, passage = row["response"].strip(), row["context"]
    count, size = len(checkers.words(reference)), len(checkers.words(passage))
    if row["category"] != "summarization" or not 5 <= count <= 0.8 * size:
        return None
    return "passage", {
        "name": "rouge_facts",
        "reference": reference,
        "facts": names(reference, passage),
        "min_rouge": 0.15,
        "max_words": min(size - 1, 2 * count + 10),
    }


def sum_of_steps(row):
    """GSM8K: the number after `####`."""
    number = float(row["answer"].split("####")[1].replace(",", ""))
    return f"{row['answer'].count('<<')} steps", {"name": "numeric", "answer": number}


def program(row):
    """MBPP: its own tests; the model sees them, as in the source's paper."""
    test = row["test_list"][0]
    called = [
        name for name in re.findall(r"\bdef (\w+)", row["code"]) if re.search(rf"\b{name}\b", test)
    ]
    return called and (
        "function",
        {
            "name": "unit_tests",
            "tests": row["test_list"],
            "entry_point": called[-1],
            "setup": row["test_setup_code"],
        },
    )


FIELDS = {  # instruction, input, reference
    "dolly": lambda row: (row["instruction"], row["context"], row["response"]),
    "gsm8k": lambda row: (
        row["question"],
        "",
        re.sub(r"<<.*?>>", "", row["answer"]).replace("####", "The answer is"),
    ),
    "mbpp": lambda row: (
        row["text"],
        "\n".join(["Your code should pass these tests:", *row["test_list"]]),
        row["code"].replace("\r\n", "\n").replace("\t", "    "),
    ),
}


RULES = {
    f.__name__: f for f in (classification, answer, generation, summary, sum_of_steps, program)
}


def candidates(category: str, rule: str, source: str, rows, longest: int = 250) -> list[dict]:
    """Every upstream row that `rule` accepts, as a valid row of our schema, in the source's order;
    ids come later.
    """
    found = []
    for number, upstream in enumerate(rows, 1):
        instruction, passage, reference = map(str.strip, FIELDS[source](upstream))
        if len(tokens(f"{instruction} {passage}")) > longest or not (
            taken := RULES[rule](upstream)
        ):
            continue
        size = len(checkers.words(reference))
        row = {
            "id": "?",
            "half": "human",
            "category": category,
            "source": f"{source}, row {number}",
            "instruction": instruction,
            "input": passage,
            "reference": reference,
            "checker": taken[1],
            "tags": {
                "subtask": taken[0],
                "difficulty": "easy" if size < 15 else "medium" if size < 60 else "hard",
                "wording": " ".join(tokens(instruction)[:2]),
                "domain": "not labelled",
            },
        }
        if not row_faults(row):
            found.append(row)
    return found


def choose(
    found: list[dict], rows: int, bins: list[int], per_bin: int, near: float, seed: str
) -> list[dict]:
    """`rows` of the candidates: first `per_bin` of each length bin, then any; none nearly alike;
    FREE ones last.
    """
    order = sorted(
        random.Random(seed).sample(found, len(found)),
        key=lambda row: row["tags"]["subtask"] == FREE,
    )
    room = dict.fromkeys(pairwise(bins), per_bin)
    taken, grams = {}, []
    for binned in (True, False):
        for row in order:
            own = tokens(text(row))
            place = next((span for span in room if span[0] <= len(own) < span[1]), None)
            if len(taken) == rows or row["source"] in taken or binned and not room.get(place):
                continue
            own = shingles(own)
            if all(len(own & other) <= near * len(own | other) for other in grams):
                taken[row["source"]] = row
                grams.append(own)
                if binned:
                    room[place] -= 1
    return list(taken.values())


def build(
    plan=HEXAINST / "human_sources.yaml", local=None, out=HEXAINST / "human.jsonl", run_code=False
) -> Path:
    """Fetch, verify, choose, validate and write the human half; its path. `run_code`: execute CODE
    references too.
    """
    plan = yaml.safe_load(Path(plan).read_text())
    chosen, files = (
        [],
        {
            name: fetch(source, HEXAINST / "sources", local)
            for name, source in plan["sources"].items()
        },
    )
    for category in CATEGORIES:
        source, rule = (plan["categories"][category][key] for key in ("source", "rule"))
        lines = files[source].read_bytes().splitlines()[: plan["sources"][source].get("first")]
        found = candidates(category, rule, source, map(json.loads, lines), plan["longest"])
        found = [row for row in found if row["source"] not in plan.get("exclude", ())]
        seed = f"{plan['seed']} {category}"
        rows = choose(
            found, plan["rows"], plan["bins"], plan["per_bin"], plan["near_duplicate"], seed
        )
        if len(rows) < plan["rows"]:
            raise UserError(
                f"{category}: only {len(rows)} of {plan['rows']} rows: the rule {rule!r} accepts "
                f"{len(found)} of {source}. Change near_duplicate or rows in human_sources.yaml."
            )
        chosen += [row | {"id": f"human-{category}-{i:03d}"} for i, row in enumerate(rows, 1)]
    with atomic(out) as draft:
        draft.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen), "utf-8"
        )
        if faults := validate(draft, run_code=run_code)[1]:
            raise UserError(
                f"{len(faults)} faults in the human half; line {faults[0][0]}: {faults[0][1]}. Exclude "
                "the row in human_sources.yaml."
            )
    return Path(out)
