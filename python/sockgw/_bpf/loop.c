// SPDX-License-Identifier: Apache-2.0
/*
 * A worker's event loop, and the sessions that need nobody to decide anything.
 *
 * A session is with the loop from accept() on for as long as it is plain: the
 * first backend answers, what is received can be sent at once, both sides end
 * with a FIN. The first thing that is not plain (a dial that fails, a target
 * without room, a reset, the handover to a faster path) releases it to Python,
 * with both sockets and all counts, and it does not come back. So a session's
 * course is decided in one place, and the common one costs nothing there.
 *
 * The loop keeps no byte from one event to the next: what it has received and
 * could not send goes with the release.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <malloc.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include "shim.h"

/* Of epoll_data: a socket of the loop's, not a descriptor of Python's. Below it
 * are the session's generation, its index, and the side: an event that was
 * fetched before its session ended finds another generation there.
 */
#define OWN (1ULL << 63)
#define GENERATION_MASK 0x7fffffffU

/* Edge-triggered: one mask for a session's life. EPOLLPRI, because an urgent
 * byte ends a recv() early, and a short recv() must mean that there is no more.
 */
#define WATCH (EPOLLIN | EPOLLPRI | EPOLLRDHUP | EPOLLET)
#define NONE UINT32_MAX
#define CLIENT SOCK_SLOT_TO_BACKEND /* a side has the number of the way it feeds */
#define BACKEND SOCK_SLOT_TO_CLIENT

/* Told in one turn. An event releases or ends one session at most. */
#define EVENTS 128
#define RECORDS 512

/* Ended sessions are told together: so many, or after so long. */
#define ENDED_BATCH 64
#define ENDED_WAIT_NS 2000000

#define NAME_BYTES sizeof(((struct sgw_ended *)0)->client_name)

/* One that has sent so much without an answer is a stream. It is no slower here
 * than spliced, so it stays until it pauses for so many times as long as others.
 */
#define STREAM_BYTES 65536
#define STREAM_PAUSE 16

/* Handing over costs as much as a few hundred requests on either path, and the
 * sessions that wait for it are served here meanwhile. A few are handed over at
 * once, so many in a turn; it may not take more than one part in so many of
 * the thread's time but for so long.
 */
#define HANDOVER_BURST 64
#define HANDOVER_PART 4
#define HANDOVER_AHEAD_NS 16000000
#define HANDOVER_MOST_NS 1000000 /* one handover; longer it waited for something else */

/* Buffers copied before the other sessions have their turn. */
#define STEPS 8

enum state {
	FREE,
	DIALLING,
	CONNECTED
};

struct session {
	uint64_t started_ns;
	uint64_t active_ns;
	uint64_t bytes[2]; /* by way */
	int fds[2]; /* by side */
	uint32_t generation;
	uint32_t turn;
	uint32_t next; /* in its state's list */
	uint32_t previous;
	uint32_t seen; /* epoll's events of the client while its backend is dialled */
	uint8_t state;
	uint8_t is_ended[2]; /* by way: its FIN is passed on */
	uint8_t is_urgent; /* urgent bytes were seen */
	uint8_t is_answered; /* the backend has sent something */
	uint8_t is_counted; /* in relayed */
	struct sockaddr_in6 address; /* or sockaddr_in */
};

struct list {
	uint32_t first;
	uint32_t last;
};

struct target {
	struct sockaddr_in6 address; /* or sockaddr_in */
	socklen_t length;
};

struct loop {
	struct sgw_loop public;
	struct sgw_loop_settings settings;
	struct target *targets;
	uint32_t target_count;
	int epoll;
	int listener; /* the caller's descriptor that all loops watch; -1: none now */
	uint64_t now_ns;
	uint64_t handover_ns; /* by when the time that it took would be its part again */
	uint64_t handed_ns; /* the start of the turn in which the last ones were */
	uint32_t handed; /* in this burst */
	struct session *sessions;
	uint32_t used; /* sessions[] from here on were never touched */
	uint32_t free;
	/* The oldest first: each dial may take equally long. */
	struct list dialling;
	struct list connected;
	struct sgw_event events[EVENTS];
	struct sgw_released released[RECORDS];
	struct sgw_ended ended[RECORDS];
	char buffer[SGW_COPY_BYTES];
};

