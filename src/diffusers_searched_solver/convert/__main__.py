"""`python -m diffusers_searched_solver.convert`."""

from . import main


main()
