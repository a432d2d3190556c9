"""Nothing secret in a recipe: what a recipe says is copied into manifests, resolved recipes, reports and model cards."""

import re

from posttrain.errors import PosttrainError

SECRETS = {
    "an address with a user and a password": re.compile(r"\w+://(?![^/\s@]*\$\{)[^/?#\s@]*:[^/?#\s@]*@"),
    "an access token": re.compile(r"\b(hf_[A-Za-z0-9]{20,}|(?<![-_])sk-(?=[\w-]*[0-9])(?=[\w-]*[A-Z])[A-Za-z0-9_-]{20,}"
                                  r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
                                  r"|AKIA[A-Z0-9]{16}|xox[a-z]-[\w-]{10,}|AIza[\w-]{30,})"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}


def refuse(value, place: str, key: str = "") -> None:
    """Raise PosttrainError where a text anywhere in a recipe, key or value, looks like a secret. The error does not show it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            refuse(name, place, key)
            refuse(inner, place, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            refuse(inner, place, f"{key}[{i}]")
    elif isinstance(value, str):
        for what, pattern in SECRETS.items():
            if pattern.search(value):
                raise PosttrainError(f"{place}: {key}".removesuffix(": "), f"{what}, which would be copied into the run folder and its report",
                                     "no secret in a recipe", "Log in with `hf auth login`, or keep it in an environment variable; change it, now that a "
                                     "file has held it.")
