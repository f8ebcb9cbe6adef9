// Package kubernetes checks the manifest beside it. It is a module of its own, so
// that the program's does not need those of Kubernetes.
package kubernetes

import (
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	policy "k8s.io/api/policy/v1"
	"sigs.k8s.io/yaml"
)

// stopTime returns the longest time in seconds that a node takes to stop after
// SIGTERM, as its constants give it: shutdownWait for the clients, drainWait for NATS.
func stopTime(t *testing.T) int64 {
	t.Helper()
	total := int64(0)
	for file, name := range map[string]string{"../main.go": "shutdownWait", "../relay.go": "drainWait"} {
		total += number(t, file, `\b`+name+` += (\d+) \* time\.Second\n`)
	}
	return total
}

// number returns the number that the only match of expression in file captures.
func number(t *testing.T, file, expression string) int64 {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	matches := regexp.MustCompile(expression).FindAllSubmatch(text, -1)
	if len(matches) != 1 {
		t.Fatalf("%s: got %d matches of %s, want 1", file, len(matches), expression)
	}
	n, err := strconv.ParseInt(string(matches[0][1]), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestDockerStopOfTheREADMEWaitsForTheNode(t *testing.T) {
	if got, want := number(t, "../README.md", `docker stop --time (\d+)`), stopTime(t); got <= want {
		t.Errorf("README.md has docker stop wait %d s, want more than the node's %d s", got, want)
	}
}

func TestManifestIsWhatKubernetesKnowsAndHoldsTogether(t *testing.T) {
	manifest, err := os.ReadFile("chat.yaml")
	if err != nil {
		t.Fatal(err)
	}
	documents := strings.Split(string(manifest), "\n---\n")
	var deployment apps.Deployment
	var service core.Service
	var budget policy.PodDisruptionBudget
	for i, kind := range []any{&deployment, &service, &budget} {
		// Strictly: a field that is misspelled or in the wrong place is an error.
		if err := yaml.UnmarshalStrict([]byte(documents[i]), kind); err != nil {
			t.Errorf("document %d of %d: %v", i+1, len(documents), err)
		}
	}
	if t.Failed() {
		return
	}
	for i, want := range []string{"apps/v1 Deployment", "v1 Service", "policy/v1 PodDisruptionBudget"} {
		got := []string{
			deployment.APIVersion + " " + deployment.Kind,
			service.APIVersion + " " + service.Kind,
			budget.APIVersion + " " + budget.Kind,
		}[i]
		if got != want {
			t.Errorf("document %d is %q, want %q", i+1, got, want)
		}
	}

	pod := deployment.Spec.Template
	node := pod.Spec.Containers[0]
	label := pod.Labels["app"]
	for what, got := range map[string]string{
		"Deployment":          deployment.Spec.Selector.MatchLabels["app"],
		"Service":             service.Spec.Selector["app"],
		"PodDisruptionBudget": budget.Spec.Selector.MatchLabels["app"],
	} {
		if got != label || got == "" {
			t.Errorf("%s selects %q, want the nodes' label %q", what, got, label)
		}
	}
	if probe := node.ReadinessProbe.HTTPGet; probe.Path != "/ready" || probe.Port.StrVal != node.Ports[0].Name {
		t.Errorf("readiness is asked at %s on port %s", probe.Path, probe.Port.StrVal)
	}
	if node.LivenessProbe != nil {
		t.Error("there is a livenessProbe, want none")
	}
	if service.Spec.Ports[0].TargetPort.StrVal != node.Ports[0].Name || node.Args[1] != ":8080" || node.Ports[0].ContainerPort != 8080 {
		t.Error("the Service, the port and -addr do not agree")
	}
	if env := node.Env[0]; node.Args[3] != "$("+env.Name+")" {
		t.Errorf("-nats is %q, want what %s holds", node.Args[3], env.Name)
	}
	// The grace period starts with preStop.
	preStop, stop := node.Lifecycle.PreStop.Sleep.Seconds, stopTime(t)
	if grace := *pod.Spec.TerminationGracePeriodSeconds; grace <= preStop+stop {
		t.Errorf("terminationGracePeriodSeconds is %d, want more than preStop's %d s and the node's %d s", grace, preStop, stop)
	}
}
