# demo, test, faults, soak and bench need Go and nothing else; race needs a C compiler, fuzz bash, benchcmp and benchgate git.
# `make help` explains them.

GO        ?= go
TESTFLAGS ?=
FUZZTIME  ?= 30s
DEMOFLAGS ?=
BENCHFLAGS ?=
RIVALFLAGS ?=
GATEFLAGS ?=
WORDLIMIT ?= 1

# Each module is built as its go.mod says. Without this, go.work would give all of them the newest version that one requires.
export GOWORK := off

# The files that `make generate` writes. `make checkgenerate` deletes the first two before it compares. In the documents the
# generator replaces the text between its markers.
GENERATED := frame_gen.go testdata/vectors.json docs/PROTOCOL.md docs/DESIGN.md

# Adapters for users, each a module of its own.
ADAPTERS := streamgrpc streamnet streamotel streamprom typed/protocodec typed/cborcodec

# Parts of this repository that need a NATS server, which the library's users do not get. Users may import streamtest.
SERVED := streamtest tests fuzz bench examples

# The race detector watches these, and the library. The adapters among them have goroutines of their own.
CONCURRENT := $(SERVED) streamnet streamnet/interop streamgrpc

# All modules below that of the library. Their requirements stay out of the library's go.mod. Tests and checks cover them too.
MODULES := $(SERVED) $(ADAPTERS) streamnet/interop streamprom/grafana bench/rivals bench/gate

.DEFAULT_GOAL := help
.PHONY: help demo test race faults soak lint wordcheck generate checkgenerate apicheck bench benchcmp benchgate rivals fuzz

help: ## Show this text
	@echo 'Usage: make TARGET [VARIABLE=value]'
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo 'Variables: GO (the go command), TESTFLAGS (for test and race), DEMOFLAGS, BENCHFLAGS, RIVALFLAGS, GATEFLAGS, FUZZTIME, WORDLIMIT, BASE.'

demo: ## Stream real files through an embedded NATS server and compare both ends; DEMOFLAGS='-n 8 -repeat 50'
	cd examples && $(GO) run ./demo $(DEMOFLAGS)

test: ## Run all tests; TESTFLAGS=-short for fewer rounds of the same tests
	$(GO) test -shuffle=on -timeout=10m $(TESTFLAGS) ./...
	@set -e; for m in $(MODULES); do echo "tests of $$m"; (cd $$m && $(GO) test -shuffle=on -timeout=10m $(TESTFLAGS) ./...); done

race: ## Run the tests under the race detector, without adapters that start no goroutine (needs a C compiler)
	$(GO) test -race -shuffle=on -timeout=20m $(TESTFLAGS) ./...
	@set -e; for m in $(CONCURRENT); do echo "tests of $$m"; (cd $$m && $(GO) test -race -shuffle=on -timeout=20m $(TESTFLAGS) ./...); done

faults: ## Run the tests under faults of networks and servers as often as a release needs (more than an hour)
	cd tests && STREAM_FAULTS=full $(GO) test -timeout=120m $(TESTFLAGS) ./faults
	STREAM_FAULTS=full $(GO) test -timeout=60m $(TESTFLAGS) -run '^TestModel$$' .

soak: ## Open, use and close a million streams, in turn and 64 at a time (a few minutes)
	cd tests && STREAM_SOAK=1 $(GO) test -v -run '^TestSoak(Sequential|Concurrent)LeavesNothing$$' -timeout=30m .

lint: wordcheck ## Check formatting, go vet, staticcheck, complexity and words of comments
	@out="$$("$$($(GO) env GOROOT)/bin/gofmt" -l .)"; if [ -n "$$out" ]; then echo "not formatted, run gofmt -w on:"; echo "$$out"; exit 1; fi
	$(GO) mod tidy -diff
	cd tools && $(GO) mod tidy -diff
	$(GO) vet ./...
	@set -e; check="$$(cd tools && $(GO) tool -n staticcheck)"; echo staticcheck ./...; "$$check" ./...; for m in $(MODULES); do \
		echo "go vet and staticcheck of $$m"; (cd $$m && $(GO) mod tidy -diff && $(GO) vet ./... && "$$check" ./...); done
	$(GO) run ./internal/check complexity

wordcheck: ## Fail if more than WORDLIMIT percent of the comments hide their subject, and print the worst files
	$(GO) run ./internal/check words -limit $(WORDLIMIT)

generate: ## Rewrite the generated code, the tables and drawings in the documents, and the test vectors
	$(GO) generate ./...

checkgenerate: ## Delete what is generated, generate it again and compare
	@set -e; old="$$(mktemp -d)"; trap 'rm -rf "$$old"' EXIT; \
	for f in $(GENERATED); do mkdir -p "$$old/$$(dirname $$f)"; cp $$f "$$old/$$f"; done; \
	rm -f $(filter-out docs/%,$(GENERATED)); \
	$(GO) generate ./... || { cp -R "$$old/." .; echo "go generate failed; the files are as before"; exit 1; }; \
	for f in $(GENERATED); do diff -u "$$old/$$f" $$f || bad=1; done; \
	if [ -n "$$bad" ]; then echo "generated files were out of date or edited by hand; they are up to date now"; exit 1; fi; \
	echo "up to date: $(GENERATED)"

apicheck: ## Compare the exported API of all modules with the last release, or with BASE=rev
	tools/apicheck $(BASE)

bench: ## Measure against plain NATS, a TCP relay and the original design, and print the table of ratios
	cd bench && $(GO) run ./table $(BENCHFLAGS)

rivals: ## Measure beside RequestMany, psrpc, JetStream, gRPC, connect, yamux and QUIC; rewrites tables and charts in docs (RIVALFLAGS=-short: only see that it works)
	cd bench/rivals && $(GO) run . $(RIVALFLAGS)

benchcmp: ## Compare this tree's benchmarks with those of another revision: make benchcmp BASE=main GATEFLAGS='-bench Mux'
	@test -n "$(BASE)" || { echo 'say what to compare with: make benchcmp BASE=revision'; exit 2; }
	cd bench/gate && $(GO) run . -compare $(GATEFLAGS) "$(BASE)"

benchgate: ## Fail if this tree is slower than another revision, or allocates more: make benchgate BASE=main
	@test -n "$(BASE)" || { echo 'say what to compare with: make benchgate BASE=revision'; exit 2; }
	cd bench/gate && $(GO) run . $(GATEFLAGS) "$(BASE)"

fuzz: ## Run every fuzz target, one after the other, for FUZZTIME each (default 30s)
	GO="$(GO)" .ci/fuzz "$(FUZZTIME)" $(MODULES)
