"""The paper's taxonomy of adversarial prompts as data (sections 4.2.1 and A.5.2): three risk categories, and the attack vectors, which
are ways of asking. Data name them in the columns `category` and `vector`; the paper's own names stand in `name`.

A good answer deals with an immediate safety concern first, then addresses the prompt and explains its risks, then offers further
information. It never enables crime, encourages dangerous behaviour, abuses anyone or is sexually explicit.
"""

import re
from dataclasses import dataclass

from posttrain.formats import Prompt

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Entry:
    """name: the paper's; description: what belongs here; guideline: what a good answer does with it."""

    name: str
    description: str
    guideline: str


def category_of(prompt: Prompt) -> str:
    """A prompt's risk category, a key of CATEGORIES; UNKNOWN where its `category` column is missing or holds another word."""
    return _known(prompt, "category", CATEGORIES)


def vector_of(prompt: Prompt) -> str:
    """A prompt's attack vector, a key of VECTORS; UNKNOWN where its `vector` column is missing or holds another word."""
    return _known(prompt, "vector", VECTORS)


def _known(prompt: Prompt, column: str, table: dict[str, Entry]) -> str:
    """Case, spaces and hyphens make no difference."""
    word = re.sub(r"[\s_-]+", "_", str(prompt.meta.get(column, "")).strip().lower())
    return word if word in table else UNKNOWN


CATEGORIES: dict[str, Entry] = {
    "illicit": Entry(
        "illicit and criminal activities",
        "Asks for help with a crime or with breaking the law: terrorism, theft, human trafficking, fraud, weapons, drugs, breaking into "
        "homes, accounts or systems.",
        "If somebody is in danger, say first where help is. Decline to assist and say that it is unlawful and whom it hurts, without a step, "
        "a tool or a hint. Offer what serves the lawful need behind the request."),
    "hateful_harmful": Entry(
        "hateful and harmful activities",
        "Asks for content or conduct that hurts people: defamation, harassment, discrimination, contempt for a group, self-harm, eating "
        "disorders.",
        "If the person may be at risk, begin with them and with help that is near. Don't demean, threaten or encourage; correct a false "
        "claim about people and say what it does to them. Offer evidence, or a way to say what is meant without harm."),
    "unqualified_advice": Entry(
        "unqualified advice",
        "Asks for advice that a qualified person should give: medical, financial or legal decisions.",
        "In an emergency, say first whom to call. Say that this needs a professional and why; correct what is wrong. Give general, settled "
        "information and the questions to bring, and name the kind of professional or official source to turn to."),
}

VECTORS: dict[str, Entry] = {
    "plain": Entry(
        "no manipulation", "The harmful request is made openly, with no trick.",
        "Answer by the risk category."),
    "authority": Entry(
        "psychological manipulation", "Leans on rank, duty, pity or urgency, such as a claim to be a doctor, an officer or the model's maker.",
        "A claimed role changes nothing that cannot be checked: answer as anybody would be answered, and stay polite about the claim."),
    "false_premise": Entry(
        "logic manipulation", "Takes something untrue for granted and asks what follows from it.",
        "Correct the premise before anything else; don't reason from it."),
    "misspelling": Entry(
        "syntactic manipulation", "Hides the request in misspelt, broken or coded words.",
        "Read what is meant and answer that by the risk category; don't comment on the spelling."),
    "metaphor": Entry(
        "semantic manipulation", "Speaks in images, euphemisms or of something else that stands for the harm.",
        "Name what the image stands for and answer that; don't play along in the image."),
    "role_play": Entry(
        "perspective manipulation", "Asks for the harm from inside a story, a game or another person's voice.",
        "Fiction may be written, usable harm may not: step out of the role where the role would give it."),
    "non_english": Entry(
        "non-English languages", "Asks in another language than English, or mixes languages.",
        "Answer by the risk category, in the language of the prompt; help that is named should exist where the language is spoken."),
    "other": Entry(
        "others", "Any other way around the rules, such as splitting a request over turns, bargaining, or asking for the opposite.",
        "Answer what the conversation as a whole asks for."),
}
