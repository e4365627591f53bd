"""The tiny closed world: people with attributes, animals in places, reviews, sums, one-line
functions, short stories.

It makes every text that the tiny models ever see, and every prompt on which they are judged. All
words and wordings stand in data/hexainst/tiny_world.yaml; this file combines them. A pure function
of a seed and that file. (Ours.)

pre-training   plain documents: facts, sentences, reviews, sums as statements, code, stories,
               unanswered requests
tuning         answered instructions in the wordings A, about contents that are not held out
evaluation     instructions about held-out contents, in the wordings A (half A) or B, never
               trained (half B)

Held out is a quarter of all contents (a person's attribute, an operand pair, a story ...), by a
hash of the content. A held-out fact or sum may be *stated* in pre-training; it is never asked
about there or in tuning.

    python -m helpers.tinyworld.world          write data/hexainst/tiny.jsonl anew
"""

import hashlib
import json
import random
import re
from functools import cache

import yaml

from ..hexainst.corpus import text
from ..hexainst.expressions import call
from ..hexainst.schema import CATEGORIES
from ..paths import HEXAINST, short
from ..record import atomic

HALVES = ("A", "B")
TINY, SOURCE = HEXAINST / "tiny.jsonl", HEXAINST / "tiny_world.yaml"
KINDS = ("animal", "food", "tool", "town", "colour")
LABELS = ["good", "bad", *KINDS]
LARGEST = 12  # operands of MATH and constants of CODE
ARGUMENTS = {"a": ([0], [3], [8], [14]), "a, b": ([2, 9], [7, 4], [12, 1], [0, 15])}


@cache
def source() -> dict:
    """Words, texts, wordings and requests, as read from data/hexainst/tiny_world.yaml."""
    return yaml.safe_load(SOURCE.read_text(encoding="utf-8"))


def held_out(*content) -> bool:
    """Whether a content is kept for evaluation: a quarter of all, by hash, so that no rule is held
    out with them.
    """
    return hashlib.sha256(json.dumps(content).encode()).digest()[0] < 64


def facts(seed: int = 0) -> dict:
    """{name: {attribute: value}} of every person; attributes are town, job, pet, food, colour."""
    rng, words = random.Random(f"facts {seed}"), source()["words"]
    values = {
        attr: words[kind][: source()["pets"]] if attr == "pet" else words[kind]
        for attr, (kind, _) in source()["attributes"].items()
    }
    return {
        name: {attr: rng.choice(known) for attr, known in values.items()} for name in words["name"]
    }


def _pick(rng, **more) -> dict:
    """One word of every kind, for filling a text."""
    return {kind: rng.choice(known) for kind, known in source()["words"].items()} | more


def _review(rng, mood):
    said = zip(*(rng.sample(source()["words"][kind], 3) for kind in ("item", mood)), strict=True)
    clauses = [f"the {item} was {adjective}" for item, adjective in said][: rng.choice((2, 2, 3))]
    return clauses, ", ".join(clauses[:-1]) + " and " + clauses[-1] + "."


def _cls(rng, world):
    """Like all makers: (content, which may be held out; slots for the wordings; reference;
    subtask).
    """
    if rng.random() < 0.5:
        mood = rng.choice(("good", "bad"))
        clauses, x = _review(rng, mood)
        return (
            ("mood", *sorted(clauses)),
            {"x": x, "ask": " or ".join(rng.sample(("good", "bad"), 2))},
            mood,
            "mood",
        )
    kind = rng.choice(KINDS)
    members = rng.sample(source()["words"][kind], rng.choice((3, 4, 5)))
    labels = rng.sample([kind, *rng.sample([k for k in KINDS if k != kind], 2)], 3)
    slots = {"x": ", ".join(members) + ".", "ask": f"{labels[0]}, {labels[1]} or {labels[2]}"}
    return ("kind", *sorted(members)), slots, kind, "kind"


def _code(rng, world):
    (value, body), n = rng.choice(source()["functions"]), rng.randint(1, LARGEST)
    name, args = rng.choice(source()["words"]["function"]), "a, b" if "b" in body else "a"
    code = f"def {name}({args}): return {body.format(n=n)}"
    return (name, body, n), {"name": name, "value": value.format(n=n)}, code, args


def _qa(rng, world):
    name, attr = rng.choice(list(world)), rng.choice(list(source()["attributes"]))
    return (
        (name, attr),
        {"name": name, "attr": rng.choice(source()["attributes"][attr][1])},
        world[name][attr],
        attr,
    )


