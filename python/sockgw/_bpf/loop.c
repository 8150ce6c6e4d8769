// SPDX-License-Identifier: Apache-2.0
/*
 * A worker's event loop, and the sessions that need nobody to decide anything.
 *
 * A session is with the loop from accept() on for as long as it is plain: the
 * first backend answers, what is received can be sent at once, both sides end
 * with a FIN. The first thing that is not plain (a dial that fails, a target
 * without room, a reset, the handover to a faster path) releases it to Python,
 * with both sockets and all counts. So a session's course is decided in one place,
 * and the common one costs nothing there. It comes back for one reason: the way
 * to the wire begins here (sgw_loop_return).
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
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <linux/sockios.h>
#include "wire_calls.h"

/* Of epoll_data: a socket of the loop's, not a descriptor of Python's. Below it
 * are the session's generation, its index, and the side: an event that was
 * fetched before its session ended finds another generation there.
 */
#define OWN (1ULL << 63)
#define GENERATION_MASK 0x7fffffffU
#define WIRE_RING UINT64_MAX
#define NO_KEEPER (-2)

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

/* A stream that is armed and does not pause is made to, when it has sent so much;
 * what it waits for then is looked at after so long, and after twice as long each
 * further time.
 */
#define GATHER_BYTES 262144
#define GATHERS_MOST 64
/* A target that has taken nothing for so long is not on its way anywhere. */
#define GATHER_STALL_NS 250000000
#define GATHER_LOOK_NS 1000000
#define GATHER_LOOK_MAX_NS 64000000

/* One that has had so many events since it was armed, or was made to pause so often,
 * and has not switched never will: something is always in flight, or its packets
 * do not pass the program as our sockets see them.
 */
#define ARMED_EVENTS 1024

/* After so many events, and no more than so many bytes each, it is a dialogue of
 * small messages: that one side might send more than the other takes is no reason
 * to wait any longer.
 */
#define CHATTY_EVENTS 6
#define CHATTY_BYTES 8192

/* Told of the wire before the sockets have their turn. */
#define WIRE_RECORDS (RECORDS - 2 * EVENTS)

/* Buffers copied before the other sessions have their turn. */
#define STEPS 8

enum state {
	FREE,
	DIALLING,
	CONNECTED,
	ON_WIRE
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
	uint32_t wire; /* its id there, or NONE */
	uint32_t seen; /* epoll's events of the client while its backend is dialled */
	uint8_t state;
	uint8_t is_ended[2]; /* by way: its FIN is passed on */
	uint8_t is_urgent; /* urgent bytes were seen */
	uint8_t is_answered; /* the backend has sent something */
	uint8_t is_counted; /* in relayed */
	uint8_t is_tried; /* whether it can go by wire was asked */
	uint8_t is_unfit; /* and it cannot, or never has the moment */
	uint16_t armed_events;
	uint64_t armed_bytes[2]; /* sent since, by way */
	uint8_t is_adopted; /* from a gateway that has died */
	struct gathering *gathering; /* NULL: it copies as all do */
	struct sock_stats stats[2]; /* of its connections, once they are closed */
	struct sockaddr_in6 address; /* or sockaddr_in */
};

/* A session that copies what it peeks at, and holds what it could not send when it
 * began to.
 */
