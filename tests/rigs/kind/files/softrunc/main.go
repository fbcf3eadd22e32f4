// Softrunc stands before runc where CAP_SYS_RESOURCE is not in the bounding set, as on machines that are sandboxes
// themselves. A container that asks for that capability, for a lower OOM score or for higher limits than the machine
// has would not start: the request is taken out of its configuration, and runc does the rest.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

const (
	runc    = "/usr/sbin/runc"
	missing = "CAP_SYS_RESOURCE"
)

// soften takes out of the configuration of a process what the kernel would refuse.
func soften(process map[string]any) {
	sets, _ := process["capabilities"].(map[string]any)
	for name, set := range sets {
		if names, ok := set.([]any); ok {
			sets[name] = slices.DeleteFunc(names, func(name any) bool { return name == missing })
		}
	}
	delete(process, "oomScoreAdj")
	delete(process, "rlimits")
}

// edit rewrites the file at path: the configuration of a bundle, or of one process.
func edit(path string, bundle bool) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var configuration map[string]any
	if err := json.Unmarshal(text, &configuration); err != nil {
		return err
	}
	process := configuration
	if bundle {
		process, _ = configuration["process"].(map[string]any)
	}
	soften(process)
	if text, err = json.Marshal(configuration); err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o600)
}

// value returns the value of the first of names among the arguments, in both spellings, or the fallback.
func value(arguments []string, fallback string, names ...string) string {
	for index, argument := range arguments {
		name, text, equals := strings.Cut(argument, "=")
		switch {
		case !slices.Contains(names, name):
		case equals:
			return text
		case index+1 < len(arguments):
			return arguments[index+1]
		}
	}
	return fallback
}

func main() {
	arguments := os.Args[1:]
	var err error
	switch {
	case slices.Contains(arguments, "exec"):
		if path := value(arguments, "", "--process", "-p"); path != "" {
			err = edit(path, false)
		}
	case slices.Contains(arguments, "create"), slices.Contains(arguments, "run"):
		err = edit(filepath.Join(value(arguments, ".", "--bundle", "-b"), "config.json"), true)
	}
	if err == nil {
		err = syscall.Exec(runc, append([]string{"runc"}, arguments...), os.Environ())
	}
	fmt.Fprintln(os.Stderr, "softrunc:", err)
	os.Exit(1)
}
