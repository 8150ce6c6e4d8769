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
	SGW_STEP_SOCK_BACKEND, /* the silent side first */
	SGW_STEP_SOCK_CLIENT,
	SGW_STEP_KICK_BACKEND,
	SGW_STEP_KICK_CLIENT,
	SGW_STEPS,
};

struct sgw_pair {
	int pair_map;
	int sock_map;
	int client;
	int backend;
	uint32_t slot; /* to_backend; the next one is to_client */
	uint32_t worker;
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

struct sgw_ring;

/* Make a ring of spill records: a map's fd, or -errno. */
int sgw_ring_create(uint32_t bytes);
struct sgw_ring *sgw_ring_open(int map);
void sgw_ring_close(struct sgw_ring *ring);
/* Take up to max records: their number, or -errno. */
int sgw_ring_drain(struct sgw_ring *ring, uint32_t *slots, int max);
