"""An exported folder -> a repository on the Hugging Face hub, private unless told otherwise. The card goes first: no weights stand without it."""

import json
import re
from pathlib import Path

from posttrain import card
from posttrain.errors import PosttrainError
from posttrain.export import MARK
from posttrain.log import say

BASE = "base_"  # how the names of the base's own licence files begin in an export
AGAIN = "Run the same command again: what is there is not sent twice."


def push(folder: Path, name: str, public: bool) -> None:
    """Upload. folder: an export section's (runs/NAME/chat) or the model folder itself; name: OWNER/NAME. Raises PosttrainError where the folder is
    no export, its licence forbids the name or is not known, or the hub says no."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    # 1. What is pushed, and whether its licence lets it
    folder = folder / "model" if (folder / "model" / MARK).is_file() else folder
    if not (folder / MARK).is_file() or not (folder / "README.md").is_file():
        raise PosttrainError(str(folder), f"no {MARK} and README.md in it", "a folder that an export section made",
                             "Run the recipe's export section first.")
    text = (folder / "README.md").read_text(encoding="utf-8")
    licence = card.licence_in(text)
    check_name(name, licence, public)
    api = HfApi()
    try:
        # 2. An empty repository, and the base's licence text where every copy must carry it
        who = api.whoami()["name"]
        copies = licence_copies(api, folder) if licence in card.NOTICES else {}
        api.create_repo(name, private=not public, exist_ok=True)
        private = api.repo_info(name).private
        if not public and private is False:
            raise PosttrainError(f"push {name}", "that repository is public already", "a private one, or none", "Name another, or add --public.")

        # 3. The words, then the weights
        say(f"  {name} ({'private' if private else 'public'}), as {who}")
        for path, content in {"README.md": card.on_hub(text, name).encode(), **copies}.items():
            api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=name, commit_message=f"{path} of the model to come")
        told = json.loads((folder / MARK).read_text(encoding="utf-8"))
        api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=["README.md", ".*"],
                          commit_message=f"{told['run']}: {told['section']}")
    except PosttrainError:
        raise
    except LocalTokenNotFoundError:
        raise PosttrainError(f"push {name}", "nobody is logged in to the hub here", "a token that may write", "Run `hf auth login`.") from None
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        do = "Run `hf auth login` with a token that may write there." if status in (401, 403) else AGAIN
        raise PosttrainError(f"push {name}", f"the hub refused ({str(e).splitlines()[0][:200]})", "an upload", do) from None
    except Exception as e:  # the client has no common base for its transport's and the socket's errors
        raise PosttrainError(f"push {name}", f"the upload was cut off ({type(e).__name__}: {str(e)[:200]})", "a connection to the hub",
                             AGAIN) from None
    say(f"{folder} is on the hub: https://huggingface.co/{name}")


def check_name(name: str, licence: str, public: bool) -> None:
    """OWNER/NAME, as the licence wants it to begin; nothing public under an unknown licence."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise PosttrainError(f"push {name}", "not a repository's name", "OWNER/NAME", "Your own is the name `hf auth whoami` shows.")
    owner, own = name.split("/")
    start = card.NOTICES.get(licence, ("", "", ""))[2]
    if not re.sub(r"[-_]", " ", own).lower().startswith(start.lower()):
        raise PosttrainError(f"push {name}", f"the base's licence ({licence}) wants the name of every model made with it to begin with “{start}”",
                             f"a name such as {owner}/{start.replace(' ', '-')}-{own}", "Name it so.")
    if public and licence == "unknown":
        raise PosttrainError(f"push {name}", "the licence of the base is not known", "one that lets you pass the model on",
                             "Find it out, set model.licence in the recipe and export again; or push without --public.")


def licence_copies(api, folder: Path) -> dict[str, bytes]:
    """The base's licence files from its own repository, as far as the folder has none of that name: {file name here: content}."""
    here = [p.name.lower().removeprefix(BASE) for p in folder.iterdir() if p.name.lower().startswith(BASE)]
    told = json.loads((folder / MARK).read_text(encoding="utf-8"))
    base, revision = told["base"], told.get("revision")
    if any(map(_agreement, here)) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", base):  # a local folder's begins with '...'
        names = []
    else:
        names = [n for n in api.list_repo_files(base, revision=revision) if card.is_licence(n) and n.lower() not in here]
    if not any(map(_agreement, [*here, *names])):
        raise PosttrainError(str(folder), "no copy of the base's licence, which has to go with every copy of the model", "it as BASE_LICENSE.txt",
                             "Put it into that folder.")
    return {f"BASE_{n}": Path(api.hf_hub_download(base, n, revision=revision)).read_bytes() for n in names}


def _agreement(name: str) -> bool:
    """LICENSE, licence.md and the like: the licence itself, not what goes with it."""
    return name.lower().startswith("licen")
