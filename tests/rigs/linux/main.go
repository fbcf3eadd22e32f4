// Linux is what the Linux pods of tests run: `linux say WORDS` prints and then sleeps; `linux make NAME KEY VALUE`
// creates a ConfigMap in the pod's namespace with the pod's own service account; `linux serve PORT` answers lines, and
// `linux connect HOST:PORT TEXT` sends one.
package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

const account = "/var/run/secrets/kubernetes.io/serviceaccount/"

func read(name string) string {
	text, err := os.ReadFile(account + name)
	check(err)
	return strings.TrimSpace(string(text))
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func makeConfig(name, key, value string) {
	authorities := x509.NewCertPool()
	authorities.AppendCertsFromPEM([]byte(read("ca.crt")))
	client := http.Client{
		Timeout:   10 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: authorities}},
	}
	body, err := json.Marshal(map[string]any{
		"metadata": map[string]string{"name": name},
		"data":     map[string]string{key: value},
	})
	check(err)
	address := net.JoinHostPort(os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT"))
	url := "https://" + address + "/api/v1/namespaces/" + read("namespace") + "/configmaps"
	request, err := http.NewRequest(http.MethodPost, url, bytes.NewReader(body))
	check(err)
	request.Header.Set("Authorization", "Bearer "+read("token"))
	request.Header.Set("Content-Type", "application/json")
	answer, err := client.Do(request)
	check(err)
	text, _ := io.ReadAll(answer.Body)
	if answer.StatusCode != http.StatusCreated {
		check(fmt.Errorf("%s: %s", answer.Status, text))
	}
	fmt.Println("made", name)
}

func main() {
	switch {
	case len(os.Args) == 3 && os.Args[1] == "say":
		fmt.Println(os.Args[2])
		time.Sleep(time.Hour)
	case len(os.Args) == 5 && os.Args[1] == "make":
		makeConfig(os.Args[2], os.Args[3], os.Args[4])
	case len(os.Args) == 3 && os.Args[1] == "serve":
		serve(os.Args[2])
	case len(os.Args) == 4 && os.Args[1] == "connect":
		connect(os.Args[2], os.Args[3])
	default:
		check(fmt.Errorf("say WORDS, make NAME KEY VALUE, serve PORT, or connect HOST:PORT TEXT; not %q", os.Args[1:]))
	}
}
