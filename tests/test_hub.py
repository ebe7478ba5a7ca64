"""Loading from and pushing to a Hub, through the unmodified client and a real server that can be made to fail."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import TOKEN, Hub
from packaging.version import Version
from tiny_pipelines import build

from diffusers_searched_solver import (
    SearchedSolver,
    SearchedSolverScheduler,
    SolverFile,
    time_grid,
)


CONFIG, SOLVER = "scheduler_config.json", "solver/searched_solver.safetensors"
REPO = "org/solvers"

# The client reads its endpoint when it is imported, hence a process of its own. It runs what it is sent.
# Between attempts it waits a hundredth of what the client would.
WORKER = """
import io, json, logging, sys, time
pause, pauses = time.sleep, []
time.sleep = lambda seconds: (pauses.append(seconds), pause(seconds / 100))
import torch
from diffusers import DiffusionPipeline
from diffusers_searched_solver import SearchedSolverScheduler, SolverFileError
from diffusers_searched_solver.calls import pipeline_class
torch.set_num_threads(1)
replies, sys.stdout = sys.stdout, sys.stderr
log = io.StringIO()
logging.getLogger("diffusers").addHandler(logging.StreamHandler(log))
logging.getLogger("diffusers_searched_solver").addHandler(logging.StreamHandler(log))

def load(*args, **kwargs):
    scheduler = SearchedSolverScheduler.from_pretrained(*args, **kwargs)
    return scheduler.solver_file and scheduler.solver_file.provenance["name"]

for line in sys.stdin:
    log.seek(0); log.truncate()
    try:
        reply = {"value": eval(line), "error": None}
    except Exception as error:
        reply = {"value": None, "error": [[each.__name__ for each in type(error).__mro__], str(error)]}
    print(json.dumps(reply | {"log": log.getvalue()}), file=replies, flush=True)
