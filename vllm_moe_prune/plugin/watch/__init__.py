"""Watching a served model: routing load, routes in vLLM's server."""
