// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * A stretch of the way that loses what a test wants lost: TCP packets from one
 * port to another. Attached before or behind sock_wire it says where a packet has
 * got to; what is lost here is sent again by its sender, and so is late.
 */
#include "vmlinux.h"
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define ETH_BYTES 14
#define ETH_P_IP 0x0800
#define IPV4_BYTES 20
#define IPV4_PROTOCOL 9
#define IPV6_BYTES 40
#define IPV6_PROTOCOL 6
#define PROTOCOL_TCP 6
#define RULES 4096

struct hold_key {
	__u16 source_port; /* network order; 0: any */
	__u16 target_port;
};

struct hold_rule {
	__u64 which; /* bit n: the packet that n others have gone before is lost */
	__u64 is_all; /* every packet is */
	__u64 seen;
	__u64 lost;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, RULES);
	__type(key, struct hold_key);
	__type(value, struct hold_rule);
} hold_rules SEC(".maps");

SEC("tc")
int hold(struct __sk_buff *skb)
{
	bool is_v4 = skb->protocol == bpf_htons(ETH_P_IP);
	__u32 protocol_at = ETH_BYTES + (is_v4 ? IPV4_PROTOCOL : IPV6_PROTOCOL);
	__u32 ports_at = ETH_BYTES + (is_v4 ? IPV4_BYTES : IPV6_BYTES);
	struct hold_rule *rule;
	struct hold_key key;
	__u8 protocol;
	__u64 place;

	if (bpf_skb_load_bytes(skb, protocol_at, &protocol, sizeof(protocol)) ||
	    protocol != PROTOCOL_TCP || bpf_skb_load_bytes(skb, ports_at, &key, sizeof(key)))
		return TC_ACT_UNSPEC;
	rule = bpf_map_lookup_elem(&hold_rules, &key);
	if (!rule) {
		key.source_port = 0;
		rule = bpf_map_lookup_elem(&hold_rules, &key);
	}
	if (!rule)
		return TC_ACT_UNSPEC;
	place = __sync_fetch_and_add(&rule->seen, 1);
	if (!rule->is_all && (place >= 64 || !(rule->which >> place & 1)))
		return TC_ACT_UNSPEC;
	__sync_fetch_and_add(&rule->lost, 1);
	return TC_ACT_SHOT;
}
