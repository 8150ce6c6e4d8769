// SPDX-License-Identifier: Apache-2.0
/*
 * The loop's sessions on wire: armed, switched, adopted and ended. What is done to
 * sockets and maps for that is wire.c's.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "sessions.h"

#define NO_KEEPER (-2)

/* Told of the wire before the sockets have their turn. */
#define WIRE_RECORDS (RECORDS - 2 * EVENTS)

/* Have the program watch for the moment to switch; the session stays here meanwhile. */
void arm(struct loop *loop, uint32_t index)
{
	struct sgw_wire *wire = loop->settings.wire;
	struct session *session = &loop->sessions[index];
	enum wire_unfit unfit =
		wire_arm(wire, session->fds, loop->settings.worker, session->told, &session->wire);

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

/* A session on wire is over; the sides that are named have to be told. */
static void end_wired(struct loop *loop, uint32_t index, enum sgw_end end, bool is_client_reset,
		      bool is_backend_reset)
{
	struct session *session = &loop->sessions[index];
	struct sgw_ended *record = record_end(loop, session, end);
	struct sgw_wire *wire = loop->settings.wire;
	struct wire_session found;
	uint32_t way;

	record->path = SGW_ON_WIRE;
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
	for (way = 0; way < 2; way++) {
		struct wire_slot *slot = wire_slot(loop->settings.wire, session->wire, way);

		slot->copied = session->bytes[way];
		/* On two CPUs that may have been told before the switch, and not been heard. */
		__atomic_store_n(&slot->is_too_long, 0, __ATOMIC_SEQ_CST);
	}
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
	else if (event->happening == WIRE_IS_TOO_LONG && session->state == ON_WIRE)
		wire_tell_too_long(wire, event->session, event->detail);
	else if (event->happening == WIRE_IS_UNFIT && keeps_sockets(loop, session, false)) {
		session->is_unfit = 1;
		/* It is released there, where it is known how many may be. */
		if (session->gathering)
			session->gathering->look_at_ns = 0;
		loop->public.unfit[event->detail]++;
	}
	/* An error ends the walk behind this record; the rest stays, and is told again. */
	return loop->public.ended_count < WIRE_RECORDS ? 0 : -ENOSPC;
}

void take_wire_events(struct loop *loop)
{
	if (loop->wire_ring && loop->public.ended_count < WIRE_RECORDS)
		ring_buffer__consume(loop->wire_ring);
}

bool watch_wire(struct loop *loop)
{
	struct sgw_loop_settings *settings = &loop->settings;
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = WIRE_RING };

	loop->by_wire = calloc(wire_sessions(settings->wire), sizeof(*loop->by_wire));
	loop->wire_ring = ring_buffer__new(settings->wire_ring, take_wire_event, loop, NULL);
	loop->vault = wire_vault_open(settings->sessions);
	return loop->by_wire && loop->wire_ring &&
	       !epoll_ctl(loop->epoll, EPOLL_CTL_ADD, settings->wire_ring, &event);
}

int sgw_loop_adopt(struct sgw_loop *public, uint32_t id, uint32_t workers)
{
	struct loop *loop = (struct loop *)public;
	struct sgw_wire *wire = loop->settings.wire;
	struct wire_session found;
	enum wire_state state = wire_find(wire, id, &found);
	const struct wire_flow *client;
	struct session *session;
	uint32_t index, way;

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
	session->wire = id;
	session->is_adopted = 1;
	session->started_ns = wire_slot(wire, id, 0)->started_ns;
	for (way = 0; way < 2; way++)
		session->bytes[way] = wire_slot(wire, id, way)->copied;
	client = &found.flows[SOCK_SLOT_TO_BACKEND];
	wire_write_side(&session->address, client->source, client->source_port, client->family);
	loop->by_wire[id - wire_first(wire)] = index;
	/* One that has ended needs its ports no more; another may have them. */
	settle_on_wire(loop, index, state == WIRE_SWITCHED ? wire_keep(wire, id) : NO_KEEPER);
	/* It may have ended meanwhile, and told nobody who listens. */
	if (session->state == ON_WIRE && is_over(loop, session))
		on_wire_end(loop, index);
	return 1;
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