static uint64_t clock_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static const struct target *target_of(const struct loop *loop, const struct session *session)
{
	return &loop->targets[session->turn % loop->target_count];
}

static void append(struct loop *loop, struct list *list, uint32_t index)
{
	struct session *session = &loop->sessions[index];

	session->next = NONE;
	session->previous = list->last;
	if (list->last == NONE)
		list->first = index;
	else
		loop->sessions[list->last].next = index;
	list->last = index;
}

static void take_out(struct loop *loop, struct list *list, uint32_t index)
{
	struct session *session = &loop->sessions[index];

	if (session->previous == NONE)
		list->first = session->next;
	else
		loop->sessions[session->previous].next = session->next;
	if (session->next == NONE)
		list->last = session->previous;
	else
		loop->sessions[session->next].previous = session->previous;
}

static uint32_t take_session(struct loop *loop)
{
	uint32_t index = loop->free;

	if (index == NONE)
		return loop->used++;
	loop->free = loop->sessions[index].next;
	return index;
}

static void free_session(struct loop *loop, uint32_t index)
{
	struct session *session = &loop->sessions[index];

	take_out(loop, session->state == DIALLING ? &loop->dialling : &loop->connected, index);
	session->state = FREE;
	session->generation++;
	session->next = loop->free;
	loop->free = index;
	loop->public.open--;
}

/* As config.format_sockaddr() writes it. */
static void format_address(const struct sockaddr_in6 *address, char *text)
{
	const struct sockaddr_in *v4 = (const struct sockaddr_in *)address;
	char host[NAME_BYTES];
	const char *format = "%s:%u";

	if (address->sin6_family == AF_INET) {
		inet_ntop(AF_INET, &v4->sin_addr, host, sizeof(host));
	} else if (IN6_IS_ADDR_V4MAPPED(&address->sin6_addr)) {
		inet_ntop(AF_INET, &address->sin6_addr.s6_addr[12], host, sizeof(host));
	} else {
		/* With the scope of a link-local address, as accept() gives it to Python. */
		if (getnameinfo((const struct sockaddr *)address, sizeof(*address), host,
				sizeof(host), NULL, 0, NI_NUMERICHOST))
			inet_ntop(AF_INET6, &address->sin6_addr, host, sizeof(host));
		format = "[%s]:%u";
	}
	snprintf(text, NAME_BYTES, format, host, ntohs(address->sin6_port));
}

static void count_relayed(struct loop *loop, struct session *session)
{
	if (!session->is_counted) {
		session->is_counted = 1;
		loop->public.relayed++;
	}
}

/* Let Python have the session as it is, and its sockets. */
static struct sgw_released *release(struct loop *loop, uint32_t index, enum sgw_reason reason)
{
	struct sgw_released *record = &loop->released[loop->public.released_count++];
	struct session *session = &loop->sessions[index];

	memset(record, 0, sizeof(*record));
	record->reason = reason;
	record->client = session->fds[CLIENT];
	record->backend = session->fds[BACKEND];
	record->client_family = session->address.sin6_family;
	record->backend_family = target_of(loop, session)->address.sin6_family;
	record->is_connected = session->state == CONNECTED;
	record->is_counted = session->is_counted;
	record->turn = session->turn;
	record->age_ns = loop->now_ns - session->started_ns;
	memcpy(record->bytes, session->bytes, sizeof(record->bytes));
	memcpy(record->is_ended, session->is_ended, sizeof(record->is_ended));
	format_address(&session->address, record->client_name);
	free_session(loop, index);
	return record;
}

static void release_failed(struct loop *loop, uint32_t index, uint32_t way, int error)
{
	struct sgw_released *record = release(loop, index, SGW_FAILED);

	record->way = way;
	record->error = error;
}

