"""Noises with the ends that a many-step run of the same pipeline reaches from them."""
