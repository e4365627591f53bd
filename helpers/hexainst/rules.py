"""Rules of the human half: what makes a row of ours out of a row of a human-written source.

A rule takes an upstream row and a wording (`say` with {gaps}, and whatever else the plan gives it)
and returns the fields of `draft`; it raises Refused with a reason that is counted in the datasheet.
Human text is kept as it is; what a checker needs to be fair (labels, a length, a word to use) is
said in the instruction. Everything here is ours, not the paper's.
"""

import re

from . import checkers


def _split(text):
    return frozenset(text.split())


NAME = re.compile(r"\b(?:[A-Z][\w'-]+(?: (?:of |the )?[A-Z][\w'-]+)*|\d[\d,.]*\d|\d)\b")
COMMON = _split(
    """
    A An And As At But By For From He Her His How If In It Its No On Or She So Some That The
    Their There They This To We What When Who With You
    """
)
# Words of requests rather than of topics: none of them is a word an answer must use.
REQUESTS = _split(
    """
    about according answer based better brief could create describe design detail detailed
    develop everything examples explain following format generate given information
    instruction instructions large meaning mention necessary output paragraph people person
    please point points proper provide provided question questions related response sentence
    sentences short should something suggest their there these things think those title
    topic using which while without words would write written yourself
    """
)
PRESENT = re.compile(
    r"\b(current(ly)?|now|latest|newest|next|new|today|so far|recent(ly)?|this (year|season|week|"
    r"month)|last (time|season|year|night)|still|come (out|back)|comes? on|season \d+)\b",
    re.I,
)
QUOTED = re.compile(r"""["']([^"']+)["']""")
FREE = "free form"  # checked by likeness to the reference alone: taken only to fill up


class Refused(Exception):
    """An upstream row that no fair row can be made of; its text is the reason."""


def draft(instruction, given, reference, checker, **tags) -> dict:
    """The fields of a row that a rule decides; `tags`: subtask, difficulty, domain, provenance."""
    return {
        "instruction": instruction.strip(),
        "input": given.strip(),
        "reference": reference.strip(),
        "checker": checker,
        "tags": tags,
    }


def by_size(reference: str) -> str:
    """Difficulty where a source says nothing: by the reference's words."""
    size = len(checkers.words(reference))
    return "easy" if size < 15 else "medium" if size < 60 else "hard"


def names(passage: str, within: str, most: int = 3) -> list[str]:
    """Names and numbers of `passage` that stand in `within` too, in order, at most `most`."""
    found = dict.fromkeys(
        name for name in NAME.findall(passage) if name not in COMMON and checkers.has(within, name)
    )
    return list(found)[:most]


def topics(reference: str, given: str) -> list[str]:
    """Words of a topic that stand in both texts, as written in the second, the longest first."""
    written = {word.lower(): word for word in reversed(re.findall(r"\w+(?:['-]\w+)*", given))}
    known = {word for word in written if len(word) > 4 and word.isalpha()} - REQUESTS
    found = dict.fromkeys(word for word in checkers.words(reference) if word in known)
    return [written[word] for word in sorted(found, key=len, reverse=True)]


def sentiment(row, wording):
    """SST-2: is a line of a film review negative or positive?"""
    answer = wording["labels"][row["label"]]
    return draft(
        wording["say"],
        row["sentence"],
        answer,
        {"name": "label", "labels": wording["labels"], "answer": answer},
        subtask="sentiment",
        difficulty="easy",
        domain="film",
    )


def pair(row, wording):
    """MRPC and RTE: do two sentences mean the same, does one follow from the other?"""
    answer = wording["labels"][row["label"]]
    return draft(
        wording["say"],
        f"1. {row['sentence1'].strip()}\n2. {row['sentence2'].strip()}",
        answer,
        {"name": "label", "labels": wording["labels"], "answer": answer},
        subtask=wording["subtask"],
        difficulty="medium",
        domain="news",
    )


def labelled_task(row, wording):
    """Self-instruct, classification: the human instruction, and our line that names the labels."""
    task = row["instances"][0]
    labels, answer = list(map(str, wording["task"])), task["output"].strip()
    return draft(
        f"{row['instruction'].strip()} {wording['say'].format(labels=', '.join(labels))}",
        task["input"],
        answer,
        {"name": "label", "labels": labels, "answer": answer},
        subtask="classification task",
        difficulty="medium",
        domain=row.get("motivation_app") or "not labelled",
    )


