"""Publishing to and loading from a Hub: the real client, over HTTP, publisher and consumer in processes of their own."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import timm
import torch
from hub_server import READER, WRITER, HubServer
from hub_worker import Worker
from packaging.version import Version
from safetensors.torch import save
from small_run import CLASS_NAMES, finished_run, random_weights, small_recipe

from gbnzoo import pretrained
from gbnzoo.publish import publish
from gbnzoo.recipe import load_recipe
from gbnzoo.weights import WEIGHTS_FILE

NAME = "resnet8_thin_gbn.shapes_gbn8"
TWIN = "test_resnet_gbn.shapes_gbn8"
REPO = f"gbnzoo/{NAME}"
IS_OLD_CLIENT = Version(huggingface_hub.__version__) < Version("1")

PUBLISH = """
from typer.testing import CliRunner
from gbnzoo.cli import app
done = CliRunner().invoke(app, ["publish", *arguments])
result = done.exit_code
print(done.output)
"""
LOAD = """
import hashlib, os, timm, gbnzoo
model = timm.create_model(name, pretrained=True, cache_dir=cache)
result = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in model.state_dict().items()}
"""


@pytest.fixture(scope="module")
def server():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def hub(server):
    """The Hub, empty, its log blank and without faults."""
    for part in (server.repos, server.objects, server.log, server.faults):
        part.clear()
    server.xet_url = None
    return server


@pytest.fixture(scope="module")
def publisher(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers") / "publisher"
    # The client shows bars at terminals; here it is told that there is one.
    bars = {"TQDM_POSITION": "-1"}
    with Worker(folder, HF_ENDPOINT=server.url, HF_HUB_DISABLE_XET="1", HF_TOKEN=WRITER, **bars) as worker:
        yield worker


@pytest.fixture(scope="module")
def consumer(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers") / "consumer"
    no_hub = str(tmp_path_factory.mktemp("no hub here"))
    with Worker(folder, HF_ENDPOINT=server.url, HF_HUB_DISABLE_XET="1", GBNZOO_HUB=no_hub) as worker:
        yield worker


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Hub folders of two seeds, and of a twin of one of timm's networks."""
    path = tmp_path_factory.mktemp("published")
    return {
        "seed 0": publish(finished_run(path), path / "hub0"),
        "seed 1": publish(finished_run(path, seed=1), path / "hub1"),
        "twin": publish(finished_run(path, model={"name": "test_resnet_gbn"}), path / "hub0"),
    }


