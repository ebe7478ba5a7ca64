"""Searches that are killed, stopped, starved and handed damaged files, on the command line."""

import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from kill_search import OPTIONS, PIPELINE, RUN, Search, check_whole, kill_and_go_on
from safetensors.torch import load_file, save_file

from diffusers_searched_solver import SearchedSolverScheduler
from search.fit import strategy
from search.launch import heartbeat


GRADIENT = ["--fitter", "gradient", "--num-samples", 64]
HALF_WAY = "3 steps, everything, 8 noises"


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """What a search that nothing happens to finds, and how long it takes."""
    Search(tmp_path_factory.mktemp("first"), "--dry-run").wait()
    started = time.perf_counter()
    found = Search(tmp_path_factory.mktemp("undisturbed")).found()
    return found, time.perf_counter() - started


@pytest.fixture()
def begun(tmp_path_factory, tmp_path):
    """The folder of a search that was killed."""
    original = tmp_path_factory.getbasetemp() / "killed"
    if not original.exists():
        assert Search(original).wait_for_solver().kill()
    return shutil.copytree(original, tmp_path / "begun")


def assert_refused(search: Search, *words: str):
    assert search.wait() == [1]
    assert "Traceback" not in search.log
    assert "error: " in search.log
    for each in words:
        assert each in search.log


def change_weights(pipeline, name, change):
    (path,) = (pipeline / "transformer").glob("*.safetensors")
    weights = load_file(path)
    save_file({**weights, name: change(weights[name])}, path)


def test_a_search_that_is_killed_five_times_ends_as_if_nothing_had_happened(undisturbed, tmp_path):
    found, seconds = undisturbed
    assert kill_and_go_on(tmp_path, 5, random.Random(0), seconds) == found


def test_two_processes_find_the_bits_that_one_finds(undisturbed, tmp_path):
    assert Search(tmp_path, num_processes=2).found() == undisturbed[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_if_one_of_two_processes_is_killed_the_other_says_so_and_one_can_go_on(undisturbed, tmp_path, victim):
    search = Search(tmp_path, num_processes=2).wait_for("3 steps, best that is known")
    search.processes[victim].kill()
    exits = search.wait(30)
    assert exits[victim] == -signal.SIGKILL
    assert exits[1 - victim] == 1
    assert "error: Another process of the search has ended" in search.log
    check_whole(search.out)
    assert Search(tmp_path, "--resume").found() == undisturbed[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_if_one_of_two_processes_stands_still_the_other_says_so_and_one_can_go_on(undisturbed, tmp_path, victim):
    search = Search(tmp_path, num_processes=2, prepare=impatient).wait_for("3 steps, best that is known")
    os.kill(search.processes[victim].pid, signal.SIGSTOP)
    search.processes[1 - victim].join(60)
    assert search.processes[1 - victim].exitcode == 1
    assert f"error: Process {victim} has not been heard of for 3 s; it may be stopped" in search.log
    search.kill()
    check_whole(search.out)
    assert Search(tmp_path, "--resume").found() == undisturbed[0]


def impatient():
    """In place of minutes."""
    heartbeat.BEAT, heartbeat.PATIENCE = 0.2, 3.0


def test_memory_that_runs_out_in_one_of_two_processes_is_said_by_it(tmp_path):
    search = Search(tmp_path, num_processes=2, prepare=spend_memory)
    assert search.wait(60) == [1, 1]
    assert "no more memory" in search.log and "Lower --batch-size" in search.log
    assert "Traceback" not in search.log


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGTERM, HALF_WAY), (signal.SIGINT, HALF_WAY), (signal.SIGTERM, "distance to the end of a teacher")],
    ids=["SIGTERM", "SIGINT", "SIGTERM while measuring"],
)
def test_a_stopped_search_leaves_the_best_solver_so_far(undisturbed, tmp_path, number, moment):
    search = Search(tmp_path).wait_for(moment)
    os.kill(search.processes[0].pid, number)
    assert search.wait(10) == [143]
    assert "Stopped. What was found so far is in --output-dir: go on with --resume." in search.log
    assert "Traceback" not in search.log
    check_whole(search.out)
    SearchedSolverScheduler.from_pretrained(search.out).set_timesteps(3)
    assert Search(tmp_path, "--resume").found() == undisturbed[0]


