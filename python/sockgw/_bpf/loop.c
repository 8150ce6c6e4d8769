// SPDX-License-Identifier: Apache-2.0
/*
 * A worker's event loop, and the sessions that need nobody to decide anything.
 *
 * A session is with the loop from accept() on for as long as it is plain: the
 * first backend answers, what is received can be sent at once, both sides end
 * with a FIN. The first thing that is not plain (a dial that fails, a target
 * without room, a reset, the handover to a faster path) releases it to Python,
 * with both sockets and all counts. So a session's course is decided in one place,
 * and the common one costs nothing there. It comes back for one reason: the ways
 * to the wire and to direct begin here (sgw_loop_return).
 *
 * The loop keeps no byte from one event to the next: what it has received and
 * could not send goes with the release. The exception is a stream that is on its
 * way to the wire, see gather().
 *
 * A session that goes by wire stays with the loop, too, without its sockets: until
 * the program tells its end, or somebody wants to end it.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <malloc.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "sessions.h"

/* Ended sessions are told together: so many, or after so long. */
#define ENDED_BATCH 64
#define ENDED_WAIT_NS 2000000

/* A stream is no slower here than spliced: it stays until it pauses for so many times as
 * long as others.
 */
#define STREAM_PAUSE 16

/* How long epoll may sleep, in ms: until `until_ns`, or a dial has taken too long. */
static int pause_ms(const struct loop *loop, uint64_t until_ns)
{
	const struct gathering *gathering;
	uint64_t left_ms;

	if (loop->dialling.first != NONE) {
		uint64_t give_up_ns = loop->sessions[loop->dialling.first].started_ns +
				      loop->settings.connect_timeout_ns;

		if (give_up_ns < until_ns)
			until_ns = give_up_ns;
	}
	for (gathering = loop->gathering; gathering; gathering = gathering->next)
		if (gathering->look_at_ns < until_ns)
			until_ns = gathering->look_at_ns;
	if (until_ns == UINT64_MAX)
		return -1;
	if (until_ns <= loop->now_ns)
		return 0;
	left_ms = (until_ns - loop->now_ns + 999999) / 1000000;
	return left_ms < INT32_MAX ? (int)left_ms : INT32_MAX;
}

int sgw_loop_return(struct sgw_loop *public, const struct sgw_released *returned)
{
	struct loop *loop = (struct loop *)public;
	struct sockaddr_in6 address = { 0 };
	socklen_t length = sizeof(address);
	struct session *session;
	uint32_t index;

	/* ENOTCONN: it was reset just now, and that is for the caller to find out. */
	if (getpeername(returned->client, (struct sockaddr *)&address, &length))
		return -errno;
	loop->now_ns = clock_ns();
	index = take_session(loop);
	session = &loop->sessions[index];
	session->started_ns = loop->now_ns - returned->age_ns;
	memcpy(session->bytes, returned->bytes, sizeof(session->bytes));
	memcpy(session->direct_bytes, returned->direct_bytes, sizeof(session->direct_bytes));
	session->fds[CLIENT] = returned->client;
	session->fds[BACKEND] = returned->backend;
	session->target = returned->target;
	session->is_answered = returned->bytes[SOCK_SLOT_TO_CLIENT] > 0;
	session->is_counted = returned->is_counted;
	session->captured = returned->captured;
	memcpy(session->told, returned->told, sizeof(session->told));
	session->address = address;
	session->state = CONNECTED;
	append(loop, &loop->connected, index);
	/* Setting the masks makes what there is to be read an event. */
	watch(loop, index, CLIENT, EPOLL_CTL_MOD, WATCH);
	watch(loop, index, BACKEND, EPOLL_CTL_MOD, WATCH);
	if (public->handover == SGW_AT_ONCE)
		choose_path(loop, index, CLIENT);
	return 0;
}

struct sgw_loop *sgw_loop_open(const struct sgw_loop_settings *settings)
{
	struct loop *loop = calloc(1, sizeof(*loop));

	if (!loop)
		return NULL;
	loop->settings = *settings;
	loop->public.events = loop->events;
	loop->public.released = loop->released;
	loop->public.ended = loop->ended;
	loop->public.told = loop->told;
	loop->free = NONE;
	loop->listener = -1;
	loop->dialling = loop->connected = loop->on_wire = (struct list){ NONE, NONE };
	loop->vault = -1;
	/* Zeroed pages: what is never used takes no memory. */
	loop->sessions = calloc(settings->sessions, sizeof(*loop->sessions));
	loop->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (!loop->sessions || loop->epoll < 0 || (settings->wire && !watch_wire(loop)) ||
	    (settings->direct && !watch_direct(loop))) {
		sgw_loop_free(&loop->public);
		return NULL;
	}
	return &loop->public;
}

