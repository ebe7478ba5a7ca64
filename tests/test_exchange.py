"""Merging solver files, and what is written for programs that are not diffusers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_searched_solver import (
    FlowMatching,
    SearchedSolver,
    SearchedSolverScheduler,
    SolverFile,
    VariancePreserving,
    merge_solver_files,
    save_solver_file,
    time_grid,
)
from diffusers_searched_solver.cli import main


ROOT = Path(__file__).parent.parent
FOUND = ROOT / "examples" / "results" / "digits-dit"
FLOW, VP = FlowMatching(), VariancePreserving()


def file_of(*counts, process=FLOW, frame="velocity", order=2, **provenance):
    grids = {n: time_grid(process, n, start=0.9) for n in counts}
    solvers = {n: SearchedSolver.adams_bashforth(*grid, frame, order) for n, grid in grids.items()}
    return SolverFile(solvers, process, "flow_prediction" if process is FLOW else "epsilon", provenance)


def test_merging_keeps_every_solver_and_says_where_each_is_from():
    first, second = file_of(4, 6, base_model="m", seed="1"), file_of(5, base_model="m", seed="2")
    merged = merge_solver_files(first, second)
    assert merged.step_counts == [4, 5, 6]
    assert merged.solvers[5] is second.solvers[5] and merged.solvers[6] is first.solvers[6]
    assert merged.provenance["base_model"] == "m"
    assert sorted(merged.provenance["seed"].split("; ")) == ["4, 6 steps: 1", "5 steps: 2"]


@pytest.mark.parametrize("prefer", ["first", "second"])
def test_of_one_step_count_the_preferred_solver_is_taken(prefer):
    files = {"first": file_of(4, 5), "second": file_of(5, 6, order=3)}
    with pytest.raises(ValueError, match=r"Both files have solvers of 5 steps\. Say whose to take"):
        merge_solver_files(files["first"], files["second"])
    merged = merge_solver_files(files["first"], files["second"], prefer)
    assert merged.step_counts == [4, 5, 6] and merged.solvers[5] is files[prefer].solvers[5]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (file_of(5, process=VP), "process"),
        (file_of(5, base_model="another"), "base_model"),
        (file_of(5, guidance_scale="4.0"), "guidance_scale"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_solvers_of_different_models_are_not_merged(other, name):
    with pytest.raises(ValueError, match=f"different models: `{name}` is .* in the first and .* in the second"):
        merge_solver_files(file_of(4, base_model="one", guidance_scale="2.0"), other)


def test_solvers_of_two_frames_run_as_before():
    data = file_of(4, process=VP, frame="data")
    merged = merge_solver_files(data, file_of(5, process=VP))
    x, history, before = torch.randn(3, dtype=torch.float64), [], []
    y = x
    for i in range(4):
        output = torch.randn(3, dtype=torch.float64)
        history.append(merged.solvers[4].prediction(output, x, i, "epsilon"))
        before.append(data.solvers[4].prediction(output, y, i, "epsilon"))
        x, y = merged.solvers[4].step(x, history, i), data.solvers[4].step(y, before, i)
    torch.testing.assert_close(x, y)


def test_the_command_merges_folders_into_one_that_loads(tmp_path, capsys):
    config = DDIMScheduler().config
    for name, count in (("a", 4), ("b", 5)):
        file = file_of(count, process=VP)
        SearchedSolverScheduler.from_config(config, solver=file).save_pretrained(tmp_path / name)
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "c")]) == 0
    assert "4, 5 steps" in capsys.readouterr().out
    assert SearchedSolverScheduler.from_pretrained(tmp_path / "c").solver_file.step_counts == [4, 5]
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "c"), "--output", str(tmp_path / "d")]) == 2
    assert "Both files have solvers of 4 steps" in capsys.readouterr().err


@pytest.mark.parametrize("process", [FLOW, VP], ids=["flow", "vp"])
def test_the_readme_s_loop_on_exported_json_is_the_scheduler_s_run(process, tmp_path, capsys):
    file = file_of(5, process=process, order=3)
    save_solver_file(file, tmp_path / "solver.safetensors")
    path = tmp_path / "solver.json"
    assert main(["export", str(tmp_path / "solver.safetensors"), "--to", "json", "--output", str(path)]) == 0
    (block,) = re.findall(r"```python\n(import json.*?)```", (ROOT / "search" / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(block, names)

    def network(x, t):
        return torch.sin(2 * x + float(t) / 300)

    noise = torch.randn(2, 4, 8, 8)
    config = (FlowMatchEulerDiscreteScheduler() if process is FLOW else DDIMScheduler()).config
    scheduler = SearchedSolverScheduler.from_config(config, solver=file)
    scheduler.set_timesteps(5)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    # The scheduler's timesteps are float32, as diffusers' are; noise predicted near pure noise is felt 60-fold.
    torch.testing.assert_close(names["sample"](network, noise, path, 5), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["k-diffusion", "comfyui"])
def test_noise_levels_are_those_of_k_diffusion(target, tmp_path, capsys):
    assert main(["export", str(FOUND), "--to", target, "--num-steps", "5"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    levels = np.array([float(number) for number in re.findall(r"\d+\.?\d*(?:e-\d+)?", line)])
    solver = SearchedSolverScheduler.from_pretrained(FOUND).solver_file.solvers[5]
    np.testing.assert_allclose(levels, solver.sigmas / solver.alphas, rtol=1e-4, atol=1e-6)
    assert levels[-1] == 0


def test_exported_json_is_json_on_the_terminal(capsys):
    assert main(["export", str(FOUND), "--to", "json", "--num-steps", "8"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert list(exported["solvers"]) == ["8"] and len(exported["solvers"]["8"]["steps"]) == 8


def test_a_misspelt_name_is_answered_without_asking_the_hub(capsys, monkeypatch):
    monkeypatch.setattr(SearchedSolverScheduler, "from_pretrained", None)
    assert main(["show", "sit-xl"]) == 2
    assert "no folder and no bundled solver of the name 'sit-xl'" in capsys.readouterr().err


def test_the_version_is_said_and_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -c 'import sys; from diffusers_searched_solver.cli import main; sys.exit(main())'"
    lines = "; ".join(f"{command} {arguments}" for arguments in ("--version", f"show {FOUND} | head -n 1"))
    done = subprocess.run(["bash", "-o", "pipefail", "-c", lines], capture_output=True, text=True, check=True)
    assert re.match(r"\S+ \d+\.\d+", done.stdout) and "Traceback" not in done.stderr and "Broken" not in done.stderr
