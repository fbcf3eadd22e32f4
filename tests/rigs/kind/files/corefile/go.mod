module wasilet.dev/rigs/corefile

go 1.24.0