void sgw_loop_close(struct sgw_loop *public)
{
	struct loop *loop = (struct loop *)public;

	if (loop->epoll >= 0)
		close(loop->epoll);
	loop->epoll = -1;
}

void sgw_loop_free(struct sgw_loop *public)
{
	struct loop *loop = (struct loop *)public;

	sgw_loop_close(public);
	if (loop->wire_ring)
		ring_buffer__free(loop->wire_ring);
	if (loop->direct_ring)
		ring_buffer__free(loop->direct_ring);
	if (loop->vault >= 0)
		close(loop->vault);
	free(loop->by_wire);
	free(loop->targets);
	free(loop->sessions);
	free(loop);
}

int sgw_loop_target(struct sgw_loop *public, int family, const char *host, int port, uint32_t scope)
{
	struct loop *loop = (struct loop *)public;
	struct target *targets =
		realloc(loop->targets, (loop->target_count + 1) * sizeof(*targets));
	struct target *target;
	struct sockaddr_in *v4;

	if (!targets)
		return -ENOMEM;
	loop->targets = targets;
	target = &targets[loop->target_count];
	memset(target, 0, sizeof(*target));
	target->address.sin6_family = (sa_family_t)family;
	target->address.sin6_port = htons((uint16_t)port);
	if (family == AF_INET) {
		v4 = (struct sockaddr_in *)&target->address;
		target->length = sizeof(*v4);
		if (inet_pton(family, host, &v4->sin_addr) != 1)
			return -EINVAL;
	} else {
		target->address.sin6_scope_id = scope;
		target->length = sizeof(target->address);
		if (inet_pton(family, host, &target->address.sin6_addr) != 1)
			return -EINVAL;
	}
	loop->target_count++;
	return 0;
}

int sgw_loop_control(struct sgw_loop *public, enum sgw_operation operation, int fd, uint32_t events)
{
	struct loop *loop = (struct loop *)public;
	struct epoll_event event = { .events = events, .data.u64 = (uint64_t)fd };

	if (epoll_ctl(loop->epoll, (int)operation, fd, &event))
		return -errno;
	if (operation == SGW_ADD && events & EPOLLEXCLUSIVE)
		loop->listener = fd;
	else if (operation == SGW_DEL && fd == loop->listener)
		loop->listener = -1;
	return 0;
}

void sgw_trim(void)
{
	malloc_trim(0);
}

int sgw_loop_accept(struct sgw_loop *public, int listener, int most)
{
	struct loop *loop = (struct loop *)public;
	struct sockaddr_in6 address;
	socklen_t length;
	int count, client;

	loop->now_ns = clock_ns();
	for (count = 0; count < most && public->released_count < RECORDS; count++) {
		length = sizeof(address);
		client = accept4(listener, (struct sockaddr *)&address, &length,
				 SOCK_NONBLOCK | SOCK_CLOEXEC);
		if (client < 0)
			return count || errno == EAGAIN ? count : -errno;
		begin(loop, client, &address);
	}
	return count;
}

static bool is_readable(int fd)
{
	struct pollfd one = { .fd = fd, .events = POLLIN };

	return fd >= 0 && poll(&one, 1, 0) == 1;
}

int sgw_loop_wait(struct sgw_loop *public, int64_t timeout_ns)
{
	struct loop *loop = (struct loop *)public;
	struct epoll_event events[EVENTS];
	uint64_t until_ns;
	int count, i;

	loop->now_ns = clock_ns();
	account_for_handovers(loop);
	until_ns = timeout_ns < 0 ? UINT64_MAX : loop->now_ns + (uint64_t)timeout_ns;
	do {
		int told = 0;
		bool is_listener_due;

		count = epoll_wait(loop->epoll, events, EVENTS, pause_ms(loop, until_ns));
		if (count < 0)
			return errno == EINTR ? 0 : -errno;
		loop->handed_ns = loop->now_ns = clock_ns();
		/* epoll tells of everything that is ready before it tells of the
		 * listener again: of 10,000 busy sessions the last one waited for
		 * 3.4 s to be accepted.
		 */
		is_listener_due = count == EVENTS;
		take_wire_events(loop);
		take_direct_events(loop);
		for (i = 0; i < count; i++) {
			uint64_t data = events[i].data.u64;
			uint32_t index = (uint32_t)data >> 1;

			if (data == WIRE_RING || data == DIRECT_RING)
				continue;
			if (!(data & OWN)) {
				is_listener_due &= (int)data != loop->listener;
				loop->events[told].fd = (int)data;
				loop->events[told++].events = events[i].events;
			} else if (loop->sessions[index].state != FREE &&
				   (loop->sessions[index].generation & GENERATION_MASK) ==
					   (uint32_t)(data >> 32 & GENERATION_MASK)) {
				on_event(loop, index, data & 1, events[i].events);
			}
		}
		look_at_gatherings(loop);
		give_up_dials(loop);
		if (is_listener_due && told < EVENTS && is_readable(loop->listener)) {
			loop->events[told].fd = loop->listener;
			loop->events[told++].events = EPOLLIN;
		}
		if (told)
			return told;
		/* An end is nothing to hurry for. */
		if (public->ended_count && loop->now_ns + ENDED_WAIT_NS < until_ns)
			until_ns = loop->now_ns + ENDED_WAIT_NS;
	} while (!public->released_count && !public->told_count &&
		 public->ended_count < ENDED_BATCH && loop->now_ns < until_ns);
	return 0;
}

