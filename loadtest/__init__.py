"""Load tester for OpenAI-compatible servers with many adapters: `tucka loadtest --help`, docs/loadtest.md.

It speaks HTTP only and imports nothing of the server or the engine.
"""
