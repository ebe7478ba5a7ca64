"""Every entry of every compatible scheduler's config: used, of no matter to a table, or refused."""

import inspect

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, time_grid


NUM_STEPS = 4
CLASSES = [getattr(diffusers, name) for name in SearchedSolverScheduler._compatibles]
CLASSES += [diffusers.CogVideoXDDIMScheduler, diffusers.CogVideoXDPMScheduler]

PROCESS = "the noise process"
LIMITS = "of the data that is predicted"
EXPLICIT = "where explicit sigmas of a flow lead"
PIPELINES = "pipelines read it, not schedulers"
GRID = "where the scheduler's own steps begin and end, which a table says itself"
FORMULA = "the scheduler's own formula, which a table takes the place of"
# Entry: its verdict and why, and the entries of a config beside a default one's that show it.
MORE = {"thresholding": True, "sample_max_value": 1.4}
FLOW = {"shift": 1.0}
USED = {
    "num_train_timesteps": (PROCESS, {"num_train_timesteps": 500}),
    "beta_start": (PROCESS, {"beta_start": 0.001}),
    "beta_end": (PROCESS, {"beta_end": 0.015}),
    "beta_schedule": (PROCESS, {"beta_schedule": "squaredcos_cap_v2"}),
    "trained_betas": (PROCESS, {"trained_betas": [0.001 + 0.00001 * k for k in range(1000)]}),
    "rescale_betas_zero_snr": (PROCESS, {"rescale_betas_zero_snr": True}),
    "snr_shift_scale": (PROCESS, {"snr_shift_scale": 2.0}),
    "prediction_type": ("what the network predicts", {"prediction_type": "v_prediction"}),
    "use_flow_sigmas": ("what the network predicts", {"use_flow_sigmas": True}),
    "variance_type": ("whether a learned variance is dropped", {"variance_type": "learned_range"}),
    "thresholding": (LIMITS, {"thresholding": True}),
    "dynamic_thresholding_ratio": (LIMITS, {**MORE, "sample_max_value": 1e6, "dynamic_thresholding_ratio": 0.4}),
    "sample_max_value": (LIMITS, MORE),
    "clip_sample": (LIMITS, {"clip_sample": True}),
    "clip_sample_range": (LIMITS, {"clip_sample": True, "clip_sample_range": 0.5}),
    "shift": (EXPLICIT, {"shift": 3.0}),
    "use_dynamic_shifting": (EXPLICIT, {**FLOW, "use_dynamic_shifting": True}),
    "time_shift_type": (EXPLICIT, {**FLOW, "use_dynamic_shifting": True, "time_shift_type": "linear"}),
    "shift_terminal": (EXPLICIT, {**FLOW, "shift_terminal": 0.1}),
}
IRRELEVANT = {
    "base_shift": (PIPELINES, 0.7),
    "max_shift": (PIPELINES, 2.0),
    "base_image_seq_len": (PIPELINES, 64),
    "max_image_seq_len": (PIPELINES, 8192),
    "flow_shift": ("the shift of a grid, which a table says itself", 3.0),
    "timestep_spacing": (GRID, "trailing"),
    "steps_offset": (GRID, 1),
    "set_alpha_to_one": (GRID, False),
    "final_sigmas_type": (GRID, "sigma_min"),
    "lambda_min_clipped": (GRID, -5.0),
    "sigma_min": (GRID, 0.1),
    "sigma_max": (GRID, 10.0),
    "use_karras_sigmas": (GRID, True),
    "use_exponential_sigmas": (GRID, True),
    "use_beta_sigmas": (GRID, True),
    "use_lu_lambdas": (GRID, True),
    "interpolation_type": (GRID, "log_linear"),
    "algorithm_type": (FORMULA, "dpmsolver"),
    "solver_order": (FORMULA, 3),
    "solver_type": (FORMULA, "heun"),
    "solver_p": (FORMULA, None),
    "predict_x0": (FORMULA, False),
    "disable_corrector": (FORMULA, [0]),
    "lower_order_final": (FORMULA, False),
    "euler_at_final": (FORMULA, True),
    "skip_prk_steps": (FORMULA, True),
    "stochastic_sampling": (FORMULA, True),
}
REFUSED = {
    "invert_sigmas": ("another noise process", True),
    "timestep_type": ("another noise process", "continuous"),
}


def entries_of(cls) -> list[str]:
    return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "args", "kwargs")]


def with_entry(entry: str, changes: dict):
    """The config of the first scheduler that has an entry, as it is and changed, as a file would have it."""
    cls = next(each for each in CLASSES if {entry, *changes} <= {*entries_of(each)})
    plain = {key: value for key, value in cls().config.items() if key != "_use_default_values"}
    plain = {**plain, "_class_name": cls.__name__, **({"clip_sample": False} if "clip_sample" in plain else {})}
    return plain, {**plain, **changes}


