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
struct bpf_link *bpf_program__attach_cgroup(const struct bpf_program *program, int cgroup_fd);
int bpf_link__destroy(struct bpf_link *link);
int bpf_map__set_max_entries(struct bpf_map *map, uint32_t max_entries);
int bpf_map__fd(const struct bpf_map *map);
uint32_t bpf_map__key_size(const struct bpf_map *map);
uint32_t bpf_map__value_size(const struct bpf_map *map);
int bpf_map_update_elem(int fd, const void *key, const void *value, __u64 flags);
int bpf_map_lookup_elem(int fd, const void *key, void *value);
int bpf_map_get_next_key(int fd, const void *key, void *next_key);

/* Attach a verdict program to a sockmap; it goes when the map goes. */
int sgw_attach_verdict(int program, int sock_map);

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

/* Make a ring of spill records: a map's fd, or -errno. */
int sgw_ring_create(uint32_t bytes);
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
	SGW_FULL, /* held is what way's target has no room for */
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
	bool is_counted; /* in sgw_loop.relayed */
	uint32_t turn;
	uint64_t age_ns;
	uint64_t bytes[2]; /* sent on, by way */
	bool is_ended[2]; /* its FIN is passed on, by way */
	char *held; /* to be freed with free() */
	size_t held_bytes;
	char client_name[72];
};

struct sgw_ended { /* a session that ended without having been released */
	uint32_t turn;
	uint64_t age_ns;
	uint64_t bytes[2];
	struct sock_stats stats[2]; /* of the client, the backend */
	char client_name[72];
};

struct sgw_loop {
	enum sgw_handover handover; /* may be set at any time */
	uint32_t open; /* sessions that are with the loop now */
	/* Since it was opened: sessions whose path turned out to be this one,
	 * bytes sent on.
	 */
	uint64_t relayed;
	uint64_t bytes[2];
	const struct sgw_event *events;
	int released_count; /* for the caller to set back to 0 */
	int ended_count;
	const struct sgw_released *released;
	const struct sgw_ended *ended;
};

struct sgw_loop_settings {
	uint32_t sessions; /* at most so many at once */
	uint64_t connect_timeout_ns;
	int receive_option; /* SO_RCVBUF or SO_RCVBUFFORCE of a backend's socket */
	int receive_bytes; /* 0: leave it to the kernel */
	int stats_map; /* -1: none */
	bool is_logging; /* whether names and stats of ended sessions are wanted */
	uint64_t *turns; /* sessions begun, by all that share the backends */
};

/* NULL: no memory, or no descriptor. */
struct sgw_loop *sgw_loop_open(const struct sgw_loop_settings *settings);
/* Stop watching; the counts can still be read. */
void sgw_loop_close(struct sgw_loop *loop);
void sgw_loop_free(struct sgw_loop *loop);
/* Add a backend to the rotation: 0 or -errno. */
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
void free(void *memory);
/* Give memory that was freed back to the system. */
void sgw_trim(void);
