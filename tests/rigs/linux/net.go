package main

import (
	"bufio"
	"fmt"
	"net"
	"time"
)

const patience = 10 * time.Second

// serve answers each line by that line and the address that it came from.
func serve(port string) {
	listener, err := net.Listen("tcp", ":"+port)
	check(err)
	fmt.Println("listening on port", port)
	for {
		connection, err := listener.Accept()
		check(err)
		go func() {
			defer connection.Close()
			connection.SetDeadline(time.Now().Add(patience))
			lines := bufio.NewScanner(connection)
			for lines.Scan() {
				peer, _, _ := net.SplitHostPort(connection.RemoteAddr().String())
				fmt.Fprintf(connection, "%s from %s\n", lines.Text(), peer)
			}
		}()
	}
}

// connect sends a line, and prints what comes back.
func connect(address, text string) {
	connection, err := net.DialTimeout("tcp", address, patience)
	check(err)
	defer connection.Close()
	connection.SetDeadline(time.Now().Add(patience))
	_, err = fmt.Fprintln(connection, text)
	check(err)
	answer, err := bufio.NewReader(connection).ReadString('\n')
	check(err)
	host, _, _ := net.SplitHostPort(connection.RemoteAddr().String())
	fmt.Printf("%s answered %s", host, answer)
}
