// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The wire path: an established session without its gateway.
 *
 * Once nothing of a session is in flight inside the gateway, its two connections
 * differ by constants only: addresses, ports, an offset of the sequence numbers
 * each way, an offset of the timestamps each way, the scale of the window.
 * sock_wire, at the ingress of the interfaces, rewrites the headers of each packet
 * and sends it on, so that client and backend speak TCP with each other. Our own
 * sockets have nothing left to do, and userspace closes them without a word.
 *
 * The switch is decided here, packet by packet, while the session is armed; why it
 * neither loses nor doubles a byte is argued above try_switch(). Every return says
 * who has the packet: our own socket (NEXT), the other end (translated), nobody.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "sockmap.h"
#include "wire.h"

/* The verifier lets only a GPL-compatible program read a socket's fields. */
char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define READ_ONCE(x) (*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile typeof(x) *)&(x) = (value))

#define NULL ((void *)0)

#define NEXT TC_ACT_UNSPEC /* the packet goes its way, through other programs too */

#define ETH_BYTES 14
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86DD
#define AF_INET 2
#define AF_INET6 10
#define PROTOCOL_ICMP 1
#define PROTOCOL_TCP 6
#define PROTOCOL_ICMPV6 58
#define LOOPBACK_IFINDEX 1 /* in every network namespace */
#define NS_PER_MS 1000000
#define FRESH_TTL 64

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10
#define TCP_HEADER_BYTES 20
#define TCP_OPTIONS_BYTES 40

/* As they open an option list: NOP NOP TIMESTAMP 10, and NOP NOP SACK. */
#define OPTION_TIMESTAMPS bpf_htonl(0x0101080a)
#define OPTION_SACK bpf_htonl(0x01010500)
#define OPTION_SACK_MASK bpf_htonl(0xffffff00)
#define TIMESTAMPS_BYTES 12
#define SACK_BLOCKS 4

/* Of ecn_flags. The second, in newer kernels, comes with options and counters that
 * are not translated.
 */
#define ECN_RFC3168 0x01
#define ECN_ACCURATE 0x10

/* A SYN that comes so soon after another packet is an old one, or a forged one; who
 * means it sends it again.
 */
#define QUIET_NS 900000000ULL

/* How far ahead of its clock a socket's last timestamp may be, or become before the
 * socket is closed.
 */
#define CLOCK_MARGIN_MS 8

/* Of a receiver's window, in the units in which its sender will be told. */
#define LEAST_UNITS 8

struct ipv4_header {
	__u8 version_length;
	__u8 tos;
	__be16 total_bytes;
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 protocol;
	__u16 check;
	__be32 source;
	__be32 target;
};

#define IPV4_CHECK 10
#define IPV4_TTL 8
#define IPV4_SOURCE 12
#define IPV4_PLAIN 0x45 /* version, and length in words: without options */
#define IPV4_OFFSET bpf_htons(0x1fff)
#define IPV4_MORE bpf_htons(0x2000) /* to come, of the same packet */

struct ipv6_header {
	__be32 version_class_flow;
	__be16 payload_bytes;
	__u8 next_header;
	__u8 hop_limit;
	__be32 source[4];
	__be32 target[4];
};

/* Extension headers; all but a fragment's begin by the next one's kind and their length. */
#define IPV6_HOP_BY_HOP 0
#define IPV6_ROUTING 43
#define IPV6_FRAGMENT 44
#define IPV6_DESTINATION 60
#define IPV6_HEADERS 4 /* more than anybody sends */

#define IPV6_NEXT_HEADER 6
#define IPV6_HOP_LIMIT 7
#define IPV6_SOURCE 8

struct tcp_header {
	__be16 source;
	__be16 target;
	__be32 seq;
	__be32 ack;
	__u8 offset; /* the upper half: words in the header */
	__u8 flags;
	__be16 window;
	__u16 check;
	__be16 urgent;
	__be32 options[TCP_OPTIONS_BYTES / 4];
};

#define TCP_CHECK 16

/* "Too long for the way", and what it quotes of the packet that was. */
struct quoted_tcp {
	__be16 source;
	__be16 target;
	__be32 seq;
};

struct quote4 {
	struct ipv4_header ip;
	struct quoted_tcp tcp;
};

struct quote6 {
	struct ipv6_header ip;
	struct quoted_tcp tcp;
};

struct icmp_header {
	__u8 type;
	__u8 code;
	__u16 check;
	__be32 mtu;
};

#define ICMP_CHECK 2
#define ICMP_UNREACHABLE 3
#define ICMP_TOO_LONG 4 /* a code of it */
#define ICMPV6_TOO_LONG 2

struct packet {
	struct wire_flow flow;
	__u32 oddity; /* enum wire_unfit: what IP has added to it */
	struct tcp_header *tcp; /* a copy, in wire_scratch */
	__u32 transport; /* offset of the TCP header */
	__u32 options_bytes;
	__u32 payload_bytes;
	__u32 seq; /* of tcp, in this host's order */
	__u32 ack;
	__u32 end; /* the sequence number behind its bytes and its FIN */

	/* What it belongs to. */
	struct wire_session *session;
	struct wire_slot *slot; /* of its way */
	struct wire_slot *reverse;
	__u32 index;
	__u32 generation;
	__u32 way;
};

/* Functions of their own, and not inlined, for the sake of the stack: 512 bytes for all
 * that is called at a time.
 */
#define __own_stack static __attribute__((noinline))

/* Who sends to whom -> the session, and which way that is. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, WIRE_SESSIONS_DEFAULT *WIRE_WAYS);
	__type(key, struct wire_flow);
	__type(value, struct wire_leg);
} wire_flows SEC(".maps");

/* A bpf_spin_lock may not lie in shared memory: what is locked is here, what
 * userspace reads is in wire_slots.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, WIRE_SESSIONS_DEFAULT);
	__type(key, __u32);
	__type(value, struct wire_session);
} wire_sessions SEC(".maps");

/* Two neighbours for each session, one a way. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, WIRE_SESSIONS_DEFAULT *WIRE_WAYS);
	__type(key, __u32);
	__type(value, struct wire_slot);
} wire_slots SEC(".maps");

/* What does not fit on the stack. */
struct scratch {
	struct tcp_header tcp;
	__u32 pad;
	struct wire_flow left; /* as what sock_wire left the packet that sock_wire_again sees */
	union {
		struct quote4 v4;
		struct quote6 v6;
	} quoted, told; /* what an error quotes, or a header; and what its receiver knows it by */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} wire_scratch SEC(".maps");

struct wire_ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
};

