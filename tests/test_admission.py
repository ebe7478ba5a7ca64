"""What a search refuses before it spends anything, and what it makes one by one."""

import copy
import re
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from diffusers.hooks import FirstBlockCacheConfig
from fields import inputs_of, load, own_run
from tiny_pipelines import build, build_anew

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, check_solver, time_grid
from diffusers_searched_solver.serialization import SolverFile
from diffusers_searched_solver.trial import UnsuitableCallError, check_arguments, recorded_steps, trial_table, try_call
from search.launch.network_calls import NetworkCalls
from search.pipeline.field import Alone, FieldError, PipelineField
from search.pipeline.rollout import rollout
from search.teacher.admission import admit
from search.teacher.batches import pipeline_calls


pytestmark = pytest.mark.usefixtures("one_thread")


def counted_admission(pipe, conditions, network: str) -> tuple[list, int]:
    """What is admitted, and how often the network was called for it."""
    calls = []
    handle = getattr(pipe, network).register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        return admit(pipe, conditions, [4]), len(calls)
    finally:
        handle.remove()


# Predictions that depend on more than state and time


class PipelineWithMomentum(DiTPipeline):
    """Adds a part of its last prediction, as guidance with momentum does."""

    def __call__(self, *args, momentum=0.5, **kwargs):
        last = []

        def lag(module, inputs, output):
            before, last[:] = last[:], [output.sample]
            output.sample = output.sample + momentum * before[0] if before else output.sample

        handle = self.transformer.register_forward_hook(lag)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            handle.remove()


@pytest.mark.parametrize("momentum", [0.5, 0.01])
def test_a_pipeline_with_momentum_is_found_out_before_a_teacher_runs(momentum):
    pipe = PipelineWithMomentum(**load("digits-dit").components)
    conditions = [{"class_labels": [3], "momentum": momentum}]
    with pytest.raises(FieldError, match=r"PipelineWithMomentum does more than a function of state and time: at step"):
        admit(pipe, conditions, [5])


def test_a_guidance_interval_is_found_out():
    inputs = {**inputs_of("lumina2"), "cfg_trunc_ratio": 0.5}
    with pytest.raises(FieldError, match="counts steps"):
        admit(build("lumina2").pipe, [inputs], [4])


def test_a_cache_between_steps_is_refused_when_a_field_opens(open_field):
    case = build_anew("flux")
    case.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(FieldError, match=r"Call `pipe\.transformer\.disable_cache\(\)`"):
        open_field(case.pipe, inputs_of("flux"), [0])


class PipelineOfOtherShape(DiTPipeline):
    """Hands on a prediction for two where there is one."""

    def __call__(self, *args, **kwargs):
        step = self.scheduler.step
        self.scheduler.step = lambda output, *rest, **more: step(torch.cat([output, output]), *rest, **more)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            del self.scheduler.step


def test_a_prediction_of_another_shape_than_the_state_is_refused(open_field):
    pipe = PipelineOfOtherShape(**load("digits-dit").components)
    message = r"made of a state of shape \(2, 4, 8, 8\) a prediction of shape \(4, 4, 8, 8\)"
    with pytest.raises(FieldError, match=message):
        open_field(pipe, {"class_labels": [1, 2], "guidance_scale": 1.0}, [0, 1])


class PipelineWithOtherNoise(diffusers.FluxPipeline):
    """Draws a part of its first state from nowhere, as JoyImage does for the image that is edited."""

    def prepare_latents(self, *args):
        latents, ids = super().prepare_latents(*args)
        return latents + 0.1 * torch.randn(latents.shape), ids


def test_noise_that_no_seed_says_is_found_out():
    pipe = PipelineWithOtherNoise(**build("flux").pipe.components)
    with pytest.raises(FieldError, match=r"PipelineWithOtherNoise begins at another state whenever it is called"):
        admit(pipe, [inputs_of("flux")], [4])


