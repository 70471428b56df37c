"""Published weights by name: `timm.create_model("mlp5_gbn.mnist_gbn4096", pretrained=True)`.

One name is a hub folder's, a Hub repo's and timm's. Weights come from the hub folder of this installation where it holds
them, else from the Hub or its cache on this machine; as safetensors alone, and looked at before they are loaded.
"""

import dataclasses
import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.models
import timm.models._factory
from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import PretrainedCfg
from torch import nn

from gbnzoo.weights import ORGANIZATION, WEIGHTS_FILE, WeightsError, check_weights, find_weights, refuse_pickles

HTTPError = HfHubHTTPError.__bases__[0]
"""The HTTP client's own, by whichever name this huggingface_hub has it."""

_LOCATION_KEYS = ("file", "url", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
_LONGEST_WAIT_SECONDS = 300  # the Hub counts requests over five minutes


class WeightsNotFoundError(FileNotFoundError):
    """Weights that are not to be had here and now; the message says where they were looked for and what would work."""

    def __init__(self, problems: list[str], ways: list[str]):
        super().__init__("\n".join([*problems, "What would work:", *(f"- {way}" for way in ways)]))
        self.problems, self.ways = problems, ways


def hub_folder() -> Path:
    """Where the hub folders of this checkout are; GBNZOO_HUB names another place."""
    return Path(os.environ.get("GBNZOO_HUB", Path(__file__).parents[1] / "hub"))


@functools.cache
def published() -> dict[str, dict[str, Any]]:
    """Name and config.json of all published weights that this installation knows of.

    A file that nothing can be made of is left out with a warning: whoever imports the package may not need it.
    """
    configs = {}
    for file in sorted(hub_folder().glob("*/config.json")):
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            PretrainedCfg(**_timm_cfg(config))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"{file} is left out, as timm does not write such a file: {error!r}", stacklevel=2)
        else:
            configs[file.parent.name] = config
    return configs


def published_of(architecture: str) -> list[str]:
    """The published names of one architecture."""
    return [name for name in published() if name.partition(".")[0] == architecture]


