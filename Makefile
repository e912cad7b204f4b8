# The commands a newcomer needs. Each sets up what it uses: Python >= 3.11 and the package index are enough for demo and test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BUILDER ?= docker
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
LAB := $(PYTHON) tests/lab/lab.py
IN_CLUSTER := $(if $(KUBECONFIG),,$(LAB) run)
# one measures times, the other changes what the node offers
ALONE := tests/e2e/test_startup.py tests/e2e/test_waiting.py
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt

.PHONY: help demo test test-readme test-vllm test-vllm-short test-vllm-kills test-trackers test-ui architectures test-storage test-storage-kills test-cluster test-devices e2e e2e-long e2e-storage e2e-integrations e2e-devices e2e-replicas e2e-using bench soak gpu lint docs pictures generate images image-ui lab-up lab-deploy lab-down lab-status clean
help:            ## list the commands
	@grep -E '^[a-z0-9 -]+: .*##' $(MAKEFILE_LIST) | sed -E 's/: .*## /\t/' | expand -t 16

demo: $(VENV)/.demo            ## train a tiny model here: SFT, then GRPO; no cluster, nothing downloaded at run time
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev            ## unit tests; needs no cluster and no GPU
	$(BIN)/python -m pytest -n auto --dist loadfile

architectures: $(VENV)/.dev            ## every causal model type of transformers against its plain model; writes docs/models.md
	rm -rf build/architectures
	$(UV) --no-deps --target build/timm timm torchvision  # one type's picture tower; beside, so that nothing else imports it
	PYTHONPATH=build/timm NEMO_RL_ARCHITECTURES=build/architectures $(BIN)/python -m pytest -n 2 tests/architectures; found=$$?; \
	$(BIN)/python tests/architectures/table.py build/architectures && exit $$found

test-storage: $(VENV)/.dev            ## models, data and runs in a real S3 server (built once from its Go module)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/storage

test-storage-kills: $(VENV)/.dev            ## runs in a store, killed 20 times in the midst of a save and 20 times at any moment (SEED=…); each fault of a store at four moments of a run
	NEMO_RL_TEST_KILLS=20 NEMO_RL_TEST_SEED=$(or $(SEED),17) $(BIN)/python -m pytest tests/storage/test_runs.py -k "kills or each_fault"

test-cluster: $(VENV)/.dev            ## the operator against a real API server (built once from Go modules, or KUBECONFIG)
	$(BIN)/python -m pytest $(if $(NEMO_RL_TEST_KUBECONFIG),,-n 2 --dist loadfile) tests/cluster

test-devices: $(VENV)/.dev            ## devices by claims (DRA): a real scheduler and Kubernetes' own test driver (built once from Go modules); no root
	$(BIN)/python -m pytest tests/devices/test_scheduler.py

e2e: $(VENV)/.dev            ## jobs in real pods: in the lab (root, Linux, Go), or in the cluster of KUBECONFIG with the operator in it
ifndef KUBECONFIG
	$(LAB) up
	$(LAB) deploy
endif
	$(IN_CLUSTER) $(BIN)/python -m pytest $(ALONE)
	$(IN_CLUSTER) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not store_examples and not long" $(ALONE:%=--ignore %) tests/e2e

e2e-long: $(VENV)/.dev            ## the jobs in real pods that take minutes each, which make e2e leaves out
ifndef KUBECONFIG
	$(LAB) up
	$(LAB) deploy
endif
	$(IN_CLUSTER) $(BIN)/python -m pytest -n 2 --dist loadfile -m long tests/e2e

e2e-storage: $(VENV)/.dev            ## the documented examples as jobs with model, data and output in a real S3 server, in the lab or the cluster of KUBECONFIG
ifndef KUBECONFIG
	$(LAB) up
	$(LAB) deploy
endif
	$(IN_CLUSTER) $(BIN)/python -m pytest -m store_examples tests/e2e/test_store.py

e2e-integrations: $(VENV)/.dev            ## real Kueue, Prometheus and kube-network-policies (compiled once from Go modules): queues, alerts, who reaches whom
	$(BIN)/python -m pytest tests/integrations
	$(LAB) up
	$(LAB) deploy
	$(LAB) run $(BIN)/python -m pytest tests/enforced

e2e-devices: $(VENV)/.dev            ## a job with every field that the policy can allow and a device by a claim (DRA), in the lab
	$(LAB) up
	$(LAB) deploy
	$(LAB) run $(BIN)/python -m pytest tests/devices/test_claims.py

