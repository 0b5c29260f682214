"""`tucka loadtest conform`: what any OpenAI-compatible server's adapters are held to, from outside. docs/conform.md"""
