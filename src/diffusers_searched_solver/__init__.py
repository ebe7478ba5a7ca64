"""Few-step sampling for diffusers pipelines with solvers that were searched instead of derived."""