def stub(row, wording):
    """HumanEval: complete a function; the source's own tests."""
    tests = [row["test"].strip(), f"check({row['entry_point']})"]
    solution = row["canonical_solution"]
    lines = len(solution.strip().splitlines())
    return draft(
        wording["say"].format(name=row["entry_point"]),
        row["prompt"],
        row["prompt"] + solution,
        {"name": "unit_tests", "tests": tests, "entry_point": row["entry_point"]},
        subtask="complete a function",
        difficulty="easy" if lines < 4 else "medium" if lines < 9 else "hard",
        domain="programming",
    )


def program(row, wording):
    """MBPP: its own instruction and tests; the model sees the first, so that it knows the name."""
    test = row["test_list"][0]
    code = row["code"].replace("\r\n", "\n").replace("\t", "    ")
    if row["test_setup_code"].strip():
        raise Refused("its tests need definitions that the model would not see")
    called = [name for name in re.findall(r"\bdef (\w+)", code) if re.search(rf"\b{name}\b", test)]
    if not called:
        raise Refused("its tests call no function of the solution")
    wanted = {said for hidden in row["test_list"][1:] for said in QUOTED.findall(hidden)}
    shown = set(QUOTED.findall(test))
    if wanted & set(QUOTED.findall(code)) - shown:
        raise Refused("its tests want a text the model would not see")
    lines = len(code.splitlines())
    return draft(
        f"{row['text'].strip()} {wording['say']}",
        test,
        code,
        {"name": "unit_tests", "tests": row["test_list"], "entry_point": called[-1]},
        subtask="write a function",
        difficulty="easy" if lines < 4 else "medium" if lines < 9 else "hard",
        domain="programming",
    )


def _number(text: str) -> int | float:
    value = float(text.replace("\\!", "").replace(",", ""))
    return int(value) if value.is_integer() else value


def word_problem(row, wording):
    """GSM8K: the number after `####`."""
    answer = _number(row["answer"].split("####")[1])
    steps = row["answer"].count("<<")
    return draft(
        wording["say"],
        row["question"],
        re.sub(r"<<.*?>>", "", row["answer"]).replace("####", "The answer is"),
        {"name": "numeric", "answer": answer},
        subtask="word problem",
        difficulty="easy" if steps < 3 else "medium" if steps < 5 else "hard",
        domain="everyday sums",
    )


def competition_problem(row, wording):
    """MATH-500: problems in words and TeX whose answer is a plain number."""
    if not re.fullmatch(r"-?\d+(,(\\!)?\d{3})*(\.\d+)?", row["answer"]):
        raise Refused("its answer is no plain number")
    answer = _number(row["answer"])
    if "[asy]" in row["problem"] + row["solution"]:
        raise Refused("it needs a drawing")
    if not checkers.numeric(row["solution"], answer=answer):
        raise Refused("its solution does not end with the answer")
    level = row["level"]
    return draft(
        wording["say"],
        row["problem"],
        row["solution"],
        {"name": "numeric", "answer": answer},
        subtask="competition problem",
        difficulty="easy" if level < 3 else "medium" if level == 3 else "hard",
        domain="school mathematics",
    )


def _short(question, answers, wording, **tags):
    """A question with accepted short answers, the first of them the reference."""
    if PRESENT.search(question):
        raise Refused("its answer depends on the date")
    if '""' in question:
        raise Refused("its quotation marks were doubled by an export")
    answers = [answer.strip() for answer in answers]
    answers += [answer.removesuffix("'s") for answer in answers]  # whose? Einstein's, or Einstein
    first, *others = dict.fromkeys(answers)
    if len(checkers.words(first)) > 6:
        raise Refused("its answer is longer than six words")
    others = [text for text in others if 2 < len(text) <= 60 and not re.search(r"[/:()]", text)]
    if first.isupper():  # "MACAU": the same in ordinary letters, where it is there
        first = next((text for text in others if text.lower() == first.lower()), first)
    kept = list(dict.fromkeys([first, *others]))
    checker = {"name": "short_answer", "answers": kept, "within": 12}
    return draft(wording["say"], question, first, checker, **tags)


def _one(answers):
    """The answers, if each shares a word with the first; parts of a long answer do not."""
    first = set(checkers.words(answers[0]))
    if not all(first & set(checkers.words(answer)) for answer in answers):
        raise Refused("its answers are parts of a longer one, or differ")
    return answers


def trivia(row, wording):
    """TriviaQA: a question of a quiz, answers with aliases."""
    answer = row["answer"]
    return _short(
        row["question"],
        [answer["value"], *answer["aliases"]],
        wording,
        subtask="trivia",
        difficulty="medium",
        domain="general knowledge",
    )


