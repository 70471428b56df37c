"""A hub folder goes to the Hub: its five files in one commit on top of the one it was compared with.

Byte for byte, but that its card names the repo it is in.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from gbnzoo.card import check_card
from gbnzoo.pretrained import HTTPError, patiently, without_token
from gbnzoo.recipe import load_recipe
from gbnzoo.weights import ORGANIZATION, WEIGHTS_FILE, check_weights, sha256_of

HUB_FILES = ("README.md", "config.json", "log.csv", WEIGHTS_FILE, "recipe.yaml")


class UploadError(OSError):
    """An upload that was refused or broke off; the message says what would help."""


@dataclass(frozen=True)
class HubFile:
    """One file of a hub folder, as it will be on the Hub: where it lies, or what is in it."""

    name: str
    content: Path | bytes
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Upload:
    """Where a hub folder is now: `changed` are the files that were sent, none where the Hub had them all."""

    url: str
    commit: str
    tags: tuple[str, ...]
    changed: tuple[str, ...]


def hub_files(folder: str | Path, organization: str | None = None) -> list[HubFile]:
    """The files of a hub folder, after each was checked for what the Hub and its readers rely on. Needs no network.

    Args:
        folder: made by `gbnzoo publish RUN`.
        organization: that they are to be a repo of, as its card says; gbnzoo's own unless given.

    Raises:
        ValueError: if the folder is not one that `gbnzoo publish` made: another file, one missing or damaged, a link, weights
            that are not those of config.json, a card that the Hub would refuse.
    """
    folder = Path(folder)
    found = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    if found.keys() != set(HUB_FILES):
        raise ValueError(
            f"{folder}: is no hub folder, it holds {', '.join(sorted(found)) or 'nothing'}; wanted"
            f" {', '.join(HUB_FILES)}, as `gbnzoo publish RUN` makes them"
        )
    # A link would publish what it points to, wherever that is.
    if odd := [name for name, path in found.items() if path.is_symlink() or not path.is_file()]:
        raise ValueError(f"{folder}: {', '.join(sorted(odd))} is a link or a folder; wanted the file itself")
    name = folder.resolve().name
    try:
        gbn = json.loads(found["config.json"].read_text(encoding="utf-8"))["gbn"]
        published, sha256 = gbn["name"], gbn["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: its config.json is not what `gbnzoo publish RUN` makes: {type(error).__name__} {error}"
        ) from None
    if published != name:
        raise ValueError(f"{folder}: holds {published}, whose folder must have that name")
    check_weights(found[WEIGHTS_FILE], sha256)
    load_recipe(found["recipe.yaml"])
    card = found["README.md"].read_text(encoding="utf-8")
    check_card(card)
    card = card.replace(f"hf-hub:{ORGANIZATION}/{name}", f"hf-hub:{organization or ORGANIZATION}/{name}").encode()
    return [
        HubFile(file, card, len(card), hashlib.sha256(card).hexdigest())
        if file == "README.md"
        else HubFile(file, path, path.stat().st_size, sha256_of(path))
        for file, path in sorted(found.items())
    ]


def upload(folder: str | Path, organization: str, *, private: bool = False, revision_tag: str | None = None) -> Upload:
    """Bring a hub folder to the repo `organization/<its name>`, which is made where it is missing.

    Only what differs from the Hub is sent, in one commit whose parent is the commit it was compared with; what was sent
    before an interruption is not sent again. Other files of the repo stay as they are. The commit that brings weights is
    tagged with the first twelve digits of their sha256.

    Args:
        folder: made by `gbnzoo publish RUN`.
        organization: user or organisation on the Hub.
        private: make the repo private, where it is not there yet.
        revision_tag: one more name of this revision.

    Raises:
        ValueError: if the folder is not as it must be, the repo is public and was to be private, or the tag is taken.
        UploadError: if the Hub refuses or cannot be reached, or somebody else published meanwhile.
    """
    files = hub_files(folder, organization)
    repo = f"{organization}/{Path(folder).resolve().name}"
    try:
        return _upload(HfApi(), repo, files, private=private, revision_tag=revision_tag)
    except UploadError:
        raise
    except (HTTPError, OSError) as error:
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        cure = "a token that may write there (`hf auth login` or HF_TOKEN)" if refused else "publishing again"
        raise UploadError(
            f"{repo}: {without_token(error)}\nWhat would help: {cure}. What the Hub has by now is not sent twice"
        ) from None


def _upload(api: HfApi, repo: str, files: list[HubFile], *, private: bool, revision_tag: str | None) -> Upload:
    url = str(patiently(api.create_repo, repo, private=private or None, exist_ok=True))
    head = patiently(api.repo_info, repo)
    if private and not head.private:
        raise ValueError(f"{url} is public already, which --private does not change; its settings page can")
    tagged = {ref.name: ref.target_commit for ref in patiently(api.list_repo_refs, repo).tags}
    changed = _changed(api, repo, head.sha, files)
    if revision_tag in tagged and (changed or tagged[revision_tag] != head.sha):
        raise ValueError(
            f"{url}: revision {revision_tag} is commit {tagged[revision_tag][:12]} already; wanted another --revision-tag"
        )
    commit = _commit(api, repo, head.sha, changed, files) if changed else head.sha
    weights_tag = next(file.sha256[:12] for file in files if file.name == WEIGHTS_FILE)
    tags = tuple(filter(None, (weights_tag, revision_tag)))
    for tag in tags:
        if tag not in tagged:
            patiently(api.create_tag, repo, tag=tag, revision=commit, exist_ok=True)
    return Upload(url, commit, tags, tuple(file.name for file in changed))


def _commit(api: HfApi, repo: str, parent: str, changed: list[HubFile], files: list[HubFile]) -> str:
    """Commit the changed files on top of `parent`, or not at all."""
    try:
        return patiently(
            api.create_commit,
            repo,
            [CommitOperationAdd(file.name, file.content) for file in changed],
            commit_message=f"gbnzoo publish: {', '.join(file.name for file in changed)}",
            parent_commit=parent,
        ).oid
    except RuntimeError as error:  # hides why a large file was not taken
        raise UploadError(
            f"{repo}: {error} {without_token(error.__cause__ or error)}\nPublish again to go on"
        ) from None
    except HfHubHTTPError as error:
        if error.response.status_code not in (409, 412):
            raise
    head = patiently(api.repo_info, repo).sha
    # Where an answer was lost on its way, the commit that came between is ours.
    if _changed(api, repo, head, files):
        raise UploadError(
            f"{repo}: somebody else published meanwhile, main went from {parent[:12]} to {head[:12]}. Nothing of yours was"
            " committed, nothing of theirs is lost. Look at their commit; to go on top of it, publish again"
        )
    return head


def _changed(api: HfApi, repo: str, commit: str, files: list[HubFile]) -> list[HubFile]:
    """The files that a commit lacks or has otherwise."""
    names = [file.name for file in files]
    there = {info.path: info for info in patiently(api.get_paths_info, repo, names, revision=commit)}

    def is_there(file: HubFile) -> bool:
        if (info := there.get(file.name)) is None:
            return False
        if info.lfs:
            return info.lfs.sha256 == file.sha256
        # Small files are git's own blobs.
        content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        return info.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

    return [file for file in files if not is_there(file)]
