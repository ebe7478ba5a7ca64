"""A diffusers pipeline as a function of state and time, and runs of solvers over it."""