def web_question(row, wording):
    """Natural Questions, open: what people asked a search engine."""
    return _short(
        row["question"],
        _one(row["answers"]),
        wording,
        subtask="web question",
        difficulty="hard",
        domain="general knowledge",
    )


def reading(row, wording):
    """SQuAD: a question on a paragraph, answers copied from it."""
    found = re.fullmatch(
        r"Title: (.*?)\nBackground: (.*)\nQuestion: (.*)\nAnswer:", row["query"], re.S
    )
    if not found:
        raise KeyError("query (title, background, question)")
    title, passage, question = found.groups()
    made = _short(
        question,
        _one(row["answers_text"]),
        wording,
        subtask="reading",
        difficulty="easy",
        domain=title.replace("_", " "),
    )
    return made | {"input": f"{passage.strip()}\nQuestion: {question.strip()}"}


def _content(text):
    return {word for word in checkers.words(text) if len(word) > 3}


def _headline(passage, title, wording, **tags):
    """A passage and the line its own author put above it."""
    shared = topics(title, passage)
    if not shared:
        raise Refused("its headline shares no word with the passage")
    count = len(checkers.words(title))
    if count < 3:
        raise Refused("its headline is shorter than three words")
    most = count + 8
    checker = {
        "name": "rouge_facts",
        "reference": title,
        "facts": [shared],
        "min_rouge": 0.2,
        "max_words": most,
    }
    return draft(wording["say"].format(most=most), passage, title, checker, **tags)


def paper_title(row, wording):
    """Qasper: a paper's abstract, and the title its authors gave it."""
    return _headline(
        row["abstract"],
        row["title"],
        wording,
        subtask="title of a paper",
        difficulty="medium",
        domain="language technology",
    )


def step_headline(row, wording):
    """HellaSwag's wikiHow part: what a step of a guide says, and the line its author put above it.
    The true ending is used, never a machine-written one.
    """
    text = f"{row['ctx']} {row['endings'][int(row['label'])]}"
    found = re.match(
        r"\[header\] (.*?) \[title\] (.*?) \[step\] (.*?)(?: \[(?:title|substeps|header)\]|$)",
        text,
        re.S,
    )
    if not row["source_id"].startswith("wikihow") or not found:
        raise Refused("no step with its headline")
    header, title, step = (" ".join(part.split()) for part in found.groups())
    if "[" in title + step or not re.search(r"[.!?]$", step):
        raise Refused("its step is cut off or none")
    if len(checkers.words(step)) < 2 * len(checkers.words(title)):
        raise Refused("its step is not twice as long as its headline")
    if not _content(title) <= set(checkers.words(f"{header} {step}")):
        raise Refused("its headline has words that the step has not")
    return _headline(
        f"{header}: {step}",
        title,
        wording,
        subtask="headline of a step",
        difficulty="easy",
        domain=row["activity_label"],
    )


def summary_task(row, wording):
    """Self-instruct, summaries: the human instruction, and our line on the length."""
    task = row["instances"][0]
    reference, passage = task["output"].strip(), task["input"]
    count = len(checkers.words(reference))
    most = min(2 * count, len(checkers.words(passage)) - 1)
    checker = {
        "name": "rouge_facts",
        "reference": reference,
        "facts": [topics(reference, passage)],
        "min_rouge": 0.2,
        "max_words": most,
    }
    return draft(
        f"{row['instruction'].strip()} {wording['say'].format(most=most)}",
        passage,
        reference,
        checker,
        subtask="summary task",
        difficulty=by_size(reference),
        domain=row.get("motivation_app") or "not labelled",
    )


