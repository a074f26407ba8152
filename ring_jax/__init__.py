"""Reinforcement learning of mixture-of-experts models."""