"""


class ClientError(Exception):
    """What the client raised: the names of its classes and its message."""


class Client:
    def __init__(self, **environment):
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "DIFFUSERS_"))}
        settings = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        settings |= {"HF_HUB_DOWNLOAD_TIMEOUT": "2", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=clean | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, function: str, *args, **kwargs):
        """Call a function in the client's process; its result, or its exception as a ClientError."""
        listed = [*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())]
        self.process.stdin.write(f"{function}({', '.join(listed)})\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        self.log = reply["log"]
        if reply["error"]:
            classes, message = reply["error"]
            raise ClientError(f"{'/'.join(classes)}: {message}")
        return reply["value"]

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def shared_hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def online(shared_hub, tmp_path_factory):
    client = Client(HF_ENDPOINT=shared_hub.endpoint, HF_HOME=str(tmp_path_factory.mktemp("home")))
    yield client
    client.close()


@pytest.fixture(scope="module")
def offline(shared_hub, tmp_path_factory):
    client = Client(HF_ENDPOINT=shared_hub.endpoint, HF_HOME=str(tmp_path_factory.mktemp("home")), HF_HUB_OFFLINE="1")
    yield client
    client.close()


def scheduler(name="one", steps=3, **config):
    ours = SearchedSolverScheduler(**config)
    solver = SearchedSolver.adams_bashforth(*time_grid(ours.process, steps), "velocity", 3)
    file = SolverFile({steps: solver}, ours.process, ours.config.prediction_type, {"name": name})
    return SearchedSolverScheduler.from_config(ours.config, solver=file)


def files(folder: Path, prefix="") -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {prefix + path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def saved(tmp_path):
    """The files of a scheduler, its provenance saying `name`."""

    def save(name="one", prefix="", **config):
        scheduler(name, **config).save_pretrained(tmp_path / name)
        return files(tmp_path / name, prefix)

    return save


@pytest.fixture
def hub(shared_hub, saved):
    """The server with one repository, whose solver is called "one"."""
    shared_hub.repos.clear()
    shared_hub.faults.clear()
    shared_hub.requests.clear()
    shared_hub.tokens_at_storage.clear()
    shared_hub.commit(REPO, saved())
    return shared_hub


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


# Loading


def test_a_repository_loads_whole_and_every_bit(hub, online, cache):
    assert online("load", REPO, cache_dir=cache) == "one"
    assert online.log == ""
    (cached,) = Path(cache).glob(f"*/snapshots/*/{SOLVER}")
    assert cached.read_bytes() == hub.find(REPO, "main", None)[1][SOLVER]


def test_a_second_load_fetches_nothing_and_a_forced_one_everything(hub, online, cache):
    online("load", REPO, cache_dir=cache)
    hub.requests.clear()
    assert online("load", REPO, cache_dir=cache) == "one"
    assert not [request for request in hub.requests if request.startswith("GET")]
    assert online("load", REPO, cache_dir=cache, force_download=True) == "one"
    assert len([request for request in hub.requests if request.startswith("GET")]) == 2


def test_a_subfolder_loads_with_its_own_solver(hub, online, cache, saved):
    hub.commit(REPO, saved("two", prefix="large/scheduler/"))
    assert online("load", REPO, subfolder="large/scheduler", cache_dir=cache) == "two"
    assert online("load", REPO, cache_dir=cache) == "one"


@pytest.mark.parametrize("kind", ["branch", "tag", "commit"])
def test_a_revision_loads_by_branch_tag_and_commit(hub, online, cache, saved, kind):
    commit = hub.commit(REPO, saved("two"), branch="next")
    hub.repos[REPO].refs["v2"] = commit
    revision = {"branch": "next", "tag": "v2", "commit": commit}[kind]
    assert online("load", REPO, revision=revision, cache_dir=cache) == "two"
    assert online("load", REPO, cache_dir=cache) == "one"


def test_the_solver_is_of_the_config_s_commit_though_the_branch_moves_between_them(hub, online, cache, saved):
    second = saved("two")
    original, moved = hub.find, []

    def find(repo_id, revision, token):
        found = original(repo_id, revision, token)
        if not moved and hub.requests[-1].startswith("GET") and CONFIG in hub.requests[-1]:
            moved.append(hub.commit(REPO, second))
        return found

    hub.find = find
    try:
        assert online("load", REPO, cache_dir=cache) == "one"
        assert moved
        assert online("load", REPO, cache_dir=cache) == "two"
    finally:
        del hub.find


def test_a_repository_without_a_solver_warns_and_is_classical(hub, online, offline, cache, saved):
    hub.commit("org/plain", {CONFIG: saved()[CONFIG]})
    assert online("load", "org/plain", cache_dir=cache) is None
    assert "'org/plain' has no 'solver/searched_solver.safetensors'" in online.log
    assert offline("load", "org/plain", cache_dir=cache) is None
    assert "has no 'solver/searched_solver.safetensors'" in offline.log


def test_a_token_opens_a_private_repository_and_stays_with_the_hub(hub, online, cache, saved):
    hub.commit("org/private", saved(), access="private")
    assert online("load", "org/private", token=TOKEN, cache_dir=cache) == "one"
    assert hub.tokens_at_storage and set(hub.tokens_at_storage) == {None}


# The cache


def test_local_files_only_loads_from_the_cache_and_asks_nobody(hub, online, cache):
    online("load", REPO, cache_dir=cache)
    hub.requests.clear()
    assert online("load", REPO, local_files_only=True, cache_dir=cache) == "one"
    assert hub.requests == []


@pytest.mark.parametrize("kwargs", [{}, {"subfolder": "a"}, {"revision": "next"}], ids=["main", "subfolder", "branch"])
def test_offline_loads_what_was_loaded_online(hub, online, offline, cache, saved, kwargs):
    hub.commit(REPO, saved("two"), branch="next")
    hub.commit(REPO, saved("three", prefix="a/"))
    expected = online("load", REPO, cache_dir=cache, **kwargs)
    hub.requests.clear()
    assert offline("load", REPO, cache_dir=cache, **kwargs) == expected
    assert hub.requests == []


def test_an_unreachable_hub_is_no_obstacle_to_a_cached_solver(hub, online, cache):
    online("load", REPO, cache_dir=cache)
    with hub.fault(REPO, 503):
        assert online("load", REPO, cache_dir=cache) == "one"


@pytest.mark.parametrize("client", ["online", "offline"])
def test_without_a_cache_and_a_connection_the_message_says_both(request, hub, cache, client):
    kwargs = {"local_files_only": True} if client == "online" else {}
    with pytest.raises(ClientError, match=f"^OSError/.*'{REPO}'.*not in the cache.*HF_HUB_OFFLINE.*Try again"):
        request.getfixturevalue(client)("load", REPO, cache_dir=cache, **kwargs)


def test_where_the_hub_has_no_address_a_misspelt_name_is_not_asked_for_again_and_again(cache, tmp_path):
    direct = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "")
    client = Client(HF_ENDPOINT="http://hub.invalid", HF_HOME=str(tmp_path), **direct)
    for function in ("load", "pipeline_class"):
        with pytest.raises(ClientError, match="^OSError"):
            client(function, REPO)
    assert client("pauses.copy") == []
    client.close()


@pytest.mark.parametrize("client", ["online", "offline"])
def test_a_cached_config_without_its_solver_is_no_classical_scheduler(request, hub, online, cache, client):
    with hub.fault(SOLVER, 503), pytest.raises(ClientError):
        online("load", REPO, cache_dir=cache)
    kwargs = {"local_files_only": True} if client == "online" else {}
    with pytest.raises(ClientError, match="^OSError/.*a part of it is not in the cache"):
        request.getfixturevalue(client)("load", REPO, cache_dir=cache, **kwargs)
    assert online("load", REPO, cache_dir=cache) == "one"


# Faults: each says what it is, and the next attempt succeeds


ALWAYS = {
    "no such repository": ("org/none", {}, "'org/none'.*Hub has no such repository.*bundled solver"),
    "no such revision": (REPO, {"revision": "v9"}, "v9 is not a valid git identifier"),
    "no such subfolder": (REPO, {"subfolder": "b"}, "does not appear to have a file named scheduler_config.json"),
    "private without a token": ("org/private", {}, "no such repository, or not for you.*token"),
    "private with a wrong token": ("org/private", {"token": "hf_no"}, "no such repository, or not for you.*token"),
    "gated without a token": ("org/gated", {}, "gated it. Ask for access at .*org/gated"),
    "gated and not on the list": ("org/gated", {"token": "hf_no"}, "gated it. Ask for access at .*org/gated"),
}


@pytest.mark.parametrize("case", ALWAYS)
def test_what_is_not_to_be_had_is_named(hub, online, cache, saved, case):
    repo_id, kwargs, message = ALWAYS[case]
    hub.commit("org/private", saved(), access="private")
    hub.commit("org/gated", saved(), access="gated")
    with pytest.raises(ClientError, match=f"(?s)^(OSError|.*/OSError)/.*{message}"):
        online("load", repo_id, cache_dir=cache, **kwargs)


PASSING = {
    "config 500": (CONFIG, 500, "did not answer. Try again"),
    "config 503": (CONFIG, 503, "did not answer. Try again"),
    "config 429": (CONFIG, 429, "did not answer. Try again"),
    "config broken off": (
        f"GET /{REPO}/resolve/main/{CONFIG}",
        "cut",
        "connection to the Hub broke|Can't load config",
    ),
    "config ends early": (f"GET /{REPO}/resolve/main/{CONFIG}", "short", "Can't load config"),
    "solver 500": (f"HEAD /{REPO}/resolve/COMMIT/{SOLVER}", 500, "did not answer. Try again"),
    "solver 503": (f"HEAD /{REPO}/resolve/COMMIT/{SOLVER}", 503, "did not answer. Try again"),
    "storage 503": ("GET /storage", 503, "503"),
    "storage forbidden": ("GET /storage", 403, "403"),
    "storage 429": ("GET /storage", 429, "429"),
    "solver broken off": ("GET /storage", "cut", "[Cc]onnection.*broke"),
    "solver ends early": ("GET /storage", "short", "should be of size .* but has size"),
}


@pytest.mark.parametrize("case", PASSING)
def test_a_fault_is_an_error_and_leaves_nothing_that_breaks_the_next_attempt(hub, online, cache, case):
    match, kind, message = PASSING[case]
    match = match.replace("COMMIT", hub.repos[REPO].refs["main"])
    with hub.fault(match, kind), pytest.raises(ClientError, match=f"(?s)^OSError/.*'{REPO}'.*{message}"):
        online("load", REPO, cache_dir=cache)
    assert online("load", REPO, cache_dir=cache) == "one"
    assert not [path for path in Path(cache).rglob("*.incomplete") if path.stat().st_size]


tries_again = pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("1.23"), reason="this version of the client gives up at once"
)


