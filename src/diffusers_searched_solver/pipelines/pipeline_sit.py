"""Class-conditional sampling of SiT, in the flow convention of diffusers' schedulers."""

from collections.abc import Callable

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from ..models.sit_transformer_2d import SiTTransformer2DModel


_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class SiTPipeline(DiffusionPipeline):
    r"""
    Pipeline for class-conditional image generation with SiT.

    SiT and the schedulers of diffusers count time in opposite directions. This pipeline is where they meet: at
    timestep 1000 sigma of the scheduler it calls the network with

        t = 1 - sigma,    and hands the scheduler    m = -net(x, t)

    where x = t * data + (1 - t) * noise, net predicts data - noise, and m = noise - data is the model output of
    every flow scheduler of diffusers. With guidance of scale s, m is m_null + s (m_class - m_null) on the guided
    channels, and m_class on the others.

    Args:
        transformer ([`SiTTransformer2DModel`]): The network.
        scheduler ([`FlowMatchEulerDiscreteScheduler`]): Any scheduler for flow matching, i.e. one that starts at pure
            noise, has timesteps 1000 sigma and takes noise - data.
        vae ([`AutoencoderKL`], *optional*): Decodes latents to images. `None` if the network makes images itself.
        id2label (`dict[int, str]`, *optional*): Names of the classes; several names of one class are separated by
            commas. Available as `pipe.labels`, from name to id.
        guidance_channels (`int`, *optional*): How many leading channels guidance acts on, unless a call says
            otherwise. 3 is what the official SiT and DiT samplers do. `None` means all, as in the solver search paper.

    Raises:
        `ValueError`: If `guidance_channels` is not between 1 and the channels of the transformer.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: SiTTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | None = None,
        id2label: dict | None = None,
        guidance_channels: int | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label, guidance_channels=guidance_channels)
        self._check_guidance_channels(guidance_channels)
        self.image_processor = VaeImageProcessor()
        names = ((name.strip(), int(i)) for i, label in (id2label or {}).items() for name in label.split(","))
        self.labels = dict(sorted(names))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str],
        guidance_scale: float = 4.0,
        guidance_channels: int | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SiTPipeline", int, torch.Tensor, dict], dict] | None = None,
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
            num_inference_steps (`int`, defaults to 50): Number of steps of the scheduler.
            generator (`torch.Generator` or a list of one for each image, *optional*): Source of the initial noise.
            latents (`torch.Tensor` of shape `(batch, channels, size, size)`, *optional*): The initial noise itself.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"`, or `"latent"` for the last latents as
                they are.
            return_dict (`bool`, defaults to `True`): Whether to return an output object instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, tensors)` after
                each step; the latents in the dict that it returns replace those of the loop.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): Which tensors it is given.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with the images alone.

        Raises:
            `ValueError`: If a label is unknown, `latents` has another shape, `guidance_channels`, `output_type` or
                `callback_on_step_end_tensor_inputs` is not one of the possible values, or the scheduler is not one
                for flow matching.
        """
        self._check_scheduler()
        self._check_guidance_channels(guidance_channels)
        self._check_outputs(output_type, callback_on_step_end_tensor_inputs)
        device = self._execution_device
        class_labels = torch.tensor(self.get_label_ids(class_labels), device=device)
        latents = self._prepare_latents(latents, len(class_labels), generator, device)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_output = self._predict(latents, t, class_labels, guidance_scale, guidance_channels)
            latents = self.scheduler.step(model_output, t, latents, return_dict=False)[0]
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
            if isinstance(label, str) and label not in self.labels:
                some = ", ".join(list(self.labels)[:10]) or "none"
                raise ValueError(
                    f"`class_labels` has the name {label!r}, which is not among the {len(self.labels)} names of"
                    f" `pipe.labels` (the first are: {some}). Pass one of those, or a class id from 0 to"
                    f" {num_classes - 1}."
                )
            ids.append(self.labels[label] if isinstance(label, str) else int(label))
            if not 0 <= ids[-1] <= num_classes:
                raise ValueError(
                    f"`class_labels` has the id {ids[-1]}, expected 0 to {num_classes - 1}, or {num_classes} for the"
                    " null class. Pass an id in that range, or a name of `pipe.labels`."
                )
        return ids

    def _predict(self, latents, timestep, class_labels, guidance_scale, guidance_channels) -> torch.Tensor:
        """Return noise - data as the network sees it, guided."""
        x = latents
        if hasattr(self.scheduler, "scale_model_input"):
            x = self.scheduler.scale_model_input(x, timestep)
        if guidance_scale > 1:
            null = torch.full_like(class_labels, self.transformer.config.num_classes)
            x, class_labels = torch.cat([x, x]), torch.cat([class_labels, null])
        t = 1 - torch.as_tensor(timestep, dtype=torch.float32) / self.scheduler.config.num_train_timesteps
        t = t.to(x.device).expand(len(x))
        m = -self.transformer(x.to(self.transformer.dtype), t, class_labels, return_dict=False)[0]
        if guidance_scale <= 1:
            return m

        channels = guidance_channels or self.config.guidance_channels or m.shape[1]
        m_class, m_null = m.chunk(2)
        guided = m_null + guidance_scale * (m_class - m_null)
        return torch.cat([guided[:, :channels], m_class[:, channels:]], dim=1)

    def _prepare_latents(self, latents, batch_size, generator, device) -> torch.Tensor:
        config = self.transformer.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(
                f"`latents` has shape {tuple(latents.shape)}, expected {shape}: one noise for each of the"
                f" {batch_size} class labels. Pass noise of that shape, or leave `latents` out."
            )
        return latents.to(device=device, dtype=self.transformer.dtype)

    def _decode(self, latents: torch.Tensor, output_type: str):
        images = latents
        if self.vae is not None:
            shift = self.vae.config.get("shift_factor") or 0.0
            latents = latents / self.vae.config.scaling_factor + shift
            images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(images, output_type)

    def _check_scheduler(self):
        prediction = self.scheduler.config.get("prediction_type", "flow_prediction")
        if prediction != "flow_prediction" or self.scheduler.config.get("use_flow_sigmas") is False:
            name = type(self.scheduler).__name__
            raise ValueError(
                f"The scheduler is a {name} with `prediction_type` {prediction!r} and `use_flow_sigmas`"
                f" {self.scheduler.config.get('use_flow_sigmas')}, but SiT is a flow matching model. Use"
                f" `FlowMatchEulerDiscreteScheduler()`, or a {name} made with `prediction_type='flow_prediction'` and"
                " `use_flow_sigmas=True` if it has these."
            )

    def _check_guidance_channels(self, channels: int | None):
        in_channels = self.transformer.config.in_channels
        if channels is not None and not 1 <= channels <= in_channels:
            raise ValueError(
                f"`guidance_channels` is {channels}, expected 1 to {in_channels}, the channels of the transformer."
                " Pass 3 for what the official SiT does, or leave it out for the pipeline's own."
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