e2e-replicas: $(VENV)/.dev            ## rollout replicas in the lab: real pods with a real vLLM on the CPU (6 GB, made once)
	$(LAB) up
	$(LAB) deploy --replicas
	$(LAB) run $(BIN)/python -m pytest tests/replicas

e2e-using: $(VENV)/.dev            ## jobs as people use them, in the lab: chat and eval by a job's name, the web page's image and Deployment in a browser
	$(LAB) up
	$(LAB) deploy
	$(BIN)/python nemo_rl/ui/libraries.py nemo_rl/ui/vendor
	$(LAB) image localhost/nemo-rl-ui:$(VERSION) . --file trainer_image/ui.Dockerfile --build-arg BASE=localhost/python:3.11
	$(LAB) run $(BIN)/python tests/ui/environment.py -m pytest tests/using

test-readme: $(VENV)/.dev            ## each command and snippet of the README, in a fresh clone and fresh environments
	$(BIN)/python -m pytest tests/readme

test-vllm: $(VENV)/.dev            ## rollouts by a real vLLM server on the CPU, in an environment of its own (made once, about 6 GB)
	$(BIN)/python tests/real_vllm/environment.py
	$(BIN)/python -m pytest tests/real_vllm

test-vllm-short: $(VENV)/.dev            ## of these the faults that the gate must catch, agreement of all tokens, and a run
	$(BIN)/python tests/real_vllm/environment.py
	$(BIN)/python -m pytest -m vllm_short tests/real_vllm

test-vllm-kills: $(VENV)/.dev            ## vLLM and the trainer, each killed 20 times at moments drawn by SEED=…: the run goes on
	$(BIN)/python tests/real_vllm/environment.py
	NEMO_RL_TEST_KILLS=20 NEMO_RL_TEST_SEED=$(or $(SEED),17) $(BIN)/python -m pytest -s tests/real_vllm/test_kills.py

test-trackers: $(VENV)/.dev            ## W&B, MLflow and Trackio without a network, in an environment of their own (made once, 0.4 GB)
	$(BIN)/python tests/trackers/environment.py -m pytest tests/trackers

test-ui: $(VENV)/.dev            ## the web page in a real browser (Debian: chromium), in an environment of its own (made once, 0.2 GB)
	$(BIN)/python tests/ui/environment.py -m pytest tests/ui

bench: $(VENV)/.dev            ## speed and memory as ratios against TRL
	$(BIN)/python benchmarks/engine.py

soak: $(VENV)/.dev            ## a long life of the control plane under faults (MINUTES=120 JOBS=5000); writes benchmarks/results/soak.md
	$(BIN)/python benchmarks/soak.py --minutes $(or $(MINUTES),120) --jobs $(or $(JOBS),5000)

gpu: $(VENV)/.dev            ## what a GPU must prove, in at most eight minutes on one card; writes benchmarks/results/gpu-<card>.md
	$(BIN)/python benchmarks/gpu.py

lint: $(VENV)/.dev            ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev            ## the documentation as a site in site/; a warning is an error
	$(BIN)/mkdocs build --strict

pictures: $(VENV)/.dev            ## the pictures of the documentation anew: trains the tutorial's example, then Debian's chromium takes them
	$(BIN)/python tests/ui/environment.py docs/pictures.py

generate: $(VENV)/.dev            ## write every generated file anew: crds/, deploy/base, docs/reference, tables of the README
	$(BIN)/python tests/generated.py

images:            ## the images of trainer, operator and rollout replicas, with docker or another builder (BUILDER=...)
	$(BUILDER) build -f trainer_image/Dockerfile -t nemo-rl-trainer:$(VERSION) .
	$(BUILDER) build -f trainer_image/operator.Dockerfile -t nemo-rl-operator:$(VERSION) .
	$(BUILDER) build -f trainer_image/rollout.Dockerfile -t nemo-rl-rollout:$(VERSION) .

image-ui: $(VENV)/.dev            ## the image of the web page (ui of the chart); npm fetches its libraries first
	$(BIN)/python nemo_rl/ui/libraries.py nemo_rl/ui/vendor
	$(BUILDER) build -f trainer_image/ui.Dockerfile -t nemo-rl-ui:$(VERSION) .

lab-up lab-deploy lab-down lab-status:            ## a real single-node Kubernetes on this machine (root, Linux, Go)
	$(LAB) $(@:lab-%=%)

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "nemo-rl needs Python >= 3.11, found $$($(PYTHON) --version); say PYTHON=python3.11 (or newer)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/uv
	$(UV) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/uv
	$(UV) -e '.[dev]'
	@touch $@ $(VENV)/.demo

clean:            ## remove the virtual environment and outputs of the demo
	rm -rf $(VENV) outputs/demo
