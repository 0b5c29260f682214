# The commands of every day. `make` alone lists them.
.PHONY: help install test lint bench serve
help:
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile

install: ## make .venv with all that the tests need
	sh deploy/install.sh test

test: ## the whole suite, some ten minutes on two cores
	.venv/bin/python -m pytest -n 2 --dist loadfile

lint: ## ruff and the type check, as CI runs them
	sh deploy/lint.sh

bench: ## what adapters cost the engine on this machine
	.venv/bin/python -m tucka_runtime.bench

serve: ## the embedded model and its adapters on port 8000
	.venv/bin/tucka serve
