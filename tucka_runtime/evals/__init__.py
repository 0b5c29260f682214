"""Held-out records as questions to a base and its adapters: who is asked, what is right, and the report of it."""
