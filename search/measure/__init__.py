"""How far solvers end from the teacher, and how like their images are, on noises that nothing was fitted to."""