@pytest.fixture
def folder(folders):
    return folders["seed 0"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def asked(hub, method, part):
    return [request for request in hub.log if request.method == method and part in request.path]


def hashes(**changes):
    weights = random_weights(small_recipe(**changes))
    return {key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in weights.items()}


def weights_tag(folder):
    return hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()[:12]


def until(holds, seconds=60):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def published_to(publisher, folder, *options, **environment):
    reply = publisher(PUBLISH, environment, arguments=[str(folder), "--to", "gbnzoo", *options])
    assert reply.error is None, reply
    return reply


# ---- publishing


def test_one_command_makes_a_repo_with_one_commit_and_its_tags(hub, publisher, folder):
    reply = published_to(publisher, folder, "--revision-tag", "v1")
    assert reply.result == 0, reply
    assert hub.content(REPO) == contents(folder)
    repo = hub.repos[REPO]
    assert len(repo.commits) == 2  # the Hub's own first one, and this
    assert repo.tags == {weights_tag(folder): hub.head(REPO), "v1": hub.head(REPO)}
    assert not repo.private
    # The weights went over the large-file path, once, and the rest inline.
    sha256 = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    assert [request.path for request in asked(hub, "PUT", "")] == [f"/store/{sha256}"]
    assert len(asked(hub, "POST", "/commit/")) == 1
    assert f"{hub.url}/{REPO}: README.md, config.json, log.csv, model.safetensors, recipe.yaml" in reply.said
    assert "model.safetensors: 100%" in reply.said


def test_a_card_names_the_repo_it_is_in(hub, publisher, folder):
    assert publisher(PUBLISH, arguments=[str(folder), "--to", "alice"]).result == 0
    card = hub.content(f"alice/{folder.name}")["README.md"].decode()
    assert f'"hf-hub:alice/{folder.name}"' in card
    assert "hf-hub:gbnzoo" not in card


def test_publishing_again_sends_nothing(hub, publisher, folder):
    published_to(publisher, folder)
    head = hub.head(REPO)
    hub.log.clear()
    reply = published_to(publisher, folder)
    assert (reply.result, "nothing had changed" in reply.said) == (0, True)
    assert hub.head(REPO) == head
    assert [r.path.removeprefix(f"/api/models/{REPO}") for r in hub.log if r.method != "GET"] == [
        "/api/repos/create",
        f"/paths-info/{head}",
    ]


def test_a_new_card_leaves_the_weights_and_their_tag_alone(hub, publisher, folder, tmp_path):
    published_to(publisher, folder)
    first = hub.head(REPO)
    changed = shutil.copytree(folder, tmp_path / NAME)
    with open(changed / "README.md", "a") as card:
        card.write("\nOne rung more.\n")
    hub.log.clear()
    reply = published_to(publisher, changed)
    assert f"{REPO}: README.md\n" in reply.said
    assert hub.content(REPO) == contents(changed)
    assert not asked(hub, "PUT", "")
    assert hub.repos[REPO].tags == {weights_tag(folder): first}


def test_what_was_sent_before_an_interruption_is_not_sent_again(hub, publisher, folder):
    hub.order("POST", "/commit/", status=403, message="not now")
    reply = published_to(publisher, folder)
    assert (reply.result, "not now" in reply.said) == (2, True)
    assert hub.content(REPO) == {}
    hub.log.clear()
    assert published_to(publisher, folder).result == 0
    assert not asked(hub, "PUT", "")
    assert hub.content(REPO) == contents(folder)


def test_an_answer_lost_on_its_way_makes_no_second_commit(hub, publisher, folder):
    hub.order("POST", "/commit/", cut_after=0)
    assert "publishing again" in published_to(publisher, folder).said
    head = hub.head(REPO)
    assert hub.content(REPO) == contents(folder)
    reply = published_to(publisher, folder)
    assert (reply.result, "nothing had changed" in reply.said) == (0, True)
    assert (hub.head(REPO), hub.repos[REPO].tags) == (head, {weights_tag(folder): head})


def test_a_publisher_killed_midway_leaves_nothing_half_done(hub, publisher, folder, tmp_path):
    """By SIGKILL: once while it sends the weights, once after its commit, of which it never hears."""
    code = f"""
import os
child = os.fork()
if not child:
    with open(pid_file, "w") as file:
        print(os.getpid(), file=file)
    try:
        exec({PUBLISH!r})
    finally:
        os._exit(0)
_, status = os.waitpid(child, 0)
result = os.waitstatus_to_exitcode(status)
"""
    pid_file = tmp_path / "pid"
    arguments = {"pid_file": str(pid_file), "arguments": [str(folder), "--to", "gbnzoo"]}

    def kill():
        os.kill(int(pid_file.read_text()), signal.SIGKILL)

    hub.order("PUT", "/store/", before=kill, status=503)
    assert publisher(code, **arguments).result == -signal.SIGKILL
    assert (hub.content(REPO), hub.objects, hub.repos[REPO].tags) == ({}, {}, {})
    hub.order("POST", "/commit/", before=kill)
    assert publisher(code, **arguments).result == -signal.SIGKILL
    until(lambda: len(hub.repos[REPO].commits) == 2)  # the Hub finishes what it was asked
    head = hub.head(REPO)
    assert (hub.content(REPO), hub.repos[REPO].tags) == (contents(folder), {})
    assert "nothing had changed" in published_to(publisher, folder).said
    assert hub.repos[REPO].tags == {weights_tag(folder): head}
    assert len(hub.repos[REPO].commits) == 2


def test_a_busy_or_failing_hub_is_asked_again(hub, publisher, folder):
    hub.order("POST", "/api/repos/create", status=429, headers={"Retry-After": "3"})
    hub.order("PUT", "/store/", status=500)
    hub.order("POST", "/commit/", status=500)
    hub.order("POST", "/tag/", status=503)
    assert published_to(publisher, folder).result == 0
    assert hub.content(REPO) == contents(folder)
    assert [r.status for r in asked(hub, "PUT", "")] == [500, 200]
    assert [r.status for r in asked(hub, "POST", "/commit/")] == [500, 200]
    assert len(hub.repos[REPO].commits) == 2
    busy, served = asked(hub, "POST", "/api/repos/create")
    assert (busy.status, served.status) == (429, 200)
    assert served.seconds - busy.seconds >= 3  # as Retry-After says; without one it would be a second


def test_of_two_publishers_the_second_is_told_and_nothing_is_lost(hub, publisher, consumer, folders):
    published_to(publisher, folders["seed 0"])
    before = hub.head(REPO)
    second = {"HF_TOKEN": WRITER}

    def meanwhile():
        # The publisher has compared and sent its weights, and is about to commit.
        assert published_to(consumer, folders["seed 1"], **second).result == 0
        hub.log.clear()

    hub.order("POST", "/commit/", before=meanwhile)
    changed = shutil.copytree(folders["seed 0"], folders["seed 0"].parent / "other" / NAME)
    (changed / "log.csv").write_text("update\n")
    reply = published_to(publisher, changed)
    shutil.rmtree(changed.parent)
    assert reply.result == 2
    theirs = hub.head(REPO)
    assert f"somebody else published meanwhile, main went from {before[:12]} to {theirs[:12]}" in reply.said
    assert "Nothing of yours was committed" in " ".join(reply.said.split())
    assert hub.content(REPO) == contents(folders["seed 1"])
    assert [r.status for r in asked(hub, "POST", "/commit/")] == [412]

    assert published_to(publisher, folders["seed 0"]).result == 0
    assert hub.content(REPO) == contents(folders["seed 0"])
    assert {weights_tag(folders["seed 0"]): before, weights_tag(folders["seed 1"]): theirs} == hub.repos[REPO].tags


def test_two_publishers_at_once_leave_one_of_the_two_whole(hub, publisher, consumer, folders):
    """However their requests interleave."""
    writer = {"HF_TOKEN": WRITER}
    with ThreadPoolExecutor() as threads:
        both = {
            seed: threads.submit(published_to, worker, folders[seed], **writer)
            for seed, worker in (("seed 0", publisher), ("seed 1", consumer))
        }
    replies = {seed: future.result() for seed, future in both.items()}
    consumer("result = None", {"HF_TOKEN": None})
    published = [seed for seed, reply in replies.items() if reply.result == 0]
    for seed in replies.keys() - published:
        assert "somebody else published meanwhile" in replies[seed].said
    assert hub.content(REPO) in [contents(folders[seed]) for seed in published]
    assert hub.repos[REPO].tags.keys() == {weights_tag(folders[seed]) for seed in published}
    for seed in published:
        assert hub.content(REPO, weights_tag(folders[seed])) == contents(folders[seed])


def test_a_tag_is_not_moved(hub, publisher, folders):
    published_to(publisher, folders["seed 0"], "--revision-tag", "v1")
    head = hub.head(REPO)
    reply = published_to(publisher, folders["seed 1"], "--revision-tag", "v1")
    assert (reply.result, f"revision v1 is commit {head[:12]} already" in reply.said) == (2, True)
    assert hub.head(REPO) == head
    assert published_to(publisher, folders["seed 0"], "--revision-tag", "v1").result == 0


def test_a_card_that_the_hub_refuses_stops_everything(hub, publisher, folder):
    hub.order("POST", "/api/validate-yaml", status=400)
    assert published_to(publisher, folder).result == 2
    assert not asked(hub, "PUT", "")
    assert hub.content(REPO) == {}


def test_a_private_repo_is_read_with_a_token_only(hub, publisher, consumer, folder, tmp_path):
    assert published_to(publisher, folder, "--private").result == 0
    assert hub.repos[REPO].private
    without = consumer(LOAD, {"HF_TOKEN": None}, name=NAME, cache=str(tmp_path / "cache"))
    assert without.error == "WeightsNotFoundError"
    assert "no such repo, or none that you may read" in without.message
    assert "a token that may read a private repo (`hf auth login` or HF_TOKEN)" in without.message
    assert 401 in {r.status for r in hub.log}
    by_id = consumer(LOAD, name=f"hf-hub:{REPO}", cache=str(tmp_path / "cache"))
    assert by_id.error == "RepositoryNotFoundError"  # timm asks first, and huggingface_hub answers
    assert "make sure you are authenticated" in by_id.message
    for name in (NAME, f"hf-hub:{REPO}"):
        within = consumer(LOAD, {"HF_TOKEN": READER}, name=name, cache=str(tmp_path / f"cache of {len(name)}"))
        assert within.result == hashes(), within
    consumer("result = None", {"HF_TOKEN": None})

    public = published_to(publisher, folder)
    assert "nothing had changed" in public.said
    hub.repos[REPO].private = False
    refused = published_to(publisher, folder, "--private")
    assert (refused.result, "is public already" in refused.said) == (2, True)


@pytest.mark.parametrize(("token", "status"), [("hf_nobodynobodynobody", 401), (READER, 403), (None, 401)])
def test_who_may_not_write_is_told_what_would_help(hub, publisher, folder, token, status):
    reply = published_to(publisher, folder, HF_TOKEN=token)
    publisher("result = None", {"HF_TOKEN": WRITER})
    assert reply.result == 2
    assert "a token that may write there (`hf auth login` or HF_TOKEN)" in reply.said
    assert hub.log[0].status == status
    assert str(token) not in reply.said


def test_a_token_that_the_server_repeats_is_not_printed(hub, publisher, consumer, folder, tmp_path):
    hub.order("POST", "/api/repos/create", status=403, message=f"Bearer {WRITER} may not")
    said = published_to(publisher, folder).said
    assert "Bearer <token> may not" in said
    hub.put(REPO, contents(folder))
    hub.order("HEAD", "/resolve/", status=403, message=f"Bearer {READER} may not")
    reply = consumer(LOAD, {"HF_TOKEN": READER}, name=NAME, cache=str(tmp_path / "cache"))
    consumer("result = None", {"HF_TOKEN": None})
    assert "Bearer <token> may not" in reply.message
    said += reply.message + reply.said + publisher.errors.read_text() + consumer.errors.read_text()
    assert not {WRITER, READER} & set(said.split())
    assert "hf_" not in said.replace("hf_hub", "")


def test_the_token_is_in_no_file_and_no_log(hub, tmp_path):
    """From training to loading from a private repo, with huggingface_hub's own log of every request."""
    recipe = load_recipe(
        "recipes/digits/resnet8_thin_gbn.yaml", ["base.epochs=1", "base.milestones=[]", "evaluations=1"], rung="lb"
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    commands = (
        ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "runs")],
        ["publish", str(tmp_path / "runs" / recipe.run_name), "--hub", str(tmp_path / "hub")],
        ["publish", str(tmp_path / "hub" / recipe.name), "--to", "gbnzoo", "--private"],
    )
    code = f"""
from typer.testing import CliRunner
from gbnzoo.cli import app
for arguments in commands:
    done = CliRunner().invoke(app, arguments)
    print(done.output)
    assert done.exit_code == 0, done.output
{LOAD}
"""
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITER, "HF_DEBUG": "1"}
    with Worker(tmp_path / "worker", **environment) as worker:
        name = f"hf-hub:gbnzoo/{recipe.name}"
        reply = worker(code, commands=commands, name=name, cache=str(tmp_path / "cache"))
    assert reply.error is None, reply
    said = reply.said + worker.errors.read_text()
    assert "authorization: <TOKEN>" in said  # it was used, and the log was on
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"env.json", "log.csv", "README.md", "config.json", "results.csv"} <= {path.name for path in written}
    assert [path for path, content in written.items() if WRITER.encode() in content] == []
    assert WRITER not in said


