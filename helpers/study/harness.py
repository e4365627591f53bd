"""EleutherAI's lm-evaluation-harness on a model with a set ablated; lm-eval is an optional extra.

`pip install lm-eval` first. No model or data set of the harness is loaded: the model is the one
at hand, and `label_task` makes a task of rows at hand, so nothing needs the hub.
"""

from pathlib import Path

import pandas as pd
import yaml

from ..capture.interventions import ablate
from ..hexainst.checkers import bare, refuse_bad
from ..hexainst.corpus import text
from ..hexainst.schema import refuse_over
from ..paths import checked
from ..record import UserError, atomic


class Ablating:
    """To stand before a harness model class among the bases of a class: its requests are answered
    while `mask` is ablated in its `model` (see `ablate`); the model is itself again after each.
    """

    mask, operator, reference = None, "zero", None

    def loglikelihood(self, requests, **options):
        """As the class behind answers, ablated."""
        return self._ablated(super().loglikelihood, requests, options)

    def loglikelihood_rolling(self, requests, **options):
        """As the class behind answers, ablated."""
        return self._ablated(super().loglikelihood_rolling, requests, options)

    def generate_until(self, requests, **options):
        """As the class behind answers, ablated."""
        return self._ablated(super().generate_until, requests, options)

    def _ablated(self, answer, requests, options):
        with ablate(self.model, self.mask, self.operator, reference=self.reference):
            return answer(requests, **options)


def ablated_lm(model, tokenizer, mask=None, operator: str = "zero", **options):
    """The harness's own class for transformers models (HFLM), answering with `mask` ablated (None:
    intact). `options` go to HFLM: batch_size, add_bos_token, ... Pass it to the harness as `model`,
    without `use_cache`, which would not tell it from the intact one.

    Raises UserError where lm-eval is not installed. (Ours.)
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(
            f"the evaluation harness cannot be imported ({error}). Run `pip install lm-eval`."
        ) from error
    kind = type("AblatedHFLM", (Ablating, HFLM), {"mask": mask, "operator": operator})
    return kind(pretrained=model, tokenizer=tokenizer, **options)


def evaluate(model, tokenizer, tasks, sets: dict, operator: str = "zero", **options):
    """Scores of tasks with each set ablated: a DataFrame of set, task, metric, value, stderr, n.

    tasks: names that the harness knows, or paths of task files (YAML). sets: {name: component
    mask, or None for the intact model}. `options` go to HFLM; batch_size is the one most needed.
    """
    rows = []
    for name, mask in sets.items():
        lm = ablated_lm(model, tokenizer, mask, operator, **options)
        rows += [{"set": name} | row for row in _scores(lm, tasks)]
    return pd.DataFrame(rows)


def _scores(lm, tasks):
    from lm_eval import simple_evaluate

    found = simple_evaluate(lm, tasks=[str(task) for task in tasks], log_samples=False)
    for task, scores in found["results"].items():
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr"):
                error = scores.get(f"{metric}_stderr,{kind}")
                row = {"task": task, "metric": metric, "value": value, "stderr": error}
                yield row | {"n": found["n-samples"][task]["effective"]}


def _choices(labels, answer, **_):
    """The labels, and the place of the one that the answer is in a checker's eyes."""
    return {"choices": labels, "answer": [*map(bare, labels)].index(bare(answer))}


def label_task(rows: pd.DataFrame, folder, name: str, template: str = "{instruction}") -> Path:
    """Make a multiple-choice task of those rows whose checker is `label`: the answer is the
    likeliest of the row's labels. Writes <name>.jsonl and <name>.yaml into a folder; the latter's
    path, for `evaluate` or the harness's own `--tasks`.

    Raises UserError where the template does not hold {instruction} once, a row has a bad checker,
    no row has labels, or a file is there already.
    """
    checked(name, "task")
    if template.count("{instruction}") != 1:
        raise UserError(f"template is {template!r}: expected {{instruction}} in it, once.")
    every = rows.to_dict("records")
    refuse_bad(every)
    lines = [
        {"prompt": template.replace("{instruction}", text(row)), **_choices(**row["checker"])}
        for row in every
        if row["checker"]["name"] == "label"
    ]
    if not lines:
        raise UserError("no row's checker is `label`: there is nothing to choose from. Take CLS.")
    data, path = (Path(folder).resolve() / f"{name}.{end}" for end in ("jsonl", "yaml"))
    refuse_over([data, path])
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "" if template[-1:].isspace() else " ",
        "metric_list": [{"metric": "acc"}],
    }
    frame = pd.DataFrame(lines)
    for file, content in (
        (data, frame.to_json(orient="records", lines=True)),
        (path, yaml.safe_dump(task, sort_keys=False)),
    ):
        with atomic(file) as draft:
            draft.write_text(content, encoding="utf-8")
    return path