static void release_undialled(struct loop *loop, uint32_t index, int error)
{
	release(loop, index, SGW_DIAL_FAILED)->error = error;
}

/* The target has no room for what was received in `way`. */
static void release_full(struct loop *loop, uint32_t index, uint32_t way, const char *held,
			 size_t length)
{
	struct sgw_released *record = release(loop, index, SGW_FULL);

	record->way = way;
	record->held = malloc(length);
	if (record->held) {
		record->held_bytes = length;
		memcpy(record->held, held, length);
	} else {
		record->reason = SGW_NO_MEMORY;
	}
}

/* Both sides have sent their FIN and all is sent on. */
static void finish(struct loop *loop, uint32_t index)
{
	struct session *session = &loop->sessions[index];
	struct sgw_ended *record = &loop->ended[loop->public.ended_count++];

	count_relayed(loop, session);
	record->turn = session->turn;
	record->age_ns = loop->now_ns - session->started_ns;
	memcpy(record->bytes, session->bytes, sizeof(record->bytes));
	if (loop->settings.is_logging) {
		format_address(&session->address, record->client_name);
		sgw_stats(loop->settings.stats_map, session->fds[CLIENT], &record->stats[CLIENT]);
		sgw_stats(loop->settings.stats_map, session->fds[BACKEND], &record->stats[BACKEND]);
	}
	/* What close() sends first to one of them is that FIN. */
	close(session->fds[BACKEND]);
	close(session->fds[CLIENT]);
	free_session(loop, index);
}

static int watch(struct loop *loop, uint32_t index, uint32_t side, int operation, uint32_t events)
{
	const struct session *session = &loop->sessions[index];
	uint64_t generation = session->generation & GENERATION_MASK;
	struct epoll_event event = {
		.events = events,
		.data.u64 = OWN | generation << 32 | index << 1 | side,
	};

	return epoll_ctl(loop->epoll, operation, session->fds[side], &event) ? errno : 0;
}

/* Copy what a side has sent; `events` is what epoll said of its socket. */
static void copy(struct loop *loop, uint32_t index, uint32_t side, uint32_t events)
{
	struct session *session = &loop->sessions[index];
	uint32_t way = side;
	int source = session->fds[side], target = session->fds[!side];
	ssize_t received, sent;
	int step;

	session->is_urgent |= (events & EPOLLPRI) != 0;
	for (step = 0; step < STEPS; step++) {
		received = recv(source, loop->buffer, SGW_COPY_BYTES, 0);
		if (received < 0) {
			if (errno != EAGAIN)
				release_failed(loop, index, way, errno);
			return;
		}
		if (!received) {
			if (session->is_ended[!way])
				finish(loop, index);
			else if (shutdown(target, SHUT_WR)) /* ENOTCONN: reset just now */
				release_failed(loop, index, !way, errno);
			else
				session->is_ended[way] = 1;
			return;
		}
		session->active_ns = loop->now_ns;
		sent = send(target, loop->buffer, (size_t)received, MSG_NOSIGNAL);
		if (sent < 0 && errno != EAGAIN) {
			release_failed(loop, index, !way, errno);
			return;
		}
		if (sent > 0) {
			session->bytes[way] += (uint64_t)sent;
			loop->public.bytes[way] += (uint64_t)sent;
		} else {
			sent = 0;
		}
		if (sent < received) {
			release_full(loop, index, way, loop->buffer + sent,
				     (size_t)(received - sent));
			return;
		}
		session->is_answered |= side == BACKEND;
		if (session->bytes[way] > STREAM_BYTES)
			count_relayed(loop, session);
		/* Less than there was room for is all there is, and the next
		 * byte is an event; a FIN that was announced is not.
		 */
		if (received < SGW_COPY_BYTES && !session->is_urgent && !(events & EPOLLRDHUP))
			return;
	}
	/* Setting the mask again makes what is left an event again. */
	watch(loop, index, side, EPOLL_CTL_MOD, WATCH);
}

static void set(int fd, int level, int option, int value)
{
	setsockopt(fd, level, option, &value, sizeof(value));
}