def test_a_dry_run_lists_files_sizes_and_hashes_and_asks_nobody(hub, publisher, folder):
    reply = publisher(PUBLISH, arguments=[str(folder), "--to", "gbnzoo", "--dry-run"])
    assert reply.result == 0
    listed = [line.split("  ") for line in reply.said.splitlines() if line]
    for (path, size, sha256), (name, content) in zip(listed, sorted(contents(folder).items()), strict=True):
        assert path.endswith(f"{NAME}/{name}")
        assert size == f"{len(content):,} bytes"
        assert sha256 == f"sha256 {hashlib.sha256(content).hexdigest()}"
    assert not hub.log


# ---- loading


def test_a_name_loads_from_the_hub_into_an_empty_cache_and_then_from_the_cache(hub, consumer, folder, tmp_path):
    hub.put(REPO, contents(folder))
    assert consumer(LOAD, name=NAME, cache=str(tmp_path)).result == hashes()
    assert {r.path.split("/")[-1] for r in asked(hub, "GET", f"{REPO}/resolve")} == {"config.json"}
    assert len(asked(hub, "GET", "/store/")) == 1
    hub.log.clear()
    assert consumer(LOAD, name=NAME, cache=str(tmp_path)).result == hashes()
    assert {r.method for r in hub.log} <= {"HEAD"}


