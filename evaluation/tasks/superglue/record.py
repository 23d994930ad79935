"""ReCoRD as lm-eval 0.4.13 asks and scores it, with SQuAD's metrics written out. Runs wherever lm-eval does."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Doc = Mapping[str, Any]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def doc_to_text(doc: Doc) -> str:
    """The passage, and its highlights as a list that the query continues."""
    text, *highlights = doc["passage"].strip().split("\n@highlight\n")
    return text + "\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def entities(doc: Doc) -> list[str]:
    """The candidates, each once."""
    return sorted(set(doc["entities"]))


def doc_to_choice(doc: Doc) -> list[str]:
    """The query with each candidate in its gap."""
    return [_filled(doc, entity) for entity in entities(doc)]


def doc_to_target(doc: Doc) -> str:
    """The query with the first right answer in its gap, for solved examples."""
    return _filled(doc, min(doc["answers"]))


def process_results(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """F1 over words and exact match of the most probable candidate, with the answer that suits it best."""
    candidates = entities(doc)
    prediction = candidates[max(range(len(candidates)), key=lambda choice: results[choice][0])]
    best_f1 = max(f1(answer, prediction) for answer in doc["answers"])
    best_match = max(float(normalized(answer) == normalized(prediction)) for answer in doc["answers"])
    return {"f1": best_f1, "em": best_match, "score": (best_f1 + best_match) / 2}


def normalized(text: str) -> str:
    """SQuAD's normal form (arXiv 1606.05250): lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(answer: str, prediction: str) -> float:
    """SQuAD's F1: of the words that two texts share."""
    ours, theirs = normalized(prediction).split(), normalized(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))


def _filled(doc: Doc, entity: str) -> str:
    return f"  - {doc['query']}".replace("@placeholder", entity)
