"""Engines: what runs weights or calls a provider, once for every role."""