/* Begin to connect: 0, or the errno of what failed at once. */
static int dial(struct loop *loop, uint32_t index)
{
	struct session *session = &loop->sessions[index];
	const struct target *target = target_of(loop, session);
	static const struct sock_stats nothing;
	int fd = socket(target->address.sin6_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC,
			IPPROTO_TCP);

	session->fds[BACKEND] = fd;
	if (fd < 0)
		return errno;
	set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
	set(fd, SOL_SOCKET, SO_OOBINLINE, 1);
	if (loop->settings.receive_bytes)
		set(fd, SOL_SOCKET, loop->settings.receive_option, loop->settings.receive_bytes);
	/* In a rush the kernel is spared: finish() asks TCP itself. */
	if (loop->settings.stats_map >= 0 && loop->public.handover != SGW_AT_SECOND)
		bpf_map_update_elem(loop->settings.stats_map, &fd, &nothing, BPF_ANY);
	if (connect(fd, (const struct sockaddr *)&target->address, target->length) &&
	    errno != EINPROGRESS)
		return errno;
	return watch(loop, index, BACKEND, EPOLL_CTL_ADD, WATCH | EPOLLOUT);
}

/* Take an accepted client, and dial the backend whose turn it is. */
static void begin(struct loop *loop, int client, const struct sockaddr_in6 *address)
{
	uint32_t index = take_session(loop);
	struct session *session = &loop->sessions[index];
	uint32_t generation = session->generation;
	int error;

	memset(session, 0, sizeof(*session));
	session->generation = generation;
	session->started_ns = session->active_ns = loop->now_ns;
	session->fds[CLIENT] = client;
	session->fds[BACKEND] = -1;
	session->address = *address;
	session->turn = (uint32_t)__atomic_fetch_add(loop->settings.turns, 1, __ATOMIC_RELAXED);
	session->state = DIALLING;
	append(loop, &loop->dialling, index);
	loop->public.open++;

	error = watch(loop, index, CLIENT, EPOLL_CTL_ADD, WATCH);
	if (!error)
		error = dial(loop, index);
	if (error)
		release_undialled(loop, index, error);
}

/* A session goes by the faster path as soon as it can; in a rush of short ones it
 * has to show that it goes on, by a second request.
 */
static bool is_worth_handover(const struct loop *loop, const struct session *session, uint32_t side,
			      uint32_t events)
{
	switch (loop->public.handover) {
	case SGW_AT_ONCE:
		return side == BACKEND || (session->is_answered && !(events & EPOLLRDHUP));
	case SGW_AT_SECOND:
		return side == CLIENT && session->is_answered && !(events & EPOLLRDHUP);
	case SGW_NEVER:
		break;
	}
	return false;
}

static bool may_hand_over(struct loop *loop)
{
	if (loop->handover_ns > loop->now_ns + HANDOVER_AHEAD_NS || loop->handed == HANDOVER_BURST)
		return false;
	loop->handed++;
	return true;
}

/* The caller has taken over what was released in the last turn, if anything was,
 * and that took until now.
 */
static void account_for_handovers(struct loop *loop)
{
	uint64_t took_ns = loop->now_ns - loop->handed_ns;

	if (!loop->handed)
		return;
	if (took_ns > loop->handed * HANDOVER_MOST_NS)
		took_ns = loop->handed * HANDOVER_MOST_NS;
	loop->handed = 0;
	if (loop->handover_ns < loop->handed_ns)
		loop->handover_ns = loop->handed_ns;
	loop->handover_ns += HANDOVER_PART * took_ns;
}

static void on_bytes(struct loop *loop, uint32_t index, uint32_t side, uint32_t events)
{
	if (is_worth_handover(loop, &loop->sessions[index], side, events) && may_hand_over(loop))
		release(loop, index, SGW_HANDOVER)->way = side;
	else
		copy(loop, index, side, events);
}