def _gen(rng, world):
    (form, filled, column), slots = rng.choice(source()["forms"]), _pick(rng)
    wanted = [slots["animal"], slots["place"], slots["colour"]][: rng.choice((2, 3, 3))]
    reference = filled.format(**slots, verb=rng.choice(source()["verbs"])[column])
    x = ", ".join(rng.sample(wanted, len(wanted)))
    return (form, *sorted(wanted)), {"thing": form, "x": x}, reference, form.split()[1]


def _math(rng, world):
    sign, a, b = rng.choice("+-"), rng.randint(0, LARGEST), rng.randint(0, LARGEST)
    a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
    slots = _pick(rng, a=a, b=b, things=rng.choice(source()["words"]["thing"]))
    x, story = (rng.choice(texts).format(**slots) for texts in source()["sums"][sign].values())
    return (
        (sign, a, b),
        slots | {"x": x, "story": story},
        f"{a} {sign} {b} = {a + b if sign == '+' else a - b}",
        sign,
    )


def _sum(rng, world):
    sentences, recap = rng.choice(source()["stories"])
    slots = _pick(rng, friend=rng.choice(source()["words"]["name"]))
    told = [s.removeprefix("? ") for s in sentences if not s.startswith("? ") or rng.random() < 0.5]
    return (
        (recap.format(**slots),),
        {"x": " ".join(told).format(**slots)},
        recap.format(**slots),
        recap.split()[1],
    )


MAKERS = dict(zip(CATEGORIES, (_cls, _code, _qa, _gen, _math, _sum), strict=True))


def _checker(category, slots, reference, subtask):
    """The row's checker; each judges the whole answer, so that a text which merely holds the
    answer fails.
    """
    if category == "CODE":
        return {
            "name": "function_io",
            "cases": [[args, call(reference, args)] for args in ARGUMENTS[subtask]],
        }
    if category == "GEN":
        filled, column = next((t, c) for form, t, c in source()["forms"] if form == slots["thing"])
        known = {**source()["words"], "verb": [pair[column] for pair in source()["verbs"]]}
        groups = {
            kind: f"({'|'.join(known[kind])})" for kind in ("colour", "animal", "place", "verb")
        }
        pattern = filled.replace(".", r"\.").replace("?", r"\?").format(**groups)
        return {"name": "constraints", "contains": slots["x"].split(", "), "pattern": pattern}
    known = {
        "CLS": {"name": "label", "labels": LABELS, "answer": reference},
        "QA": {"name": "short_answer", "answers": [reference]},
    }
    return known.get(category, {"name": "exact", "answer": reference})


def _row(category, half, number, rng, world, wanted):
    """One row in wording `number` of its half, about a content that is (`wanted`) or is not held
    out.
    """
    while True:
        content, slots, reference, subtask = MAKERS[category](rng, world)
        if held_out(category, *content) == wanted:
            break
    wording = source()["wordings"][category][half][number]
    told, _, given = wording.partition(" | ")  # instruction, input
    before = rng.choice(source()["openers"][half]) + " " if rng.random() < 0.55 else ""
    after = " " + rng.choice(source()["closers"][half]) if rng.random() < 0.5 else ""
    tag = subtask + (" story" if "{story}" in wording else " number") * (category == "MATH")
    return {
        "half": half,
        "category": category,
        "source": f"tiny world, wordings {half}",
        "instruction": before + told.format(**slots) + after,
        "input": given.format(**slots),
        "reference": reference,
        "checker": _checker(category, slots, reference, subtask),
        "tags": {"wording": f"{category}-{half}-{number:02d}", "subtask": tag},
    }


def _rows(category, half, count, seed, wanted) -> list[dict]:
    """`count` rows with distinct prompts, every wording equally often."""
    rng = random.Random(
        f"evaluation {seed} {half} {category}" if wanted else f"tuning {seed} {category}"
    )
    rows, world, wordings = {}, facts(seed), len(source()["wordings"][category][half])
    while len(rows) < count:
        row = _row(category, half, len(rows) % wordings, rng, world, wanted)
        rows.setdefault(text(row), row)
    return list(rows.values())


def tuning(seed: int = 0, per_category: int = 6000) -> list[dict]:
    """Rows for fine-tuning: wordings A, contents not held out, `per_category` distinct prompts of
    each category.
    """
    return [row for c in CATEGORIES for row in _rows(c, "A", per_category, seed, wanted=False)]


def evaluation(half: str, seed: int = 0, per_category: int = 240) -> list[dict]:
    """Rows for evaluation: held-out contents in the wordings of `half`; a longer list begins with
    a shorter one.
    """
    return [
        {"id": f"tiny-{half}-{c}-{i:03d}"} | row
        for c in CATEGORIES
        for i, row in enumerate(_rows(c, half, per_category, seed, wanted=True))
    ]