def test_signals_to_all_processes_of_accelerate_launch_stop_them(undisturbed, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", RUN]
    arguments = ["--pipeline", PIPELINE, *OPTIONS, "--output-dir", out, "--cache-dir", tmp_path / "cache"]
    with open(log, "w") as stream:
        process = subprocess.Popen([*launch, *arguments], start_new_session=True, stdout=stream, stderr=stream)
    while not (out / "scheduler_config.json").exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) != 0
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    check_whole(out)
    SearchedSolverScheduler.from_pretrained(out).set_timesteps(3)
    assert Search(tmp_path, "--resume").found() == undisturbed[0]


@pytest.mark.parametrize("size", [1500, 20_000], ids=["searching", "writing results"])
def test_a_full_disk_is_said_and_the_search_goes_on_once_there_is_room(undisturbed, tmp_path, size):
    """The disk is full for larger files than so many bytes."""
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    search = Search(tmp_path, prepare=limit)
    assert_refused(search, "File too large", "go on with --resume")
    check_whole(search.out)
    # The last line may be torn.
    assert (search.out / "journal.jsonl").stat().st_size <= size
    assert Search(tmp_path, "--resume").found() == undisturbed[0]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_computed(undisturbed, tmp_path):
    (tmp_path / "out").write_text("not a folder")
    search = Search(tmp_path)
    assert_refused(search, f"Nothing can be written in '{search.out}'. Choose another --output-dir.")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["garbage", "other json", "one digit", "deep"])
def test_a_damaged_journal_is_refused(begun, damage):
    path = begun / "out" / "journal.jsonl"
    content = path.read_bytes()
    path.write_bytes(
        {
            "garbage": b"\xff\x00\xfe" * 100,
            "other json": b"[1, 2]",
            "one digit": content.replace(b'"calls": ', b'"calls": 1', 1),
            "deep": b"[" * 100_000,
        }[damage]
    )
    assert_refused(Search(begun, "--resume"), "journal.jsonl' is no journal of a search, or damaged", "Delete it")


@pytest.mark.parametrize("share", [0, 0.001, 0.5], ids=["empty", "torn at its beginning", "torn"])
def test_a_journal_that_was_torn_as_it_was_written_is_gone_on_with(undisturbed, begun, share):
    path = begun / "out" / "journal.jsonl"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert Search(begun, "--resume").found() == undisturbed[0]


def test_a_search_goes_on_with_its_own_settings_alone(begun):
    search = Search(begun, "--resume", "--max-calls", 9000, "--guidance-scale", 3)
    assert_refused(search, "guidance_scale was None, is [3.0]; max_calls was None, is 9000. Go on with the old ones")


@pytest.mark.parametrize("options", [[], GRADIENT], ids=["gauss-newton", "gradient"])
def test_a_search_goes_on_with_its_own_network_alone(tmp_path, options):
    """Someone has trained a little in the meantime."""
    pipeline = shutil.copytree(PIPELINE, tmp_path / "pipeline")
    options = ["--pipeline", pipeline, *options]
    Search(tmp_path, *options).wait_for_solver().kill()
    change_weights(pipeline, "x_embedder.proj.weight", lambda weight: 1.001 * weight)
    search = Search(tmp_path, *options, "--resume")
    assert_refused(search, "was begun with another network, or on another kind of machine")


def test_a_condition_that_gives_nan_is_named_and_ends_the_other_process_too(tmp_path):
    pipeline = shutil.copytree(PIPELINE, tmp_path / "pipeline")
    lost = torch.arange(11)[:, None] == 3
    change_weights(pipeline, "y_embedder.embedding_table.weight", lambda weight: weight.where(~lost, torch.nan))
    search = Search(tmp_path, "--pipeline", pipeline, num_processes=2)
    assert search.wait(30) == [1, 1]
    assert "error: The teacher's end point for seed 3 with class_labels=[3] is not finite." in search.log
    assert "error: Another process of the search has ended; it may have said why." in search.log
    assert not search.out.exists()


def test_memory_that_runs_out_for_the_derivatives_is_said(tmp_path):
    search = Search(tmp_path, prepare=spend_memory)
    assert_refused(search, "no more memory", "Lower --batch-size, or use more processes.")


def spend_memory():
    """In place of what takes more of it than the network's calls."""

    def iteration(*args):
        raise torch.OutOfMemoryError("no more memory")

    strategy.gauss_newton_iteration = iteration


def test_without_resume_what_was_begun_is_not_thrown_away(begun):
    before = (begun / "out" / "journal.jsonl").read_bytes()
    assert_refused(Search(begun), "is the journal of a search that did not finish. Pass --resume to go on with it")
    assert (begun / "out" / "journal.jsonl").read_bytes() == before


def test_resume_without_anything_to_go_on_with_begins(undisturbed, tmp_path):
    assert Search(tmp_path, "--resume").found() == undisturbed[0]
