// SPDX-License-Identifier: Apache-2.0
/*
 * An echo server on io_uring: `uring PORT` accepts one connection after the other, receives
 * and sends by submissions alone, and ends with the connection that sends nothing.
 */
#include <arpa/inet.h>
#include <liburing.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static struct io_uring ring;

static int wait_for(void)
{
	struct io_uring_cqe *done;
	int result;

	io_uring_submit(&ring);
	if (io_uring_wait_cqe(&ring, &done))
		exit(1);
	result = done->res;
	io_uring_cqe_seen(&ring, done);
	return result;
}

int main(int count, char **words)
{
	struct sockaddr_in address = { .sin_family = AF_INET };
	static char buffer[65536];
	int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1, total;

	if (count != 2 || io_uring_queue_init(8, &ring, 0))
		return 1;
	address.sin_port = htons((unsigned short)atoi(words[1]));
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 8))
		return 1;
	do {
		int received, sent, fd;

		io_uring_prep_accept(io_uring_get_sqe(&ring), listener, NULL, NULL, 0);
		fd = wait_for();
		if (fd < 0)
			return 1;
		for (total = 0;; total += received) {
			io_uring_prep_recv(io_uring_get_sqe(&ring), fd, buffer, sizeof(buffer), 0);
			received = wait_for();
			if (received < 0)
				fprintf(stderr, "recv: %s\n", strerror(-received));
			if (received <= 0)
				break;
			for (sent = 0; sent < received;) {
				int n;

				io_uring_prep_send(io_uring_get_sqe(&ring), fd, buffer + sent,
						   (size_t)(received - sent), MSG_NOSIGNAL);
				n = wait_for();
				if (n <= 0)
					return 1;
				sent += n;
			}
		}
		close(fd);
	} while (total);
	return 0;
}