@tries_again
@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("name", [CONFIG, SOLVER])
def test_a_server_error_that_goes_away_after_some_tries_is_not_noticed(hub, online, cache, name, status):
    with hub.fault(f"{REPO}/resolve/{'main' if name == CONFIG else hub.repos[REPO].refs['main']}", status, 3) as fault:
        assert online("load", REPO, cache_dir=cache) == "one"
    assert fault.times == 0


@tries_again
@pytest.mark.parametrize(
    "kind, seconds", [("cut", 0), ("stall", 4), (429, 0)], ids=["cut off", "stalled", "too many requests"]
)
def test_a_download_that_is_interrupted_goes_on(hub, online, cache, kind, seconds):
    with hub.fault("GET /storage", kind, times=1, seconds=seconds) as fault:
        assert online("load", REPO, cache_dir=cache) == "one"
    assert fault.times == 0


def test_a_download_that_never_ends_is_given_up(hub, online, cache):
    timeout = "setattr(sys.modules['huggingface_hub'].constants, 'HF_HUB_DOWNLOAD_TIMEOUT', {})  #"
    online(timeout.format(0.3))
    try:
        with hub.fault("GET /storage", "stall", seconds=5):
            with pytest.raises(ClientError, match=f"^OSError/.*'{REPO}'.*(connection to the Hub broke|timed out)"):
                online("load", REPO, cache_dir=cache)
    finally:
        online(timeout.format(2))
    assert online("load", REPO, cache_dir=cache) == "one"


