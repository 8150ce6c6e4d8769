/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loop's sessions, and what its parts ask of each other: where they are kept and
 * how they leave (sessions.c), the plain ones (plain.c), those that are made to pause
 * (gather.c), those on direct (directed.c) and those on wire (wired.c). loop.c has the
 * turns of the loop around them.
 */
#ifndef SOCKGW_SESSIONS_H
#define SOCKGW_SESSIONS_H

#include <netinet/in.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include "wire_calls.h"

/* Of epoll_data: a socket of the loop's, not a descriptor of Python's. Below it
 * are the session's generation, its index, and the side: an event that was
 * fetched before its session ended finds another generation there.
 */
#define OWN (1ULL << 63)
#define GENERATION_MASK 0x7fffffffU
#define WIRE_RING UINT64_MAX
#define DIRECT_RING (UINT64_MAX - 1)

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

#define NAME_BYTES sizeof(((struct sgw_ended *)0)->client_name)

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
	uint64_t direct_bytes[2]; /* before it was returned */
	uint64_t seen_direct; /* bytes handed over, when it was last found to be idle */
	int fds[2]; /* by side */
	uint32_t generation;
	uint32_t turn;
	uint32_t target;
	uint32_t next; /* in its state's list */
	uint32_t previous;
	uint32_t wire; /* its id there, or NONE */
	uint32_t direct; /* and so */
	uint32_t seen; /* epoll's events of the client while its backend is dialled */
	uint8_t state;
	uint8_t is_ended[2]; /* by way: its FIN is passed on */
	uint8_t is_urgent; /* urgent bytes were seen */
	uint8_t is_answered; /* the backend has sent something */
	uint8_t is_counted; /* in relayed */
	uint8_t captured; /* enum direct_answer: are both applications? */
	uint8_t is_tried; /* whether it can go by wire was asked */
	uint8_t is_unfit; /* and it cannot, or never has the moment */
	uint16_t armed_events;
	uint64_t armed_bytes[2]; /* sent since, by way */
	uint32_t told[2]; /* the largest window that each side was told before */
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
	uint32_t made; /* moments that were not used */
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
	struct ring_buffer *direct_ring;
	int vault;
	uint32_t *by_wire; /* sessions[] by id - the process's first */
	struct sgw_event events[EVENTS];
	struct sgw_released released[RECORDS];
	struct sgw_ended ended[RECORDS];
	uint32_t told[RECORDS];
	char buffer[SGW_COPY_BYTES];
};

/* --- sessions.c */

uint64_t clock_ns(void);
const struct target *target_of(const struct loop *loop, const struct session *session);
void append(struct loop *loop, struct list *list, uint32_t index);
void take_out(struct loop *loop, struct list *list, uint32_t index);
/* A new one, in no list yet: it has begun now, and has no sockets. */
uint32_t take_session(struct loop *loop);
void free_session(struct loop *loop, uint32_t index);
/* `text` has NAME_BYTES. */
void name_flow(const struct wire_flow *flow, char *text);
void count_relayed(struct loop *loop, struct session *session);
void count_sent(struct loop *loop, struct session *session, uint32_t way, ssize_t sent);
bool keeps_sockets(struct loop *loop, struct session *session, bool is_ending);
struct sgw_released *release(struct loop *loop, uint32_t index, enum sgw_reason reason);
void release_failed(struct loop *loop, uint32_t index, uint32_t way, int error);
void release_undialled(struct loop *loop, uint32_t index, int error);
void release_full(struct loop *loop, uint32_t index, uint32_t way, const char *held, size_t length);
struct sgw_ended *record_end(struct loop *loop, const struct session *session, enum sgw_end end);
void read_stats(const struct loop *loop, const struct session *session, struct sock_stats *stats);
/* 0 or an errno. */
int watch(struct loop *loop, uint32_t index, uint32_t side, int operation, uint32_t events);

/* --- plain.c */

void begin(struct loop *loop, int client, const struct sockaddr_in6 *address);
void choose_path(struct loop *loop, uint32_t index, uint32_t side);
bool hand_over(struct loop *loop, uint32_t index, uint32_t side);
void account_for_handovers(struct loop *loop);
void on_event(struct loop *loop, uint32_t index, uint32_t side, uint32_t events);
void give_up_dials(struct loop *loop);

/* --- gather.c */

bool begin_gathering(struct loop *loop, uint32_t index, uint32_t way, const char *held,
		     size_t length);
void gather(struct loop *loop, uint32_t index);
void look_at_gatherings(struct loop *loop);
void take_peeked(struct session *session);
void drop_gathering(struct loop *loop, struct session *session);
void give_up_wire(struct loop *loop, uint32_t index, bool is_for_good);

/* --- directed.c */

/* false: no memory, or no descriptor. */
bool watch_direct(struct loop *loop);
void take_direct_events(struct loop *loop);
void go_direct(struct loop *loop, uint32_t index);
bool is_overtaken(const struct loop *loop, const struct session *session, uint32_t way);
bool may_end(struct loop *loop, uint32_t index, uint32_t way);
void leave_direct(struct loop *loop, struct session *session, struct sgw_ended *record);
void forget_direct(struct loop *loop, struct session *session);
uint64_t handed_over(const struct loop *loop, const struct session *session, uint32_t way);
bool is_silent_on_direct(const struct loop *loop, struct session *session);

/* --- wired.c */

/* false: no memory, or no descriptor. */
bool watch_wire(struct loop *loop);
void take_wire_events(struct loop *loop);
void arm(struct loop *loop, uint32_t index);

#endif
