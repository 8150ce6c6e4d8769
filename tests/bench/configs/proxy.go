// SPDX-License-Identifier: Apache-2.0

// A TCP proxy as a Go programmer writes it: two io.Copy for each connection,
// each with its half-close. On Linux io.Copy between two TCP connections is
// splice(2), with a pipe for each direction.
//
// The listener has SO_REUSEPORT, so that several of it can share a port where
// the descriptors of one process are too few.
package main

import (
	"context"
	"io"
	"log"
	"net"
	"os"
	"syscall"
	"time"
)

const soReusePort = 15 // package syscall lacks it on amd64

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: proxy LISTEN BACKEND")
	}
	config := net.ListenConfig{
		Control: func(_, _ string, conn syscall.RawConn) error {
			var failed error
			err := conn.Control(func(fd uintptr) {
				failed = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, soReusePort, 1)
			})
			if err != nil {
				return err
			}
			return failed
		},
	}
	listener, err := config.Listen(context.Background(), "tcp", os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	for {
		client, err := listener.Accept()
		if err != nil {
			log.Print(err)
			time.Sleep(10 * time.Millisecond) // no descriptor left: some will be
			continue
		}
		go serve(client.(*net.TCPConn), os.Args[2])
	}
}

func serve(client *net.TCPConn, address string) {
	defer client.Close()
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		log.Print(err)
		return
	}
	backend := conn.(*net.TCPConn)
	defer backend.Close()
	done := make(chan struct{})
	go func() {
		io.Copy(backend, client)
		backend.CloseWrite()
		close(done)
	}()
	io.Copy(client, backend)
	client.CloseWrite()
	<-done
}