static void decide_dial(struct loop *loop, uint32_t index, uint32_t events)
{
	struct session *session = &loop->sessions[index];
	uint32_t generation = session->generation;
	socklen_t length = sizeof(int);
	int error = 0;

	if (events & (EPOLLERR | EPOLLHUP) &&
	    getsockopt(session->fds[BACKEND], SOL_SOCKET, SO_ERROR, &error, &length))
		error = errno;
	if (error) {
		release_undialled(loop, index, error);
		return;
	}
	if (!(events & EPOLLOUT))
		return;
	take_out(loop, &loop->dialling, index);
	append(loop, &loop->connected, index);
	session->state = CONNECTED;
	session->active_ns = loop->now_ns;
	if (loop->public.handover == SGW_AT_ONCE && may_hand_over(loop)) {
		release(loop, index, SGW_HANDOVER)->way = events & ~EPOLLOUT ? BACKEND : CLIENT;
		return;
	}
	if (loop->public.handover == SGW_NEVER)
		count_relayed(loop, session);
	/* What the backend says first must not wait for what the client sends. */
	if (events & ~EPOLLOUT)
		on_bytes(loop, index, BACKEND, events);
	if (session->generation == generation && session->seen)
		on_bytes(loop, index, CLIENT, session->seen);
}

static void on_event(struct loop *loop, uint32_t index, uint32_t side, uint32_t events)
{
	struct session *session = &loop->sessions[index];

	if (session->state == DIALLING && side == BACKEND)
		decide_dial(loop, index, events);
	else if (events & EPOLLERR)
		release_failed(loop, index, side, 0);
	else if (session->state == DIALLING)
		session->seen |= events;
	else if (!session->is_ended[side] && events & ~EPOLLOUT)
		on_bytes(loop, index, side, events);
}

static void give_up_dials(struct loop *loop)
{
	uint64_t patience_ns = loop->settings.connect_timeout_ns;

	while (loop->dialling.first != NONE && loop->public.released_count < RECORDS &&
	       loop->sessions[loop->dialling.first].started_ns + patience_ns <= loop->now_ns)
		release_undialled(loop, loop->dialling.first, ETIMEDOUT);
}

/* How long epoll may sleep, in ms: until `until_ns`, or a dial has taken too long. */
static int pause_ms(const struct loop *loop, uint64_t until_ns)
{
	uint64_t left_ms;

	if (loop->dialling.first != NONE) {
		uint64_t give_up_ns = loop->sessions[loop->dialling.first].started_ns +
				      loop->settings.connect_timeout_ns;

		if (give_up_ns < until_ns)
			until_ns = give_up_ns;
	}
	if (until_ns == UINT64_MAX)
		return -1;
	if (until_ns <= loop->now_ns)
		return 0;
	left_ms = (until_ns - loop->now_ns + 999999) / 1000000;
	return left_ms < INT32_MAX ? (int)left_ms : INT32_MAX;
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
	loop->free = NONE;
	loop->listener = -1;
	loop->dialling = loop->connected = (struct list){ NONE, NONE };
	/* Zeroed pages: what is never used takes no memory. */
	loop->sessions = calloc(settings->sessions, sizeof(*loop->sessions));
	loop->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (!loop->sessions || loop->epoll < 0) {
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
		for (i = 0; i < count; i++) {
			uint64_t data = events[i].data.u64;
			uint32_t index = (uint32_t)data >> 1;

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
	} while (!public->released_count && public->ended_count < ENDED_BATCH &&
		 loop->now_ns < until_ns);
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
		const struct session *session = &loop->sessions[index];
		bool is_stream = reason == SGW_HANDOVER && session->is_counted;

		next = session->next;
		if (reason == SGW_HANDOVER && (session->is_ended[0] || session->is_ended[1]))
			continue; /* no sockmap takes it any more */
		if (loop->now_ns - session->active_ns >=
			    (is_stream ? STREAM_PAUSE * silent_ns : silent_ns) ||
		    (loop->now_ns - session->started_ns >= age_ns && !is_stream)) {
			if (reason == SGW_HANDOVER && !may_hand_over(loop))
				break;
			release(loop, index, reason);
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
