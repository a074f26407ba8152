"""How fast the engine prefills and decodes, beside vLLM and transformers; `python -m rollout.bench` (__main__.py)."""