struct gathering {
	struct gathering *next;
	uint32_t index;
	uint64_t look_at_ns;
	uint64_t pause_ns;
	uint64_t moved_ns[2]; /* by way */
	uint64_t acked_ns; /* when the peers last acknowledged something */
	int unacknowledged;
	uint32_t made; /* moments that were not used, or not to be had */
	size_t peeked[2]; /* sent on, and still in the source's queue, by way */
	uint32_t held_way;
	size_t held_from;
	size_t held_bytes;
	char held[];
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
	struct list on_wire;
	struct gathering *gathering;
	struct ring_buffer *wire_ring;
	int vault;
	uint32_t *by_wire; /* sessions[] by id - the process's first */
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

static struct list *list_of(struct loop *loop, const struct session *session)
{
	switch ((enum state)session->state) {
	case DIALLING:
		return &loop->dialling;
	case ON_WIRE:
		return &loop->on_wire;
	case CONNECTED:
	case FREE:
		break;
	}
	return &loop->connected;
}

static void free_session(struct loop *loop, uint32_t index)
{
	struct session *session = &loop->sessions[index];

	take_out(loop, list_of(loop, session), index);
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

static void name_flow(const struct wire_flow *flow, char *text)
{
	struct sockaddr_in6 address;

	wire_write_side(&address, flow->source, flow->source_port, flow->family);
	format_address(&address, text);
}

static void count_relayed(struct loop *loop, struct session *session)
{
	if (!session->is_counted) {
		session->is_counted = 1;
		loop->public.relayed++;
	}
}

/* Tell whether the sockets are still the session's; from then on they will be. An
 * armed one may have switched just now: what its sockets say is then of no matter.
 */
static bool keeps_sockets(struct loop *loop, struct session *session, bool is_ending)
{
	if (session->state == ON_WIRE)
		return false;
	if (session->wire != NONE) {
		if (!wire_disarm(loop->settings.wire, session->wire,
				 is_ending ? NULL : session->fds))
			return false;
		session->wire = NONE;
		loop->public.armed--;
	}
	return true;
}

/* Keep what was received in `way` for Python. */
static void hold(struct sgw_released *record, uint32_t way, const char *held, size_t length)
{
	record->held_way = way;
	record->held = malloc(length);
	if (record->held) {
		record->held_bytes = length;
		memcpy(record->held, held, length);
	} else {
		record->reason = SGW_NO_MEMORY;
	}
}

/* --- gathering: what a stream is taken out of the relay by
 *
 * A stream that never pauses never has the moment at which nothing is in flight.
 * It is made here: the bytes are peeked at and sent on, and stay in the source's
 * queue. When the target's peer has acknowledged all of them, or before that, when
 * the queue is full, the source's peer has to wait; then they are taken at once,
 * the window opens, and the next packet finds nothing in flight.
 *
 * A peeked byte that was sent on counts as moved: whoever goes on with the session
 * another way takes it from the queue first.
 */

static void set_peek_offset(int fd, int offset)
{
	setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &offset, sizeof(offset));
}

/* Take what was sent on from the sources' queues. */
static void take_peeked(struct session *session)
{
	struct gathering *gathering = session->gathering;
	uint32_t way;

	for (way = 0; way < 2; way++) {
		while (gathering->peeked[way]) {
			/* MSG_TRUNC: without copying. */
			ssize_t taken = recv(session->fds[way], NULL, gathering->peeked[way],
					     MSG_TRUNC | MSG_DONTWAIT);

			if (taken <= 0)
				break; /* it cannot be: they are there */
			gathering->peeked[way] -= (size_t)taken;
		}
	}
}

static void drop_gathering(struct loop *loop, struct session *session)
{
	struct gathering **link = &loop->gathering;

	while (*link != session->gathering)
		link = &(*link)->next;
	*link = session->gathering->next;
	set_peek_offset(session->fds[CLIENT], -1);
	set_peek_offset(session->fds[BACKEND], -1);
	free(session->gathering);
	session->gathering = NULL;
}

/* Let Python have the session as it is, and its sockets; NULL if it is on wire. */
static struct sgw_released *release(struct loop *loop, uint32_t index, enum sgw_reason reason)
{
	struct session *session = &loop->sessions[index];
	struct sgw_released *record;

	if (!keeps_sockets(loop, session, false))
		return NULL;
	if (loop->settings.wire && !session->is_tried)
		wire_bound(session->fds);
	record = &loop->released[loop->public.released_count++];
	memset(record, 0, sizeof(*record));
	record->reason = reason;
	if (session->gathering) {
		const struct gathering *gathering = session->gathering;

		take_peeked(session);
		if (gathering->held_bytes)
			hold(record, gathering->held_way, gathering->held + gathering->held_from,
			     gathering->held_bytes);
		drop_gathering(loop, session);
	}
	record->client = session->fds[CLIENT];
	record->backend = session->fds[BACKEND];
	record->client_family = session->address.sin6_family;
	record->backend_family = target_of(loop, session)->address.sin6_family;
	record->is_connected = session->state == CONNECTED;
	record->is_counted = session->is_counted;
	record->is_unfit = session->is_unfit;
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

