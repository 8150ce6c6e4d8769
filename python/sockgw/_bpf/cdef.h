/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What Python calls, read by the C compiler and by cffi alike: the part of
 * libbpf that is used (the compiler holds it against libbpf's own headers)
 * and the shim.
 */

const char *libbpf_version_string(void);

struct bpf_object;
struct bpf_object_open_opts;
struct bpf_program;
struct bpf_map;
struct bpf_link;

struct bpf_object *bpf_object__open_file(const char *path, const struct bpf_object_open_opts *opts);
int bpf_object__load(struct bpf_object *object);
void bpf_object__close(struct bpf_object *object);
struct bpf_map *bpf_object__find_map_by_name(const struct bpf_object *object, const char *name);
struct bpf_program *bpf_object__find_program_by_name(const struct bpf_object *object,
						     const char *name);
int bpf_program__set_autoload(struct bpf_program *program, bool autoload);
int bpf_program__fd(const struct bpf_program *program);
struct bpf_link *bpf_program__attach(const struct bpf_program *program);
struct bpf_link *bpf_program__attach_cgroup(const struct bpf_program *program, int cgroup_fd);
int bpf_link__destroy(struct bpf_link *link);
int bpf_map__set_max_entries(struct bpf_map *map, uint32_t max_entries);
int bpf_map__set_initial_value(struct bpf_map *map, const void *data, size_t size);
int bpf_map__fd(const struct bpf_map *map);
uint32_t bpf_map__max_entries(const struct bpf_map *map);
uint32_t bpf_map__key_size(const struct bpf_map *map);
uint32_t bpf_map__value_size(const struct bpf_map *map);
int bpf_map_update_elem(int fd, const void *key, const void *value, __u64 flags);
int bpf_map_lookup_elem(int fd, const void *key, void *value);
struct bpf_map_batch_opts;
int bpf_map_delete_elem(int fd, const void *key);
int bpf_map_update_batch(int fd, const void *keys, const void *values, uint32_t *count,
			 const struct bpf_map_batch_opts *opts);
int bpf_map_get_next_key(int fd, const void *key, void *next_key);
int bpf_map__reuse_fd(struct bpf_map *map, int fd);
struct bpf_link_update_opts;
int bpf_link_update(int link, int program, const struct bpf_link_update_opts *opts);
int bpf_obj_pin(int fd, const char *path);
int bpf_obj_get(const char *path);

/* Attach a verdict program to a sockmap; it goes when the map goes. */
int sgw_attach_verdict(int program, int sock_map);

/* Attach a program to what the sockets of a sockmap send; it goes when the map goes. */
int sgw_attach_sender(int program, int sock_map);

/* libbpf's messages, the verifier's log among them, since the last reset. */
void sgw_log_capture(void);
void sgw_log_reset(void);
const char *sgw_log_text(void);

/* What SO_SNDBUF and SO_RCVBUF of a paired socket are set to. */
#define SGW_BUFFER_BYTES 2097152

/* The steps of pairing, in this order. */
enum sgw_step {
	SGW_STEP_CHECK, /* both sockets are ESTABLISHED */
	SGW_STEP_BUFFERS, /* room for the credit rule, and a bound */
	SGW_STEP_COOKIES,
	SGW_STEP_PAIR_CLIENT, /* sock_pair_map before sock_map: */
	SGW_STEP_PAIR_BACKEND, /* a verdict that runs finds its pair */
	SGW_STEP_SOCK_FIRST,
	SGW_STEP_SOCK_SECOND,
	SGW_STEP_KICK_FIRST,
	SGW_STEP_KICK_SECOND,
	SGW_STEPS,
};

struct sgw_pair {
	int pair_map;
	int sock_map;
	int client;
	int backend;
	uint32_t slot; /* to_backend; the next one is to_client */
	uint32_t worker;
	/* Which enters sock_map first: the silent one. What the other one's peer
	 * sends meanwhile would find no target, and be passed.
	 */
	bool is_client_first;
	uint64_t client_cookie; /* set by SGW_STEP_COOKIES */
	uint64_t backend_cookie;
};

/* Run one step: 0 or -errno. */
int sgw_pair_step(struct sgw_pair *pair, enum sgw_step step);
/* Run them all, up to one that fails: SGW_STEPS, or that step and *error. */
int sgw_pair_all(struct sgw_pair *pair, int *error);
/* Take back what was put into sock_pair_map before step (SGW_STEPS: all of it);
 * once a socket is in sock_map, not before both are closed.
 */
void sgw_unpair(const struct sgw_pair *pair, int step);

/* Count n more passed bytes as taken by the target's TCP. */
void sgw_forward(struct sock_slot *slot, uint64_t n);
/* Let go of a direction: 1 when no byte of it is left with userspace. */
int sgw_release(struct sock_slot *slot);

struct sgw_totals {
	uint64_t redirected[2]; /* bytes, by SOCK_SLOT_TO_... */
	uint64_t redirected_segments;
	uint64_t passed_segments;
};

void sgw_totals(const struct sock_slot *slots, size_t count, struct sgw_totals *totals);

struct sgw_tcp {
	uint64_t received; /* bytes, in order; a FIN counts as one */
	uint64_t taken; /* bytes put into its write queue; an own SYN counts as one */
};

int sgw_tcp(int fd, struct sgw_tcp *tcp);

/* Look a connection up in sock_stats; map -1: all zero. established_ns is 0 when
 * nothing is known.
 */
void sgw_stats(int map, int fd, struct sock_stats *stats);

struct sgw_ring;

/* Make a ring buffer: a map's fd, or -errno. */
int sgw_ring_create(const char *name, uint32_t bytes);
struct sgw_ring *sgw_ring_open(int map);
void sgw_ring_close(struct sgw_ring *ring);
/* Take up to max records: their number, or -errno. */
int sgw_ring_drain(struct sgw_ring *ring, uint32_t *slots, int max);

/* A copy without decisions: whole chunks, received and sent on. */
struct sgw_run {
	int source;
	int target;
	char *buffer; /* of SGW_COPY_BYTES */
	uint32_t chunks; /* at most so many */
	struct sock_slot *slot; /* NULL: the source is in no map */
	uint64_t redirected; /* slot's, at the last flush: while it stands, order is kept */
	const struct direct_slot *direct; /* NULL: nothing of this direction goes direct */
	uint64_t handed_over; /* direct's bytes, at the last flush: as redirected */
	/* The result. */
	uint64_t taken;
	uint64_t written;
	uint32_t held_from; /* what was received and not sent, in buffer */
	uint32_t held_to;
	bool is_in_doubt; /* slot does not say what it should, and nothing was sent */
	int error; /* the source's; 0: none */
};

/* Copy until the source is empty or ends, a socket fails, or something is held. */
void sgw_run(struct sgw_run *run);

/* The direct path (direct.c): one for each process. An id is a session's place, a slot
 * the place of one of its directions.
 */

struct sgw_direct;

struct sgw_direct_settings {
	int program; /* sock_direct_ask */
	struct direct_slot *slots; /* of all processes */
	uint32_t first; /* of this one's places */
	uint32_t sessions;
};

struct sgw_direct_way { /* what userspace knows of a direction of a session that is watched */
	uint64_t before; /* its words' bytes when the session began */
	uint64_t flushed_at; /* and when the receiver was last found to have read everything */
	uint32_t session; /* the loop's, of a session that is with it */
	bool is_counted; /* why it is refused */
};

/* NULL: no memory. */
struct sgw_direct *sgw_direct_open(const struct sgw_direct_settings *settings);
/* Make a forked process's copy its own, with these places; none is in use yet. */
void sgw_direct_narrow(struct sgw_direct *direct, uint32_t first, uint32_t sessions);
void sgw_direct_close(struct sgw_direct *direct);
/* Sessions that are watched. */
uint32_t sgw_direct_active(const struct sgw_direct *direct);
struct direct_slot *sgw_direct_words(const struct sgw_direct *direct, uint32_t slot);
struct sgw_direct_way *sgw_direct_way(const struct sgw_direct *direct, uint32_t slot);
/* Find the applications' sockets at the other ends of our two, and hear of them in `worker`'s
 * ring: an enum direct_answer, with *id if that is DIRECT_YES, or -errno.
 */
int sgw_direct_watch(struct sgw_direct *direct, int client, int backend, uint32_t worker,
		     uint32_t *id);
/* Leave a session's applications to themselves: our sockets are closed, or go on by TCP. */
void sgw_direct_forget(struct sgw_direct *direct, uint32_t id);
/* Ask anything but DIRECT_WATCH: an enum direct_answer, or -errno. */
int sgw_direct_ask(const struct sgw_direct *direct, enum direct_question question, uint32_t slot);
/* Were bytes handed over since the last flush? */
bool sgw_direct_is_overtaken(const struct sgw_direct *direct, uint32_t slot);
/* Has the receiver read all that was handed over? To be asked only while bytes or a FIN
 * have come by TCP: nothing more is handed over then. 1, 0, and the ring tells when it has, or
 * -errno.
 */
int sgw_direct_is_flushed(const struct sgw_direct *direct, uint32_t slot);

struct sgw_direct_totals {
	uint64_t bytes[2]; /* by SOCK_SLOT_TO_... */
	uint64_t messages;
	uint64_t passed_messages;
};

void sgw_direct_totals(const struct direct_slot *slots, size_t count,
		       struct sgw_direct_totals *totals);
/* Wait until `alive`, the reading end of a pipe, ends: then the gateway is gone, however that came
 * about, and the sockets in the maps are taken out. For a process of its own; never returns.
 */
void sgw_direct_guard(int senders_map, int sockets_map, int alive);
uint64_t sgw_cookie(int fd); /* 0: there is no such socket */

/* The wire path (wire.c): one for each process. */

struct wire_slot;
struct sgw_wire;

struct sgw_wire_settings {
	int flows_map;
	int sessions_map;
	struct wire_slot *slots; /* of all processes */
	uint32_t first; /* of this one's places */
	uint32_t sessions;
	bool is_inherited; /* the maps are another gateway's, which has died */
};

/* NULL and errno: no right to send resets (CAP_NET_RAW), no memory. */
struct sgw_wire *sgw_wire_open(const struct sgw_wire_settings *settings);
/* Make a forked process's copy its own, with these places; nothing is armed yet. */
void sgw_wire_narrow(struct sgw_wire *wire, uint32_t first, uint32_t sessions);
/* End the sessions of a process that has died. */
void sgw_wire_reclaim(struct sgw_wire *wire, uint32_t first, uint32_t sessions);
/* Have the packets of sessions on wire leave where routes now say: 0 or -errno. */
int sgw_wire_follow_routes(const struct sgw_wire *wire);
/* Wait until `alive`, the reading end of a pipe, ends: then the gateway is gone, however that came
 * about, and the sessions that it leaves are reset, its filters removed (0, -1: it has none). For a
 * process of its own; never returns.
 */
void sgw_wire_guard(struct sgw_wire *wire, uint32_t clsact_owner, int clsact_name, int alive);
/* Sum up, by way, over the first sessions' places. */
void sgw_wire_totals(const struct sgw_wire *wire, uint32_t sessions, uint64_t *bytes);
void sgw_wire_close(struct sgw_wire *wire);
size_t sgw_wire_slot_bytes(void);
/* Attach to an interface's ingress by a link, which dies with the process, before or behind all
 * programs there: its descriptor, or -errno.
 */
int sgw_attach_tcx(int program, int ifindex, bool is_first);
/* The same by filters, which stay when the process dies (clsact.c). An owner is a gateway's number
 * among those of its network namespace, and whether its filters are to outlive it.
 */
#define SGW_CLSACT_PERSISTS 32768
/* Take the number of *owner, or any if it has none: a descriptor for as long as it is to be kept, or
 * -errno. Filters that a dead gateway left, and that nobody will come back for, are removed.
 */
int sgw_clsact_take(uint32_t *owner);
/* Add a filter before, or behind, all that others may have, or replace the program of the one
 * that the owner has: 0 or -errno.
 */
int sgw_clsact_attach(uint32_t owner, int program, int ifindex, bool is_first);
/* Remove the owner's filters, and what was made for them: how many there were. */
int sgw_clsact_remove(uint32_t owner);
#define SGW_WIRE_WORKERS 256 /* at most, and as many rings */
#define SGW_UNFITS 20 /* more than enum wire_unfit has */
/* The name of one, "" if there is none. */
const char *sgw_unfit_name(uint32_t unfit);

/* A worker's event loop (loop.c). */

#define SGW_COPY_BYTES 131072

enum sgw_handover { /* when a session is released for a faster path */
	SGW_NEVER,
	SGW_AT_ONCE, /* as soon as there is a backend, and it is its turn */
	SGW_AT_SECOND, /* at the client's first bytes after an answer */
};

enum sgw_reason {
	SGW_HANDOVER, /* a faster path is worth it now */
	SGW_ASKED, /* sgw_loop_release...() */
	SGW_DIAL_FAILED, /* by error */
	SGW_FAILED, /* the socket that feeds way, by error if that is not 0 */
	SGW_FULL, /* a target has no room for what is held, or it has been overtaken on direct */
	SGW_NO_MEMORY, /* the same, but it is lost */
};

struct sgw_event {
	int fd;
	uint32_t events;
};

struct sgw_released {
	enum sgw_reason reason;
	uint32_t way; /* SOCK_SLOT_TO_...; of SGW_HANDOVER, whose bytes there are */
	int error;
	int client;
	int backend; /* -1: there is no socket */
	int client_family;
	int backend_family;
	bool is_connected;
	bool is_counted; /* in sgw_loop.relayed, .directed or .wired */
	bool is_unfit; /* it cannot go by wire */
	bool is_direct; /* and has this id there */
	uint32_t direct;
	enum direct_answer captured; /* are both applications? */
	uint32_t told[2]; /* the largest window that each side was told, of one that was armed */
	uint32_t turn; /* of one that is not connected */
	uint32_t target; /* the one that it has dialled */
	uint64_t age_ns;
	uint64_t bytes[2]; /* sent on, by way */
	uint64_t direct_bytes[2]; /* handed over before that by an earlier id, past us */
	bool is_ended[2]; /* its FIN is passed on, by way */
	char *held; /* of held_way; to be freed with free() */
	size_t held_bytes;
	uint32_t held_way;
	char client_name[72];
};

enum sgw_end { /* how a session ended */
	SGW_EOF,
	SGW_CLIENT_RESET,
	SGW_BACKEND_RESET,
	SGW_RESET_AS_ASKED, /* sgw_loop_reset_wired() */
	SGW_LOST, /* somebody else has its backend leg's ports */
};

enum sgw_path { /* the best that a session was on at its end */
	SGW_ON_RELAY,
	SGW_ON_WIRE,
	SGW_ON_DIRECT,
};

struct sgw_ended { /* a session that ended without having been released */
	uint32_t target;
	enum sgw_end end;
	uint64_t age_ns;
	uint64_t bytes[2]; /* copied */
	uint64_t wire_bytes[2];
	uint64_t direct_bytes[2];
	enum sgw_path path;
	uint32_t pad;
	struct sock_stats stats[2]; /* of the client, the backend */
	char client_name[72];
	char backend_name[72]; /* "": target says it */
};

struct sgw_loop {
	enum sgw_handover handover; /* may be set at any time */
	uint32_t open; /* sessions that are with the loop now */
	/* Since it was opened: sessions whose path turned out to be this one,
	 * bytes sent on.
	 */
	uint64_t relayed;
	uint64_t bytes[2];
	uint32_t armed; /* of open: they wait for the moment to switch */
	uint32_t on_wire; /* of open */
	uint64_t wired; /* sessions that went by wire */
	uint64_t unfit[20]; /* SGW_UNFITS: sessions that cannot, by enum wire_unfit */
	uint32_t on_direct; /* of open */
	uint64_t directed; /* sessions that went direct */
	uint64_t uncaptured; /* sessions that cannot go direct */
	uint64_t undirected_for_room; /* sessions that could, but for want of memory */
	uint64_t undirected; /* ... but the kernel refused to be asked */
	const struct sgw_event *events;
	int released_count; /* for the caller to set back to 0 */
	int ended_count;
	int told_count;
	const struct sgw_released *released;
	const struct sgw_ended *ended;
	const uint32_t *told; /* sessions on direct that are the caller's, by id: look at them */
};

struct sgw_loop_settings {
	uint32_t sessions; /* at most so many at once */
	uint64_t connect_timeout_ns;
	int receive_option; /* SO_RCVBUF or SO_RCVBUFFORCE of a backend's socket */
	int receive_bytes; /* 0: leave it to the kernel */
	int stats_map; /* -1: none */
	int own_map; /* of sockets that we dial, for the direct path; -1: none */
	int found_map; /* our sockets with a captured application at the other end; -1: none */
	struct sgw_direct *direct; /* NULL: no session goes direct */
	int direct_ring; /* this worker's */
	bool is_logging; /* whether names and stats of ended sessions are wanted */
	uint32_t rotation; /* targets that sessions dial in turn: the first ones */
	uint64_t *turns; /* sessions begun, by all that share the backends */
	struct sgw_wire *wire; /* NULL: no session goes by wire */
	int wire_ring; /* this worker's */
	uint32_t worker;
	bool is_splicing; /* sessions that go neither by wire nor direct are released */
};

/* NULL: no memory, or no descriptor. */
struct sgw_loop *sgw_loop_open(const struct sgw_loop_settings *settings);
/* Stop watching; the counts can still be read. */
void sgw_loop_close(struct sgw_loop *loop);
void sgw_loop_free(struct sgw_loop *loop);
/* Add a target: 0 or -errno. */
int sgw_loop_target(struct sgw_loop *loop, int family, const char *host, int port, uint32_t scope);
enum sgw_operation {
	SGW_ADD = 1,
	SGW_DEL = 2,
	SGW_MOD = 3
}; /* EPOLL_CTL_... */
/* epoll_ctl() for a descriptor of the caller's: 0 or -errno. */
int sgw_loop_control(struct sgw_loop *loop, enum sgw_operation operation, int fd, uint32_t events);
/* Accept and dial; the number of sessions begun, or -errno. */
int sgw_loop_accept(struct sgw_loop *loop, int listener, int most);
/* Serve the loop's sessions until there is something to tell: an event of the
 * caller's descriptors, whose number is returned; a session ended or released;
 * the timeout (-1: none) or a signal. -errno if it cannot go on.
 */
int sgw_loop_wait(struct sgw_loop *loop, int64_t timeout_ns);
/* Release sessions; the number released, to be repeated until that is 0. */
int sgw_loop_release_all(struct sgw_loop *loop);
/* ... those that have been silent for so long. */
int sgw_loop_release_silent(struct sgw_loop *loop, uint64_t silent_ns);
/* ... for a faster path: those that are silent now, or have lasted so long. */
int sgw_loop_hand_over(struct sgw_loop *loop, uint64_t silent_ns, uint64_t age_ns);
/* Go on with what a dead gateway has left at a place of the maps, if this is the one of `workers`
 * that hears of it: 1 if that is a session, or was one, which is then told as ended.
 */
int sgw_loop_adopt(struct sgw_loop *loop, uint32_t id, uint32_t workers);
/* Go on with a session whose sockets sgw_loop_control() watches, and of which nothing
 * is held: of `session` what says who it is and what it has sent. 0, the sockets are
 * the loop's then, or -errno.
 */
int sgw_loop_return(struct sgw_loop *loop, const struct sgw_released *session);
/* Reset sessions on wire that have been silent for so long: their number, to be
 * repeated until that is 0.
 */
int sgw_loop_reset_wired(struct sgw_loop *loop, uint64_t silent_ns);
void free(void *memory);
/* Give memory that was freed back to the system. */
void sgw_trim(void);