def register_model(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """timm's `register_model`, for an architecture whose weights may be published by this project.

    Its published tags are added to its module's default_cfgs, behind those already there and never as the default. A tag
    that is not listed (published since, say) is looked for on the Hub.
    """
    architecture = build.__name__
    default_cfg = sys.modules[build.__module__].default_cfgs[architecture]
    tags_of_others = set(default_cfg.cfgs)
    for name in published_of(architecture):
        tag = name.partition(".")[2]
        if tag in tags_of_others:
            raise ValueError(f"{name}: timm has weights of this name; the recipe needs another `tag`")
        location = {"hf_hub_id": f"{ORGANIZATION}/{name}", "hf_hub_filename": WEIGHTS_FILE}
        default_cfg.tags.append(tag)
        default_cfg.cfgs[tag] = PretrainedCfg(**_timm_cfg(published()[name]) | location)

    @functools.wraps(build)
    def entry_point(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs) -> nn.Module:
        name = None
        if isinstance(pretrained_cfg, str) and pretrained_cfg not in tags_of_others:
            name = f"{architecture}.{pretrained_cfg}"
            kwargs = published().get(name, {}).get("model_args", {}) | kwargs
        if not pretrained or _has_location(kwargs.get("pretrained_cfg_overlay")):
            return build(pretrained=pretrained, pretrained_cfg=pretrained_cfg, **kwargs)

        cache_dir = kwargs.get("cache_dir")
        if name:
            folder = find_published(name, cache_dir=cache_dir)
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            kwargs = config.get("model_args", {}) | kwargs
            origin = {"architecture": architecture, "hf_hub_id": f"{ORGANIZATION}/{name}"}
            pretrained_cfg = _timm_cfg(config) | origin | {"file": str(folder / WEIGHTS_FILE)}
        elif isinstance(pretrained_cfg, dict) and (source := pretrained_cfg.get("source")) in ("hf-hub", "local-dir"):
            location = pretrained_cfg["hf_hub_id" if source == "hf-hub" else "file"]
            folder = open_source(f"{source}:{location}", cache_dir=cache_dir)
            # As a file, so that timm does not choose among what the place offers, a pickle perhaps.
            origin = {"hf_hub_id": pretrained_cfg.get("hf_hub_id")}
            pretrained_cfg = _without_location(pretrained_cfg) | origin | {"file": str(folder / WEIGHTS_FILE)}
        elif pretrained_cfg is None and not default_cfg.default.has_weights and (names := published_of(architecture)):
            raise ValueError(f"{architecture} has no default weights; published are {', '.join(names)}")
        return build(pretrained=pretrained, pretrained_cfg=pretrained_cfg, **kwargs)

    return timm.models.register_model(entry_point)


def find_published(name: str, *, cache_dir: str | Path | None = None) -> Path:
    """Folder with the weights of a published name: this installation's, else the Hub's as it is in the cache.

    Raises:
        WeightsNotFoundError: saying what would work.
        WeightsError: if the weights are not those that were published under this name.
    """
    folder = hub_folder() / name
    if (folder / WEIGHTS_FILE).is_file():
        return open_source(f"local-dir:{folder}")
    try:
        return open_source(
            f"hf-hub:{ORGANIZATION}/{name}",
            cache_dir=cache_dir,
            sha256=published().get(name, {}).get("gbn", {}).get("sha256"),
        )
    except WeightsNotFoundError as error:
        architecture = name.partition(".")[0]
        listed = [f"{other}, published of {architecture}" for other in published_of(architecture) if other != name]
        raise WeightsNotFoundError(
            [f"{name}: {folder} holds no {WEIGHTS_FILE}", *error.problems],
            [*error.ways, f"GBNZOO_HUB=FOLDER, the hub/ of a checkout that holds {name}", *listed],
        ) from None


def open_source(source: str, *, cache_dir: str | Path | None = None, sha256: str | None = None) -> Path:
    """Folder with config.json and weights that have been looked at.

    Args:
        source: `local-dir:folder`, `hf-hub:org/name` or `hf-hub:org/name@revision`; of a repo only these two files are
            fetched, both of one commit.
        cache_dir: of the Hub's files; by default the user's.
        sha256: that the weights must have, besides the one in config.json.

    Raises:
        WeightsNotFoundError: if the weights are not to be had, saying what would work.
        WeightsError: if they are pickles only, damaged, hostile or others than config.json names.
    """
    kind, _, location = source.partition(":")
    if kind == "hf-hub":
        repo, _, revision = location.partition("@")
        config_file = _fetch(repo, "config.json", revision or None, cache_dir)
        folder = config_file.parent
        # A file's folder in the cache bears the name of its commit.
        _fetch(repo, WEIGHTS_FILE, folder.name, cache_dir)
    else:
        folder = Path(location)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sha256 = sha256 or config.get("gbn", {}).get("sha256")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{source}: its config.json is not what timm writes: {error}") from None
    weights = find_weights(folder)
    try:
        check_weights(weights, sha256)
    except WeightsError as error:
        if kind != "hf-hub":
            raise
        raise WeightsError(
            f"{error}. If the copy was damaged: it is fetched again once {weights.resolve()} is gone"
        ) from None
    return folder


def patiently(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call to the Hub returns, made again while the Hub is busy (429) or failing (5xx): five times in all.

    huggingface_hub does so itself for most requests; not for commits, nor where the file itself answers 5xx.
    """
    for seconds in (1, 2, 4, 8):
        try:
            return call(*args, **kwargs)
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            # Where a file could not be had at all, the Hub's answer is in the cause.
            response = getattr(error, "response", None)
            response = getattr(error.__cause__, "response", None) if response is None else response
            if response is None or (response.status_code != 429 and response.status_code < 500):
                raise
            asked = response.headers.get("Retry-After", "")
            time.sleep(min(int(asked), _LONGEST_WAIT_SECONDS) if asked.isdecimal() else seconds)
    return call(*args, **kwargs)


def without_token(error: BaseException) -> str:
    """What an error says, on one line; the user's token, should a server have repeated it, left out."""
    text = " ".join(str(error).split())
    token = get_token()
    return text.replace(token, "<token>") if token else text


def _fetch(repo: str, filename: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    """One file of a repo, as it lies in the cache afterwards."""
    try:
        return Path(patiently(hf_hub_download, repo, filename, revision=revision, cache_dir=cache_dir))
    except (HTTPError, HFValidationError, OSError) as error:
        raise _explained(error, repo, filename, revision, cache_dir) from None


def _explained(
    error: Exception, repo: str, filename: str, revision: str | None, cache_dir: str | Path | None
) -> WeightsNotFoundError:
    """What the Hub client's error says, and what would work.

    Raises:
        WeightsError: if the repo holds pickles alone.
    """
    source = f"hf-hub:{repo}" + (f"@{revision}" if revision else "")
    if isinstance(error, LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            problem, cure = "HF_HUB_OFFLINE is set and the cache holds no copy", "the same without HF_HUB_OFFLINE"
        else:
            cause = without_token(error.__cause__ or error)
            problem, cure = f"no answer from {constants.ENDPOINT} ({cause})", "the same once there is a connection"
        cure += "; from then on the cache serves it offline too"
    elif isinstance(error, RevisionNotFoundError):
        problem, cure = "the repo has no such revision", f"hf-hub:{repo} without one"
    elif isinstance(error, RepositoryNotFoundError):
        problem = "there is no such repo, or none that you may read"
        cure = "the right name, or a token that may read a private repo (`hf auth login` or HF_TOKEN)"
    elif isinstance(error, EntryNotFoundError):
        if filename == WEIGHTS_FILE:
            refuse_pickles(source, HfApi().list_repo_files(repo, revision=revision))
        problem, cure = f"the repo holds no {filename}", "a repo of a timm model"
    else:
        problem, cure = without_token(error), "the same with that put right"
    cached = [commit for commit in _cached_commits(repo, cache_dir) if commit != revision]
    return WeightsNotFoundError(
        [f"{source}: {problem}"],
        [
            cure,
            *(f"hf-hub:{repo}@{commit}, which the cache holds" for commit in cached),
            "local-dir:FOLDER, with a copy of the repo",
        ],
    )


def _cached_commits(repo: str, cache_dir: str | Path | None) -> list[str]:
    snapshots = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
    return sorted(file.parent.name for file in snapshots.glob(f"*/{WEIGHTS_FILE}"))


def _timm_cfg(config: dict[str, Any]) -> dict[str, Any]:
    """timm's pretrained cfg of a config.json, less any place to load from and what only another timm knows."""
    tops = {key: config[key] for key in ("num_classes", "label_names") if key in config}
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    return {key: value for key, value in _without_location(config["pretrained_cfg"]).items() if key in known} | tops


def _has_location(cfg: dict[str, Any] | None) -> bool:
    return any((cfg or {}).get(key) for key in _LOCATION_KEYS)


def _without_location(cfg: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in cfg.items() if key not in _LOCATION_KEYS}


def _explain_missing_repos() -> None:
    """Let `timm.create_model("hf-hub:…")` add to the Hub client's error what would work; timm asks before any code of ours."""
    load = timm.models._factory.load_model_config_from_hf

    @functools.wraps(load)
    def explaining(model_id: str, cache_dir: str | Path | None = None) -> Any:
        try:
            return load(model_id, cache_dir=cache_dir)
        except (HTTPError, OSError) as error:
            repo, _, revision = model_id.partition("@")
            error.add_note(str(_explained(error, repo, "config.json", revision or None, cache_dir)))
            raise

    timm.models._factory.load_model_config_from_hf = explaining


_explain_missing_repos()
