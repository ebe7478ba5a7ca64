"""`from_config` on the configs of diffusers' own schedulers: the same noise process, or a refusal."""

import diffusers
import pytest
import torch

from diffusers_searched_solver import SearchedSolverScheduler
from diffusers_searched_solver.configs import process_from_json, process_to_json


SCHEDULERS = [
    diffusers.CogVideoXDDIMScheduler,
    diffusers.CogVideoXDPMScheduler,
    diffusers.DDIMScheduler,
    diffusers.DDPMScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.HeunDiscreteScheduler,
    diffusers.KDPM2DiscreteScheduler,
    diffusers.LCMScheduler,
    diffusers.LMSDiscreteScheduler,
    diffusers.PNDMScheduler,
    diffusers.TCDScheduler,
    diffusers.UniPCMultistepScheduler,
]


@pytest.mark.parametrize("loaded", [False, True], ids=["as constructed", "as loaded from a file"])
@pytest.mark.parametrize("scheduler_class", SCHEDULERS, ids=lambda each: each.__name__)
def test_the_noise_process_is_that_of_the_scheduler_whose_config_it_is(scheduler_class, loaded, tmp_path):
    """Also where that scheduler's default betas are not ours."""
    theirs = scheduler_class()
    if loaded:
        theirs.save_pretrained(tmp_path)
        theirs = scheduler_class.from_pretrained(tmp_path)
    ours = SearchedSolverScheduler.from_config(theirs.config)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rescale", [False, True], ids=["", "zero terminal SNR"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_cogvideox_shifts_the_noise_process(shift, rescale):
    theirs = diffusers.CogVideoXDDIMScheduler(
        snr_shift_scale=shift, rescale_betas_zero_snr=rescale, prediction_type="v_prediction"
    )
    ours = SearchedSolverScheduler.from_config(theirs.config)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod.float(), rtol=1e-4, atol=1e-7)
    assert process_from_json(process_to_json(ours.process)) == ours.process


def test_the_scheduler_is_named_whose_config_is_of_another_kind():
    """Though the config of one that was made in Python does not say."""
    with pytest.raises(ValueError, match="The config of EDMEulerScheduler describes neither"):
        SearchedSolverScheduler.from_config(diffusers.EDMEulerScheduler().config)


@pytest.mark.parametrize(
    "config",
    [
        diffusers.EDMEulerScheduler().config,
        diffusers.EDMDPMSolverMultistepScheduler().config,
        diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction").config,
        diffusers.SCMScheduler().config,
        diffusers.DDPMWuerstchenScheduler().config,
        diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config,
    ],
    ids=["EDM", "EDM DPM-Solver", "Stable Video Diffusion", "TrigFlow", "Wuerstchen", "Mochi"],
)
def test_a_config_of_another_kind_of_noise_process_is_refused(config):
    with pytest.raises(ValueError, match="neither.*DDPM.*nor flow matching"):
        SearchedSolverScheduler.from_config(config)
