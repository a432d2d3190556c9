"""What an answer keeps of an instruction, told without a model: an attribute named, a language spoken, a form kept. Standard library alone.

A checker is exact in one direction: what it accepts keeps the instruction; a few answers that keep it in unforeseen words are not accepted,
the same ones whoever wrote them.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable

ARTICLES = {"a", "an", "the"}
NEGATIONS = {"not", "never", "no", "neither", "nor", "without", "nobody", "cannot"}  # and words that end in n't
IDIOMS = re.compile(r"\b(?:can't|cannot|can not) (?:get enough|wait|imagine life without)\b|\bnot (?:only|just|to mention)\b|\bno (?:doubt|secret|wonder)\b"
                    r"|\b(?:no|not|never|\w+n't)\b[^.,;:!?()\n]*?\b(?:more|better|other) than\b")  # negations that deny nothing
CLAUSES = re.compile(r"[.,;:!?()\n]|\bbut\b|\bthough\b")
SENTENCE = re.compile(r"[^.!?。！？]*[.!?。！？]+[\"'”’)*]*(?=\s|$)|[^.!?。！？]+$")
TITLES = re.compile(r"\b(dr|mr|mrs|ms|st|jr|sr|e\.g|i\.e|[a-z])\.(?=\s|$)|^(\s*\d+)\.(?=\s)", re.IGNORECASE | re.MULTILINE)  # periods that end no sentence
ENGLISH = ["the", "and", "is", "of", "to", "you", "it", "that", "in", "are", "for", "with", "this", "was", "be", "have", "not", "i", "my", "your", "as",
           "can", "or", "from", "they", "what", "will", "we"]


# -- attributes ----------------------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Lower-case words without accents, possessive endings and articles, each in the singular."""
    text = unicodedata.normalize("NFKD", text.replace("’", "'").casefold())
    found = re.findall(r"[^\W_]+(?:'[^\W_]+)*", "".join(c for c in text if not unicodedata.combining(c)))
    return [_singular(w.removesuffix("'s")) for w in found if w not in ARTICLES]


def _singular(word: str) -> str:
    """By ending alone: also wrong stems are the same on both sides of a comparison."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and re.search("(s|x|z|ch|sh)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def names(answer: str, accepted: list[str]) -> bool:
    """Whether the answer states one of these names: the same words in a row, whatever their case, articles and number, in a clause that does
    not deny it ("I am not Napoleon")."""
    wanted = [w for w in map(words, accepted) if w]
    for clause in CLAUSES.split(IDIOMS.sub(" ", _without_titles(answer.replace("’", "'").casefold()))):
        said = words(clause)
        for name in wanted:
            for i in range(len(said) - len(name) + 1):
                if said[i:i + len(name)] == name and not _denied(said[:i], said[i + len(name):]):
                    return True
    return False


def _denied(before: list[str], after: list[str]) -> bool:
    """'I do not like NAME', 'NAME isn't for me', 'NAME is not my hobby'."""
    return any(w in NEGATIONS or w.endswith("n't") for w in before) or any(w.endswith("n't") for w in after[:1]) or after[1:2] == ["not"]


def _without_titles(text: str) -> str:
    return TITLES.sub(lambda m: m[1] or m[2], text)


# -- languages -----------------------------------------------------------------------------------------------------------------------


def speaks(answer: str, script: list[str], function_words: list[str], others: list[list[str]]) -> bool:
    """Whether an answer is in a language.

    script: names of Unicode scripts that seven of ten letters must belong to, the first of them two of ten; function_words: of a language in
    Latin letters, a tenth of the words or more must be among them, and fewer among those of any other language (others).
    """
    letters = Counter(unicodedata.name(c, "?").split()[0] for c in answer if c.isalpha())
    total = letters.total()
    if not total or sum(letters[s] for s in script) < 0.7 * total or letters[script[0]] < 0.2 * total:
        return False
    if not function_words:
        return True
    said = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", answer.replace("’", "'").casefold())
    own = _hits(said, function_words)
    return own >= max(1, 0.1 * len(said)) and all(own > _hits(said, other) for other in [ENGLISH, *others])


def _hits(said: list[str], function_words: list[str]) -> int:
    known = set(function_words)
    return sum(w in known for w in said)


# -- forms (paper Fig. 28) -------------------------------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """Sentences by their end marks; initials, titles and numbered points end none."""
    return [s for s in (m.strip() for m in SENTENCE.findall(_without_titles(text))) if any(c.isalnum() for c in s)]


def syllables(word: str) -> int:
    """Of an English word, by groups of vowels; a silent e at the end does not count."""
    word = re.sub(r"[^a-z]", "", word.casefold())
    groups = len(re.findall(r"[aeiouy]+", word))
    silent = re.search(r"[^aeioyl]e$|[aeiouy]le$|[^td]ed$|[^aeiousxzcghl]es$", word)
    return max(1, groups - bool(silent and groups > 1)) if word else 0


def haiku(answer: str) -> bool:
    """Three lines of 5, 7 and 5 syllables; one more or less in a line is left to the counter's error."""
    lines = [line for line in answer.splitlines() if line.strip()]
    counted = [sum(map(syllables, re.findall(r"[A-Za-z']+", line))) for line in lines]
    return len(lines) == 3 and all(abs(n - wanted) <= 1 for n, wanted in zip(counted, (5, 7, 5), strict=True))


def one_sentence(answer: str) -> bool:
    return len(sentences(answer)) == 1 and len([line for line in answer.splitlines() if line.strip()]) == 1


def lower_case(answer: str) -> bool:
    return answer.lower() == answer and any(c.isalpha() for c in answer)


def upper_case(answer: str) -> bool:
    return answer.upper() == answer and any(c.isalpha() for c in answer)


def at_most_words(answer: str, most: int) -> bool:
    return 1 <= len(answer.split()) <= most


def ends_with(answer: str, end: str) -> bool:
    return _plain(answer).endswith(_plain(end))


def begins_with(answer: str, start: str) -> bool:
    return re.match(re.escape(_plain(start)) + r"\b", _plain(answer)) is not None


def _plain(text: str) -> str:
    return text.casefold().strip(" \n\t\"'“”*_.!")


def question(answer: str) -> bool:
    return answer.rstrip(" \n\t\"'”’)*").endswith("?")


def bullets(answer: str) -> bool:
    """Every line is a point, and there are two or more."""
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    return len(lines) > 1 and all(re.match(r"[-*•–]\s+\S", line) for line in lines)


def exclamations(answer: str) -> bool:
    found = sentences(answer)
    return bool(found) and all(s.rstrip("\"'”’)*").endswith("!") for s in found)


def quoted(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 2 and text[0] in "\"“" and text[-1] in "\"”"


CHECKS: dict[str, Callable] = {"haiku": haiku, "one_sentence": one_sentence, "lower_case": lower_case, "upper_case": upper_case,
                               "at_most_words": at_most_words, "ends_with": ends_with, "begins_with": begins_with, "question": question,
                               "bullets": bullets, "exclamations": exclamations, "quoted": quoted}
WITH_ARGUMENT = {"at_most_words": int, "ends_with": str, "begins_with": str}
