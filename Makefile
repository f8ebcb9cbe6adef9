.PHONY: help run build test race cover fuzz bench check clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "%-8s %s\n", $$1, $$2 }' Makefile

run: ## Serve on http://localhost:8080/
	go run .

build: ## Build the server, ./chat
	go build -o chat .

test: ## Run the tests
	go test ./...

race: ## Run them twenty times under the race detector
	go test -race -count=20 ./...

cover: ## Say which statements they do not reach
	go test -coverprofile=cover.out ./...
	go tool cover -func=cover.out

fuzz: ## Throw messages and bytes at the server, half a minute each
	go test -run='^$$' -fuzz=FuzzMessage -fuzztime=30s .
	go test -run='^$$' -fuzz=FuzzBytes -fuzztime=30s .

bench: ## Measure the hub and the pumps
	go test -run='^$$' -bench=. ./...

check: ## Check the form: gofmt, go vet, go fix, staticcheck
	test -z "$$(gofmt -l . | tee /dev/stderr)"
	go vet ./...
	go fix -diff ./...
	go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...

clean: ## Remove what the other targets have made
	rm -f chat cover.out
