// Package kubernetes checks the manifest beside it. It is a module of its own, so
// that the program's does not need those of Kubernetes.
package kubernetes

import (
	"os"
	"strings"
	"testing"

	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	policy "k8s.io/api/policy/v1"
	"sigs.k8s.io/yaml"
)

// ending is the time that a node takes for its clients and for NATS, in seconds.
const ending = 10

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
	preStop := node.Lifecycle.PreStop.Sleep.Seconds
	if grace := *pod.Spec.TerminationGracePeriodSeconds; grace < preStop+ending {
		t.Errorf("grace is %d s, want at least %d and the node's %d", grace, preStop, ending)
	}
}