def test_the_repos_id_loads_and_a_revision_pins_it(hub, publisher, consumer, folders, tmp_path):
    for seed in ("seed 0", "seed 1"):
        published_to(publisher, folders[seed])
    first, second = (weights_tag(folders[seed]) for seed in ("seed 0", "seed 1"))
    for source, seed in ((REPO, 1), (f"{REPO}@{first}", 0), (f"{REPO}@{second}", 1)):
        assert consumer(LOAD, name=f"hf-hub:{source}", cache=str(tmp_path)).result == hashes(seed=seed), source


def test_the_usage_on_a_card_runs_as_it_stands_there(hub, publisher, consumer, folder, tmp_path):
    published_to(publisher, folder)
    code = """
import os, re, PIL.Image, contextlib
os.chdir(here)
PIL.Image.new("RGB", (9, 11)).save("image.png")
for block in re.findall(r"```python\\n(.*?)```", open(card).read(), re.S):
    exec(block, {})
os.chdir("/")
"""
    reply = consumer(code, card=str(folder / "README.md"), here=str(tmp_path))
    assert reply.error is None, reply
    assert reply.said.startswith("class ")


@pytest.mark.parametrize(
    ("name", "problem", "cure"),
    [
        ("resnet8_thin_gbn.shapes_ra8", "there is no such repo", "the right name"),
        ("resnet20_gbn.shapes_gbn8", "there is no such repo", "GBNZOO_HUB=FOLDER"),
        (f"hf-hub:{REPO}@v9", "no such revision", ""),
    ],
)
def test_what_is_not_there_is_said_with_what_would_work(hub, consumer, folder, tmp_path, name, problem, cure):
    hub.put(REPO, contents(folder))
    reply = consumer(LOAD, name=name, cache=str(tmp_path))
    if name.startswith("hf-hub:"):  # timm asks first, and huggingface_hub answers
        assert reply.error == "RevisionNotFoundError"
    else:
        assert reply.error == "WeightsNotFoundError"
        assert problem in reply.message
        assert cure in reply.message.partition("What would work:")[2]


