"""Real vLLM on a ring-jax model: export, a child process that runs it, and the proof that it holds the right weights."""
