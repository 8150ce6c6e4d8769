// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include "shim.h"

/* A verifier log of a program this size is some 100 KiB; what does not fit is
 * cut at the front, since the telling line comes last.
 */
static char log_text[1 << 20];
static size_t log_len;

static int log_append(enum libbpf_print_level level, const char *format, va_list args)
{
	size_t half = sizeof(log_text) / 2;
	int n;

	if (level == LIBBPF_DEBUG)
		return 0;
	if (log_len > half) {
		memmove(log_text, log_text + log_len - half, half);
		log_len = half;
	}
	n = vsnprintf(log_text + log_len, sizeof(log_text) - log_len, format, args);
	if (n > 0)
		log_len += (size_t)n < sizeof(log_text) - log_len ? (size_t)n :
								    sizeof(log_text) - log_len - 1;
	return n;
}

void sgw_log_capture(void)
{
	libbpf_set_print(log_append);
}

void sgw_log_reset(void)
{
	log_len = 0;
	log_text[0] = '\0';
}

const char *sgw_log_text(void)
{
	return log_text;
}

int sgw_attach_verdict(int program, int sock_map)
{
	return bpf_prog_attach(program, sock_map, BPF_SK_SKB_STREAM_VERDICT, 0);
}

int sgw_attach_sender(int program, int sock_map)
{
	return bpf_prog_attach(program, sock_map, BPF_SK_MSG_VERDICT, 0);
}

/* A kernel that knows the socket is about to refuse it (EOPNOTSUPP) would leave
 * the other one in the map by itself, so look first: a hang-up of either side
 * means that it is not ESTABLISHED any more.
 */
static int check(const struct sgw_pair *pair)
{
	struct pollfd fds[2] = {
		{ .fd = pair->client, .events = POLLRDHUP },
		{ .fd = pair->backend, .events = POLLRDHUP },
	};
	int ready = poll(fds, 2, 0);

	if (ready < 0)
		return -errno;
	return ready ? -EOPNOTSUPP : 0;
}

/* The send buffer is a direction's credit, and with the default of 87 KiB a
 * large segment never fits. The receive buffer is what a stalled session may
 * hold: left to the kernel it grows to tcp_rmem[2] (6.18: 9 MB within seconds
 * of bulk, of 33 allowed). The kernel doubles the value. Without CAP_NET_ADMIN
 * it is cut at net.core.wmem_max and rmem_max, and that is all right.
 */
static int set_buffer(int fd, int force_option, int option)
{
	int bytes = SGW_BUFFER_BYTES;

	if (setsockopt(fd, SOL_SOCKET, force_option, &bytes, sizeof(bytes)) &&
	    setsockopt(fd, SOL_SOCKET, option, &bytes, sizeof(bytes)))
		return -errno;
	return 0;
}

static int set_buffers(int fd)
{
	int err = set_buffer(fd, SO_SNDBUFFORCE, SO_SNDBUF);

	return err ? err : set_buffer(fd, SO_RCVBUFFORCE, SO_RCVBUF);
}

static int cookie_of(int fd, uint64_t *cookie)
{
	socklen_t len = sizeof(*cookie);

	return getsockopt(fd, SOL_SOCKET, SO_COOKIE, cookie, &len) ? -errno : 0;
}

static int put_pair(const struct sgw_pair *pair, uint64_t source, uint64_t target, uint32_t way)
{
	struct sock_pair value = {
		.peer = target,
		.slot = pair->slot + way,
		.worker = pair->worker,
	};

	int err = bpf_map_update_elem(pair->pair_map, &source, &value, BPF_NOEXIST);

	return err == -EEXIST ? -EBUSY : err; /* as sock_map would say */
}

static int put_socket(const struct sgw_pair *pair, bool is_client)
{
	uint64_t value = (uint64_t)(is_client ? pair->client : pair->backend);

	return bpf_map_update_elem(pair->sock_map,
				   is_client ? &pair->client_cookie : &pair->backend_cookie, &value,
				   BPF_ANY);
}

/* Setting SO_RCVLOWAT calls data_ready (tcp_set_rcvlowat): the verdict runs on
 * what was queued before the socket entered the map. 1 is the default value.
 */
static int kick(int fd)
{
	int one = 1;

	return setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &one, sizeof(one)) ? -errno : 0;
}

int sgw_pair_step(struct sgw_pair *pair, enum sgw_step step)
{
	int err;

	switch (step) {
	case SGW_STEP_CHECK:
		return check(pair);
	case SGW_STEP_BUFFERS:
		err = set_buffers(pair->client);
		return err ? err : set_buffers(pair->backend);
	case SGW_STEP_COOKIES:
		err = cookie_of(pair->client, &pair->client_cookie);
		return err ? err : cookie_of(pair->backend, &pair->backend_cookie);
	case SGW_STEP_PAIR_CLIENT:
		return put_pair(pair, pair->client_cookie, pair->backend_cookie,
				SOCK_SLOT_TO_BACKEND);
	case SGW_STEP_PAIR_BACKEND:
		return put_pair(pair, pair->backend_cookie, pair->client_cookie,
				SOCK_SLOT_TO_CLIENT);
	case SGW_STEP_SOCK_FIRST:
		return put_socket(pair, pair->is_client_first);
	case SGW_STEP_SOCK_SECOND:
		return put_socket(pair, !pair->is_client_first);
	case SGW_STEP_KICK_FIRST:
		return kick(pair->is_client_first ? pair->client : pair->backend);
	case SGW_STEP_KICK_SECOND:
		return kick(pair->is_client_first ? pair->backend : pair->client);
	case SGW_STEPS:
		break;
	}
	return -EINVAL;
}