@pytest.mark.parametrize("name, error", [(CONFIG, "^OSError"), (SOLVER, "^SolverFileError")])
def test_a_file_garbled_on_its_way_is_refused_until_it_is_fetched_anew(hub, online, cache, name, error):
    with hub.fault("GET /storage" if name == SOLVER else f"GET /{REPO}/resolve", "garble"):
        for _ in range(2):
            with pytest.raises(ClientError, match=f"{error}/.*force_download=True"):
                online("load", REPO, cache_dir=cache)
    assert online("load", REPO, cache_dir=cache, force_download=True) == "one"


def test_a_token_that_was_revoked_opens_no_more_than_the_cache(hub, online, cache, saved, monkeypatch):
    hub.commit("org/private", saved(), access="private")
    assert online("load", "org/private", token=TOKEN, cache_dir=cache) == "one"
    monkeypatch.setattr("hub_server.TOKEN", "hf_another")
    with pytest.raises(ClientError, match="^OSError/.*'org/private'.*token"):
        online("load", "org/private", token=TOKEN, cache_dir=cache, force_download=True)
    assert online("load", "org/private", local_files_only=True, cache_dir=cache) == "one"


def test_a_slow_answer_is_waited_for(hub, online, cache):
    with hub.fault("GET /storage", "stall", seconds=0.5):
        assert online("load", REPO, cache_dir=cache) == "one"