	if (!record)
		return;
	record->way = way;
	record->error = error;
}

static void release_undialled(struct loop *loop, uint32_t index, int error)
{
	struct sgw_released *record = release(loop, index, SGW_DIAL_FAILED);

	if (record) /* it was never armed */
		record->error = error;
}

/* The target has no room for what was received in `way`. */
static void release_full(struct loop *loop, uint32_t index, uint32_t way, const char *held,
			 size_t length)
{
	struct sgw_released *record = release(loop, index, SGW_FULL);

	if (!record) /* it cannot be: what is held keeps the moment away */
		return;
	record->way = way;
	hold(record, way, held, length);
}

static struct sgw_ended *record_end(struct loop *loop, const struct session *session,
				    enum sgw_end end)
{
	struct sgw_ended *record = &loop->ended[loop->public.ended_count++];

	memset(record, 0, sizeof(*record));
	record->turn = session->turn;
	record->end = end;
	record->age_ns = loop->now_ns - session->started_ns;
	memcpy(record->bytes, session->bytes, sizeof(record->bytes));
	if (loop->settings.is_logging)
		format_address(&session->address, record->client_name);
	return record;
}

static void read_stats(const struct loop *loop, const struct session *session,
		       struct sock_stats *stats)
{
	if (!loop->settings.is_logging)
		return;
	sgw_stats(loop->settings.stats_map, session->fds[CLIENT], &stats[CLIENT]);
	sgw_stats(loop->settings.stats_map, session->fds[BACKEND], &stats[BACKEND]);
}

/* Both sides have sent their FIN and all is sent on. */
static void finish(struct loop *loop, uint32_t index)
{
	struct session *session = &loop->sessions[index];

	if (!keeps_sockets(loop, session, true)) /* it cannot be: after a FIN nothing switches */
		return;
	count_relayed(loop, session);
	read_stats(loop, session, record_end(loop, session, SGW_EOF)->stats);
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

/* Go on as all do. */
static void stop_gathering(struct loop *loop, uint32_t index)
{
	struct session *session = &loop->sessions[index];
	const struct gathering *gathering = session->gathering;

	if (gathering->held_bytes) {
		release(loop, index, SGW_FULL);
		return;
	}
	take_peeked(session);
	drop_gathering(loop, session);
	/* Setting the masks again makes what is left an event again. */
	watch(loop, index, CLIENT, EPOLL_CTL_MOD, WATCH);
	watch(loop, index, BACKEND, EPOLL_CTL_MOD, WATCH);
}

enum progress {
	CAUGHT_UP,
	BLOCKED,
	MORE,
	OVER, /* the session does not gather any more, or is gone */
};

static void count_sent(struct loop *loop, struct session *session, uint32_t way, ssize_t sent)
{
	session->bytes[way] += (uint64_t)sent;
	session->armed_bytes[way] += (uint64_t)sent;
	loop->public.bytes[way] += (uint64_t)sent;
	session->active_ns = loop->now_ns;
}

static enum progress send_held(struct loop *loop, uint32_t index, uint32_t way)
{
	struct session *session = &loop->sessions[index];
	struct gathering *gathering = session->gathering;
	ssize_t sent = send(session->fds[!way], gathering->held + gathering->held_from,
			    gathering->held_bytes, MSG_NOSIGNAL);

	if (sent < 0) {
		if (errno == EAGAIN)
			return BLOCKED;
		release_failed(loop, index, !way, errno);
		return OVER;
	}
	count_sent(loop, session, way, sent);
	gathering->held_from += (size_t)sent;
	gathering->held_bytes -= (size_t)sent;
	return gathering->held_bytes ? BLOCKED : CAUGHT_UP;
}

static enum progress gather_way(struct loop *loop, uint32_t index, uint32_t way)
{
	struct session *session = &loop->sessions[index];
	struct gathering *gathering = session->gathering;
	int source = session->fds[way], target = session->fds[!way];
	int step;

	if (gathering->held_bytes && gathering->held_way == way) {
		enum progress progress = send_held(loop, index, way);

		if (progress != CAUGHT_UP)
			return progress;
	}
	for (step = 0; step < STEPS; step++) {
		ssize_t received = recv(source, loop->buffer, SGW_COPY_BYTES, MSG_PEEK), sent;

		if (received < 0 && errno == EAGAIN)
			return CAUGHT_UP;
		if (received < 0) {
			release_failed(loop, index, way, errno);
			return OVER;
		}
		if (!received) { /* a FIN: nothing switches any more */
			stop_gathering(loop, index);
			return OVER;
		}
		sent = send(target, loop->buffer, (size_t)received, MSG_NOSIGNAL);
		if (sent < 0 && errno != EAGAIN) {
			release_failed(loop, index, !way, errno);
			return OVER;
		}
		if (sent < 0)
			sent = 0;
		count_sent(loop, session, way, sent);
		gathering->peeked[way] += (size_t)sent;
		if (sent < received) {
			set_peek_offset(source, (int)gathering->peeked[way]);
			return BLOCKED;
		}
	}
	return MORE;
}

static int unacknowledged(const struct session *session)
{
	int count[2] = { 0 };

	if (ioctl(session->fds[CLIENT], SIOCOUTQ, &count[CLIENT]) ||
	    ioctl(session->fds[BACKEND], SIOCOUTQ, &count[BACKEND]))
		return INT32_MAX;
	return count[CLIENT] + count[BACKEND];
}

/* The session goes on as if it had not been armed: for good, where the moment never
 * comes; where a target is stalled, until that is over.
 */
static void give_up_wire(struct loop *loop, uint32_t index, bool is_for_good)
{
	struct session *session = &loop->sessions[index];

	if (!keeps_sockets(loop, session, false))
		return;
	if (!is_for_good) {
		release(loop, index, SGW_FULL);
		return;
	}
	session->is_unfit = 1;
	loop->public.unfit[WIRE_NO_MOMENT]++;
	if (session->gathering)
		stop_gathering(loop, index);
}

static void gather(struct loop *loop, uint32_t index)
{
	struct session *session = &loop->sessions[index];
	struct gathering *gathering = session->gathering;
	bool is_caught_up = true, is_moving = false;
	uint32_t way;
	int left;

	gathering->look_at_ns = UINT64_MAX;
	for (way = 0; way < 2; way++) {
		uint64_t before = session->bytes[way], stalled_at_ns;
		enum progress progress = gather_way(loop, index, way);

		if (progress == OVER)
			return;
		if (session->bytes[way] != before || progress == CAUGHT_UP)
			gathering->moved_ns[way] = loop->now_ns;
		is_moving |= session->bytes[way] != before;
		is_caught_up &= progress == CAUGHT_UP;
		stalled_at_ns = gathering->moved_ns[way] + GATHER_STALL_NS;
		if (progress == MORE)
			gathering->look_at_ns = loop->now_ns;
		else if (progress == BLOCKED && stalled_at_ns < gathering->look_at_ns)
			gathering->look_at_ns = stalled_at_ns;
		/* What is peeked at only fills the source's buffer: one that is over its
		 * limit holds up the reverse direction, too (relay.py, widen()).
		 */
		if (progress == BLOCKED && stalled_at_ns <= loop->now_ns) {
			give_up_wire(loop, index, false);
			return;
		}
	}
	if (!is_caught_up)
		return;
	left = unacknowledged(session);
	if (is_moving || left < gathering->unacknowledged)
		gathering->acked_ns = loop->now_ns;
	gathering->unacknowledged = left;
	if (!left) {
		wire_fit_windows(session->fds);
		take_peeked(session);
		if (is_moving && ++gathering->made > GATHERS_MOST)
			give_up_wire(loop, index, true);
	} else {
		/* For the same reason as above; the moment comes with the acknowledgement. */
		if (loop->now_ns - gathering->acked_ns >= GATHER_STALL_NS) {
			take_peeked(session);
			gathering->acked_ns = loop->now_ns;
			if (++gathering->made > GATHERS_MOST) {
				give_up_wire(loop, index, true);
				return;
			}
		}
		if (is_moving)
			gathering->pause_ns = GATHER_LOOK_NS;
		gathering->look_at_ns = loop->now_ns + gathering->pause_ns;
		if (gathering->pause_ns < GATHER_LOOK_MAX_NS)
			gathering->pause_ns *= 2;
	}
}

/* false: it cannot be done, and nothing is changed. */
static bool begin_gathering(struct loop *loop, uint32_t index, uint32_t way, const char *held,
			    size_t length)
{
	struct session *session = &loop->sessions[index];
	struct gathering *gathering = malloc(sizeof(*gathering) + length);
	int start = 0;

	if (!gathering)
		return false;
	/* Of TCP sockets since Linux 6.9. */
	if (setsockopt(session->fds[CLIENT], SOL_SOCKET, SO_PEEK_OFF, &start, sizeof(start)) ||
	    setsockopt(session->fds[BACKEND], SOL_SOCKET, SO_PEEK_OFF, &start, sizeof(start))) {
		free(gathering);
		return false;
	}
	*gathering = (struct gathering){
		.next = loop->gathering,
		.index = index,
		.look_at_ns = loop->now_ns,
		.pause_ns = GATHER_LOOK_NS,
		.moved_ns = { loop->now_ns, loop->now_ns },
		.acked_ns = loop->now_ns,
		.held_way = way,
		.held_bytes = length,
	};
	if (length)
		memcpy(gathering->held, held, length);
	loop->gathering = session->gathering = gathering;
	watch(loop, index, CLIENT, EPOLL_CTL_MOD, WATCH | EPOLLOUT);
	watch(loop, index, BACKEND, EPOLL_CTL_MOD, WATCH | EPOLLOUT);
	return true;
}

static void look_at_gatherings(struct loop *loop)
{
	struct gathering *gathering, *next;

	/* An event releases one session at most; here, too, there is room for all. */
	for (gathering = loop->gathering; gathering && loop->public.released_count < RECORDS;
	     gathering = next) {
		next = gathering->next;
		if (gathering->look_at_ns <= loop->now_ns)
			gather(loop, gathering->index);
	}
}

/* Copy what a side has sent; `events` is what epoll said of its socket. */
static void copy(struct loop *loop, uint32_t index, uint32_t side, uint32_t events)
{
	struct session *session = &loop->sessions[index];
	uint32_t way = side;
	int source = session->fds[side], target = session->fds[!side];
	ssize_t received, sent;
	int step;

	if (session->gathering) {
		gather(loop, index);
		return;
	}
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
		sent = send(target, loop->buffer, (size_t)received, MSG_NOSIGNAL);
		if (sent < 0 && errno != EAGAIN) {
			release_failed(loop, index, !way, errno);
			return;
		}
		if (sent < 0)
			sent = 0;
		count_sent(loop, session, way, sent);
		if (sent < received) {
			if (session->wire == NONE || session->is_ended[0] || session->is_ended[1] ||
			    !begin_gathering(loop, index, way, loop->buffer + sent,
					     (size_t)(received - sent)))
				release_full(loop, index, way, loop->buffer + sent,
					     (size_t)(received - sent));
			return;
		}
		if (session->wire != NONE && session->armed_bytes[way] > GATHER_BYTES &&
		    !session->is_ended[0] && !session->is_ended[1] &&
		    begin_gathering(loop, index, way, NULL, 0))
			return;
		session->is_answered |= side == BACKEND;
		if (session->bytes[way] > STREAM_BYTES && session->wire == NONE)
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
	session->wire = NONE;
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

/* Have the program watch for the moment to switch; the session stays here meanwhile. */
static void arm(struct loop *loop, uint32_t index)
{
	struct sgw_wire *wire = loop->settings.wire;
	struct session *session = &loop->sessions[index];
	enum wire_unfit unfit = wire_arm(wire, session->fds, loop->settings.worker, &session->wire);

	session->is_tried = 1;
	wire_bound(session->fds);
	if (unfit) {
		session->wire = NONE;
		session->is_unfit = 1;
		loop->public.unfit[unfit]++;
		return;
	}
	loop->public.armed++;
	session->armed_bytes[0] = session->armed_bytes[1] = 0;
	loop->by_wire[session->wire - wire_first(wire)] = index;
	wire_slot(wire, session->wire, 0)->started_ns = session->started_ns;
}

/* Let the session go on by a faster path; false if it has to be served here. */
static bool hand_over(struct loop *loop, uint32_t index, uint32_t side)
{
	struct session *session = &loop->sessions[index];
	struct sgw_released *record;

	if (loop->settings.wire && !session->is_tried)
		arm(loop, index);
	if (session->wire != NONE || !loop->settings.is_splicing || !may_hand_over(loop))
		return false;
	record = release(loop, index, SGW_HANDOVER);
	if (record)
		record->way = side;
	return true;
}

static void on_bytes(struct loop *loop, uint32_t index, uint32_t side, uint32_t events)
{
	struct session *session = &loop->sessions[index];

	if (session->wire != NONE && !session->gathering) {
		session->armed_events++;
		if (session->armed_events == CHATTY_EVENTS &&
		    session->armed_bytes[0] + session->armed_bytes[1] <=
			    CHATTY_EVENTS * CHATTY_BYTES)
			wire_slot(loop->settings.wire, session->wire, 0)->is_chatty = 1;
		if (session->armed_events > ARMED_EVENTS)
			give_up_wire(loop, index, true);
	}
	if (!is_worth_handover(loop, session, side, events) || !hand_over(loop, index, side))
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
	if (loop->public.handover == SGW_AT_ONCE &&
	    hand_over(loop, index, events & ~EPOLLOUT ? BACKEND : CLIENT))
		return;
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
	else if (session->gathering)
		gather(loop, index);
	else if (!session->is_ended[side] && events & ~EPOLLOUT)
		on_bytes(loop, index, side, events);
}

/* A session on wire is over; the sides that are named have to be told. */
static void end_wired(struct loop *loop, uint32_t index, enum sgw_end end, bool is_client_reset,
		      bool is_backend_reset)
{
	struct session *session = &loop->sessions[index];
	struct sgw_ended *record = record_end(loop, session, end);
	struct sgw_wire *wire = loop->settings.wire;
	struct wire_session found;
	uint32_t way;

	record->is_wired = 1;
	memcpy(record->stats, session->stats, sizeof(record->stats));
	for (way = 0; way < 2; way++) {
		const struct wire_slot *slot = wire_slot(wire, session->wire, way);

		record->wire_bytes[way] = slot->bytes - slot->counted_before;
	}
	if (session->is_adopted && wire_find(wire, session->wire, &found) != WIRE_FREE)
		name_flow(&found.flows[SOCK_SLOT_TO_CLIENT], record->backend_name);
	/* First the socket that keeps the ports: the reset is not for it. */
	if (session->fds[BACKEND] >= 0)
		close(session->fds[BACKEND]);
	else
		wire_vault_clear(loop->vault, index);
	wire_end(wire, session->wire, is_client_reset, is_backend_reset);
	loop->public.on_wire--;
	free_session(loop, index);
}

static bool is_over(const struct loop *loop, const struct session *session)
{
	struct wire_session found;

	return wire_find(loop->settings.wire, session->wire, &found) == WIRE_ENDED;
}

/* `keeper` is the socket that keeps its ports. */
static void settle_on_wire(struct loop *loop, uint32_t index, int keeper)
{
	struct session *session = &loop->sessions[index];

	append(loop, &loop->on_wire, index);
	session->state = ON_WIRE;
	session->active_ns = loop->now_ns;
	loop->public.on_wire++;
	if (!session->is_counted) {
		session->is_counted = 1;
		loop->public.wired++;
	}
	if (keeper == NO_KEEPER)
		return;
	if (keeper < 0)
		end_wired(loop, index, SGW_LOST, true, true);
	else if (wire_vault_put(loop->vault, index, keeper))
		close(keeper);
	else
		session->fds[BACKEND] = keeper;
}

static void on_wire_end(struct loop *loop, uint32_t index);

/* The program translates the session's packets: take the two sockets out of the game. */
static void on_switch(struct loop *loop, uint32_t index)
{
	struct session *session = &loop->sessions[index];
	uint32_t way;
	int keeper;

	if (session->gathering)
		drop_gathering(loop, session);
	read_stats(loop, session, session->stats);
	keeper = wire_leave(loop->settings.wire, session->wire, session->fds);
	/* What epoll has told of them is of no matter any more. */
	session->generation++;
	session->fds[CLIENT] = session->fds[BACKEND] = -1;
	take_out(loop, &loop->connected, index);
	loop->public.armed--;
	for (way = 0; way < 2; way++)
		wire_slot(loop->settings.wire, session->wire, way)->copied = session->bytes[way];
	/* It may be over already, and what came since then to our sockets is of no matter;
	 * on two CPUs that may even be told before this.
	 */
	if (is_over(loop, session)) {
		if (keeper >= 0)
			close(keeper);
		settle_on_wire(loop, index, NO_KEEPER);
		on_wire_end(loop, index);
	} else {
		settle_on_wire(loop, index, keeper);
	}
}

static void on_wire_end(struct loop *loop, uint32_t index)
{
	struct sgw_wire *wire = loop->settings.wire;
	uint32_t id = loop->sessions[index].wire;
	const struct wire_slot *from_client = wire_slot(wire, id, SOCK_SLOT_TO_BACKEND);
	const struct wire_slot *from_backend = wire_slot(wire, id, SOCK_SLOT_TO_CLIENT);

	/* A reset has been passed on, but if bytes before it were lost on their way its
	 * receiver did not take it: it is told again, at the number that it expects.
	 */
	if (from_client->has_reset || from_client->is_reused)
		end_wired(loop, index, SGW_CLIENT_RESET, false, true);
	else if (from_backend->has_reset || from_backend->is_reused)
		end_wired(loop, index, SGW_BACKEND_RESET, true, false);
	else
		end_wired(loop, index, SGW_EOF, false, false);
}

static int take_wire_event(void *context, void *data, size_t size)
{
	const struct wire_event *event = data;
	struct loop *loop = context;
	struct sgw_wire *wire = loop->settings.wire;
	uint32_t index = loop->by_wire[event->session - wire_first(wire)];
	struct session *session = &loop->sessions[index];

	(void)size;
	/* Not of an earlier session in that place. */
	if (session->wire != event->session ||
	    wire_slot(wire, event->session, 0)->generation != event->generation)
		return 0;
	if (event->happening == WIRE_HAS_SWITCHED && session->state == CONNECTED)
		on_switch(loop, index);
	else if (event->happening == WIRE_HAS_ENDED && session->state == ON_WIRE)
		on_wire_end(loop, index);
	else if (event->happening == WIRE_IS_UNFIT && keeps_sockets(loop, session, false)) {
		session->is_unfit = 1;
		loop->public.unfit[event->unfit]++;
	}
	/* An error ends the walk behind this record; the rest stays, and is told again. */
	return loop->public.ended_count < WIRE_RECORDS ? 0 : -ENOSPC;
}

static void take_wire_events(struct loop *loop)
{
	if (loop->wire_ring && loop->public.ended_count < WIRE_RECORDS)
		ring_buffer__consume(loop->wire_ring);
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

int sgw_loop_adopt(struct sgw_loop *public, uint32_t id, uint32_t workers)
{
	struct loop *loop = (struct loop *)public;
	struct sgw_wire *wire = loop->settings.wire;
	struct wire_session found;
	enum wire_state state = wire_find(wire, id, &found);
	const struct wire_flow *client;
	struct session *session;
	uint32_t index, way, generation;

	if (state == WIRE_FREE || found.worker % workers != loop->settings.worker ||
	    public->ended_count == RECORDS)
		return 0;
	if (state != WIRE_SWITCHED && state != WIRE_ENDED) {
		wire_free(wire, id);
		return 0;
	}
	loop->now_ns = clock_ns();
	index = take_session(loop);
	session = &loop->sessions[index];
	generation = session->generation;
	memset(session, 0, sizeof(*session));
	session->generation = generation;
	session->fds[CLIENT] = session->fds[BACKEND] = -1;
	session->wire = id;
	session->is_adopted = 1;
	session->started_ns = wire_slot(wire, id, 0)->started_ns;
	for (way = 0; way < 2; way++)
		session->bytes[way] = wire_slot(wire, id, way)->copied;
	client = &found.flows[SOCK_SLOT_TO_BACKEND];
	wire_write_side(&session->address, client->source, client->source_port, client->family);
	loop->by_wire[id - wire_first(wire)] = index;
	loop->public.open++;
	/* One that has ended needs its ports no more; another may have them. */
	settle_on_wire(loop, index, state == WIRE_SWITCHED ? wire_keep(wire, id) : NO_KEEPER);
	/* It may have ended meanwhile, and told nobody who listens. */
	if (session->state == ON_WIRE && is_over(loop, session))
		on_wire_end(loop, index);
	return 1;
}

int sgw_loop_return(struct sgw_loop *public, const struct sgw_released *returned)
{
	struct loop *loop = (struct loop *)public;
	struct sockaddr_in6 address = { 0 };
	socklen_t length = sizeof(address);
	struct session *session;
	uint32_t index, generation;

	/* ENOTCONN: it was reset just now, and that is for the caller to find out. */
	if (getpeername(returned->client, (struct sockaddr *)&address, &length))
		return -errno;
	loop->now_ns = clock_ns();
	index = take_session(loop);
	session = &loop->sessions[index];
	generation = session->generation;
	memset(session, 0, sizeof(*session));
	session->generation = generation;
	session->started_ns = loop->now_ns - returned->age_ns;
	session->active_ns = loop->now_ns;
	memcpy(session->bytes, returned->bytes, sizeof(session->bytes));
	session->fds[CLIENT] = returned->client;
	session->fds[BACKEND] = returned->backend;
	session->wire = NONE;
	session->turn = returned->turn;
	session->is_answered = returned->bytes[SOCK_SLOT_TO_CLIENT] > 0;
	session->is_counted = returned->is_counted;
	session->address = address;
	session->state = CONNECTED;
	append(loop, &loop->connected, index);
	public->open++;
	/* Setting the masks makes what there is to be read an event. */
	watch(loop, index, CLIENT, EPOLL_CTL_MOD, WATCH);
	watch(loop, index, BACKEND, EPOLL_CTL_MOD, WATCH);
	if (public->handover == SGW_AT_ONCE)
		arm(loop, index);
	return 0;
}

static bool watch_wire(struct loop *loop)
{
	struct sgw_loop_settings *settings = &loop->settings;
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = WIRE_RING };

	loop->by_wire = calloc(wire_sessions(settings->wire), sizeof(*loop->by_wire));
	loop->wire_ring = ring_buffer__new(settings->wire_ring, take_wire_event, loop, NULL);
	loop->vault = wire_vault_open(settings->sessions);
	return loop->by_wire && loop->wire_ring &&
	       !epoll_ctl(loop->epoll, EPOLL_CTL_ADD, settings->wire_ring, &event);
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
	loop->dialling = loop->connected = loop->on_wire = (struct list){ NONE, NONE };
	loop->vault = -1;
	/* Zeroed pages: what is never used takes no memory. */
	loop->sessions = calloc(settings->sessions, sizeof(*loop->sessions));
	loop->epoll = epoll_create1(EPOLL_CLOEXEC);
	if (!loop->sessions || loop->epoll < 0 || (settings->wire && !watch_wire(loop))) {
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
		for (i = 0; i < count; i++) {
			uint64_t data = events[i].data.u64;
			uint32_t index = (uint32_t)data >> 1;

			if (data == WIRE_RING)
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

int sgw_loop_reset_wired(struct sgw_loop *public, uint64_t silent_ns)
{
	struct loop *loop = (struct loop *)public;
	int before = public->ended_count;
	uint32_t index, next;

	loop->now_ns = clock_ns();
	take_wire_events(loop);
	for (index = loop->on_wire.first; index != NONE && public->ended_count < RECORDS;
	     index = next) {
		const struct session *session = &loop->sessions[index];
		uint64_t seen_ns = session->active_ns;
		uint32_t way;

		next = session->next;
		for (way = 0; way < 2; way++) {
			uint64_t ns = wire_slot(loop->settings.wire, session->wire, way)->moved_ns;

			if (ns > seen_ns)
				seen_ns = ns;
		}
		/* A record that was lost must not keep the session. */
		if (is_over(loop, session))
			on_wire_end(loop, index);
		else if (loop->now_ns >= seen_ns + silent_ns)
			end_wired(loop, index, SGW_RESET_AS_ASKED, true, true);
	}
	return public->ended_count - before;
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
