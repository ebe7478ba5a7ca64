"""FeatureNetwork: what images are compared by, Inception or a network of the user's own."""

import importlib.util
from pathlib import Path

import torch


INCEPTION, NONE = "inception", "none"


class FeatureNetwork:
    """
    A network that makes features of images, and perhaps class probabilities.

    Args:
        source (`str`): "inception", the network that published FIDs are measured with (torch-fidelity's, which
            downloads its weights); a Python file with a function `feature_network` that returns a `torch.nn.Module`;
            or a TorchScript file; or "none". The module is called with images (n, 3, h, w), uint8, and returns
            features (n, d), or a pair of features and logits (n, classes).
        device (`torch.device`): Where it runs.

    Raises:
        ValueError: If there is no such network, or it cannot be loaded.
    """

    def __init__(self, source: str, device: torch.device):
        self.source, self._device = source, device
        try:
            self._module = None if source == NONE else _load(source).to(device).eval()
        except Exception as error:
            raise ValueError(
                f"The feature network '{source}' cannot be loaded: {type(error).__name__}: {error}. {_advice(source)}"
            ) from error

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        What the network says of images.

        Args:
            images (`torch.Tensor`): Of shape (n, 1 or 3, h, w), in [0, 1]; rounded to bytes, as in a file.

        Returns:
            `features` (n, d) and perhaps `logits` (n, classes), float32 on the CPU; nothing if there is no network.

        Raises:
            ValueError: If the network fails, or returns something else.
        """
        if self._module is None:
            return {}
        levels = (255 * images.to(self._device)).round().to(torch.uint8).expand(-1, 3, -1, -1)
        try:
            outputs = self._module(levels)
        except Exception as error:
            raise ValueError(
                f"The feature network '{self.source}' failed on images of shape {tuple(levels.shape)}, uint8: "
                f"{type(error).__name__}: {error}. It has to resize and scale them itself."
            ) from error
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        if not 1 <= len(outputs) <= 2 or not all(_is_rows(output, len(images)) for output in outputs):
            found = ", ".join(str(tuple(getattr(output, "shape", ()))) for output in outputs)
            raise ValueError(
                f"The feature network '{self.source}' returned shapes {found} for {len(images)} images, or numbers "
                "that are not finite. Expected features of shape (n, d), or these and logits of shape (n, classes)."
            )
        return {name: rows.float().cpu() for name, rows in zip(("features", "logits"), outputs, strict=False)}


def _is_rows(output, count: int) -> bool:
    return torch.is_tensor(output) and output.ndim == 2 and len(output) == count and bool(output.isfinite().all())


def _load(source: str) -> torch.nn.Module:
    if source == INCEPTION:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # needs torchvision

        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    if Path(source).suffix != ".py":
        return torch.jit.load(source, map_location="cpu")
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.feature_network()


def _advice(source: str) -> str:
    if source == INCEPTION:
        return (
            "It needs `pip install torch-fidelity`, a torchvision that fits the installed torch, and the Internet for "
            "its weights. Or pass a network of your own as --feature-network."
        )
    return "Expected 'inception', 'none', a Python file with a function `feature_network`, or a TorchScript file."
