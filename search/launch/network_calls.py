"""NetworkCalls: what predictions cost."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline


class NetworkCalls:
    """
    Counts samples that went through a pipeline's network, guidance included.

    An evaluation counts as many as went through the network that ran last. So guidance in one double batch and
    guidance in two calls count the same, two experts that take turns count as one, and what runs beside the denoiser
    (a ControlNet) or before the loop (text encoders, language models) adds nothing. The evaluation that opens a field
    counts.

    Args:
        pipe (`DiffusionPipeline`): Its `torch.nn.Module` components are watched while a field evaluates.
        on_call (*optional*): Is told every number of samples, say to move a progress bar.

    Attributes:
        count (`int`): Samples so far.
    """

    def __init__(self, pipe: DiffusionPipeline, on_call: Callable[[int], object] = lambda samples: None):
        self.count = 0
        self.on_call = on_call
        self._samples: Counter | None = None
        self._last: torch.nn.Module | None = None
        modules = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
        self._removers = [self._watch(module) for module in modules]

    def _watch(self, module: torch.nn.Module) -> Callable[[], object]:
        """Have `_record` told of a module's calls; returns what ends that."""
        compiled = module._compiled_call_impl
        if compiled is None:
            return module.register_forward_pre_hook(self._record, with_kwargs=True).remove

        # `module.compile()` compiles hooks too, and would again at every call because the count has changed.
        def call(*args, **kwargs):
            self._record(module, args, kwargs)
            return compiled(*args, **kwargs)

        module._compiled_call_impl = call
        return lambda: setattr(module, "_compiled_call_impl", compiled)

    def _record(self, module, args, kwargs):
        if self._samples is not None:
            self._samples[module] += next(filter(None, map(_batch_size, (*args, *kwargs.values()))), 1)
            self._last = module

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Count what happens inside as one evaluation."""
        self._samples = Counter()
        try:
            yield
        finally:
            samples, self._samples, self._last = self._samples[self._last], None, None
            if samples:
                self.count += samples
                self.on_call(samples)

    def remove(self):
        """Stop watching."""
        for remove in self._removers:
            remove()
        self._removers = []


def _batch_size(value) -> int:
    """Samples of an input of a network; none if it does not say: whole numbers may be the tokens of one."""
    if isinstance(value, (list, tuple)) and value and torch.is_tensor(value[0]):
        return len(value)
    return len(value) if torch.is_tensor(value) and value.ndim and value.is_floating_point() else 0
