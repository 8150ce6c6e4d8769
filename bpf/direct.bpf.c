// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The direct path: what one application sends is put into the other one's socket.
 *
 * A session that has both ends on this host has four sockets: the client
 * application's, our two, the backend application's. sock_capture sees the
 * applications' sockets when they are established. Once the session has shown that
 * it lasts, sock_direct hands what one application sends to the other's receive
 * queue (psock->ingress_msg), in the sender's own system call: no TCP, no gateway.
 *
 * A direction's bytes may go either way, message by message; that they stay in order
 * is argued above sock_direct. Every return of it says where the bytes go.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include "sockmap.h"
#include "direct.h"

/* The verifier lets only a GPL-compatible program read a socket's fields. */
char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define READ_ONCE(x) (*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile typeof(x) *)&(x) = (value))
#define NULL ((void *)0)

#define AF_INET 2
#define AF_INET6 10
#define MAPPED bpf_htonl(0xffff) /* the third word of ::ffff:a.b.c.d */
#define MSG_DONTWAIT 0x40 /* of a socket with O_NONBLOCK, too */
#define MSG_WAITALL 0x100
#define O_NONBLOCK 04000
#define PSOCK_MASK (~7UL) /* the low bits of sk_user_data are flags */

/* Bytes that may lie in a receiver's queue; userspace sets it before the load. */
const volatile __u32 bound_bytes = 4194304;

/* Who connects to whom: IPv4 as ::ffff:a.b.c.d, ports in host order. */
struct flow {
	__u32 client[4];
	__u32 server[4];
	__u16 client_port;
	__u16 server_port;
};

/* A connection. The same flow may exist in two network namespaces, but not with the
 * same two initial sequence numbers.
 */
struct birth {
	struct flow flow;
	__u32 client_isn;
	__u32 server_isn;
};

/* Who has connected it. */
struct dialler {
	__u64 cookie;
	__u64 address; /* of its struct sock */
	__u32 is_ours;
	__u32 pad;
};

/* What we know of an application's socket; it dies with it. */
struct app {
	__u64 address; /* of its struct sock */
	__u32 base_sent; /* write_seq, when it was established */
	__u32 base_read; /* copied_seq */
	__u32 read_to; /* copied_seq, when its last recv() returned */
	__u32 has_read;
	__u32 refusal; /* of what it receives: enum direct_refusal */

	/* Of a session that is watched. */
	__u32 has_slots;
	__u32 slot_in; /* of the direction that it receives */
	__u32 slot_out;
	__u32 worker;
	__u32 is_open; /* what it sends may go direct */
	__u32 peer_base_read;
	__u64 peer; /* the other application's socket: cookie, address */
	__u64 peer_address;
};

/* Where this gateway listens. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, struct direct_listener);
	__type(value, struct direct_address);
} direct_listeners SEC(".maps");

/* The gateway's own sockets: userspace puts an entry on its listener, whose children
 * inherit it, and on each socket before it dials.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, __u32);
} direct_own SEC(".maps");

/* SYNs that have reached one of our listeners, whoever sent them. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, DIRECT_BIRTHS);
	__type(key, struct flow);
	__type(value, __u32);
} direct_syns SEC(".maps");

/* Connections of which one end is established. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, DIRECT_BIRTHS);
	__type(key, struct birth);
	__type(value, struct dialler);
} direct_births SEC(".maps");

/* Cookie of a socket of ours -> who is at its other end. Who was never asked for makes
 * room.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, DIRECT_BIRTHS);
	__type(key, __u64);
	__type(value, struct direct_found);
} direct_found SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct app);
} direct_apps SEC(".maps");

/* Cookie -> an application's socket. Being in it makes recv() look at what was handed
 * over, and nothing else: it has no program.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, DIRECT_SLOTS_DEFAULT);
	__type(key, __u64);
	__type(value, __u64);
} direct_sockets SEC(".maps");

/* Those of them whose sends pass sock_direct. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, DIRECT_SLOTS_DEFAULT);
	__type(key, __u64);
	__type(value, __u64);
} direct_senders SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, DIRECT_SLOTS_DEFAULT);
	__type(key, __u32);
	__type(value, struct direct_slot);
} direct_slots SEC(".maps");

struct direct_ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
};

/* One for each worker. Userspace fills it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, DIRECT_WORKERS_MAX);
	__type(key, __u32);
	__array(values, struct direct_ring);
} direct_rings SEC(".maps");

/* The functions of a socket that is in direct_sockets, and of one that is in
 * direct_senders, too; by whether it is IPv6. A socket that has other ones is read
 * or written in another way than we know: kTLS, a sockmap of another product.
 */
