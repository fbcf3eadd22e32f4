// Corefile starts CoreDNS with kubeadm's configuration less what Wasilet's own build of it leaves out.
package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	if len(os.Args) != 3 || os.Args[1] != "-conf" {
		check(fmt.Errorf("-conf FILE, not %q", os.Args[1:]))
	}
	text, err := os.ReadFile(os.Args[2])
	check(err)
	lines := []string{}
	for _, line := range strings.Split(string(text), "\n") {
		words := strings.Fields(line)
		if len(words) > 0 && (words[0] == "reload" || words[0] == "prometheus") {
			continue
		}
		lines = append(lines, line)
	}
	// A pipe holds 64 KiB, and the container's file system is read-only.
	reader, writer, err := os.Pipe()
	check(err)
	_, err = writer.WriteString(strings.Join(lines, "\n"))
	check(err)
	check(writer.Close())
	check(syscall.Dup3(int(reader.Fd()), 0, 0))
	check(syscall.Exec("/coredns", []string{"coredns", "-conf", "stdin"}, os.Environ()))
}
