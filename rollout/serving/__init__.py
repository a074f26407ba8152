"""Servers of one engine: an OpenAI-compatible HTTP front and JetStream's gRPC service (docs/serving.md)."""