struct {
	__u64 reading;
	__u64 sending;
} functions[2];

static __always_inline __u64 functions_of(struct sock *sk)
{
	return (__u64)BPF_CORE_READ(sk, __sk_common.skc_prot);
}

static __always_inline int is_v6(struct sock *sk)
{
	return BPF_CORE_READ(sk, __sk_common.skc_family) == AF_INET6;
}

static __always_inline struct sk_psock *psock_of(struct sock *sk)
{
	return (struct sk_psock *)((unsigned long)BPF_CORE_READ(sk, sk_user_data) & PSOCK_MASK);
}

/* Is anything that was handed over unread? */
static __always_inline bool has_unread(struct sock *sk)
{
	struct sk_psock *psock = psock_of(sk);
	struct list_head *first = psock ? BPF_CORE_READ(psock, ingress_msg.next) : NULL;

	return first &&
	       (void *)first != (void *)psock + bpf_core_field_offset(struct sk_psock, ingress_msg);
}

static __always_inline struct direct_slot *slot_at(__u32 index)
{
	return bpf_map_lookup_elem(&direct_slots, &index);
}

/* --- who is at the other end */

static __always_inline void map_v4(__u32 *words, __u32 address)
{
	words[0] = words[1] = 0;
	words[2] = MAPPED;
	words[3] = address;
}

static __always_inline void read_flow(struct bpf_sock_ops *ops, struct flow *flow, bool is_client)
{
	__u32 *local = is_client ? flow->client : flow->server;
	__u32 *remote = is_client ? flow->server : flow->client;
	__u16 local_port = ops->local_port;
	__u16 remote_port = bpf_ntohl(ops->remote_port);

	if (ops->family == AF_INET) {
		map_v4(local, ops->local_ip4);
		map_v4(remote, ops->remote_ip4);
	} else {
		local[0] = ops->local_ip6[0];
		local[1] = ops->local_ip6[1];
		local[2] = ops->local_ip6[2];
		local[3] = ops->local_ip6[3];
		remote[0] = ops->remote_ip6[0];
		remote[1] = ops->remote_ip6[1];
		remote[2] = ops->remote_ip6[2];
		remote[3] = ops->remote_ip6[3];
	}
	flow->client_port = is_client ? local_port : remote_port;
	flow->server_port = is_client ? remote_port : local_port;
}

/* A SYN has reached a listener. If that is ours its sender may be on this host, and
 * will be established before our own end is.
 */
static __always_inline void note_syn(struct bpf_sock_ops *ops)
{
	struct direct_listener where = {
		.netns = bpf_get_netns_cookie(ops),
		.port = ops->local_port,
	};
	struct direct_address *address;
	struct flow flow = {};
	__u32 one = 1;

	address = bpf_map_lookup_elem(&direct_listeners, &where);
	if (!address)
		return;
	read_flow(ops, &flow, false);
	if ((address->words[0] | address->words[1] | address->words[2] | address->words[3]) &&
	    (address->words[0] != flow.server[0] || address->words[1] != flow.server[1] ||
	     address->words[2] != flow.server[2] || address->words[3] != flow.server[3]))
		return;
	bpf_map_update_elem(&direct_syns, &flow, &one, 0);
}