def outcomes(config) -> list[torch.Tensor]:
    """What a run of a table makes of an output with a variance behind it, and of one without, and explicit sigmas."""
    scheduler = SearchedSolverScheduler.from_config(config)
    table = SearchedSolver.adams_bashforth(*time_grid(scheduler.process, NUM_STEPS, 0.7), "velocity", 2)
    scheduler = SearchedSolverScheduler.from_config(config, solver=table)
    scheduler.set_timesteps(NUM_STEPS)
    x = 3 * torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    found = [scheduler.timesteps, scheduler.alphas_cumprod if hasattr(scheduler, "alphas_cumprod") else torch.ones(1)]
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(3 * x), t, x).prev_sample
        found.append(x)
    if scheduler.process.kind == "flow_matching":
        scheduler.set_timesteps(sigmas=[0.9, 0.4, 0.2], mu=0.8)
        found.append(scheduler.timesteps)
    elif scheduler.config.variance_type == "learned_range":
        scheduler.set_timesteps(NUM_STEPS)
        found.append(scheduler.step(torch.cat([x, x], 1), scheduler.timesteps[0], x).prev_sample)
    return found


def same(ones, others) -> bool:
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def test_every_entry_has_a_verdict():
    """A new version of diffusers may have new ones: look what they do to a result."""
    entries = {entry for cls in CLASSES for entry in entries_of(cls)}
    assert entries == {*USED, *IRRELEVANT, *REFUSED}


@pytest.mark.parametrize("entry", USED)
def test_an_entry_is_used(entry):
    plain, changed = with_entry(entry, USED[entry][1])
    # The entries beside it are those that it has no meaning without.
    beside = {**changed, entry: plain[entry]}
    assert not same(outcomes(changed), outcomes(beside))


@pytest.mark.parametrize("entry", IRRELEVANT)
def test_an_entry_is_of_no_matter_to_a_searched_table(entry):
    plain, changed = with_entry(entry, {entry: IRRELEVANT[entry][1]})
    of_explicit_sigmas = len(outcomes(plain)) - (entry.startswith("use_") and "shift" in plain)
    assert same(outcomes(changed)[:of_explicit_sigmas], outcomes(plain)[:of_explicit_sigmas])


@pytest.mark.parametrize("entry", REFUSED)
def test_an_entry_is_refused_with_the_reason(entry):
    _, changed = with_entry(entry, {entry: REFUSED[entry][1]})
    with pytest.raises(ValueError, match="describes neither DDPM's noise process nor"):
        SearchedSolverScheduler.from_config(changed)


# The limits of the data


IF = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5, "clip_sample": True}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("frame", ["data", "velocity"])
def test_the_data_is_limited_as_dpm_solver_limits_it(frame, prediction_type):
    """In steps of order one, which are DDIM's, all of them the same; DeepFloyd-IF's own limits."""
    config = {"prediction_type": prediction_type, "timestep_spacing": "trailing", **IF}
    theirs = DPMSolverMultistepScheduler(
        **{key: value for key, value in config.items() if key != "clip_sample"}, solver_order=1
    )
    theirs.set_timesteps(NUM_STEPS)
    process = SearchedSolverScheduler.from_config(config).process
    sigma = theirs.sigmas.double().numpy()
    alphas = 1 / (1 + sigma**2) ** 0.5
    table = SearchedSolver.adams_bashforth(theirs.timesteps.numpy(), alphas, sigma * alphas, frame, 1)
    ours = SearchedSolverScheduler.from_config(config, solver=table)
    assert ours.process == process
    ours.set_timesteps(NUM_STEPS)
    x = y = 3 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in ours.timesteps:
        x, data = ours.step(torch.sin(3 * x), t, x).to_tuple()
        assert data.abs().max() <= 1
        y = theirs.step(torch.sin(3 * y), int(t), y).prev_sample
    torch.testing.assert_close(x, y, rtol=0, atol=2e-5)
    assert x.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("limits", [IF, {"clip_sample": True, "clip_sample_range": 2.0}], ids=["thresholding", "clip"])
def test_limits_keep_the_dtype_and_the_samples_of_a_batch_apart(limits, dtype):
    scheduler = SearchedSolverScheduler.from_config(limits)
    ends = []
    x = 9 * torch.randn(3, 2, 4, dtype=dtype)
    for part in (x, x[:1]):
        scheduler.set_timesteps(NUM_STEPS)
        for t in scheduler.timesteps:
            part = scheduler.step(torch.sin(part), t, part).prev_sample
        ends.append(part)
    assert ends[0].dtype == dtype
    torch.testing.assert_close(ends[0][:1], ends[1], rtol=0, atol=0)
    assert ends[0].abs().max() <= limits.get("clip_sample_range", 1.0) * (1 + 1e2 * torch.finfo(dtype).eps)


def test_limits_are_turned_off_by_name_and_kept_when_saved(tmp_path):
    DDIMScheduler(**IF).save_pretrained(tmp_path)
    config = SearchedSolverScheduler.load_config(tmp_path)
    assert SearchedSolverScheduler.from_config(config).config.thresholding
    off = SearchedSolverScheduler.from_config(config, thresholding=False, clip_sample=False)
    assert not off.config.thresholding and not off.config.clip_sample
    off.save_pretrained(tmp_path / "off")
    assert not SearchedSolverScheduler.from_pretrained(tmp_path / "off").config.clip_sample


def test_a_flow_s_data_is_limited_too():
    config = {**FlowMatchEulerDiscreteScheduler().config, "clip_sample": True}
    scheduler = SearchedSolverScheduler.from_config(config)
    scheduler.set_timesteps(NUM_STEPS)
    x = 5 * torch.randn(2, 3)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(x), t, x).prev_sample
    assert x.abs().max() <= 1 + 1e-6
