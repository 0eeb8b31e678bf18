# make help lists the targets. RECIPE is a folder in recipes/; ARGS is passed to the command behind the target.
RECIPE ?= tiny
ARGS ?=
PYTHON ?= python3
VLLM ?= $(shell command -v vllm)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help setup test test-quick lint demo pipeline synthesize curate sft distill reward warm rlhf select warp evaluate chat serve
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

setup: $(INSTALLED) ## install everything into .venv (the other targets do this themselves, once)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	@touch $@

test: $(INSTALLED) ## run the tests, two at a time
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal $(ARGS)

test-quick: $(INSTALLED) ## run only the quick tests, after every edit
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

lint: $(INSTALLED) ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

demo: $(INSTALLED) ## the whole chain in the tiny world, on a CPU in minutes; then a report
	@$(BIN)/gemma2-post run recipes/tiny/pipeline.yaml --report $(ARGS)

pipeline: $(INSTALLED) ## all stages of recipes/$(RECIPE), to runs/$(RECIPE)
	@$(BIN)/gemma2-post run recipes/$(RECIPE)/pipeline.yaml --report $(ARGS)

synthesize: $(INSTALLED) ## SFT data written by a teacher: recipes/$(RECIPE) to runs/$(RECIPE)/synthesize
	@$(BIN)/python -m gemma2_post.synthesize --config recipes/$(RECIPE)/synthesize.yaml $(ARGS)

curate: $(INSTALLED) ## data without duplicates, test prompts, personal data: recipes/$(RECIPE) to runs/$(RECIPE)/curate
	@$(BIN)/python -m gemma2_post.curate --config recipes/$(RECIPE)/curate.yaml $(ARGS)

sft: $(INSTALLED) ## supervised fine-tuning: recipes/$(RECIPE) to runs/$(RECIPE)/sft
	@$(BIN)/gemma2-post run recipes/$(RECIPE)/pipeline.yaml --until sft $(ARGS)

distill: $(INSTALLED) ## on-policy distillation of the SFT model (runs sft first if needed)
	@$(BIN)/gemma2-post run recipes/$(RECIPE)/pipeline.yaml --until distill $(ARGS)

reward: $(INSTALLED) ## the reward model (runs sft and distill first if needed: it is measured on their answers)
	@$(BIN)/gemma2-post run recipes/$(RECIPE)/pipeline.yaml --until reward $(ARGS)

warm: $(INSTALLED) ## the mean of reward models that a pipeline has trained: recipes/$(RECIPE)/warm.yaml
	@$(BIN)/python -m gemma2_post.warm --config recipes/$(RECIPE)/warm.yaml $(ARGS)

rlhf: $(INSTALLED) ## the policies, held near their start by an anchor (runs sft, distill and reward first if needed)
	@$(BIN)/gemma2-post run recipes/$(RECIPE)/pipeline.yaml --until rlhf $(ARGS)

select: $(INSTALLED) ## candidates of one stage side by side, the best one chosen: recipes/$(RECIPE)/select.yaml
	@$(BIN)/gemma2-post select recipes/$(RECIPE)/select.yaml $(ARGS)

warp: $(INSTALLED) ## merge the policies, sweep, release (runs the earlier stages first if needed)
	@$(BIN)/gemma2-post run recipes/$(RECIPE)/pipeline.yaml --until warp $(ARGS)

evaluate: $(INSTALLED) ## all models side by side on test prompts (runs the earlier stages first if needed)
	@$(BIN)/gemma2-post run recipes/$(RECIPE)/pipeline.yaml --until evaluate --report $(ARGS)

# The newest finished model of the run.
NEWEST = $(or $(firstword $(foreach s,warp rlhf/policy-0 distill sft,$(patsubst %/stage.json,%,$(wildcard runs/$(RECIPE)/$s/stage.json)))),runs/$(RECIPE)/sft)

runs/$(RECIPE)/sft/stage.json: | $(INSTALLED)
	@$(BIN)/gemma2-post run recipes/$(RECIPE)/pipeline.yaml --until sft

chat: $(INSTALLED) runs/$(RECIPE)/sft/stage.json ## talk to the newest model of runs/$(RECIPE) (runs sft first if there is none)
	@$(BIN)/gemma2-post chat $(NEWEST) $(ARGS)

serve: $(INSTALLED) runs/$(RECIPE)/sft/stage.json ## serve the newest model with an OpenAI-compatible API, http://localhost:8000/v1
	@if [ -n "$(VLLM)" ]; then \
		echo "$(NEWEST), served by vLLM ($(VLLM))"; \
		exec $(VLLM) serve $(NEWEST) --dtype bfloat16 --host localhost --port 8000 $(ARGS); \
	else \
		echo "$(NEWEST), served by transformers; vLLM is not installed (VLLM=PROGRAM names one elsewhere)"; \
		exec $(BIN)/transformers serve $(NEWEST) --attn-implementation eager --host localhost $(ARGS); \
	fi