/* Release those of a list that were silent for silent_ns, or open for age_ns. */
static int release_of(struct loop *loop, const struct list *list, enum sgw_reason reason,
		      uint64_t silent_ns, uint64_t age_ns)
{
	int before = loop->public.released_count;
	uint32_t index, next;

	for (index = list->first; index != NONE && loop->public.released_count < RECORDS;
	     index = next) {
		struct session *session = &loop->sessions[index];
		bool is_stream = reason == SGW_HANDOVER && session->is_counted;

		next = session->next;
		/* After a FIN no sockmap takes it; what gathers may hold bytes. */
		if (reason == SGW_HANDOVER && (session->is_ended[0] || session->is_ended[1] ||
					       session->gathering || session->direct != NONE))
			continue;
		if (reason == SGW_ASKED && !is_silent_on_direct(loop, session) && silent_ns)
			continue;
		if (loop->now_ns - session->active_ns >=
			    (is_stream ? STREAM_PAUSE * silent_ns : silent_ns) ||
		    (loop->now_ns - session->started_ns >= age_ns && !is_stream)) {
			if (reason != SGW_HANDOVER)
				release(loop, index, reason);
			else if (session->wire == NONE)
				hand_over(loop, index, CLIENT);
		}
	}
	return loop->public.released_count - before;
}

int sgw_loop_release_all(struct sgw_loop *public)
{
	struct loop *loop = (struct loop *)public;

	loop->now_ns = clock_ns();
	return release_of(loop, &loop->dialling, SGW_ASKED, 0, 0) +
	       release_of(loop, &loop->connected, SGW_ASKED, 0, 0);
}

int sgw_loop_release_silent(struct sgw_loop *public, uint64_t silent_ns)
{
	struct loop *loop = (struct loop *)public;

	loop->now_ns = clock_ns();
	return release_of(loop, &loop->connected, SGW_ASKED, silent_ns, UINT64_MAX);
}

int sgw_loop_hand_over(struct sgw_loop *public, uint64_t silent_ns, uint64_t age_ns)
{
	struct loop *loop = (struct loop *)public;

	loop->now_ns = clock_ns();
	return release_of(loop, &loop->connected, SGW_HANDOVER, silent_ns, age_ns);
}

/* recv() first, then the words: bytes that came before a redirect are read with
 * the count that it left behind.
 */
static bool is_in_order(const struct sgw_run *run)
{
	if (run->direct &&
	    __atomic_load_n(&run->direct->bytes, __ATOMIC_ACQUIRE) != run->handed_over)
		return false;
	return !run->slot ||
	       (!__atomic_load_n(&run->slot->is_damaged, __ATOMIC_ACQUIRE) &&
		__atomic_load_n(&run->slot->redirected, __ATOMIC_ACQUIRE) == run->redirected);
}

void sgw_run(struct sgw_run *run)
{
	ssize_t received, sent;
	uint32_t chunk;

	run->taken = run->written = 0;
	run->held_from = run->held_to = 0;
	run->is_in_doubt = false;
	run->error = 0;
	for (chunk = 0; chunk < run->chunks; chunk++) {
		received = recv(run->source, run->buffer, SGW_COPY_BYTES, 0);
		if (received < 0 && errno != EAGAIN)
			run->error = errno; /* a socket says it once */
		if (received <= 0)
			return;
		run->taken += (uint64_t)received;
		run->is_in_doubt = !is_in_order(run);
		sent = 0;
		if (!run->is_in_doubt)
			sent = send(run->target, run->buffer, (size_t)received, MSG_NOSIGNAL);
		if (sent < 0)
			sent = 0; /* if it failed, the next send() says so, too */
		run->written += (uint64_t)sent;
		if (run->slot && sent)
			sgw_forward(run->slot, (uint64_t)sent);
		if (sent < received) {
			run->held_from = (uint32_t)sent;
			run->held_to = (uint32_t)received;
			return;
		}
	}
}
