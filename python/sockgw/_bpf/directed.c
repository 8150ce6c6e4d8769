// SPDX-License-Identifier: Apache-2.0
/*
 * The loop's sessions on direct: both applications are on this host, and while they read
 * what they are sent nothing comes to us. What TCP brings is copied as ever, as long as
 * it comes next; a chunk that was overtaken, an application that is not fit for
 * it, an end with something unread are for Python to decide.
 */
#include <errno.h>
#include "sessions.h"

/* Told of direct before the sockets have their turn. */
#define DIRECT_RECORDS (RECORDS - 2 * EVENTS)

static uint32_t slot_of(const struct session *session, uint32_t way)
{
	return session->direct * SOCK_SLOTS_PER_SESSION + way;
}

/* What close() says to the application: that it is over, or a reset. Whatever ends this
 * process, an application that has not read all that was handed to it must not take
 * that for the end.
 */
static void set_abortive(const struct session *session, bool is_abortive)
{
	struct linger linger = { .l_onoff = is_abortive };

	setsockopt(session->fds[CLIENT], SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
	setsockopt(session->fds[BACKEND], SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
}

/* Have the kernel hand over what the applications send, if both are known. */
void go_direct(struct loop *loop, uint32_t index)
{
	struct session *session = &loop->sessions[index];
	struct sgw_direct *direct = loop->settings.direct;
	int answer = sgw_direct_watch(direct, session->fds[CLIENT], session->fds[BACKEND],
				      loop->settings.worker, &session->direct);

	if (answer != DIRECT_YES) {
		session->direct = NONE;
		session->captured = DIRECT_NO;
		if (answer >= 0)
			loop->public.uncaptured++;
		else if (answer == -ENOSPC || answer == -ENOMEM)
			loop->public.undirected_for_room++;
		else
			loop->public.undirected++;
		return;
	}
	sgw_direct_way(direct, slot_of(session, 0))->session = index;
	set_abortive(session, true);
	loop->public.on_direct++;
	if (!session->is_counted) {
		session->is_counted = 1;
		loop->public.directed++;
	}
}

/* Was something handed over after what was just received had been sent? */
bool is_overtaken(const struct loop *loop, const struct session *session, uint32_t way)
{
	return session->direct != NONE &&
	       sgw_direct_is_overtaken(loop->settings.direct, slot_of(session, way));
}

/* The FIN of `way` has come; false if it may not be passed on yet, and the session is
 * Python's.
 */
bool may_end(struct loop *loop, uint32_t index, uint32_t way)
{
	struct session *session = &loop->sessions[index];
	const struct sgw_direct *direct = loop->settings.direct;

	if (session->direct == NONE)
		return true;
	/* Closed with bytes unread: to TCP that is a reset. */
	if (sgw_direct_words(direct, slot_of(session, !way))->was_cut) {
		release_failed(loop, index, way, ECONNRESET);
		return false;
	}
	if (!is_overtaken(loop, session, way) ||
	    sgw_direct_is_flushed(direct, slot_of(session, way)) == 1)
		return true;
	release(loop, index, SGW_ASKED);
	return false;
}

/* Its end, by a FIN from either side: close() of our sockets is to say that. */
void leave_direct(struct loop *loop, struct session *session, struct sgw_ended *record)
{
	uint32_t way;

	if (session->direct == NONE)
		return;
	record->path = SGW_ON_DIRECT;
	for (way = 0; way < SOCK_SLOTS_PER_SESSION; way++)
		record->direct_bytes[way] += handed_over(loop, session, way);
	set_abortive(session, false);
}

void forget_direct(struct loop *loop, struct session *session)
{
	if (session->direct == NONE)
		return;
	sgw_direct_forget(loop->settings.direct, session->direct);
	session->direct = NONE;
	loop->public.on_direct--;
}

uint64_t handed_over(const struct loop *loop, const struct session *session, uint32_t way)
{
	const struct sgw_direct *direct = loop->settings.direct;
	uint32_t slot = slot_of(session, way);

	return sgw_direct_words(direct, slot)->bytes - sgw_direct_way(direct, slot)->before;
}

/* Has nothing been handed over since it was last asked? */
bool is_silent_on_direct(const struct loop *loop, struct session *session)
{
	uint64_t bytes;

	if (session->direct == NONE)
		return true;
	bytes = handed_over(loop, session, 0) + handed_over(loop, session, 1);
	if (bytes == session->seen_direct)
		return true;
	session->seen_direct = bytes;
	session->active_ns = loop->now_ns;
	return false;
}

static int take_direct_event(void *context, void *data, size_t size)
{
	const struct direct_event *event = data;
	struct loop *loop = context;
	struct sgw_direct *direct = loop->settings.direct;
	uint32_t id = event->slot / SOCK_SLOTS_PER_SESSION;
	const struct direct_slot *words = sgw_direct_words(direct, event->slot);
	uint32_t index = sgw_direct_way(direct, id * SOCK_SLOTS_PER_SESSION)->session;
	const struct session *session = &loop->sessions[index];

	(void)size;
	if (session->state != CONNECTED || session->direct != id) {
		loop->told[loop->public.told_count++] = id;
	} else {
		if (words->is_told)
			sgw_direct_ask(direct, DIRECT_OPEN, event->slot);
		if (words->refusal)
			release(loop, index, SGW_ASKED);
	}
	/* An error ends the walk behind this record; the rest stays, and is told again. */
	return loop->public.told_count < RECORDS && loop->public.released_count < DIRECT_RECORDS ?
		       0 :
		       -ENOSPC;
}

void take_direct_events(struct loop *loop)
{
	if (loop->direct_ring && loop->public.told_count < RECORDS &&
	    loop->public.released_count < DIRECT_RECORDS)
		ring_buffer__consume(loop->direct_ring);
}

bool watch_direct(struct loop *loop)
{
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = DIRECT_RING };

	loop->direct_ring =
		ring_buffer__new(loop->settings.direct_ring, take_direct_event, loop, NULL);
	return loop->direct_ring &&
	       !epoll_ctl(loop->epoll, EPOLL_CTL_ADD, loop->settings.direct_ring, &event);
}