@pytest.mark.parametrize("content", [b"", b"<html>", "half"], ids=["empty", "a web page", "half a file"])
def test_a_solver_that_is_broken_on_the_hub_is_refused_until_it_is_mended(hub, online, cache, saved, content):
    whole = saved()[SOLVER]
    commit = hub.commit(REPO, {SOLVER: whole[: len(whole) // 2] if content == "half" else content})
    for _ in range(2):
        with pytest.raises(ClientError, match=f"SolverFileError/.*commit {commit} of '{REPO}'.*force_download=True"):
            online("load", REPO, cache_dir=cache)
    hub.commit(REPO, {SOLVER: whole})
    assert online("load", REPO, cache_dir=cache) == "one"


def test_a_solver_that_was_damaged_in_the_cache_is_refused_and_fetched_anew_on_request(hub, online, cache):
    online("load", REPO, cache_dir=cache)
    (cached,) = Path(cache).glob(f"*/snapshots/*/{SOLVER}")
    cached.resolve().write_bytes(cached.read_bytes()[:100])
    with pytest.raises(ClientError, match="SolverFileError/.*force_download=True"):
        online("load", REPO, cache_dir=cache)
    assert online("load", REPO, cache_dir=cache, force_download=True) == "one"
    assert online("load", REPO, cache_dir=cache) == "one"


# Two processes and one cache


@pytest.fixture(scope="module")
def second(shared_hub, tmp_path_factory):
    """Another process with a home of its own. The last test that uses it kills it."""
    client = Client(HF_ENDPOINT=shared_hub.endpoint, HF_HOME=str(tmp_path_factory.mktemp("home")))
    yield client
    client.close()


def wait_for_request(hub, match: str, count: int = 1):
    deadline = time.monotonic() + 20
    while len([request for request in hub.requests if match in request]) < count:
        assert time.monotonic() < deadline, f"no {match} among {hub.requests}"
        time.sleep(0.01)


def test_two_processes_that_download_at_once_both_get_the_whole_solver(hub, online, second, cache):
    with ThreadPoolExecutor() as pool, hub.fault("GET /storage", "stall", seconds=1):
        loads = [pool.submit(client, "load", REPO, cache_dir=cache) for client in (online, second)]
        assert [load.result(timeout=60) for load in loads] == ["one", "one"]
    assert len([request for request in hub.requests if "GET /storage" in request]) == 1
    (cached,) = Path(cache).glob(f"*/snapshots/*/{SOLVER}")
    assert cached.read_bytes() == hub.find(REPO, "main", None)[1][SOLVER]


def test_a_process_that_is_killed_while_it_downloads_is_no_obstacle_to_another(hub, online, second, cache):
    with hub.fault("GET /storage", "stall", times=1, seconds=3), ThreadPoolExecutor() as pool:
        pool.submit(second, "load", REPO, cache_dir=cache)
        wait_for_request(hub, "GET /storage")
        second.process.kill()
        assert online("load", REPO, cache_dir=cache) == "one"


# Pushing


PUSH = "SearchedSolverScheduler.from_pretrained({!r}).push_to_hub"


@pytest.mark.parametrize("subfolder", [None, "scheduler"], ids=["root", "subfolder"])
def test_a_pushed_scheduler_loads_back(hub, online, cache, tmp_path, subfolder):
    scheduler("pushed").save_pretrained(tmp_path / "ours")
    kwargs = {"subfolder": subfolder} if subfolder else {}
    online(f"str({PUSH.format(str(tmp_path / 'ours'))}('me/new', token={TOKEN!r}, **{kwargs}))  #")
    _, pushed = hub.find("me/new", "main", None)
    prefix = f"{subfolder}/" if subfolder else ""
    card = set() if subfolder else {"README.md"}
    assert set(pushed) - {".gitattributes"} == {prefix + CONFIG, prefix + SOLVER} | card
    assert online("load", "me/new", cache_dir=cache, **kwargs) == "pushed"
    if card:
        assert b"library_name: diffusers" in pushed["README.md"]


def test_saving_with_push_to_hub_uploads_the_solver_too(hub, online, cache, tmp_path):
    scheduler("pushed").save_pretrained(tmp_path / "ours")
    load = f"SearchedSolverScheduler.from_pretrained({str(tmp_path / 'ours')!r})"
    save = f"save_pretrained({str(tmp_path / 'out')!r}, push_to_hub=True, repo_id='me/saved', token={TOKEN!r})"
    online(f"{load}.{save}  #")
    assert online("load", "me/saved", cache_dir=cache) == "pushed"


def test_pushing_without_the_right_token_is_refused(hub, online, tmp_path):
    scheduler("pushed").save_pretrained(tmp_path / "ours")
    with pytest.raises(ClientError, match="HfHubHTTPError.*401"):
        online(PUSH.format(str(tmp_path / "ours")), "me/new", token="hf_no")
    assert "me/new" not in hub.repos


# Pipeline repositories


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """A small DiT pipeline whose index names DDIM, and in whose scheduler folder our solver lies too."""
    folder = tmp_path_factory.mktemp("pipeline")
    build("dit").pipe.save_pretrained(folder)
    scheduler("in the pipeline").save_pretrained(folder / "scheduler")
    return folder


WEIGHTS = ["transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]


def test_a_pipeline_repository_with_our_scheduler_inside_downloads_whole(hub, online, cache, pipeline_folder):
    """A safetensors file right in the scheduler's folder would make diffusers leave out everybody's weights."""
    hub.commit("org/pipe", files(pipeline_folder))
    folder = Path(online("DiffusionPipeline.download", "org/pipe", cache_dir=cache))
    downloaded = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"model_index.json", f"scheduler/{CONFIG}", *WEIGHTS} <= downloaded
    assert online("load", "org/pipe", subfolder="scheduler", cache_dir=cache) == "in the pipeline"


def with_our_index(pipeline_folder) -> dict[str, bytes]:
    """The repository that `pipe.push_to_hub` makes when our scheduler is in the pipeline."""
    content = files(pipeline_folder)
    index = json.loads(content["model_index.json"])
    index["scheduler"] = ["diffusers_searched_solver", "SearchedSolverScheduler"]
    return content | {"model_index.json": json.dumps(index).encode()}


def test_a_pipeline_index_that_names_our_package_is_refused_by_diffusers(hub, online, cache, pipeline_folder):
    """So a scheduler is better pushed to a repository of its own."""
    hub.commit("org/pipe", with_our_index(pipeline_folder))
    with pytest.raises(ClientError, match="ValueError.*diffusers_searched_solver"):
        online("DiffusionPipeline.download", "org/pipe", cache_dir=cache)


def test_a_pipeline_index_that_names_our_package_loads_with_a_line_of_remote_code(hub, online, cache, pipeline_folder):
    line = b"from diffusers_searched_solver import SchedulerMixin, SearchedSolverScheduler\n"
    content = with_our_index(pipeline_folder)
    hub.commit("org/pipe", content | {"scheduler/diffusers_searched_solver.py": line})
    pipe = f"DiffusionPipeline.from_pretrained('org/pipe', trust_remote_code=True, cache_dir={cache!r})"
    assert online(f"{pipe}.scheduler.solver_file.provenance['name']  #") == "in the pipeline"


def test_a_pipeline_repository_takes_our_scheduler_in_place_of_its_own(hub, online, cache, pipeline_folder):
    hub.commit("org/pipe", files(pipeline_folder))
    ours = f"SearchedSolverScheduler.from_pretrained({REPO!r}, cache_dir={cache!r})"
    pipe = f"DiffusionPipeline.from_pretrained('org/pipe', scheduler={ours}, cache_dir={cache!r})"
    assert online(f"{pipe}([1], num_inference_steps=3).images[0].size  #") == [16, 16]
