"""Class-conditional sampling with SiT, FlowDCN and DiT, in the conventions of diffusers' schedulers."""

import inspect
from collections.abc import Callable

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..configs import process_from_config
from ..models import FlowDCNTransformer2DModel, SiTTransformer2DModel


_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ClassToImagePipeline(DiffusionPipeline):
    r"""
    Pipeline for class-conditional image generation with SiT, FlowDCN (flow matching) or DiT (noise prediction).

    These networks and the schedulers of diffusers meet here: at timestep T of the scheduler, of its
    `num_train_timesteps` (mostly 1000), the network is called at time t and the scheduler is handed m,

        SiT, FlowDCN    t = 1 - T / num_train_timesteps    m = -net(x, t), noise - data
        DiT             t = T                              m = net(x, t), noise; a learned variance is dropped

    With guidance of scale s, m is m_null + s (m_class - m_null) on the guided channels, and m_class on the others.

    A saved pipeline is loaded by `ClassToImagePipeline.from_pretrained(folder)`. `DiffusionPipeline.from_pretrained`
    looks for the class in diffusers and ends in an `AttributeError`; and diffusers loads networks of other packages
    from folders alone, so download one from the Hub first, with `huggingface_hub.snapshot_download`.

    Args:
        transformer ([`SiTTransformer2DModel`] or [`FlowDCNTransformer2DModel`]): The network. DiT is the former with
            `prediction_type="epsilon"`.
        scheduler ([`SchedulerMixin`]): Any scheduler of the network's prediction type: for SiT and FlowDCN one that
            runs from pure noise at T = `num_train_timesteps` to data and takes noise - data, such as
            `FlowMatchEulerDiscreteScheduler`; for DiT one that takes noise on DDPM's process, such as `DDIMScheduler`.
        vae ([`AutoencoderKL`], *optional*): Decodes latents to images. `None` if the network makes images itself.
        id2label (`dict[int, str]`, *optional*): Names of the classes; several names of one class are separated by
            commas. Available as `pipe.labels`, from name to id.
        guidance_channels (`int`, *optional*): How many leading channels guidance acts on, unless a call says
            otherwise. 3 is what the official SiT and DiT samplers do. `None` means all, as FlowDCN's sampler and the
            flow models of the solver search paper.

    Raises:
        `ValueError`: If `guidance_channels` is not between 1 and the channels of the transformer.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: SiTTransformer2DModel | FlowDCNTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict | None = None,
        guidance_channels: int | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label, guidance_channels=guidance_channels)
        self._check_guidance(guidance_channels, None)
        self.image_processor = VaeImageProcessor()
        names = ((name.strip(), int(i)) for i, label in (id2label or {}).items() for name in label.split(","))
        self.labels = dict(sorted(names))

    @property
    def prediction_type(self) -> str:
        """What the network predicts: `"flow_prediction"` (SiT, FlowDCN) or `"epsilon"` (DiT)."""
        return self.transformer.config.get("prediction_type", "flow_prediction")

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        guidance_scale: float = 4.0,
        guidance_channels: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["ClassToImagePipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate one image for each entry of `class_labels`.

        Args:
            class_labels (`int`, `str` or `list`): Class ids or names (see `pipe.labels`), one for each image.
            guidance_scale (`float`, defaults to 4.0): Scale s of classifier-free guidance. Values of at most 1 turn it
                off, and the network is then called on the batch alone instead of on twice the batch.
            guidance_channels (`int`, *optional*): How many leading channels guidance acts on. Defaults to
                `pipe.config.guidance_channels`, and to all of them if that is `None`.
            guidance_interval (`tuple[float, float]`, *optional*): Guide only while T / `num_train_timesteps` (0 is
                data, 1 is noise; sigma of a flow) lies between these two, ends included; elsewhere s is 1. Defaults
                to everywhere.
            height, width (`int`, *optional*): Size of the images in pixels; by default that of the network's
                `sample_size`, which is the only one that SiT and DiT have. FlowDCN takes multiples of its tokens.
            num_inference_steps (`int`, defaults to 50): Number of steps of the scheduler.
            timesteps, sigmas (`list[float]`, *optional*): A schedule to use in place of `num_inference_steps`, for
                schedulers that take one.
            generator (`torch.Generator` or a list of one for each image, *optional*): Source of the initial noise, and
                of the noise that a stochastic scheduler adds.
            latents (`torch.Tensor` of shape `(batch, channels, rows, columns)`, *optional*): The initial noise itself,
                of unit variance.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the last latents as
                they are.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, tensors)` after
                each step; the latents in the dict that it returns replace those of the loop.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): Which tensors it is given.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with the images alone.

        Raises:
            `ValueError`: If a label is unknown, an argument is not one of its possible values, or the scheduler does
                not fit the network or takes no such schedule.
        """
        self._check_scheduler()
        self._check_guidance(guidance_channels, guidance_interval)
        self._check_outputs(output_type, callback_on_step_end_tensor_inputs)
        device = self._execution_device
        class_labels = torch.tensor(self.get_label_ids(class_labels), device=device)
        shape = (len(class_labels), self.transformer.config.in_channels, *self._latent_size(height, width))
        channels = guidance_channels or self.config.guidance_channels or shape[1]

        self._set_timesteps(num_inference_steps, timesteps, sigmas, device)
        latents = self._prepare_latents(latents, shape, generator, device)
        stochastic = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if stochastic else {}
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            scale = guidance_scale if self._is_guided_at(t, guidance_interval) else 1.0
            model_output = self._predict(latents, t, class_labels, scale, channels)
            latents = self.scheduler.step(model_output, t, latents, **step_kwargs, return_dict=False)[0]
            if callback_on_step_end is not None:
                tensors = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
                latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)

        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def get_label_ids(self, labels: int | str | list[int | str]) -> list[int]:
        r"""
        Map class names to class ids; ids stay as they are.

        Args:
            labels (`int`, `str` or `list`): Names of `pipe.labels`, or ids from 0 to `num_classes`, where the last is
                the null class.

        Returns:
            `list[int]`: The ids.

        Raises:
            `ValueError`: If a name or an id does not exist.
        """
        num_classes = self.transformer.config.num_classes
        ids = []
        for label in [labels] if isinstance(labels, (int, str)) else labels:
            ids.append(self.labels.get(label, -1) if isinstance(label, str) else int(label))
            if not 0 <= ids[-1] <= num_classes:
                some = ", ".join(list(self.labels)[:10]) or "none"
                raise ValueError(
                    f"`class_labels` has {label!r}, expected an id from 0 to {num_classes - 1}, {num_classes} for the"
                    f" null class, or one of the {len(self.labels)} names of `pipe.labels` (the first are: {some})."
                )
        return ids

    def _predict(self, latents, timestep, class_labels, guidance_scale, channels) -> torch.Tensor:
        """Return m of the class docstring, guided if the scale is above 1."""
        x = latents
        if hasattr(self.scheduler, "scale_model_input"):
            x = self.scheduler.scale_model_input(x, timestep)
        if guidance_scale > 1:
            null = torch.full_like(class_labels, self.transformer.config.num_classes)
            x, class_labels = torch.cat([x, x]), torch.cat([class_labels, null])
        flow = self.prediction_type == "flow_prediction"
        t = torch.as_tensor(timestep, dtype=torch.float32, device=x.device).expand(len(x))
        t = 1 - t / self.scheduler.config.num_train_timesteps if flow else t
        output = self.transformer(x.to(self.transformer.dtype), t, class_labels, return_dict=False)[0]
        m = -output if flow else output[:, : latents.shape[1]]
        if guidance_scale <= 1:
            return m

        m_class, m_null = m.chunk(2)
        guided = m_null + guidance_scale * (m_class - m_null)
        return torch.cat([guided[:, :channels], m_class[:, channels:]], dim=1)

    def _is_guided_at(self, timestep, interval) -> bool:
        if interval is None:
            return True
        low, high = interval
        return low <= float(timestep) / self.scheduler.config.num_train_timesteps <= high

    def _set_timesteps(self, num_inference_steps, timesteps, sigmas, device):
        schedule = {"timesteps": timesteps, "sigmas": sigmas}
        schedule = {name: value for name, value in schedule.items() if value is not None}
        schedule = schedule or {"num_inference_steps": num_inference_steps}
        unknown = schedule.keys() - inspect.signature(self.scheduler.set_timesteps).parameters
        if unknown:
            raise ValueError(
                f"`{unknown.pop()}` was passed, but {type(self.scheduler).__name__} takes no such schedule. Pass"
                " `num_inference_steps`, or use a scheduler that does."
            )
        self.scheduler.set_timesteps(**schedule, device=device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        config = self.transformer.config
        factor = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        default, token = config.sample_size * factor, config.patch_size * factor
        size = [default if pixels is None else pixels for pixels in (height, width)]
        if isinstance(self.transformer, SiTTransformer2DModel):
            fits, expected = size == [default, default], f"{default} each, the only size of this network"
        else:
            fits, expected = all(p > 0 and p % token == 0 for p in size), f"positive multiples of {token}"
        if not fits:
            raise ValueError(
                f"`height` and `width` are {size[0]} and {size[1]}, expected {expected}. Pass such values, or leave"
                " them out."
            )
        return size[0] // factor, size[1] // factor

    def _prepare_latents(self, latents, shape, generator, device) -> torch.Tensor:
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(
                f"`latents` has shape {tuple(latents.shape)}, expected {shape}: one noise for each of the {shape[0]}"
                " class labels. Pass noise of that shape, or leave `latents` out."
            )
        latents = latents.to(device=device, dtype=self.transformer.dtype)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _decode(self, latents: torch.Tensor, output_type: str):
        images = latents
        if self.vae is not None:
            shift = self.vae.config.get("shift_factor") or 0.0
            latents = latents / self.vae.config.scaling_factor + shift
            images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(images, output_type)

    def _check_scheduler(self):
        config, name, ours = self.scheduler.config, type(self.scheduler).__name__, self.prediction_type
        process_from_config(config)
        prediction = config.get("prediction_type", "flow_prediction")
        use_flow_sigmas = config.get("use_flow_sigmas", prediction == "flow_prediction")
        flow = ours == "flow_prediction"
        if prediction != ours or use_flow_sigmas != flow:
            one = "`FlowMatchEulerDiscreteScheduler()`" if flow else "`DDIMScheduler()`"
            raise ValueError(
                f"The scheduler is a {name} with `prediction_type` {prediction!r} and `use_flow_sigmas`"
                f" {use_flow_sigmas}, but this {type(self.transformer).__name__} is a model of `prediction_type`"
                f" {ours!r}. Use {one}, or a {name} made with `prediction_type={ours!r}` and"
                f" `use_flow_sigmas={flow}` if it has these."
            )

    def _check_guidance(self, channels: int | None, interval: tuple[float, float] | None):
        in_channels = self.transformer.config.in_channels
        if channels is not None and not 1 <= channels <= in_channels:
            raise ValueError(
                f"`guidance_channels` is {channels}, expected 1 to {in_channels}, the channels of the transformer."
                " Pass 3 for what the official SiT and DiT do, or leave it out for the pipeline's own."
            )
        if interval is not None and not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
            raise ValueError(
                f"`guidance_interval` is {interval}, expected two numbers from 0 (data) to 1 (noise), the smaller one"
                " first. Pass such a pair, or leave it out to guide everywhere."
            )

    def _check_outputs(self, output_type: str, callback_tensors: list[str]):
        if output_type not in _OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}. Pass one of {', '.join(map(repr, _OUTPUT_TYPES))}.")
        in_channels = self.transformer.config.in_channels
        if output_type == "pil" and self.vae is None and in_channels not in (1, 3):
            raise ValueError(
                f"`output_type` is 'pil', but this pipeline has no `vae` and makes {in_channels} channels, expected 1"
                " or 3 for an image. Pass `output_type='latent'`, or load a `vae`."
            )
        unknown = set(callback_tensors) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}, expected a part of"
                f" {self._callback_tensor_inputs}. Leave out what is not in that list."
            )