def test_a_cached_revision_is_offered_where_main_is_gone(hub, consumer, folder, tmp_path):
    pinned = f"hf-hub:{REPO}@{hub.put(REPO, contents(folder))}"
    consumer(LOAD, name=pinned, cache=str(tmp_path))
    hub.repos.clear()
    reply = consumer(LOAD, name=NAME, cache=str(tmp_path))
    assert f"- {pinned}, which the cache holds" in reply.message
    assert consumer(LOAD, name=pinned, cache=str(tmp_path)).result == hashes()


@pytest.mark.parametrize("name", [NAME, f"hf-hub:{REPO}"])
def test_a_repo_with_a_pickle_alone_is_refused_and_the_pickle_not_fetched(hub, consumer, folder, tmp_path, name):
    files = contents(folder)
    hub.put(REPO, {"config.json": files["config.json"], "pytorch_model.bin": b"\x80\x04."})
    reply = consumer(LOAD, name=name, cache=str(tmp_path))
    assert reply.error == "WeightsError"
    assert "holds no model.safetensors but pytorch_model.bin: a pickle runs whatever code it holds" in reply.message
    assert not [r for r in hub.log if "pytorch_model.bin" in r.path]


def test_a_hostile_config_reaches_no_other_file(hub, consumer, folder, tmp_path):
    (tmp_path / "secret.bin").write_bytes(b"")
    files = contents(folder)
    config = json.loads(files["config.json"])
    hostile = {"hf_hub_filename": "../../../../secret.bin", "url": "http://127.0.0.1:9/x.pth", "custom_load": "hf"}
    config["pretrained_cfg"] |= hostile | {"file": str(tmp_path / "secret.bin")}
    hub.put(REPO, files | {"config.json": json.dumps(config).encode(), "../../escaped.txt": b"x", "/tmp/escaped": b"x"})
    cache = tmp_path / "cache"
    for name in (NAME, f"hf-hub:{REPO}"):
        assert consumer(LOAD, name=name, cache=str(cache)).result == hashes()
    assert {p.name for p in tmp_path.iterdir()} == {"secret.bin", "cache"}
    assert {p.name for p in cache.rglob("*") if p.is_symlink()} == {"config.json", "model.safetensors"}


