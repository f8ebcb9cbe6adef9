.PHONY: help run build test race cover mutants fuzz bench check e2e cluster rooms diffs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "%-8s %s\n", $$1, $$2 }' Makefile

run: ## Serve on http://localhost:8080/
	go run .

build: ## Build the server, ./chat: the same bytes from every clone
	go build -trimpath -o chat .

test: ## Run the tests
	go test ./...

race: ## Run the tests twenty times under the race detector
	go test -race -shuffle=on -count=20 ./...

cover: ## Show the tests' coverage
	go test -coverprofile=cover.out ./...
	go tool cover -func=cover.out

mutants: ## Run mutation tests
	go run github.com/go-gremlins/gremlins/cmd/gremlins@v0.6.0 unleash --workers=1 --timeout-coefficient=10 --exclude-files=/

fuzz: ## Fuzz messages and byte streams, half a minute each
	go test -run='^$$' -fuzz=FuzzMessage -fuzztime=30s -fuzzminimizetime=1x .
	go test -run='^$$' -fuzz=FuzzBytes -fuzztime=30s -fuzzminimizetime=1x .

bench: ## Benchmark the hub and the pumps, and the server beside upstream's
	go test -run='^$$' -bench=. ./...
	cd e2e && go test -run='^$$' -bench=. -benchtime=1x .

check: ## Check gofmt; go vet, go fix and staticcheck in all modules; actionlint
	test -z "$$(gofmt -l . | tee /dev/stderr)"
	for module in $(dir $(wildcard go.mod */go.mod */*/go.mod)); do (cd $$module && go vet ./... && go fix -diff ./... && \
		go run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...) || exit 1; done
	go run github.com/rhysd/actionlint/cmd/actionlint@v1.7.12

e2e: ## Test the page in three browsers, the server as a process, and proxies
	cd e2e && npm ci && go test -count=1 -timeout=20m ./...

cluster: ## Copy hub, client and page to cluster, and test it
	cd cluster && go generate && go test ./...

rooms: ## Copy main, hub, client and page to rooms, and test it
	cd rooms && go generate && go test ./...

diffs: ## Make the diffs of rooms from its edited copies of main, hub, client and page
	sh rooms/copy.sh diffs

clean: ## Remove the files that other targets create
	rm -f chat cover.out