class PipelineWithSound(diffusers.FluxPipeline):
    """Steps a second state with a copy of its scheduler, as those of LTX 2 do."""

    def __call__(self, *args, **kwargs):
        copy.deepcopy(self.scheduler)
        return super().__call__(*args, **kwargs)


def test_a_pipeline_that_copies_its_scheduler_is_refused():
    pipe = PipelineWithSound(**build("flux").pipe.components)
    with pytest.raises(UnsuitableCallError, match="PipelineWithSound copies its scheduler, to step parts of"):
        admit(pipe, [inputs_of("flux")], [4])
    assert "__deepcopy__" not in vars(pipe.scheduler)


class PipelineForOneScheduler(diffusers.FluxPipeline):
    """Asks of its scheduler what others do not do, as latent consistency models do."""

    def __call__(self, *args, **kwargs):
        self.scheduler.set_shift(1.0)
        return super().__call__(*args, **kwargs)


def test_a_call_that_works_with_the_own_scheduler_alone_is_refused_for_that():
    pipe = PipelineForOneScheduler(**build("flux").pipe.components)
    message = "runs with FlowMatchEulerDiscreteScheduler but not with a searched scheduler: AttributeError"
    with pytest.raises(UnsuitableCallError, match=message):
        admit(pipe, [inputs_of("flux")], [4])