int sgw_pair_all(struct sgw_pair *pair, int *error)
{
	int step;

	for (step = 0; step < SGW_STEPS; step++) {
		*error = sgw_pair_step(pair, (enum sgw_step)step);
		if (*error)
			break;
	}
	return step;
}

void sgw_unpair(const struct sgw_pair *pair, int step)
{
	if (step > SGW_STEP_PAIR_CLIENT)
		bpf_map_delete_elem(pair->pair_map, &pair->client_cookie);
	if (step > SGW_STEP_PAIR_BACKEND)
		bpf_map_delete_elem(pair->pair_map, &pair->backend_cookie);
}

/* Release: the verdict that sees the new count sees the target's write_seq
 * that send() left behind.
 */
void sgw_forward(struct sock_slot *slot, uint64_t n)
{
	__atomic_store_n(&slot->forwarded, slot->forwarded + n, __ATOMIC_RELEASE);
}

/* The barrier pairs with the one in pass() (sockmap.bpf.c). */
int sgw_release(struct sock_slot *slot)
{
	__atomic_store_n(&slot->hold, 0, __ATOMIC_SEQ_CST);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return __atomic_load_n(&slot->passed, __ATOMIC_SEQ_CST) == slot->forwarded;
}

void sgw_totals(const struct sock_slot *slots, size_t count, struct sgw_totals *totals)
{
	size_t i;

	memset(totals, 0, sizeof(*totals));
	for (i = 0; i < count; i++) {
		totals->redirected[i % SOCK_SLOTS_PER_SESSION] += slots[i].redirected;
		totals->redirected_segments += slots[i].redirected_segments;
		totals->passed_segments += slots[i].passed_segments;
	}
}

static int compare_fds(const void *one, const void *other)
{
	return *(const int *)one - *(const int *)other;
}

/* What a process has open it keeps from its end: a listener, a log's reader, the links. */
void sgw_close_all_but(int *kept, size_t count)
{
	unsigned int first = 0;
	size_t i;

	qsort(kept, count, sizeof(*kept), compare_fds);
	for (i = 0; i < count; i++) {
		if (kept[i] < 0)
			continue;
		if ((unsigned int)kept[i] > first)
			close_range(first, (unsigned int)kept[i] - 1, 0);
		first = (unsigned int)kept[i] + 1;
	}
	close_range(first, ~0U, 0);
}

uint64_t sgw_cookie(int fd)
{
	uint64_t cookie = 0;

	cookie_of(fd, &cookie);
	return cookie;
}

/* What was acknowledged, then what was not (write_seq - snd_una): an
 * acknowledgement between the two reads makes the sum too small, never too
 * large. tcpi_bytes_sent will not do: a segment that the queueing discipline
 * drops is counted each time that it is tried.
 */
int sgw_tcp(int fd, struct sgw_tcp *tcp)
{
	struct tcp_info info = { 0 };
	socklen_t len = sizeof(info);
	int unacknowledged;

	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len) ||
	    ioctl(fd, SIOCOUTQ, &unacknowledged))
		return -errno;
	tcp->received = info.tcpi_bytes_received;
	tcp->taken = info.tcpi_bytes_acked + (uint64_t)unacknowledged;
	return 0;
}

/* What the sockops program saw of a connection; of one that it does not follow,
 * what TCP says of it now. Nothing without the program.
 */
void sgw_stats(int map, int fd, struct sock_stats *stats)
{
	struct tcp_info info = { 0 };
	socklen_t len = sizeof(info);

	memset(stats, 0, sizeof(*stats));
	if (map < 0 || !bpf_map_lookup_elem(map, &fd, stats) ||
	    getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &len))
		return;
	stats->established_ns = 1;
	stats->srtt_us = info.tcpi_rtt;
	stats->retransmits = info.tcpi_total_retrans;
}

struct sgw_ring {
	struct ring_buffer *buffer;
	uint32_t *slots;
	int count;
	int max;
};

static int take_record(void *context, void *data, size_t size)
{
	const struct sock_spill *spill = data;
	struct sgw_ring *ring = context;

	(void)size;
	ring->slots[ring->count++] = spill->slot;
	/* An error ends the walk behind this record; the rest stays. */
	return ring->count == ring->max ? -ENOSPC : 0;
}

int sgw_ring_create(const char *name, uint32_t bytes)
{
	return bpf_map_create(BPF_MAP_TYPE_RINGBUF, name, 0, 0, bytes, NULL);
}

struct sgw_ring *sgw_ring_open(int map)
{
	struct sgw_ring *ring = calloc(1, sizeof(*ring));

	if (!ring)
		return NULL;
	ring->buffer = ring_buffer__new(map, take_record, ring, NULL);
	if (!ring->buffer) {
		free(ring);
		return NULL;
	}
	return ring;
}

void sgw_ring_close(struct sgw_ring *ring)
{
	ring_buffer__free(ring->buffer);
	free(ring);
}

int sgw_ring_drain(struct sgw_ring *ring, uint32_t *slots, int max)
{
	int err;

	ring->slots = slots;
	ring->count = 0;
	ring->max = max;
	err = ring_buffer__consume(ring->buffer);
	return err < 0 && err != -ENOSPC ? err : ring->count;
}
