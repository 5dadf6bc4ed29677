# Two commands are all a newcomer needs: `make demo` and `make test`.

CARGO ?= cargo
HOST ?= 127.0.0.1
PORT ?= 8080
BINARY := target/release/polylora

.PHONY: help build demo test test-clients lint bench soak

help:
	@echo 'make demo    build, fetch the demo model once, serve it with three adapters on $(HOST):$(PORT)'
	@echo 'make test    every test: units, model, adapters, engine, API, official OpenAI clients'
	@echo 'make test-clients  the last of these alone: what pip and npm fetch, against the program'
	@echo 'make lint    formatting, clippy and documentation, warnings forbidden'
	@echo 'make soak    the tests, long, with latencies and memory judged; for a machine with nothing else to do'
	@echo 'make bench   base against mixed adapters on this machine, in turns'

build:
	$(CARGO) build --release --locked

demo: build
	@echo 'In a second terminal, train a fourth adapter while it serves:'
	@echo '  $(BINARY) jobs create adapters/butler/train.jsonl --url http://$(HOST):$(PORT) --name butler --watch'
	$(BINARY) serve --model smollm2-135m-instruct --host $(HOST) --port $(PORT) \
	  --adapter pirate=adapters/pirate \
	  --adapter ticket-json=adapters/ticket-json \
	  --adapter sql=adapters/sql

test:
	$(CARGO) test --workspace --locked
	$(MAKE) --no-print-directory test-clients

# The program that the tests were built with: nothing is built after `make test`.
test-clients:
	$(CARGO) test --locked --test program --no-run
	tests/clients/run.sh

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) clippy --locked --features otel -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --workspace --no-deps --locked

# Release code, as users run it, and one test at a time: each is judged by what others see.
soak:
	POLYLORA_SOAK=1 $(CARGO) test --release --locked --test model --test program --test attacks -- --nocapture --test-threads=1

bench: build
	benches/serve/mixed.sh $(BINARY)