/* Put an application's socket into direct_sockets; 0 if it stays as it is. */
static __always_inline __u64 capture(struct bpf_sock_ops *ops, struct bpf_sock *sk,
				     struct tcp_sock *tcp)
{
	__u64 cookie = bpf_get_socket_cookie(ops);
	struct sock *kernel = (struct sock *)tcp;
	struct sk_psock *psock;
	struct app *app;

	app = bpf_sk_storage_get(&direct_apps, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!app)
		return 0;
	app->address = (__u64)kernel;
	app->base_sent = tcp->write_seq;
	app->base_read = tcp->rcv_nxt;
	if (bpf_sock_hash_update(ops, &direct_sockets, &cookie, BPF_NOEXIST)) {
		/* kTLS, MPTCP, no room: the session has its other paths. */
		bpf_sk_storage_delete(&direct_apps, sk);
		return 0;
	}
	psock = psock_of(kernel);
	if (!psock || BPF_CORE_READ(psock, progs.msg_parser) ||
	    BPF_CORE_READ(psock, progs.stream_parser) ||
	    BPF_CORE_READ(psock, progs.stream_verdict) || BPF_CORE_READ(psock, progs.skb_verdict)) {
		/* Another product's: it stays that. */
		bpf_map_delete_elem(&direct_sockets, &cookie);
		bpf_sk_storage_delete(&direct_apps, sk);
		return 0;
	}
	functions[is_v6(kernel)].reading = functions_of(kernel);
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	return cookie;
}

static __always_inline void note_active(struct bpf_sock_ops *ops, struct bpf_sock *sk,
					struct tcp_sock *tcp, bool is_capturing)
{
	struct dialler dialler = {};
	struct birth birth = {};

	read_flow(ops, &birth.flow, true);
	if (bpf_sk_storage_get(&direct_own, sk, NULL, 0)) {
		dialler.is_ours = 1;
		dialler.cookie = bpf_get_socket_cookie(ops);
		dialler.address = (__u64)tcp;
	} else {
		/* It connects to somebody else: it is left alone. */
		if (!is_capturing || !bpf_map_lookup_elem(&direct_syns, &birth.flow))
			return;
		/* It will wait in recv(), see sock_direct_read. */
		if (!(BPF_CORE_READ((struct sock *)tcp, sk_socket, file, f_flags) & O_NONBLOCK))
			return;
		/* TCP fast open: bytes were sent before now. */
		if (tcp->write_seq != tcp->snd_una || tcp->bytes_acked > 1)
			return;
		dialler.cookie = capture(ops, sk, tcp);
		if (!dialler.cookie)
			return;
	}
	birth.client_isn = tcp->write_seq - 1;
	birth.server_isn = tcp->rcv_nxt - 1;
	bpf_map_update_elem(&direct_births, &birth, &dialler, 0);
}

static __always_inline void note_passive(struct bpf_sock_ops *ops, struct bpf_sock *sk,
					 struct tcp_sock *tcp, bool is_capturing)
{
	bool is_ours = bpf_sk_storage_get(&direct_own, sk, NULL, 0) != NULL;
	struct direct_found end = {};
	struct birth birth = {};
	struct dialler *found;
	__u64 ours;

	if (!is_ours && !is_capturing)
		return;
	read_flow(ops, &birth.flow, false);
	birth.client_isn = tcp->rcv_nxt - 1;
	birth.server_isn = tcp->write_seq - 1;
	if (is_ours)
		bpf_map_delete_elem(&direct_syns, &birth.flow);
	found = bpf_map_lookup_elem(&direct_births, &birth);
	/* Neither end is ours, or both are, or its other end is on another host. */
	if (!found || !found->is_ours == !is_ours)
		return;
	if (is_ours) {
		ours = bpf_get_socket_cookie(ops);
		end.address = (__u64)tcp;
		end.application = found->cookie;
	} else {
		ours = found->cookie;
		end.address = found->address;
	}
	bpf_map_delete_elem(&direct_births, &birth);
	if (!is_ours) {
		if (tcp->fastopen_rsk)
			return;
		end.application = capture(ops, sk, tcp);
		if (!end.application)
			return;
	}
	bpf_map_update_elem(&direct_found, &ours, &end, 0);
}

