// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The data path of sockgw, whole.
 *
 * sock_stream_verdict decides, segment by segment, whether the kernel moves
 * the bytes (redirect: they leave on the target's wire) or userspace does
 * (pass: they stay on the source, charged to its receive buffer, so that its
 * window closes and the sender stops). sock_follow notes what became of the
 * gateway's own connections.
 *
 * A redirected byte has been acknowledged to its sender: from then on it is
 * ours to lose. Every return below therefore says where the bytes are.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include "sockmap.h"

/* The verifier lets only a GPL-compatible program read a socket's fields. */
char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define READ_ONCE(x) (*(volatile typeof(x) *)&(x))

/* A source's cookie -> its target and its slot. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SOCK_SLOTS_DEFAULT);
	__type(key, __u64);
	__type(value, struct sock_pair);
} sock_pair_map SEC(".maps");

/* Cookie -> socket. The value is 8 bytes wide so that a look-up from
 * userspace (bpftool map dump) answers with the cookie.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, SOCK_SLOTS_DEFAULT);
	__type(key, __u64);
	__type(value, __u64);
} sock_map SEC(".maps");

/* Shared by mmap: userspace reads and writes the words without a system call. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, SOCK_SLOTS_DEFAULT);
	__type(key, __u32);
	__type(value, struct sock_slot);
} sock_slots SEC(".maps");

struct spill_ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
};

/* One ring for each worker, so that a spill wakes the thread that owns the
 * session and no other. Userspace fills it.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, SOCK_WORKERS_MAX);
	__type(key, __u32);
	__array(values, struct spill_ring);
} spill_rings SEC(".maps");

/* The gateway's own sockets and nobody else's: userspace tags a listener, whose
 * children inherit the entry (BPF_F_CLONE), and each socket before it dials.
 */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, struct sock_stats);
} sock_stats SEC(".maps");

/* Leave the segment to userspace. The first one of a spell is announced;
 * whoever is already copying (hold) finds the rest by reading on.
 *
 * The full barrier between the two words pairs with the one in release()
 * (shim.c): either userspace sees these bytes and keeps copying, or this sees
 * that it has let go, and announces them. Without it they would lie unheard.
 */
static __always_inline int pass(struct sock_slot *slot, const struct sock_pair *pair, __u32 len)
{
	__u64 passed = __sync_fetch_and_add(&slot->passed, (__u64)len);

	slot->passed_segments++;
	if (passed == READ_ONCE(slot->forwarded) && !READ_ONCE(slot->hold)) {
		struct sock_spill spill = { .slot = pair->slot };
		__u32 worker = pair->worker;
		void *ring = bpf_map_lookup_elem(&spill_rings, &worker);

		/* A ring has room for every slot twice: this cannot fail. */
		if (ring)
			bpf_ringbuf_output(ring, &spill, sizeof(spill), 0);
	}
	return SK_PASS;
}

/* Userspace still owns bytes of this direction: it holds it, or has not yet
 * forwarded all that was passed. What comes now must stay behind them.
 */
static __always_inline bool is_passing(struct sock_slot *slot)
{
	return READ_ONCE(slot->hold) || slot->passed != READ_ONCE(slot->forwarded);
}

/* The credit rule: redirect only what the target's send buffer takes now, so
 * that its psock backlog drains without its peer's help. The factor 2 covers
 * the buffers' own overhead (truesize). Outstanding bytes, redirected but not
 * yet in write_seq, are not in sk_wmem_queued.
 */
static __always_inline bool has_room(struct sock_slot *slot, struct tcp_sock *target, __u32 len)
{
	struct sock *sk = (struct sock *)target;
	__u32 forwarded = READ_ONCE(slot->forwarded);
	/* Adding nothing is a full barrier: what userspace counted as forwarded
	 * is in the write_seq that is read below.
	 */
	__u32 sent = forwarded + (__u32)__sync_fetch_and_add(&slot->redirected, 0);
	__s32 outstanding;
	__s64 need;

	/* The session's first redirect: nothing is outstanding, so write_seq
	 * stands still and says where we start.
	 */
	if (!slot->is_based) {
		slot->base = READ_ONCE(target->write_seq) - sent;
		slot->is_based = 1;
	}
	outstanding = slot->base + sent - READ_ONCE(target->write_seq);
	if (outstanding < 0)
		outstanding = 0;

	/* Read behind write_seq: what the kworker queues meanwhile then counts
	 * twice, and not never.
	 */
	need = (__s64)READ_ONCE(sk->sk_wmem_queued) + 2 * ((__s64)outstanding + len);
	return need <= sk->sk_sndbuf;
}

struct cut {
	struct __sk_buff *skb;
	__u32 left;
};

/* The most that sk_skb_adjust_room takes off at once, and often enough for the
 * largest segment (BIG TCP, 512 KiB).
 */
#define CUT_BYTES 0xfffU
#define CUT_STEPS 256

static int cut_step(__u32 step, void *context)
{
	struct cut *cut = context;
	__u32 bytes = cut->left < CUT_BYTES ? cut->left : CUT_BYTES;

	if (!bytes || bpf_skb_adjust_room(cut->skb, -(__s32)bytes, 0, 0))
		return 1;
	cut->left -= bytes;
	return 0;
}

