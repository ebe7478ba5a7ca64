"""The fitter: damped Gauss-Newton on the teacher's ends, from the best known tables on."""
