module wasilet.dev/rigs/pause

go 1.24.0