/* Hold the segment against the source's sequence numbers, and cut off what was
 * seen before: TCP queues a retransmission whole when only its tail is new
 * (tcp_data_queue), and where recv() skips the head by copied_seq,
 * tcp_read_skb does not. 6.18: 4 of 130 transfers of 256 MB had 65,483 or
 * 130,966 bytes twice without this; it also lets a session be paired after
 * half a segment was read.
 *
 * Returns the bytes that are new, or -1 when the segment does not follow (a
 * gap, or no memory for the cut): never seen, and if it ever is, the session
 * is reset.
 */
static __always_inline __s32 sequence(struct __sk_buff *skb, struct sock_slot *slot)
{
	__u32 seq = skb->cb[0]; /* TCP_SKB_CB(skb)->seq */
	__s32 len = skb->len;
	struct cut cut = { .skb = skb };
	__s32 seen;

	if (!slot->is_sequenced) {
		struct bpf_sock *sk = skb->sk;
		struct tcp_sock *source = sk ? bpf_skc_to_tcp_sock(sk) : NULL;

		slot->next_seq = source ? source->copied_seq : seq;
		slot->is_sequenced = 1;
	}
	seen = slot->next_seq - seq;
	if (seen < 0)
		return -1;
	if (seen >= len)
		return 0;
	slot->next_seq = seq + len;
	if (seen) {
		cut.left = seen;
		bpf_loop(CUT_STEPS, cut_step, &cut, 0);
	}
	return cut.left ? -1 : len - seen;
}

SEC("sk_skb/stream_verdict")
int sock_stream_verdict(struct __sk_buff *skb)
{
	__u32 len, index, reverse_index;
	struct sock_slot *slot, *reverse;
	struct sock_pair *pair;
	struct bpf_sock *target;
	struct tcp_sock *tcp;
	__u64 cookie, peer;
	bool room;
	__s32 new;

	/* A bare FIN has no bytes to lose. The state change is already made
	 * and userspace hears of it (EPOLLRDHUP); passed or redirected, it
	 * would break the target's pipe (EPIPE) before the backlog is out.
	 */
	if (!skb->len)
		return SK_DROP;

	/* Not paired (any more): the bytes stay on this socket. Userspace,
	 * which still owns it, relays them or is about to close it.
	 */
	cookie = bpf_get_socket_cookie(skb);
	pair = bpf_map_lookup_elem(&sock_pair_map, &cookie);
	if (!pair)
		return SK_PASS;
	index = pair->slot;
	reverse_index = index ^ 1;
	slot = bpf_map_lookup_elem(&sock_slots, &index);
	reverse = bpf_map_lookup_elem(&sock_slots, &reverse_index);
	if (!slot || !reverse)
		return SK_PASS;

	new = sequence(skb, slot);
	/* Passed and marked: userspace finds the mark before it forwards. */
	if (new < 0) {
		slot->is_damaged = 1;
		return pass(slot, pair, skb->len);
	}
	/* Every byte was seen before, and has gone where it had to go. */
	if (!new)
		return SK_DROP;
	len = new;

	/* Bytes before these are with userspace: these wait their turn there.
	 *
	 * Or bytes of the reverse direction are. Those are passed on the target,
	 * into the queue that a redirect would join, and while they wait in it
	 * behind redirected ones they are charged to nobody: the target's window
	 * stays open, and what it holds grows (6.18, both ends flooding: up to
	 * 21 MiB in a 4 MiB buffer without this).
	 */
	if (is_passing(slot) || reverse->passed != READ_ONCE(reverse->forwarded))
		return pass(slot, pair, len);

	/* The target is not in the map (yet, or any more), and a redirect to
	 * it would drop bytes that are already acknowledged.
	 */
	peer = pair->peer;
	target = bpf_map_lookup_elem(&sock_map, &peer);
	if (!target)
		return pass(slot, pair, len);
	tcp = bpf_skc_to_tcp_sock(target);
	room = tcp && has_room(slot, tcp, len);
	bpf_sk_release(target);
	if (!room)
		return pass(slot, pair, len);

	/* It left the map just now: the same as above. */
	if (bpf_sk_redirect_hash(skb, &sock_map, &peer, 0) != SK_PASS)
		return pass(slot, pair, len);

	/* The bytes go to the target's psock, and a kworker sends them. */
	slot->redirected += len;
	slot->redirected_segments++;
	return SK_PASS;
}

SEC("sockops")
int sock_follow(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk = ops->sk;
	struct sock_stats *stats;

	/* Not tagged, so not ours: look no further, answer nothing. */
	if (!sk)
		return 1;
	stats = bpf_sk_storage_get(&sock_stats, sk, NULL, 0);
	if (!stats)
		return 1;

	switch (ops->op) {
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		stats->established_ns = bpf_ktime_get_ns();
		/* Not RTT_CB: it would run this at every acknowledgement. */
		bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG |
						       BPF_SOCK_OPS_RETRANS_CB_FLAG);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ops->args[1] == BPF_TCP_CLOSE)
			stats->closed_ns = bpf_ktime_get_ns();
		break;
	case BPF_SOCK_OPS_RETRANS_CB:
		break;
	default:
		return 1;
	}
	stats->srtt_us = ops->srtt_us >> 3; /* the kernel keeps it times 8 */
	stats->retransmits = ops->total_retrans;
	return 1;
}
