// Package kubernetes checks the manifest beside it. It is a module of its own, so
// that the program's does not need those of Kubernetes.
package kubernetes

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	policy "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	level "k8s.io/pod-security-admission/api"
	security "k8s.io/pod-security-admission/policy"
	"sigs.k8s.io/yaml"
)

// stopTime returns the longest time in seconds that a node takes to stop after
// SIGTERM, as its constants give it: shutdownWait for the clients, drainWait for NATS.
func stopTime(t *testing.T) int64 {
	t.Helper()
	total := int64(0)
	waits := map[string]string{"../main.go": "shutdownWait", "../relay.go": "drainWait"}
	for file, name := range waits {
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
	got, want := number(t, "../README.md", `docker stop --time (\d+)`), stopTime(t)
	if got <= want {
		t.Errorf("README.md has docker stop wait %d s, want more than the node's %d s", got, want)
	}
}

func TestDockerfileBuildsTheProgramWithTheVersionOfGoInGoMod(t *testing.T) {
	dockerfile, err := os.ReadFile("../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	run := regexp.MustCompile(`(?m)^RUN (.* go build .*) -o /bin/chat \.$`)
	build := run.FindSubmatch(dockerfile)
	if build == nil {
		t.Fatal("no RUN builds the program")
	}
	// -n: without compiling.
	command := exec.Command("sh", "-c", string(build[1])+" -n -o "+t.TempDir()+" .")
	command.Dir = ".."
	if out, err := command.CombinedOutput(); err != nil {
		t.Errorf("%s: %v\n%s", build[1], err, out)
	}
	from := regexp.MustCompile(`FROM docker\.io/library/golang:(\S+) AS build`)
	image := from.FindSubmatch(dockerfile)
	module, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if image == nil || !strings.Contains(string(module), "\ngo "+string(image[1])+".") {
		t.Errorf("the image is %s, want the version of Go in go.mod", image)
	}
}

// A manifest is the contents of chat.yaml.
type manifest struct {
	deployment apps.Deployment
	service    core.Service
	budget     policy.PodDisruptionBudget
	network    networking.NetworkPolicy // of nodes
	nats       networking.NetworkPolicy
	ingress    networking.Ingress
}

func readManifest(t *testing.T) *manifest {
	t.Helper()
	return parse(t, read(t, "chat.yaml"))
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func parse(t *testing.T, text string) *manifest {
	t.Helper()
	m := new(manifest)
	kinds := []struct {
		name  string
		value any
	}{
		{"apps/v1 Deployment", &m.deployment},
		{"v1 Service", &m.service},
		{"policy/v1 PodDisruptionBudget", &m.budget},
		{"networking.k8s.io/v1 NetworkPolicy", &m.network},
		{"networking.k8s.io/v1 NetworkPolicy", &m.nats},
		{"networking.k8s.io/v1 Ingress", &m.ingress},
	}
	documents := strings.Split(text, "\n---\n")
	if len(documents) != len(kinds) {
		t.Fatalf("got %d documents, want %d", len(documents), len(kinds))
	}
	for i, kind := range kinds {
		// Strictly: a field that is misspelled or in the wrong place is an error.
		if err := yaml.UnmarshalStrict([]byte(documents[i]), kind.value); err != nil {
			t.Fatalf("%s: %v", kind.name, err)
		}
		var meta struct{ APIVersion, Kind string }
		if err := yaml.Unmarshal([]byte(documents[i]), &meta); err != nil {
			t.Fatal(err)
		}
		if got := meta.APIVersion + " " + meta.Kind; got != kind.name {
			t.Errorf("document %d is %q, want %q", i+1, got, kind.name)
		}
	}
	return m
}

func TestManifestHoldsTogether(t *testing.T) {
	m := readManifest(t)
	pod := m.deployment.Spec.Template
	node := pod.Spec.Containers[0]
	label := pod.Labels["app"]
	for what, got := range map[string]string{
		"Deployment":          m.deployment.Spec.Selector.MatchLabels["app"],
		"Service":             m.service.Spec.Selector["app"],
		"PodDisruptionBudget": m.budget.Spec.Selector.MatchLabels["app"],
		"NetworkPolicy":       m.network.Spec.PodSelector.MatchLabels["app"],
	} {
		if got != label || got == "" {
			t.Errorf("%s selects %q, want the nodes' label %q", what, got, label)
		}
	}
	for _, spread := range pod.Spec.TopologySpreadConstraints {
		if got := spread.LabelSelector.MatchLabels["app"]; got != label {
			t.Errorf("a spread over %s selects %q, want %q", spread.TopologyKey, got, label)
		}
		if !slices.Equal(spread.MatchLabelKeys, []string{"pod-template-hash"}) {
			t.Errorf("a spread over %s counts the pods of other versions", spread.TopologyKey)
		}
	}
	http := node.Ports[0].Name
	if probe := node.ReadinessProbe.HTTPGet; probe.Path != "/ready" || probe.Port.StrVal != http {
		t.Errorf("readiness is asked at %s on port %s", probe.Path, probe.Port.StrVal)
	}
	if node.LivenessProbe != nil {
		t.Error("there is a livenessProbe, want none")
	}
	port, open := m.service.Spec.Ports[0], m.network.Spec.Ingress[0].Ports[0]
	if port.TargetPort.StrVal != http || open.Port.StrVal != http {
		t.Errorf("the Service and the NetworkPolicy do not name the node's port %s", http)
	}
	if node.Args[0] != "-addr=:8080" || node.Ports[0].ContainerPort != 8080 {
		t.Error("the node's port and -addr do not agree")
	}
	if got := pod.Annotations["prometheus.io/port"]; got != "8080" {
		t.Errorf("Prometheus reads port %s, want 8080", got)
	}
	var public []string
	for _, path := range m.ingress.Spec.Rules[0].HTTP.Paths {
		public = append(public, path.Path)
		if *path.PathType != networking.PathTypeExact {
			t.Errorf("the path %s is %s, want Exact", path.Path, *path.PathType)
		}
		backend := path.Backend.Service
		if backend.Name != m.service.Name || backend.Port.Name != port.Name {
			t.Errorf("the path %s goes to %s:%s", path.Path, backend.Name, backend.Port.Name)
		}
	}
	if !slices.Equal(public, []string{"/", "/ws"}) {
		t.Errorf("the paths %q are public, want the page and the WebSocket endpoint", public)
	}
	rule := "http-request deny unless { path " + strings.Join(public, " ") + " }"
	if !strings.Contains(read(t, "../haproxy.cfg"), rule) {
		t.Errorf("haproxy.cfg lacks %q: it passes other paths", rule)
	}

	mount, volume := node.VolumeMounts[0], pod.Spec.Volumes[0]
	if mount.Name != volume.Name || node.Args[2] != "-password="+mount.MountPath+"/password" {
		t.Errorf("%s is not in the volume %s", node.Args[2], volume.Name)
	}
	for _, arg := range node.Args {
		if regexp.MustCompile(`//[^@]*:[^@]*@`).MatchString(arg) {
			t.Errorf("%s has a password, which the process list shows", arg)
		}
	}
}

// Values are those for the chart of NATS, as far as nats.yaml and nats-tls.yaml set them.
type values struct {
	Config struct {
		Cluster struct {
			Enabled  bool
			Replicas int
			Merge    map[string]any
			TLS      secret
		}
		NATS  struct{ TLS secret }
		Merge map[string]any
	}
	Container    container
	Reloader     container
	PromExporter container
	NATSBox      struct{ Enabled bool }
	PodTemplate  struct {
		Merge                     core.PodTemplateSpec
		TopologySpreadConstraints map[string]core.TopologySpreadConstraint
	}
	TLSCA secret
}

type container struct {
	Enabled bool
	Env     map[string]core.EnvVar // without their names
	Merge   core.Container
}

type secret struct {
	Enabled    bool
	SecretName string
}

// readValues reads a file of values, without the chart.
func readValues(t *testing.T, file string) (v values) {
	t.Helper()
	if err := yaml.UnmarshalStrict([]byte(read(t, file)), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestNATSHasTheSettingsOfItsConfigurationAndAcceptsNodesOnly(t *testing.T) {
	m, values := readManifest(t), readValues(t, "nats.yaml")
	got := fmt.Sprint(values.Config.Cluster.Merge, values.Config.Merge)
	want := "map[ping_interval:5s ping_max:2] map[authorization:map[users:[map[" +
		"password:<< $CHAT_PASSWORD >> permissions:map[publish:chat subscribe:chat] " +
		"user:chat]]] max_payload:<< 1KB >>]"
	if got != want {
		t.Errorf("the settings are\n%s, want\n%s", got, want)
	}
	number(t, "../nats.conf", `\bping_interval: "(5)s"\n`)
	number(t, "../nats.conf", `\bping_max: (2)\n`)
	number(t, "../nats.conf", `\bmax_payload: (1)KB\n`)

	pod := m.deployment.Spec.Template
	key := values.Container.Env["CHAT_PASSWORD"].ValueFrom.SecretKeyRef
	if secret := pod.Spec.Volumes[0].Secret.SecretName; key.Name != secret || key.Key != "password" {
		t.Errorf("the password is %s of %s, want password of %s", key.Key, key.Name, secret)
	}
	var urls []string
	for n := range values.Config.Cluster.Replicas {
		urls = append(urls, fmt.Sprintf("nats://chat@nats-%d.nats-headless:4222", n))
	}
	if got, want := pod.Spec.Containers[0].Args[1], "-nats="+strings.Join(urls, ","); got != want {
		t.Errorf("the nodes have %s, want %s", got, want)
	}
	nats := values.PodTemplate.Merge.Labels["app"]
	if got := m.nats.Spec.PodSelector.MatchLabels["app"]; got != nats {
		t.Errorf("the NetworkPolicy of NATS selects %q, want %q", got, nats)
	}
	if got := m.network.Spec.Egress[0].To[0].PodSelector.MatchLabels["app"]; got != nats {
		t.Errorf("nodes may connect to %q, want %q", got, nats)
	}
	from := make(map[string]string) // by port
	for _, rule := range m.nats.Spec.Ingress {
		for _, port := range rule.Ports {
			if selector := rule.From[0].PodSelector; selector != nil {
				from[port.Port.String()] = selector.MatchLabels["app"]
			}
		}
	}
	annotations := values.PodTemplate.Merge.Annotations
	port, scraped := annotations["prometheus.io/port"], annotations["prometheus.io/scrape"]
	monitoring := m.nats.Spec.Ingress[2]
	if scraped != "true" || !slices.ContainsFunc(monitoring.Ports,
		func(open networking.NetworkPolicyPort) bool { return open.Port.String() == port }) {
		t.Errorf("Prometheus reads port %s of NATS (%q), want one that the NetworkPolicy opens",
			port, scraped)
	}
	if len(from) != 2 || from["4222"] != pod.Labels["app"] || from["6222"] != nats {
		t.Errorf("NATS accepts connections of %v, want of nodes, and of its own servers", from)
	}
}

func TestTLSLinesOfTheManifestFitTheSecretOfNATS(t *testing.T) {
	// As nats-tls.yaml and README.md say.
	text := strings.ReplaceAll(read(t, "chat.yaml"), "# - {name: ", "- {name: ")
	pod := parse(t, text).deployment.Spec.Template.Spec
	values := readValues(t, "nats-tls.yaml")
	name := pod.Volumes[1].Secret.SecretName
	for _, got := range []secret{values.TLSCA, values.Config.NATS.TLS, values.Config.Cluster.TLS} {
		if !got.Enabled || got.SecretName != name {
			t.Errorf("NATS has TLS %+v, want it with the secret %s", got, name)
		}
	}
	mount := pod.Containers[0].VolumeMounts[1]
	if items := pod.Volumes[1].Secret.Items; len(items) != 1 || items[0].Path != "ca.crt" {
		t.Errorf("nodes have %v of %s, want ca.crt alone", items, name)
	}
	if mount.Name != pod.Volumes[1].Name {
		t.Errorf("%s is not in the volume %s", mount.MountPath, pod.Volumes[1].Name)
	}
	want := core.EnvVar{Name: "SSL_CERT_FILE", Value: mount.MountPath + "/ca.crt"}
	if got := pod.Containers[0].Env[1]; got != want {
		t.Errorf("nodes have %v, want %v", got, want)
	}
}

// By the code that Kubernetes refuses pods with.
func TestPodsAreAcceptedInRestrictedNamespaces(t *testing.T) {
	values := readValues(t, "nats.yaml")
	// The chart has one pod more by default, of tools.
	if values.NATSBox.Enabled {
		t.Error("natsBox is enabled")
	}
	nats := values.PodTemplate.Merge.Spec
	nats.Containers = []core.Container{
		values.Container.Merge, values.Reloader.Merge, values.PromExporter.Merge,
	}
	evaluator, err := security.NewEvaluator(security.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	restricted := level.LevelVersion{Level: level.LevelRestricted, Version: level.LatestVersion()}
	for name, pod := range map[string]core.PodSpec{
		"a node": readManifest(t).deployment.Spec.Template.Spec,
		"NATS":   nats,
	} {
		checks := evaluator.EvaluatePod(restricted, &metav1.ObjectMeta{}, &pod)
		if result := security.AggregateCheckResults(checks); !result.Allowed {
			t.Errorf("%s is refused: %s", name, result.ForbiddenDetail())
		}
	}
}

func TestTimesOfTheManifestAreLongEnough(t *testing.T) {
	m := readManifest(t)
	pod := m.deployment.Spec.Template.Spec
	node := pod.Containers[0]
	// The grace period starts with preStop.
	ends := node.Lifecycle.PreStop.Sleep.Seconds + stopTime(t)
	if grace := *pod.TerminationGracePeriodSeconds; grace <= ends {
		t.Errorf("terminationGracePeriodSeconds is %d, and a pod takes %d s to end", grace, ends)
	}
	if got := int64(m.deployment.Spec.MinReadySeconds); got <= ends {
		t.Errorf("minReadySeconds is %d, and a pod takes %d s to end", got, ends)
	}
	// A reconnect to NATS: settleWait, and a second to reconnect.
	reconnect := number(t, "../relay.go", `\breconnectWait = (\d+) \* time\.Millisecond\n`) *
		number(t, "../relay.go", `\bsettleWait = (\d+) \* reconnectWait\n`)
	probe := node.ReadinessProbe
	checks := number(t, "../haproxy.cfg", `default-server check inter 1s fall (\d+)`)
	for name, failures := range map[string]int64{
		"Kubernetes": 1000 * int64(probe.PeriodSeconds*(probe.FailureThreshold-1)),
		"HAProxy":    1000 * (checks - 1),
	} {
		if failures <= reconnect+1000 {
			t.Errorf("%s takes a node out of rotation after %d ms, and a reconnect takes %d ms",
				name, failures, reconnect+1000)
		}
	}
	ping := number(t, "../client.go", `\bpongWait = (\d+) \* time\.Second\n`) * 9 / 10
	for _, timeout := range []string{"read", "send"} {
		name := "nginx.ingress.kubernetes.io/proxy-" + timeout + "-timeout"
		got, err := strconv.ParseInt(m.ingress.Annotations[name], 10, 64)
		if err != nil || got <= ping {
			t.Errorf("%s is %d (%v), want more than the %d s between pings", name, got, err, ping)
		}
	}
	limit := node.Resources.Limits.Memory().Value()
	env := node.Env[0]
	quantity, err := resource.ParseQuantity(strings.TrimSuffix(env.Value, "B"))
	got := quantity.Value()
	if err != nil || env.Name != "GOMEMLIMIT" || got >= limit || got < limit*8/10 {
		t.Errorf("%s is %s (%v), want a little less than the limit of %d bytes",
			env.Name, env.Value, err, limit)
	}
}