def writing_task(row, wording):
    """Self-instruct, writing: the human instruction, and our line on the form: a list, or a length
    and a word to use; and what the plan adds by hand where the request itself can be checked. An
    answer that repeats the request fails.
    """
    task = row["instances"][0]
    own, given, reference = row["instruction"].strip(), task["input"], task["output"].strip()
    count = len(checkers.words(reference))
    if count < 5:
        raise Refused("its answer is shorter than five words")
    lines = [line for line in reference.splitlines() if line.strip()]
    rules = {
        "name": "constraints",
        "forbidden": [text for text in (own, given) if len(checkers.words(text)) > 6],
    }
    if checkers.FORMATS["list"](reference):
        least, most = max(2, len(lines) // 2), len(lines) + 3
        form = wording["list"].format(least=least, most=most)
        rules |= {"format": "list", "lines": [least, most]}
    else:
        shared = topics(reference, f"{own} {given}")
        if not shared:
            raise Refused("request and answer share no word that could be asked for")
        least, most = max(4, count // 2), 5 * (3 * count // 10) + 10
        form = wording["say"].format(least=least, most=most, word=shared[0])
        rules |= {"min_words": least, "max_words": most, "contains": [shared[0]]}
    rules |= wording.get("task") or {}
    return draft(
        f"{own} {form}",
        given,
        reference,
        rules,
        subtask="list" if "format" in rules else "text",
        difficulty=by_size(reference),
        domain=row.get("motivation_app") or "not labelled",
    )


def dolly_classification(row, wording):
    """Dolly, classification: an either-or, or "P is A, Q is B" pairs; else ROUGE-L >= 0.6."""
    reference, given = row["response"].strip(), f"{row['instruction']}\n{row['context']}"
    count = len(checkers.words(reference))
    if count > 60:
        raise Refused("its answer is too long")
    pairs = [
        re.fullmatch(r"\s*(?:and )?(.+?)(?: is an? | is | are |: | - )(.+?)\.?\s*", piece, re.I)
        for piece in re.split(r"[,;\n]+|\.\s", reference)
        if piece.strip(" .")
    ]
    if len(pairs) > 1 and all(
        pair and checkers.has(given, pair[1]) and checkers.has(given, pair[2]) for pair in pairs
    ):
        links = (": ", " - ", " is ", " is a ", " are ")
        wanted = [[f"{p[1]}{link}{p[2]}" for link in links] for p in pairs]
        rules = {"name": "constraints", "contains": wanted, "max_words": 3 * count + 10}
        return _dolly(row, "pairs", rules)
    if count <= 5 and checkers.has(given, reference):
        options = re.search(
            r"(?:[?:,]\s*|^)([^?:,]+?),? or ([^?:,]+?)[?.]?\s*$", row["instruction"]
        )
        labels = [option.strip() for option in options.groups()] if options else []
        if checkers.bare(reference) in map(checkers.bare, labels):
            rules = {"name": "label", "labels": labels, "answer": reference}
            return _dolly(row, "either-or", rules)
        return _dolly(row, "which-one", {"name": "short_answer", "answers": [reference]})
    rules = {
        "name": "rouge_facts",
        "reference": reference,
        "facts": names(reference, given),
        "min_rouge": 0.6,
        "max_words": 2 * count,
    }
    return _dolly(row, FREE, rules)


def _dolly(row, subtask, checker):
    return draft(
        row["instruction"],
        row["context"],
        row["response"],
        checker,
        subtask=subtask,
        difficulty=by_size(row["response"]),
        domain="not labelled",
    )


def dolly_answer(row, wording):
    """Dolly, closed and open QA: a short answer, or ROUGE-L and two names or numbers the question
    does not hold.
    """
    reference = row["response"].strip()
    count = len(checkers.words(reference))
    if count > 60:
        raise Refused("its answer is too long")
    if count <= 6:
        rules = {"name": "short_answer", "answers": [reference], "within": 40}
        return _dolly(row, "short answer", rules)
    facts = [
        name
        for name in names(reference, reference, 9)
        if not checkers.has(row["instruction"], name)
    ][:2]
    if not facts:
        raise Refused("its answer has no name or number to check")
    longest = min(2 * count + 20, len(checkers.words(row["context"])) - 1 if row["context"] else 99)
    rules = {
        "name": "rouge_facts",
        "reference": reference,
        "facts": facts,
        "min_rouge": 0.2,
        "max_words": longest,
    }
    return _dolly(row, "sentence", rules)


def dolly_writing(row, wording):
    """Dolly, creative writing, brainstorming, lists to extract: as `writing_task`."""
    task = {"input": row["context"], "output": row["response"]}
    return writing_task({"instruction": row["instruction"], "instances": [task]}, wording)


def dolly_summary(row, wording):
    """Dolly, summarization of a passage: ROUGE-L, up to three names or numbers, and shorter than
    the passage.
    """
    reference, passage = row["response"].strip(), row["context"]
    count, size = len(checkers.words(reference)), len(checkers.words(passage))
    if not 5 <= count <= 0.8 * size:
        raise Refused("its summary is not shorter than its passage, or too short")
    rules = {
        "name": "rouge_facts",
        "reference": reference,
        "facts": names(reference, passage),
        "min_rouge": 0.15,
        "max_words": min(size - 1, 2 * count + 10),
    }
    return _dolly(row, "passage", rules)


RULES = {
    f.__name__: f
    for f in (
        sentiment,
        pair,
        labelled_task,
        stub,
        program,
        word_problem,
        competition_problem,
        trivia,
        web_question,
        reading,
        paper_title,
        step_headline,
        summary_task,
        writing_task,
        dolly_classification,
        dolly_answer,
        dolly_writing,
        dolly_summary,
    )
}
