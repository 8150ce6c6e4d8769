// SPDX-License-Identifier: Apache-2.0
/*
 * The sessions that need nobody to decide anything: dialled, copied, closed, or handed
 * over to a faster path.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/tcp.h>
#include <string.h>
#include <unistd.h>
#include "sessions.h"

/* One that has sent so much without an answer is a stream. */
#define STREAM_BYTES 65536

/* Handing over costs as much as a few hundred requests on either path, and the
 * sessions that wait for it are served here meanwhile. A few are handed over at
 * once, so many in a turn; it may not take more than one part in so many of
 * the thread's time but for so long.
 */
#define HANDOVER_BURST 64
#define HANDOVER_PART 4
#define HANDOVER_AHEAD_NS 16000000
#define HANDOVER_MOST_NS 1000000 /* one handover; longer it waited for something else */

/* A backend's kernel may see the end of the handshake later than ours: by microseconds or,
 * with TCP_DEFER_ACCEPT, at the client's first bytes.
 */
#define CAPTURED_BY_NS 1000000000

/* A stream that is armed and does not pause is made to, when it has sent so much. */
#define GATHER_BYTES 262144

/* One that has had so many events since it was armed, and has not switched, never will:
 * something is always in flight, or its packets do not pass the program as our sockets
 * see them.
 */
#define ARMED_EVENTS 1024

/* After so many events, and no more than so many bytes each, it is a dialogue of
 * small messages: that one side might send more than the other takes is no reason
 * to wait any longer.
 */
#define CHATTY_EVENTS 6
#define CHATTY_BYTES 8192

/* Both sides have sent their FIN and all is sent on. */
static void finish(struct loop *loop, uint32_t index)
{
	struct session *session = &loop->sessions[index];
	struct sgw_ended *record;

	if (!keeps_sockets(loop, session, true)) /* it cannot be: after a FIN nothing switches */
		return;
	count_relayed(loop, session);
	record = record_end(loop, session, SGW_EOF);
	read_stats(loop, session, record->stats);
	leave_direct(loop, session, record);
	/* What close() sends first to one of them is that FIN. */
	close(session->fds[BACKEND]);
	close(session->fds[CLIENT]);
	forget_direct(loop, session);
	free_session(loop, index);
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
			if (!may_end(loop, index, way))
				return;
			if (session->is_ended[!way])
				finish(loop, index);
			else if (shutdown(target, SHUT_WR)) /* ENOTCONN: reset just now */
				release_failed(loop, index, !way, errno);
			else
				session->is_ended[way] = 1;
			return;
		}
		/* recv() first, then the look: what came before is not behind it. */
		if (is_overtaken(loop, session, way)) {
			release_full(loop, index, way, loop->buffer, (size_t)received);
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
		if (session->bytes[way] > STREAM_BYTES && session->wire == NONE &&
		    session->direct == NONE)
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
	if (loop->settings.own_map >= 0)
		bpf_map_update_elem(loop->settings.own_map, &fd, &(uint32_t){ 1 }, BPF_ANY);
	if (connect(fd, (const struct sockaddr *)&target->address, target->length) &&
	    errno != EINPROGRESS)
		return errno;
	return watch(loop, index, BACKEND, EPOLL_CTL_ADD, WATCH | EPOLLOUT);
}

/* Take an accepted client, and dial the backend whose turn it is. */
void begin(struct loop *loop, int client, const struct sockaddr_in6 *address)
{
	uint32_t index = take_session(loop);
	struct session *session = &loop->sessions[index];
	int error;

	session->fds[CLIENT] = client;
	session->address = *address;
	session->turn = (uint32_t)__atomic_fetch_add(loop->settings.turns, 1, __ATOMIC_RELAXED);
	session->target = session->turn % loop->settings.rotation;
	session->state = DIALLING;
	append(loop, &loop->dialling, index);

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
		return side == BACKEND ||
		       ((session->is_answered || session->captured == DIRECT_NOT_YET) &&
			!(events & EPOLLRDHUP));
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
void account_for_handovers(struct loop *loop)
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

/* The client was captured before our end was established, or never will be; so was a backend
 * that has sent something.
 */
static enum direct_answer are_captured(const struct loop *loop, const struct session *session,
				       bool is_answered)
{
	uint64_t client = sgw_cookie(session->fds[CLIENT]);
	uint64_t backend = sgw_cookie(session->fds[BACKEND]);
	int map = loop->settings.found_map;
	struct direct_found end;

	if (bpf_map_lookup_elem(map, &client, &end))
		return DIRECT_NO;
	if (!bpf_map_lookup_elem(map, &backend, &end))
		return DIRECT_YES;
	if (is_answered || loop->now_ns - session->started_ns >= CAPTURED_BY_NS)
		return DIRECT_NO;
	return DIRECT_NOT_YET;
}

/* Decide which faster path the session is for. The way to the wire begins here. */
void choose_path(struct loop *loop, uint32_t index, uint32_t side)
{
	struct session *session = &loop->sessions[index];

	if (session->captured == DIRECT_NOT_YET) {
		session->captured =
			are_captured(loop, session, side == BACKEND || session->is_answered);
		loop->public.uncaptured += session->captured == DIRECT_NO;
	}
	if (session->captured == DIRECT_YES && session->direct == NONE &&
	    !(session->seen & EPOLLRDHUP))
		go_direct(loop, index);
	if (session->captured == DIRECT_NO && loop->settings.wire && !session->is_tried)
		arm(loop, index);
}

/* Let the session go on by a faster path; false if it has to be served here. */
bool hand_over(struct loop *loop, uint32_t index, uint32_t side)
{
	struct session *session = &loop->sessions[index];
	struct sgw_released *record;

	choose_path(loop, index, side);
	if (session->captured == DIRECT_NOT_YET || session->wire != NONE ||
	    session->direct != NONE || !loop->settings.is_splicing || !may_hand_over(loop))
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
	if (session->direct != NONE || !is_worth_handover(loop, session, side, events) ||
	    !hand_over(loop, index, side))
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

void on_event(struct loop *loop, uint32_t index, uint32_t side, uint32_t events)
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

void give_up_dials(struct loop *loop)
{
	uint64_t patience_ns = loop->settings.connect_timeout_ns;

	while (loop->dialling.first != NONE && loop->public.released_count < RECORDS &&
	       loop->sessions[loop->dialling.first].started_ns + patience_ns <= loop->now_ns)
		release_undialled(loop, loop->dialling.first, ETIMEDOUT);
}