def test_bytes_that_were_exchanged_on_the_way_are_not_loaded(hub, consumer, folder, tmp_path):
    hub.put(REPO, contents(folder) | {WEIGHTS_FILE: save(random_weights(small_recipe(seed=5)), {"format": "pt"})})
    for name in (NAME, f"hf-hub:{REPO}"):
        reply = consumer(LOAD, name=name, cache=str(tmp_path))
        assert reply.error == "WeightsError"
        assert "these are not the weights that were published" in reply.message


def test_a_busy_or_failing_hub_is_waited_for(hub, consumer, folder, tmp_path):
    hub.put(REPO, contents(folder))
    hub.order("HEAD", "config.json", status=500, times=2)  # the client's first try does not wait
    hub.order("GET", "/store/", status=429, headers={"Retry-After": "3"})
    hub.order("GET", "/store/", status=500)
    assert consumer(LOAD, name=NAME, cache=str(tmp_path)).result == hashes()
    busy, failing, served = asked(hub, "GET", "/store/")
    assert (busy.status, failing.status, served.status) == (429, 500, 200)
    assert failing.seconds - busy.seconds >= (1 if IS_OLD_CLIENT else 3)  # which waits, if not as long as it is told


def test_a_download_that_was_cut_goes_on_where_it_stopped_and_its_hash_is_verified(hub, consumer, tmp_path):
    # Larger than the ten MiB that the client takes at once.
    args = {"width": 1700, "depth": 2}
    model = timm.create_model("mlp5_gbn", num_classes=6, in_chans=3, img_size=8, **args)
    run = finished_run(tmp_path, weights=model.state_dict(), model={"name": "mlp5_gbn", "args": args})
    files = contents(publish(run, tmp_path / "hub"))
    hub.put("gbnzoo/mlp5_gbn.shapes_gbn8", files)
    wanted = {key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in model.state_dict().items()}
    in_two_parts = [(0, None), (206, f"bytes={10 * 2**20}-")]
    hub.order("GET", "/store/", cut_after=11_000_000)
    load = {"name": "mlp5_gbn.shapes_gbn8", "cache": str(tmp_path / "cache")}
    if IS_OLD_CLIENT:  # it gives up, and goes on when it is asked again
        assert consumer(LOAD, **load).error == "WeightsNotFoundError"
    assert consumer(LOAD, **load).result == wanted
    assert [(r.status, r.range) for r in asked(hub, "GET", "/store/")] == in_two_parts

    # Again, and the second part is not that of the first: of the same length, finite, and in no header.
    (sha256,) = hub.objects
    right, load["cache"] = hub.objects[sha256], str(tmp_path / "damaged")
    hub.log.clear()
    hub.order("GET", "/store/", cut_after=11_000_000)
    hub.order("GET", "/store/", before=lambda: hub.objects.update({sha256: right[:-4] + bytes(4)}))
    if IS_OLD_CLIENT:
        assert consumer(LOAD, **load).error == "WeightsNotFoundError"
    reply = consumer(LOAD, **load)
    assert [(r.status, r.range) for r in asked(hub, "GET", "/store/")] == in_two_parts
    assert reply.error == "WeightsError"
    assert f"wanted {sha256}; these are not the weights that were published" in reply.message
    hub.objects[sha256] = right
    (damaged,) = re.findall(r"it is fetched again once (\S+) is gone", reply.message)
    assert consumer("import os; os.remove(path)\n" + LOAD, path=damaged, **load).result == wanted


