// SPDX-License-Identifier: Apache-2.0
/*
 * What a stream is taken out of the relay by.
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
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/sockios.h>
#include "sessions.h"

/* One that has been made to pause so often, and has not switched, never will. */
#define GATHERS_MOST 64
/* A target that has taken nothing for so long is not on its way anywhere. */
#define GATHER_STALL_NS 250000000
/* What is waited for is looked at after so long, and after twice as long each further time. */
#define GATHER_LOOK_NS 1000000
#define GATHER_LOOK_MAX_NS 64000000

static void set_peek_offset(int fd, int offset)
{
	setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &offset, sizeof(offset));
}

/* Take what was sent on from the sources' queues. */
void take_peeked(struct session *session)
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

void drop_gathering(struct loop *loop, struct session *session)
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
void give_up_wire(struct loop *loop, uint32_t index, bool is_for_good)
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

void gather(struct loop *loop, uint32_t index)
{
	struct session *session = &loop->sessions[index];
	struct gathering *gathering = session->gathering;
	bool is_caught_up = true, is_moving = false;
	uint32_t way;
	int left;

	if (session->wire == NONE) { /* found unfit meanwhile */
		stop_gathering(loop, index);
		return;
	}
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
		wire_fit_windows(loop->settings.wire, session->wire, session->fds);
		take_peeked(session);
		if (is_moving && ++gathering->made > GATHERS_MOST)
			give_up_wire(loop, index, true);
	} else if (loop->now_ns - gathering->acked_ns >= GATHER_STALL_NS) {
		give_up_wire(loop, index, false); /* for the same reason as above */
	} else {
		if (is_moving)
			gathering->pause_ns = GATHER_LOOK_NS;
		gathering->look_at_ns = loop->now_ns + gathering->pause_ns;
		if (gathering->pause_ns < GATHER_LOOK_MAX_NS)
			gathering->pause_ns *= 2;
	}
}

/* false: it cannot be done, and nothing is changed. */
bool begin_gathering(struct loop *loop, uint32_t index, uint32_t way, const char *held,
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

void look_at_gatherings(struct loop *loop)
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