class PipelineWithoutStepCount(DiffusionPipeline):
    """Runs as many steps as it has inverted, as LEDITS++ does."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, editing_prompt, **kwargs):
        raise AssertionError("It is not called.")


def test_a_call_that_takes_no_number_of_steps_is_refused(digits_dit):
    pipe = PipelineWithoutStepCount(digits_dit.scheduler)
    with pytest.raises(UnsuitableCallError, match="PipelineWithoutStepCount takes no `num_inference_steps`"):
        admit(pipe, [{"editing_prompt": ["glasses", "sunshine"]}], [4])


def test_several_editing_prompts_are_of_one_sample(digits_dit):
    check_arguments(digits_dit, {"editing_prompt": ["glasses", "sunshine"]})


def test_a_recorded_state_stays_as_it_was_where_the_pipeline_writes_into_it():
    """JoyImage puts the images that it was given back into the last state before it decodes it."""

    def write(pipe, i, t, tensors):
        tensors["latents"].zero_()
        return tensors

    last = []
    pipe = build("flux").pipe
    with recorded_steps(pipe, pipe.scheduler, lambda output, sample, next_sample: last.append(next_sample)):
        pipe(**inputs_of("flux"), num_inference_steps=2, callback_on_step_end=write)
    assert last[-1].norm() > 0


@pytest.mark.parametrize("name", ["sd15_inpaint", "sdxl_inpaint"])
def test_an_inpainting_pipeline_runs_a_table_with_times_of_its_own_as_the_field_does(name, open_field):
    """What it keeps is noised to the level of the node, whatever time the network is called with."""
    inputs = {**inputs_of(name), "strength": 1.0}
    admit(build(name).pipe, [inputs], [4])
    field = open_field(build(name).pipe, inputs, [0])
    table = trial_table(field.process, 4)
    scheduler = SearchedSolverScheduler.from_config(build(name).config, solver=table)
    states = own_run(build(name).pipe, scheduler, inputs, [0], 4)
    torch.testing.assert_close(rollout(field, table), states[-1], rtol=0, atol=1e-6 * states[-1].abs().max().item())


# Several samples


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ddim", "two in one call fail .*effective batch size of 1"),
        ("ddpm", r"a call for two makes states of shape \(1, 3, 8, 8\)"),
        ("wan_image_to_video", "two in one call fail"),
    ],
)
def test_what_does_not_merge_is_made_one_by_one_and_that_is_said(name, reason, caplog):
    inputs = {key: value for key, value in inputs_of(name).items() if key != "batch_size"}
    conditions = admit(build(name).pipe, [inputs], [4])
    assert [type(condition) for condition in conditions] == [Alone]
    assert [len(samples) for samples in pipeline_calls(conditions, [0, 1, 2], 4)] == [1, 1, 1]
    (record,) = (record for record in caplog.records if "of its own" in record.message)
    assert record.message.startswith(f"Every sample gets a call of {type(build(name).pipe).__name__} of its own: ")
    assert re.search(reason, record.message)


def test_what_merges_is_made_together():
    conditions = [{"class_labels": [k], "guidance_scale": 2.0} for k in (3, 8)]
    admitted, calls = counted_admission(load("digits-dit"), conditions, "transformer")
    assert admitted == conditions
    assert not any(isinstance(condition, Alone) for condition in admitted)
    # The call and its steps again, two fields and one more evaluation, two samples and both of them.
    assert calls == 4 + 4 + 3 + 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [0, 1, 2]}, r"`class_labels` is \[0, 1, 2\], so one call makes 3 samples"),
        ({"class_labels": [0], "latents": torch.zeros(1, 1, 8, 8)}, "every seed would begin at this one noise"),
        ({"class_labels": [0], "sigmas": [1.0, 0.5]}, "`sigmas` is among .* a classical solver runs"),
        ({"class_labels": [0], "timesteps": [999, 500]}, "`timesteps` is among"),
        ({"class_labels": [0], "generator": torch.Generator()}, "`generator` is among .* is set anew"),
        ({"class_labels": [0], "num_inference_steps": 9}, "`num_inference_steps` is among"),
        ({"class_labels": [0], "num_images_per_prompt": 2}, "`num_images_per_prompt` is 2, so one call makes 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_arguments_that_make_another_run_are_refused_with_a_sentence_and_no_call(digits_dit, arguments, message):
    for refuse in (lambda: admit(digits_dit, [arguments], [4]), lambda: check_arguments(digits_dit, arguments)):
        with pytest.raises(UnsuitableCallError, match=message):
            refuse()


def test_a_dict_instead_of_a_list_of_them_is_refused(digits_dit):
    with pytest.raises(TypeError, match=r"`conditions` is a dict, expected a list of such\. Pass `\[{'class_labels'"):
        admit(digits_dit, {"class_labels": [0]}, [4])


def test_one_sample_gets_a_generator_and_not_a_list_of_one(digits_dit):
    given = []

    class Pipeline(DiTPipeline):
        def __call__(self, *args, generator, **kwargs):
            given.append(generator)
            return super().__call__(*args, generator=generator, **kwargs)

    pipe = Pipeline(**digits_dit.components)
    calls = NetworkCalls(pipe)
    for seeds in ([0], [0, 1]):
        PipelineField(pipe, {"class_labels": seeds}, seeds, calls).close()
    calls.remove()
    assert [type(each) for each in given] == [torch.Generator, list]


# Whose schedule runs


def test_a_pipeline_with_a_schedule_of_its_own_is_refused_by_search_and_check():
    """CogView4 passes whole times, whatever it is told."""
    case = build("cogview4")
    message = "sets a schedule of its own on its scheduler"
    with pytest.raises(UnsuitableCallError, match=message):
        admit(case.pipe, [inputs_of("cogview4")], [4])
    process = SearchedSolverScheduler.from_config(case.config).process
    solver = SearchedSolver.adams_bashforth(*time_grid(process, 4), "velocity", 2)
    with pytest.raises(UnsuitableCallError, match=message):
        check_solver(case.pipe, SolverFile({4: solver}, process, "flow_prediction"), [case.inputs] * 5)


class PipelineThatTakesSigmas(diffusers.FluxPipeline):
    """Has other noise levels in mind unless it is told."""

    def __call__(self, *args, num_inference_steps, sigmas=None, **kwargs):
        sigmas = (
            [0.9 - 0.8 * i / num_inference_steps for i in range(num_inference_steps)] if sigmas is None else sigmas
        )
        return super().__call__(*args, num_inference_steps=num_inference_steps, sigmas=sigmas, **kwargs)


def test_where_an_argument_selects_the_table_that_is_said_and_measured(caplog):
    case = build("flux")
    pipe = PipelineThatTakesSigmas(**case.pipe.components)
    trial = try_call(pipe, inputs_of("flux"), 4)
    assert trial.schedule_argument == "sigmas"
    assert [step.index for step in trial.steps] == [0, 1, 2, 3]
    admit(pipe, [inputs_of("flux")], [4])
    assert "only if `sigmas=[1 - i / N for i in range(N)]` is among the arguments" in caplog.text


@pytest.mark.parametrize("name", ["ltx_condition", "ltx_condition_on_an_image"])
def test_a_solvers_timesteps_select_it_where_a_pipeline_passes_them_on(name, caplog):
    """And a check measures it with them; without them it would measure a classical solver."""
    pipe, inputs = build(name).pipe, inputs_of(name)
    admit(pipe, [inputs], [4])
    assert "only if `timesteps=scheduler.solver_file.solvers[N].timesteps.tolist()` is among" in caplog.text
    trial = try_call(pipe, inputs, 4)
    scheduler = SearchedSolverScheduler.from_config(build(name).config, solver=trial.solver)
    states = own_run(pipe, scheduler, {**inputs, "timesteps": trial.solver.timesteps.tolist()}, [0], 4)
    assert torch.equal(states[0], trial.steps[0].sample)
    assert scheduler.sigmas.tolist() == trial.solver.sigmas.astype("float32").tolist()
    process = SearchedSolverScheduler.from_config(build(name).config).process
    twice = replace(trial.solver, coefficients=2 * trial.solver.coefficients, consistent=False)
    good, bad = (
        check_solver(pipe, SolverFile({4: solver}, process, "flow_prediction"), [inputs] * 5)[0].searched
        for solver in (trial.solver, twice)
    )
    assert (good < 0.5 * bad).all()


@pytest.mark.parametrize(
    ("name", "steps"), [("sd15_img2img", "2 to 4"), ("flux_img2img", "3 to 4"), ("sdxl_denoising_end", "1 to 2")]
)
def test_a_call_for_a_part_of_a_run_is_refused(name, steps):
    with pytest.raises(UnsuitableCallError, match=rf"runs only steps {steps} of 4.*text-to-image sibling"):
        admit(build(name).pipe, [inputs_of(name)], [4])


@pytest.mark.parametrize("name", ["sd15_img2img", "flux_img2img", "flux_inpaint"])
def test_an_image_that_is_noised_to_each_solvers_first_node_is_refused(name):
    with pytest.raises(UnsuitableCallError, match="noises to the level of a solver's first node"):
        admit(build(name).pipe, [{**inputs_of(name), "strength": 1.0}], [4])


class CombinedPipeline(DiTPipeline):
    """Hands its work on, as Kandinsky's combined pipelines do."""

    def __init__(self, **parts):
        super().__init__(**parts)
        self.decoder_pipe = DiTPipeline(**parts)

    def __call__(self, *args, **kwargs):
        return self.decoder_pipe(*args, **kwargs)


def test_a_combined_pipeline_is_recognised_without_a_call():
    pipe = CombinedPipeline(**load("digits-dit").components)
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(UnsuitableCallError, match=r"pipelines of its own, `decoder_pipe` \(DiTPipeline\)"):
        admit(pipe, [{"class_labels": [0]}], [4])
    assert not calls


def test_a_trial_leaves_the_pipeline_as_it_was(digits_dit):
    before = dict(vars(digits_dit))
    try_call(digits_dit, {"class_labels": [0]}, 4)
    assert vars(digits_dit) | {"_guidance_scale": None} == before | {"_guidance_scale": None}
