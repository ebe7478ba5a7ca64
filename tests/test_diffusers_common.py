"""diffusers' own `SchedulerCommonTest` on our scheduler, classical and searched, for both kinds of model."""

import functools

import diffusers
import pytest
import torch
from diffusers.utils.import_utils import is_torchsde_available
from vendor import diffusers_scheduler_common as common

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, SolverFile, time_grid


class WithSolver(SearchedSolverScheduler):
    """Our class, but constructed with tables; what it saves is loaded by our class as it is, without them."""

    @functools.wraps(SearchedSolverScheduler.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Of third order, so that they are not the tables of the classical fallback.
        grids = {n: time_grid(self.process, n) for n in (10, 50)}
        solvers = {n: SearchedSolver.adams_bashforth(*grid, "velocity", 3) for n, grid in grids.items()}
        self.solver_file = SolverFile(solvers, self.process, self.config.prediction_type)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return SearchedSolverScheduler.from_pretrained(*args, **kwargs)


WithSolver.__name__ = SearchedSolverScheduler.__name__


class Common(common.SchedulerCommonTest):
    """The tests that apply to all four; not collected itself."""

    __test__ = False
    forward_default_kwargs = (("num_inference_steps", 10),)
    config = {}

    def get_scheduler_config(self, **config):
        return {**self.config, **config}

    def test_compatibles(self):
        # diffusers has a stand-in for the scheduler that needs torchsde, which raises when it is used.
        if not is_torchsde_available():
            names = [name for name in SearchedSolverScheduler._compatibles if name != "DPMSolverSDEScheduler"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(SearchedSolverScheduler, "_compatibles", names)
                return super().test_compatibles()
        super().test_compatibles()

    def test_any_number_of_training_steps(self):
        for count in (100, 500, 1000):
            self.check_over_configs(time_step=None, num_train_timesteps=count)

    def test_every_timestep_can_be_stepped_from(self):
        for timestep in (0, 1, 500, 999):
            self.check_over_forward(time_step=timestep)

    def test_a_full_run_keeps_shape_and_dtype(self):
        scheduler = self.scheduler_classes[0](**self.get_scheduler_config())
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            scheduler.set_timesteps(10)
            sample, model = self.dummy_sample_deter.to(dtype), self.dummy_model()
            for t in scheduler.timesteps:
                sample = scheduler.step(0.01 * model(sample, t), t, sample).prev_sample
            assert sample.dtype == dtype and sample.shape == self.dummy_sample_deter.shape
            assert sample.isfinite().all()


class NoisePrediction(Common):
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

    def test_every_beta_schedule(self):
        for beta_schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
            self.check_over_configs(time_step=None, beta_schedule=beta_schedule)

    def test_every_prediction_type(self):
        for prediction_type in ("epsilon", "v_prediction", "sample"):
            self.check_over_configs(time_step=None, prediction_type=prediction_type)


class FlowMatchingModel(Common):
    config = {"prediction_type": "flow_prediction", "shift": 3.0}

    @pytest.mark.skip(reason="does not apply: a flow-matching model has no betas")
    def test_trained_betas(self):
        pass


class TestClassicalNoisePrediction(NoisePrediction):
    __test__ = True
    scheduler_classes = (SearchedSolverScheduler,)


class TestClassicalFlowMatching(FlowMatchingModel):
    __test__ = True
    scheduler_classes = (SearchedSolverScheduler,)


class TestSearchedNoisePrediction(NoisePrediction):
    __test__ = True
    scheduler_classes = (WithSolver,)


class TestSearchedFlowMatching(FlowMatchingModel):
    __test__ = True
    scheduler_classes = (WithSolver,)


def test_the_common_tests_are_all_here():
    """A newer vendored file may bring new tests; each subclass must still inherit them all."""
    expected = {name for name in dir(common.SchedulerCommonTest) if name.startswith("test_")}
    assert len(expected) == 10
    for case in (TestClassicalNoisePrediction, TestSearchedFlowMatching):
        assert expected <= set(dir(case))


def test_the_compatible_names_are_diffusers_classes():
    assert [name for name in SearchedSolverScheduler._compatibles if not hasattr(diffusers, name)] == []