@pytest.mark.slow
def test_without_a_connection_the_cache_serves_and_else_the_error_says_what_would_work(hub, consumer, folder, tmp_path):
    """The client asks a Hub that does not answer for half a minute."""
    hub.put(REPO, contents(folder))
    assert consumer(LOAD, name=NAME, cache=str(tmp_path / "warm")).error is None
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with Worker(tmp_path / "worker", HF_ENDPOINT=endpoint, GBNZOO_HUB=str(tmp_path)) as worker:
            assert worker(LOAD, name=NAME, cache=str(tmp_path / "warm")).result == hashes()
            message = worker(LOAD, name=NAME, cache=str(tmp_path / "cold")).message
            reply = worker(PUBLISH, {"HF_TOKEN": WRITER}, arguments=[str(folder), "--to", "gbnzoo"])
    assert f"no answer from {endpoint}" in message
    assert "- the same once there is a connection; from then on the cache serves it offline too" in message
    assert (reply.result, "What would help: publishing again" in reply.said) == (2, True)


@pytest.mark.skipif(IS_OLD_CLIENT, reason="huggingface_hub before 1.0 reads nothing from hf_xet's folder stores")
def test_xet_carries_the_weights_both_ways(hub, folder, tmp_path):
    """Chunked and deduplicated by hf_xet, into a store that is a folder."""
    hf_xet = pytest.importorskip("hf_xet", reason="needs hf_xet")
    (tmp_path / "store").mkdir()
    hub.xet_url = f"local://{tmp_path / 'store'}"
    weights = folder / WEIGHTS_FILE
    hub.xet_hashes[hashlib.sha256(weights.read_bytes()).hexdigest()] = hf_xet.hash_files([str(weights)])[0].hash
    with Worker(tmp_path / "worker", HF_ENDPOINT=hub.url, HF_TOKEN=WRITER, GBNZOO_HUB=str(tmp_path)) as worker:
        assert published_to(worker, folder).result == 0
        assert "nothing had changed" in published_to(worker, folder).said
        assert worker(LOAD, name=NAME, cache=str(tmp_path / "cache")).result == hashes()
    assert not hub.objects
    assert len(asked(hub, "GET", "/xet-write-token/")) == len(asked(hub, "GET", "/xet-read-token/")) == 1
    assert not asked(hub, "GET", "/store/")


def test_a_twins_name_loads_from_the_hub(hub, consumer, folders, tmp_path):
    hub.put(f"gbnzoo/{TWIN}", contents(folders["twin"]))
    wanted = hashes(model={"name": "test_resnet_gbn"})
    for name in (TWIN, f"hf-hub:gbnzoo/{TWIN}"):
        assert consumer(LOAD, name=name, cache=str(tmp_path / "cache")).result == wanted


PLAIN = """
import importlib.util, sys
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gbnzoo":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nowhere())
import torch, timm
result = []
for source in sources:
    model = timm.create_model(source, pretrained=True, cache_dir=cache).eval()
    logits = model(torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32))
    result.append([type(model).__module__, model.pretrained_cfg["label_names"], logits.tolist()])
try:
    import gbnzoo.models
except ModuleNotFoundError:
    result.append("no gbnzoo")
"""


