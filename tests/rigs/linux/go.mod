module linux

go 1.21