def tiny(seed: int = 0, per_category: int = 100) -> list[dict]:
    """The 1,200 rows of data/hexainst/tiny.jsonl: the first `per_category` rows of each half and
    category.
    """
    return [row for half in HALVES for row in evaluation(half, seed, per_category)]


def _fact(rng, world, name, attr):
    nouns = source()["attributes"][attr][1]
    known = (*source()["facts"][attr], *(f"the {noun} of {{name}} is {{value}}." for noun in nouns))
    return rng.choice(known).format(name=name, value=world[name][attr])


def _statement(rng):
    _, given, worked, _ = _math(rng, None)
    result = worked.split()[-1]
    if rng.random() < 0.25:
        return f"{given['story']} that makes {result} {given['things']}."
    return (
        f"{given['x']} "
        + ("= " if " + " in given["x"] or " - " in given["x"] else "is ")
        + result
        + "."
    )


def _person(rng, world, slots, vocabulary):
    name, known = slots["name"], rng.sample(list(source()["facts"]), rng.choice((2, 4, 5)))
    if rng.random() < 0.4:
        return f"{name}: " + ", ".join(f"{attr} {world[name][attr]}" for attr in known) + "."
    return " ".join(_fact(rng, world, name, attr) for attr in known)


def _scene(rng, world, slots, vocabulary):
    forms = rng.choices(source()["forms"], weights=(4, 1, 1), k=2)
    return " ".join(
        filled.format(**_pick(rng), verb=rng.choice(source()["verbs"])[column])
        for _, filled, column in forms
    )


def _reviewed(rng, world, slots, vocabulary):
    mood = rng.choice(("good", "bad"))
    came = f"{slots['name']} came to the {slots['place']}."
    return f"{came} {_review(rng, mood)[1]} it was a {mood} day."


def _kind(rng, world, slots, vocabulary):
    kind = rng.choice(KINDS)
    some, name = rng.sample(source()["words"][kind], 3), f"a{'n' * (kind == 'animal')} {kind}"
    apart = " ".join(f"{word} is {name}." for word in some)
    return rng.choice((apart, f"{some[0]}, {some[1]} and {some[2]}: each is {name}."))


def _story(rng, world, slots, vocabulary):
    return "{1[x]} so {2}".format(*_sum(rng, world))


def _sums(rng, world, slots, vocabulary):
    return " ".join(_statement(rng) for _ in range(3))


def _function(rng, world, slots, vocabulary):
    _, given, body, _ = _code(rng, world)
    return rng.choice((f"{given['value']}: {body}", body))


def _refrain(rng, world, slots, vocabulary):
    return " ".join([" ".join(rng.sample(vocabulary, rng.randint(2, 7))) + "."] * 3)


def _request(rng, world, slots, vocabulary):
    """A request that nobody answers: never one whose content the evaluation asks about."""
    category = rng.choice(CATEGORIES)
    while held_out(category, *(made := MAKERS[category](rng, world))[0]):
        pass
    answered = source()["wordings"][category]["A"]
    asked = answered if rng.random() < 0.5 else source()["requests"][category]
    return rng.choice(asked).format(**made[1]).replace(" | ", " ")


DOCUMENTS = {
    "person": _person,
    "scene": _scene,
    "review": _reviewed,
    "kind": _kind,
    "story": _story,
    "sum": _sums,
    "code": _function,
    "refrain": _refrain,
    "request": _request,
}


def _document(kind, rng, world, vocabulary):
    """One pre-training document."""
    return DOCUMENTS[kind](rng, world, _pick(rng), vocabulary)


def pretraining(seed: int = 0, documents: int = 50_000) -> list[str]:
    """Plain documents, in the shares of `mix`. Nothing in them answers a request."""
    rng, world, mix = random.Random(f"pretraining {seed}"), facts(seed), source()["mix"]
    kinds = rng.choices(list(mix), weights=list(mix.values()), k=documents)
    asked = [t for c in CATEGORIES for t in source()["requests"][c] + source()["wordings"][c]["A"]]
    asked += source()["openers"]["A"] + source()["closers"]["A"]
    vocabulary = {word for known in source()["words"].values() for word in known}
    vocabulary |= {word for t in asked for word in re.findall(r"\w+", re.sub(r"\{\w+\}", "", t))}
    vocabulary = sorted(vocabulary)
    return [_document(kind, rng, world, vocabulary) for kind in kinds]


def write(path=TINY) -> None:
    """Write `tiny()` as JSON lines; atomic."""
    with atomic(path) as draft:
        draft.write_text("".join(json.dumps(row) + "\n" for row in tiny()), encoding="utf-8")


if __name__ == "__main__":
    write()
    print(f"wrote {short(TINY)}")
