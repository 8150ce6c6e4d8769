// SPDX-License-Identifier: Apache-2.0
/*
 * Where the loop's sessions are kept, and how they leave it: released to Python with
 * all that is known of them, or ended.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "sessions.h"

uint64_t clock_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

const struct target *target_of(const struct loop *loop, const struct session *session)
{
	return &loop->targets[session->target];
}

void append(struct loop *loop, struct list *list, uint32_t index)
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

void take_out(struct loop *loop, struct list *list, uint32_t index)
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

uint32_t take_session(struct loop *loop)
{
	uint32_t index = loop->free, generation;
	struct session *session;

	if (index == NONE)
		index = loop->used++;
	else
		loop->free = loop->sessions[index].next;
	session = &loop->sessions[index];
	generation = session->generation;
	memset(session, 0, sizeof(*session));
	session->generation = generation;
	session->started_ns = session->active_ns = loop->now_ns;
	session->fds[CLIENT] = session->fds[BACKEND] = -1;
	session->wire = session->direct = NONE;
	session->captured = loop->settings.found_map < 0 ? DIRECT_NO : DIRECT_NOT_YET;
	loop->public.open++;
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

void free_session(struct loop *loop, uint32_t index)
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

void name_flow(const struct wire_flow *flow, char *text)
{
	struct sockaddr_in6 address;

	wire_write_side(&address, flow->source, flow->source_port, flow->family);
	format_address(&address, text);
}

void count_relayed(struct loop *loop, struct session *session)
{
	if (!session->is_counted) {
		session->is_counted = 1;
		loop->public.relayed++;
	}
}

void count_sent(struct loop *loop, struct session *session, uint32_t way, ssize_t sent)
{
	session->bytes[way] += (uint64_t)sent;
	session->armed_bytes[way] += (uint64_t)sent;
	loop->public.bytes[way] += (uint64_t)sent;
	session->active_ns = loop->now_ns;
}

/* Tell whether the sockets are still the session's; from then on they will be. An
 * armed one may have switched just now: what its sockets say is then of no matter.
 */
bool keeps_sockets(struct loop *loop, struct session *session, bool is_ending)
{
	if (session->state == ON_WIRE)
		return false;
	if (session->wire != NONE) {
		struct sgw_wire *wire = loop->settings.wire;
		uint32_t side;

		for (side = 0; side < 2; side++)
			session->told[side] = wire_slot(wire, session->wire, side)->most_told;
		if (!wire_disarm(wire, session->wire, is_ending ? NULL : session->fds))
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

/* Let Python have the session as it is, and its sockets; NULL if it is on wire. */
struct sgw_released *release(struct loop *loop, uint32_t index, enum sgw_reason reason)
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
	record->captured = session->captured;
	if (session->direct != NONE) { /* Python's, as its sockets are */
		record->is_direct = true;
		record->direct = session->direct;
		session->direct = NONE;
		loop->public.on_direct--;
	}
	memcpy(record->told, session->told, sizeof(record->told));
	record->turn = session->turn;
	record->target = session->target;
	record->age_ns = loop->now_ns - session->started_ns;
	memcpy(record->bytes, session->bytes, sizeof(record->bytes));
	memcpy(record->direct_bytes, session->direct_bytes, sizeof(record->direct_bytes));
	memcpy(record->is_ended, session->is_ended, sizeof(record->is_ended));
	format_address(&session->address, record->client_name);
	free_session(loop, index);
	return record;
}

void release_failed(struct loop *loop, uint32_t index, uint32_t way, int error)
{
	struct sgw_released *record = release(loop, index, SGW_FAILED);

	if (!record)
		return;
	record->way = way;
	record->error = error;
}

void release_undialled(struct loop *loop, uint32_t index, int error)
{
	struct sgw_released *record = release(loop, index, SGW_DIAL_FAILED);

	if (record) /* it was never armed */
		record->error = error;
}

/* The target has no room for what was received in `way`, or it may not be sent on yet. */
void release_full(struct loop *loop, uint32_t index, uint32_t way, const char *held, size_t length)
{
	struct sgw_released *record = release(loop, index, SGW_FULL);

	if (!record) /* it cannot be: what is held keeps the moment away */
		return;
	record->way = way;
	hold(record, way, held, length);
}

struct sgw_ended *record_end(struct loop *loop, const struct session *session, enum sgw_end end)
{
	struct sgw_ended *record = &loop->ended[loop->public.ended_count++];

	memset(record, 0, sizeof(*record));
	record->target = session->target;
	record->end = end;
	record->age_ns = loop->now_ns - session->started_ns;
	memcpy(record->bytes, session->bytes, sizeof(record->bytes));
	memcpy(record->direct_bytes, session->direct_bytes, sizeof(record->direct_bytes));
	if (loop->settings.is_logging)
		format_address(&session->address, record->client_name);
	return record;
}

void read_stats(const struct loop *loop, const struct session *session, struct sock_stats *stats)
{
	if (!loop->settings.is_logging)
		return;
	sgw_stats(loop->settings.stats_map, session->fds[CLIENT], &stats[CLIENT]);
	sgw_stats(loop->settings.stats_map, session->fds[BACKEND], &stats[BACKEND]);
}

int watch(struct loop *loop, uint32_t index, uint32_t side, int operation, uint32_t events)
{
	const struct session *session = &loop->sessions[index];
	uint64_t generation = session->generation & GENERATION_MASK;
	struct epoll_event event = {
		.events = events,
		.data.u64 = OWN | generation << 32 | index << 1 | side,
	};

	return epoll_ctl(loop->epoll, operation, session->fds[side], &event) ? errno : 0;
}