/* close() by an application. With bytes unread TCP answers with a reset; of what was
 * handed over it knows nothing, and sends a FIN: userspace makes a reset of it. The
 * socket is out of the map by now (shutdown() leaves it there), and what TCP had for it
 * is freed, but what was handed over is still charged to it. Not so when the other
 * side's FIN comes in the midst of it, which is another change of state.
 */
static __always_inline void note_close(struct bpf_sock_ops *ops, struct bpf_sock *sk,
				       struct tcp_sock *tcp)
{
	struct app *app = bpf_sk_storage_get(&direct_apps, sk, NULL, 0);
	struct sock *kernel = (struct sock *)tcp;
	struct direct_slot *slot;

	if (ops->args[1] != BPF_TCP_FIN_WAIT1 && ops->args[1] != BPF_TCP_LAST_ACK)
		return;
	if (!app || !READ_ONCE(app->has_slots) || psock_of(kernel))
		return;
	slot = slot_at(app->slot_in);
	if (slot && BPF_CORE_READ(kernel, sk_backlog.rmem_alloc.counter) > 0)
		slot->was_cut = 1;
}

static __always_inline int note(struct bpf_sock_ops *ops, bool is_capturing)
{
	struct bpf_sock *sk;
	struct tcp_sock *tcp;

	if (ops->op == BPF_SOCK_OPS_TIMEOUT_INIT) {
		if (!ops->is_fullsock)
			note_syn(ops);
		return 1;
	}
	if (ops->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB &&
	    ops->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB && ops->op != BPF_SOCK_OPS_STATE_CB)
		return 1;
	sk = ops->sk;
	if (!sk)
		return 1;
	tcp = bpf_skc_to_tcp_sock(sk);
	if (!tcp)
		return 1;
	if (ops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		note_active(ops, sk, tcp, is_capturing);
	else if (ops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		note_passive(ops, sk, tcp, is_capturing);
	else
		note_close(ops, sk, tcp);
	return 1;
}

/* On the cgroup that the applications are in. */
SEC("sockops")
int sock_capture(struct bpf_sock_ops *ops)
{
	return note(ops, true);
}

/* On the gateway's own cgroup, if that is not below the other one: whoever else is in
 * it is left alone.
 */
SEC("sockops")
int sock_own(struct bpf_sock_ops *ops)
{
	return note(ops, false);
}

/* --- how an application reads */

/* false: there was no room to say it. */
static __always_inline bool tell(__u32 worker, __u32 slot)
{
	struct direct_event event = { .slot = slot };
	void *ring = bpf_map_lookup_elem(&direct_rings, &worker);

	return ring && !bpf_ringbuf_output(ring, &event, sizeof(event), 0);
}

/* From here on nothing that this application receives goes direct. Noted on the
 * socket, then in the slot, if it has one, and told; DIRECT_WATCH sets the slot, then
 * looks at the socket, with a full barrier between the two on either side.
 */
static __always_inline void refuse(struct app *app, __u32 refusal)
{
	struct direct_slot *slot;

	__sync_val_compare_and_swap(&app->refusal, DIRECT_FITS, refusal);
	if (!READ_ONCE(app->has_slots))
		return;
	slot = slot_at(app->slot_in);
	if (slot &&
	    __sync_val_compare_and_swap(&slot->refusal, DIRECT_FITS, refusal) == DIRECT_FITS)
		tell(app->worker, app->slot_in);
}

/* A recv() of an application has returned.
 *
 * Bytes that were handed over are seen by tcp_bpf_recvmsg() and not by tcp_recvmsg(),
 * which the former calls when TCP has bytes. A reader that is in there and waits for
 * more than there were (MSG_WAITALL, SO_RCVLOWAT) does not see what is handed over
 * meanwhile, and returns with bytes that TCP brings later: in the wrong order. So it
 * counts what has been taken out of TCP by calls that are over. What splice(2) takes
 * is not counted: who uses it has nothing handed over.
 *
 * A recv() that waits in tcp_bpf_recvmsg() waits once: whatever wakes it (room to
 * send, a reset, a signal), it returns EAGAIN if there is nothing to read then. TCP's own
 * would wait on. So who waits there is left to TCP, and userspace takes its socket out
 * of the map.
 *
 * A recv() with MSG_WAITALL that finds bytes which were handed over returns with
 * those, be they too few: whoever uses it is left on TCP. Nothing goes direct before
 * an application has read for the first time, so that it is known then.
 *
 * For every recv() on this host: whoever is not captured pays for one look-up.
 */
SEC("tp_btf/sock_recv_length")
int BPF_PROG(sock_direct_read, struct sock *sk, int bytes, int flags)
{
	struct app *app = bpf_sk_storage_get(&direct_apps, sk, NULL, 0);
	struct direct_slot *slot;
	__u32 read;

	if (!app)
		return 0;
	if (!(flags & MSG_DONTWAIT))
		refuse(app, DIRECT_BLOCKS);
	if (flags & MSG_WAITALL || sk->sk_rcvlowat > 1)
		refuse(app, DIRECT_WAITS_FOR_ALL);
	if (sk->sk_peek_off >= 0)
		refuse(app, DIRECT_PEEKS);
	read = BPF_CORE_READ((struct tcp_sock *)sk, copied_seq);
	app->read_to = read;
	app->has_read = 1;
	if (!READ_ONCE(app->has_slots))
		return 0;
	slot = slot_at(app->slot_in);
	if (!slot)
		return 0;
	/* A full barrier: who sees this sees the marks above. */
	__sync_lock_test_and_set(&slot->read_to, read);
	slot->has_read = 1;
	/* Bytes of the other application have been read: it is done with setting its
	 * socket up.
	 */
	if (!slot->is_told && read != app->base_read) {
		/* Before it is told: who hears it, on another CPU, looks at once. */
		slot->is_told = 1;
		if (!tell(app->worker, app->slot_in))
			slot->is_told = 0;
	}
	/* Unheard it is found by the next look. */
	if (READ_ONCE(slot->is_awaited) && !has_unread(sk))
		tell(app->worker, app->slot_in);
	return 0;
}

/* --- what an application sends */

/* Count a message against what the receiver's queue may hold; false if that is full.
 *
 * `queued` bytes are unread, so all that was sent before the last `queued` bytes has
 * been read. Messages are counted in two lots, and the older one is forgotten as a
 * whole: there are never more than both together in the queue.
 */
static __always_inline bool has_room(struct direct_slot *slot, __u32 queued, __u32 bytes)
{
	__u64 read = slot->bytes - queued;

	if ((__u64)queued + bytes > bound_bytes)
		return false;
	if (!queued)
		slot->older_messages = slot->newer_messages = 0;
	if ((__s64)(read - slot->older_end) >= 0)
		slot->older_messages = 0;
	if (slot->newer_messages >= bound_bytes / DIRECT_MESSAGE_BYTES / 2) {
		if (slot->older_messages)
			return false;
		slot->older_messages = slot->newer_messages;
		slot->older_end = slot->bytes;
		slot->newer_messages = 0;
	}
	return true;
}

/* Tell whether the message may be handed to its receiver: all that this direction
 * has sent by TCP has been read by the other application.
 */
static __always_inline bool may_go_direct(struct app *app, struct direct_slot *slot,
					  struct tcp_sock *sender, __u32 bytes)
{
	struct sock *self = (struct sock *)sender;
	/* Not held: it may be gone, and its memory another socket's. What is read
	 * of it counts if the cookie, which is read last, is the right one.
	 */
	struct sock *receiver = (struct sock *)app->peer_address;
	unsigned long *pressure;
	__u64 reads_by;
	__u32 read;
	__s32 queued;
	__u8 state;

	if (functions_of(self) != functions[is_v6(self)].sending)
		return false;

	read = BPF_CORE_READ((struct tcp_sock *)receiver, copied_seq);
	if (sender->write_seq - app->base_sent != read - app->peer_base_read)
		return false;
	/* And by a recv() that is over. */
	if (!READ_ONCE(slot->has_read) || READ_ONCE(slot->read_to) != read)
		return false;
	/* A full barrier: the reader's marks are older than the words above. */
	__sync_fetch_and_add(&slot->passed_messages, 0);
	if (READ_ONCE(slot->refusal) != DIRECT_FITS || BPF_CORE_READ(receiver, sk_rcvlowat) > 1 ||
	    BPF_CORE_READ(receiver, sk_peek_off) >= 0)
		return false;

	/* Not behind a FIN: send() has to fail. */
	state = BPF_CORE_READ(receiver, __sk_common.skc_state);
	if (state != TCP_ESTABLISHED && state != TCP_FIN_WAIT1 && state != TCP_FIN_WAIT2)
		return false;
	reads_by = functions_of(receiver);
	if (reads_by != functions[is_v6(receiver)].reading &&
	    reads_by != functions[is_v6(receiver)].sending)
		return false;
	/* The hand-over would fail for want of memory, and the sender would be told. */
	pressure = BPF_CORE_READ(receiver, __sk_common.skc_prot, memory_pressure);
	if (pressure) {
		unsigned long is_pressed = 1;

		bpf_probe_read_kernel(&is_pressed, sizeof(is_pressed), pressure);
		if (is_pressed)
			return false;
	}
	queued = BPF_CORE_READ(receiver, sk_backlog.rmem_alloc.counter);
	if (queued < 0 || !has_room(slot, queued, bytes))
		return false;
	return (__u64)BPF_CORE_READ(receiver, __sk_common.skc_cookie.counter) == app->peer;
}

/* An application sends: to the other one's queue, or by TCP, through the gateway.
 *
 * Why the order is kept. What was handed over lies in the receiver's ingress_msg, what
 * TCP brought in its receive queue, and recv() takes the former first.
 *
 * TCP -> direct: a message is handed over only if everything of this direction that
 * went into TCP has been taken out of it by the receiver: sent and read, counted from
 * when both sockets were established, are equal. So it is nowhere: not in our
 * sockets, not in userspace, not on its way. (The sender's lock is held here, and not
 * while the message is queued: what two threads send at once is in either order, as
 * ever; what one sends after another's send() has returned is behind it.)
 *
 * direct -> TCP: what goes into TCP now comes to our socket, and userspace sends it on
 * only after the receiver has read all that was handed over before (directed.c, direction.py).
 * recv() would do with less, but an application that is told of bytes once (EPOLLET)
 * and takes a short recv() for the end of them would leave what lies behind in TCP.
 *
 * FIN: as the bytes of the line above. RST: bytes unread may be lost, as always.
 */
SEC("sk_msg")
int sock_direct(struct sk_msg_md *message)
{
	struct bpf_sock *sk = message->sk;
	__u32 bytes = message->size;
	struct direct_slot *slot;
	struct tcp_sock *sender;
	struct app *app;
	__u64 peer;

	/* Not open (yet, or any more): the bytes go by TCP. */
	if (!sk)
		return SK_PASS;
	app = bpf_sk_storage_get(&direct_apps, sk, NULL, 0);
	if (!app || !READ_ONCE(app->is_open))
		return SK_PASS;
	slot = slot_at(app->slot_out);
	sender = bpf_skc_to_tcp_sock(sk);
	if (!slot || !sender)
		return SK_PASS;

	/* Bytes before these are in TCP, or the receiver has no room: behind them,
	 * by TCP.
	 */
	if (!may_go_direct(app, slot, sender, bytes)) {
		slot->passed_messages++;
		return SK_PASS;
	}
	/* It was closed just now: TCP will say so. Refused or not, the program says
	 * SK_PASS: with SK_DROP send() would fail, by EACCES.
	 */
	peer = app->peer;
	if (bpf_msg_redirect_hash(message, &direct_sockets, &peer, BPF_F_INGRESS) != SK_PASS) {
		slot->passed_messages++;
		return SK_PASS;
	}
	/* The bytes go to the receiver's queue, in this send(). */
	slot->bytes += bytes;
	slot->messages++;
	slot->newer_messages++;
	return SK_PASS;
}

/* --- what userspace asks, by BPF_PROG_RUN */

static __always_inline struct app *app_of(struct bpf_sock *sk)
{
	return bpf_sk_storage_get(&direct_apps, sk, NULL, 0);
}

/* Note what a session's socket is to it. */
static __always_inline void settle(struct app *app, struct app *peer, __u64 peer_cookie,
				   __u32 slot_out, __u32 worker)
{
	app->slot_out = slot_out;
	app->slot_in = slot_out ^ 1;
	app->worker = worker;
	app->peer = peer_cookie;
	app->peer_address = peer->address;
	app->peer_base_read = peer->base_read;
	/* A full barrier between the two: see refuse(). */
	__sync_lock_test_and_set(&app->has_slots, 1);
}

/* What was noted of a receiver before it had a slot. */
static __always_inline void copy_marks(struct app *app, struct direct_slot *slot)
{
	__u32 refusal = __sync_fetch_and_add(&app->refusal, 0);

	if (refusal != DIRECT_FITS)
		refuse(app, refusal);
	slot->read_to = app->read_to;
	slot->has_read = app->has_read;
}

/* Is one of our sockets an application's to somebody else? A gateway behind us, or before
 * us, that hands bytes to it puts them into a stream whose sender's TCP knows nothing of
 * them, and by that all is counted here.
 */
static __always_inline bool is_taken(const struct direct_found *end)
{
	return psock_of((struct sock *)end->address) != NULL;
}

static __always_inline int watch(const struct direct_ask *ask)
{
	__u32 up = ask->slot | SOCK_SLOT_TO_BACKEND, down = ask->slot | SOCK_SLOT_TO_CLIENT;
	__u64 client_cookie, backend_cookie;
	struct direct_found *found;
	struct direct_slot *to_backend, *to_client;
	struct bpf_sock *client, *backend;
	struct app *near, *far;
	int answer = DIRECT_NO;

	found = bpf_map_lookup_elem(&direct_found, &ask->client);
	if (!found)
		return DIRECT_NO;
	client_cookie = found->application;
	if (is_taken(found))
		return DIRECT_NO;
	/* The backend may not have taken our last packet of the handshake yet. */
	found = bpf_map_lookup_elem(&direct_found, &ask->backend);
	if (!found)
		return DIRECT_NOT_YET;
	backend_cookie = found->application;
	if (is_taken(found))
		return DIRECT_NO;
	to_backend = slot_at(up);
	to_client = slot_at(down);
	if (!to_backend || !to_client)
		return DIRECT_NO;
	client = bpf_map_lookup_elem(&direct_sockets, &client_cookie);
	if (!client)
		return DIRECT_NO;
	backend = bpf_map_lookup_elem(&direct_sockets, &backend_cookie);
	if (!backend)
		goto out;
	near = app_of(client);
	far = app_of(backend);
	if (near && far) {
		to_backend->sender = to_client->receiver = client_cookie;
		to_backend->receiver = to_client->sender = backend_cookie;
		settle(near, far, backend_cookie, up, ask->worker);
		settle(far, near, client_cookie, down, ask->worker);
		copy_marks(near, to_client);
		copy_marks(far, to_backend);
		answer = DIRECT_YES;
	}
	bpf_sk_release(backend);
out:
	bpf_sk_release(client);
	bpf_map_delete_elem(&direct_found, &ask->client);
	bpf_map_delete_elem(&direct_found, &ask->backend);
	return answer;
}

/* The sender's sends pass sock_direct from now on: not before it has sent something,
 * because SO_ZEROCOPY cannot be honoured there, and who sets it does so first.
 */
static __always_inline int open(struct direct_slot *slot)
{
	__u64 cookie = slot->sender;
	struct tcp_sock *tcp;
	struct bpf_sock *sk;
	struct app *app;
	int answer = DIRECT_NO;

	sk = bpf_map_lookup_elem(&direct_sockets, &cookie);
	if (!sk)
		return DIRECT_NO;
	app = app_of(sk);
	tcp = bpf_skc_to_tcp_sock(sk);
	if (!app || !tcp || !app->has_slots)
		goto out;
	if (app->is_open) {
		answer = DIRECT_YES;
		goto out;
	}
	if (BPF_CORE_READ((struct sock *)tcp, __sk_common.skc_flags) >>
		    bpf_core_enum_value(enum sock_flags, SOCK_ZEROCOPY) &
	    1) {
		__sync_val_compare_and_swap(&slot->refusal, DIRECT_FITS, DIRECT_ZEROCOPY);
		goto out;
	}
	/* Its functions must be the ones that it was captured with. */
	if (functions_of((struct sock *)tcp) != functions[is_v6((struct sock *)tcp)].reading ||
	    bpf_map_update_elem(&direct_senders, &cookie, sk, BPF_NOEXIST)) {
		__sync_val_compare_and_swap(&slot->refusal, DIRECT_FITS, DIRECT_TAKEN);
		goto out;
	}
	functions[is_v6((struct sock *)tcp)].sending = functions_of((struct sock *)tcp);
	__sync_lock_test_and_set(&app->is_open, 1);
	answer = DIRECT_YES;
out:
	bpf_sk_release(sk);
	return answer;
}

static __always_inline int look(const struct direct_slot *slot)
{
	__u64 cookie = slot->receiver;
	struct bpf_sock *sk = bpf_map_lookup_elem(&direct_sockets, &cookie);
	struct tcp_sock *tcp;
	int answer;

	/* It is closed, and nobody will read anything. */
	if (!sk)
		return DIRECT_NO;
	tcp = bpf_skc_to_tcp_sock(sk);
	answer = tcp && has_unread((struct sock *)tcp) ? DIRECT_YES : DIRECT_NO;
	bpf_sk_release(sk);
	return answer;
}

static __always_inline int forget(const struct direct_slot *slot)
{
	__u64 cookie = slot->sender;
	struct bpf_sock *sk = bpf_map_lookup_elem(&direct_sockets, &cookie);
	struct app *app;

	if (!sk)
		return DIRECT_NO;
	app = app_of(sk);
	if (app)
		app->is_open = app->has_slots = 0;
	bpf_sk_release(sk);
	return DIRECT_YES;
}

SEC("tc")
int sock_direct_ask(struct __sk_buff *skb)
{
	struct direct_slot *slot;
	struct direct_ask ask;

	if (bpf_skb_load_bytes(skb, 0, &ask, sizeof(ask)))
		return DIRECT_NO;
	if (ask.question == DIRECT_WATCH)
		return watch(&ask);
	slot = slot_at(ask.slot);
	if (!slot)
		return DIRECT_NO;
	switch (ask.question) {
	case DIRECT_OPEN:
		return open(slot);
	case DIRECT_LOOK:
		return look(slot);
	case DIRECT_FORGET:
		return forget(slot);
	}
	return DIRECT_NO;
}
