"""`python -m tucka_runtime.loadtest.peers`: this server beside others on the same CPU, in one run. docs/loadtest.md"""