/* One for each worker. Userspace fills it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, WIRE_WORKERS_MAX);
	__type(key, __u32);
	__array(values, struct wire_ring);
} wire_rings SEC(".maps");

/* A ring has room for all that can happen to its sessions: this cannot fail. */
static __always_inline void tell(const struct packet *packet, __u16 happening, __u16 detail)
{
	__u32 worker = packet->session->worker;
	struct wire_event event = {
		.session = packet->index,
		.generation = packet->session->generation,
		.happening = happening,
		.detail = detail,
	};
	void *ring = bpf_map_lookup_elem(&wire_rings, &worker);

	if (ring)
		bpf_ringbuf_output(ring, &event, sizeof(event), 0);
}

/* --- reading a packet */

/* Step over IPv6 extension headers: false if no TCP header follows in this packet. */
__own_stack bool skip_headers(struct __sk_buff *skb, struct packet *packet, __u8 kind)
{
	__u32 i;

	for (i = 0; i < IPV6_HEADERS && kind != PROTOCOL_TCP; i++) {
		struct {
			__u8 next;
			__u8 units; /* of 8 bytes, without the first */
			__be16 fragment;
		} header;

		if (bpf_skb_load_bytes(skb, packet->transport, &header, sizeof(header)))
			return false;
		if (kind == IPV6_FRAGMENT) {
			if (header.fragment & bpf_htons(0xfff8))
				return false;
			packet->oddity = WIRE_FRAGMENTS;
			packet->transport += 8;
		} else if (kind == IPV6_HOP_BY_HOP || kind == IPV6_ROUTING ||
			   kind == IPV6_DESTINATION) {
			packet->oddity = WIRE_IP_OPTIONS;
			packet->transport += 8 + header.units * 8;
		} else {
			return false;
		}
		kind = header.next;
	}
	return kind == PROTOCOL_TCP;
}

/* Fill in who sends to whom and where TCP begins: the bytes of the TCP segment, 0 if it is
 * none. If there is an oddity it is not a packet to translate; of a fragment's bytes
 * but the first, nobody says whose they are.
 */
static __always_inline __u32 read_ip(struct __sk_buff *skb, struct packet *packet,
				     struct scratch *scratch)
{
	struct wire_flow *flow = &packet->flow;
	__u32 bytes;

	/* Loaded, not looked at: a driver may leave the headers in a fragment. */
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct ipv4_header *ip = &scratch->quoted.v4.ip;

		flow->family = AF_INET;
		if (bpf_skb_load_bytes(skb, ETH_BYTES, ip, sizeof(*ip)) ||
		    ip->protocol != PROTOCOL_TCP || ip->fragment & IPV4_OFFSET)
			return 0;
		flow->source[0] = ip->source;
		flow->target[0] = ip->target;
		if (ip->version_length != IPV4_PLAIN)
			packet->oddity = WIRE_IP_OPTIONS;
		if (ip->fragment & IPV4_MORE)
			packet->oddity = WIRE_FRAGMENTS;
		packet->transport = ETH_BYTES + (ip->version_length & 15) * 4;
		/* Above 64 KiB (BIG TCP) there is no length in the header. */
		bytes = bpf_ntohs(ip->total_bytes);
		if (bytes)
			bytes = bytes > sizeof(*ip) ? bytes - sizeof(*ip) : 1;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6_header *ip = &scratch->quoted.v6.ip;

		flow->family = AF_INET6;
		if (bpf_skb_load_bytes(skb, ETH_BYTES, ip, sizeof(*ip)))
			return 0;
		packet->transport = ETH_BYTES + sizeof(*ip);
		if (ip->next_header != PROTOCOL_TCP && !skip_headers(skb, packet, ip->next_header))
			return 0;
		__builtin_memcpy(flow->source, ip->source, sizeof(flow->source));
		__builtin_memcpy(flow->target, ip->target, sizeof(flow->target));
		bytes = bpf_ntohs(ip->payload_bytes);
	} else {
		return 0;
	}
	if (packet->oddity)
		return 1;
	if (!bytes)
		bytes = skb->len - packet->transport;
	return bytes <= skb->len - packet->transport ? bytes : 0;
}

/* The rest of it: false if it is cut short. */
static __always_inline bool read_tcp(struct __sk_buff *skb, struct packet *packet,
				     __u32 segment_bytes)
{
	struct tcp_header *tcp = packet->tcp;
	__u32 header_bytes, options_bytes;

	if (bpf_skb_load_bytes(skb, packet->transport, tcp, TCP_HEADER_BYTES))
		return false;
	header_bytes = (tcp->offset >> 4) * 4;
	if (header_bytes < TCP_HEADER_BYTES || header_bytes > segment_bytes)
		return false;
	options_bytes = header_bytes - TCP_HEADER_BYTES;
	packet->flow.source_port = tcp->source;
	packet->flow.target_port = tcp->target;
	packet->options_bytes = options_bytes;
	packet->payload_bytes = segment_bytes - header_bytes;
	packet->seq = bpf_ntohl(tcp->seq);
	packet->ack = bpf_ntohl(tcp->ack);
	packet->end = packet->seq + packet->payload_bytes + (tcp->flags & TCP_FIN ? 1 : 0);
	return true;
}

static __always_inline bool read_options(struct __sk_buff *skb, struct packet *packet)
{
	__u32 bytes = packet->options_bytes;

	if (!bytes)
		return true;
	if (bytes > TCP_OPTIONS_BYTES) /* it cannot be; the verifier wants to know */
		return false;
	return !bpf_skb_load_bytes(skb, packet->transport + TCP_HEADER_BYTES, packet->tcp->options,
				   bytes);
}

/* Whether we know how to translate the options: timestamps if and only if they
 * were agreed on, then perhaps SACK blocks. It is what all current stacks send.
 */
static __always_inline bool knows_options(const struct packet *packet, bool has_timestamps)
{
	__u32 bytes = packet->options_bytes, sack;

	if (has_timestamps) {
		if (bytes < TIMESTAMPS_BYTES || packet->tcp->options[0] != OPTION_TIMESTAMPS)
			return false;
		bytes -= TIMESTAMPS_BYTES;
		sack = packet->tcp->options[3];
	} else {
		sack = packet->tcp->options[0];
	}
	/* NOP NOP SACK length: the length counts itself, the kind and the blocks. */
	return !bytes ||
	       ((sack & OPTION_SACK_MASK) == OPTION_SACK && bytes == (bpf_ntohl(sack) & 0xff) + 2);
}

/* --- the switch */

/* What of a socket the switch depends on. */
struct view {
	__u64 bytes_received;
	__u64 bytes_acked;
	__u32 rcv_nxt;
	__u32 rcv_wup;
	__u32 snd_una;
	__u32 write_seq;
};

