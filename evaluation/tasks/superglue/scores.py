"""SuperGLUE's metrics (arXiv 1905.00537, table 1), for lm-eval's ``process_results`` and ``aggregation``.

``score`` is a task's part of the average: its metric, or the mean of its two. Runs wherever lm-eval does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Doc = Mapping[str, Any]
Scored = Sequence[tuple[float, bool]]
"""Log-likelihood of each choice, and whether it is the greedy continuation."""
Pair = tuple[int, int]
"""Label and prediction."""
Answer = tuple[int, int, int, int]
"""MultiRC's paragraph, question, label and prediction."""


def chosen(results: Scored) -> int:
    """The most probable choice; the first of equals, as in lm-eval."""
    return max(range(len(results)), key=lambda choice: results[choice][0])


def accuracy(doc: Doc, results: Scored) -> dict[str, float]:
    """Of BoolQ, COPA, RTE, WiC and WSC."""
    right = float(chosen(results) == doc["label"])
    return {"acc": right, "score": right}


def f1(pairs: Sequence[Pair], positive: int) -> float:
    """F1 of the class ``positive``; 0 where it is neither right nor predicted."""
    true_positives = sum(label == predicted == positive for label, predicted in pairs)
    either = sum((label == positive) + (predicted == positive) for label, predicted in pairs)
    return 2 * true_positives / either if either else 0.0


# CB: accuracy, and F1 averaged over its three classes --------------------------------------------------------------


def cb(doc: Doc, results: Scored) -> dict[str, Any]:
    """Of one premise and hypothesis."""
    pair = (int(doc["label"]), chosen(results))
    return {"acc": float(pair[0] == pair[1]), "f1": pair, "score": pair}


def cb_f1(pairs: Sequence[Pair]) -> float:
    """Mean of the F1 of entailment, contradiction and neutral."""
    return sum(f1(pairs, label) for label in range(3)) / 3


def cb_score(pairs: Sequence[Pair]) -> float:
    """Mean of accuracy and F1."""
    return (sum(label == predicted for label, predicted in pairs) / len(pairs) + cb_f1(pairs)) / 2


# MultiRC: F1 over all answers (F1a), and exact match of all answers to a question ----------------------------------


def multirc_choices(doc: Doc) -> list[str]:
    """By label: 0 is a wrong answer, 1 a right one."""
    return [f"{doc['answer']}\nIs the answer correct? {verdict}" for verdict in ("no", "yes")]


def multirc(doc: Doc, results: Scored) -> dict[str, Any]:
    """Of one answer to a question."""
    answer = (doc["idx"]["paragraph"], doc["idx"]["question"], int(doc["label"]), chosen(results))
    return {"acc": float(answer[2] == answer[3]), "f1a": answer, "em": answer, "score": answer}


def multirc_f1a(answers: Sequence[Answer]) -> float:
    """F1 of the answers that are right, over all answers to all questions."""
    return f1([(label, predicted) for _, _, label, predicted in answers], positive=1)


def multirc_em(answers: Sequence[Answer]) -> float:
    """Share of the questions with every answer judged rightly."""
    questions: defaultdict[tuple[int, int], bool] = defaultdict(lambda: True)
    for paragraph, question, label, predicted in answers:
        questions[paragraph, question] &= label == predicted
    return sum(questions.values()) / len(questions)


def multirc_score(answers: Sequence[Answer]) -> float:
    """Mean of F1a and exact match."""
    return (multirc_f1a(answers) + multirc_em(answers)) / 2