def test_a_twins_weights_load_where_there_is_no_gbnzoo(hub, folders, tmp_path):
    """In a process that cannot import it, from the Hub and from a folder, by timm alone."""
    hub.put(f"gbnzoo/{TWIN}", contents(folders["twin"]))
    sources = [f"hf-hub:gbnzoo/{TWIN}", f"local-dir:{folders['twin']}"]
    twin = timm.create_model("test_resnet_gbn", num_classes=6, in_chans=3)
    twin.load_state_dict(random_weights(small_recipe(model={"name": "test_resnet_gbn"})))
    logits = twin.eval()(torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32))
    with Worker(tmp_path / "plain", HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1") as worker:
        reply = worker(PLAIN, sources=sources, cache=str(tmp_path / "cache"))
    assert reply.error is None, reply
    *loaded, last = reply.result
    assert last == "no gbnzoo"
    for module, label_names, found in loaded:
        assert (module, label_names) == ("timm.models.resnet", list(CLASS_NAMES))
        torch.testing.assert_close(torch.tensor(found), logits)
    assert not [request for request in hub.log if "pytorch_model" in request.path]


def test_offline_the_cache_serves_and_else_the_error_says_what_would_work(hub, consumer, folders, tmp_path):
    hub.put(REPO, contents(folders["seed 0"]))
    cache = str(tmp_path / "cache")
    assert consumer(LOAD, name=NAME, cache=cache).error is None
    hub.log.clear()
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": hub.url, "GBNZOO_HUB": str(tmp_path)}
    with Worker(tmp_path / "offline", **offline) as worker:
        assert worker(LOAD, name=NAME, cache=cache).result == hashes()
        assert worker(LOAD, name=f"hf-hub:{REPO}", cache=cache).result == hashes()

        cold = worker(LOAD, name=NAME, cache=str(tmp_path / "cold"))
        assert cold.error == "WeightsNotFoundError"
        assert f"{NAME}: {tmp_path / NAME} holds no model.safetensors" in cold.message
        assert "HF_HUB_OFFLINE is set and the cache holds no copy" in cold.message
        for way in ("the same without HF_HUB_OFFLINE", "local-dir:FOLDER", "GBNZOO_HUB=FOLDER"):
            assert f"\n- {way}" in cold.message
        hub_folder = {"GBNZOO_HUB": str(folders["seed 0"].parent)}
        assert worker(LOAD, hub_folder, name=NAME, cache=str(tmp_path / "cold")).result == hashes()
    assert not hub.log


def test_what_timm_cannot_find_itself_is_explained_too(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # From the client's own error: to ask the Hub again takes as long as its attempts together.
    monkeypatch.setattr(pretrained, "hf_hub_download", lambda *arguments, **options: pytest.fail("asked again"))
    with pytest.raises(OSError) as caught:  # noqa: PT011, the client's own; the note is ours
        timm.create_model("hf-hub:gbnzoo/nothing@v1", pretrained=True, cache_dir=tmp_path)
    (note,) = caught.value.__notes__
    assert "hf-hub:gbnzoo/nothing@v1: HF_HUB_OFFLINE is set and the cache holds no copy" in note
    assert "- local-dir:FOLDER" in note


def test_a_damaged_hub_folder_does_not_keep_the_package_from_being_imported(tmp_path):
    def folder(name: str, text: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)

    folder("mlp5_gbn.empty", "")
    folder("mlp5_gbn.list", "[]")
    folder("mlp5_gbn.merged", '<<<<<<< HEAD\n{"pretrained_cfg": {}}')
    folder("resnet50_gbn.bare", '{"architecture": "resnet50"}')
    folder("mlp5_gbn.newer", '{"num_classes": 7, "pretrained_cfg": {"tag": "newer", "of_a_later_timm": 1}}')
    code = """if True:
        import warnings, timm
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import gbnzoo
        print(*sorted(str(warning.message) for warning in caught if "is left out" in str(warning.message)), sep="\\n")
        print(timm.models.get_pretrained_cfg("mlp5_gbn.newer").num_classes)
    """
    environment = os.environ | {"GBNZOO_HUB": str(tmp_path)}
    lines = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).splitlines()
    assert lines.pop() == "7"
    names = ["mlp5_gbn.empty", "mlp5_gbn.list", "mlp5_gbn.merged", "resnet50_gbn.bare"]
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"{tmp_path / name / 'config.json'} is left out, as timm does not write such a file: ")