static __always_inline void look(struct tcp_sock *socket, struct view *view)
{
	view->bytes_received = READ_ONCE(socket->bytes_received);
	view->bytes_acked = READ_ONCE(socket->bytes_acked);
	view->rcv_nxt = READ_ONCE(socket->rcv_nxt);
	view->rcv_wup = READ_ONCE(socket->rcv_wup);
	view->snd_una = READ_ONCE(socket->snd_una);
	view->write_seq = READ_ONCE(socket->write_seq);
}

static __always_inline bool is_as_seen(struct tcp_sock *socket, const struct view *view)
{
	return view->bytes_received == READ_ONCE(socket->bytes_received) &&
	       view->bytes_acked == READ_ONCE(socket->bytes_acked) &&
	       view->rcv_nxt == READ_ONCE(socket->rcv_nxt) &&
	       view->rcv_wup == READ_ONCE(socket->rcv_wup) &&
	       view->snd_una == READ_ONCE(socket->snd_una) &&
	       view->write_seq == READ_ONCE(socket->write_seq);
}

static __always_inline bool is_empty(struct tcp_sock *socket)
{
	struct sock *sk = (struct sock *)socket;

	return sk->__sk_common.skc_state == TCP_ESTABLISHED && !sk->sk_backlog.len &&
	       !socket->out_of_order_queue.rb_node;
}

/* What a socket's peer may still send by what we told it, against what it is to be
 * sent to takes. A chatty session does not use its windows; but one must hold a segment of
 * any size, or its sender waits for a timer before it sends a part of one; and stay so: the
 * window of a receiver that scales it by 1 never grows beyond what a header holds.
 */
static __always_inline bool fits_window(struct tcp_sock *from, struct tcp_sock *to, __u8 scale,
					__u32 is_chatty, __u32 most_told)
{
	__u32 told = from->rcv_wnd, may_send;

	/* The kernel notes it before it cuts it to what the header holds. */
	may_send = from->rcv_wup + WIRE_TOLD(told, scale & 15) - from->rcv_nxt;
	/* No window that is told is larger; a clamp makes it smaller, and userspace keeps it. */
	if (most_told < from->rcv_ssthresh)
		most_told = from->rcv_ssthresh;

	/* A window is told in units, rounded down: a small one might come to nothing. */
	return ((may_send <= to->snd_wnd && WIRE_SEGMENT(most_told, scale & 15, from->advmss) <=
						    WIRE_SEGMENT_MOST(to->mss_cache)) ||
		(is_chatty && from->advmss <= to->snd_wnd &&
		 (to->snd_wnd > TCP_WINDOW_MAX || from->advmss <= to->snd_wnd / 2))) &&
	       to->snd_wnd >> (scale & 15) >= LEAST_UNITS;
}

