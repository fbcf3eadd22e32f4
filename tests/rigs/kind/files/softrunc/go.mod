module wasilet.dev/rigs/softrunc

go 1.24.0
