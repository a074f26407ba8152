"""The loops: cold start and RL, and what a person sees of them."""