/* One of the session's two sockets, to be released; NULL when it is gone. */
static __always_inline struct bpf_sock *find_socket(struct __sk_buff *skb,
						    const struct wire_flow *flow)
{
	struct bpf_sock_tuple tuple;

	if (flow->family == AF_INET) {
		tuple.ipv4.saddr = flow->source[0];
		tuple.ipv4.daddr = flow->target[0];
		tuple.ipv4.sport = flow->source_port;
		tuple.ipv4.dport = flow->target_port;
		return bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	__builtin_memcpy(tuple.ipv6.saddr, flow->source, sizeof(tuple.ipv6.saddr));
	__builtin_memcpy(tuple.ipv6.daddr, flow->target, sizeof(tuple.ipv6.daddr));
	tuple.ipv6.sport = flow->source_port;
	tuple.ipv6.dport = flow->target_port;
	return bpf_sk_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
}

/* Whether IPsec has a say in what this socket sends or receives. Its own policies are
 * known; of the namespace's only that there are some: the route that the socket
 * remembers may be older than the last of them.
 *
 * Here and in out_of() the fields are copied, not looked at: for each pointer that it
 * follows the verifier searches the kernel's types by name, most of the time that a
 * gateway needs to start (6.18: 0.46 s to load this object, 0.14 s without).
 */
static __always_inline bool has_policy(struct sock *sk)
{
	struct net *net = BPF_CORE_READ(sk, __sk_common.skc_net.net);

	if (bpf_core_field_exists(sk->sk_policy) &&
	    (BPF_CORE_READ(sk, sk_policy[0]) || BPF_CORE_READ(sk, sk_policy[1])))
		return true;
	return bpf_core_field_exists(net->xfrm) &&
	       (BPF_CORE_READ(net, xfrm.policy_count[XFRM_POLICY_IN]) ||
		BPF_CORE_READ(net, xfrm.policy_count[XFRM_POLICY_OUT]));
}

/* Where packets to the peer of this socket leave; 0: not known at the moment. */
static __always_inline __u32 out_of(struct tcp_sock *socket, bool *is_transformed)
{
	struct sock *sk = (struct sock *)socket;
	struct dst_entry *route = BPF_CORE_READ(sk, sk_dst_cache);

	*is_transformed |= has_policy(sk);
	if (!route)
		return 0;
	*is_transformed |= BPF_CORE_READ(route, xfrm) != NULL;
	return BPF_CORE_READ(route, dev, ifindex);
}

/* What we told one peer to send at the most, the other must take, and the way there. */
static __always_inline bool takes_segments_of(struct tcp_sock *from, struct tcp_sock *to,
					      __u32 header_bytes)
{
	const struct inet_connection_sock *connection = (struct inet_connection_sock *)to;

	return from->advmss <= to->rx_opt.mss_clamp &&
	       from->advmss + header_bytes <= connection->icsk_pmtu_cookie;
}

/* What can only be seen from here of whether the session fits. */
static __always_inline __u32 unfit_by_route(struct tcp_sock *client, struct tcp_sock *backend,
					    __u32 header_bytes, __u32 *ifindex)
{
	bool is_transformed = false;

	ifindex[SOCK_SLOT_TO_BACKEND] = out_of(backend, &is_transformed);
	ifindex[SOCK_SLOT_TO_CLIENT] = out_of(client, &is_transformed);
	if (is_transformed)
		return WIRE_XFRM;
	if ((ifindex[SOCK_SLOT_TO_BACKEND] == LOOPBACK_IFINDEX) !=
	    (ifindex[SOCK_SLOT_TO_CLIENT] == LOOPBACK_IFINDEX))
		return WIRE_MIXED_LEGS;
	if (!takes_segments_of(client, backend, header_bytes) ||
	    !takes_segments_of(backend, client, header_bytes))
		return WIRE_MSS;
	if ((client->ecn_flags ^ backend->ecn_flags) & ECN_RFC3168 ||
	    (client->ecn_flags | backend->ecn_flags) & ECN_ACCURATE)
		return WIRE_ECN;
	return WIRE_FITS;
}

/* Note how far a packet will get our own socket, before it goes on to it. The lock
 * is held.
 */
static __always_inline void note(const struct packet *packet)
{
	struct wire_session *session = packet->session;
	__u32 way = packet->way;

	if (!session->is_seen[way & 1] || (__s32)(packet->end - session->let_through[way & 1]) > 0)
		session->let_through[way & 1] = packet->end;
	session->is_seen[way & 1] = 1;
	/* After a FIN or a reset the session ends on the path that it is on. */
	if (packet->tcp->flags & (TCP_SYN | TCP_FIN | TCP_RST))
		session->state = WIRE_UNFIT;
}

/* Decide whether this packet is the first that is translated.
 *
 * The condition, with X the leg that the packet came by, and Y the other:
 *   the packet begins at X.rcv_nxt (or is a probe, one before it and empty) and
 *   acknowledges X.write_seq;
 *   Y.snd_una == Y.write_seq: all that we ever sent is acknowledged, to both sides;
 *   C.rcv_nxt + d0 == B.write_seq and B.rcv_nxt + d1 == C.write_seq: and it is all
 *   that we received, whether userspace has taken it from the socket or only peeked;
 *   if it brings nothing that the other end will acknowledge, then we have: what X's
 *   peer has sent would else wait for an acknowledgement that nobody owes it.
 *   neither peer may send more at the moment than the other takes: it has been told
 *   our window, and what is beyond the other's is dropped, and waits for a timeout.
 * So there is no byte that we acknowledged to one side and that the other side has
 * not acknowledged to us, wherever in the gateway it might lie.
 *
 * A packet may be past this program and not yet in its socket (the backlog,
 * another CPU): our socket would acknowledge it, and be closed with it. Each
 * packet of an armed session therefore raises let_through under the lock before it
 * goes on, and here let_through == rcv_nxt is asked for both legs under the same
 * lock: any packet is either counted there, and the switch waits until its socket
 * has it, or it finds the session switched.
 *
 * The fields of a socket are read while others change them. Two equal readings in
 * a row say that all of them held at the moment between the two; but bytes_acked is
 * raised a moment before snd_una, and then both readings may find the one without
 * the other. The offsets are constants, though: they count when an earlier packet
 * has found the same.
 *
 * What came before the session was armed was not counted: a packet that still
 * waits for its socket is then in its backlog, or out of order, or it is what
 * let_through is compared with.
 */
__own_stack bool try_switch(struct __sk_buff *skb, struct packet *packet, __u32 *unfit)
{
	struct wire_session *session = packet->session;
	struct wire_slot *slot = packet->slot, *reverse = packet->reverse;
	const struct wire_slot *first = packet->way ? reverse : slot;
	const struct wire_slot *second = packet->way ? slot : reverse;
	struct bpf_sock *client_sk = NULL, *backend_sk = NULL;
	struct tcp_sock *client, *backend;
	__u32 ifindex[WIRE_WAYS], seq_offset[WIRE_WAYS], now_ms, way = packet->way & 1;
	__u32 recent[WIRE_WAYS], clock[WIRE_WAYS], header_bytes;
	struct view at[WIRE_WAYS];
	bool is_switched = false, is_still;

	client_sk = find_socket(skb, &session->flows[SOCK_SLOT_TO_BACKEND]);
	if (!client_sk)
		goto out;
	backend_sk = find_socket(skb, &session->flows[SOCK_SLOT_TO_CLIENT]);
	if (!backend_sk)
		goto out;
	client = bpf_skc_to_tcp_sock(client_sk);
	backend = bpf_skc_to_tcp_sock(backend_sk);
	if (!client || !backend)
		goto out;
	/* Timestamps are no part of a segment's size; all other headers come to this. */
	header_bytes = packet->transport - ETH_BYTES + TCP_HEADER_BYTES +
		       (session->has_timestamps ? TIMESTAMPS_BYTES : 0);
	*unfit = unfit_by_route(client, backend, header_bytes, ifindex);
	if (*unfit || !ifindex[0] || !ifindex[1])
		goto out;
	now_ms = bpf_ktime_get_ns() / NS_PER_MS + CLOCK_MARGIN_MS;

	bpf_spin_lock(&session->lock);
	look(client, &at[SOCK_SLOT_TO_BACKEND]);
	look(backend, &at[SOCK_SLOT_TO_CLIENT]);
	recent[SOCK_SLOT_TO_BACKEND] = client->rx_opt.ts_recent;
	recent[SOCK_SLOT_TO_CLIENT] = backend->rx_opt.ts_recent;
	clock[SOCK_SLOT_TO_BACKEND] = now_ms + client->tsoffset;
	clock[SOCK_SLOT_TO_CLIENT] = now_ms + backend->tsoffset;
	is_still = is_as_seen(client, &at[SOCK_SLOT_TO_BACKEND]) &&
		   is_as_seen(backend, &at[SOCK_SLOT_TO_CLIENT]) && is_empty(client) &&
		   is_empty(backend) &&
		   fits_window(client, backend, session->own_scale[0], first->is_chatty,
			       first->most_told) &&
		   fits_window(backend, client, session->own_scale[1], first->is_chatty,
			       second->most_told);
	/* The connecting side counts its SYN as acknowledged, hence the 1. */
	seq_offset[SOCK_SLOT_TO_BACKEND] =
		at[SOCK_SLOT_TO_CLIENT].snd_una - (__u32)at[SOCK_SLOT_TO_CLIENT].bytes_acked + 1 -
		(at[SOCK_SLOT_TO_BACKEND].rcv_nxt - (__u32)at[SOCK_SLOT_TO_BACKEND].bytes_received);
	seq_offset[SOCK_SLOT_TO_CLIENT] =
		at[SOCK_SLOT_TO_BACKEND].snd_una - (__u32)at[SOCK_SLOT_TO_BACKEND].bytes_acked -
		(at[SOCK_SLOT_TO_CLIENT].rcv_nxt - (__u32)at[SOCK_SLOT_TO_CLIENT].bytes_received);
	if (!session->is_computed || session->seq_offset[0] != seq_offset[0] ||
	    session->seq_offset[1] != seq_offset[1]) {
		/* Constants: what another packet finds, too, was not read while
		 * bytes_acked and snd_una were being changed.
		 */
		if (session->state == WIRE_ARMED && session->generation == packet->generation) {
			session->seq_offset[0] = seq_offset[0];
			session->seq_offset[1] = seq_offset[1];
			session->is_computed = 1;
		}
		is_still = false;
	}
	if (session->state == WIRE_ARMED && session->generation == packet->generation &&
	    !READ_ONCE(first->hold) && is_still &&
	    (packet->seq == at[way].rcv_nxt ||
	     (packet->seq + 1 == at[way].rcv_nxt && !packet->payload_bytes)) &&
	    (packet->payload_bytes || at[way].rcv_wup == at[way].rcv_nxt) &&
	    packet->ack == at[way].write_seq && at[!way].snd_una == at[!way].write_seq &&
	    session->is_seen[0] && session->is_seen[1] &&
	    session->let_through[0] == at[0].rcv_nxt && session->let_through[1] == at[1].rcv_nxt &&
	    at[0].rcv_nxt + seq_offset[0] == at[1].write_seq &&
	    at[1].rcv_nxt + seq_offset[1] == at[0].write_seq) {
		/* Of this packet's sender we have the very timestamp. */
		if (session->has_timestamps)
			recent[way & 1] = bpf_ntohl(packet->tcp->options[1]);
		session->received[0] = at[0].bytes_received;
		session->received[1] = at[1].bytes_received;
		session->time_offset[0] = clock[1] - recent[0];
		session->time_offset[1] = clock[0] - recent[1];
		session->ifindex[0] = ifindex[0] == LOOPBACK_IFINDEX ? 0 : ifindex[0];
		session->ifindex[1] = ifindex[1] == LOOPBACK_IFINDEX ? 0 : ifindex[1];
		/* What is counted begins here. */
		slot->end = reverse->acked = at[way].rcv_nxt;
		reverse->end = slot->acked = at[!way].rcv_nxt;
		session->state = WIRE_SWITCHED;
		is_switched = true;
	}
	bpf_spin_unlock(&session->lock);
out:
	if (backend_sk)
		bpf_sk_release(backend_sk);
	if (client_sk)
		bpf_sk_release(client_sk);
	return is_switched;
}

/* --- translation */

static __always_inline void translate_options(struct tcp_header *tcp, __u32 first,
					      __u32 options_bytes, __u32 ack_offset)
{
	/* NOP NOP SACK length, then an edge a word. */
	__u32 words = options_bytes / 4, i;

	for (i = 1; i <= 2 * SACK_BLOCKS; i++) {
		if (first + i >= words || first + i >= TCP_OPTIONS_BYTES / 4)
			return;
		tcp->options[first + i] =
			bpf_htonl(bpf_ntohl(tcp->options[first + i]) - ack_offset);
	}
}

/* The window in the units that we announced on the other leg: never more than it is. */
static __always_inline __be16 translate_window(const struct packet *packet)
{
	const struct wire_session *session = packet->session;
	__u32 bytes = (__u32)bpf_ntohs(packet->tcp->window) << session->peer_scale[packet->way & 1];
	__u32 units = bytes >> session->own_scale[!packet->way];

	return bpf_htons(units < TCP_WINDOW_MAX ? units : TCP_WINDOW_MAX);
}

/* Rewrite the headers, as if our own socket on the other leg had sent the packet. */
__own_stack bool translate(struct __sk_buff *skb, struct packet *packet)
{
	const struct wire_session *session = packet->session;
	__u32 way = packet->way & 1;
	const struct wire_flow *other = &session->flows[!way];
	__u32 offset = session->seq_offset[way & 1], ack_offset = session->seq_offset[!way];
	bool is_away = session->ifindex[way & 1] != 0;
	struct tcp_header *tcp = packet->tcp;
	__u32 bytes = TCP_HEADER_BYTES + packet->options_bytes;
	__u32 check = packet->transport + TCP_CHECK;
	__s64 tcp_change, address_change;
	__be32 addresses[8];

	if (bytes < TCP_HEADER_BYTES || bytes > sizeof(*tcp)) /* for the verifier */
		return false;
	tcp_change = bpf_csum_diff((__be32 *)tcp, bytes, NULL, 0, 0);
	tcp->source = other->target_port;
	tcp->target = other->source_port;
	tcp->seq = bpf_htonl(packet->seq + offset);
	tcp->ack = tcp->flags & TCP_ACK ? bpf_htonl(packet->ack - ack_offset) : 0;
	if (!(tcp->flags & TCP_RST))
		tcp->window = translate_window(packet);
	if (session->has_timestamps && packet->options_bytes >= TIMESTAMPS_BYTES) {
		tcp->options[1] =
			bpf_htonl(bpf_ntohl(tcp->options[1]) + session->time_offset[way & 1]);
		tcp->options[2] =
			bpf_htonl(bpf_ntohl(tcp->options[2]) - session->time_offset[!way]);
		translate_options(tcp, 3, packet->options_bytes, ack_offset);
	} else if (packet->options_bytes) {
		translate_options(tcp, 0, packet->options_bytes, ack_offset);
	}
	tcp_change = bpf_csum_diff(NULL, 0, (__be32 *)tcp, bytes, tcp_change);
	if (bpf_skb_store_bytes(skb, packet->transport, tcp, bytes, 0))
		return false;

	if (packet->flow.family == AF_INET) {
		__be32 old[2] = { packet->flow.source[0], packet->flow.target[0] };

		addresses[0] = other->target[0];
		addresses[1] = other->source[0];
		address_change = bpf_csum_diff(old, 8, addresses, 8, 0);
		if (bpf_skb_store_bytes(skb, ETH_BYTES + IPV4_SOURCE, addresses, 8, 0) ||
		    bpf_l3_csum_replace(skb, ETH_BYTES + IPV4_CHECK, 0, address_change, 0))
			return false;
		if (is_away) {
			__u16 fresh = bpf_htons(FRESH_TTL << 8 | PROTOCOL_TCP), ttl = 0;

			if (bpf_skb_load_bytes(skb, ETH_BYTES + IPV4_TTL, &ttl, sizeof(ttl)) ||
			    bpf_l3_csum_replace(skb, ETH_BYTES + IPV4_CHECK, ttl, fresh,
						sizeof(ttl)) ||
			    bpf_skb_store_bytes(skb, ETH_BYTES + IPV4_TTL, &fresh, sizeof(fresh),
						0))
				return false;
		}
	} else {
		__builtin_memcpy(addresses, other->target, 16);
		__builtin_memcpy(addresses + 4, other->source, 16);
		/* source and target are neighbours in a flow, too */
		address_change = bpf_csum_diff(packet->flow.source, 32, addresses, 32, 0);
		if (bpf_skb_store_bytes(skb, ETH_BYTES + IPV6_SOURCE, addresses, 32, 0))
			return false;
		if (is_away) {
			__u8 fresh = FRESH_TTL;

			if (bpf_skb_store_bytes(skb, ETH_BYTES + IPV6_HOP_LIMIT, &fresh, 1, 0))
				return false;
		}
	}
	/* Both know what is still to be computed (CHECKSUM_PARTIAL, GSO). */
	return !bpf_l4_csum_replace(skb, check, 0, address_change, BPF_F_PSEUDO_HDR) &&
	       !bpf_l4_csum_replace(skb, check, 0, tcp_change, 0);
}

/* Forget the session: what comes from now on meets the stack, which resets it. */
static __always_inline void end(const struct packet *packet)
{
	struct wire_slot *first = packet->way ? packet->reverse : packet->slot;
	struct wire_session *session = packet->session;

	/* Userspace may be about to end it, too. */
	if (__sync_val_compare_and_swap(&first->is_claimed, 0, 1))
		return;
	session->state = WIRE_ENDED;
	bpf_map_delete_elem(&wire_flows, &session->flows[0]);
	bpf_map_delete_elem(&wire_flows, &session->flows[1]);
	tell(packet, WIRE_HAS_ENDED, WIRE_FITS);
}

/* Keep the books of a packet that is about to be sent on; true if it is the last. */
static __always_inline bool account(const struct packet *packet)
{
	const struct wire_session *session = packet->session;
	struct wire_slot *slot = packet->slot, *reverse = packet->reverse;
	__u32 way = packet->way;
	struct wire_slot *first = way ? reverse : slot;
	__u32 payload_end = packet->seq + packet->payload_bytes, try;
	__u32 flags = packet->tcp->flags;
	bool is_last = false;

	__sync_fetch_and_add(&slot->packets, 1);
	WRITE_ONCE(slot->seen_ns, bpf_ktime_get_coarse_ns());
	/* Without payload, what is behind a FIN has its number. */
	for (try = 0; try < 3 && packet->payload_bytes; try++) {
		__u32 before = READ_ONCE(slot->end);
		__s32 fresh = payload_end - before;

		if (fresh <= 0)
			break;
		/* Another CPU may have raised it, less far or farther. */
		if (__sync_val_compare_and_swap(&slot->end, before, payload_end) == before) {
			__sync_fetch_and_add(&slot->bytes, (__u64)fresh);
			WRITE_ONCE(slot->moved_ns, slot->seen_ns);
			break;
		}
	}
	if (flags & TCP_FIN) {
		slot->fin_end = packet->end;
		slot->has_fin = 1;
	}
	if (flags & TCP_ACK && !(flags & TCP_RST)) {
		/* In the numbers of those bytes' sender. */
		__u32 acked = packet->ack - session->seq_offset[!way];

		if ((__s32)(acked - slot->acked) >= 0)
			slot->acked = acked;
		if (reverse->has_fin && acked == reverse->fin_end) {
			__u32 both = __sync_fetch_and_or(&first->fins_acked, 1 << way);

			is_last = (both | 1 << way) == 3;
		}
	}
	if (flags & TCP_RST) {
		/* At any other number its receiver asks for it again (RFC 5961). */
		is_last = packet->seq == reverse->acked || packet->seq == slot->end ||
			  (slot->has_fin && packet->seq == slot->fin_end);
		if (is_last)
			slot->has_reset = 1;
	}
	return is_last;
}

/* Find what the packet belongs to; false if it is nothing of ours. */
static __always_inline bool find_session(struct packet *packet)
{
	struct wire_leg *leg = bpf_map_lookup_elem(&wire_flows, &packet->flow);
	__u32 number;

	if (!leg)
		return false;
	packet->index = leg->session;
	packet->way = leg->way & 1;
	packet->generation = leg->generation;
	packet->session = bpf_map_lookup_elem(&wire_sessions, &packet->index);
	number = packet->index * WIRE_WAYS + packet->way;
	packet->slot = bpf_map_lookup_elem(&wire_slots, &number);
	number ^= 1;
	packet->reverse = bpf_map_lookup_elem(&wire_slots, &number);
	return packet->session && packet->slot && packet->reverse &&
	       packet->session->generation == packet->generation;
}

/* Whether nothing has come from either end for a while. */
static __always_inline bool is_quiet(const struct packet *packet)
{
	__u64 now_ns = bpf_ktime_get_coarse_ns();

	return now_ns > packet->slot->seen_ns + QUIET_NS &&
	       now_ns > packet->reverse->seen_ns + QUIET_NS;
}

/* Of a session that may not be switched yet: true if this packet is to be translated. */
static __always_inline bool meet(struct __sk_buff *skb, struct packet *packet, bool is_known)
{
	__u32 flags = packet->tcp->flags & (TCP_SYN | TCP_FIN | TCP_RST | TCP_ACK);
	struct wire_session *session = packet->session;
	__u32 unfit = WIRE_FITS, state;

	if (session->state == WIRE_ARMED && flags == TCP_ACK && is_known &&
	    try_switch(skb, packet, &unfit)) {
		tell(packet, WIRE_HAS_SWITCHED, WIRE_FITS);
		return true;
	}
	bpf_spin_lock(&session->lock);
	state = session->generation == packet->generation ? session->state : WIRE_FREE;
	if (state == WIRE_ARMED) {
		note(packet);
		if (unfit)
			session->state = WIRE_UNFIT;
	}
	bpf_spin_unlock(&session->lock);
	if (unfit && state == WIRE_ARMED)
		tell(packet, WIRE_IS_UNFIT, unfit);
	/* If not: our socket has the session, or the session is over. */
	return state == WIRE_SWITCHED;
}

/* Of a session, and not to be translated: IP has added something that would not fit what
 * is made of it. Before the switch the session stays with our sockets for good, which
 * have the packet; after it nobody gets it. Up the stack there is no socket for it
 * any more, and a reset would be the answer; who means it sends it again, without.
 */
static __always_inline int refuse(struct __sk_buff *skb, struct packet *packet)
{
	struct wire_session *session;
	__u32 state;

	/* Of a fragment there may be less; its ports are there. */
	if (bpf_skb_load_bytes(skb, packet->transport, packet->tcp, TCP_HEADER_BYTES) &&
	    bpf_skb_load_bytes(skb, packet->transport, packet->tcp, 4))
		return NEXT;
	packet->flow.source_port = packet->tcp->source;
	packet->flow.target_port = packet->tcp->target;
	if (!find_session(packet))
		return NEXT;
	session = packet->session;
	bpf_spin_lock(&session->lock);
	state = session->generation == packet->generation ? session->state : WIRE_FREE;
	if (state == WIRE_ARMED)
		session->state = WIRE_UNFIT;
	bpf_spin_unlock(&session->lock);
	if (state == WIRE_ARMED)
		tell(packet, WIRE_IS_UNFIT, packet->oddity);
	return state == WIRE_SWITCHED ? TC_ACT_SHOT : NEXT;
}

/* --- errors about what we have sent on */

/* Where this way's packets leave; 0: up the stack. */
static __always_inline __u32 way_out(const struct packet *packet)
{
	const struct wire_slot *slot = packet->slot;
	__u32 ifindex = packet->session->ifindex[packet->way & 1];
	__u64 route = READ_ONCE(slot->route);

	return ifindex && route >> 32 == packet->generation ? (__u32)route : ifindex;
}

/* Whether the packet, or a part of it when it is cut, is too long for where it leaves: what
 * was agreed on at the switch has changed, or the route. It would vanish without a word,
 * so userspace tells its sender what a router would.
 */
static __always_inline bool is_too_long(struct __sk_buff *skb, const struct packet *packet,
					__u32 ifindex)
{
	struct wire_slot *slot = packet->slot;
	__u32 mtu = 0;

	if (bpf_check_mtu(skb, ifindex, &mtu, 0, BPF_MTU_CHK_SEGS) <= 0)
		return false;
	/* One at a time: the ring has room for no more. */
	if (!__sync_val_compare_and_swap(&slot->is_too_long, 0, 1)) {
		slot->too_long_seq = packet->seq;
		slot->mtu = mtu;
		tell(packet, WIRE_IS_TOO_LONG, packet->way);
	}
	return true;
}

/* The session whose packet is quoted: its sender is the other end of the way that the
 * quoted packet's receiver, whose addresses are filled in, sends by. Returns that sender's
 * leg, and where it is told; NULL if it is none of ours.
 */
static __always_inline const struct wire_flow *
find_quoted(struct packet *packet, const struct quoted_tcp *tcp, __u32 *ifindex)
{
	packet->flow.source_port = tcp->target;
	packet->flow.target_port = tcp->source;
	if (!find_session(packet) || READ_ONCE(packet->session->state) != WIRE_SWITCHED)
		return NULL;
	*ifindex = way_out(packet);
	return *ifindex ? &packet->session->flows[!packet->way] : NULL;
}

/* What the sender knows the quoted segment by. */
static __always_inline void tell_segment(struct quoted_tcp *tcp, const struct packet *packet,
					 const struct wire_flow *sender)
{
	tcp->source = sender->source_port;
	tcp->target = sender->target_port;
	tcp->seq = bpf_htonl(bpf_ntohl(tcp->seq) - packet->session->seq_offset[!packet->way]);
}

/* Make an error about a packet that we have translated one about the packet that it was,
 * and send it to who has sent that. The sum over the quoted IPv4 header stays
 * what it was, because its checksum changes with the addresses.
 */
__own_stack int pass_error4(struct __sk_buff *skb, struct scratch *scratch)
{
	const __u32 at_icmp = ETH_BYTES + sizeof(struct ipv4_header);
	const __u32 at_quote = at_icmp + sizeof(struct icmp_header);
	struct quote4 *quoted = &scratch->quoted.v4, *told = &scratch->told.v4;
	__u16 fresh = bpf_htons(FRESH_TTL << 8 | PROTOCOL_ICMP), ttl;
	const struct wire_flow *sender;
	struct packet packet = {};
	struct icmp_header icmp;
	struct ipv4_header ip;
	__be32 addresses[2];
	__u32 ifindex, sum;
	__s64 change;

	if (bpf_skb_load_bytes(skb, ETH_BYTES, &ip, sizeof(ip)) ||
	    ip.version_length != IPV4_PLAIN || ip.fragment & (IPV4_OFFSET | IPV4_MORE) ||
	    bpf_skb_load_bytes(skb, at_icmp, &icmp, sizeof(icmp)) ||
	    icmp.type != ICMP_UNREACHABLE || icmp.code != ICMP_TOO_LONG ||
	    bpf_skb_load_bytes(skb, at_quote, quoted, sizeof(*quoted)) ||
	    quoted->ip.version_length != IPV4_PLAIN || quoted->ip.protocol != PROTOCOL_TCP)
		return NEXT;
	packet.flow.family = AF_INET;
	packet.flow.source[0] = quoted->ip.target;
	packet.flow.target[0] = quoted->ip.source;
	sender = find_quoted(&packet, &quoted->tcp, &ifindex);
	if (!sender)
		return NEXT;

	*told = *quoted;
	told->ip.source = sender->source[0];
	told->ip.target = sender->target[0];
	tell_segment(&told->tcp, &packet, sender);
	sum = bpf_csum_diff(&quoted->ip.source, 8, &told->ip.source, 8, (__u16)~quoted->ip.check);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	told->ip.check = ~sum;
	change = bpf_csum_diff((__be32 *)quoted, sizeof(*quoted), (__be32 *)told, sizeof(*told), 0);
	if (bpf_skb_store_bytes(skb, at_quote, told, sizeof(*told), 0) ||
	    bpf_l4_csum_replace(skb, at_icmp + ICMP_CHECK, 0, change, 0))
		return TC_ACT_SHOT;

	addresses[0] = sender->target[0];
	addresses[1] = sender->source[0];
	change = bpf_csum_diff(&ip.source, 8, addresses, 8, 0);
	__builtin_memcpy(&ttl, &ip.ttl, sizeof(ttl));
	if (bpf_skb_store_bytes(skb, ETH_BYTES + IPV4_SOURCE, addresses, 8, 0) ||
	    bpf_skb_store_bytes(skb, ETH_BYTES + IPV4_TTL, &fresh, sizeof(fresh), 0) ||
	    bpf_l3_csum_replace(skb, ETH_BYTES + IPV4_CHECK, 0, change, 0) ||
	    bpf_l3_csum_replace(skb, ETH_BYTES + IPV4_CHECK, ttl, fresh, sizeof(fresh)))
		return TC_ACT_SHOT;
	return bpf_redirect_neigh(ifindex, NULL, 0, 0);
}

/* The same; IPv6 has no checksum of its own, but ICMPv6's covers the addresses. */
__own_stack int pass_error6(struct __sk_buff *skb, struct scratch *scratch)
{
	const __u32 at_icmp = ETH_BYTES + sizeof(struct ipv6_header);
	const __u32 at_quote = at_icmp + sizeof(struct icmp_header);
	struct quote6 *quoted = &scratch->quoted.v6, *told = &scratch->told.v6;
	const struct wire_flow *sender;
	struct packet packet = {};
	struct icmp_header icmp;
	__be32 before[8], addresses[8];
	__u8 fresh = FRESH_TTL;
	__s64 change;
	__u32 ifindex;

	if (bpf_skb_load_bytes(skb, at_icmp, &icmp, sizeof(icmp)) || icmp.type != ICMPV6_TOO_LONG ||
	    bpf_skb_load_bytes(skb, at_quote, quoted, sizeof(*quoted)) ||
	    quoted->ip.next_header != PROTOCOL_TCP)
		return NEXT;
	packet.flow.family = AF_INET6;
	__builtin_memcpy(packet.flow.source, quoted->ip.target, 16);
	__builtin_memcpy(packet.flow.target, quoted->ip.source, 16);
	sender = find_quoted(&packet, &quoted->tcp, &ifindex);
	if (!sender)
		return NEXT;

	*told = *quoted;
	__builtin_memcpy(told->ip.source, sender->source, 16);
	__builtin_memcpy(told->ip.target, sender->target, 16);
	tell_segment(&told->tcp, &packet, sender);
	change = bpf_csum_diff((__be32 *)quoted, sizeof(*quoted), (__be32 *)told, sizeof(*told), 0);
	if (bpf_skb_store_bytes(skb, at_quote, told, sizeof(*told), 0) ||
	    bpf_l4_csum_replace(skb, at_icmp + ICMP_CHECK, 0, change, 0))
		return TC_ACT_SHOT;

	__builtin_memcpy(addresses, sender->target, 16);
	__builtin_memcpy(addresses + 4, sender->source, 16);
	if (bpf_skb_load_bytes(skb, ETH_BYTES + IPV6_SOURCE, before, sizeof(before)))
		return TC_ACT_SHOT;
	change = bpf_csum_diff(before, sizeof(before), addresses, sizeof(addresses), 0);
	if (bpf_skb_store_bytes(skb, ETH_BYTES + IPV6_SOURCE, addresses, sizeof(addresses), 0) ||
	    bpf_skb_store_bytes(skb, ETH_BYTES + IPV6_HOP_LIMIT, &fresh, 1, 0) ||
	    bpf_l4_csum_replace(skb, at_icmp + ICMP_CHECK, 0, change, BPF_F_PSEUDO_HDR))
		return TC_ACT_SHOT;
	return bpf_redirect_neigh(ifindex, NULL, 0, 0);
}

/* Of a packet without TCP: NEXT, unless it is an error about one of a session on wire. */
static __always_inline int pass_error(struct __sk_buff *skb, struct scratch *scratch, __u32 family)
{
	__u8 protocol = 0;

	if (family == AF_INET && !bpf_skb_load_bytes(skb, ETH_BYTES + IPV4_TTL + 1, &protocol, 1) &&
	    protocol == PROTOCOL_ICMP)
		return pass_error4(skb, scratch);
	if (family == AF_INET6 &&
	    !bpf_skb_load_bytes(skb, ETH_BYTES + IPV6_NEXT_HEADER, &protocol, 1) &&
	    protocol == PROTOCOL_ICMPV6)
		return pass_error6(skb, scratch);
	return NEXT;
}

static __always_inline bool is_equal(const struct wire_flow *one, const struct wire_flow *other)
{
	const __u64 *words = (const __u64 *)one, *others = (const __u64 *)other;

	return words[0] == others[0] && words[1] == others[1] && words[2] == others[2] &&
	       words[3] == others[3] && words[4] == others[4];
}

static __always_inline int pass_on(struct __sk_buff *skb, bool is_again)
{
	bool is_local = skb->ifindex == LOOPBACK_IFINDEX, is_known, is_last;
	struct packet packet = {};
	struct scratch *scratch;
	__u32 ifindex, segment_bytes, zero = 0;

	/* With its tag beside it, a packet of a VLAN: it comes by once more, as
	 * the VLAN's own.
	 */
	if (skb->vlan_present)
		return NEXT;
	scratch = bpf_map_lookup_elem(&wire_scratch, &zero);
	if (!scratch)
		return NEXT;
	packet.tcp = &scratch->tcp;
	segment_bytes = read_ip(skb, &packet, scratch);
	if (!segment_bytes)
		return pass_error(skb, scratch, packet.flow.family);
	if (packet.oddity)
		return refuse(skb, &packet);
	if (!read_tcp(skb, &packet, segment_bytes))
		return NEXT;
	if (is_again && is_equal(&scratch->left, &packet.flow))
		return NEXT;
	if (is_local && !is_again)
		scratch->left = packet.flow;
	if (!find_session(&packet) || !read_options(skb, &packet))
		return NEXT;
	is_known = packet.tcp->flags & TCP_RST || /* which may have none */
		   knows_options(&packet, packet.session->has_timestamps);
	if (READ_ONCE(packet.session->state) != WIRE_SWITCHED && !meet(skb, &packet, is_known))
		return NEXT;

	/* Somebody begins anew on these ports: the old session is over, and this
	 * one is none of ours.
	 */
	if (packet.tcp->flags & TCP_SYN) {
		if (!is_quiet(&packet))
			return TC_ACT_SHOT;
		packet.slot->is_reused = 1;
		end(&packet);
		return NEXT;
	}
	/* It cannot be translated, and our stack has no use for it. */
	if (!is_known)
		return TC_ACT_SHOT;
	ifindex = way_out(&packet);
	if (ifindex && is_too_long(skb, &packet, ifindex))
		return TC_ACT_SHOT;
	if (!translate(skb, &packet))
		return TC_ACT_SHOT; /* no memory: its sender will send it again */
	is_last = account(&packet);
	if (is_local && !is_again) {
		const struct wire_flow *other = &packet.session->flows[!packet.way];
		struct wire_flow *left = &scratch->left;

		__builtin_memcpy(left->source, other->target, sizeof(left->source));
		__builtin_memcpy(left->target, other->source, sizeof(left->target));
		left->source_port = other->target_port;
		left->target_port = other->source_port;
	}
	if (is_last)
		end(&packet);
	/* Up the stack, to the other end's socket; or out to the other end. */
	return ifindex ? bpf_redirect_neigh(ifindex, NULL, 0, 0) : NEXT;
}

SEC("tc")
int sock_wire(struct __sk_buff *skb)
{
	return pass_on(skb, false);
}

/* The same once more, behind all others at the loopback's ingress, for what they
 * have made of a packet since. What another gateway has translated may belong to a
 * session of ours (its backend is our listener): one gateway's sessions go by wire
 * through another's in either direction only if each sees what the other has made.
 */
SEC("tc")
int sock_wire_again(struct __sk_buff *skb)
{
	return pass_on(skb, true);
}
