"""What users' code and files rely on: a change here is a new major version, or a new version of the file format."""

import inspect
from pathlib import Path

import numpy as np
import pytest

import diffusers_searched_solver
from diffusers_searched_solver import (
    FlowMatching,
    SearchedSolver,
    SearchedSolverScheduler,
    SolverFile,
    VariancePreserving,
    list_bundled_solvers,
    load_solver_file,
    process_from_config,
    save_solver_file,
    tensor_step,
    time_grid,
)


GOLDEN = Path(__file__).parent / "fixtures" / "format_1.safetensors"
TABLES = {
    1: {
        "timesteps": [480.0],
        "alphas": [0.2024598878262494, 1.0],
        "sigmas": [0.9792905563832333, 0.0],
        "coefficients": [[-0.375]],
    },
    3: {
        "timesteps": [470.0, 300.0, 90.0],
        "alphas": [0.21769321999878116, 0.5488753111839932, 0.9182734856140157, 1.0],
        "sigmas": [0.9760172447075729, 0.8359042366040949, 0.39594672068131354, 0.0],
        "coefficients": [[-0.375, 0.0, 0.0], [0.0, 0.125, 0.0], [0.375, 0.5, 0.625]],
    },
}


def test_a_file_of_format_1_loads_for_ever():
    file = load_solver_file(GOLDEN)
    assert file.process == VariancePreserving(500, 0.001, 0.015, "scaled_linear")
    assert file.prediction_type == "v_prediction"
    assert file.provenance == {"base_model": "org/größer", "guidance_scale": "2.0"}
    assert file.step_counts == [1, 3]
    for n, tables in TABLES.items():
        assert (file.solvers[n].frame, file.solvers[n].consistent) == ("data", False)
        for name, table in tables.items():
            np.testing.assert_array_equal(getattr(file.solvers[n], name), table)


def test_this_version_writes_format_1_byte_by_byte(tmp_path):
    save_solver_file(load_solver_file(GOLDEN), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == GOLDEN.read_bytes()


NAMES = {
    *("FlowMatching", "NoiseProcess", "VariancePreserving", "process_from_config", "time_grid"),
    *("SearchedSolver", "SolverFile", "SolverFileError", "load_solver_file", "save_solver_file", "tensor_step"),
    *("SchedulerMixin", "SearchedSolverScheduler", "list_bundled_solvers"),
}


def test_the_package_goes_on_offering_its_names():
    offered = diffusers_searched_solver.__all__
    assert NAMES <= set(offered)
    assert offered == sorted(offered)
    assert all(hasattr(diffusers_searched_solver, name) for name in offered)


SIGNATURES = {
    FlowMatching: "(num_train_timesteps=1000)",
    VariancePreserving: "(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule='linear', "
    "trained_betas=None, rescale_betas_zero_snr=False, snr_shift_scale=1.0)",
    SearchedSolver: "(timesteps, alphas, sigmas, coefficients, frame, consistent=True)",
    SolverFile: "(solvers, process, prediction_type, provenance=<factory>)",
    SearchedSolverScheduler: "(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule='linear', "
    "trained_betas=None, rescale_betas_zero_snr=False, snr_shift_scale=1.0, prediction_type='epsilon', shift=1.0, "
    "use_dynamic_shifting=False, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096, "
    "variance_type=None, strict=False)",
    SearchedSolverScheduler.from_pretrained: "(pretrained_model_name_or_path, subfolder=None, "
    "return_unused_kwargs=False, **kwargs)",
    SearchedSolverScheduler.from_config: "(config=None, return_unused_kwargs=False, solver=None, **kwargs)",
    SearchedSolverScheduler.set_timesteps: "(self, num_inference_steps=None, device=None, timesteps=None, "
    "sigmas=None, mu=None)",
    SearchedSolverScheduler.step: "(self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False, "
    "generator=None, per_token_timesteps=None, return_dict=True)",
    SearchedSolverScheduler.add_noise: "(self, original_samples, noise, timesteps)",
    SearchedSolverScheduler.scale_noise: "(self, sample, timestep, noise)",
    SearchedSolver.adams_bashforth: "(timesteps, alphas, sigmas, frame, order)",
    SearchedSolver.step: "(self, sample, history, index)",
    list_bundled_solvers: "()",
    load_solver_file: "(path)",
    save_solver_file: "(file, path)",
    process_from_config: "(config)",
    tensor_step: "(sample, model_output, history, index, table)",
    time_grid: "(process, num_steps, shift=1.0, start=1.0)",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_a_signature_stays_as_it_is(function):
    """Names, order, kinds and defaults; annotations may become more exact."""
    signature = inspect.signature(function)
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    assert (
        str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
        == SIGNATURES[function]
    )
